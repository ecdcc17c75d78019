#!/usr/bin/env python3
"""Checks distillation on the GPUs of this machine: one page that can be pasted into an issue.

    python tools/check_gpu.py [--rounds 5]

1. The losses of a step in float32, float16 and bfloat16, as SOLVER.AMP has them, beside those of the CPU in float32.
2. Time and memory of a step's parts at 800x1333 in each of them, as tools/benchmark.py has it.
3. Three steps of train_net.py on all GPUs, over NCCL: with a student alone, and with one that four methods distil, in
   float32 and in mixed precision.

Weights are random and the images need no download. Exit status 1: something is wrong, or there is no GPU.
"""

import argparse
import copy
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import detectron2
import torch
from benchmark import build_model, build_parts, measure
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from measuring import random_batch
from tabulate import tabulate

from distill.config import load_config, student_config
from distill.modeling import DistillationModel, Teacher
from distill.modeling.precision import autocast, keep_coordinates
from distill.recipes import load_recipe

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("configs/review/retinanet_R50_R101.yaml", "configs/review/faster_rcnn_R50_R101.yaml")
DENSE = ("RetinaNet", "FCOS")
# Those that need no sampled boxes, which differ from device to device
FEATURE_METHODS = [f"{name}Distiller" for name in ("Review", "Structural", "Imitation", "FGD", "MGD", "CWD", "Pearson")]
DENSE_METHODS = ["CrossKDDistiller", "LogitDistiller"]
FIXED = ["DISTILL.MGD.MASK_RATIO", "0.0"]  # a random mask, too
# What several processes do together: the search for prototypes, means over all boxes, the balance of gradients
METHODS = ["ReviewDistiller", "GlobalKnowledgeDistiller", "CrossKDDistiller", "LogitDistiller"]
DISTILLED = ["DISTILL.DISTILLERS", str(METHODS), "DISTILL.BALANCE", "0.5", "DISTILL.GRADIENT_LOG_PERIOD", "1"]
DISTILLED += ["DISTILL.GLOBAL.MAX_IMAGES", "8", "DISTILL.GLOBAL.NUM_PROTOTYPES", "2"]
DISTILLED += ["DISTILL.GLOBAL.MIN_BOX_SIZE", "8"]
SMALL = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(256,)", "INPUT.MAX_SIZE_TRAIN", "320"]
LARGE = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(800,)", "INPUT.MAX_SIZE_TRAIN", "1333"]
GRADIENT = "gradient"  # its norm, which only has to be finite
# How far the losses may be from those in float32 on the CPU
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


def compare_losses(config: str, device: str, precisions: list[str]) -> list[dict]:
    """Runs the same step on the CPU in float32, and on a device in each precision.

    Args:
        config: whose distillers become all those of FEATURE_METHODS, and for a dense detector of DENSE_METHODS.
        device: such as "cuda".
        precisions: names of torch's types.

    Returns:
        A row for each precision, with the largest relative difference among the losses that do not depend on sampling.
    """
    methods = FEATURE_METHODS + DENSE_METHODS * (student_config(load_config(config)).MODEL.META_ARCHITECTURE in DENSE)
    recipe = load_recipe(config, [*SMALL, *FIXED, "MODEL.DEVICE", "cpu", "DISTILL.DISTILLERS", str(methods)])
    torch.manual_seed(0)
    model, _ = build_model(recipe)
    batch = random_batch(recipe.cfg, (0, 0))
    wanted = _losses(copy.deepcopy(model), batch, "cpu", "float32")
    is_dense = type(model.student).__name__ in DENSE
    rows = []
    for precision in precisions:
        found = _losses(copy.deepcopy(model), batch, device, precision)
        others = () if is_dense else ("loss_cls", "loss_box", "loss_rpn")
        compared = [key for key in wanted if key != GRADIENT and not key.startswith(others)]
        worst = max(compared, key=lambda key: _difference(found[key], wanted[key]))
        difference = _difference(found[worst], wanted[worst])
        good = difference <= TOLERANCE[precision] and math.isfinite(found[GRADIENT])  # False for nan
        what = f"{Path(config).stem}, {device} in {precision}"
        rows.append({"what": what, "largest difference": difference, "of": worst, "ok": "yes" if good else "NO"})
    return rows


