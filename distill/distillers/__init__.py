"""Distillation methods, one file each, and the registry in which anyone adds another."""

from .adaptation import build_adaptation
from .aligned import AlignedDistiller
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY, build_distillers
from .global_knowledge import GlobalKnowledgeDistiller
from .imitation import ImitationDistiller
from .review import ReviewDistiller
from .structural import StructuralDistiller

__all__ = [
    "DISTILLER_REGISTRY",
    "AlignedDistiller",
    "Distiller",
    "GlobalKnowledgeDistiller",
    "ImitationDistiller",
    "ReviewDistiller",
    "StructuralDistiller",
    "build_adaptation",
    "build_distillers",
    "shared_levels",
]
