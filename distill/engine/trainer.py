"""The training loop: Detectron2's, with what distillation adds."""

import logging
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, create_ddp_model, default_writers, hooks
from detectron2.evaluation import verify_results
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import DistillError
from ..modeling import AlignedTeacher, DistillationModel
from ..modeling.backbones import freeze_unused_levels
from ..modeling.checkpoint import WeightsCheckpointer, describe_weights
from ..modeling.precision import amp_dtype, keep_coordinates, keep_statistics
from ..modeling.timm_weights import check_backbone, warn_of_other_images
from ..recipes import Recipe, as_recipe
from .checkpoints import agreed_checkpoint, check_alike, last_finite_checkpoint, save_after_failure
from .hooks import BestCheckpoint, CheckGradients, DrawDenseDetections, DropPictures, Evaluate, StudentAlone
from .launch import ddp_device_ids
from .steps import StepTrainer

logger = logging.getLogger(__name__)


class Trainer(TrainerBase):
    """Trains a :class:`DistillationModel`, or any plain Detectron2 detector, as its recipe says.

    The steps are those of :class:`StepTrainer`, the hooks Detectron2's and the distillers'. If bad input ends the
    training, a checkpoint is written. Who wants another optimizer, data loader or evaluator subclasses a recipe.

    Args:
        recipe: where the model, its data and its schedule come from; a yaml config is one, too.
    """

    def __init__(self, recipe: Recipe | CfgNode) -> None:
        super().__init__()
        self.recipe = as_recipe(recipe)
        if not logger.isEnabledFor(logging.INFO):  # nobody set it up, as DefaultTrainer has it
            setup_logger(self.recipe.cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
        self.recipe.scale_workers(comm.get_world_size())
        self.cfg = cfg = self.recipe.cfg
        self.results: dict | None = None  # of the last evaluation
        self.last_step: int | None = None  # the last that was done, counted from 0
        model = self.build_model(self.recipe)
        student, other_dtype = model, None
        if isinstance(model, DistillationModel):
            student, other_dtype = model.student, model.teacher.dtype
        optimizer, loader = self.recipe.build_optimizer(model), self.build_train_loader()
        # Detectron2 takes the local rank for DDP's device: wrong on the CPU, and where each process sees one GPU alone
        model = create_ddp_model(model, device_ids=ddp_device_ids(cfg.MODEL.DEVICE), **self.recipe.ddp_settings)
        device, dtype = torch.device(cfg.MODEL.DEVICE), amp_dtype(cfg)
        if dtype == torch.bfloat16:
            keep_coordinates(student)
        if torch.bfloat16 in (dtype, other_dtype):
            keep_statistics(model)
        if dtype is not None:
            logger.info(f"Mixed precision: {dtype} on {device.type}")
        accumulate = cfg.SOLVER.ACCUMULATE
        if accumulate > 1:
            images = cfg.SOLVER.IMS_PER_BATCH
            logger.info(f"Each iteration takes {accumulate} batches of {images} images: {accumulate * images} in all")
        self._trainer = StepTrainer(model, loader, optimizer, device, dtype, accumulate, other_dtype)
        self.checkpointer = WeightsCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self._began = time.time()  # earlier checkpoints are another run's, unless this one is resumed
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """What is trained; of several processes, wrapped by DistributedDataParallel."""
        return self._trainer.model

    @property
    def optimizer(self) -> Optimizer:
        """Of the model."""
        return self._trainer.optimizer

    @property
    def data_loader(self) -> Iterable[list[dict]]:
        """Of the training images."""
        return self._trainer.data_loader

    @staticmethod
    def build_model(recipe: Recipe | CfgNode) -> nn.Module:
        """Builds what is trained.

        Args:
            recipe: of the run, or a yaml config.

        Returns:
            A :class:`DistillationModel`, or a plain detector, on MODEL.DEVICE.
        """
        recipe = as_recipe(recipe)
        model = recipe.build_model()
        if not isinstance(model, DistillationModel):
            freeze_unused_levels(model)
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            logger.info(
                f"Model: {type(model).__name__}, {parameters:.1f} M parameters, "
                f"from {describe_weights(recipe.cfg)}, no distillation"
            )
        return model

    def build_train_loader(self) -> Iterable[list[dict]]:
        """The recipe's train loader."""
        return self.recipe.build_train_loader()

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, and before those that evaluate and write, the distillers'."""
        cfg, model = self.cfg, self._unwrapped_model()
        found = [hooks.IterationTimer(), hooks.LRScheduler(scheduler=self.recipe.build_lr_scheduler(self.optimizer))]
        if cfg.VIS_PERIOD > 0 and not comm.is_main_process():
            found.append(DropPictures())
        elif self.is_drawing:
            found.append(DrawDenseDetections(getattr(model, "student", model), cfg.VIS_PERIOD))
        if isinstance(model, DistillationModel):
            found.append(CheckGradients(model.distillers))
            found += [hook for distiller in model.distillers.values() for hook in distiller.build_hooks(model)]
        own = StudentAlone(model) if isinstance(model, DistillationModel) else model
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(own):
            if isinstance(model, AlignedTeacher):
                raise DistillError(
                    "TEST.PRECISE_BN.ENABLED is True, and an AlignedTeacher runs its backbone twice in a step, at two "
                    "sizes, which fvcore's PreciseBN does not take: set it to False, or MODEL.RESNETS.NORM to FrozenBN."
                )
            loader = self.recipe.build_train_loader(num_workers=0)  # another one, which leaves the training's alone
            found.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, own, loader, cfg.TEST.PRECISE_BN.NUM_ITER))
        if comm.is_main_process():
            settings = {"max_to_keep": self.recipe.max_checkpoints}
            found.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, **settings))
        found.append(Evaluate(cfg.TEST.EVAL_PERIOD, self._evaluate))  # behind the checkpoint, in case it fails
        if comm.is_main_process():
            found.append(BestCheckpoint(self.checkpointer, cfg.TEST.BEST_METRIC))
            writers = default_writers(cfg.OUTPUT_DIR, self.max_iter)
            found.append(hooks.PeriodicWriter(writers, period=self.recipe.log_period))
        return found

    @property
    def is_drawing(self) -> bool:
        """Whether detections are drawn by a hook of ours: R-CNN draws its proposals itself."""
        model = self._unwrapped_model()
        return self.cfg.VIS_PERIOD > 0 and isinstance(getattr(model, "student", model), DenseDetector)

    def _evaluate(self) -> dict:
        try:
            # not by DDP, which may exchange buffers in each forward, while processes have other numbers of images
            self.results = self.recipe.evaluate(self._unwrapped_model())
        except Exception as error:  # of an evaluator, of a dataset
            reason = str(error)
            if not isinstance(error, DistillError):
                reason = f"{type(error).__name__}: {error}"
                logger.exception("The evaluation failed:")  # where, which one line cannot say
            raise DistillError(
                f"The evaluation after iteration {self.iter} failed: {reason} What was learned is safe in "
                f"{self.cfg.OUTPUT_DIR}: fix the cause, then evaluate by --eval-only --resume, or go on by --resume."
            ) from error
        return self.results

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads what the training begins with. A run that starts (and is not resumed) inherits what
        DISTILL.STUDENT.INHERIT names.

        Args:
            resume: whether to go on from the last checkpoint in OUTPUT_DIR, if there is one.

        Raises:
            DistillError: the weights cannot be read, or the processes do not go on from the same checkpoint.
        """
        last = agreed_checkpoint(self.checkpointer) if resume else ""
        path = last or self.cfg.MODEL.WEIGHTS or ""
        failure, message = None, ""
        hint = "to start anew, or with another optimizer or other distillers, leave --resume out"
        try:
            check_backbone(self._unwrapped_model(), path)
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=bool(last))
        except DistillError as error:
            failure, message = error, str(error)
        except Exception as error:  # a missing or damaged file, another optimizer, other distillers
            failure = error
            message = (
                f"Cannot load {path!r} into the model: {str(error) or type(error).__name__}. Check that the file "
                f"exists and is complete; {hint if last else 'MODEL.WEIGHTS names it'}."
            )
        message = next(filter(None, comm.all_gather(message)), "")  # where one fails, the others must not wait for it
        if message:
            raise DistillError(message) from failure
        self.start_iter = self.iter + 1 if last else 0  # a checkpoint holds the iteration that was done
        self._began = 0.0 if last else self._began
        check_alike(self.start_iter, "The processes would start at different iterations", self.cfg.OUTPUT_DIR)
        model = self._unwrapped_model()
        if not last:
            warn_of_other_images(model, path, self.cfg.INPUT.FORMAT)
        if isinstance(model, DistillationModel):
            model.start(resumed=bool(last))

    def run_step(self) -> None:
        """One training step."""
        self._trainer.iter = self.iter
        self._trainer.run_step()
        self.last_step = self.iter

    def state_dict(self) -> dict:
        """What a checkpoint holds beside the model: the iteration, the hooks' state, the optimizer's."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Loads what :meth:`state_dict` returned, or what Detectron2's trainers did. Learning rate, weight decay and
        momentum stay those of the config, which may have changed since."""
        state_dict = {**state_dict, "hooks": dict(state_dict.get("hooks", {}))}
        if "LRScheduler" in state_dict["hooks"]:
            scheduler = state_dict["hooks"]["LRScheduler"]
            state_dict["hooks"]["LRScheduler"] = {key: x for key, x in scheduler.items() if key != "base_lrs"}
        super().load_state_dict(state_dict)
        own = state_dict.get("_trainer", state_dict)  # lazyconfig_train_net.py has it all on one level
        if "optimizer" in own:
            self._trainer.load_state_dict(own)
        else:  # DefaultTrainer of v0.6
            logger.warning("The checkpoint holds no state of the optimizer, which starts anew.")

    def train(self) -> Any:
        """Trains. If bad input ends the training, what was learned until then is saved, for ``--resume``.

        Returns:
            The last results of the evaluation, where TEST.EXPECTED_RESULTS asks for some; they are verified.

        Raises:
            DistillError: the input was bad, or the training diverged.
        """
        if self.start_iter >= self.max_iter:
            logger.warning(
                f"Nothing is left to train: {self.start_iter} iterations are done, and SOLVER.MAX_ITER is "
                f"{self.max_iter}. The test sets are evaluated once more."
            )
        try:
            super().train(self.start_iter, self.max_iter)
        except FloatingPointError as error:  # Detectron2's, for a loss or proposals
            raise DistillError(self._divergence(error)) from error
        except AssertionError as error:
            if "bad box" not in str(error):  # fvcore's GIoU on boxes that are not finite
                raise
            raise DistillError(self._divergence(error)) from error
        except DistillError:
            save_after_failure(self)
            raise
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self.results)
            return self.results
        return None

    def _divergence(self, error: Exception) -> str:
        before = {k: f"{v:.4g}" for k, (v, _) in self.storage.latest().items() if "loss" in k and "/" not in k}
        path = last_finite_checkpoint(self.cfg.OUTPUT_DIR, self._began)
        distilled = isinstance(self._unwrapped_model(), DistillationModel)
        return (
            f"The training diverged in iteration {self.iter}: {' '.join(str(error).split())} The losses before: "
            f"{before or 'none'}. Lower SOLVER.BASE_LR ({self.cfg.SOLVER.BASE_LR:g})"
            f"{', or the distillers by LOSS_WEIGHT or DISTILL.BALANCE,' if distilled else ''} or raise "
            "SOLVER.WARMUP_ITERS, or clip the gradients by SOLVER.CLIP_GRADIENTS. "
            f"{f'The last checkpoint with finite weights: {path}' if path else 'No checkpoint with finite weights.'}"
        )

    def _unwrapped_model(self) -> nn.Module:
        model = self.model
        return model.module if isinstance(model, DistributedDataParallel) else model
