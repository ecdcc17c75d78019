#!/usr/bin/env python3
"""Step time and peak memory of a distillation config, broken down: what each part costs, and what the whole costs.

    python tools/benchmark.py --config-file CONFIG [--json FILE] [--against FILE] [--rounds N]
    python tools/benchmark.py --config-file CONFIG --inference [--image-size H W]

The batch is random images of the config's training size (INPUT.MIN_SIZE_TRAIN x MAX_SIZE_TRAIN, SOLVER.IMS_PER_BATCH
of them) with random boxes; weights are random, so neither data nor checkpoints are needed. The parts run in turns,
round after round, so that a machine whose speed drifts slows all of them alike. Beside the parts that make up a step
stands the student's backbone alone, to which each of them is compared.

With ``--inference``: the time of an image, GFLOPs and peak memory of teacher and student, and of a student at half size
also at full size. Random weights detect next to nothing, so what is left out is the cost of handling many detections.
"""

import argparse
import functools
import json
import logging
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.utils.events import EventStorage, get_event_storage
from detectron2.utils.logger import setup_logger
from measuring import (
    KeptMemory,
    PeakMemory,
    count_gflops,
    count_operators,
    describe_times,
    keep_freed_memory,
    random_batch,
    time_in_turns,
)
from tabulate import tabulate
from torch import nn

from distill.config import drop_backbone_weights, student_config
from distill.distillers import build_distillers
from distill.errors import DistillError
from distill.modeling import DetectorView, DistillationModel, Teacher, precision
from distill.modeling.loss_weights import LossWeights
from distill.modeling.precision import amp_dtype, distill_dtype, keep_coordinates
from distill.modeling.scaling import build_scaling
from distill.modeling.teacher import teacher_recipe
from distill.modeling.views import align
from distill.recipes import Recipe, YamlRecipe, explain, load_recipe

logger = logging.getLogger("detectron2.benchmark")

FULL = "full step"
BACKBONE = "student's backbone alone, forward and backward"
OWN = "student's own step"


@torch.no_grad()
def settle(detector: nn.Module) -> None:
    """Scales down what each residual block adds. Random weights under frozen norms would double the features' variance
    with each block, to beyond float16's largest number.

    Args:
        detector: with random weights.
    """
    for block in detector.modules():
        if isinstance(block, BasicBlock | BottleneckBlock):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            last.norm.weight.fill_(0.2)


def build_model(recipe: Recipe) -> tuple[DistillationModel, Recipe]:
    """Student, teacher and distillers with random weights.

    Args:
        recipe: of the run.

    Returns:
        The model in training mode, and the teacher's recipe.
    """
    cfg = recipe.cfg
    source = teacher_recipe(cfg)
    drop_backbone_weights(cfg)
    drop_backbone_weights(source.cfg)
    student, detector = recipe.build_detector(), source.build_detector()
    settle(student)
    settle(detector)
    teacher = Teacher(detector, dtype=distill_dtype(cfg))
    scaling = build_scaling(cfg)
    levels = student.backbone.output_shape(), teacher.output_shape
    distillers = build_distillers(cfg, scaling.shape(*levels), teacher.output_shape)
    model = DistillationModel(student=student, teacher=teacher, distillers=distillers, scaling=scaling)
    model.start()
    return model.train(), source


def convolutions_of(distiller: nn.Module, run: Callable[[], None]) -> list[tuple[nn.Conv2d, torch.Tensor]]:
    """The convolutions that a distiller runs.

    Args:
        distiller: whose they are.
        run: runs it once.

    Returns:
        Each call: the layer and its input.
    """
    calls: list[tuple[nn.Conv2d, torch.Tensor]] = []
    layers = [layer for layer in distiller.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, x: calls.append((layer, x[0].detach()))) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return calls


def _with_gradients(outputs: object) -> object:
    """The same nested lists and dicts, whose tensors take gradients, as those of a step do."""
    if isinstance(outputs, torch.Tensor):
        return outputs.detach().requires_grad_(outputs.is_floating_point())
    if isinstance(outputs, dict):
        return {key: _with_gradients(value) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_with_gradients(value) for value in outputs)
    return outputs


