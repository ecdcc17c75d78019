"""Trains a few steps and saves each process's prototypes. Run by test_hook.py."""

import sys
from argparse import Namespace

import torch
from detectron2.utils import comm

from distill.config import load_config
from distill.data import register_from_config
from distill.engine import Trainer, launch


def main(args: Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = load_config(sys.argv[1], sys.argv[3:])
    register_from_config(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    model = trainer._unwrapped_model()
    torch.save(model.distillers["GlobalKnowledgeDistiller"].prototypes.state_dict(), f"{sys.argv[2]}{comm.get_rank()}")


if __name__ == "__main__":
    launch(main, Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto"))
