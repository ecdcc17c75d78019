"""Locks that are waited for, and disks that have none."""

import contextlib
import errno
import itertools
import logging
from unittest.mock import Mock

import pytest
from iopath.common.file_io import file_lock
from portalocker import LockException

from distill.data import lock


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is so many seconds after the one before."""

    def passes(seconds):
        monkeypatch.setattr(lock.time, "monotonic", Mock(side_effect=itertools.count(0, seconds)))

    return passes


def test_a_lock_is_waited_for_as_long_as_it_takes(tmp_path, monkeypatch, caplog, clock):
    answers = [LockException("an hour is over")] * 3

    def ask(path):
        if answers:
            raise answers.pop()
        return file_lock(path)

    monkeypatch.setattr(lock, "file_lock", ask)
    monkeypatch.setattr(lock.logger, "level", logging.INFO)
    clock(3600)
    with lock.waiting_lock(str(tmp_path / "x"), "checks the images") as is_held:
        assert is_held and not answers
    assert caplog.text.count("Still waiting for another process, which checks the images.") == 3


@pytest.mark.parametrize(
    "error", [LockException(OSError(errno.ENOLCK, "No locks available")), PermissionError("another user's")]
)
def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch, error, clock):
    monkeypatch.setattr(lock, "file_lock", Mock(side_effect=error))
    clock(0.01)
    with lock.waiting_lock(str(tmp_path / "x"), "checks") as is_held:
        assert is_held is False


def test_errors_inside_are_not_taken_for_the_locks(tmp_path):
    for error in (OSError("disk full"), LockException("another lock")):
        with (
            contextlib.suppress(type(error)),
            pytest.raises(type(error), match=str(error)),
            lock.waiting_lock(str(tmp_path / "x"), "checks"),
        ):
            raise error
    with lock.waiting_lock(str(tmp_path / "x"), "checks") as is_held:
        assert is_held
