"""Detectron2's trainer, with what distillation adds."""

import functools
import logging
from typing import Any
from unittest import mock

import detectron2.engine.defaults
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..config import scale_iterations
from ..data import CheckedDatasetMapper
from ..errors import DistillError
from ..modeling import DistillationModel
from ..modeling.backbones import freeze_unused_levels
from ..modeling.checkpoint import describe_weights
from .checkpoints import agreed_checkpoint, check_alike, last_finite_checkpoint, save_after_failure
from .hooks import CheckGradients, DrawDenseDetections
from .launch import ddp_device_ids

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains a :class:`DistillationModel`, or any plain Detectron2 detector.

    Beyond :class:`DefaultTrainer`: the optimizer by SOLVER.OPTIMIZER, the evaluator by the data set's
    ``evaluator_type``, the distillers' hooks, inheriting, several processes on the CPU, and a checkpoint when bad
    input ends the training.

    Args:
        cfg: the full config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.last_step: int | None = None  # the last that was done, counted from 0
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        # Detectron2 passes the local rank as DDP's device: wrong on the CPU, and where each process sees one GPU alone
        create_ddp_model = functools.partial(
            detectron2.engine.defaults.create_ddp_model, device_ids=ddp_device_ids(cfg.MODEL.DEVICE)
        )
        with mock.patch.object(detectron2.engine.defaults, "create_ddp_model", create_ddp_model):
            super().__init__(cfg)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """As Detectron2's, by SOLVER.REFERENCE_WORLD_SIZE; what DISTILL counts in iterations scales, too.

        Args:
            cfg: the full config.
            num_workers: number of processes.

        Returns:
            The same config, or a scaled copy.
        """
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        frozen = scaled.is_frozen()
        scaled.defrost()
        scale_iterations(scaled.DISTILL, num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE)
        if frozen:
            scaled.freeze()
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model of MODEL.META_ARCHITECTURE.

        Args:
            cfg: the full config.

        Returns:
            A :class:`DistillationModel`, or a plain detector, on MODEL.DEVICE.
        """
        model = build_model(cfg)
        if not isinstance(model, DistillationModel):
            freeze_unused_levels(model)
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            logger.info(
                f"Model: {type(model).__name__}, {parameters:.1f} M parameters, "
                f"from {describe_weights(cfg)}, no distillation"
            )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """SGD as Detectron2 builds it, or AdamW with the same parameter groups and gradient clipping.

        Args:
            cfg: the full config.
            model: what is trained.

        Returns:
            The optimizer.

        Raises:
            DistillError: SOLVER.OPTIMIZER is neither.
        """
        if cfg.SOLVER.OPTIMIZER == "SGD":
            return super().build_optimizer(cfg, model)
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

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's train loader, whose errors name the image."""
        return build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader, whose errors name the image."""
        mapper = CheckedDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """The evaluator of the data set's ``evaluator_type``.

        Args:
            cfg: the full config.
            dataset_name: a registered data set.
            output_folder: where it writes its results; by default ``OUTPUT_DIR/inference``.

        Returns:
            Detectron2's evaluator.

        Raises:
            DistillError: the data set says neither "coco" nor "pascal_voc".
        """
        evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
        if evaluator_type == "coco":
            return COCOEvaluator(dataset_name, output_dir=output_folder or f"{cfg.OUTPUT_DIR}/inference")
        if evaluator_type == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        raise DistillError(
            f"The data set {dataset_name} has the evaluator_type {evaluator_type!r}: expected 'coco' or 'pascal_voc' "
            "in its metadata."
        )

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, and before those that evaluate and write, the distillers'."""
        hooks = super().build_hooks()
        model = self._unwrapped_model()
        if isinstance(model, DistillationModel):
            extra = [hook for distiller in model.distillers.values() for hook in distiller.build_hooks(model)]
            hooks[2:2] = [CheckGradients(model.distillers), *extra]  # behind the timer and the learning rate
            model = model.student
        if self.cfg.VIS_PERIOD > 0 and isinstance(model, DenseDetector):
            hooks[2:2] = [DrawDenseDetections(model, self.cfg.VIS_PERIOD)]
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        """As Detectron2's; a run that starts (and is not resumed) inherits what DISTILL.STUDENT.INHERIT names.

        Args:
            resume: whether to go on from the last checkpoint in OUTPUT_DIR, if there is one.

        Raises:
            DistillError: the weights cannot be read, or the processes do not go on from the same checkpoint.
        """
        last = agreed_checkpoint(self.checkpointer) if resume else ""
        path = last or self.cfg.MODEL.WEIGHTS
        failure, message = None, ""
        try:
            super().resume_or_load(bool(last))
        except Exception as error:  # a missing or damaged file, another optimizer, other distillers
            failure, message = error, str(error) or type(error).__name__
        message = next(filter(None, comm.all_gather(message)), "")  # where one fails, the others must not wait for it
        if message:
            hint = "to start anew, or with another optimizer or other distillers, leave --resume out"
            raise DistillError(
                f"Cannot load {path!r} into the model: {message}. Check that the file exists and is complete; "
                f"{hint if last else 'MODEL.WEIGHTS names it'}."
            ) from failure
        check_alike(self.start_iter, "The processes would start at different iterations", self.cfg.OUTPUT_DIR)
        model = self._unwrapped_model()
        if not last and isinstance(model, DistillationModel):
            model.start()

    def run_step(self) -> None:
        """One training step."""
        super().run_step()
        self.last_step = self.iter

    def train(self) -> Any:
        """Trains. If bad input ends the training, what was learned until then is saved, for ``--resume``.

        Raises:
            DistillError: the input was bad, or the training diverged.
        """
        try:
            return super().train()
        except FloatingPointError as error:  # Detectron2's, for a loss or proposals
            raise DistillError(self._divergence(error)) from error
        except DistillError:
            save_after_failure(self)
            raise

    def _divergence(self, error: FloatingPointError) -> str:
        before = {k: f"{v:.4g}" for k, (v, _) in self.storage.latest().items() if "loss" in k and "/" not in k}
        path = last_finite_checkpoint(self.cfg.OUTPUT_DIR)
        distilled = isinstance(self._unwrapped_model(), DistillationModel)
        return (
            f"The training diverged in iteration {self.iter}: {' '.join(str(error).split())} The losses before: "
            f"{before or 'none'}. Lower SOLVER.BASE_LR ({self.cfg.SOLVER.BASE_LR:g})"
            f"{', or the distillers by LOSS_WEIGHT or DISTILL.BALANCE,' if distilled else ''} or raise "
            f"SOLVER.WARMUP_ITERS ({self.cfg.SOLVER.WARMUP_ITERS}), or clip by SOLVER.CLIP_GRADIENTS.ENABLED True. "
            f"{f'The last checkpoint with finite weights: {path}' if path else 'No checkpoint with finite weights.'}"
        )

    def _unwrapped_model(self) -> nn.Module:
        model = self._trainer.model
        return model.module if isinstance(model, DistributedDataParallel) else model
