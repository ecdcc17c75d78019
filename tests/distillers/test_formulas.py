"""What each distiller makes of its formula: levels, sides, weights, and every key of its config."""

import pytest
import torch
from torch import nn

from distill.distillers.review import ReviewModule
from distill.losses import (
    channel_wise_loss,
    focal_losses,
    focal_weights,
    hierarchical_context_loss,
    pearson_loss,
    structural_loss,
)
from tests.distillers.test_global_knowledge import give_prototypes
from tests.distillers.test_methods import build_pair, step
from tests.helpers import random_batch

FGD_KEYS = ("TEMPERATURE", "FOREGROUND_WEIGHT", "BACKGROUND_WEIGHT", "ATTENTION_WEIGHT", "GLOBAL_WEIGHT")
DKD, BCKD = {"DISTILL.LOGIT.KIND": "DKD"}, {"DISTILL.LOGIT.KIND": "BCKD"}
GLOBAL_KEYS = ("TEMPERATURE", "LOCAL_FOREGROUND_WEIGHT", "LOCAL_BACKGROUND_WEIGHT", "GLOBAL_WEIGHT")
KEYS = [
    ("faster_rcnn", "Review", "REVIEW.POOL_SIZES", [3], {}),
    ("faster_rcnn", "CWD", "CWD.TEMPERATURE", 4.0, {}),
    *(("faster_rcnn", "FGD", f"FGD.{key}", 0.7, {}) for key in FGD_KEYS),
    ("faster_rcnn", "MGD", "MGD.MASK_RATIO", 0.9, {}),
    ("retinanet", "CrossKD", "CROSSKD.CLASS_WEIGHT", 3.0, {}),
    *(("faster_rcnn", "Logit", f"LOGIT.{key}", 3.0, DKD) for key in ("ALPHA", "BETA", "TEMPERATURE")),
    ("retinanet", "Logit", "LOGIT.BOX_WEIGHT", 3.0, BCKD),
    *(("faster_rcnn", "GlobalKnowledge", f"GLOBAL.{key}", 3.0, {}) for key in GLOBAL_KEYS),
]


