"""One training step on a stored batch, of which each process takes its share. Run by test_distributed.py."""

import sys
from argparse import Namespace

import torch
from detectron2.utils import comm

from distill.config import load_config
from distill.engine import Trainer, launch


class OneBatchTrainer(Trainer):
    def build_train_loader(self):
        batch = torch.load(sys.argv[2], weights_only=False)  # written by the test
        own = batch[comm.get_rank() :: comm.get_world_size()]
        return [own[i :: self.cfg.SOLVER.ACCUMULATE] for i in range(self.cfg.SOLVER.ACCUMULATE)]


def main(args: Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = OneBatchTrainer(load_config(sys.argv[1], sys.argv[3:]))
    trainer.resume_or_load(resume=False)
    if comm.get_world_size() == 1:
        torch.save(trainer.model.state_dict(), f"{sys.argv[2]}.initial")
    trainer.train()
    print(f"of {comm.get_world_size()} processes", flush=True)


if __name__ == "__main__":
    launch(main, Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto"))
