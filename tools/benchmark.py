#!/usr/bin/env python3
"""Step time and peak memory of a distillation config, broken down: what each part costs, and what the whole costs.

    python tools/benchmark.py --config-file CONFIG [--json FILE] [--rounds N]

The batch is random images of the config's training size (INPUT.MIN_SIZE_TRAIN x MAX_SIZE_TRAIN, SOLVER.IMS_PER_BATCH
of them) with random boxes; weights are random, so neither data nor checkpoints are needed. The parts run in turns,
round after round, so that a machine whose speed drifts slows all of them alike. Beside the parts that make up a step
stands the student's backbone alone, to which each of them is compared.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import nn

from distill.config import load_config, student_config
from distill.distillers import build_distillers
from distill.engine import Trainer
from distill.errors import DistillError
from distill.modeling import DetectorView, DistillationModel, Teacher
from distill.modeling.loss_weights import LossWeights
from distill.modeling.teacher import teacher_config

logger = logging.getLogger("detectron2.benchmark")

FULL = "full step"
BACKBONE = "student's backbone alone, forward and backward"


def random_batch(cfg: CfgNode, boxes_per_image: int = 8) -> list[dict]:
    """Random images with random boxes and masks of the first class.

    Args:
        cfg: the full config, for the size and the number of the images.
        boxes_per_image: how many.

    Returns:
        A batch in Detectron2's format.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = cfg.INPUT.MIN_SIZE_TRAIN[-1], cfg.INPUT.MAX_SIZE_TRAIN
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
    what the parts before have freed."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # some containers forbid it: the peak is then the process's own
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 2**10


def build_parts(cfg: CfgNode) -> dict[str, Callable[[], None]]:
    """The parts of a step, and the whole, as functions to time."""
    cfg.SOLVER.BASE_LR = 0.0  # random weights on random images would diverge
    teacher_cfg = teacher_config(cfg)
    cfg.MODEL.TORCHVISION.WEIGHTS = teacher_cfg.MODEL.TORCHVISION.WEIGHTS = ""
    student = build_model(student_config(cfg))
    teacher = Teacher(build_model(teacher_cfg))
    distillers = build_distillers(cfg, student.backbone.output_shape(), teacher.output_shape)
    model = DistillationModel(student=student, teacher=teacher, distillers=distillers).train()
    batch = random_batch(cfg)
    own_optimizer, optimizer = Trainer.build_optimizer(cfg, student), Trainer.build_optimizer(cfg, model)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", enabled=cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu")

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with autocast():
            loss = sum(module(batch).values())
        loss.backward()
        optimizer.step()
        if module is student:
            model._tap.take()  # the tap holds the step's features

    with autocast(), torch.no_grad(), model._same_padding():
        view = teacher.view(batch)
        images, record = view.images, view.features
        own = student.backbone(student.preprocess_image(batch).tensor)
        student(batch)
        outputs = {name: tap.take()[1] for name, tap in model._head_taps.items()}

    def distil(distiller: nn.Module) -> None:
        leaves = {k: v.clone().requires_grad_() for k, v in own.items()}
        views = (
            DetectorView(student, batch, lambda: (images, leaves), frozen=False, outputs=outputs),
            DetectorView(teacher.model, batch, lambda: (images, record), frozen=True),
        )
        with autocast():
            loss = sum(distiller(*views).values())
        loss.backward()

    def backbone() -> None:
        with autocast():
            features = student.backbone(images)
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


def measure(parts: dict[str, Callable[[], None]], rounds: int, device: str) -> tuple[list[dict], float]:
    """Times the parts in turns.

    Returns:
        A row for each part (median, minimum and maximum in ms; the median over the rounds of its time divided by the
        backbone's; peak memory in MiB), and the median over the rounds of the full step's time divided by the sum of
        the times of the parts that it consists of.
    """
    memory = PeakMemory(device)
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
    rows = [
        {
            "part": name,
            "ms": statistics.median(values),
            "min ms": min(values),
            "max ms": max(values),
            "/ backbone": statistics.median(part / whole for part, whole in zip(values, times[BACKBONE])),
            "peak MiB": peaks[name],
        }
        for name, values in times.items()
    ]
    _, *others = list(times.values())[: list(times).index(FULL)]
    ratio = statistics.median(whole / sum(pieces) for whole, *pieces in zip(times[FULL], *others))
    return rows, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    setup_logger()
    try:
        cfg = load_config(args.config_file, args.opts)
        if not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        keep_freed_memory()
        with EventStorage():
            rows, ratio = measure(build_parts(cfg), args.rounds, cfg.MODEL.DEVICE)
    except DistillError as error:
        sys.exit(f"error: {error}")
    device = torch.cuda.get_device_name() if cfg.MODEL.DEVICE.startswith("cuda") else "CPU"
    print(tabulate(rows, headers="keys", floatfmt=("", ".1f", ".1f", ".1f", ".3f", ".1f"), tablefmt="pipe"))
    print(f"\nfull step / sum of its parts: {ratio:.3f} (median of {args.rounds} rounds, {device})")
    if args.json:
        content = {"config": args.config_file, "device": device, "rounds": args.rounds, "rows": rows, "ratio": ratio}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
