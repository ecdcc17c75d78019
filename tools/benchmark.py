#!/usr/bin/env python3
"""Step time and peak memory of a distillation config, broken down: what each part costs, and what the whole costs.

    python tools/benchmark.py --config-file CONFIG [--json FILE] [--rounds N]
    python tools/benchmark.py --config-file CONFIG --inference [--image-size H W]

The batch is random images of the config's training size (INPUT.MIN_SIZE_TRAIN x MAX_SIZE_TRAIN, SOLVER.IMS_PER_BATCH
of them) with random boxes; weights are random, so neither data nor checkpoints are needed. The parts run in turns,
round after round, so that a machine whose speed drifts slows all of them alike. Beside the parts that make up a step
stands the student's backbone alone, to which each of them is compared.

With ``--inference``: the time of an image, GFLOPs and peak memory of teacher and student, and of a student at half size
also at full size. Random weights detect next to nothing, so what is left out is the cost of handling many detections.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from fvcore.nn import FlopCountAnalysis
from tabulate import tabulate
from torch import nn

from distill.config import drop_backbone_weights, student_config
from distill.distillers import build_distillers
from distill.errors import DistillError
from distill.modeling import DetectorView, DistillationModel, Teacher
from distill.modeling.loss_weights import LossWeights
from distill.modeling.precision import amp_dtype, keep_coordinates
from distill.modeling.scaling import build_scaling
from distill.modeling.teacher import teacher_recipe
from distill.modeling.views import align
from distill.recipes import Recipe, YamlRecipe, explain, load_recipe

logger = logging.getLogger("detectron2.benchmark")

FULL = "full step"
BACKBONE = "student's backbone alone, forward and backward"


def random_batch(cfg: CfgNode, image_size: tuple[int, int], boxes_per_image: int = 8) -> list[dict]:
    """Random images with random boxes and masks of the first class.

    Args:
        cfg: the full config, for the size and the number of the images.
        image_size: height and width, where the config does not say how images are resized.
        boxes_per_image: how many.

    Returns:
        A batch in Detectron2's format.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = cfg.INPUT.MIN_SIZE_TRAIN[-1], cfg.INPUT.MAX_SIZE_TRAIN
    if not (height and width):
        height, width = image_size
    batch = []
    for _ in range(cfg.SOLVER.IMS_PER_BATCH):
        corners = torch.rand(boxes_per_image, 2, generator=generator) * 0.6
        extents = 0.1 + 0.3 * torch.rand(boxes_per_image, 2, generator=generator)
        boxes = torch.cat([corners, corners + extents], 1) * torch.tensor([width, height] * 2)
        masks = torch.zeros(boxes_per_image, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
            mask[y0:y1, x0:x1] = True
        instances = Instances((height, width), gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks))
        instances.gt_classes = torch.zeros(boxes_per_image, dtype=torch.int64)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, as CUDA's caching allocator does.

    By default it returns large blocks to the system, and getting them back costs page faults: more for the full step,
    which holds more memory, than for its parts.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class PeakMemory:
    """Peak memory between two calls, in MiB: CUDA's allocations, or the process's resident memory on Linux, which holds
    what the parts before have freed.

    Args:
        device: "cuda" or "cpu".
        above_held: count only what came on top of what was held at the first call.
    """

    def __init__(self, device: str, above_held: bool = False) -> None:
        self.cuda = device.startswith("cuda")
        self.above_held = above_held
        self.held = 0.0

    def reset(self) -> None:
        if self.above_held:
            self.held = torch.cuda.memory_allocated() / 2**20 if self.cuda else self._status("VmRSS")
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # some containers forbid it: the peak is then the process's own
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.held
        return self._status("VmHWM") - self.held

    def _status(self, key: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+)", status).group(1)) / 2**10


