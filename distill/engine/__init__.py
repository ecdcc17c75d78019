"""Training, evaluation and how processes are started: Detectron2's own, with what distillation adds."""

from .checkpoints import agreed_checkpoint
from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "agreed_checkpoint", "launch"]
