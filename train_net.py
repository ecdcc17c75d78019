#!/usr/bin/env python3
"""Trains and evaluates: a distilled student, or any plain Detectron2 detector.

python train_net.py --config-file CONFIG [--num-gpus N] [--resume] [--eval-only] [KEY VALUE ...]
python train_net.py --config-file STUDENT --distill ReviewDistiller --teacher-config T [--teacher-weights W]
python train_net.py --config-file CONFIG --eval-only --eval-teacher
"""

import logging
import os
import sys
from argparse import ArgumentParser, Namespace

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from distill.config import check_output_dir, check_solver, load_config, resolve_config_file, student_config
from distill.data import check_datasets, register_datasets
from distill.engine import Trainer, agreed_checkpoint, launch
from distill.errors import DistillError
from distill.modeling.checkpoint import load_detector
from distill.modeling.teacher import teacher_config

logger = logging.getLogger("distill")


def argument_parser() -> ArgumentParser:
    """Detectron2's arguments and those of distillation."""
    parser = default_argument_parser(epilog=__doc__)
    group = parser.add_argument_group("distillation")
    group.add_argument("--distill", metavar="NAMES", help="distil a plain config by these distillers, comma-separated")
    group.add_argument("--teacher-config", metavar="FILE", help="sets DISTILL.TEACHER.CONFIG_FILE")
    group.add_argument("--teacher-weights", metavar="FILE", help="sets DISTILL.TEACHER.WEIGHTS")
    group.add_argument("--eval-teacher", action="store_true", help="with --eval-only: evaluate the teacher")
    return parser


def setup(args: Namespace) -> CfgNode:
    """Reads the config, applies the arguments, registers the data sets, and checks what can be checked.

    Args:
        args: the parsed command line.

    Returns:
        The full config, frozen.

    Raises:
        DistillError: see :mod:`distill.config` and :mod:`distill.data.register`.
    """
    if not args.config_file:
        raise DistillError("--config-file is missing. Give a config file, such as configs/demo/review.yaml.")
    cfg = load_config(args.config_file, args.opts)
    is_distilled = cfg.MODEL.META_ARCHITECTURE == "DistillationModel"
    if args.distill:
        if not is_distilled:
            cfg.DISTILL.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
            cfg.MODEL.META_ARCHITECTURE = "DistillationModel"
        cfg.DISTILL.DISTILLERS = [name.strip() for name in args.distill.split(",")]
    elif not is_distilled and (
        cfg.DISTILL.DISTILLERS or cfg.DISTILL.STUDENT.INHERIT or cfg.DISTILL.STUDENT.INPUT_SCALE != 1
    ):
        raise DistillError(
            f"{args.config_file} is not distilled (MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}), so its "
            "DISTILL.DISTILLERS, STUDENT.INHERIT and STUDENT.INPUT_SCALE have no use: distil it by --distill NAMES "
            "--teacher-config T."
        )
    elif (args.teacher_config or args.teacher_weights) and not (is_distilled or args.eval_teacher):
        raise DistillError(f"{args.config_file} is not distilled, so its teacher has no use: add --distill NAMES.")
    if args.teacher_config:
        cfg.DISTILL.TEACHER.CONFIG_FILE = args.teacher_config
    if args.teacher_weights:
        cfg.DISTILL.TEACHER.WEIGHTS = args.teacher_weights
    on_cpu = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if on_cpu:
        cfg.MODEL.DEVICE = "cpu"
    no_amp = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"  # Detectron2 has it for CUDA only
    if no_amp:
        cfg.SOLVER.AMP.ENABLED = False
    register_datasets(cfg.DATASETS.REGISTER)
    check_datasets(cfg)
    if not args.eval_only:
        check_solver(cfg, comm.get_world_size())
    check_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    default_setup(cfg, Namespace(**{**vars(args), "config_file": resolve_config_file(args.config_file)[0]}))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
    if on_cpu:
        logger.info("No CUDA GPU is available: running on the CPU.")
    if no_amp:
        logger.info("SOLVER.AMP.ENABLED needs CUDA: training in float32.")
    return cfg


def evaluate(cfg: CfgNode, role: str) -> dict:
    """Evaluates one detector, whose weights must fill it completely.

    Args:
        cfg: its own config, without distillation.
        role: what it is, for the messages.

    Returns:
        Detectron2's results by task and metric.
    """
    results = Trainer.test(cfg, load_detector(cfg, role))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: Namespace) -> object:
    """What every process runs.

    Args:
        args: the parsed command line.

    Returns:
        The results of the evaluation, if there was one.
    """
    cfg = setup(args)
    if args.eval_teacher:
        own = teacher_config(cfg)
        own.DATASETS, own.OUTPUT_DIR = cfg.DATASETS, os.path.join(cfg.OUTPUT_DIR, "teacher")
        check_datasets(own)
        return evaluate(own, "teacher")
    if args.eval_only:
        own = student_config(cfg)
        last = DetectionCheckpointer(torch.nn.Identity(), cfg.OUTPUT_DIR)
        if args.resume:
            own.MODEL.WEIGHTS = agreed_checkpoint(last) or own.MODEL.WEIGHTS
        return evaluate(own, "model")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: Namespace) -> object:
    """:func:`main`, with one clear message instead of a traceback for bad input.

    Args:
        args: the parsed command line.

    Returns:
        What ``main`` returns.

    Raises:
        SystemExit: the input was bad.
    """
    try:
        return main(args)
    except DistillError as error:
        # a data loader's worker process wraps the message in its own traceback
        sys.exit(f"error: {str(error).rsplit('DistillError: ', 1)[-1].strip()}")


def device_of(args: Namespace) -> str:
    """Where the model of a command runs, which decides how several processes are started.

    Args:
        args: the parsed command line.

    Returns:
        MODEL.DEVICE, or "cpu" where there is no CUDA.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return load_config(args.config_file, args.opts).MODEL.DEVICE if args.config_file else "cuda"


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    try:
        launch(run, arguments, device_of(arguments))
    except DistillError as error:
        sys.exit(f"error: {error}")
