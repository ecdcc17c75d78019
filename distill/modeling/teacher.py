"""The teacher: frozen, fully loaded, and no part of the model that is trained."""

import contextlib
import logging

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from ..config import resolve_config_file, student_config
from ..errors import DistillError
from ..recipes import Recipe, load_recipe
from .checkpoint import load_detector
from .precision import distill_dtype, fold_norms, keep_coordinates
from .views import DetectorView

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen detector in eval mode. It is no ``nn.Module``, so that it can be in no state dict, no optimizer
    and no DDP bucket.

    Args:
        model: any Detectron2 detector with a ``backbone`` and ``preprocess_image``. It is frozen here.
        flip_channels: whether the batches it is given are RGB where it wants BGR, or the other way round.
        dtype: what it computes in, whatever the training does; what it returns is float32 then. None leaves that to
            autocast outside.
    """

    def __init__(self, model: nn.Module, flip_channels: bool = False, dtype: torch.dtype | None = None) -> None:
        check_detector(model, "teacher")
        self.model = model.eval().requires_grad_(False)
        self.flip_channels = flip_channels
        self.dtype = dtype
        self._is_prepared = False
        self._is_half = dtype in (torch.float16, torch.bfloat16)
        if self._is_half:
            keep_coordinates(model)

    @property
    def output_shape(self) -> dict[str, ShapeSpec]:
        """The backbone's features by level."""
        return self.model.backbone.output_shape()

    def view(self, batched_inputs: list[dict]) -> DetectorView:
        """What a distiller sees of the teacher on a batch: nothing is run until it is asked for.

        Args:
            batched_inputs: the batch that the student gets, in Detectron2's format.

        Returns:
            The view, all of whose tensors come without gradient.
        """
        return DetectorView(
            self.model, batched_inputs, lambda: self._features(batched_inputs), frozen=True, dtype=self.dtype
        )

    def _prepare(self) -> None:
        """Makes the forward pass cheaper, before the first: the student has inherited what it wants by then."""
        self._is_prepared = True
        fold_norms(self.model)
        if self._is_half:
            for layer in self.model.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):  # once, and not in every step
                    for weight in layer.parameters(recurse=False):  # a norm of Detectron2's is inside
                        weight.data = weight.data.to(self.dtype)
        if self._is_channels_last:
            self.model.backbone.to(memory_format=torch.channels_last)

    @property
    def _is_channels_last(self) -> bool:
        """Whether the backbone is faster with channels in the last place: on the CPU, and in half precision."""
        return self._is_half or self.model.device.type == "cpu"

    def _features(self, batched_inputs: list[dict]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.flip_channels:
            batched_inputs = [{**x, "image": x["image"].flip(0)} for x in batched_inputs]
        if not self._is_prepared:
            self._prepare()
        images = self._padded(batched_inputs)
        given = images.contiguous(memory_format=torch.channels_last) if self._is_channels_last else images
        return images, {name: level.contiguous() for name, level in self.model.backbone(given).items()}

    def _padded(self, batched_inputs: list[dict]) -> Tensor:
        """The normalised images, padded as the detector does it; or to a larger square than its own, if one does not
        fit in there: Detectron2 would cut off what sticks out."""
        backbone = self.model.backbone
        square, largest = square_size(backbone), max((max(x["image"].shape[-2:]) for x in batched_inputs), default=0)
        if not square or largest <= square:
            return self.model.preprocess_image(batched_inputs).tensor
        step = max(shape.stride for shape in self.output_shape.values())
        larger = -(-largest // step) * step
        log_first_n(
            logging.WARNING,
            f"The teacher pads images to a square of {square} pixels, and there are larger ones ({largest}): they are "
            "padded to a square as large as they need. It learned "
            f"from smaller ones, so {square} pixels at most suit it best.",
            name=logger.name,
        )
        images = [x["image"].to(self.model.device) for x in batched_inputs]
        images = [(x - self.model.pixel_mean) / self.model.pixel_std for x in images]
        return ImageList.from_tensors(images, padding_constraints={"square_size": larger}).tensor


def check_detector(model: nn.Module, role: str) -> None:
    """Checks that views can be made of a model.

    Args:
        model: the student or the teacher.
        role: which of them, for the message.

    Raises:
        DistillError: it lacks what a view needs.
    """
    lacking = [name for name in ("backbone", "preprocess_image", "device") if not hasattr(model, name)]
    if lacking:
        raise DistillError(
            f"The {role}, a {type(model).__name__}, has no {' and no '.join(lacking)}: expected a detector such as "
            "Detectron2's GeneralizedRCNN, RetinaNet or FCOS."
        )


def square_size(backbone: nn.Module) -> int:
    """The side of the square that a backbone has images padded to.

    Args:
        backbone: a detector's.

    Returns:
        In pixels; 0 for none, as on Detectron2 v0.6, which has no such padding.
    """
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def teacher_recipe(cfg: CfgNode) -> Recipe:
    """The teacher's own recipe, with MODEL.WEIGHTS set to what it is to be loaded from.

    The teacher of a run that was itself distilled is that run's student.

    Args:
        cfg: the full config, of which DISTILL.TEACHER and MODEL.DEVICE are used.

    Returns:
        A recipe without distillation, its config not frozen.

    Raises:
        DistillError: no config or no weights are named, or the config cannot be read.
    """
    node = cfg.DISTILL.TEACHER
    if not node.CONFIG_FILE:
        raise DistillError(
            "DISTILL.TEACHER.CONFIG_FILE is empty. Name the teacher's config (or give --teacher-config): a file, or a "
            "config of Detectron2's model zoo such as 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'."
        )
    recipe = load_recipe(node.CONFIG_FILE, node.OPTS, cfg.DISTILL.IMPORTS)
    if recipe.is_distilled and recipe.cfg.DISTILL.STUDENT.INPUT_SCALE != 1:
        log_first_n(
            logging.WARNING,
            f"The teacher ({node.CONFIG_FILE}) learned from scaled images (DISTILL.STUDENT.INPUT_SCALE "
            f"{recipe.cfg.DISTILL.STUDENT.INPUT_SCALE:g} of its own config), and is given whole ones here.",
            name=logger.name,
        )
    recipe.cfg = own = student_config(recipe.cfg)
    in_opts = {str(opt).partition("=")[0] for opt in node.OPTS} & {"MODEL.WEIGHTS", "train.init_checkpoint"}
    if node.WEIGHTS:
        own.MODEL.WEIGHTS = node.WEIGHTS
    elif not in_opts and resolve_config_file(node.CONFIG_FILE)[1]:
        with contextlib.suppress(RuntimeError):  # a config that the zoo has no weights for
            own.MODEL.WEIGHTS = model_zoo.get_checkpoint_url(node.CONFIG_FILE)
    if not own.MODEL.WEIGHTS:
        raise DistillError(
            f"DISTILL.TEACHER.WEIGHTS is empty, and {node.CONFIG_FILE} names no weights itself. Give the checkpoint of "
            "a trained teacher (or --teacher-weights)."
        )
    own.MODEL.DEVICE = cfg.MODEL.DEVICE
    return recipe


def build_teacher(cfg: CfgNode) -> Teacher:
    """Builds the teacher and loads all of its weights. Of a Python config, only the model is instantiated.

    Args:
        cfg: the full config.

    Returns:
        The teacher, on MODEL.DEVICE.

    Raises:
        DistillError: see :func:`teacher_recipe` and :func:`distill_dtype`; some weight would stay random; or the
            channel orders cannot be reconciled.
    """
    recipe = teacher_recipe(cfg)
    own = recipe.cfg
    model = load_detector(recipe, "teacher")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    logger.info(
        f"Teacher: {own.MODEL.META_ARCHITECTURE}, {parameters:.1f} M parameters, "
        f"from {own.MODEL.WEIGHTS} ({cfg.DISTILL.TEACHER.CONFIG_FILE})"
    )
    formats = cfg.INPUT.FORMAT, own.INPUT.FORMAT
    if formats[0] != formats[1] and set(formats) != {"RGB", "BGR"}:
        raise DistillError(
            f"The student's INPUT.FORMAT is {formats[0]}, the teacher's {formats[1]}: only RGB and BGR can differ."
        )
    return Teacher(model, flip_channels=formats[0] != formats[1], dtype=distill_dtype(cfg))
