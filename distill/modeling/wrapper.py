"""Modules that wrap another one and do not show it: in their attributes, and in the names of their state dict."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn


class Wrapper(nn.Module):
    """A module whose attributes, where it has none of its own, are those of the module that it wraps."""

    wrapped: ClassVar[str]  # the name of that module in this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.wrapped:
                raise
            return getattr(getattr(self, self.wrapped), name)


def rename_state(module: nn.Module, prefixes: Sequence[tuple[str, str]]) -> None:
    """Gives the weights of a module other names in its state dict, for saving and for loading.

    Args:
        module: a wrapper.
        prefixes: (inside, outside): how names begin in the module and in the state dict. The first pair that fits
            counts, so put ("student.", "") behind others. A name that begins with an inside prefix is taken as it is
            when a state dict is loaded.
    """

    def outside(name: str) -> str:
        return next((new + name[len(old) :] for old, new in prefixes if name.startswith(old)), name)

    def inside(name: str) -> str:
        if name.startswith(tuple(old for old, _ in prefixes)):
            return name
        return next((old + name[len(new) :] for old, new in prefixes if name.startswith(new)), name)

    def save(module: nn.Module, state: OrderedDict, prefix: str, local_metadata: dict) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + outside(key[len(prefix) :])] = state.pop(key)
        versions = state._metadata
        for name in [name for name in versions if f"{name}.".startswith(prefix)]:
            versions[(prefix + outside(f"{name}."[len(prefix) :])).rstrip(".")] = versions.pop(name)

    def load(module: nn.Module, state: dict, prefix: str, local_metadata: dict, *reports: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + inside(key[len(prefix) :])] = state.pop(key)
        # the caller's state dict shares this mapping, so its entries stay
        versions = getattr(state, "_metadata", None) or {}
        for name in [name for name in versions if f"{name}.".startswith(prefix)]:
            versions[(prefix + inside(f"{name}."[len(prefix) :])).rstrip(".")] = versions[name]

    def report(module: nn.Module, incompatible: Any) -> None:
        for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
            keys[:] = [outside(key) for key in keys]

    module.register_state_dict_post_hook(save)
    module.register_load_state_dict_pre_hook(load)
    module.register_load_state_dict_post_hook(report)
