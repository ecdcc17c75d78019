"""Mixed precision on the CPU and on CUDA."""

import copy
import types

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm, batch_norm
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from distill.engine import Trainer
from distill.engine.steps import StepTrainer
from distill.errors import DistillError
from distill.modeling.precision import amp_dtype, keep_coordinates, keep_statistics
from tests.helpers import DETECTORS, detector_cfg, distillation_cfg, random_batch, set_all, write_teacher

AMP = {"SOLVER.AMP.ENABLED": True}


@pytest.mark.parametrize(
    "device, precision, expected",
    [
        ("cpu", "auto", torch.bfloat16),
        ("cpu", "bfloat16", torch.bfloat16),
        ("cuda", "auto", torch.float16),
        ("cuda:1", "float16", torch.float16),
        ("cuda", "bfloat16", torch.bfloat16),
    ],
)
def test_the_type_by_device(device, precision, expected):
    cfg = detector_cfg("fcos", **AMP, **{"MODEL.DEVICE": device, "SOLVER.AMP.PRECISION": precision})
    assert amp_dtype(cfg) == expected
    cfg.SOLVER.AMP.ENABLED = False
    assert amp_dtype(cfg) is None


@pytest.mark.parametrize("device, precision", [("cpu", "float16"), ("cpu", "half"), ("cuda", "fp8")])
def test_other_types_are_refused(device, precision):
    cfg = detector_cfg("fcos", **AMP, **{"MODEL.DEVICE": device, "SOLVER.AMP.PRECISION": precision})
    with pytest.raises(DistillError, match=f"SOLVER.AMP.PRECISION is '{precision}': expected 'auto'"):
        amp_dtype(cfg)


class OneBatchTrainer(Trainer):
    def build_train_loader(self):
        return [random_batch((64, 96), (61, 75))] * self.cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize("kind", DETECTORS)
def test_trains_in_bfloat16_on_the_cpu(tmp_path, kind):
    settings = {"OUTPUT_DIR": str(tmp_path / "out"), "SOLVER.MAX_ITER": 3, "SOLVER.BASE_LR": 1e-3}
    settings |= {"SOLVER.WARMUP_ITERS": 0, "SOLVER.WEIGHT_DECAY": 0.0}  # each weight moves by its gradient alone
    more = {"DISTILL.DISTILLERS": ["ReviewDistiller", "StructuralDistiller"], "DISTILL.BALANCE": 0.5}
    teacher = write_teacher(tmp_path, detector_cfg(kind, channels=32))
    cfg = distillation_cfg(detector_cfg(kind, **settings, **AMP), teacher, **more)
    trainer = OneBatchTrainer(cfg)
    seen, given = [], []  # inside the backbone; to heads and distillers
    trainer.model.student.backbone.register_forward_hook(lambda m, a, out: given.extend(x.dtype for x in out.values()))
    trainer.model.student.backbone.fpn_output4.register_forward_hook(lambda m, args, output: seen.append(output.dtype))
    trainer.model.teacher.model.backbone.fpn_output4.register_forward_hook(
        lambda m, a, output: seen.append(output.dtype)
    )
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert set(seen) == {torch.bfloat16} and len(seen) == 6
    assert set(given) == {torch.float32}  # or boxes would be rounded to 8 bits
    after = dict(trainer.model.named_parameters())
    assert all(value.dtype == torch.float32 for value in after.values())
    # layers' weights move; those of norms, and the distillers' where the gradient is small, may round away
    layers = {key: p for key, p in after.items() if p.requires_grad and p.dim() > 1}
    still = {key for key, p in layers.items() if torch.equal(p, before[key])}
    assert all(key.startswith("distillers.") and layers[key].grad is not None for key in still)
    assert len(still) < sum(key.startswith("distillers.") for key in layers)
    resumed = OneBatchTrainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 3


@pytest.mark.parametrize("kind", DETECTORS)
def test_losses_in_bfloat16_are_close_to_those_in_float32(kind):
    model = build_model(detector_cfg(kind)).train()
    rounded = copy.deepcopy(model)
    keep_coordinates(rounded)
    batch = random_batch((64, 96), (61, 75))
    losses = []
    with EventStorage():
        for side, enabled in ((model, False), (rounded, True)):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                losses.append(side(batch))
    for key, loss in losses[0].items():
        assert losses[1][key].dtype == torch.float32
        if kind.endswith("rcnn") and "rpn" not in key:
            continue  # of sampled proposals, which are others where two of nearly the same score change places
        assert losses[1][key].item() == pytest.approx(loss.item(), rel=0.1, abs=0.02), key


