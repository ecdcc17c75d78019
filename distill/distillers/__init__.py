"""Distillation methods, one file each, and the registry in which anyone adds another."""

from .adaptation import build_adaptation
from .aligned import AlignedDistiller
from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY, build_distillers
from .channel_wise import CWDDistiller
from .cross_head import CrossKDDistiller
from .focal_global import FGDDistiller
from .global_knowledge import GlobalKnowledgeDistiller
from .imitation import ImitationDistiller
from .logit import LogitDistiller
from .masked_generative import MGDDistiller
from .pearson import PearsonDistiller
from .review import ReviewDistiller
from .structural import StructuralDistiller

__all__ = [
    "DISTILLER_REGISTRY",
    "AlignedDistiller",
    "CWDDistiller",
    "CrossKDDistiller",
    "Distiller",
    "FGDDistiller",
    "GlobalKnowledgeDistiller",
    "ImitationDistiller",
    "LogitDistiller",
    "MGDDistiller",
    "PearsonDistiller",
    "ReviewDistiller",
    "StructuralDistiller",
    "build_adaptation",
    "build_distillers",
    "shared_levels",
]
