"""Two processes over gloo compute what one computes."""

import json

import torch
from detectron2.config import CfgNode
from pytest import approx

from tests.helpers import detector_cfg, distillation_cfg, random_batch, run_script, write_teacher


def test_objects_are_gathered_under_torchrun_on_cuda():
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_script(*torchrun, "tests/engine/gather_worker.py")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "cpu:gloo,cuda:gloo ['rank 0', 'rank 1'] [0, 1]" in result.stdout


# Detectron2 samples anchors and proposals at random: here all of them are taken, the same number per image.
ALL_PROPOSALS = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 2000,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 500,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 0,
}


def steps(folder, cfg, batch, of_two=()):
    """What one process and two of them log of a step and have as weights after it, and the weights before; ``of_two``
    are overrides of the two."""
    folder.mkdir()
    (folder / "cfg.yaml").write_text(cfg.dump())
    torch.save(batch, folder / "batch.pth")
    worker = ["tests/engine/step_worker.py", str(folder / "cfg.yaml"), str(folder / "batch.pth"), "OUTPUT_DIR"]
    losses, weights = [], []
    for name, processes, more in (("one", 1, ()), ("two", 2, of_two)):
        result = run_script(*worker, str(folder / name), *more, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
        assert f"of {processes} processes" in result.stdout
        record = json.loads((folder / name / "metrics.json").read_text().splitlines()[-1])
        losses.append({key: value for key, value in record.items() if "loss" in key or "ratio" in key})
        weights.append(torch.load(folder / name / "model_final.pth")["model"])
    assert losses[0].keys() == losses[1].keys()
    return losses, weights, torch.load(folder / "batch.pth.initial")


def equal_steps(tmp_path, cfg, draw, names=None, of_two=()):
    """Checks that one process and two of them have the same losses in a step on a batch that ``draw`` returns, and
    change the weights alike; of some losses only, and the distillers' own weights, where ``names`` are given. Returns
    what ``steps`` does."""
    differing = []
    for number in range(3):
        losses, weights, initial = result = steps(tmp_path / str(number), cfg, draw(), of_two)
        for key in names or losses[0]:
            assert losses[1][key] == approx(losses[0][key], rel=1e-4, abs=1e-4), key
        differing.append([])
        for key, before in initial.items():
            updates = [after[key] - before for after in weights]
            compared = names is None or key.startswith("distillers.")
            if compared and not torch.allclose(*updates, rtol=1e-3, atol=1e-5):
                differing[-1].append(key)
        # now and then a ReLU's input rounds to the other side of zero, and its gradient is another: draw again
        if not differing[-1]:
            return result
    raise AssertionError(f"weights that change otherwise in two processes, in three draws: {differing}")


def draw_four():
    return random_batch((64, 96), (64, 96), (60, 96), (64, 90))


def test_two_processes_step_like_one(tmp_path):
    student = detector_cfg("faster_rcnn", **ALL_PROPOSALS, **{"SOLVER.MAX_ITER": 1})
    # Pearson correlation and structural similarity standardise by the images of a process, as published
    names = ["Review", "Imitation", "FGD", "MGD", "CWD", "Logit"]
    cfg = distillation_cfg(
        student,
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{
            "DISTILL.DISTILLERS": [f"{name}Distiller" for name in names],
            "DISTILL.REVIEW.NORM": "GN",
            "DISTILL.REVIEW.MID_CHANNELS": 32,
            "DISTILL.MGD.MASK_RATIO": 0.0,  # what is masked is drawn by each process
            "DISTILL.BALANCE": 0.5,
        },
    )
    losses, weights, initial = equal_steps(tmp_path, cfg, draw_four)
    assert losses[0]["loss_review"] > 0 and losses[0]["loss_logit"] > 0
    assert losses[0]["weight/loss_review"] != 1 != losses[0]["weight/loss_imitation"]
    for name in ("Review", "Imitation"):
        assert abs(losses[0][f"gradient_ratio/{name}Distiller"] - 0.5) < 1e-4
    moved = {key for key, before in initial.items() if not torch.equal(weights[1][key], before)}
    assert {key.split(".")[0] for key in moved} == {"backbone", "proposal_generator", "roi_heads", "distillers"}


def test_two_processes_with_two_batches_step_like_one_with_one(tmp_path):
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **ALL_PROPOSALS, **{"SOLVER.MAX_ITER": 1}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{
            "DISTILL.DISTILLERS": ["ReviewDistiller", "CWDDistiller"],
            "DISTILL.REVIEW.NORM": "",
            "DISTILL.REVIEW.MID_CHANNELS": 32,
            "DISTILL.GRADIENT_LOG_PERIOD": 0,  # what is logged is the first batch's
        },
    )
    equal_steps(tmp_path, cfg, draw_four, of_two=["SOLVER.ACCUMULATE", "2"])


def test_two_processes_distil_a_dense_detector_like_one(tmp_path):
    # The images have different numbers of positive anchors, those of the first process none. Detectron2 counts those
    # of each process for the detection losses, so that these differ; the distillers' do not.
    settings = {"SOLVER.MAX_ITER": 1, "SOLVER.BASE_LR": 0.01, "SOLVER.WARMUP_ITERS": 0}
    cfg = distillation_cfg(
        detector_cfg("retinanet", **settings),
        write_teacher(tmp_path, detector_cfg("retinanet", channels=32)),
        **{
            "DISTILL.DISTILLERS": ["CrossKDDistiller", "LogitDistiller", "LogitDistiller/binary"],
            "DISTILL.VARIANTS": CfgNode({"binary": {"LOGIT": {"KIND": "BCKD"}}}),
            "DISTILL.GRADIENT_LOG_PERIOD": 0,
        },
    )
    names = ["loss_cross_class", "loss_cross_box", "loss_logit", "loss_logit_binary", "loss_logit_box_binary"]
    losses, weights, initial = equal_steps(
        tmp_path, cfg, lambda: [x for boxes in (0, 3, 0, 6) for x in random_batch((64, 96), boxes=boxes)], names
    )
    assert all(losses[0][name] > 0 for name in names)
    assert any(not torch.equal(weights[1][key], initial[key]) for key in initial if key.startswith("distillers."))
