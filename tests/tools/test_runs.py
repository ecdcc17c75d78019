"""Trainings in processes of their own: what is read of them, and locks."""

import errno
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import runs

    return runs


def test_a_record_that_a_full_disk_cut_is_left_out(runs, tmp_path):
    lines = ['{"iteration": 19, "a": 1.0}', '{"iteration": 39, "total_l{"iteration": 59}', '{"iteration": 79}', '{"ite']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert [record["iteration"] for record in runs.read_metrics(tmp_path)] == [19, 79]
    assert runs.read_metrics(tmp_path / "nowhere") == []


@pytest.mark.parametrize("error, expected", [(errno.ENOLCK, "TrainingFailed"), (errno.EAGAIN, "FolderInUse")])
def test_a_folder_in_use_is_told_from_a_disk_without_locks(runs, tmp_path, monkeypatch, error, expected):
    def flock(*args):
        raise OSError(error, "")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    with pytest.raises(runs.TrainingFailed) as caught:
        runs.train("nowhere.yaml", tmp_path / "out", [], print)
    assert type(caught.value).__name__ == expected
