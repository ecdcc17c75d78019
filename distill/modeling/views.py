"""What a distiller may see of a detector for one batch."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import DistillError
from .precision import autocast
from .scaling import Scaling


class _Tap:
    """What something was last given and returned while its module trained. In evaluation nobody takes the record, so it
    would only hold memory."""

    def __init__(self) -> None:
        self._record: tuple[Any, Any] | None = None

    @property
    def has_record(self) -> bool:
        """Whether it ran since the last :meth:`take`."""
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


class FeatureTap(_Tap):
    """Records, by a forward hook, what a module was last given and returned while it trained.

    Args:
        module: any module. It is not changed.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple, output: Any) -> None:
        if module.training:
            self._record = (args[0], output)


class MethodTap(_Tap):
    """Records what a method of a module was last given and returned while the module trained.

    Args:
        owner: any module. Its method is replaced by one that does the same.
        name: of the method.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._owner, self._method = owner, getattr(owner, name)
        setattr(owner, name, self._call)  # a bound method, so that a copy of the module has a tap of its own

    def _call(self, *args: Any) -> Any:
        output = self._method(*args)
        if self._owner.training:
            self._record = (args[0], output)
        return output


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
            "head", "label_anchors").
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

    @cached_property
    def _anchor_logits(self) -> list[Tensor]:
        """What a dense detector says of the cells that the view shows, ``Tensor[N, A K, H, W]`` by level."""
        if not hasattr(self._detector, "head_in_features"):
            raise DistillError(
                f"{type(self._detector).__name__} has no anchors with classes: RetinaNet and FCOS have. Student and "
                "teacher must be of one family to compare them."
            )
        output = self._outputs.get("head")
        if output:
            logits = output[0]
        else:
            with self._running():
                logits = _class_logits(self._detector.head, self._head_features)
        return [_crop(x, *self._cells(own)) for x, own in zip(logits, self._detector.head_in_features)]

    @property
    def num_anchors(self) -> int:
        """How many anchors (or points) a dense detector has in the cells of an image that the view shows."""
        return sum(x[0].numel() // self.num_classes for x in self._anchor_logits)

    @property
    def anchor_logits(self) -> Tensor:
        """Classification logits of a dense detector at its anchors (or points) in the cells that the view shows,
        ``Tensor[N, R, K]``.

        Raises:
            DistillError: the detector is none.
        """
        return torch.cat([permute_to_N_HWA_K(x, self.num_classes) for x in self._anchor_logits], 1)

    def anchor_logits_at(self, rows: Sequence[Tensor]) -> Tensor:
        """Some of :attr:`anchor_logits`; the others are not copied.

        Args:
            rows: for each image a ``LongTensor[P]``.

        Returns:
            ``Tensor[P', K]``, P' counting the rows of all images.

        Raises:
            DistillError: the detector has no anchors with classes.
        """
        images = torch.cat([torch.full_like(own, index) for index, own in enumerate(rows)])
        wanted = torch.cat(list(rows))
        found, first = None, 0
        for level in self._anchor_logits:
            height, width = level.shape[2:]
            by_anchor = level.unflatten(1, (-1, self.num_classes))
            number = by_anchor.shape[1] * height * width
            inside = (wanted >= first) & (wanted < first + number)
            here = (wanted - first).clamp(0, number - 1)  # what is elsewhere is thrown away: no wait for the GPU
            cell, anchor = here // by_anchor.shape[1], here % by_anchor.shape[1]
            own = by_anchor[images, anchor, :, cell // width, cell % width]
            found = own if found is None else torch.where(inside[:, None], own, found)
            first += number
        return found

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
        with self._running():
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


def _class_logits(head: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """The classification of a dense detector's head alone, where the head is one of Detectron2's own."""
    if type(head) is RetinaNetHead or type(head) is FCOSHead:
        return [head.cls_score(head.cls_subnet(level)) for level in features]
    return head(features)[0]


def _crop(features: Tensor, height: int, width: int) -> Tensor:
    if features.shape[-2:] == (height, width):
        return features
    return features[..., :height, :width]
