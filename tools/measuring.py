"""What the benchmarks measure with: random batches, time in turns, memory, and what torch's profiler counts."""

import contextlib
import ctypes
import functools
import itertools
import logging
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger("detectron2.benchmark")


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


class KeptMemory:
    """What a graph keeps for its backward pass, in MiB, beside tensors that are there in any case.

    Args:
        there: tensors that do not count.
    """

    def __init__(self, there: Iterable[torch.Tensor]) -> None:
        self._there = {x.untyped_storage().data_ptr() for x in there}
        self._kept: dict[int, int] = {}

    def __call__(self) -> contextlib.AbstractContextManager:
        """Counts what is saved inside."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._there:
            self._kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def mib(self) -> float:
        """The sum."""
        return sum(self._kept.values()) / 2**20


def count_operators(run: Callable[[], None], device: str) -> dict[str, int]:
    """What torch's profiler counts in one run: kernels and waits of the host on CUDA, operators elsewhere."""
    on_cuda = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        run()
    events = profiler.key_averages()
    if not on_cuda:
        return {"operators": sum(x.count for x in events if x.key.startswith(("aten::", "torchvision::")))}
    waits = sum(x.count for x in events if x.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    launches = ("cudaLaunchKernel", "cuLaunchKernel")  # and their newer forms, which end in ExC and Ex
    return {"kernels": sum(x.count for x in events if x.key.startswith(launches)), "waits": waits}


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


def time_images(models: dict[str, nn.Module], inputs: dict[str, list[dict]], rounds: int) -> dict[str, float]:
    """Times detectors in turns, one image at a time.

    Args:
        models: by name, in eval mode.
        inputs: of each of them, images in Detectron2's format, which are taken one after the other, over and over.
        rounds: how many images of each count, after two that warm up.

    Returns:
        Median ms per image by name.
    """
    images = {name: itertools.cycle(inputs[name]) for name in models}

    @torch.no_grad()
    def detect(name: str) -> None:
        models[name]([next(images[name])])

    parts = {name: functools.partial(detect, name) for name in models}
    on_cuda = any(p.is_cuda for model in models.values() for p in model.parameters())
    times, _ = time_in_turns(parts, rounds, PeakMemory("cuda" if on_cuda else "cpu"))
    return {name: statistics.median(values) for name, values in times.items()}


class _Boxes(nn.Module):
    """A detector as a function of tensors, which is what fvcore can trace."""

    def __init__(self, model: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.model, self.size = model, {"height": height, "width": width}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        (output,) = self.model([{"image": image, **self.size}])
        return output["instances"].pred_boxes.tensor


@torch.no_grad()
def count_gflops(model: nn.Module, image: dict) -> float:
    """What an image costs by fvcore's counter.

    Args:
        model: a detector in eval mode.
        image: in Detectron2's format, with its "height" and "width".

    Returns:
        GFLOPs, a multiplication and an addition being one.
    """
    counter = FlopCountAnalysis(_Boxes(model, image["height"], image["width"]), image["image"])
    return counter.unsupported_ops_warnings(False).tracer_warnings("none").total() / 1e9
