"""Data sets: ``digit_scenes``, which needs no download, and the user's own by config."""

from .digit_scenes import register_digit_scenes
from .mapper import NamingDatasetMapper
from .register import check_num_classes, register_datasets

register_digit_scenes()

__all__ = ["NamingDatasetMapper", "check_num_classes", "register_datasets", "register_digit_scenes"]