def views_of(model, name, batch):
    """What a distiller is given in a step, and what it returns: student, teacher, unweighted losses."""
    seen = []
    handle = model.distillers[name].register_forward_hook(lambda module, views, out: seen.extend([*views, out]))
    step(model, batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind, name, key, value, more", KEYS)
def test_every_key_has_an_effect(tmp_path, kind, name, key, value, more):
    batch, found = random_batch((64, 96), (61, 75)), []
    for settings in ({}, {f"DISTILL.{key}": value}):
        torch.manual_seed(0)
        model = build_pair(tmp_path, kind, names=[f"{name}Distiller"], **more, **settings)
        if name == "GlobalKnowledge":
            give_prototypes(model, (0, 1, 2))
            for side in (model.student, model.teacher.model):  # the temperature has no effect on small logits
                nn.init.normal_(side.roi_heads.box_predictor.cls_score.weight, std=0.5)
        torch.manual_seed(1)
        found.append(views_of(model, f"{name}Distiller", batch)[2])
    assert any(abs(found[1][loss] - was) > 1e-3 * abs(was) for loss, was in found[0].items())


def test_fgd(tmp_path):
    factors = dict(zip(("foreground", "background", "attention", "global"), (2.0, 3.0, 5.0, 7.0)))
    settings = {f"DISTILL.FGD.{name.upper()}_WEIGHT": factor for name, factor in factors.items()}
    model = build_pair(tmp_path, "faster_rcnn", names=["FGDDistiller"], **settings, **{"DISTILL.FGD.TEMPERATURE": 0.8})
    distiller = model.distillers["FGDDistiller"]
    for weight in distiller.parameters():
        nn.init.normal_(weight, std=0.3)  # contexts that are not the identity
    batch = random_batch((64, 96), (61, 75))
    student, teacher, found = views_of(model, "FGDDistiller", batch)
    boxes = [x["instances"].gt_boxes.tensor for x in batch]

    def context(module, x):
        """arXiv 2111.11837, equation 10."""
        attention = torch.einsum("nchw,c->nhw", x, module.attention.weight[0, :, 0, 0]).flatten(1).softmax(1)
        return x + module.transform(torch.einsum("ncp,np->nc", x.flatten(2), attention)[:, :, None, None])

    expected = dict.fromkeys(factors, 0.0)
    for level in distiller.levels:
        own, given = distiller.adaptation[level](student.features[level]), teacher.features[level]
        weights = focal_weights(boxes, given.shape[2:], 2 ** int(level[1]))
        for name, part in zip(expected, focal_losses(own, given, *weights, 0.8)):
            expected[name] = expected[name] + part
        sides = context(distiller.student_context[level], own), context(distiller.teacher_context[level], given)
        expected["global"] += (sides[0] - sides[1]).square().sum() / len(batch)
    for name, factor in factors.items():
        torch.testing.assert_close(found[f"loss_fgd_{name}"], factor * expected[name])


def test_mgd_masks_the_cells_that_it_generates_from(tmp_path):
    model = build_pair(tmp_path, "faster_rcnn", names=["MGDDistiller"], **{"DISTILL.MGD.MASK_RATIO": 0.65})
    distiller, seen = model.distillers["MGDDistiller"], {}
    for level, block in distiller.generation.items():
        block.register_forward_hook(lambda _, args, out, level=level: seen.update({level: (args[0].clone(), out)}))
    student, teacher, found = views_of(model, "MGDDistiller", random_batch((64, 96), (61, 75)))
    assert list(seen) == ["p2", "p3", "p4", "p5", "p6"]
    expected = 0.0
    for level, (given, generated) in seen.items():
        masked = (given == 0).all(1)
        torch.testing.assert_close(given, distiller.adaptation[level](student.features[level]) * ~masked[:, None])
        expected += (teacher.features[level] - generated).square().sum() / 2  # images
    assert 0.5 < (seen["p2"][0] == 0).all(1).float().mean() < 0.8
    torch.testing.assert_close(found["loss_mgd"], expected)


def test_cwd_and_pkd(tmp_path):
    settings = {"DISTILL.CWD.TEMPERATURE": 4.0}
    model = build_pair(tmp_path, "faster_rcnn", names=["CWDDistiller", "PearsonDistiller"], **settings)
    losses = {
        "CWDDistiller": lambda own, given: channel_wise_loss(own, given, 4.0),
        "PearsonDistiller": lambda own, given: sum(pearson_loss(*pair) for pair in zip(own, given)),
    }
    assert model.distillers["PearsonDistiller"].levels == ["p2", "p3", "p4", "p5"]  # of five, the finest, as published
    for name, loss in losses.items():
        distiller = model.distillers[name]
        student, teacher, found = views_of(model, name, random_batch((64, 96), (61, 75)))
        own = [distiller.adaptation[level](student.features[level]) for level in distiller.levels]
        expected = loss(own, [teacher.features[level] for level in distiller.levels])
        torch.testing.assert_close(*found.values(), expected)


@pytest.mark.parametrize("criterion", ["HCL", "SSIM"])
def test_review(tmp_path, criterion):
    settings = {"DISTILL.REVIEW.CRITERION": criterion, "DISTILL.REVIEW.POOL_SIZES": [3]}
    settings["DISTILL.STRUCTURAL.SCALE"] = "none"  # by the teacher's range, so that the sides differ
    model = build_pair(tmp_path, "faster_rcnn", names=["ReviewDistiller"], **settings)
    distiller = model.distillers["ReviewDistiller"]
    student, teacher, found = views_of(model, "ReviewDistiller", random_batch((64, 96), (61, 75)))
    own = distiller.review([student.features[level] for level in distiller.levels])
    given = [teacher.features[level] for level in distiller.levels]
    if criterion == "HCL":
        expected = hierarchical_context_loss(own, given, [3])
    else:
        expected = structural_loss(own, given, "none")
    torch.testing.assert_close(found["loss_review"], expected)


def test_review_passes_the_gradient_of_a_fine_level_to_the_coarser_ones():
    features = [torch.randn(2, 4, size, size, requires_grad=True) for size in (16, 8, 4)]
    finest = ReviewModule([4] * 3, [6] * 3, 5)(features)[0]
    (finest * torch.randn_like(finest)).sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 1e-6 for x in features)


def test_the_weight_of_bckds_boxes_gets_no_gradient(tmp_path):
    model = build_pair(tmp_path, "retinanet", names=["LogitDistiller"], **{"DISTILL.LOGIT.KIND": "BCKD"})
    loss = step(model, random_batch((64, 96)))["loss_logit_box"]
    assert loss > 0
    assert torch.autograd.grad(loss, model.student.head.cls_score.weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ["ImitationDistiller", "PearsonDistiller"])
def test_the_local_part_of_global_knowledge_by_another_distiller(tmp_path, name):
    node = "DISTILL.IMITATION" if name.startswith("Imitation") else "DISTILL.PEARSON"
    weights = {"DISTILL.GLOBAL.LOCAL_FOREGROUND_WEIGHT": 2.0, "DISTILL.GLOBAL.LOCAL_BACKGROUND_WEIGHT": 5.0}
    settings = {"DISTILL.GLOBAL.LOCAL_DISTILLER": name, f"{node}.LOSS_WEIGHT": 3.0, **weights}
    model = build_pair(tmp_path, "faster_rcnn", names=["GlobalKnowledgeDistiller"], **settings)
    distiller = model.distillers["GlobalKnowledgeDistiller"]
    give_prototypes(model, (0, 1, 2))
    local, seen = distiller.local_distiller, []
    inner = local.forward

    def forward(student, teacher, weights):
        seen.append((weights, inner(student, teacher, weights=weights), inner(student, teacher)))
        return seen[-1][1]

    local.forward = forward
    loss = views_of(model, "GlobalKnowledgeDistiller", random_batch((64, 96), (61, 75)))[2]["loss_local"]
    given, own, unweighted = seen[0]
    inside = given["p2"][given["p2"] != 5]
    assert given["p2"].max() == 5 and len(inside) and inside.min() >= 0 and 1 < inside.max() <= 4
    torch.testing.assert_close(loss, 3 * sum(own.values()))
    assert all(abs(own[key] - unweighted[key]) > 1e-4 for key in own)
