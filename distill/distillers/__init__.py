"""Distillation methods, one file each, and the registry in which anyone adds another."""

from .base import Distiller, shared_levels
from .build import DISTILLER_REGISTRY, build_distillers
from .review import ReviewDistiller

__all__ = ["DISTILLER_REGISTRY", "Distiller", "ReviewDistiller", "build_distillers", "shared_levels"]