def build_parts(recipe: Recipe, image_size: tuple[int, int]) -> dict[str, Callable[[], None]]:
    """The parts of a step, and the whole, as functions to time. The size of the images counts where the config has
    none."""
    cfg = recipe.cfg
    source = teacher_recipe(cfg)
    drop_backbone_weights(cfg)
    drop_backbone_weights(source.cfg)
    student = recipe.build_detector()
    teacher = Teacher(source.build_detector())
    scaling = build_scaling(cfg)
    levels = student.backbone.output_shape(), teacher.output_shape
    distillers = build_distillers(cfg, scaling.shape(*levels), teacher.output_shape)
    model = DistillationModel(student=student, teacher=teacher, distillers=distillers, scaling=scaling).train()
    batch = random_batch(cfg, image_size)
    own_batch = scaling.batch(batch)
    own_optimizer, optimizer = recipe.build_optimizer(student), recipe.build_optimizer(model)
    for group in (*own_optimizer.param_groups, *optimizer.param_groups):
        group["lr"] = 0.0  # random weights on random images would diverge

    dtype = amp_dtype(cfg)
    if dtype == torch.bfloat16:
        for side in (student, teacher.model):
            keep_coordinates(side)

    def autocast() -> torch.autocast:
        return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype, enabled=dtype is not None)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with autocast():
            loss = sum(module(scaling.batch(batch, student.device) if module is student else batch).values())
        loss.backward()
        optimizer.step()
        if module is student:
            model._tap.take()  # the tap holds the step's features

    with autocast(), torch.no_grad():
        view = teacher.view(batch)
        images, record = view.images, view.features
        own_images = student.preprocess_image(own_batch).tensor
        own = student.backbone(own_images)
        student(own_batch)
        outputs = {name: tap.take()[1] for name, tap in model._taps.items()}

    def distil(distiller: nn.Module) -> None:
        leaves = {k: v.clone().requires_grad_() for k, v in own.items()}
        views = (
            model._student_view(batch, lambda: (own_images, leaves), frozen=False, outputs=outputs),
            DetectorView(teacher.model, batch, lambda: (images, record), frozen=True),
        )
        align(*views)
        with autocast():
            loss = sum(distiller(*views).values())
        loss.backward()

    def backbone() -> None:
        with autocast():
            features = student.backbone(own_images)
        sum(level.float().sum() for level in features.values()).backward()
        model._tap.take()  # the tap holds them

    def teach() -> None:
        with autocast():
            teacher.view(batch).features  # noqa: B018  computed when it is asked for

    parts = {
        BACKBONE: backbone,
        "student's own step": lambda: step(student, own_optimizer),
        "teacher's forward": teach,
    }
    for name, distiller in distillers.items():
        parts[f"{name}, forward and backward"] = lambda distiller=distiller: distil(distiller)
    parts[FULL] = lambda: step(model, optimizer)

    measuring = LossWeights(distillers, period=1)  # what it checks in its first step, it checks while warming up

    def measuring_step() -> None:
        own, model._loss_weights = model._loss_weights, measuring
        step(model, optimizer)
        model._loss_weights = own

    parts[f"full step that measures gradients (every {cfg.DISTILL.GRADIENT_LOG_PERIOD} iterations)"] = measuring_step
    return parts


