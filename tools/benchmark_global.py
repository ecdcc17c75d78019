#!/usr/bin/env python3
"""What global knowledge costs: the search for prototypes, and its losses beside a loop over boxes.

    python tools/benchmark_global.py [--rounds N] [--instances 8000] [--boxes 256] [--height 800] [--width 1333]
    python tools/benchmark_global.py --search 157000 [--classes 80]    # all picks of one search, of COCO's size

The losses (forward and backward, without the convolutions that adapt the student's features) are computed on random
features of five levels of 256 channels for two images, once by the functions of ``distill.losses`` and once box by box;
both must come to the same. They run in turns.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import PeakMemory  # beside this file
from tabulate import tabulate
from torch import Tensor

from distill.losses import (
    box_levels,
    box_mask,
    box_means,
    global_knowledge_loss,
    local_knowledge_loss,
    prototype_robustness,
    prototype_similarity,
)
from distill.prototypes import select_prototypes
from distill.prototypes.hook import find_prototypes

CHANNELS, CLASSES, PER_CLASS, STRIDES = 256, 20, 10, (4, 8, 16, 32, 64)


class Batch:
    """Random features, boxes and prototypes."""

    def __init__(self, boxes: int, height: int, width: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator).to(device)

        sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]
        self.student = [rand(2, CHANNELS, *size).requires_grad_() for size in sizes]
        # far from the student's in some cells, so that another mask is another loss
        self.teacher = [rand(2, CHANNELS, *size) * 10 * rand(2, 1, *size) ** 4 for size in sizes]
        limits = torch.tensor([width, height], device=device)
        self.boxes = []
        for _ in range(2):
            corners = rand(boxes, 2) * limits * 0.9
            self.boxes.append(torch.cat([corners, (corners + 8 + rand(boxes, 2) ** 3 * limits).minimum(limits)], 1))
        self.labels = torch.randint(CLASSES, (2 * boxes,), generator=generator).to(device)
        self.prototype_labels = torch.arange(CLASSES, device=device).repeat_interleave(PER_CLASS)
        self.prototypes = [(rand(CLASSES * PER_CLASS, CHANNELS), rand(CLASSES * PER_CLASS, CHANNELS)) for _ in STRIDES]


def together(batch: Batch) -> Tensor:
    """Global and local loss of all boxes at once."""
    own_level = box_levels(torch.cat(batch.boxes), len(STRIDES))
    total = 0.0
    for index, stride in enumerate(STRIDES):
        sides = (batch.student[index], batch.teacher[index])
        similarities = [
            prototype_similarity(box_means(side, batch.boxes, stride), own)
            for side, own in zip(sides, batch.prototypes[index])
        ]
        robustness = prototype_robustness(*similarities, batch.labels, batch.prototype_labels)
        here = (own_level == index).split([len(x) for x in batch.boxes])
        values = robustness.split([len(x) for x in batch.boxes])
        painted = [torch.where(on, x, -1.0) for x, on in zip(values, here)]
        mask = box_mask(batch.boxes, painted, tuple(sides[0].shape[2:]), stride)
        total = total + global_knowledge_loss(*similarities, robustness) + local_knowledge_loss(*sides, mask)
    return total


def box_by_box(batch: Batch) -> Tensor:
    """The same, with a loop over boxes."""
    total = 0.0
    for index, stride in enumerate(STRIDES):
        student, teacher = batch.student[index], batch.teacher[index]
        height, width = student.shape[2:]
        mask = torch.full((2, 1, height, width), -1.0, device=student.device)
        similarities, weights = ([], []), []
        labels = iter(batch.labels)
        for image, boxes in enumerate(batch.boxes):
            for box in boxes.tolist():
                x0, x1 = (min(max(math.floor(v / stride), 0), width - 1) for v in box[0::2])
                y0, y1 = (min(max(math.floor(v / stride), 0), height - 1) for v in box[1::2])
                own = batch.prototype_labels == next(labels)
                cosines = []
                for side, prototypes in zip((student, teacher), batch.prototypes[index]):
                    mean = side[image, :, y0 : y1 + 1, x0 : x1 + 1].mean((1, 2))
                    cosines.append(torch.cosine_similarity(mean[None], prototypes))
                robustness = (1 - (cosines[0][own].max() - cosines[1][own].max()).abs()).clamp(min=0).detach()
                for store, cosine in zip(similarities, cosines):
                    store.append(cosine)
                weights.append(robustness)
                side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
                if min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), len(STRIDES) - 1) == index:
                    end_x = max(min(math.floor(box[2] / stride), width), x0 + 1)  # the last cell is left out
                    end_y = max(min(math.floor(box[3] / stride), height), y0 + 1)
                    inside = mask[image, 0, y0:end_y, x0:end_x]
                    mask[image, 0, y0:end_y, x0:end_x] = torch.maximum(inside, robustness)
        stacked = (torch.stack(x) for x in (*similarities, weights))
        total = total + global_knowledge_loss(*stacked) + local_knowledge_loss(student, teacher, mask)
    return total


def time_once(run: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds that a function takes, and what it returns."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def time_search(instances: int, classes: int, device: str) -> dict:
    """Everything of one search that comes after the network: the picks of all classes at all levels, of random rows.

    Args:
        instances: how many there are, of all classes; the classes' shares fall off as 1 / rank.
        classes: how many classes.
        device: where to compute.

    Returns:
        A row for the table.
    """
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, classes + 1)
    labels = torch.multinomial(shares, instances, replacement=True, generator=generator)
    centres = torch.randn(classes, CHANNELS, generator=generator)
    levels = [f"p{level}" for level in range(2, 2 + len(STRIDES))]
    seconds, memory = 0.0, PeakMemory(device, above_held=True)
    rest = {"labels": labels, "images": torch.zeros(instances, dtype=torch.int64), "boxes": torch.zeros(instances, 4)}
    for level in levels:  # one after the other, as the search does
        features = {
            f"{side}.{level}": centres[labels] + 0.5 * torch.randn(instances, CHANNELS, generator=generator)
            for side in ("student", "teacher")
        }
        if level == levels[0]:
            memory.reset()
        run = functools.partial(find_prototypes, {**features, **rest}, level, classes, {}, torch.device(device))
        seconds += time_once(lambda run=run: run()["labels"], device)[0]
    what = f"search among {instances} instances of {classes} classes at {len(levels)} levels, {CHANNELS} channels"
    return {"what": what, "seconds": seconds, "MiB above the inputs": memory.read()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instances", type=int, default=8000)
    parser.add_argument("--boxes", type=int, default=256, help="instances in each of the two images")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--search", type=int, metavar="INSTANCES", help="time a whole search instead")
    parser.add_argument("--classes", type=int, default=80, help="of --search")
    args = parser.parse_args()
    if args.search:
        print(tabulate([time_search(args.search, args.classes, args.device)], "keys", "pipe", floatfmt=".1f"))
        return

    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, CHANNELS, generator=generator)
    student = centres[torch.randint(40, (args.instances,), generator=generator)]
    student = (student + 0.5 * torch.randn(student.shape, generator=generator)).to(args.device)
    teacher = student + 0.5 * torch.randn(student.shape, generator=generator).to(args.device)
    memory = PeakMemory(args.device)
    select_prototypes(student[:100], teacher[:100])
    memory.reset()
    before = memory.read()
    times = [time_once(lambda: select_prototypes(student, teacher), args.device)[0] for _ in range(args.rounds)]
    rows = [
        {
            "what": f"10 prototypes of {args.instances} instances, {CHANNELS} channels",
            "seconds": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "MiB above the inputs": memory.read() - before,
        }
    ]

    batch = Batch(args.boxes, args.height, args.width, args.device)

    def step(loss: Callable[[Batch], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for level in batch.student:
                level.grad = None
            value = loss(batch)
            value.backward()
            return value.detach()

        return run

    spent: dict[str, list[float]] = {"together": [], "box by box": []}
    for _ in range(args.rounds):
        values = []
        for name, loss in (("together", together), ("box by box", box_by_box)):
            seconds, value = time_once(step(loss), args.device)
            spent[name].append(seconds)
            values.append(value.item())
        if not math.isclose(*values, rel_tol=1e-5):
            sys.exit(f"error: the two ways disagree: {values}")
    for name, seconds in spent.items():
        what = f"losses of 2 x {args.boxes} instances at {args.height}x{args.width}, {name}"
        rows.append({"what": what, "seconds": statistics.median(seconds), "min": min(seconds), "max": max(seconds)})
    ratio = statistics.median(a / b for a, b in zip(*spent.values()))
    print(tabulate(rows, headers="keys", floatfmt=".3f", tablefmt="pipe"))
    device = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    print(f"\ntogether / box by box: {ratio:.4f} (median of {args.rounds} rounds, {device})")
    if args.json:
        Path(args.json).write_text(json.dumps({"device": device, "rows": rows, "ratio": ratio}, indent=1) + "\n")


if __name__ == "__main__":
    main()
