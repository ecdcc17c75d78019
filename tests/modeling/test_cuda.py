"""Training steps on a GPU, without one: no tensor stays behind on the CPU, and the host does not wait more often."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import detectron2.layers
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from distill.distillers import Distiller
from distill.engine.hooks import DrawDenseDetections
from distill.modeling.loss_weights import LossWeights
from distill.prototypes.bank import PrototypeBank
from tests.helpers import (
    DETECTORS,
    NUM_CLASSES,
    aligned_cfg,
    built_in,
    detector_cfg,
    distillation_cfg,
    random_batch,
    write_teacher,
)
from tests.modeling.fake_cuda import COPY, CudaTensor, fake_cuda, to_cuda

# How often the host waits for the GPU in the forward pass of a training step, of two images and five levels, of the
# student alone (False) and with GlobalKnowledgeDistiller and prototypes of all classes (True): for a result, and for a
# copy to the GPU. What counts is in fake_cuda.py. While it waits the host gives the GPU no work, so these are bounds
# that may only go down: lower them when a change needs less.
MOST_RESULTS = {
    ("faster_rcnn", False): 51,
    ("faster_rcnn", True): 58,
    ("retinanet", False): 11,
    ("retinanet", True): 13,
}
# Later versions of Detectron2 make the grids of the anchors on the CPU: two copies a level, each time
LATER = hasattr(detectron2.layers, "move_device_like")
MOST_COPIES = {
    ("faster_rcnn", False): 19 if LATER else 9,
    ("faster_rcnn", True): 18 if LATER else 8,
    ("retinanet", False): 16 if LATER else 6,
    ("retinanet", True): 14 if LATER else 4,
}

SIZES = [(64, 96), (61, 75)]
# Every branch that makes tensors of its own
VARIANTS = {
    "ReviewDistiller": {"ssim": {"REVIEW": {"CRITERION": "SSIM"}}},
    "StructuralDistiller": {
        "minmax": {"STRUCTURAL": {"SCALE": "minmax"}},
        "standard": {"STRUCTURAL": {"SCALE": "standard", "EXPONENTS": [1.0, 0.5, 0.0]}},
    },
    "ImitationDistiller": {
        "boxes": {"IMITATION": {"REGION": "boxes", "NORM": "l1"}},
        "gaussian": {"IMITATION": {"REGION": "gaussian", "NORM": "smooth_l1"}},
    },
    "GlobalKnowledgeDistiller": {
        "truth": {"GLOBAL": {"INSTANCES": "ground_truth", "LOCAL_DISTILLER": "ImitationDistiller"}}
    },
    "LogitDistiller": {"dkd": {"LOGIT": {"KIND": "DKD"}}},
}
DENSE_VARIANTS = {"LogitDistiller": {"bckd": {"LOGIT": {"KIND": "BCKD"}}}}
SHALLOW = {"depth": 18}  # each operation takes long on tensors without data, however small they are


def build(folder: Path, kind: str, distillers: list[str], half_size: bool = False, **overrides) -> nn.Module:
    """A model with prototypes in its bank."""
    if half_size:
        student, teacher = aligned_cfg(kind, "half", **SHALLOW), aligned_cfg(kind, **SHALLOW)
        overrides.update({"DISTILL.STUDENT.INPUT_SCALE": 0.5, "INPUT.MIN_SIZE_TEST": 400, "INPUT.MAX_SIZE_TEST": 667})
    else:
        student, teacher = detector_cfg(kind, **SHALLOW), detector_cfg(kind, channels=24, **SHALLOW)
    overrides = {"DISTILL.DISTILLERS": distillers, "DISTILL.GRADIENT_LOG_PERIOD": 0, **overrides}
    model = build_model(distillation_cfg(student, write_teacher(folder, teacher), **overrides)).train()
    for bank in (x for x in model.modules() if isinstance(x, PrototypeBank)):
        labels = torch.arange(NUM_CLASSES).repeat_interleave(bank.num_prototypes)
        found = {
            level: {
                "student": torch.randn_like(kept.student),
                "teacher": torch.randn_like(kept.teacher),
                "labels": labels,
            }
            for level, kept in bank.levels.items()
        }
        bank.replace(found)
    return model


def step(model: nn.Module, batch: list[dict]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of the sampling of proposals
    with EventStorage():
        return model(batch)


def all_distillers(folder: Path, kind: str, half_size: bool) -> tuple[nn.Module, list[dict]]:
    """A model with all distillers and variants, and two batches: one of them has an image without annotations."""
    torch.manual_seed(0)
    variants = list(VARIANTS.items())
    variants += DENSE_VARIANTS.items() if kind in ("retinanet", "fcos") else []
    settings = {label: value for _, own in variants for label, value in own.items()}
    names = built_in(kind) + [f"{name}/{label}" for name, own in variants for label in own]
    model = build(folder, kind, names, half_size, **{"DISTILL.VARIANTS": CfgNode(settings)})
    batches = [random_batch(*SIZES), random_batch(*SIZES)]
    batches[1][1]["instances"] = batches[1][1]["instances"][[]]
    return model, batches


def cuda_losses(model: nn.Module, batches: list[dict], dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """The losses of a step on each batch on the fake GPU, after a first step on the CPU."""
    step(model, batches[0])  # in its first step a model checks itself by a backward pass, which a fake GPU has not
    results = []
    with fake_cuda():
        to_cuda(model)
        assert all(isinstance(x, CudaTensor) for part in (model, model.teacher.model) for x in tensors_of(part))
        for batch in batches:
            with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
                losses = step(model, batch)
            assert len(losses) > len(model.distillers)
            for key, loss in losses.items():
                assert loss.device.type == "cuda" and loss.dtype == torch.float32, key
                assert torch.isfinite(loss.values), key
            results.append({key: loss.values for key, loss in losses.items()})
    return results


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("half_size", [False, True], ids=["full_size", "half_size"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_step_in_float32_stays_on_the_gpu(tmp_path, kind, half_size):
    model, batches = all_distillers(tmp_path, kind, half_size)
    reference = copy.deepcopy(model)
    step(reference, batches[0])
    expected = [step(reference, batch) for batch in batches]
    for losses, wanted in zip(cuda_losses(model, batches), expected, strict=True):
        assert losses.keys() == wanted.keys()
        for key, loss in losses.items():  # it is the whole step that ran
            torch.testing.assert_close(loss, wanted[key].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half_size", [False, True], ids=["full_size", "half_size"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_step_in_float16_stays_on_the_gpu(tmp_path, kind, half_size):
    model, batches = all_distillers(tmp_path, kind, half_size)
    seen = []
    model.student.backbone.register_forward_hook(lambda module, args, output: seen.append(output["p4"].dtype))
    cuda_losses(model, batches[1:], torch.float16)  # one batch, since float16 is slow on the CPU
    assert seen[-1] == torch.float16  # autocast was on


@pytest.mark.parametrize("kind, half_size", [("faster_rcnn", False), ("faster_rcnn", True), ("fcos", False)])
def test_images_are_drawn_from_the_gpu(tmp_path, kind, half_size):
    """Detectron2 draws annotations that lie on the CPU alone."""
    model = build(tmp_path, kind, ["ImitationDistiller"], half_size, **{"VIS_PERIOD": 1})
    batch = random_batch(*SIZES)
    step(model, batch)
    hook = DrawDenseDetections(model.student, period=1)
    hook.trainer = SimpleNamespace(iter=0)
    if kind == "fcos":
        hook.before_train()
    with fake_cuda(), EventStorage() as storage:
        to_cuda(model)
        model(batch)
    assert [image.shape[0] for _, image, *_ in storage._vis_data] == [3]


class Stray(Distiller):
    """Weighs the student's features by a tensor that was left on the CPU."""

    def forward(self, student, teacher):
        level = student.features["p3"]
        return {"loss_stray": (level * torch.linspace(0, 1, level.shape[3])).mean()}


