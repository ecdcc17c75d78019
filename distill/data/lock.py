"""Waiting for another process that does the same work."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator

from iopath.common.file_io import file_lock
from portalocker import LockException

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def waiting_lock(path: str, doing: str) -> Iterator[bool]:
    """Holds the lock of a file, for which it waits as long as it takes.

    Args:
        path: of the file; the lock is a file beside it.
        doing: what the process that holds it does, for the log.

    Yields:
        Whether the lock is held: not where the folder cannot be written, or its disk has no locks.
    """
    with contextlib.ExitStack() as stack:
        is_held = False
        while not is_held:
            lock = file_lock(path)  # makes the folder
            if not _has_locks(f"{path}.lock"):
                break
            try:
                stack.enter_context(lock)
                is_held = True
            except LockException:  # after an hour
                logger.info(f"Still waiting for another process, which {doing}.")
        yield is_held


def _has_locks(path: str) -> bool:
    """Whether a file can be locked, now or once another process lets go of it."""
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, a disk without locks
        return False
    return True
