"""Waiting for another process that does the same work."""

import contextlib
import logging
import time
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
        is_held = None
        while is_held is None:
            began = time.monotonic()
            try:
                stack.enter_context(file_lock(path))
                is_held = True
            except OSError:
                is_held = False
            except LockException:  # after an hour; at once where the disk has no locks
                if time.monotonic() - began < 1:
                    is_held = False
                else:
                    logger.info(f"Still waiting for another process, which {doing}.")
        yield is_held