def build_parts(recipe: Recipe, image_size: tuple[int, int]) -> tuple[dict[str, Callable[[], None]], dict[str, float]]:
    """The parts of a step, and the whole, as functions to time. The size of the images counts where the config has
    none.

    Returns:
        The functions, and of each distiller's what it keeps for its backward pass, in MiB.
    """
    cfg = recipe.cfg
    model, source = build_model(recipe)
    student, teacher, distillers, scaling = model.student, model.teacher, model.distillers, model._scaling
    batch = random_batch(cfg, image_size)
    own_batch = scaling.batch(batch)
    own_optimizer, optimizer = recipe.build_optimizer(student), recipe.build_optimizer(model)
    for group in (*own_optimizer.param_groups, *optimizer.param_groups):
        group["lr"] = 0.0  # random weights on random images would diverge

    dtype = amp_dtype(cfg)
    if dtype == torch.bfloat16:
        keep_coordinates(student)

    def autocast() -> torch.autocast:
        return torch.autocast(torch.device(cfg.MODEL.DEVICE).type, dtype, enabled=dtype is not None)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with autocast():
            loss = sum((model.forward_student(batch) if module is student else module(batch)).values())
        loss.backward()
        optimizer.step()

    with autocast(), torch.no_grad():
        view = teacher.view(batch)
        images, record = view.images, view.features
        own_images = student.preprocess_image(own_batch).tensor
        own = student.backbone(own_images)
        student(own_batch)
        recorded = {name: tap.take()[1] for name, tap in model._taps.items()}
    outputs = _with_gradients(recorded)

    kept: dict[str, float] = {}

    def distil(name: str, distiller: nn.Module) -> None:
        leaves = {k: v.detach().requires_grad_() for k, v in own.items()}
        views = (
            model._student_view(batch, lambda: (own_images, leaves), frozen=False, outputs=outputs),
            DetectorView(teacher.model, batch, lambda: (images, record), frozen=True, dtype=teacher.dtype),
        )
        align(*views)
        memory = KeptMemory([*leaves.values(), *record.values(), *distiller.parameters()])
        with autocast(), precision.autocast(student.device, teacher.dtype), memory():
            loss = sum(distiller(*views).values())
        kept[name] = memory.mib
        loss.backward()

    def convolve(calls: list[tuple[nn.Conv2d, torch.Tensor]]) -> None:
        for layer, map_ in calls:
            with autocast(), precision.autocast(student.device, teacher.dtype):
                output = layer(map_.requires_grad_())
            output.backward(torch.ones_like(output))

    def backbone() -> None:
        with autocast():
            features = student.backbone(own_images)
        sum(level.float().sum() for level in features.values()).backward()
        model._tap.take()  # the tap holds them

    def teach(teacher: Teacher) -> None:
        with autocast():
            teacher.view(batch).features  # noqa: B018  computed when it is asked for

    parts = {BACKBONE: backbone, OWN: lambda: step(student, own_optimizer), "teacher's forward": lambda: teach(teacher)}
    for name, distiller in distillers.items():
        name = f"{name}, forward and backward"
        parts[name] = lambda name=name, distiller=distiller: distil(name, distiller)
    parts[FULL] = lambda: step(model, optimizer)

    measuring = LossWeights(distillers, period=1)  # what it checks in its first step, it checks while warming up

    def measuring_step() -> None:
        own, model._loss_weights = model._loss_weights, measuring
        get_event_storage().iter += 1  # it measures once an iteration
        step(model, optimizer)
        model._loss_weights = own

    for name, distiller in distillers.items():  # what a distiller costs beside its convolutions is our own doing
        calls = convolutions_of(distiller, functools.partial(distil, name, distiller))
        if calls:
            parts[f"convolutions of {name}, forward and backward"] = functools.partial(convolve, calls)
    kept.clear()
    parts[f"full step that measures gradients (every {cfg.DISTILL.GRADIENT_LOG_PERIOD} iterations)"] = measuring_step
    others = ["float32", "bfloat16"] + ["float16"] * (student.device.type == "cuda")
    for other in others:
        detector = Teacher(source.build_detector(), dtype=getattr(torch, other))
        parts[f"teacher's forward in {other}"] = lambda detector=detector: teach(detector)
    return parts, kept


