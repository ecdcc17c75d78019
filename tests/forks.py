"""Runs the project's scripts in forks of a process that has imported torch, Detectron2 and the like: of a script that
trains two steps, these imports are most of the time. What is the project's own is imported by each script anew."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
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


def run_in_fork(args: list[str], cwd: Path, timeout: int, env: dict[str, str]) -> subprocess.CompletedProcess:
    """As ``subprocess.run([python, *args], capture_output=True, text=True)``.

    Args:
        args: a script and its arguments.
        cwd: where it runs.
        timeout: in seconds.
        env: all of its environment.

    Returns:
        With exit status, output and errors.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed.
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
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_run, args=(args, str(cwd), env, *map(str, files)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(args, timeout)
        return subprocess.CompletedProcess(args, process.exitcode, *(file.read_text() for file in files))


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
