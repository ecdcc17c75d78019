"""The registry of distillers, and how a config becomes modules."""

import difflib
import inspect
from collections.abc import Iterator, Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn

from ..config import import_modules, variant_config
from ..errors import DistillError
from .base import Distiller


class DistillerRegistry(Registry):
    """Detectron2's registry, with an error that says where a name was registered first."""

    def _do_register(self, name: str, obj: type) -> None:
        if name in self:
            first = self.get(name)
            raise DistillError(
                f"The distiller {name!r} of {_source(obj)} is registered already, by {_source(first)}. Rename one of "
                "them. If it is one file, DISTILL.IMPORTS and the rest of your code import it by two names: use one."
            )
        super()._do_register(name, obj)

    def resolve(self, name: str) -> str:
        """The registered name that is meant: case and the ending "Distiller" need not be written.

        Args:
            name: such as "ReviewDistiller", "reviewdistiller" or "review", with or without "/variant".

        Returns:
            The registered name, with the variant; an unknown or ambiguous one as it is.
        """
        kind, slash, variant = name.partition("/")
        if kind not in self:
            short = kind.lower().removesuffix("distiller")
            found = [known for known, _ in self if known.lower().removesuffix("distiller") == short]
            kind = found[0] if len(found) == 1 else kind
        return f"{kind}{slash}{variant}"


def _source(obj: type) -> str:
    try:
        return f"module {obj.__module__} ({inspect.getfile(obj)})"
    except (OSError, TypeError):  # a class typed into an interpreter has no file
        return f"module {obj.__module__}"


DISTILLER_REGISTRY = DistillerRegistry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Registry for distillers.

A registered class is called as ``obj(cfg, student_shape, teacher_shape)`` and returns a :class:`Distiller`.
"""


def distiller_names(cfg: CfgNode) -> list[str]:
    """The distillers of a config, by their registered names.

    Args:
        cfg: the full config; its DISTILL.IMPORTS are imported.

    Returns:
        DISTILL.DISTILLERS, with unknown names as they are.
    """
    return [DISTILLER_REGISTRY.resolve(name) for name in cfg.DISTILL.DISTILLERS]


def check_distillers(cfg: CfgNode) -> None:
    """Imports what ``DISTILL.IMPORTS`` names and checks that ``DISTILL.DISTILLERS`` can be built.

    Args:
        cfg: the full config.

    Raises:
        DistillError: a module cannot be imported, neither a distiller nor a part to inherit is named, a distiller is
            unknown, not registered or named twice, a variant has no settings.
    """
    import_modules(cfg.DISTILL.IMPORTS)
    names = distiller_names(cfg)
    known = ", ".join(sorted(name for name, _ in DISTILLER_REGISTRY))
    if not names and not cfg.DISTILL.STUDENT.INHERIT:
        raise DistillError(
            "DISTILL.DISTILLERS and DISTILL.STUDENT.INHERIT are both empty, so the teacher would teach nothing. Name "
            f"at least one of the registered distillers: {known}."
        )
    for name in names:
        kind, _, variant = name.partition("/")
        if kind not in DISTILLER_REGISTRY:
            unregistered = [cls for cls in _subclasses(Distiller) if cls.__name__ == kind]
            if unregistered:
                raise DistillError(
                    f"The distiller {kind!r} of {_source(unregistered[0])} is not registered: add "
                    "@DISTILLER_REGISTRY.register() above its class."
                )
            # by what differs: every name ends in "Distiller", which makes "kd" look like MGDDistiller
            short = {key.lower().removesuffix("distiller"): key for key, _ in DISTILLER_REGISTRY}
            nearest = difflib.get_close_matches(kind.lower().removesuffix("distiller"), short, n=1)
            hint = f"; the nearest is {short[nearest[0]]}" if nearest else ""
            raise DistillError(
                f"Unknown distiller {kind!r} in DISTILL.DISTILLERS{hint}. Registered are: {known}. "
                "For one of your own, add @DISTILLER_REGISTRY.register() to the class, and its module to "
                "DISTILL.IMPORTS."
            )
        if names.count(name) > 1:
            raise DistillError(
                f"DISTILL.DISTILLERS names {name!r} {names.count(name)} times. For another one of the kind, with "
                f"settings of its own, name it '{kind}/LABEL' and put the settings into DISTILL.VARIANTS.LABEL."
            )
        if "." in name or name.endswith("/"):
            raise DistillError(
                f"DISTILL.DISTILLERS names {name!r}: expected NAME or NAME/LABEL, the label without dots."
            )
        if variant:
            variant_config(cfg, variant)


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
        DistillError: see :func:`check_distillers`; something registered is no :class:`Distiller`; or what a distiller
            itself refuses, such as a level that one side lacks.
    """
    check_distillers(cfg)
    distillers = nn.ModuleDict()
    for name in distiller_names(cfg):
        kind, _, variant = name.partition("/")
        own_cfg = variant_config(cfg, variant) if variant else cfg
        distiller = DISTILLER_REGISTRY.get(kind)(own_cfg, student_shape, teacher_shape)
        if not isinstance(distiller, Distiller):
            raise DistillError(
                f"{kind} in DISTILLER_REGISTRY builds a {type(distiller).__name__}: expected a subclass of "
                "distill.distillers.Distiller."
            )
        distillers[name] = distiller
    return distillers


def _subclasses(cls: type) -> Iterator[type]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
