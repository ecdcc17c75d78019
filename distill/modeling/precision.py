"""What each part of a step computes in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import DistillError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What a training computes in under autocast.

    Args:
        cfg: the full config, of which SOLVER.AMP and MODEL.DEVICE are used.

    Returns:
        The type; None without mixed precision.

    Raises:
        DistillError: SOLVER.AMP.PRECISION is unknown, or is float16 on the CPU.
    """
    node, on_cpu = cfg.SOLVER.AMP, _on_cpu(cfg)
    if node.PRECISION not in ("auto", *_DTYPES) or (node.ENABLED and on_cpu and node.PRECISION == "float16"):
        expected = "'auto' or 'bfloat16' on the CPU" if on_cpu else "'auto', 'float16' or 'bfloat16'"
        raise DistillError(f"SOLVER.AMP.PRECISION is {node.PRECISION!r}: expected {expected}.")
    if not node.ENABLED:
        return None
    return _DTYPES.get(node.PRECISION, torch.bfloat16 if on_cpu else torch.float16)


def distill_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What the teacher and the distillers' own layers compute in.

    Args:
        cfg: the full config, of which DISTILL.PRECISION, SOLVER.AMP and MODEL.DEVICE are used.

    Returns:
        The type; None for what autocast does outside.

    Raises:
        DistillError: DISTILL.PRECISION is unknown, or is float16 on the CPU.
    """
    given, on_cpu = cfg.DISTILL.PRECISION, _on_cpu(cfg)
    if given == "auto":
        return amp_dtype(cfg)
    if given not in ("float32", *_DTYPES) or (on_cpu and given == "float16"):
        expected = "'auto', 'float32' or 'bfloat16'" + (" on the CPU" if on_cpu else ", or 'float16'")
        raise DistillError(f"DISTILL.PRECISION is {given!r}: expected {expected}.")
    return _DTYPES.get(given, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Autocast to a type, whatever holds outside.

    Args:
        device: where it is computed.
        dtype: the type; float32 switches autocast off, None leaves everything as it is.

    Returns:
        The context manager.
    """
    if dtype is None:
        return nullcontext()
    is_half = dtype != torch.float32
    return torch.autocast(device.type, dtype if is_half else None, enabled=is_half)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What autocast computes in right here; float32 where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def _on_cpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cpu"


def keep_coordinates(detector: nn.Module) -> None:
    """Has what a detector computes boxes and losses from leave its networks in float32.

    Detectron2 rounds boxes to the type of the features before it pools them. In float16 that costs half a pixel at
    1000; in bfloat16, which has 8 bits, 4 pixels.

    Args:
        detector: any of Detectron2's; its backbone, RPN head, box predictors and dense head get a forward hook.
    """
    heads = getattr(detector, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    parts = [
        detector.backbone,
        getattr(detector, "head", None),
        getattr(getattr(detector, "proposal_generator", None), "rpn_head", None),
        *(predictor if isinstance(predictor, (nn.ModuleList, list)) else [predictor]),
    ]
    for part in parts:
        if part is not None:
            part.register_forward_hook(lambda module, args, output: _as_float(output), prepend=True)


def keep_statistics(model: nn.Module) -> None:
    """Has Detectron2's synchronised batch norms (``naiveSyncBN``) compute in float32, as they do for float16 alone.

    Their variance is a mean square less the square of a mean; in bfloat16's 8 bits nothing is left of it where the mean
    is a few times larger.

    Args:
        model: whose norms get forward hooks. What they are given in bfloat16 they return in bfloat16.
    """
    for module in model.modules():
        if isinstance(module, NaiveSyncBatchNorm):
            module.register_forward_pre_hook(_with_float)
            module.register_forward_hook(_without_float)


def _with_float(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    is_shared = module.training and comm.get_world_size() > 1  # or it is torch's own batch norm
    module.is_rounded = is_shared and args[0].dtype == torch.bfloat16
    return (args[0].float(),) if module.is_rounded else args


def _without_float(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output.bfloat16() if module.is_rounded else output


def _as_float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):
        return {key: _as_float(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return type(output)(_as_float(value) for value in output)
    return output


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Folds the batch norms behind Detectron2's convolutions into their weights, in place. The model computes what it
    computed in evaluation mode, in a pass over memory less for each; it can be trained no more.

    Args:
        model: any; norms elsewhere stay as they are.
    """
    for conv in [x for x in model.modules() if isinstance(x, Conv2d)]:
        norm = conv.norm
        if not isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)) or norm.running_mean is None:
            continue
        bias = torch.zeros_like(norm.running_mean) if conv.bias is None else conv.bias
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        bias = (bias - norm.running_mean.double()) * factor + (0 if norm.bias is None else norm.bias)
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter((conv.weight * factor.view(-1, 1, 1, 1)).to(dtype), requires_grad=False)
        conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        conv.norm = None
