"""Trainings in processes of their own, for the scripts that run several."""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class TrainingFailed(RuntimeError):
    """A training ended with an error; the message is the end of its log, and its exit status."""


class FolderInUse(TrainingFailed):
    """Another process trains in this folder."""


def read_metrics(folder: Path) -> list[dict]:
    """What Detectron2 has written to metrics.json so far.

    Args:
        folder: a run's OUTPUT_DIR.

    Returns:
        A dict for each record, oldest first. What is no JSON is left out: half a line, or two of which a full disk has
        cut the first.
    """
    path, records = folder / "metrics.json", []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def train(
    config: str,
    folder: Path,
    opts: Sequence[str],
    on_progress: Callable[[dict], None],
    arguments: Sequence[str] = (),
) -> float:
    """Trains with train_net.py, from the last checkpoint in ``folder`` if there is one.

    Args:
        config: the config file.
        folder: its OUTPUT_DIR; the log is written to train.log there.
        opts: overrides, ``[KEY, VALUE, ...]``.
        on_progress: called with each new record of metrics.json that has an ``eta_seconds``.
        arguments: further ones of train_net.py, such as ``["--num-gpus", "8"]``.

    Returns:
        The most memory that the process held, in MiB; 0 where the system does not tell.

    Raises:
        FolderInUse: another process trains in this folder.
        TrainingFailed: it did not end well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "train.log"
    command = [sys.executable, "train_net.py", "--config-file", config, "--resume", *arguments]
    command += ["OUTPUT_DIR", str(folder), *opts]
    shown, peak = None, 0.0
    with (folder / "lock").open("w") as lock, log.open("a") as stream:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"Another process trains in {folder}: wait for it, or end it.") from error
        except OSError:  # a disk without locks
            pass
        # the training holds the lock, too, and keeps it should this process be killed
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            peak = max(peak, _peak_mib(process.pid))
            steps = [record for record in read_metrics(folder) if "eta_seconds" in record]
            if steps and steps[-1]["iteration"] != shown:
                shown = steps[-1]["iteration"]
                on_progress(steps[-1])
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        end = log.read_text().splitlines()[-15:]
        raise TrainingFailed("\n".join([*end, f"train_net.py ended with exit status {process.returncode}"]))
    return peak


def _peak_mib(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # no Linux, or the process has just ended
        return 0.0
    return int(found.group(1)) / 2**10 if found else 0.0
