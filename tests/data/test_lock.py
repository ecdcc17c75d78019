"""Locks that are waited for, and disks that have none."""

import contextlib
import errno
import fcntl
import logging

import pytest
from iopath.common.file_io import file_lock
from portalocker import LockException

from distill.data import lock


def test_a_lock_is_waited_for_as_long_as_it_takes(tmp_path, monkeypatch, caplog):
    answers = [LockException("an hour is over")] * 3

    class Lock:
        def __enter__(self):
            if answers:
                raise answers.pop()
            return self.lock.__enter__()

        def __exit__(self, *error):
            return self.lock.__exit__(*error)

    def ask(path):
        asked = Lock()
        asked.lock = file_lock(path)
        return asked

    monkeypatch.setattr(lock, "file_lock", ask)
    monkeypatch.setattr(lock.logger, "level", logging.INFO)
    with open(tmp_path / "x.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process has it at first
        assert lock._has_locks(str(tmp_path / "x.lock"))
    with lock.waiting_lock(str(tmp_path / "x"), "checks the images") as is_held:
        assert is_held and not answers
    assert caplog.text.count("Still waiting for another process, which checks the images.") == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_used_without(tmp_path, monkeypatch, number):
    def flock(*args):
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.waiting_lock(str(tmp_path / "x"), "checks") as is_held:
        assert not is_held


def test_a_folder_that_cannot_be_written_is_used_without(tmp_path):
    (tmp_path / "file").write_text("")
    with lock.waiting_lock(str(tmp_path / "file" / "x"), "checks") as is_held:
        assert not is_held


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