def measure(
    parts: dict[str, Callable[[], None]], kept: dict[str, float], rounds: int, device: str
) -> tuple[list[dict], float]:
    """Times the parts in turns.

    Args:
        parts: by name.
        kept: what a part keeps for its backward pass, in MiB, by name; filled by running it.
        rounds: how many.
        device: "cuda" or "cpu".

    Returns:
        A row for each part (median, minimum and maximum in ms; the medians over the rounds of its time divided by the
        backbone's and by the student's own step's; peak memory in MiB; what it keeps for its backward pass; what the
        profiler counts), and the median over the rounds of the full step's time divided by the sum of the times of the
        parts that it consists of.
    """
    times, peaks = time_in_turns(parts, rounds, PeakMemory(device))

    def ratio_to(name: str, other: str) -> float:
        return statistics.median(part / whole for part, whole in zip(times[name], times[other]))

    rows = [
        {
            "part": name,
            **describe_times(values),
            "/ backbone": ratio_to(name, BACKBONE),
            "/ own step": ratio_to(name, OWN),
            "peak MiB": peaks[name],
            "kept MiB": kept.get(name),
            **count_operators(parts[name], device),
        }
        for name, values in times.items()
    ]
    _, *others = list(times.values())[: list(times).index(FULL)]
    ratio = statistics.median(whole / sum(pieces) for whole, *pieces in zip(times[FULL], *others))
    return rows, ratio


def compare(rows: list[dict], earlier: list[dict]) -> list[dict]:
    """Puts an earlier measurement beside the rows.

    Args:
        rows: of this one.
        earlier: of another; its rows are found by their names.

    Returns:
        The rows, with the earlier time and peak memory, and the quotient of the times.
    """
    (key, *_) = rows[0]
    known = {row[key]: row for row in earlier}
    result = []
    for row in rows:
        other = known.get(row[key], {})
        ratio = row["ms"] / other["ms"] if other else None
        result.append({**row, "earlier ms": other.get("ms"), "earlier MiB": other.get("peak MiB"), "/ earlier": ratio})
    return result


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
        flops[name] = count_gflops(model, batch[0])
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
    parser.add_argument("--against", metavar="FILE", help="compare with what --json wrote before")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each part")
    parser.add_argument("--inference", action="store_true", help="compare the detectors at inference instead of a step")
    sizes = {"default": (480, 640), "metavar": ("H", "W"), "help": "of --inference, and of a Python config's step"}
    parser.add_argument("--image-size", type=int, nargs=2, **sizes)
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
                parts, kept = build_parts(recipe, args.image_size)
                content["rows"], content["ratio"] = measure(parts, kept, args.rounds, cfg.MODEL.DEVICE)
    except DistillError as error:
        sys.exit(f"error: {explain(error, args.config_file)}")
    content["device"] = torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else "CPU"
    if args.against:
        earlier = json.loads(Path(args.against).read_text())
        content["rows"] = compare(content["rows"], earlier["rows"])
    digits = {"/ backbone": ".3f", "/ own step": ".3f", "/ teacher": ".3f", "/ earlier": ".3f", "GFLOPs": ".2f"}
    formats = tuple(digits.get(column, ".1f") for column in content["rows"][0])
    print(tabulate(content["rows"], headers="keys", floatfmt=formats, tablefmt="pipe"))
    print(f"\n{args.rounds} rounds, {content['device']}")
    if "ratio" in content:
        print(f"full step / sum of its parts: {content['ratio']:.3f} (median of the rounds)")
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
