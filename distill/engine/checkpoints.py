"""Checkpoints of a run: the same one in all processes, and one that survives a failure."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from ..errors import DistillError

if TYPE_CHECKING:  # which imports this very module
    from .trainer import Trainer

logger = logging.getLogger(__name__)

PREVIOUS_BEST = "previous_model_best.pth"  # of an earlier training in the same folder


def agreed_checkpoint(checkpointer: Checkpointer) -> str:
    """The last checkpoint of OUTPUT_DIR, which all processes must see alike.

    Args:
        checkpointer: of the run, in every process.

    Returns:
        Its path; empty if there is none.

    Raises:
        DistillError: in all processes, if they see different ones, as without a shared disk.
    """
    path = checkpointer.get_checkpoint_file() if checkpointer.has_checkpoint() else ""
    check_alike(path or "none", "--resume finds different checkpoints", checkpointer.save_dir)
    return path


def check_alike(value: Any, problem: str, folder: str) -> None:
    """Refuses to go on where the processes of a run differ.

    Args:
        value: what this process has.
        problem: what is wrong if others have something else.
        folder: OUTPUT_DIR, for the message.

    Raises:
        DistillError: in all processes, if they differ.
    """
    values = comm.all_gather(value)
    if any(other != values[0] for other in values):
        listed = ", ".join(f"process {rank}: {other}" for rank, other in enumerate(values))
        raise DistillError(
            f"{problem}: {listed}. All machines must see the same files: put OUTPUT_DIR ({folder!r}) on a disk that "
            "they share, or copy it from the first machine to all others."
        )


def save_after_failure(trainer: Trainer) -> None:
    """Saves what was learned until a failure, from the process that failed, for ``--resume``.

    A file of its own is written and then renamed, so that several processes that fail at once, or one that is killed,
    leave no half a checkpoint. Nothing is written where the weights are not finite.

    Args:
        trainer: whose ``last_step`` is the last that it did; None for none.
    """
    done = trainer.last_step
    if done is None:
        return
    checkpointer = trainer.checkpointer
    model = checkpointer.model.state_dict()
    if not is_finite(model):
        logger.warning("Some weights are not finite, so no checkpoint is written.")
        return
    others = {name: other.state_dict() for name, other in checkpointer.checkpointables.items()}
    if "trainer" in others:
        others["trainer"]["iteration"] = done  # a step that failed is done again, one that was done is not
    name = f"model_{done:07d}.pth"
    try:
        write_file(os.path.join(checkpointer.save_dir, name), {"model": model, **others, "iteration": done})
        write_file(os.path.join(checkpointer.save_dir, "last_checkpoint"), name)
    except (OSError, RuntimeError) as error:  # a full disk must not hide what failed before
        logger.error(f"What was learned until here cannot be saved: {error}")
        return
    logger.info(f"Saved what was learned until here: {os.path.join(checkpointer.save_dir, name)}")


def write_file(path: str, content: Any) -> None:
    """Writes a file beside and renames it, so that a process that is killed meanwhile leaves the old one as it was.

    Args:
        path: of the file.
        content: text, or what ``torch.save`` takes.

    Raises:
        OSError: it cannot be written; a full disk may be a RuntimeError of ``torch.save``.
    """
    temporary = f"{path}.{comm.get_rank()}.tmp"
    try:
        if isinstance(content, str):
            with open(temporary, "w") as f:
                f.write(content)
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except Exception:  # half a file would fill what is left of the disk
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def is_finite(state: dict[str, Any]) -> bool:
    """Whether all floating-point tensors of a state dict are finite."""
    floats = (x for x in state.values() if isinstance(x, torch.Tensor) and x.is_floating_point())
    return all(x.isfinite().all() for x in floats)


def last_finite_checkpoint(folder: str, since: float = 0.0) -> str:
    """The newest checkpoint of a run whose weights are finite.

    Args:
        folder: its OUTPUT_DIR.
        since: when the run began, in seconds since the epoch: what is older is another run's.

    Returns:
        Its path; empty if there is none.
    """
    names = [name for name in os.listdir(folder) if name.endswith(".pth") and name != PREVIOUS_BEST]
    paths = [path for name in names if os.path.getmtime(path := os.path.join(folder, name)) >= since]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        with contextlib.suppress(Exception):  # a damaged file is not the one that is looked for
            if is_finite(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]):
                return path
    return ""
