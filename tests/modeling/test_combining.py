"""Several distillers in one model: on every detector, with weights, variants and the balance."""

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from distill.distillers import Distiller
from distill.errors import DistillError
from distill.losses import imitation_loss, region_weights, structural_loss
from tests.helpers import DETECTORS, detector_cfg, distillation_cfg, random_batch, write_teacher

ALL = ["ReviewDistiller", "StructuralDistiller", "ImitationDistiller"]
SIZES = [(64, 96), (61, 75)]


def build_pair(tmp_path, student="faster_rcnn", teacher_channels=24, teacher=None, **overrides):
    overrides = {"DISTILL.DISTILLERS": ALL, **overrides}
    teacher_overrides = write_teacher(tmp_path, detector_cfg(teacher or student, channels=teacher_channels))
    return build_model(distillation_cfg(detector_cfg(student), teacher_overrides, **overrides)).train()


def losses_of(model, batch, iteration=0, seed=0):
    """The losses of a step, and what was logged."""
    torch.manual_seed(seed)
    with EventStorage(iteration) as storage:
        losses = model(batch)
        return losses, {key: value for key, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("region, criterion", [("boxes", "SSIM"), ("gaussian", "HCL")])
def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none(tmp_path, kind, region, criterion):
    settings = {"DISTILL.IMITATION.REGION": region, "DISTILL.REVIEW.CRITERION": criterion, "DISTILL.BALANCE": 1.0}
    model = build_pair(tmp_path, kind, **settings)
    losses, _ = losses_of(model, random_batch(*SIZES))
    assert {"loss_review", "loss_structural", "loss_imitation"} < losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_structural_and_imitation_are_their_formulas_on_the_adapted_levels(tmp_path):
    settings = {
        "DISTILL.STRUCTURAL.LEVELS": ["p4", "p2"],
        "DISTILL.STRUCTURAL.ADAPTATION": "3x3",
        "DISTILL.STRUCTURAL.SCALE": "standard",
        "DISTILL.STRUCTURAL.WINDOW_SIZE": 5,
        "DISTILL.STRUCTURAL.SIGMA": 2.0,
        "DISTILL.STRUCTURAL.K1": 0.02,
        "DISTILL.STRUCTURAL.K2": 0.05,
        "DISTILL.STRUCTURAL.EXPONENTS": [1.0, 0.5, 2.0],
        "DISTILL.IMITATION.NORM": "smooth_l1",
        "DISTILL.IMITATION.REGION": "gaussian",
    }
    model = build_pair(tmp_path, **settings)
    batch = random_batch(*SIZES)
    losses, _ = losses_of(model, batch)
    student = model.student.backbone(model.student.preprocess_image(batch).tensor)
    teacher = model.teacher.view(batch).features
    structural, imitation = model.distillers["StructuralDistiller"], model.distillers["ImitationDistiller"]
    levels = ["p2", "p4"]
    adapted = [structural.adaptation[k](student[k]) for k in levels]
    expected = structural_loss(adapted, [teacher[k] for k in levels], "standard", 5, 2.0, 0.02, 0.05, (1.0, 0.5, 2.0))
    torch.testing.assert_close(losses["loss_structural"], expected)
    levels = ["p2", "p3", "p4", "p5", "p6"]
    adapted = [imitation.adaptation[k](student[k]) for k in levels]
    boxes = [x["instances"].gt_boxes.tensor for x in batch]
    weights = [region_weights(boxes, student[k].shape[2:], 2 ** int(k[1]), "gaussian") for k in levels]
    expected = imitation_loss(adapted, [teacher[k] for k in levels], "smooth_l1", weights)
    torch.testing.assert_close(losses["loss_imitation"], expected)


def test_equal_channels_need_no_weights_of_their_own(tmp_path):
    model = build_pair(tmp_path, teacher_channels=16, **{"DISTILL.DISTILLERS": ALL[1:]})
    assert not list(model.distillers.parameters())


def test_losses_and_weights_of_two_distillers_are_separate(tmp_path):
    batch = random_batch(*SIZES)
    torch.manual_seed(0)
    plain = build_pair(tmp_path)
    once, _ = losses_of(plain, batch)
    weights = {"ReviewDistiller": 0.5, "StructuralDistiller": 3.0, "ImitationDistiller": 7.0}
    for name, weight in weights.items():
        plain.distillers[name].loss_weight = weight
    weighted, logged = losses_of(plain, batch)
    for name, key in zip(weights, ("loss_review", "loss_structural", "loss_imitation")):
        torch.testing.assert_close(weighted[key], weights[name] * once[key])
        assert logged[f"weight/{key}"] == weights[name]


def test_ramps_follow_the_iteration_of_the_trainer(tmp_path):
    settings = {"SOLVER.MAX_ITER": 100, "DISTILL.STRUCTURAL.WARMUP_ITERS": 10, "DISTILL.IMITATION.DECAY": 0.5}
    model = build_pair(tmp_path, **settings)
    batch = random_batch(*SIZES)
    full, _ = losses_of(model, batch, 20)
    ramped, logged = losses_of(model, batch, 4)
    torch.testing.assert_close(ramped["loss_structural"], 0.4 * full["loss_structural"])
    assert logged["weight/loss_structural"] == pytest.approx(0.4)
    decayed, _ = losses_of(model, batch, 90)
    torch.testing.assert_close(decayed["loss_imitation"], 0.2 * full["loss_imitation"])
    torch.testing.assert_close(decayed["loss_review"], full["loss_review"])


def test_two_of_one_kind_add_two_losses_and_two_parts_of_the_checkpoint(tmp_path):
    settings = {
        "DISTILL.DISTILLERS": ["ImitationDistiller", "ImitationDistiller/boxes"],
        "DISTILL.VARIANTS": CfgNode({"boxes": {"IMITATION": {"REGION": "boxes", "LEVELS": ["p3"]}}}),
    }
    model = build_pair(tmp_path, **settings)
    losses, _ = losses_of(model, random_batch(*SIZES))
    assert losses["loss_imitation"] > 0 and losses["loss_imitation_boxes"] > 0
    keys = [key for key in model.state_dict() if key.startswith("distillers.ImitationDistiller/boxes.adaptation.")]
    assert keys == [f"distillers.ImitationDistiller/boxes.adaptation.p3.{name}" for name in ("weight", "bias")]
    other = build_pair(tmp_path / "other", **settings)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", DETECTORS)
def test_balance_sets_the_ratio_of_the_gradients_at_the_fpn(tmp_path, kind):
    model = build_pair(tmp_path, kind, **{"DISTILL.BALANCE": 0.25, "DISTILL.STRUCTURAL.LOSS_WEIGHT": 2.0})
    batch = random_batch(*SIZES)
    features = {}
    model.student.backbone.register_forward_hook(lambda module, args, output: features.update(output))
    losses, logged = losses_of(model, batch)
    assert logged["gradient_ratio/StructuralDistiller"] == pytest.approx(0.5, rel=1e-4)

    def norm(*keys):
        total = sum(losses[key] for key in keys)
        grads = torch.autograd.grad(total, list(features.values()), retain_graph=True, allow_unused=True)
        return sum(g.double().square().sum() for g in grads if g is not None).sqrt().item()

    own = norm(*(key for key in losses if key not in ("loss_review", "loss_structural", "loss_imitation")))
    assert norm("loss_review") / own == pytest.approx(0.25, rel=1e-3)
    assert norm("loss_structural") / own == pytest.approx(0.5, rel=1e-3)
    assert norm("loss_imitation") / own == pytest.approx(0.25, rel=1e-3)


def test_measuring_changes_no_gradient(tmp_path):
    model = build_pair(tmp_path)
    batch = random_batch(*SIZES)
    gradients = []
    for iteration in (0, 1):  # measured, not measured
        other = copy.deepcopy(model)
        losses, logged = losses_of(other, batch, iteration)
        assert ("gradient_ratio/ReviewDistiller" in logged) == (iteration == 0)
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in other.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_measuring_works_on_batches_without_annotations_and_under_bfloat16(tmp_path):
    model = build_pair(tmp_path, **{"DISTILL.IMITATION.REGION": "boxes", "DISTILL.BALANCE": 1.0})
    batch = random_batch(*SIZES)
    for x in batch:
        x["instances"] = x["instances"][[]]
    losses, logged = losses_of(model, batch)
    assert losses["loss_imitation"] == 0 and "gradient_ratio/ImitationDistiller" not in logged
    sum(losses.values()).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, logged = losses_of(model, random_batch(*SIZES), iteration=50)
    assert logged["gradient_ratio/StructuralDistiller"] > 0
    assert losses["loss_structural"].dtype == losses["loss_imitation"].dtype == torch.float32


class Stub(Distiller):
    """Returns what a function makes of the two views."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, student, teacher):
        return self.function(student, teacher)


def mean(view):
    return view.features["p3"].mean()


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda s, t: mean(s), r"Stub.forward returned a Tensor: expected a dict.*\{\"loss_mine\": loss\}"),
        (lambda s, t: {}, "Stub.forward returned no loss. Where a batch has nothing to compare, return 0 times"),
        (lambda s, t: {"loss_review": mean(s)}, "Stub names a loss 'loss_review', which .* another distiller has"),
        (lambda s, t: {"loss_x": mean(t)}, "'loss_x' does not depend on the student: nothing that it is computed"),
        (lambda s, t: {"loss_x": mean(s).detach()}, "'loss_x' does not depend on the student"),
    ],
)
def test_mistakes_of_a_newcomer_are_named(tmp_path, function, message):
    model = build_pair(tmp_path)
    model.distillers["Stub"] = Stub(function)
    with pytest.raises(DistillError, match=message):
        model(random_batch(*SIZES))


def test_a_loss_of_own_weights_alone_is_named_at_the_first_measurement(tmp_path):
    model = build_pair(tmp_path)
    model.distillers["Stub"] = stub = Stub(lambda s, t: {"loss_x": (stub.own * mean(t)).sum()})
    stub.own = nn.Parameter(torch.ones(3))
    with pytest.raises(DistillError, match="Stub's loss 'loss_x' does not depend on the student's features"):
        model(random_batch(*SIZES))


def test_without_gradients_nothing_is_refused_and_nothing_measured(tmp_path):
    model = build_pair(tmp_path)
    with torch.no_grad():  # as when the statistics of batch norms are computed anew
        losses = model(random_batch(*SIZES))
    assert losses["loss_review"] > 0
    assert not [key for key in get_event_storage().latest() if key.startswith("gradient_ratio")]
