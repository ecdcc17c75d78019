"""What modules are given and return while a detector trains, recorded for the distillers."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import DistillError
from .dense_heads import tower_activations, tower_convs


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
        module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if module.training:
            self._record = (_first(args, kwargs), output)


# What the layers of a dense detector's two towers were given, by level. The keys: how many convolutions follow, before
# the predicting one, and whether the features are activated.
TowerRecord = tuple[dict[tuple[int, bool], list[Tensor]], dict[tuple[int, bool], list[Tensor]]]


def recorded_inputs(towers: TowerRecord, num_convs: int, is_activated: bool) -> tuple[list[Tensor], list[Tensor]]:
    """See :meth:`DetectorView.tower_inputs`."""
    key = num_convs, is_activated
    if (num_convs + 1, True) not in towers[0]:  # no convolution precedes, so there is no activation
        key = num_convs, True
    elif key not in towers[0]:
        raise DistillError(
            f"The towers' features before the activation that {num_convs} convolutions follow were not recorded: the "
            f"distiller's unactivated_towers has to name {num_convs}."
        )
    return tuple(tower[key] for tower in towers)


class TowerTap(_Tap):
    """Records what each convolution of a dense detector's two towers was given while it trained, as a
    ``TowerRecord``.

    Args:
        head: with towers, see :func:`distill.modeling.dense_heads.has_towers`. It is not changed.
        unactivated: before how many convolutions it also records what the activation was given, which nobody else keeps
            in memory.
    """

    def __init__(self, head: nn.Module, unactivated: Collection[int] = ()) -> None:
        super().__init__()
        head.register_forward_pre_hook(self._begin)
        for tower, convs in enumerate(tower_convs(head)):
            for left, conv in enumerate(reversed(convs)):
                conv.register_forward_hook(partial(self._hook, tower, (left, True)))
        for left in unactivated:
            for tower, activation in enumerate(tower_activations(head, left)):
                activation.register_forward_hook(partial(self._hook, tower, (left, False)))

    def _begin(self, head: nn.Module, args: tuple) -> None:
        if head.training:
            self._record = args[0], ({}, {})

    def _hook(self, tower: int, key: tuple[int, bool], module: nn.Module, args: tuple, output: Any) -> None:
        if module.training and self._record is not None:  # a tower may run by itself
            self._record[1][tower].setdefault(key, []).append(args[0])


class MethodTap(_Tap):
    """Records what a method of a module was last given and returned while the module trained.

    Args:
        owner: any module. Its method is replaced by one that does the same.
        name: of the method.
        keep: makes what is recorded of what the method returned; by default all of it.
    """

    def __init__(self, owner: nn.Module, name: str, keep: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._owner, self._method, self._keep = owner, getattr(owner, name), keep
        setattr(owner, name, self._call)  # a bound method, so that a copy of the module has a tap of its own

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        output = self._method(*args, **kwargs)
        if self._owner.training:
            self._record = (_first(args, kwargs), self._keep(output) if self._keep else output)
        return output


def _first(args: tuple, kwargs: dict) -> Any:
    return next(iter((*args, *kwargs.values())), None)