def test_boxes_are_pooled_where_they_are():
    detector = build_model(detector_cfg("faster_rcnn")).eval()
    keep_coordinates(detector)
    pooled = {}
    detector.roi_heads.box_pooler.register_forward_pre_hook(
        lambda m, args: pooled.update(features=args[0], boxes=args[1])
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        detector(random_batch((64, 96)))
    assert all(x.dtype == torch.float32 for x in pooled["features"])  # or Detectron2 would round the boxes
    assert all(x.tensor.dtype == torch.float32 for x in pooled["boxes"])


def test_a_float16_training_keeps_its_scale(tmp_path):
    """The scaler's state is Detectron2's, so checkpoints go from one trainer to the other."""
    from detectron2.engine import AMPTrainer

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = StepTrainer(model, [], optimizer, torch.device("cpu"), torch.float16)
    state = {**own.state_dict(), "iteration": 7, "grad_scaler": {**_scaler_state(), "scale": 128.0}}
    own.load_state_dict(state)
    assert own.grad_scaler.get_scale() == own.state_dict()["grad_scaler"]["scale"] == 128.0
    assert own.state_dict().keys() == AMPTrainer(model, [], optimizer).state_dict().keys()
    cpu = StepTrainer(model, [], optimizer, torch.device("cpu"), torch.bfloat16)
    assert not cpu.grad_scaler.is_enabled()
    cpu.load_state_dict(state)  # a training that began on another device


def test_gradients_are_scaled_where_the_distillers_alone_compute_in_float16():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for own in (None, torch.bfloat16):
        arguments = (model, [], optimizer, torch.device("cpu"), own, 1)
        assert StepTrainer(*arguments, torch.float16).grad_scaler.is_enabled()
        assert "grad_scaler" in StepTrainer(*arguments, torch.float16).state_dict()
        assert not StepTrainer(*arguments, torch.bfloat16).grad_scaler.is_enabled()


def _scaler_state():
    return {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }


def test_the_command_refuses_it_before_anything_is_built(tmp_path):
    import train_net

    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DATASETS.TRAIN": ["digit_scenes_train"], "DATASETS.TEST": [], "MODEL.ROI_HEADS.NUM_CLASSES": 10})
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    opts = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16", "OUTPUT_DIR", str(tmp_path / "out")]
    parsed = train_net.argument_parser().parse_args(["--config-file", str(tmp_path / "cfg.yaml"), *opts])
    with pytest.raises(SystemExit, match="SOLVER.AMP.PRECISION is 'float16': expected 'auto' or 'bfloat16' on the CPU"):
        train_net.run(parsed)


def test_synchronised_norms_keep_their_variance_in_bfloat16(monkeypatch):
    world = types.SimpleNamespace(get_world_size=lambda: 2)  # of which both have the same batch
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", world.get_world_size)
    monkeypatch.setattr(batch_norm, "dist", world)
    monkeypatch.setattr(batch_norm, "differentiable_all_reduce", lambda x: 2 * x)
    images = 20 + torch.randn(2, 8, 16, 16)  # a mean of 20 standard deviations
    conv = torch.nn.Conv2d(8, 8, 1, bias=False)
    torch.nn.init.eye_(conv.weight.data[:, :, 0, 0])
    wanted = torch.nn.BatchNorm2d(8)(images)
    for norm in (NaiveSyncBatchNorm(8), torch.nn.Sequential(conv, NaiveSyncBatchNorm(8), conv)):
        keep_statistics(norm)
        with torch.autocast("cpu", torch.bfloat16):
            found = norm.train()(images.bfloat16())
        assert found.dtype == torch.bfloat16 and (found - wanted).square().mean().sqrt() < 0.05  # 2^-8 of 20
        torch.testing.assert_close(norm.train()(images), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("amp, distill, kept", [(True, "auto", 1), (False, "bfloat16", 1), (False, "auto", 0)])
def test_a_training_in_bfloat16_keeps_the_statistics_of_students_and_distillers(tmp_path, amp, distill, kept):
    settings = {"OUTPUT_DIR": str(tmp_path / "out"), "SOLVER.MAX_ITER": 1, "SOLVER.AMP.ENABLED": amp}
    more = {"DISTILL.PRECISION": distill, "DISTILL.REVIEW.NORM": "naiveSyncBN"}
    student = detector_cfg("retinanet", **settings, **{"MODEL.FPN.NORM": "naiveSyncBN"})
    trainer = OneBatchTrainer(distillation_cfg(student, write_teacher(tmp_path, detector_cfg("retinanet")), **more))
    for part in (trainer.model.student, trainer.model.distillers):
        norms = [x for x in part.modules() if isinstance(x, NaiveSyncBatchNorm)]
        assert norms and all(len(norm._forward_pre_hooks) == kept for norm in norms)
    trainer.train()


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"loss": (self.weight * batch).sum()}


def test_a_scaled_step_is_the_one_that_was_asked_for_and_an_overflow_is_left_out(monkeypatch):
    model, moved = Line(), []
    batches = [torch.tensor([1.0]), torch.tensor([3e38]), torch.tensor([2.0])]  # times the scale, the second overflows
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    trainer = StepTrainer(model, batches, optimizer, torch.device("cpu"), other_dtype=torch.float16)
    monkeypatch.setattr(trainer, "_write_metrics", lambda losses, data_time: None)
    before = trainer.grad_scaler.get_scale()
    for _ in batches:
        trainer.run_step()
        moved.append(model.weight.item())
    assert moved == [-1, -1, -3] and trainer.grad_scaler.get_scale() == before / 2


def test_the_trainer_scales_gradients_where_the_distillers_alone_compute_in_float16(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.modeling.teacher.distill_dtype", lambda cfg: torch.float16)  # refused on the CPU
    student = detector_cfg("retinanet", **{"OUTPUT_DIR": str(tmp_path / "out"), "SOLVER.MAX_ITER": 1})
    trainer = OneBatchTrainer(distillation_cfg(student, write_teacher(tmp_path, detector_cfg("retinanet"))))
    assert trainer._trainer.grad_scaler.is_enabled()
