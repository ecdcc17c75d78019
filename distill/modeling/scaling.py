"""A detector that sees the images smaller than another: how images, annotations and levels correspond."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks
from torch import Tensor

from ..errors import DistillError

DOWNSAMPLINGS = ("bilinear", "nearest")


def check_downsampling(mode: str, key: str) -> None:
    """Checks a way of :func:`downsample`.

    Args:
        mode: its name.
        key: the config key that it comes from, for the message.

    Raises:
        DistillError: there is no such way.
    """
    if mode not in DOWNSAMPLINGS:
        raise DistillError(f"{key} is {mode!r}: expected one of {', '.join(DOWNSAMPLINGS)}.")


def downsample(images: Tensor, factor: int, mode: str = "bilinear") -> Tensor:
    """Makes images smaller by a whole factor.

    Args:
        images: ``Tensor[..., C, H, W]``, of three or four dimensions.
        factor: how many pixels become one, in each direction.
        mode: "nearest" takes the first pixel of each cell; "bilinear" is antialiased, as Detectron2's resize is.

    Returns:
        ``Tensor[..., C, ceil(H / factor), ceil(W / factor)]``. Where a size is no multiple, the last row or column is
        repeated, so that pixel x comes to lie at x / factor in any case.

    Raises:
        DistillError: ``mode`` is unknown.
    """
    check_downsampling(mode, "DOWNSAMPLING")
    if factor == 1:
        return images
    if mode == "nearest":
        return images[..., ::factor, ::factor]
    images = images.float()
    height, width = images.shape[-2:]
    missing = -height % factor, -width % factor
    if any(missing):
        images = F.pad(images, (0, missing[1], 0, missing[0]), mode="replicate")
    batch = images if images.dim() == 4 else images[None]
    size = [side // factor for side in batch.shape[-2:]]
    small = F.interpolate(batch, size, mode="bilinear", antialias=True, align_corners=False)
    return small if images.dim() == 4 else small[0]


def scale_instances(instances: Instances, scale: float, size: tuple[int, int]) -> Instances:
    """Annotations of an image as those of the smaller one.

    Args:
        instances: with boxes, masks or keypoints in pixels, among other fields.
        scale: 2^-k.
        size: height and width of the smaller image.

    Returns:
        The same, in pixels of the smaller image. The given ones are not changed.
    """
    scaled = Instances(size)
    step = round(1 / scale)
    for name, value in instances.get_fields().items():
        if isinstance(value, Boxes):  # rotated ones, too
            value = value.clone()
            value.scale(scale, scale)
        elif isinstance(value, PolygonMasks):
            value = PolygonMasks([[polygon * scale for polygon in polygons] for polygons in value.polygons])
        elif isinstance(value, BitMasks):
            value = BitMasks(value.tensor[:, ::step, ::step])
        elif isinstance(value, Keypoints):
            points = value.tensor.clone()
            points[..., :2] *= scale
            value = Keypoints(points)
        scaled.set(name, value)
    return scaled


@dataclass(frozen=True)
class Scaling:
    """How a detector that sees the images at a scale of 2^-k corresponds to one that sees them whole.

    Shifting its pyramid by k levels lays its cells on the other's: at half size, P2 has the stride of P3 in pixels of
    the whole image. arXiv 2109.04875, section 3.1.

    Args:
        scale: 2^-k for a whole k, 1.0 for none.
        downsampling: see :func:`downsample`.
        named: pairs of a level of the scaled detector and the level of the other that it is compared with, where their
            names do not say so.

    Raises:
        DistillError: the scale is no such number, or the downsampling is unknown.
    """

    scale: float = 1.0
    downsampling: str = "bilinear"
    named: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1 or not math.log2(self.scale).is_integer():
            raise DistillError(
                f"DISTILL.STUDENT.INPUT_SCALE is {self.scale}: expected 1.0, 0.5, 0.25 or another power of 0.5: only "
                "these shift the pyramid by whole levels."
            )
        check_downsampling(self.downsampling, "DISTILL.STUDENT.DOWNSAMPLING")

    @property
    def factor(self) -> int:
        """1 / scale."""
        return round(1 / self.scale)

    def batch(self, batched_inputs: list[dict], device: torch.device | str = "cpu") -> list[dict]:
        """A batch in Detectron2's format as the scaled detector gets it: images, annotations, proposals.

        Args:
            batched_inputs: the batch of whole images; it is not changed.
            device: where the images are scaled.

        Returns:
            The scaled batch, whose "height" and "width" are still those of the original image.
        """
        if self.scale == 1:
            return batched_inputs
        scaled = []
        for record in batched_inputs:
            image = downsample(record["image"].to(device), self.factor, self.downsampling)
            record = {**record, "image": image}
            for key in ("instances", "proposals"):
                if key in record:
                    record[key] = self.instances(record[key])
            if "sem_seg" in record:
                record["sem_seg"] = record["sem_seg"][..., :: self.factor, :: self.factor]
            scaled.append(record)
        return scaled

    def instances(self, instances: Instances) -> Instances:
        """See :func:`scale_instances`."""
        if self.scale == 1:
            return instances
        height, width = instances.image_size
        return scale_instances(instances, self.scale, (-(-height // self.factor), -(-width // self.factor)))

    def boxes(self, boxes: Sequence[Boxes]) -> list[Boxes]:
        """Boxes of whole images in pixels of the scaled ones."""
        return [Boxes(x.tensor * self.scale) for x in boxes]

    def levels(self, own: Mapping[str, ShapeSpec], other: Mapping[str, ShapeSpec]) -> dict[str, str]:
        """Which of the scaled detector's levels lies on which of the other's.

        Args:
            own: the scaled detector's levels.
            other: the levels of the detector that sees whole images.

        Returns:
            The common name by own name: the other's, for levels that have a counterpart. At scale 1 all keep their own
            but for those of ``named``.

        Raises:
            DistillError: no level has a counterpart, or ``named`` names what is not there.
        """
        named = dict(self.named)
        for side, names, shape in (("student", named, own), ("teacher", named.values(), other)):
            lacking = [name for name in names if name not in shape]
            if lacking:
                raise DistillError(
                    f"DISTILL.STUDENT.LEVELS names the level {lacking[0]} of the {side}, which has {', '.join(shape)}."
                )
        if self.scale == 1:
            names = {name: named.get(name, name) for name in own}
            if len(set(names.values())) < len(names):
                raise DistillError(
                    f"DISTILL.STUDENT.LEVELS {[f'{a}={b}' for a, b in self.named]} gives two of the student's levels "
                    f"one name; it has {', '.join(own)}. Name each level of the teacher once."
                )
            return names
        by_stride = {shape.stride: name for name, shape in other.items()}
        names = {
            name: by_stride[shape.stride * self.factor]
            for name, shape in own.items()
            if shape.stride * self.factor in by_stride
        } | named
        if not names:
            strides = [[f"{name}: {shape.stride}" for name, shape in side.items()] for side in (own, other)]
            raise DistillError(
                f"At DISTILL.STUDENT.INPUT_SCALE {self.scale} a level of the student of stride s lies on one of the "
                f"teacher of stride {self.factor} s, and there is none: the student has {', '.join(strides[0])}; the "
                f"teacher {', '.join(strides[1])}. Give the student finer levels."
            )
        return names

    def shape(self, own: Mapping[str, ShapeSpec], other: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
        """The scaled detector's levels as the other's: common names, strides in pixels of the whole image."""
        return {
            name: ShapeSpec(channels=own[key].channels, stride=own[key].stride * self.factor)
            for key, name in self.levels(own, other).items()
        }


def build_scaling(cfg: CfgNode) -> Scaling:
    """The scaling of DISTILL.STUDENT.

    Args:
        cfg: the full config.

    Returns:
        The scaling.

    Raises:
        DistillError: see :class:`Scaling`; or the student is tested on larger images than it is trained on, as when
            INPUT.MIN_SIZE_TEST was left at the teacher's.
    """
    pairs = [pair.split("=") for pair in cfg.DISTILL.STUDENT.LEVELS]
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise DistillError(
            f"DISTILL.STUDENT.LEVELS is {list(cfg.DISTILL.STUDENT.LEVELS)}: expected pairs 'STUDENT=TEACHER' of "
            "levels, such as ['res4=p4']."
        )
    named = tuple((own, theirs) for own, theirs in pairs)
    scaling = Scaling(cfg.DISTILL.STUDENT.INPUT_SCALE, cfg.DISTILL.STUDENT.DOWNSAMPLING, named)
    if scaling.scale < 1:
        trained = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
        for key, size in zip(("MIN_SIZE_TEST", "MAX_SIZE_TEST"), trained):
            largest, own = math.ceil(size * scaling.scale), cfg.INPUT[key]
            if size and (own > largest or own == 0):  # 0: images are not resized
                raise DistillError(
                    f"INPUT.{key} is {own}, but at DISTILL.STUDENT.INPUT_SCALE {scaling.scale} the student is "
                    f"trained on images of {largest} pixels at most there. INPUT.*_TEST is the student's own size: set "
                    f"INPUT.{key} {largest}."
                )
    return scaling
