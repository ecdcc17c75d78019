"""Knowledge distillation of object detectors, as an extension of Detectron2."""

from .config import add_distill_config

__version__ = "0.1.0"

__all__ = ["add_distill_config"]
