"""What goes wrong in one of two processes. Run by test_failures.py as: failure_worker.py MODE FOLDER."""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from distill.config import load_config
from distill.engine import Trainer, launch
from distill.errors import DistillError
from distill.modeling.loss_weights import LossWeights
from tests.helpers import random_batch

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])


class FailingTrainer(Trainer):
    """Trains on a random batch; "bad input": the second process cannot read its fourth one."""

    def build_train_loader(self):
        for index in range(self.cfg.SOLVER.MAX_ITER):
            if MODE == "bad_input" and comm.get_rank() == 1 and index == 3:
                raise DistillError("Cannot read the image 'three.jpg'")
            yield random_batch((64, 96))


def unreadable(*args, **kwargs) -> None:
    raise OSError("No such file")


def train(resume: bool) -> None:
    cfg = load_config(str(FOLDER / "cfg.yaml"))
    if MODE == "unshared":  # each process has a disk of its own, and only the first one's holds a checkpoint
        cfg.OUTPUT_DIR = f"{cfg.OUTPUT_DIR}{comm.get_rank()}"
    trainer = FailingTrainer(cfg)
    if MODE == "unreadable" and comm.get_rank() == 1:
        trainer.checkpointer.load = unreadable
    trainer.resume_or_load(resume=resume)
    print(f"rank {comm.get_rank()} starts at {trainer.start_iter}", flush=True)
    trainer.train()


class CountedAllReduce(torch.autograd.Function):
    """A sum over processes in the backward pass, as SyncBN has one."""

    calls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        CountedAllReduce.calls += 1
        dist.all_reduce(torch.ones(1))
        return gradient


def measure_gradients() -> None:
    """The first process's gradient overflows at the largest scale of its half-precision features, the second's not."""
    features = torch.ones(1, 2, 4, 4, dtype=torch.float16, requires_grad=True)
    size = 100.0 if comm.get_rank() == 0 else 0.5
    distiller = nn.Module()
    distiller.register_buffer("log_gradient_ratio", torch.tensor(0.0))
    distiller.register_buffer("num_measurements", torch.tensor(0))
    distiller.weight_at = lambda *args: 1.0
    distiller.decay, distiller.undecayed = 0.0, ()
    weights = LossWeights(nn.ModuleDict({"D": distiller}), period=1)
    with EventStorage():
        x = CountedAllReduce.apply(features)
        x = x.float()  # so that the loss itself is, as under autocast
        weights({"loss_cls": (x * size).sum()}, {"D": {"loss_d": 2 * (x * size).sum()}}, {"p2": features})
    print(f"rank {comm.get_rank()} backward passes {CountedAllReduce.calls}", flush=True)


def main(args: Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if MODE == "sleep":
        (FOLDER / f"pid{comm.get_rank()}").write_text(str(os.getpid()))
        time.sleep(300)
    elif MODE == "overflow":
        measure_gradients()
    else:
        train(resume=MODE != "bad_input")


if __name__ == "__main__":
    launch(main, Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto"))
