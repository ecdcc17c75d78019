"""What a distiller may see of a detector for one batch."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import DistillError
from . import dense_heads
from .precision import autocast, autocast_dtype
from .scaling import Scaling
from .taps import recorded_inputs


class DetectorView:
    """One detector's intermediate results on one batch. Whatever costs is computed when it is first asked for.

    Each detector pads the images as it does by itself, at the bottom and on the right. So two views of a batch differ
    in how many cells of padding they have; once they are aligned (:func:`align`), each shows the cells that both have.

    Args:
        detector: the student or the teacher.
        batched_inputs: the batch, in Detectron2's format.
        compute_features: returns the padded, normalised images and the features by level.
        frozen: whether all results come without gradient, as a teacher's do.
        outputs: what modules of the detector returned in this step ("box_predictor", "head", "label_anchors"), the
            "proposals" that its box head was given, and what its head's layers were ("towers", a ``TowerRecord``).
        scaling: at which size the detector sees the images. Whatever the view shows is in pixels of the whole images.
        levels: the names that the view has for the detector's levels, see :meth:`Scaling.levels`. By default their own.
        dtype: what the detector computes in; None leaves that to autocast outside.

    Attributes:
        strides: stride of each level, in pixels.
        image_sizes: (height, width) of each image before padding.
    """

    def __init__(
        self,
        detector: nn.Module,
        batched_inputs: list[dict],
        compute_features: Callable[[], tuple[Tensor, dict[str, Tensor]]],
        frozen: bool,
        outputs: Mapping[str, Any] | None = None,
        scaling: Scaling | None = None,
        levels: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        self._detector = detector
        self._batched_inputs = batched_inputs
        self._compute_features = compute_features
        self._frozen = frozen
        self._outputs = outputs or {}
        self._scaling = scaling or Scaling()
        shape = detector.backbone.output_shape()
        self._levels = dict(levels or {name: name for name in shape})
        self.strides: dict[str, int] = {
            name: shape[own].stride * self._scaling.factor for own, name in self._levels.items()
        }
        self.image_sizes: list[tuple[int, int]] = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        self._shown: dict[str, tuple[int, int]] = {}  # height and width by level, where there is more to it

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """How the detector is run: in its own precision, a teacher without gradient."""
        with_gradient = torch.is_grad_enabled() and not self._frozen
        with torch.set_grad_enabled(with_gradient), autocast(self._detector.device, self._dtype):
            yield

    @cached_property
    def _images_and_features(self) -> tuple[Tensor, dict[str, Tensor]]:
        with self._running():
            return self._compute_features()

    @property
    def images(self) -> Tensor:
        """``Tensor[N, 3, H, W]``: the images as this detector scales, normalises and pads them."""
        return self._images_and_features[0]

    @property
    def features(self) -> dict[str, Tensor]:
        """The backbone's outputs by level, finest first: ``Tensor[N, C, H / stride, W / stride]``."""
        return {name: _crop(self._own_features[own], *self._cells(own)) for own, name in self._levels.items()}

    def _cells(self, own: str) -> tuple[int, int]:
        """Height and width that the view shows of one of the detector's own levels."""
        return self._shown.get(self._levels.get(own)) or self._own_size(own)

    def _own_size(self, own: str) -> tuple[int, int]:
        return tuple(self._own_features[own].shape[-2:])

    @property
    def _own_features(self) -> dict[str, Tensor]:
        return self._images_and_features[1]

    @cached_property
    def ground_truth(self) -> list[Instances]:
        """The annotations of each image, on the detector's device."""
        return [x["instances"].to(self._detector.device) for x in self._batched_inputs]

    @property
    def has_box_head(self) -> bool:
        """Whether the detector classifies boxes that it is given (R-CNN), rather than anchors."""
        return hasattr(getattr(self._detector, "roi_heads", None), "box_pooler")

    @property
    def num_classes(self) -> int:
        """How many classes the detector tells apart, without background."""
        return getattr(self._detector, "roi_heads", self._detector).num_classes

    @property
    def proposals(self) -> list[Instances]:
        """The proposals of each image that the student's box head was trained on in this step: ``proposal_boxes``, and
        ``gt_classes`` with the number of classes for background."""
        own = self._recorded("proposals")
        if self._scaling.scale == 1:
            return own
        boxes = [Boxes(x.proposal_boxes.tensor * self._scaling.factor) for x in own]
        return [
            Instances(size, proposal_boxes=found, gt_classes=x.gt_classes)
            for size, found, x in zip(self.image_sizes, boxes, own)
        ]

    @property
    def proposal_logits(self) -> Tensor:
        """What the student's box head (of a Cascade R-CNN, its first stage) made of :attr:`proposals`, those of all
        images: ``Tensor[R, K + 1]``, the background last."""
        return self._recorded("box_predictor")[0]

    def _recorded(self, name: str) -> Any:
        if self._outputs.get(name) is None:
            raise DistillError(
                f"This view of a {type(self._detector).__name__} has no sampled proposals: a student has them that is "
                "a Faster, Mask or Cascade R-CNN."
            )
        return self._outputs[name]

    @property
    def scores_background(self) -> bool:
        """Whether the last column of the box head's logits, background, was trained: not with USE_SIGMOID_CE."""
        return self.has_box_head and not getattr(self._first_stage("box_predictor"), "use_sigmoid_ce", False)

    def _first_stage(self, name: str) -> nn.Module:
        """A part of the box head; of a Cascade R-CNN, its first stage's, which is the one that sees proposals as they
        come."""
        module = getattr(self._detector.roi_heads, name)
        return module[0] if isinstance(module, (nn.ModuleList, list)) else module

    @property
    def is_dense(self) -> bool:
        """Whether the detector classifies anchors or points (RetinaNet, FCOS)."""
        return hasattr(self._detector, "head_in_features")

    def _dense_output(self, index: int, run: Callable[[nn.Module, list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """What a dense detector's head says of the cells that the view shows, by level: what it was recorded to say in
        this step, or what ``run`` computes."""
        if not self.is_dense:
            raise DistillError(
                f"{type(self._detector).__name__} has no anchors with classes: RetinaNet and FCOS have. Student and "
                "teacher must be of one family to compare them."
            )
        output = self._outputs.get("head")
        if output:
            return self._cropped(output[index])
        with self._running():
            return self._cropped(run(self._detector.head, self._head_features))

    def _cropped(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The cells that the view shows of what the head has of each of its levels."""
        return [_crop(x, *self._cells(own)) for x, own in zip(levels, self._detector.head_in_features, strict=True)]

    @cached_property
    def class_logits(self) -> list[Tensor]:
        """Classification logits of a dense detector by level, in the cells that the view shows: ``Tensor[N, A K, H,
        W]``.

        Raises:
            DistillError: the detector is none.
        """
        return self._dense_output(0, dense_heads.class_logits)

    @cached_property
    def box_deltas(self) -> list[Tensor]:
        """Box deltas of a dense detector by level, in the cells that the view shows: ``Tensor[N, 4 A, H, W]``.

        Raises:
            DistillError: the detector is none.
        """
        return self._dense_output(1, dense_heads.box_deltas)

    def decode(self, deltas: Sequence[Tensor]) -> Tensor:
        """The boxes that deltas mean at the anchors (or points) of a dense detector.

        Args:
            deltas: by level, as :attr:`box_deltas` has them.

        Returns:
            ``Tensor[N, R, 4]``, corners in pixels of the (padded, whole) image, in the order of :attr:`anchor_logits`.
        """
        return dense_heads.decode_boxes(self._detector, deltas) * self._scaling.factor

    def tower_inputs(self, num_convs: int, is_activated: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """What the last convolutions of a dense student's two towers were given in this step, see :meth:`check_towers`.

        Args:
            num_convs: how many of each tower's convolutions are the last; the one that predicts does not count.
            is_activated: False for what the activation before them was given, where there is one.

        Returns:
            By level ``Tensor[N, C, H, W]``, of the tower of classes and of that of boxes, with all of the student's own
            cells. In float32 where the caller computes in it, whatever the student does.

        Raises:
            DistillError: it is False, and the distiller's ``unactivated_towers`` does not name ``num_convs``.
        """
        towers = recorded_inputs(self._outputs["towers"], num_convs, is_activated)
        if autocast_dtype(self._detector.device) == torch.float32:
            towers = tuple([level.float() for level in tower] for tower in towers)
        return towers

    def start_towers(self, num_convs: int) -> tuple[list[Tensor], list[Tensor]]:
        """What the beginning of a dense detector's head makes of its features, see :meth:`check_towers`.

        Args:
            num_convs: how many of each tower's convolutions are left, before the one that predicts.

        Returns:
            As :meth:`tower_inputs`, not activated; the detector's features where all convolutions are left.
        """
        with self._running():
            return dense_heads.start_towers(self._detector.head, self._head_features, num_convs)

    def finish_towers(
        self, classes: Sequence[Tensor], boxes: Sequence[Tensor], num_convs: int, is_activated: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Sends features through the end of a dense detector's head, see :meth:`check_towers`; they get a gradient.

        Args:
            classes: for the tower of classes, by level ``Tensor[N, C, H, W]``.
            boxes: for the tower of boxes.
            num_convs: how many of each tower's convolutions they go through, before the one that predicts.
            is_activated: False if the activation before these convolutions is to come first, where there is one.

        Returns:
            As :attr:`class_logits` and :attr:`box_deltas`, in the cells that the view shows.
        """
        with autocast(self._detector.device, self._dtype):
            logits, deltas = dense_heads.finish_towers(self._detector.head, classes, boxes, num_convs, is_activated)
        return self._cropped(logits), self._cropped(deltas)

    @property
    def head_levels(self) -> list[str]:
        """The levels that a dense detector's head stands on, by the view's names, or its own where it has none."""
        return [self._levels.get(own, own) for own in self._detector.head_in_features]

    def check_towers(self, num_convs: int, channels: int) -> None:
        """Checks that a dense detector's head has two towers that features can be taken from, or sent through.

        Args:
            num_convs: how many convolutions each has at least, before the one that predicts.
            channels: what the last so many of them take.

        Raises:
            DistillError: it is otherwise.
        """
        dense_heads.check_towers(self._detector, num_convs, channels)

    @property
    def num_positive_anchors(self) -> Tensor:
        """``LongTensor[]``: how many anchors (or points) of all images a dense student's own matching found positive in
        this step, padding included."""
        labels = torch.cat([x.flatten() for x in self._outputs["label_anchors"][0]])
        return ((labels >= 0) & (labels < self.num_classes)).sum()

    @property
    def corner_anchors(self) -> Tensor:
        """``Tensor[R, 4]``: the anchors of a dense detector (or its points, as empty boxes) in the first 2 x 2 cells of
        each level that its head stands on, in pixels of the whole image."""
        return dense_heads.corner_anchors(self._detector) * self._scaling.factor

    @property
    def num_anchors(self) -> int:
        """How many anchors (or points) a dense detector has in the cells of an image that the view shows."""
        return sum(x[0].numel() // self.num_classes for x in self.class_logits)

    @property
    def anchor_logits(self) -> Tensor:
        """Classification logits of a dense detector at its anchors (or points) in the cells that the view shows,
        ``Tensor[N, R, K]``.

        Raises:
            DistillError: the detector is none.
        """
        return torch.cat([permute_to_N_HWA_K(x, self.num_classes) for x in self.class_logits], 1)

    def anchor_logits_at(self, rows: Sequence[Tensor]) -> Tensor:
        """Some of :attr:`anchor_logits`; the others are not copied.

        Args:
            rows: for each image a ``LongTensor[P]``.

        Returns:
            ``Tensor[P', K]``, P' counting the rows of all images.

        Raises:
            DistillError: the detector has no anchors with classes.
        """
        return dense_heads.logits_at(self.class_logits, rows, self.num_classes)

    @torch.no_grad()
    def match_anchors(self) -> list[tuple[Tensor, Tensor]]:
        """Which anchors (or points) of a dense detector its own matching assigns to an annotation.

        Returns:
            For each image the positive anchors, ``LongTensor[P]``, rows of :attr:`anchor_logits`, and the annotation of
            each, ``LongTensor[P]``, rows of the image's :attr:`ground_truth`.
        """
        detector = self._detector
        truths = [self._scaling.instances(x) for x in self.ground_truth]
        assigned = self._outputs.get("label_anchors")  # the detector has just done it for its own losses
        if not assigned:
            assigned = detector.label_anchors(detector.anchor_generator(self._head_features), truths)
        is_shown = self._shown_anchors(len(assigned[0][0]))
        new_rows = is_shown.cumsum(0) - 1
        matches = []
        for labels, boxes, truth in zip(*assigned, truths):
            positive = ((labels >= 0) & (labels < detector.num_classes) & is_shown).nonzero()[:, 0]
            matched = boxes[positive]
            matched = matched.tensor if isinstance(matched, Boxes) else matched
            same = (matched[:, None] == truth.gt_boxes.tensor[None]).all(2)
            same &= labels[positive][:, None] == truth.gt_classes
            matches.append((new_rows[positive], same.int().argmax(1) if len(truth) else positive))
        return matches

    def _shown_anchors(self, number: int) -> Tensor:
        """``BoolTensor[R']``: which of all so many anchors lie in the cells that the view shows."""
        levels = self._detector.head_in_features
        per_cell = number // sum(math.prod(self._own_size(own)) for own in levels)
        shown = []
        for own in levels:
            kept = self._cells(own)
            cells = torch.zeros(self._own_size(own), dtype=torch.bool, device=self._detector.device)
            cells[: kept[0], : kept[1]] = True
            shown.append(cells.flatten().repeat_interleave(per_cell))
        return torch.cat(shown)

    @property
    def _head_features(self) -> list[Tensor]:
        return [self._own_features[level] for level in self._detector.head_in_features]

    def box_head(self, boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """The box head's outputs on given boxes. Of a Cascade R-CNN, it is the first stage's.

        Args:
            boxes: boxes of each image, in pixels of the (padded, whole) image.

        Returns:
            Classification logits, ``Tensor[R, K + 1]`` with the background last, and box deltas,
            ``Tensor[R, 4 K]`` (or ``[R, 4]`` where they do not depend on the class), R counting all images' boxes.

        Raises:
            DistillError: the detector has no box head.
        """
        if not self.has_box_head:
            raise DistillError(
                f"{type(self._detector).__name__} has no box head: what needs one works on Faster, Mask and Cascade "
                "R-CNN with FPN."
            )
        heads = self._detector.roi_heads
        with self._running():
            features = [self._own_features[level] for level in heads.box_in_features]
            pooled = heads.box_pooler(features, self._scaling.boxes(boxes))
            return self._first_stage("box_predictor")(self._first_stage("box_head")(pooled))


def align(student: DetectorView, teacher: DetectorView) -> None:
    """Makes two views of one batch show the cells that both have, whatever each side pads to. Both backbones are run.

    Args:
        student: the student's view.
        teacher: the teacher's.
    """
    sides = [{name: view._own_size(own) for own, name in view._levels.items()} for view in (student, teacher)]
    shared = sides[0].keys() & sides[1].keys()
    # sizes, for views that held each other would live, features and all, until Python looks for such cycles
    sizes = {name: (min(x[name][0] for x in sides), min(x[name][1] for x in sides)) for name in shared}
    student._shown = teacher._shown = sizes


def _crop(features: Tensor, height: int, width: int) -> Tensor:
    if features.shape[-2:] == (height, width):
        return features
    return features[..., :height, :width]