def time_in_turns(
    parts: dict[str, Callable[[], None]], rounds: int, memory: PeakMemory
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Runs the parts one after the other, round after round.

    Returns:
        For each part its time in every round, in ms, and its peak memory, in MiB.
    """
    times: dict[str, list[float]] = {name: [] for name in parts}
    peaks = dict.fromkeys(parts, 0.0)
    started = logged = time.perf_counter()
    for index in range(rounds + 2):  # the first two warm up
        for name, run in parts.items():
            memory.reset()
            begin = time.perf_counter()
            run()
            if memory.cuda:
                torch.cuda.synchronize()
            if index >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
                peaks[name] = max(peaks[name], memory.read())
        if time.perf_counter() - logged > 10:
            logged = time.perf_counter()
            left = (logged - started) / (index + 1) * (rounds + 1 - index)
            logger.info(f"round {index + 1} of {rounds + 2}, {left:.0f} s left")
    return times, peaks


def describe_times(times: list[float]) -> dict[str, float]:
    """Median, minimum and maximum, as columns of a table."""
    return {"ms": statistics.median(times), "min ms": min(times), "max ms": max(times)}


def measure(parts: dict[str, Callable[[], None]], rounds: int, device: str) -> tuple[list[dict], float]:
    """Times the parts in turns.

    Returns:
        A row for each part (median, minimum and maximum in ms; the median over the rounds of its time divided by the
        backbone's; peak memory in MiB), and the median over the rounds of the full step's time divided by the sum of
        the times of the parts that it consists of.
    """
    times, peaks = time_in_turns(parts, rounds, PeakMemory(device))
    rows = [
        {
            "part": name,
            **describe_times(values),
            "/ backbone": statistics.median(part / whole for part, whole in zip(values, times[BACKBONE])),
            "peak MiB": peaks[name],
        }
        for name, values in times.items()
    ]
    _, *others = list(times.values())[: list(times).index(FULL)]
    ratio = statistics.median(whole / sum(pieces) for whole, *pieces in zip(times[FULL], *others))
    return rows, ratio


def inference_recipes(recipe: Recipe) -> dict[str, Recipe]:
    """The detectors to compare at inference: the teacher, the student, and for a student at half size, the same student
    at the teacher's size, its anchors doubled and its heads one level coarser."""
    cfg = recipe.cfg
    teacher, student = teacher_recipe(cfg), student_config(cfg)
    recipes, scale = {"teacher": teacher}, cfg.DISTILL.STUDENT.INPUT_SCALE
    if scale == 0.5 and isinstance(recipe, YamlRecipe):
        whole = student.clone()
        for node in ("RPN", "ROI_HEADS", "RETINANET", "FCOS"):
            whole.MODEL[node].IN_FEATURES = [
                re.sub(r"\d+$", lambda level: str(int(level[0]) + 1), name) for name in whole.MODEL[node].IN_FEATURES
            ]
        sizes = whole.MODEL.ANCHOR_GENERATOR.SIZES
        whole.MODEL.ANCHOR_GENERATOR.SIZES = [[2 * size for size in level] for level in sizes]
        whole.INPUT = teacher.cfg.INPUT
        whole.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE = student.MODEL.META_ARCHITECTURE
        whole.MODEL.META_ARCHITECTURE, whole.TEST.SCALES = "AlignedTeacher", "high"  # without the unused finest level
        recipes["student at full size"] = YamlRecipe(whole)
    recipes["student" if scale == 1 else f"student at {scale:g} of the size"] = recipe
    return recipes


class _Boxes(nn.Module):
    """A detector as a function of tensors, which is what fvcore can trace."""

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.model, self.size = model, {"height": height, "width": width}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        (output,) = self.model([{"image": image, **self.size}])
        return output["instances"].pred_boxes.tensor


def measure_inference(recipe: Recipe, image_size: tuple[int, int], rounds: int) -> list[dict]:
    """Runs the detectors in turns on the same random images, each resized to its own INPUT.MIN_SIZE_TEST.

    Returns:
        A row for each detector: its input's height and width, median, minimum and maximum ms per image, the median over
        the rounds of its time divided by the teacher's, GFLOPs by fvcore's counter (a multiplication and an addition
        are one), and in MiB its weights together with the peak of what a forward pass takes on top.
    """
    cfg = recipe.cfg

    @torch.no_grad()
    def detect(model: nn.Module, batch: list[dict]) -> None:
        model(batch)

    image = np.random.default_rng(0).integers(256, size=(*image_size, 3), dtype=np.uint8)
    runs, inputs, flops, weights = {}, {}, {}, {}
    for name, detector in inference_recipes(recipe).items():
        own = detector.cfg
        drop_backbone_weights(own)
        own.MODEL.DEVICE = cfg.MODEL.DEVICE
        model = detector.build_detector().eval()
        resize = ResizeShortestEdge(own.INPUT.MIN_SIZE_TEST, own.INPUT.MAX_SIZE_TEST)
        resized = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        batch = [{"image": tensor, "height": image_size[0], "width": image_size[1]}]
        inputs[name] = f"{tensor.shape[1]}x{tensor.shape[2]}"
        with torch.no_grad():
            counter = FlopCountAnalysis(_Boxes(model, *image_size), tensor)
            flops[name] = counter.unsupported_ops_warnings(False).tracer_warnings("none").total() / 1e9
        weights[name] = sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) / 2**20
        runs[name] = functools.partial(detect, model, batch)
    times, peaks = time_in_turns(runs, rounds, PeakMemory(cfg.MODEL.DEVICE, above_held=True))
    return [
        {
            "detector": name,
            "input": inputs[name],
            **describe_times(values),
            "/ teacher": statistics.median(own / whole for own, whole in zip(values, times["teacher"])),
            "GFLOPs": flops[name],
            "peak MiB": weights[name] + peaks[name],
        }
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inference", action="store_true", help="compare the detectors at inference instead of a step")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(480, 640), metavar=("H", "W"), help="of the image of --inference"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger()
    try:
        recipe = load_recipe(args.config_file, args.opts)
        cfg = recipe.cfg
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        if not args.inference:
            keep_freed_memory()
        content = {"config": args.config_file, "rounds": args.rounds}
        with EventStorage():
            if args.inference:
                content["rows"] = measure_inference(recipe, tuple(args.image_size), args.rounds)
            else:
                content["rows"], content["ratio"] = measure(
                    build_parts(recipe, args.image_size), args.rounds, cfg.MODEL.DEVICE
                )
    except DistillError as error:
        sys.exit(f"error: {explain(error, args.config_file)}")
    content["device"] = torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else "CPU"
    precision = {"/ backbone": ".3f", "/ teacher": ".3f", "GFLOPs": ".2f"}
    formats = tuple(precision.get(column, ".1f") for column in content["rows"][0])
    print(tabulate(content["rows"], headers="keys", floatfmt=formats, tablefmt="pipe"))
    print(f"\n{args.rounds} rounds, {content['device']}")
    if "ratio" in content:
        print(f"full step / sum of its parts: {content['ratio']:.3f} (median of the rounds)")
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