def _losses(model: DistillationModel, batch: list[dict], device: str, precision: str) -> dict[str, float]:
    dtype = getattr(torch, precision)
    model = model.to(device)
    model.student.device  # noqa: B018  follows its buffers
    if dtype != torch.float32:
        model.teacher = Teacher(model.teacher.model, model.teacher.flip_channels, dtype)
    if dtype == torch.bfloat16:
        keep_coordinates(model.student)
    torch.manual_seed(0)
    with EventStorage(), autocast(torch.device(device), dtype):
        losses = model(batch)
    sum(losses.values()).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {**{key: loss.item() for key, loss in losses.items()}, GRADIENT: torch.cat(gradients).norm().item()}


def _difference(found: float, wanted: float) -> float:
    return abs(found - wanted) / max(abs(wanted), 1e-8)


def time_steps(config: str, device: str, rounds: int, size: list[str], precision: str) -> list[dict]:
    """The benchmark's rows.

    Args:
        config: a distilled one.
        device: such as "cuda".
        rounds: how many.
        size: overrides for the size of the images.
        precision: "float32", or what SOLVER.AMP.PRECISION is to be.

    Returns:
        See :func:`benchmark.measure`.
    """
    amp = [] if precision == "float32" else ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision]
    recipe = load_recipe(config, [*size, *amp, "MODEL.DEVICE", device])
    with EventStorage():
        parts, kept = build_parts(recipe, (0, 0))
        rows, _ = measure(parts, kept, rounds, device)
    return [{"part": f"{row['part']} ({precision})", **{k: v for k, v in row.items() if k != "part"}} for row in rows]


def train_on_all(number: int) -> tuple[bool, str]:
    """Trains three steps with train_net.py: a student alone, and one that a random teacher distils by methods that talk
    to the other processes, in float32 and in mixed precision.

    Args:
        number: of GPUs.

    Returns:
        Whether both ended well, and the end of the log of the last.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/teacher.pth"
        teacher = load_recipe("configs/demo/teacher.yaml", ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""])
        torch.save({"model": teacher.build_detector().state_dict()}, weights)
        distilled = [*DISTILLED, "DISTILL.TEACHER.WEIGHTS", weights]
        runs = (("student", []), ("review", distilled), ("review", [*distilled, "SOLVER.AMP.ENABLED", "True"]))
        for config, opts in runs:
            command = [sys.executable, "train_net.py", "--config-file", f"configs/demo/{config}.yaml"]
            command += ["--num-gpus", str(number), "OUTPUT_DIR", f"{folder}/{config}", "DATASETS.TEST", "()"]
            command += ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", str(4 * max(1, number)), *opts]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=600)
            except subprocess.TimeoutExpired as error:  # processes that wait for each other
                told = [x.decode(errors="replace") for x in (error.stdout, error.stderr) if x]
                return False, f"{''.join(told)[-1500:]}\nnot done after {error.timeout:.0f} seconds"
            log = (result.stdout + result.stderr)[-1500:]
            if result.returncode != 0:
                return False, log
    return True, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.chdir(ROOT)  # which the configs' names are relative to
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here, or torch does not find it: nothing was checked.")
    setup_logger()
    number = torch.cuda.device_count()
    cards = ", ".join(torch.cuda.get_device_name(index) for index in range(number))
    print(f"{cards}; torch {torch.__version__}, CUDA {torch.version.cuda}, Detectron2 {detectron2.__version__}\n")

    precisions = ["float32", "float16"] + ["bfloat16"] * torch.cuda.is_bf16_supported()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # to compare with the CPU
    rows = [row for config in CONFIGS for row in compare_losses(config, "cuda", precisions)]
    print(tabulate(rows, "keys", "pipe", floatfmt=".2g") + "\n")
    torch.backends.cudnn.allow_tf32 = True  # torch's default

    for precision in precisions:
        times = time_steps(CONFIGS[1], "cuda", args.rounds, LARGE, precision)
        print(tabulate(times, "keys", "pipe", floatfmt=".2f") + "\n")

    trained, log = train_on_all(number)
    print(f"train_net.py on {number} GPU(s): {'ok' if trained else 'FAILED' + chr(10) + log}")
    if not trained or any(row["ok"] != "yes" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
