"""The meta-architecture that trains a student with the help of a teacher."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Instances
from tabulate import tabulate
from torch import Tensor, nn

from ..config import student_config
from ..distillers.base import Distiller
from ..distillers.build import build_distillers, check_distillers
from ..errors import DistillError
from .backbones import freeze_unused_levels
from .checkpoint import describe_weights
from .dense_heads import has_towers
from .inherit import inheritable_weights, warn_of_other_anchors
from .loss_weights import LossWeights
from .precision import autocast, autocast_dtype
from .scaling import Scaling, build_scaling
from .taps import FeatureTap, MethodTap, TowerTap
from .teacher import Teacher, build_teacher, check_detector, square_size
from .views import DetectorView, align
from .wrapper import Wrapper, rename_state

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class DistillationModel(Wrapper):
    """Owns the student and the distillers, holds the teacher, runs all three and adds up the losses.

    To the outside it is the student: its state dict has the student's own keys (besides those under
    ``distillers.``), attributes that it lacks are the student's, and in eval mode it is the student's forward.

    Args:
        student: any Detectron2 detector.
        teacher: see :class:`Teacher`; it is in no state dict, but follows ``.to(device)``.
        distillers: by name; their losses add up.
        inherit: prefixes of the student's weights that :meth:`start` copies from the teacher.
        loss_weights: how the distillers' losses are weighed; by default, by each distiller's own weight alone.
        scaling: at which size the student sees the images in training, and so which of its levels lies on which of the
            teacher's; by default at full size.

    Raises:
        DistillError: student or teacher is not a detector that can be distilled, or a weight to be inherited does
            not fit.
    """

    wrapped = "student"

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        distillers: nn.ModuleDict,
        inherit: Sequence[str] = (),
        loss_weights: LossWeights | None = None,
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__()
        check_detector(student, "student")
        self.student = student
        self.distillers = distillers
        self.teacher = teacher
        self._loss_weights = loss_weights or LossWeights(distillers)
        self._scaling = scaling or Scaling()
        self._levels = self._scaling.levels(student.backbone.output_shape(), teacher.output_shape)
        self._inherit = list(inherit)
        self._inheritable_weights()  # an error now rather than after the data is loaded
        self._is_started = False
        self._tap = FeatureTap(student.backbone)
        # what the student's own heads computed is there for the distillers to see
        heads = getattr(student, "roi_heads", None)
        predictor = getattr(heads, "box_predictor", None)
        predictor = predictor[0] if isinstance(predictor, (nn.ModuleList, list)) else predictor
        parts = {"head": getattr(student, "head", None), "box_predictor": predictor}
        self._taps = {name: FeatureTap(part) for name, part in parts.items() if part is not None}
        if hasattr(heads, "label_and_sample_proposals"):
            self._taps["proposals"] = MethodTap(heads, "label_and_sample_proposals", _as_sampled)
        if hasattr(student, "label_anchors"):
            self._taps["label_anchors"] = MethodTap(student, "label_anchors")
        if has_towers(parts["head"]):
            unactivated = {left for distiller in distillers.values() for left in distiller.unactivated_towers}
            self._taps["towers"] = TowerTap(parts["head"], unactivated)
        rename_state(self, [("distillers.", "distillers."), ("student.", "")])
        self.to(student.device)  # distillers and teacher too

    @classmethod
    def from_config(cls, cfg: CfgNode, build_student: Callable[[], nn.Module] | None = None) -> dict[str, Any]:
        """
        Args:
            cfg: the full config.
            build_student: builds the student; by default it is what the rest of MODEL describes.
        """
        check_distillers(cfg)
        scaling = build_scaling(cfg)
        student = build_student() if build_student else build_model(student_config(cfg))
        with torch.random.fork_rng(devices=[]):  # so that the student's training draws what it draws without a teacher
            teacher = build_teacher(cfg)
            own, given = student.backbone.output_shape(), teacher.output_shape
            distillers = build_distillers(cfg, scaling.shape(own, given), given)
        compared = {level for d in distillers.values() for level in (given if d.levels is None else d.levels)}
        freeze_unused_levels(student, [k for k, level in scaling.levels(own, given).items() if level in compared])
        parameters = sum(p.numel() for p in student.parameters()) / 1e6
        logger.info(
            f"Student: {type(student).__name__}, {parameters:.1f} M parameters, "
            f"from {describe_weights(cfg)}, inheriting {cfg.DISTILL.STUDENT.INHERIT or 'nothing'}"
        )
        rows = [
            (name, d.loss_weight, d.warmup_iters, d.decay, sum(p.numel() for p in d.parameters()) / 1e6)
            for name, d in distillers.items()
        ]
        headers = ["distiller", "loss weight", "warmup iterations", "decay", "parameters (M)"]
        logger.info("Distillers:\n" + tabulate(rows, headers, "pipe"))
        return {
            "student": student,
            "teacher": teacher,
            "distillers": distillers,
            "inherit": cfg.DISTILL.STUDENT.INHERIT,
            "loss_weights": LossWeights(
                distillers, cfg.SOLVER.MAX_ITER, cfg.DISTILL.GRADIENT_LOG_PERIOD, cfg.DISTILL.BALANCE
            ),
            "scaling": scaling,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationModel":
        self.teacher.model._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, batched_inputs: list[dict]) -> Any:
        """
        Args:
            batched_inputs: a batch in Detectron2's format.

        Returns:
            In training, the student's detection losses and the distillers' losses, ``dict[str, Tensor[]]``; in
            evaluation, what the student returns.

        Raises:
            DistillError: a distiller does not keep to what :class:`Distiller` promises.
        """
        if not self.training:
            return self.student(batched_inputs)
        self._check_sizes(batched_inputs)
        if not self._is_started:
            self._warn_of_no_start()
        batched_inputs, own_inputs = _on_device(batched_inputs, self.student.device), batched_inputs
        teacher = self.teacher.view(batched_inputs)
        if self.distillers:
            teacher.images  # noqa: B018  first, so that the memory it runs in is free again for the student
        # Detectron2 draws the annotations that it is given, from the CPU
        is_drawing = getattr(self.student, "vis_period", 0) > 0
        given = _with_images_of(batched_inputs, own_inputs) if is_drawing else batched_inputs
        detection = dict(self.student(self._scaling.batch(given, self.student.device)))
        record = self._tap.take()
        outputs = {name: tap.take()[1] for name, tap in self._taps.items() if tap.has_record}
        student = self._student_view(batched_inputs, lambda: self._given(record), frozen=False, outputs=outputs)
        if self.distillers:
            align(student, teacher)
        distilled: dict[str, dict[str, Tensor]] = {}
        taken = set(detection)
        for name, distiller in self.distillers.items():
            with autocast(self.student.device, self.teacher.dtype):
                own = distiller(student, teacher)
            distilled[name] = _checked(name, own, taken)
            taken |= distilled[name].keys()
        for tap in self._taps.values():  # a distiller that ran a head of the student's left a record, too
            tap.forget()
        losses = dict(detection)
        if distilled:
            weights = self._loss_weights(detection, distilled, record[1])
            for name, own in distilled.items():
                losses.update({key: loss * weights[name][key] for key, loss in own.items()})
        return losses

    def forward_student(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The student's forward pass in training mode, without the teacher and the distillers.

        Args:
            batched_inputs: a batch in Detectron2's format.

        Returns:
            The detection losses, ``dict[str, Tensor[]]``.
        """
        losses = self.student(self._scaling.batch(batched_inputs, self.student.device))
        for tap in (self._tap, *self._taps.values()):
            tap.forget()
        return losses

    def _given(self, record: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the distillers are given of the student, in float32 where they compute in it."""
        images, features = record
        if self.teacher.dtype == torch.float32:
            features = {name: level.float() if _is_half(level) else level for name, level in features.items()}
        return images, features

    def _check_sizes(self, batched_inputs: list[dict]) -> None:
        square = square_size(self.student.backbone)
        sizes = [math.ceil(side * self._scaling.scale) for x in batched_inputs for side in x["image"].shape[-2:]]
        largest = max(sizes, default=0)
        if square and largest > square:
            raise DistillError(
                f"An image has a side of {largest} pixels, but the student pads images to a square of {square}: "
                "Detectron2 would cut the rest off. Let the training's augmentations keep to that size, or raise the "
                "student's model.backbone.square_pad."
            )

    def frozen_views(self, batched_inputs: list[dict]) -> tuple[DetectorView, DetectorView]:
        """Views of both sides without gradient, for what happens between steps.

        Args:
            batched_inputs: a batch in Detectron2's format.

        Returns:
            The student's view and the teacher's; nothing is run until it is asked for, the student in the mode that it
            is in by then. They are not aligned, for that takes both backbones: each shows all of its cells.
        """

        def features() -> tuple[Tensor, dict[str, Tensor]]:
            self._check_sizes(batched_inputs)
            scaled = self._scaling.batch(batched_inputs, self.student.device)
            images = self.student.preprocess_image(scaled).tensor
            return images, self.student.backbone(images)

        return self._student_view(batched_inputs, features, frozen=True), self.teacher.view(batched_inputs)

    def _inheritable_weights(self) -> dict[str, Tensor]:
        teacher, scale = self.teacher, self._scaling.scale
        return inheritable_weights(self.student, teacher.model, self._inherit, scale, teacher.flip_channels)

    def _student_view(self, *args: Any, **settings: Any) -> DetectorView:
        dtype = autocast_dtype(self.student.device)
        return DetectorView(self.student, *args, **settings, scaling=self._scaling, levels=self._levels, dtype=dtype)

    def _warn_of_no_start(self) -> None:
        self._is_started = True  # once
        hooked = [name for name, x in self.distillers.items() if type(x).build_hooks is not Distiller.build_hooks]
        if self._inherit or hooked:
            logger.warning(
                f"The training begins without start(), so the student has inherited nothing (DISTILL.STUDENT.INHERIT: "
                f"{self._inherit}), and the hooks of {', '.join(hooked) or 'no distiller'} may be missing. Use "
                "distill.engine.Trainer; or in a loop of your own call model.start() once the weights are loaded, and "
                "register what each distiller's build_hooks(model) returns."
            )

    def start(self, resumed: bool = False) -> None:
        """What a run begins with, after weights are loaded: the distillers forget other runs, and the student inherits.
        :class:`distill.engine.Trainer` calls it.

        Args:
            resumed: whether the run goes on from a checkpoint, which has all of that.

        Source: Kang et al., *Instance-Conditional Knowledge Distillation for Object Detection*, NeurIPS 2021.
        """
        self._is_started = True
        if resumed:
            return
        for distiller in self.distillers.values():
            distiller.reset()
        weights = self._inheritable_weights()
        if not weights:
            return
        if self._scaling.scale == 1:  # or the anchors were checked
            warn_of_other_anchors(self.student, self.teacher.model, list(weights))
        own = self.student.state_dict()
        for key, value in weights.items():  # not load_state_dict, which resets the FrozenBN that it is not given
            own[key].copy_(value)
        logger.info(f"The student inherits {len(weights)} weights from the teacher, under {', '.join(self._inherit)}")


def _as_sampled(proposals: Any) -> list[Instances] | None:
    """What the box head is given: with TRAIN_ON_PRED_BOXES Detectron2 later writes the predicted boxes into it. None
    for what another method of that name returns."""
    if not isinstance(proposals, list) or not all(isinstance(x, Instances) for x in proposals):
        return None
    return [Instances(x.image_size, proposal_boxes=x.proposal_boxes, gt_classes=x.gt_classes) for x in proposals]


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16)


def _on_device(batched_inputs: list[dict], device: torch.device) -> list[dict]:
    """The batch with images and annotations where the student and the teacher want them, moved once for both."""
    moved = [{**x, "image": x["image"].to(device, non_blocking=True)} for x in batched_inputs]
    return [{**x, "instances": x["instances"].to(device)} if "instances" in x else x for x in moved]


def _with_images_of(moved: list[dict], batched_inputs: list[dict]) -> list[dict]:
    return [{**x, "image": y["image"]} for x, y in zip(batched_inputs, moved)]


def _checked(name: str, result: Any, taken: set[str]) -> dict[str, Tensor]:
    """The losses that a distiller returned, by names of their own; or says what is wrong with them."""
    if not isinstance(result, dict):
        raise DistillError(
            f"{name}.forward returned a {type(result).__name__}: expected a dict of named losses, such as "
            '{"loss_mine": loss}.'
        )
    if not result:
        raise DistillError(
            f"{name}.forward returned no loss. Where a batch has nothing to compare, return 0 times something of the "
            "student's by the usual name, or processes with other images would wait for this one."
        )
    _, _, variant = name.partition("/")
    losses = {}
    for key, loss in result.items():
        if variant:
            key = f"{key}_{variant}"
        if key in taken:
            raise DistillError(f"{name} names a loss {key!r}, which the detector or another distiller has: rename it.")
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise DistillError(f"{name}'s loss {key!r} has {shape}: expected a scalar tensor.")
        if _is_half(loss):
            raise DistillError(
                f"{name}'s loss {key!r} is {loss.dtype}: compute it in float32, by decorating its formula with "
                "distill.losses.in_float32."
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise DistillError(
                f"{name}'s loss {key!r} does not depend on the student: nothing that it is computed from needs a "
                "gradient. Compute it from the student's view, without detach or no_grad; where a batch has nothing to "
                "compare, return 0 times something of the student's."
            )
        losses[key] = loss
    return losses
