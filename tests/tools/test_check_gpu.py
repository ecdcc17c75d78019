"""The check for GPUs, as far as it goes without one."""

import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT, detector_cfg, distillation_cfg, run_script, write_teacher

SIZE = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "96"]


@pytest.fixture
def check_gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    monkeypatch.chdir(ROOT)
    import check_gpu

    return check_gpu


@pytest.fixture
def small(tmp_path):
    """A pair that processors without bfloat16 run in seconds; the script's own take them a quarter of an hour."""
    # small features would be compared with what bfloat16 rounds away
    detector = detector_cfg("retinanet", depth=18, **{"MODEL.PIXEL_STD": [1.0, 1.0, 1.0]})
    cfg = distillation_cfg(detector, write_teacher(tmp_path, detector))
    (tmp_path / "small.yaml").write_text(cfg.dump())
    return str(tmp_path / "small.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu():
    result = run_script("tools/check_gpu.py")
    assert result.returncode == 1 and "There is no CUDA GPU here" in result.stderr and "Traceback" not in result.stderr


def test_losses_are_compared_with_the_cpus(check_gpu, small, monkeypatch):
    monkeypatch.setattr(check_gpu, "SMALL", SIZE)
    rows = check_gpu.compare_losses(small, "cpu", ["float32", "bfloat16"])
    assert [row["ok"] for row in rows] == ["yes", "yes"]
    assert rows[0]["largest difference"] == 0 < rows[1]["largest difference"] < 0.1
    real = check_gpu._losses
    wrong = lambda model, batch, device, precision: {  # noqa: E731
        key: value * (1.5 if precision == "bfloat16" and key == "loss_review" else 1)
        for key, value in real(model, batch, device, precision).items()
    }
    monkeypatch.setattr(check_gpu, "_losses", wrong)
    (row,) = check_gpu.compare_losses(small, "cpu", ["bfloat16"])
    assert row["ok"] == "NO" and row["of"] == "loss_review"


def test_times_have_the_precision_in_their_names(check_gpu, small):
    rows = check_gpu.time_steps(small, "cpu", 1, SIZE, "bfloat16")
    assert len(rows) > 5 and all(row["part"].endswith("(bfloat16)") and row["ms"] > 0 for row in rows)


def test_processes_that_hang_are_told_of(check_gpu, monkeypatch):
    def hang(command, timeout, **settings):
        raise subprocess.TimeoutExpired(command, timeout, b"the log", b" of NCCL")

    monkeypatch.setattr(check_gpu.subprocess, "run", hang)
    assert check_gpu.train_on_all(2) == (False, "the log of NCCL\nnot done after 600 seconds")


def test_all_devices_train(check_gpu):
    trained, log = check_gpu.train_on_all(0)  # on the CPU, in one process
    assert trained, log