def test_a_tensor_on_the_cpu_in_a_distiller_is_found(tmp_path):
    model = build(tmp_path, "retinanet", ["ReviewDistiller"])
    model.distillers["Stray"] = Stray()
    model._loss_weights = LossWeights(model.distillers)
    batch = random_batch(*SIZES)
    step(model, batch)  # on the CPU it goes unseen
    with pytest.raises(RuntimeError, match=r"mul.*found cuda, and cpu of shapes \[\(12,\)\]"), fake_cuda():
        step(to_cuda(model), batch)


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.add_(torch.ones(3)),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.stack([x.sum(), torch.tensor(0.0)]),
        lambda x: torch.where(x > 0, x, torch.zeros(3)),
        lambda x: x @ torch.ones(3),
        lambda x: torch.ones(3)[x > 0],
        lambda x: x.index_put_((x > 0,), torch.ones(3)),
        lambda x: torch.isin(x, torch.ones(3)),
    ],
)
def test_mixed_devices_raise_as_on_a_gpu(mix: Callable[[Tensor], Tensor]):
    with fake_cuda(), pytest.raises(RuntimeError, match="on one device"):
        mix(torch.ones(3, device="cuda"))


@pytest.mark.parametrize(
    "legal",
    [
        lambda x: x + torch.tensor(1.0),
        lambda x: x * 2,
        lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
        lambda x: x[torch.tensor([2, 0])],
        lambda x: x.new_zeros(3).copy_(torch.ones(3)),
        lambda x: x.masked_fill(x > 0, 0.0),
    ],
)
def test_what_a_gpu_allows_stays_on_it(legal: Callable[[Tensor], Tensor]):
    with fake_cuda():
        assert legal(torch.ones(3, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize(
    "function, waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
        (lambda x: torch.ones(3).to(x.device, non_blocking=True), 0),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.where(x > 0), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.__setitem__(x > 0, 0.0), 0),
        (lambda x: x.__setitem__(x > 0, torch.ones(3, device=x.device)), 1),
        (lambda x: x[x.argsort()], 0),
        (lambda x: x[torch.tensor([0])], 1),
        (lambda x: x.unique(), 1),
        (lambda x: torch.where(x > 0, x, 0.0).softmax(0).topk(2), 0),
        (lambda x: torch.arange(9, device=x.device).split([4, 5]), 0),
    ],
)
def test_what_counts_as_waiting(function: Callable, waits: int):
    with fake_cuda() as cuda:
        x = torch.ones(3, device="cuda")
        function(x)
    assert sum(cuda.waits.values()) == waits, cuda.waits


@pytest.mark.parametrize("distilled", [False, True], ids=["alone", "distilled"])
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_a_step_does_not_wait_more_often(tmp_path, kind, distilled):
    torch.manual_seed(0)  # Detectron2 drops boxes of no size, and waits for that, only where there are any
    model = build(tmp_path, kind, ["GlobalKnowledgeDistiller"])
    batch = random_batch(*SIZES)
    for x in batch:
        x["instances"].remove("gt_masks")  # which these detectors are not given
    step(model, batch)  # as in cuda_losses
    with fake_cuda() as cuda:
        to_cuda(model)
        cuda.waits.clear()
        losses = step(model if distilled else model.student, batch)
    assert not distilled or (losses["loss_global"].values > 0 and losses["loss_response"].values > 0)
    copies = cuda.waits.pop(COPY)
    assert sum(cuda.waits.values()) <= MOST_RESULTS[kind, distilled], cuda.waits
    assert copies <= MOST_COPIES[kind, distilled]
