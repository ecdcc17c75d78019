"""Checks of numbers and folders before anything is built, and how schedules scale with the number of processes."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from ..errors import DistillError

logger = logging.getLogger(__name__)

# keys of DISTILL and its distillers that count iterations
_ITERATIONS = ("WARMUP_ITERS", "UPDATE_PERIOD", "GRADIENT_LOG_PERIOD")


def check_solver(cfg: CfgNode, num_workers: int) -> None:
    """Checks the numbers that a training rests on.

    Args:
        cfg: the full config.
        num_workers: number of processes.

    Raises:
        DistillError: one of them is impossible.
    """
    node = cfg.SOLVER
    batch, reference = node.IMS_PER_BATCH, node.REFERENCE_WORLD_SIZE
    workers = reference or num_workers
    evenly = f" that the {workers} processes can share evenly, such as {_evenly(batch, workers)}" if workers > 1 else ""
    expected = {
        "REFERENCE_WORLD_SIZE": (reference >= 0, "the number of GPUs that the schedule is for, or 0 for no scaling"),
        "IMS_PER_BATCH": (
            batch > 0 and (workers < 1 or batch % workers == 0),
            f"a number of images above 0{evenly}",
        ),
        "MAX_ITER": (node.MAX_ITER > 0, "a number of iterations above 0"),
        "ACCUMULATE": (node.ACCUMULATE > 0, "the number of batches that make a step, above 0"),
        "BASE_LR": (node.BASE_LR >= 0, "a learning rate, such as 0.01"),
        "CHECKPOINT_PERIOD": (node.CHECKPOINT_PERIOD > 0, "a number of iterations above 0, such as 5000"),
    }
    for key, (is_valid, meaning) in expected.items():
        if not is_valid:
            raise DistillError(f"SOLVER.{key} is {node[key]}: expected {meaning}.")


def _evenly(batch: int, workers: int) -> int:
    return max(1, round(batch / workers)) * workers


def check_output_dir(folder: str, name: str = "OUTPUT_DIR") -> None:
    """Makes sure that a command can write its results.

    Args:
        folder: where they go.
        name: what the user gave it by, such as "--output".

    Raises:
        DistillError: it cannot be made or written to.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DistillError(
            f"{name} is {folder!r}, which cannot be written: {error}. Name a folder that you may write to."
        ) from error


@contextlib.contextmanager
def records_kept(folder: str, is_training: bool = False) -> Iterator[None]:
    """Keeps the config of a training from being written over by that of an evaluation, or of a training that fails
    before its first step: it is what starts the run again. In a folder without a training nothing is kept.

    Args:
        folder: OUTPUT_DIR.
        is_training: whether what is done meanwhile is the start of a training, whose config stays if it succeeds.
    """
    has_run = comm.is_main_process() and Path(folder, "metrics.json").is_file()
    paths = [Path(folder, name) for name in ("config.yaml", "config.py")] if has_run else []
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException:
        _restore(before)
        raise
    if not is_training:
        _restore(before)


def _restore(contents: Mapping[Path, bytes | None]) -> None:
    for path, content in contents.items():
        if content is None:
            path.unlink(missing_ok=True)
            continue
        temporary = path.with_suffix(".tmp")  # then renamed: another process may be reading the file
        temporary.write_bytes(content)
        temporary.replace(path)


def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """As Detectron2's, by SOLVER.REFERENCE_WORLD_SIZE; what DISTILL counts in iterations scales, too.

    Args:
        cfg: the full config.
        num_workers: number of processes.

    Returns:
        The same config, or a scaled copy.
    """
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:  # tools/report.py reads it: the config that is written is the one before
        logger.info(f"The schedule is for {num_workers} processes")
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    # Detectron2's rounds to 0, which is no checkpoint and no evaluation
    scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
    scaled.TEST.EVAL_PERIOD = max(min(1, cfg.TEST.EVAL_PERIOD), scaled.TEST.EVAL_PERIOD)
    scale_iterations(scaled.DISTILL, num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE)
    if frozen:
        scaled.freeze()
    return scaled


def scale_iterations(node: CfgNode, scale: float) -> None:
    """Divides the iterations that DISTILL counts, as Detectron2 does those of SOLVER by REFERENCE_WORLD_SIZE; in place.

    Args:
        node: DISTILL, not frozen.
        scale: how many times more processes there are than the schedule is for.
    """
    for key, value in node.items():
        if isinstance(value, CfgNode):
            scale_iterations(value, scale)
        elif key in _ITERATIONS and value > 0:
            node[key] = max(1, round(value / scale))
