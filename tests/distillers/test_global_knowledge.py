"""The global-knowledge distiller in a model: its parts against a literal loop over instances, on every detector."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from distill.distillers import GlobalKnowledgeDistiller, build_distillers
from distill.errors import DistillError
from tests.helpers import DETECTORS, NUM_CLASSES, detector_cfg, distillation_cfg, random_batch, set_all, write_teacher

SIZES = [(64, 96), (61, 75)]


def build_pair(tmp_path, student="faster_rcnn", teacher=None, prototypes=True, teacher_overrides=None, **overrides):
    teacher_cfg = detector_cfg(teacher or student, channels=24, **(teacher_overrides or {}))
    cfg = distillation_cfg(
        detector_cfg(student),
        write_teacher(tmp_path, teacher_cfg),
        **{"DISTILL.DISTILLERS": ["GlobalKnowledgeDistiller"], "DISTILL.GLOBAL.NUM_PROTOTYPES": 2, **overrides},
    )
    model = build_model(cfg).train()
    if prototypes:
        give_prototypes(model)
    return model


def give_prototypes(model, classes=(0, 1)):
    """Random prototypes, for these classes only."""
    bank = model.distillers["GlobalKnowledgeDistiller"].prototypes
    labels = torch.tensor(classes).repeat_interleave(2)
    found = {
        level: {
            "student": torch.randn(len(labels), kept.student.shape[1]),
            "teacher": torch.randn(len(labels), kept.teacher.shape[1]),
            "labels": labels,
        }
        for level, kept in bank.levels.items()
    }
    bank.replace(found)


def losses_of(model, batch, iteration=0):
    torch.manual_seed(0)
    with EventStorage(iteration):
        return model(batch)


def literal_mean(level, box, stride):
    height, width = level.shape[1:]
    x0, x1 = (min(max(math.floor(v / stride), 0), width - 1) for v in box[0::2])
    y0, y1 = (min(max(math.floor(v / stride), 0), height - 1) for v in box[1::2])
    return level[:, y0 : y1 + 1, x0 : x1 + 1].mean((1, 2)), (y0, y1, x0, x1)


def literal_losses(model, batch, levels, instances):
    """Global and local part as the formulas say it, box by box; ``instances``: (image, box, class)."""
    distiller = model.distillers["GlobalKnowledgeDistiller"]
    student = model.student.backbone(model.student.preprocess_image(batch).tensor)
    teacher = model.teacher.view(batch).features
    loss_global, loss_local, robustness_of = 0.0, [], {}
    for index, level in enumerate(levels):
        stride = 2 ** int(level[1:])
        own = distiller.prototypes.at(level)
        terms, mask = [], torch.full((len(batch), *student[level].shape[2:]), -1.0)
        for number, (image, box, label) in enumerate(instances):
            if label not in own[2]:
                continue
            s, cells = literal_mean(student[level][image], box, stride)
            t, _ = literal_mean(teacher[level][image], box, stride)
            cos_s = torch.stack([s @ p / (s.norm() * p.norm()) for p in own[0]])
            cos_t = torch.stack([t @ p / (t.norm() * p.norm()) for p in own[1]])
            mine = own[2] == label
            robustness = max(0.0, 1 - abs(cos_s[mine].max() - cos_t[mine].max()).item())
            d = ((cos_s - cos_t) * robustness).abs()
            terms += torch.where(d < 1, d * d / 2, d - 0.5).tolist()
            area = (box[2] - box[0] + 1) * (box[3] - box[1] + 1)
            if min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), len(levels) - 1) == index:
                robustness_of[number] = robustness
                y0, _, x0, _ = cells
                y1, x1 = (max(math.floor(v / stride), first + 1) for v, first in ((box[3], y0), (box[2], x0)))
                inside = mask[image, y0:y1, x0:x1]
                mask[image, y0:y1, x0:x1] = inside.clamp(min=robustness)
        loss_global += sum(terms) / max(len(terms), 1)
        error = (distiller.adaptation[level](student[level]) - teacher[level]).square()
        weight = mask.clamp(min=0)[:, None].expand_as(error)
        outside = (mask < 0).float()[:, None].expand_as(error)
        foreground = (weight * error).sum() / (2 * weight.sum()).clamp(min=1)
        background = (outside * error).sum() / (2 * outside.sum()).clamp(min=1)
        loss_local.append((foreground + 4 * background).item())
    dense = hasattr(model.student, "head")  # published: the sum over levels there, elsewhere the mean
    return 5 * loss_global, sum(loss_local) / (1 if dense else len(loss_local)), robustness_of


def literal_response(model, batch, instances, robustness):
    """The response part as the formula says it, both box heads run on the same boxes."""
    boxes = [Boxes(torch.tensor([box for i, box, _ in instances if i == image])) for image in range(len(batch))]
    logits = [view.box_head(boxes)[0] for view in model.frozen_views(batch)]
    total = 0.0
    for n in range(len(instances)):
        p, q = ((x[n] / 2).softmax(0) for x in (logits[1], logits[0]))
        total += robustness.get(n, 0.0) * (p * (p.log() - q.log())).sum().item()
    return 4 * total / logits[0].numel()


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_parts_equal_the_literal_formulas_on_the_ground_truth(tmp_path, kind):
    model = build_pair(tmp_path, kind, kind, **{"DISTILL.GLOBAL.INSTANCES": "ground_truth"})
    # boxes of several levels, of a class without prototypes among them
    batch = random_batch((256, 320), (200, 250), boxes=6)
    losses = losses_of(model, batch)
    instances = [
        (i, box.tolist(), label.item())
        for i, x in enumerate(batch)
        for box, label in zip(x["instances"].gt_boxes.tensor, x["instances"].gt_classes)
    ]
    levels = model.distillers["GlobalKnowledgeDistiller"].levels
    expected_global, expected_local, robustness = literal_losses(model, batch, levels, instances)
    assert losses["loss_global"].item() == pytest.approx(expected_global, rel=1e-4)
    assert losses["loss_local"].item() == pytest.approx(expected_local, rel=1e-4)
    if kind == "faster_rcnn":  # a dense detector's response has a test of its own
        expected = literal_response(model, batch, instances, robustness)
        assert losses["loss_response"].item() == pytest.approx(expected, rel=1e-3)


def test_a_head_that_a_distiller_ran_holds_no_graph(tmp_path):
    model = build_pair(tmp_path, **{"DISTILL.GLOBAL.INSTANCES": "ground_truth"})
    losses_of(model, random_batch(*SIZES))
    assert not any(tap.has_record for tap in model._taps.values())


def test_the_adaptation_starts_as_torch_initialises_it(tmp_path):
    for level, conv in build_pair(tmp_path).distillers["GlobalKnowledgeDistiller"].adaptation.items():
        bound = conv.weight[0].numel() ** -0.5
        assert conv.kernel_size == (3, 3), level
        assert 0.9 * bound < conv.weight.abs().max() <= bound and 0 < conv.bias.abs().max() <= bound, level


def test_instances_are_the_sampled_positive_proposals(tmp_path):
    model = build_pair(tmp_path)
    sampled = []
    model.student.roi_heads.register_forward_hook(lambda module, args, output: sampled.extend(output[0]))
    batch = random_batch((128, 160), (120, 130))
    losses = losses_of(model, batch)
    instances = [
        (i, box.tolist(), label.item())
        for i, x in enumerate(sampled)
        for box, label in zip(x.proposal_boxes.tensor, x.gt_classes)
        if label < NUM_CLASSES
    ]
    assert len(instances) >= 6 and len(instances) < sum(len(x) for x in sampled)
    levels = ["p2", "p3", "p4", "p5", "p6"]
    expected_global, expected_local, robustness = literal_losses(model, batch, levels, instances)
    assert losses["loss_global"].item() == pytest.approx(expected_global, rel=1e-4)
    assert losses["loss_local"].item() == pytest.approx(expected_local, rel=1e-4)
    assert losses["loss_response"].item() == pytest.approx(
        literal_response(model, batch, instances, robustness), rel=1e-3
    )


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_a_dense_detectors_response_is_weighed_at_the_matched_anchors(tmp_path, kind):
    model = build_pair(tmp_path, kind)
    batch = random_batch((128, 160), (96, 130))
    losses = losses_of(model, batch)
    student, teacher = model.frozen_views(batch)
    instances = [
        (i, box.tolist(), label.item())
        for i, x in enumerate(batch)
        for box, label in zip(x["instances"].gt_boxes.tensor, x["instances"].gt_classes)
    ]
    _, _, robustness = literal_losses(model, batch, ["p3", "p4", "p5", "p6", "p7"], instances)
    detector = model.student
    anchors = detector.anchor_generator([student.features[level] for level in detector.head_in_features])
    labels, _ = detector.label_anchors(anchors, [x["instances"] for x in batch])
    total, count, first = 0.0, 0, 0
    for i, (matches, own) in enumerate(zip(student.match_anchors(), labels)):
        rows = [r for r in range(len(own)) if 0 <= own[r] < NUM_CLASSES]
        assert matches[0].tolist() == rows
        for r, truth in zip(rows, matches[1].tolist()):
            assert own[r] == instances[first + truth][2]
            p, q = ((view.anchor_logits[i, r] / 2).softmax(0) for view in (teacher, student))
            total += robustness.get(first + truth, 0.0) * (p * (p.log() - q.log())).sum().item()
            count += NUM_CLASSES
        first += len(batch[i]["instances"])
    assert count and losses["loss_response"].item() == pytest.approx(4 * total / count, rel=1e-3)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("prototypes", [True, False])
def test_every_trainable_weight_gets_a_gradient_and_the_teacher_none(tmp_path, kind, prototypes):
    model = build_pair(tmp_path, kind, prototypes=prototypes)
    losses = losses_of(model, random_batch(*SIZES))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert (losses["loss_global"] > 0) == prototypes and losses["loss_local"] > 0
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("kind", DETECTORS)
def test_batches_without_annotations(tmp_path, kind):
    model = build_pair(tmp_path, kind)
    batch = random_batch(*SIZES)
    for x in batch:
        x["instances"] = x["instances"][[]]
    losses = losses_of(model, batch)
    assert losses["loss_global"] == losses["loss_response"] == 0 and losses["loss_local"] > 0
    sum(losses.values()).backward()


def test_the_response_keeps_its_weight_while_the_other_parts_decay(tmp_path):
    model = build_pair(tmp_path, **{"SOLVER.MAX_ITER": 100})
    batch = random_batch(*SIZES)
    first, later = losses_of(model, batch), losses_of(model, batch, 75)
    for name, factor in (("loss_global", 0.25), ("loss_local", 0.25), ("loss_response", 1.0)):
        torch.testing.assert_close(later[name], factor * first[name])


@pytest.mark.parametrize("part", ["GLOBAL", "LOCAL", "RESPONSE"])
def test_each_part_has_a_switch_and_a_weight(tmp_path, part):
    others = {f"DISTILL.GLOBAL.{name}_ON": name == part for name in ("GLOBAL", "LOCAL", "RESPONSE")}
    batch = random_batch(*SIZES)
    torch.manual_seed(1)
    alone = losses_of(build_pair(tmp_path, **others), batch)
    own = {name for name in alone if name in ("loss_global", "loss_local", "loss_response")}
    assert own == {f"loss_{part.lower()}"}
    weight = {f"DISTILL.GLOBAL.{part}_WEIGHT": 0.0}
    assert losses_of(build_pair(tmp_path, **others, **weight), batch)[f"loss_{part.lower()}"] == 0


def test_another_distiller_may_take_the_place_of_the_local_part(tmp_path):
    model = build_pair(
        tmp_path, **{"DISTILL.GLOBAL.LOCAL_DISTILLER": "ImitationDistiller", "DISTILL.IMITATION.NORM": "l1"}
    )
    model.distillers["GlobalKnowledgeDistiller"].background_weight = 0.0
    batch = random_batch(*SIZES)
    loss = losses_of(model, batch)["loss_local"]
    loss.backward(retain_graph=True)
    local = model.distillers["GlobalKnowledgeDistiller"].local_distiller
    assert loss > 0 and all(p.grad.abs().sum() > 0 for p in local.adaptation["p2"].parameters())
    # all boxes here belong to the finest level, so the others have no weight
    assert all(p.grad.abs().sum() == 0 for p in local.adaptation["p5"].parameters())
    weights = {}
    inner = local.forward
    local.forward = lambda student, teacher, weights: captured.update(weights) or inner(student, teacher, weights)
    captured = weights
    losses_of(model, batch)
    assert captured["p2"].shape == (2, 1, 16, 24) and 0 < captured["p2"].max() <= 4 and captured["p2"].min() == 0


def test_a_retinanet_may_learn_from_a_faster_rcnn_without_the_response(tmp_path):
    model = build_pair(tmp_path, "retinanet", "faster_rcnn")
    with pytest.raises(DistillError, match="student classifies anchors and the teacher boxes.*RESPONSE_ON False"):
        losses_of(model, random_batch(*SIZES))
    with pytest.raises(DistillError, match="RESPONSE_ON False"):  # before the search, too
        model.distillers["GlobalKnowledgeDistiller"].build_hooks(model)
    model = build_pair(tmp_path, "retinanet", "faster_rcnn", **{"DISTILL.GLOBAL.RESPONSE_ON": False})
    sum(losses_of(model, random_batch(*SIZES)).values()).backward()


@pytest.mark.parametrize("kind, node", [("faster_rcnn", "ROI_HEADS"), ("retinanet", "RETINANET")])
def test_other_classes_say_how_to_switch_the_response_off(tmp_path, kind, node):
    model = build_pair(tmp_path, kind, teacher_overrides={f"MODEL.{node}.NUM_CLASSES": 7})
    with pytest.raises(DistillError, match="student has 3 classes and the teacher 7.*RESPONSE_ON False"):
        losses_of(model, random_batch((128, 128), (128, 128)))


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_rcnn", "retinanet"])
def test_losses_are_float32_under_bfloat16_autocast_and_beside_other_distillers(tmp_path, kind):
    names = ["GlobalKnowledgeDistiller", "ReviewDistiller", "StructuralDistiller"]
    model = build_pair(tmp_path, kind, **{"DISTILL.DISTILLERS": names})
    batch = random_batch(*SIZES, (64, 80))  # batch norm of two cells saturates in bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, batch)
    own = ("loss_global", "loss_local", "loss_response", "loss_review", "loss_structural")
    assert all(losses[name].dtype == torch.float32 and losses[name] > 0 for name in own)
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_the_students_batch_norms_see_each_batch_once(tmp_path):
    settings = {"MODEL.ROI_BOX_HEAD.NORM": "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.CONV_DIM": 8}
    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **settings),
        write_teacher(tmp_path, detector_cfg("faster_rcnn")),
        **{"DISTILL.DISTILLERS": ["GlobalKnowledgeDistiller"]},
    )
    model = build_model(cfg).train()
    give_prototypes(model)
    losses_of(model, random_batch(*SIZES))
    counters = [b for name, b in model.student.roi_heads.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters and all(b == 1 for b in counters)


def test_prototypes_are_in_the_checkpoint(tmp_path):
    model = build_pair(tmp_path)
    state = model.state_dict()
    assert {
        f"distillers.GlobalKnowledgeDistiller.prototypes.levels.p2.{x}" for x in ("student", "labels", "boxes")
    } < set(state)
    other = build_pair(tmp_path / "other", prototypes=False)
    assert other.distillers["GlobalKnowledgeDistiller"].prototypes.at("p3")[2].tolist() == []
    other.load_state_dict(state)
    bank = other.distillers["GlobalKnowledgeDistiller"].prototypes
    assert bank.at("p3")[2].tolist() == [0, 0, 1, 1] and bank.searches == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"INSTANCES": "boxes"}, "GLOBAL.INSTANCES is 'boxes': expected one of proposals, ground_truth"),
        ({"DENSITY_QUANTILE": 1.0}, "GLOBAL.DENSITY_QUANTILE is 1.0: expected a share"),
        ({"NUM_PROTOTYPES": 0}, "GLOBAL.NUM_PROTOTYPES is 0"),
        ({"LOCAL_DISTILLER": "ReviewDistiller"}, "LOCAL_DISTILLER is 'ReviewDistiller': .*weights.*ImitationDistiller"),
        (
            {"LOCAL_DISTILLER": "ImitationDistiller", "LEVELS": ["p3"]},
            "compares p4, which .*LEVELS leaves",
        ),
        ({"GLOBAL_ON": False, "LOCAL_ON": False, "RESPONSE_ON": False}, "GLOBAL.GLOBAL_ON is False: expected True"),
    ],
)
def test_settings_out_of_range_are_named(overrides, message):
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": ["GlobalKnowledgeDistiller"]})
    set_all(cfg, {f"DISTILL.GLOBAL.{key}": value for key, value in overrides.items()})
    shape = {level: ShapeSpec(channels=8, stride=2 ** int(level[1:])) for level in ("p3", "p4")}
    with pytest.raises(DistillError, match=message):
        build_distillers(cfg, shape, shape)


def test_a_detector_of_an_unknown_family_is_named():
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"MODEL.META_ARCHITECTURE": "ProposalNetwork"})
    shape = {"p3": ShapeSpec(channels=8, stride=8)}
    with pytest.raises(DistillError, match="number of classes of a ProposalNetwork is not known"):
        GlobalKnowledgeDistiller(cfg, shape, shape)


def test_the_response_is_divided_by_the_boxes_of_all_processes(tmp_path, monkeypatch):
    model = build_pair(tmp_path)
    batch, losses = random_batch((64, 96)), []
    for factor in (1, 2):  # the others have three times as many
        module = "distill.distillers.global_knowledge.mean_over_processes"
        monkeypatch.setattr(module, lambda number, device, factor=factor: torch.tensor(float(factor * number)))
        torch.manual_seed(0)  # of sampled proposals
        with EventStorage():
            losses.append(model(batch))
    assert losses[0]["loss_response"] > 0
    torch.testing.assert_close(losses[0]["loss_response"], 2 * losses[1]["loss_response"])
