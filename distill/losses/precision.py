"""Keeps loss formulas in float32 inside mixed-precision training."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def in_float32(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a loss function: autocast is off inside, half-precision tensors in its arguments become float32.

    float64 stays float64, so that a formula can be checked in it.

    Args:
        loss: a function of tensors, or of lists or dicts of them.

    Returns:
        The same function, in float32.
    """

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(loss)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        device_type = tensors[0].device.type if tensors else "cpu"
        with torch.autocast(device_type, enabled=False):
            args, kwargs = tree_map(widen, (args, kwargs))
            return loss(*args, **kwargs)

    return wrapper
