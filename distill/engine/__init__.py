"""Training, evaluation and how processes are started: Detectron2's own, with what distillation adds."""

from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "launch"]
