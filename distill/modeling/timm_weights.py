"""ImageNet weights of timm's and torchvision's ResNets for Detectron2's own ResNet: ``MODEL.WEIGHTS: timm://NAME``."""

import logging
import os
import re
import tempfile
from collections.abc import Mapping
from typing import IO, Any

import timm
import timm.models
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils.file_io import PathManager
from fvcore.common.file_io import get_cache_dir
from iopath.common.file_io import PathHandler
from torch import Tensor, nn

from ..errors import DistillError

logger = logging.getLogger(__name__)

PREFIX = "timm://"
_COUNTER = ".num_batches_tracked"
# timm's names, which are torchvision's, and Detectron2's
_NAMES = [
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
]


def convert_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights under the names of Detectron2's, without the classifier.

    Args:
        state: by torchvision's names.

    Returns:
        By Detectron2's names.

    Raises:
        DistillError: they are no plain ResNet's.
    """
    converted = {}
    for key, value in state.items():
        if key.startswith("fc.") or key.endswith(_COUNTER):
            continue
        new = key
        for pattern, name in _NAMES:
            new = re.sub(pattern, name, new)
        if not re.fullmatch(r"(stem\.conv1|res\d\.\d+\.(conv\d|shortcut))\.(norm\.)?\w+", new):
            raise DistillError(
                f"{PREFIX} takes ResNets whose weights have torchvision's names, such as resnet18.tv_in1k or "
                f"resnet50.a1_in1k, and not one with {key}."
            )
        converted[new] = value
    return converted


class TimmHandler(PathHandler):
    """Gives Detectron2's checkpointers ``timm://NAME``: timm loads it, and the converted file is cached."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path.removeprefix(PREFIX)
        cached = os.path.join(get_cache_dir(), "timm", f"{name}.pth")
        if os.path.exists(cached) and not force:
            return cached
        try:
            with torch.random.fork_rng(devices=[]):  # a training draws the same numbers with and without the cache
                network = timm.create_model(name, pretrained=True)
        except Exception as error:  # an unknown name, a failed download
            raise DistillError(
                f"MODEL.WEIGHTS is {path!r}: timm cannot load it: {error}. Expected a pretrained ResNet of timm's, "
                f"such as '{PREFIX}resnet18.tv_in1k'; without a network it must be in timm's cache."
            ) from error
        state = convert_resnet(network.state_dict())
        os.makedirs(os.path.dirname(cached), exist_ok=True)
        # several processes may do this at once, also of machines that share the folder
        handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=os.path.dirname(cached))
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"model": state, "__author__": "timm", "matching_heuristics": True}, file)
            os.chmod(temporary, 0o644)
            os.replace(temporary, cached)
        except BaseException:  # half a file would fill what is left of the disk
            os.unlink(temporary)
            raise
        return cached

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO:
        return open(self._get_local_path(path), mode, buffering=buffering)


PathManager.register_handler(TimmHandler())


def check_backbone(model: nn.Module, path: str) -> None:
    """Checks that a ``timm://`` path fills all of a detector's ResNet.

    Args:
        model: the detector.
        path: of the weights; others are not checked.

    Raises:
        DistillError: the backbone is no ResNet under an FPN, another one, or has its strides elsewhere.
    """
    if not path.startswith(PREFIX):
        return
    given = torch.load(PathManager.get_local_path(path), map_location="cpu", weights_only=True)["model"]
    bottom_up = getattr(model.backbone, "bottom_up", nn.Module())
    own = {key: value for key, value in bottom_up.state_dict().items() if not key.endswith(_COUNTER)}
    misfits = [
        f"{key} is {tuple(own[key].shape) if key in own else 'missing'} in the backbone and "
        f"{tuple(given[key].shape) if key in given else 'missing'} in the weights"
        for key in sorted(own.keys() | given.keys())
        if key not in own or key not in given or own[key].shape != given[key].shape
    ]
    if misfits:
        raise DistillError(
            f"MODEL.WEIGHTS is {path!r}, which does not fit the backbone: {'; '.join(misfits[:3])}; {len(misfits)} in "
            "all. Expected Detectron2's ResNet of the same depth under an FPN (MODEL.RESNETS.DEPTH; for 18 and 34, "
            "MODEL.RESNETS.RES2_OUT_CHANNELS 64)."
        )
    blocks = [module for module in bottom_up.modules() if isinstance(module, BottleneckBlock)]
    if any(block.conv1.stride[0] != 1 for block in blocks):
        raise DistillError(
            f"MODEL.WEIGHTS is {path!r}, whose networks have the stride in the 3x3 convolution: set "
            "MODEL.RESNETS.STRIDE_IN_1X1 False. Their images are RGB (INPUT.FORMAT), of PIXEL_MEAN [123.675, 116.28, "
            "103.53] and PIXEL_STD [58.395, 57.12, 57.375]."
        )


def warn_of_other_images(detector: nn.Module, path: str, image_format: str) -> None:
    """Warns where ImageNet weights of timm's would see images of another kind than they learned from.

    Args:
        detector: on a network of timm's, or on Detectron2's ResNet, which is to be filled from ``path``.
        path: MODEL.WEIGHTS, which replaces all others.
        image_format: INPUT.FORMAT.
    """
    if path:
        name = path.removeprefix(PREFIX) if path.startswith(PREFIX) else ""
    else:
        name = getattr(getattr(getattr(detector, "backbone", None), "bottom_up", None), "pretrained", "")
    given = timm.models.get_pretrained_cfg(name) if name else None
    if given is None:
        return
    problems = [] if image_format == "RGB" else [f"INPUT.FORMAT is {image_format}, expected RGB"]
    for key, own, shares in (
        ("MODEL.PIXEL_MEAN", detector.pixel_mean, given.mean),
        ("MODEL.PIXEL_STD", detector.pixel_std, given.std),
    ):
        own, expected = own.flatten().tolist(), [255 * share for share in shares]
        if any(abs(x - y) > 3 for x, y in zip(own, expected)):
            texts = [[round(value, 3) for value in side] for side in (own, expected)]
            problems.append(f"{key} is {texts[0]}, expected {texts[1]}")
    if problems:
        logger.warning(f"The weights of {name} learned from other images than they will see: {'; '.join(problems)}.")
