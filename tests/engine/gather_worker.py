"""Gathers objects in the process group of a machine with CUDA, gloo in NCCL's place. Run by test_distributed.py."""

from argparse import Namespace
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.utils import comm

from distill.engine import launch

init_process_group = dist.init_process_group


def init_without_nccl(backend: str, **kwargs) -> None:
    init_process_group(backend.replace("nccl", "gloo"), **kwargs)


def main(args: Namespace) -> None:
    gathered = comm.gather(f"rank {comm.get_rank()}", dst=0), comm.all_gather(comm.get_rank())
    if comm.is_main_process():
        print(dist.get_backend(), *gathered)


if __name__ == "__main__":
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 0),
        mock.patch.object(dist, "init_process_group", init_without_nccl),
    ):
        launch(main, Namespace(num_gpus=0, num_machines=1, machine_rank=0, dist_url="auto"))
