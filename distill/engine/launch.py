"""Starts the processes of a run: one, several by Detectron2's launcher or by torchrun, on CUDA or the CPU."""

import ctypes
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..errors import DistillError


def launch(main: Callable[[Namespace], object], args: Namespace, device: str = "cuda") -> None:
    """Runs ``main(args)`` in every process of the run.

    Under torchrun, this process is one of them. Otherwise ``args.num_gpus`` processes are started on each of
    ``args.num_machines``: on CUDA by Detectron2's launcher, on the CPU (which v0.6's launcher refuses) by torchrun,
    with the command line of this process. None of them outlives its parent.

    Args:
        main: the main function.
        args: what Detectron2's ``default_argument_parser`` gives.
        device: where the model is to run, as MODEL.DEVICE says; on a machine without CUDA it is the CPU.

    Raises:
        DistillError: there are fewer GPUs than ``args.num_gpus``.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
        _join_torchrun()
        main(args)
        # not after a failure, where it would wait for the others inside a collective
        dist.destroy_process_group()
        return
    processes = max(args.num_gpus, 1)
    is_distributed = processes * args.num_machines > 1
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if is_distributed and not on_cuda:
        _start_torchrun(processes, args)
        return
    if on_cuda and args.num_gpus > torch.cuda.device_count():
        raise DistillError(f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()} GPUs.")
    try:
        detectron2_launch(
            _spawned if is_distributed else main,  # a single process is the user's own
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args) if is_distributed else (args,),
        )
    except mp.ProcessExitedException as error:
        sys.exit(f"error: {error}: see its message above.")


def ddp_device_ids(device: str) -> list[int] | None:
    """What DistributedDataParallel is told of a model's device.

    Args:
        device: MODEL.DEVICE.

    Returns:
        The current GPU, which is not the local rank where each process sees one GPU alone (SLURM); None on the CPU.
    """
    return None if torch.device(device).type == "cpu" else [torch.cuda.current_device()]


def _spawned(main: Callable[[Namespace], object], args: Namespace) -> None:
    _end_with_parent()
    main(args)


def _end_with_parent() -> None:
    """Has the kernel kill this process when its parent dies, or it would train on and write beside a resumed run."""
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux's prctl
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGKILL)


def _start_torchrun(processes: int, args: Namespace) -> None:
    from torch.distributed.run import main as torchrun  # starts a rendezvous server, so only where it is needed

    command = ["--nproc-per-node", str(processes), "--nnodes", str(args.num_machines)]
    if args.num_machines == 1:
        command += ["--standalone"]
    else:
        address = urlparse(args.dist_url)
        command += ["--node-rank", str(args.machine_rank)]
        command += ["--master-addr", str(address.hostname), "--master-port", str(address.port)]
    try:
        torchrun([*command, *sys.argv])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"error: process {rank} of this run failed with exit code {failure.exitcode}: see its message above.")


def _join_torchrun() -> None:
    """Joins the process group that torchrun's environment variables describe."""
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # MODEL.DEVICE may be the CPU all the same
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if backend != "gloo":  # Detectron2 gathers objects over gloo, which it does not recognise in a backend of two
        gloo = dist.new_group(backend="gloo")
        comm._get_global_gloo_group = lambda: gloo
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(local_size)
    else:  # Detectron2 v0.6, whose own launcher sets this very variable
        first = dist.get_rank() - local_rank
        groups = {
            start: dist.new_group(list(range(start, start + local_size)))
            for start in range(0, dist.get_world_size(), local_size)
        }
        comm._LOCAL_PROCESS_GROUP = groups[first]
