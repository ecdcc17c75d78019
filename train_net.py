#!/usr/bin/env python3
"""Trains and evaluates: a distilled student, or any plain Detectron2 detector.

python train_net.py --config-file CONFIG [--num-gpus N] [--resume] [--eval-only] [KEY VALUE ...]
python train_net.py --config-file STUDENT --distill ReviewDistiller --teacher-config T [--teacher-weights W]
python train_net.py --config-file CONFIG --eval-only --eval-teacher

A config that ends in .py is a LazyConfig, with overrides as key=value.
"""

import logging
import sys
from argparse import ArgumentParser, Namespace

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from distill.config import check_output_dir, check_solver, records_kept
from distill.data import check_datasets, register_from_config
from distill.distillers import DISTILLER_REGISTRY
from distill.engine import Trainer, evaluate_student, evaluate_teacher, launch
from distill.errors import DistillError
from distill.modeling.precision import amp_dtype, distill_dtype
from distill.recipes import Recipe, explain, load_recipe

logger = logging.getLogger("distill")


def argument_parser() -> ArgumentParser:
    """Detectron2's arguments and those of distillation."""
    parser = default_argument_parser(epilog=__doc__)
    group = parser.add_argument_group("distillation")
    names = ", ".join(name.removesuffix("Distiller") for name, _ in DISTILLER_REGISTRY)
    group.add_argument("--distill", metavar="NAMES", help=f"distil a plain config, by some of {names}")
    group.add_argument("--teacher-config", metavar="FILE", help="sets DISTILL.TEACHER.CONFIG_FILE")
    group.add_argument("--teacher-weights", metavar="FILE", help="sets DISTILL.TEACHER.WEIGHTS (default: the zoo's)")
    group.add_argument("--eval-teacher", action="store_true", help="evaluate the teacher")
    return parser


def read(args: Namespace) -> Recipe:
    """Reads the config, applies the arguments, registers the datasets, and checks what can be checked.

    Args:
        args: the parsed command line.

    Returns:
        The recipe of the run, its config frozen. Nothing is written yet.

    Raises:
        DistillError: see :mod:`distill.config` and :mod:`distill.data.register`.
    """
    args.eval_only |= args.eval_teacher
    if not args.config_file:
        raise DistillError("--config-file is missing. Give a config file, such as configs/demo/review.yaml.")
    recipe = load_recipe(args.config_file, args.opts)
    names = [name.strip() for name in args.distill.split(",")] if args.distill else []
    node = recipe.cfg.DISTILL
    if not names and not recipe.is_distilled:
        if node.DISTILLERS or node.STUDENT.INHERIT or node.STUDENT.INPUT_SCALE != 1:
            raise DistillError(
                f"{args.config_file} is not distilled (MODEL.META_ARCHITECTURE is {recipe.cfg.MODEL.META_ARCHITECTURE})"
                ", so its DISTILL.DISTILLERS, STUDENT.INHERIT and STUDENT.INPUT_SCALE have no use: distil it by "
                "--distill NAMES --teacher-config T."
            )
        if (args.teacher_config or args.teacher_weights) and not args.eval_teacher:
            raise DistillError(f"{args.config_file} is not distilled, so its teacher has no use: add --distill NAMES.")
    recipe.set_distillation(names, args.teacher_config or "", args.teacher_weights or "")
    cfg = recipe.cfg
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    register_from_config(cfg, cfg.DATASETS.TEST if args.eval_only else ())
    check_datasets(cfg, is_training=not args.eval_only)
    recipe.check_evaluation(args.eval_only)
    if not args.eval_only:
        recipe.check()
        distill_dtype(cfg)
        amp_dtype(cfg)
        check_solver(cfg, comm.get_world_size())
    check_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    return recipe


def set_up(recipe: Recipe, args: Namespace) -> None:
    """Detectron2's ``default_setup``: the log, the seed, and the config in OUTPUT_DIR.

    Args:
        recipe: of the run.
        args: the parsed command line.
    """
    recipe.setup(args)
    cfg = recipe.cfg
    if not torch.cuda.is_available():
        logger.info("No CUDA GPU is available: running on the CPU.")
    elif cfg.MODEL.DEVICE == "cpu":  # a run that began without a GPU says so
        logger.warning("MODEL.DEVICE is cpu, though there is a CUDA GPU: add MODEL.DEVICE cuda to use it.")
    if cfg.TEST.AUG.ENABLED:
        logger.warning(
            "TEST.AUG.ENABLED has no effect here: evaluate the exported student by Detectron2's tools/train_net.py."
        )


def main(args: Namespace) -> object:
    """What every process runs.

    Args:
        args: the parsed command line.

    Returns:
        The results of the evaluation, if there was one.
    """
    recipe = read(args)
    with records_kept(recipe.cfg.OUTPUT_DIR, is_training=not args.eval_only):
        set_up(recipe, args)
        if not args.eval_only:
            trainer = Trainer(recipe)
            trainer.resume_or_load(resume=args.resume)
    if args.eval_teacher:
        return evaluate_teacher(recipe)
    if args.eval_only:
        return evaluate_student(recipe, args.resume)
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
        sys.exit(f"error: {explain(error, args.config_file)}")


def device_of(args: Namespace) -> str:
    """Where the model of a command runs, which decides how several processes are started.

    Args:
        args: the parsed command line.

    Returns:
        MODEL.DEVICE, or "cpu" where there is no CUDA.
    """
    if not torch.cuda.is_available():
        return "cpu"
    return load_recipe(args.config_file, args.opts).cfg.MODEL.DEVICE if args.config_file else "cuda"


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    try:
        launch(run, arguments, device_of(arguments))
    except DistillError as error:
        sys.exit(f"error: {explain(error, arguments.config_file)}")
