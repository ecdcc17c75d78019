"""Runs the project's scripts in forks of a process that has imported torch, Detectron2 and the like: of a script that
trains two steps, these imports are most of the time. What is the project's own is imported by each script anew."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = [
    "torch",
    "torchvision",
    "timm",
    "cv2",
    "matplotlib.pyplot",
    "pycocotools.mask",
    "detectron2.checkpoint",
    "detectron2.data",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.modeling",
    "detectron2.model_zoo",
]


def run_in_fork(
    args: list[str], cwd: Path, timeout: int, env: dict[str, str], processes: int = 1
) -> subprocess.CompletedProcess:
    """As ``subprocess.run([python, *args], capture_output=True, text=True)``.

    Args:
        args: a script and its arguments.
        cwd: where it runs.
        timeout: in seconds.
        env: all of its environment.
        processes: how many at a time, each with the variables by which torchrun names its processes.

    Returns:
        With the exit status furthest from 0, and the output and errors of one process after the other.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed. A process does not end with one that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    own = dict(os.environ)
    os.environ.update(env)  # the server's libraries read it when they are loaded
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(own)
    with tempfile.TemporaryDirectory() as folder:
        environments = [env] if processes == 1 else [{**env, **variables} for variables in _ranks(processes)]
        outputs = [[f"{folder}/{name}{rank}" for rank in range(processes)] for name in ("stdout", "stderr")]
        started = [
            context.Process(target=_run, args=(args, str(cwd), environment, *paths))
            for environment, *paths in zip(environments, *outputs)
        ]
        for process in started:
            process.start()
        deadline = time.monotonic() + timeout
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in started if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        stdout, stderr = ("".join(map(_read, paths)) for paths in outputs)
        if late:
            print(stdout, stderr)
            raise subprocess.TimeoutExpired(args, timeout, stdout, stderr)
        status = max((process.exitcode for process in started), key=abs)
        return subprocess.CompletedProcess(args, status, stdout, stderr)


def _ranks(processes: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _run(args: list[str], cwd: str, env: dict[str, str], stdout: str, stderr: str) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # the server's is forkserver, for workers of data loaders, too
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    script = Path(cwd, args[0])
    ours = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(script.parent), *ours, *(path for path in sys.path if path not in ("", cwd, *ours))]
    sys.argv = list(args)
    runpy.run_path(str(script), run_name="__main__")
