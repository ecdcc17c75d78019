"""A GPU that is none: tensors that say they are on cuda, whose values are computed on the CPU.

Unlike torch's fake tensors they have values, so that steps whose sizes depend on them (matching, sampling, nms) run as
they are, and the losses can be compared.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda:0")
COPY = "copy to the device"  # in FakeCuda.waits

# Operators that give a value to the host, or whose result has as many rows as the values say: the host waits for it
_WAITING = {
    "aten::_local_scalar_dense",  # item(), int(), float(), bool()
    "aten::allclose",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "torchvision::nms",  # it keeps what a mask says
}
# Operators that take tensors of both devices
_COPIES = {"aten::copy_", "aten::_to_copy"}
_NUMBERS = {"aten::fill_", "aten::masked_fill", "aten::masked_fill_"}  # beside the pointwise ones
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class CudaTensor(Tensor):
    """Says that it is on cuda, and has its values in a tensor on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "CudaTensor":
        self = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
        )
        self.values = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a CudaTensor outside of fake_cuda()")

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's own refuses a subclass

    def __repr__(self) -> str:
        return f"CudaTensor({self.values})"


def _map(function: Callable, x: Any) -> Any:
    """What operators take and return, with a function of each value. torch's own takes a third of a test's time."""
    if isinstance(x, (tuple, list)):
        return type(x)([_map(function, item) for item in x])
    if isinstance(x, dict):
        return {key: _map(function, value) for key, value in x.items()}
    return function(x)


class FakeCuda(TorchDispatchMode):
    """Runs every operator on the CPU, and gives its result the device that it would have.

    The host waits where it asks for a value (``item()``, ``if mask.any()``, ``tolist()``), for the size of a result
    (``nonzero()``, an index that is a mask, ``unique()``, ``isin()`` of many, nms, ``repeat_interleave()`` without
    ``output_size``; each counts once), for a copy to the host, and for a copy to the device that is not
    ``non_blocking``.

    Attributes:
        waits: how often the host waited for the device, by operator, or :data:`COPY` for copies to the device.

    Raises:
        RuntimeError: an operator was given tensors of both devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        given = {id(x.values): x for x in tensors if isinstance(x, CudaTensor)}
        name = func._schema.name
        if given:
            self._check(func, name, args, tensors)
        device = kwargs.get("device")
        to_cuda = bool(given) if device is None else torch.device(device).type == "cuda"
        if name == "aten::copy_":
            to_cuda = isinstance(args[0], CudaTensor)
        reason = self._wait(name, args, kwargs, bool(given), to_cuda)
        if reason:
            self.waits[reason] += 1

        args, kwargs = _map(lambda x: x.values if isinstance(x, CudaTensor) else x, (args, kwargs))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "aten::_to_copy" and bool(given) != to_cuda:
            kwargs.pop("non_blocking", None)
        with unset_fake_temporarily():
            if name in ("aten::_softmax", "aten::_log_softmax") and args[2]:  # from half to float: not on the CPU
                args = (args[0].float(), args[1], False)
            results = func(*args, **kwargs)

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in given:  # in place
                return given[id(x)]
            return CudaTensor(x) if to_cuda else x

        return _map(wrap, results)

    @staticmethod
    def _check(func: Any, name: str, args: tuple, tensors: list[Tensor]) -> None:
        """Raises where CUDA would. On the CPU may be the source of a copy, indices, and a number (a tensor without
        dimensions) in an operation on each element."""
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place")
        if name in _COPIES:
            return
        takes_numbers = torch.Tag.pointwise in func.tags or name in _NUMBERS
        if name in _INDEXING and isinstance(args[0], CudaTensor):
            takes_numbers = True
            tensors = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
        strays = [x for x in tensors if not isinstance(x, CudaTensor) and (x.dim() or not takes_numbers)]
        if func._schema.is_mutable and not isinstance(args[0], CudaTensor):
            strays.append(args[0])
        if strays:
            shapes = [tuple(x.shape) for x in strays]
            raise RuntimeError(f"{func}: expected all tensors on one device, found cuda, and cpu of shapes {shapes}")

    @staticmethod
    def _wait(name: str, args: tuple, kwargs: dict, from_cuda: bool, to_cuda: bool) -> str | None:
        """What the host waits for, if it does."""
        if name == "aten::copy_":
            from_cuda = isinstance(args[1], CudaTensor)
        if name in _COPIES:
            if from_cuda and not to_cuda:
                return "copy to the host"
            is_blocking = not kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            return COPY if to_cuda and not from_cuda and is_blocking else None
        if not from_cuda:
            return None
        if name in _WAITING:
            return name
        if name in _INDEXING:
            indices = [x for x in args[1] if x is not None]
            if any(not isinstance(x, CudaTensor) for x in indices):
                return COPY
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                # a single number is filled in by the mask itself
                value = args[2] if len(args) > 2 else None
                fills = value is not None and value.numel() == 1 and not isinstance(value, CudaTensor)
                return None if fills else f"{name} by a mask"
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            return name
        if name == "aten::isin" and all(isinstance(x, Tensor) for x in args[:2]):
            # many test elements are sorted, and made unique
            return name if args[1].numel() >= 10 * args[0].numel() ** 0.145 else None
        return None


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, a machine without a GPU has one, as far as forward passes go. Backward passes do not run.

    FakeTensorMode makes no tensor here. It is entered because torch does not initialise CUDA inside of it.
    """
    with ExitStack() as stack:
        # autocast switches itself off where there is no GPU
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its operators have no CPU kernel
        stack.enter_context(torch.jit.optimized_execution(False))  # nor is there a compiler to fuse operators by
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(FakeCuda())


def to_cuda(model: nn.Module) -> nn.Module:
    """Moves a model by its own ``to``, inside of :func:`fake_cuda`."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .data cannot become another class of tensor
    try:
        return model.to(CUDA)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
