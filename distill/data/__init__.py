"""Datasets: ``digit_scenes``, which needs no download, and the user's own by config."""

from .digit_scenes import register_digit_scenes
from .images import seen_path
from .mapper import CheckedMapper
from .register import check_datasets, register_datasets, register_from_config

register_digit_scenes()

__all__ = [
    "CheckedMapper",
    "check_datasets",
    "register_datasets",
    "register_digit_scenes",
    "register_from_config",
    "seen_path",
]
