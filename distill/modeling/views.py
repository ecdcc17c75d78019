"""What a distiller may see of a detector for one batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import DistillError
from .scaling import Scaling


class FeatureTap:
    """Records, by a forward hook, what a module was last given and returned while it trained.

    Args:
        module: any module. It is not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._record: tuple[Any, Any] | None = None
        module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training:  # in evaluation nobody takes the record, so it would only hold memory
            self._record = (args[0], output)

    @property
    def has_record(self) -> bool:
        """Whether the module ran since the last :meth:`take`."""
        return self._record is not None

    def take(self) -> tuple[Any, Any]:
        """Returns the recorded (first argument, output) and forgets it, so that it holds no graph alive."""
        if self._record is None:
            raise DistillError("The student's forward pass did not run its backbone, so there is nothing to distil.")
        record, self._record = self._record, None
        return record

    def forget(self) -> None:
        """Drops a record that nobody took, so that it holds no graph alive."""
        self._record = None


class DetectorView:
    """One detector's intermediate results on one batch. Whatever costs is computed when it is first asked for.

    Each detector pads the images as it does by itself, at the bottom and on the right. So two views of a batch differ
    in how many cells of padding they have; once they are aligned (:func:`align`), each shows the cells that both have.

    Args:
        detector: the student or the teacher.
        batched_inputs: the batch, in Detectron2's format.
        compute_features: returns the padded, normalised images and the features by level.
        frozen: whether the detector is a teacher, all of whose results come without gradient.
        outputs: what modules of the detector returned in this step, by their names ("roi_heads", "box_predictor",
            "head").
        scaling: at which size the detector sees the images. Whatever the view shows is in pixels of the whole images.
        levels: the names that the view has for the detector's levels, see :meth:`Scaling.levels`. By default their own.

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
    ) -> None:
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

    @cached_property
    def _images_and_features(self) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
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
        own = self._recorded("roi_heads")[0]
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
        if name not in self._outputs:
            raise DistillError(
                f"This view of a {type(self._detector).__name__} has no sampled proposals: a student has them that is "
                "a Faster, Mask or Cascade R-CNN."
            )
        return self._outputs[name]

    @property
    def anchor_logits(self) -> Tensor:
        """Classification logits of a dense detector at its anchors (or points) in the cells that the view shows,
        ``Tensor[N, R, K]``.

        Raises:
            DistillError: the detector is none.
        """
        if not hasattr(self._detector, "head_in_features"):
            raise DistillError(
                f"{type(self._detector).__name__} has no anchors with classes: RetinaNet and FCOS have. Student and "
                "teacher must be of one family to compare them."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            output = self._outputs.get("head") or self._detector.head(self._head_features)
            classes = self._detector.num_classes
            shown = [_crop(x, *self._cells(own)) for x, own in zip(output[0], self._detector.head_in_features)]
            return torch.cat([permute_to_N_HWA_K(level, classes) for level in shown], 1)

    @torch.no_grad()
    def match_anchors(self) -> list[tuple[Tensor, Tensor]]:
        """Which anchors (or points) of a dense detector its own matching assigns to an annotation.

        Returns:
            For each image the positive anchors, ``LongTensor[P]``, rows of :attr:`anchor_logits`, and the annotation of
            each, ``LongTensor[P]``, rows of the image's :attr:`ground_truth`.
        """
        detector = self._detector
        anchors = detector.anchor_generator(self._head_features)
        is_shown = self._shown_anchors(anchors)
        new_rows = is_shown.cumsum(0) - 1
        truths = [self._scaling.instances(x) for x in self.ground_truth]
        matches = []
        for labels, boxes, truth in zip(*detector.label_anchors(anchors, truths), truths):
            positive = ((labels >= 0) & (labels < detector.num_classes) & is_shown).nonzero()[:, 0]
            matched = boxes[positive]
            matched = matched.tensor if isinstance(matched, Boxes) else matched
            same = (matched[:, None] == truth.gt_boxes.tensor[None]).all(2)
            same &= labels[positive][:, None] == truth.gt_classes
            matches.append((new_rows[positive], same.int().argmax(1) if len(truth) else positive))
        return matches

    def _shown_anchors(self, anchors: Sequence[Boxes]) -> Tensor:
        """``BoolTensor[R']``: which of all anchors lie in the cells that the view shows."""
        shown = []
        for own, level in zip(self._detector.head_in_features, anchors):
            size, kept = self._own_size(own), self._cells(own)
            cells = torch.zeros(size, dtype=torch.bool, device=self._detector.device)
            cells[: kept[0], : kept[1]] = True
            shown.append(cells.flatten().repeat_interleave(len(level) // cells.numel()))
        return torch.cat(shown)

    @property
    def _head_features(self) -> list[Tensor]:
        return [self._own_features[level] for level in self._detector.head_in_features]

    def box_head(self, boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """The box head's outputs on given boxes. Of a Cascade R-CNN, it is the first stage's, which is the one
        that sees proposals as they come.

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
        box_head, box_predictor = (
            module[0] if isinstance(module, (nn.ModuleList, list)) else module
            for module in (heads.box_head, heads.box_predictor)
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            features = [self._own_features[level] for level in heads.box_in_features]
            pooled = heads.box_pooler(features, self._scaling.boxes(boxes))
            return box_predictor(box_head(pooled))


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
