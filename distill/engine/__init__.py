"""Training, evaluation and how processes are started: Detectron2's own, with what distillation adds."""

from .checkpoints import agreed_checkpoint
from .evaluate import evaluate_student, evaluate_teacher, teacher_mapper
from .launch import launch
from .trainer import Trainer

__all__ = ["Trainer", "agreed_checkpoint", "evaluate_student", "evaluate_teacher", "launch", "teacher_mapper"]
