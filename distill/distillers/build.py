"""The registry of distillers, and how a config becomes modules."""

import importlib
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import DistillError

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry for distillers.

A registered class is called as ``obj(cfg, student_shape, teacher_shape)`` and returns a :class:`Distiller`.
"""


def check_distillers(cfg: CfgNode) -> None:
    """Imports what ``DISTILL.IMPORTS`` names and checks that ``DISTILL.DISTILLERS`` can be built.

    Args:
        cfg: the full config.

    Raises:
        DistillError: a module cannot be imported, neither a distiller nor a part to inherit is named, a distiller is
            unknown or named twice.
    """
    for module in cfg.DISTILL.IMPORTS:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise DistillError(
                f"DISTILL.IMPORTS names the module {module!r}, which cannot be imported: {error}. Put it beside "
                "train_net.py, or its folder on PYTHONPATH."
            ) from error
    names = list(cfg.DISTILL.DISTILLERS)
    known = ", ".join(sorted(name for name, _ in DISTILLER_REGISTRY))
    if not names and not cfg.DISTILL.STUDENT.INHERIT:
        raise DistillError(
            "DISTILL.DISTILLERS and DISTILL.STUDENT.INHERIT are both empty, so the teacher would teach nothing. Name "
            f"at least one of the registered distillers: {known}."
        )
    for name in names:
        if name not in DISTILLER_REGISTRY:
            raise DistillError(
                f"Unknown distiller {name!r} in DISTILL.DISTILLERS. Registered are: {known}. For one of your own, add "
                "@DISTILLER_REGISTRY.register() to the class and its module to DISTILL.IMPORTS."
            )
        if names.count(name) > 1:
            raise DistillError(f"DISTILL.DISTILLERS names {name!r} {names.count(name)} times: once is enough.")


def build_distillers(
    cfg: CfgNode, student_shape: Mapping[str, ShapeSpec], teacher_shape: Mapping[str, ShapeSpec]
) -> nn.ModuleDict:
    """Builds the distillers that ``DISTILL.DISTILLERS`` names.

    Args:
        cfg: the full config.
        student_shape: the student's features by level, as ``backbone.output_shape()`` returns them.
        teacher_shape: the teacher's.

    Returns:
        The distillers by name, in the order of the config.

    Raises:
        DistillError: see :func:`check_distillers`; or what a distiller itself refuses, such as a level that one
            side lacks.
    """
    check_distillers(cfg)
    return nn.ModuleDict(
        {name: DISTILLER_REGISTRY.get(name)(cfg, student_shape, teacher_shape) for name in cfg.DISTILL.DISTILLERS}
    )
