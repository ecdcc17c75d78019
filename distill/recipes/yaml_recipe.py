"""A run from Detectron2's yaml config."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.engine import default_setup
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.optim import Optimizer

from ..config import (
    auto_scale_workers,
    drop_backbone_weights,
    forget_record,
    plain_config,
    resolve_config_file,
    student_config,
)
from ..data import CheckedMapper
from ..errors import DistillError
from ..evaluation import check_evaluators
from .base import Mapper, Recipe


class YamlRecipe(Recipe):
    """See :class:`Recipe`.

    Args:
        cfg: the full config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.ddp_settings = {"broadcast_buffers": False}

    def set_distillation(self, names: Sequence[str], teacher_config: str, teacher_weights: str) -> None:
        cfg = self.cfg
        if names:
            if not self.is_distilled:
                cfg.DISTILL.STUDENT.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
                cfg.MODEL.META_ARCHITECTURE = "DistillationModel"
            cfg.DISTILL.DISTILLERS = list(names)
        cfg.DISTILL.TEACHER.CONFIG_FILE = teacher_config or cfg.DISTILL.TEACHER.CONFIG_FILE
        cfg.DISTILL.TEACHER.WEIGHTS = teacher_weights or cfg.DISTILL.TEACHER.WEIGHTS

    def setup(self, args: Namespace) -> None:
        default_setup(self.cfg, Namespace(**{**vars(args), "config_file": resolve_config_file(args.config_file)[0]}))
        setup_logger(self.cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
        if comm.is_main_process() and not getattr(args, "eval_only", False):
            # or an earlier run's Python config would be taken for this one's
            forget_record(self.cfg.OUTPUT_DIR)

    def check(self) -> None:
        """
        Raises:
            DistillError: there is nothing to train on.
        """
        if not self.cfg.DATASETS.TRAIN:
            raise DistillError("DATASETS.TRAIN is empty: name the datasets to train on, such as coco_2017_train.")

    def check_evaluation(self, is_required: bool) -> None:
        """
        Raises:
            DistillError: an evaluation is asked for and there is no test set, or see
                :func:`distill.evaluation.check_evaluators`.
        """
        if is_required and not self.cfg.DATASETS.TEST:
            raise DistillError("DATASETS.TEST is empty: name the datasets to evaluate on, such as coco_2017_val.")
        check_evaluators(self.cfg.DATASETS.TEST)

    def scale_workers(self, num_workers: int) -> None:
        self.cfg = auto_scale_workers(self.cfg, num_workers)

    def plain(self) -> YamlRecipe:
        return YamlRecipe(plain_config(self.cfg))

    def write(self, folder: str, weights: str) -> str:
        cfg = self.cfg.clone()
        cfg.MODEL.WEIGHTS = weights
        cfg.OUTPUT_DIR = os.path.join(folder, "output")
        drop_backbone_weights(cfg)  # they are in the file
        path = os.path.join(folder, "config.yaml")
        with open(path, "w") as f:
            f.write(cfg.dump())
        return path

    def build_detector(self) -> nn.Module:
        return build_model(student_config(self.cfg))

    def build_model(self) -> nn.Module:
        return build_model(self.cfg)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """SGD as Detectron2 builds it, or AdamW with the same parameter groups and gradient clipping.

        Args:
            model: what is trained.

        Returns:
            The optimizer.

        Raises:
            DistillError: SOLVER.OPTIMIZER is neither.
        """
        cfg = self.cfg
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        if cfg.SOLVER.OPTIMIZER != "AdamW":
            raise DistillError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}: expected 'SGD' or 'AdamW'.")
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    def build_lr_scheduler(self, optimizer: Optimizer) -> Any:
        return build_lr_scheduler(self.cfg, optimizer)

    def build_train_loader(self, num_workers: int | None = None) -> Iterable[list[dict]]:
        """Detectron2's train loader, whose errors name the image."""
        cfg = self.cfg.clone()
        cfg.defrost()
        if num_workers is not None:
            cfg.DATALOADER.NUM_WORKERS = num_workers
        return build_detection_train_loader(cfg, mapper=CheckedMapper(self.build_train_mapper()))

    def build_train_mapper(self) -> Mapper:
        """What reads an image for training: Detectron2's ``DatasetMapper``, unless a subclass has its own."""
        return DatasetMapper(self.cfg, is_train=True)

    def build_mapper(self, keep_annotations: bool = False, scale: int = 1, image_format: str = "") -> Mapper:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.INPUT.MIN_SIZE_TEST *= scale
        cfg.INPUT.MAX_SIZE_TEST *= scale
        cfg.INPUT.FORMAT = image_format or cfg.INPUT.FORMAT
        if not keep_annotations:
            return CheckedMapper(DatasetMapper(cfg, is_train=False))
        augmentations = detection_utils.build_augmentation(cfg, is_train=False)
        return CheckedMapper(DatasetMapper(True, augmentations=augmentations, image_format=cfg.INPUT.FORMAT))

    def training_images(self) -> list[dict]:
        cfg = self.cfg
        return get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            check_consistency=False,
        )

    def test_images(self) -> list[dict]:
        return get_detection_dataset_dicts(self.cfg.DATASETS.TEST, filter_empty=False, check_consistency=False)
