"""Two processes over gloo compute what one computes."""

import json

import torch

from tests.helpers import detector_cfg, distillation_cfg, random_batch, run_script, write_teacher


def test_objects_are_gathered_under_torchrun_on_cuda():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_script(*torchrun, "tests/engine/gather_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "cpu:gloo,cuda:gloo ['rank 0', 'rank 1'] [0, 1]" in result.stdout


def test_two_processes_step_like_one(tmp_path):
    # Detectron2 samples anchors and proposals at random: here all of them are taken, the same number per image.
    student = detector_cfg(
        "faster_rcnn",
        **{
            "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2000,
            "MODEL.RPN.NMS_THRESH": 1.0,
            "MODEL.PIXEL_STD": [58.0, 57.0, 57.0],  # small deltas: no proposal is moved out of its image
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 500,
            "SOLVER.MAX_ITER": 1,
            "SOLVER.BASE_LR": 0.01,
            "SOLVER.WARMUP_ITERS": 0,
        },
    )
    cfg = distillation_cfg(
        student,
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{
            "DISTILL.DISTILLERS": ["ReviewDistiller", "ImitationDistiller"],
            "DISTILL.REVIEW.NORM": "GN",
            "DISTILL.REVIEW.MID_CHANNELS": 32,
            "DISTILL.BALANCE": 0.5,
        },
    )
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    torch.save(random_batch((64, 96), (64, 96), (60, 96), (64, 90)), tmp_path / "batch.pth")
    worker = ["tests/engine/step_worker.py", str(tmp_path / "cfg.yaml"), str(tmp_path / "batch.pth"), "OUTPUT_DIR"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    losses, weights = [], []
    for name, launcher in (("one", []), ("two", torchrun)):
        result = run_script(*launcher, *worker, str(tmp_path / name))
        assert result.returncode == 0, result.stderr[-3000:]
        record = json.loads((tmp_path / name / "metrics.json").read_text().splitlines()[-1])
        losses.append({key: value for key, value in record.items() if "loss" in key or "ratio" in key})
        weights.append(torch.load(tmp_path / name / "model_final.pth")["model"])
    assert losses[0].keys() == losses[1].keys() and losses[0]["loss_review"] > 0
    assert losses[0]["weight/loss_review"] != 1 != losses[0]["weight/loss_imitation"]
    for name in ("ReviewDistiller", "ImitationDistiller"):
        assert abs(losses[0][f"gradient_ratio/{name}"] - 0.5) < 1e-4
    for key, value in losses[0].items():
        assert abs(value - losses[1][key]) <= 1e-4 * max(1, abs(value)), key
    initial = torch.load(tmp_path / "batch.pth.initial")
    for key, before in initial.items():
        updates = [after[key] - before for after in weights]
        torch.testing.assert_close(*updates, rtol=1e-3, atol=1e-5, msg=key)
    moved = {key for key, before in initial.items() if not torch.equal(weights[1][key], before)}
    assert {key.split(".")[0] for key in moved} == {"backbone", "proposal_generator", "roi_heads", "distillers"}
