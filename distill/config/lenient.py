"""Values as people write them: a whole number for a float, one value for a list of one."""

import ast
import contextlib
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

# lists of several numbers, each with a meaning of its own
_OF_FIXED_LENGTH = ("SIZE", "BBOX_REG_WEIGHTS", "PIXEL_MEAN", "PIXEL_STD", "EXPONENTS")


def fit(values: dict, defaults: CfgNode) -> CfgNode:
    """Brings values to the types of the keys that they are for, where that loses nothing.

    Args:
        values: what is to be merged.
        defaults: what it is merged into.

    Returns:
        A copy in which a whole number is a float, and a single value a list of one, where the default is such, and
        yaml's ``off`` is the word where the key has one. What is wrong stays wrong, for yacs to say so.
    """
    result = CfgNode()
    for key, value in values.items():
        default = defaults.get(key)
        nested = isinstance(value, dict) and isinstance(default, CfgNode)
        result[key] = fit(value, default) if nested else _fit_value(key, value, default)
    return result


def fit_overrides(opts: Sequence[Any], cfg: CfgNode) -> list[Any]:
    """The same for overrides.

    Args:
        opts: ``[KEY, VALUE, ...]``.
        cfg: what they are merged into.

    Returns:
        A copy.
    """
    result = list(opts)
    for index in range(1, len(result), 2):
        node: Any = cfg
        key = str(result[index - 1])
        for part in key.split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        result[index] = _fit_value(key.rpartition(".")[2], result[index], node)
    return result


def _fit_value(key: str, value: Any, default: Any) -> Any:
    literal = value
    if isinstance(value, str):  # as yacs reads them
        with contextlib.suppress(ValueError, SyntaxError):
            literal = ast.literal_eval(value)
    if key == "CHECK" and isinstance(default, str) and value is False:
        return "off"  # which yaml reads as False
    if isinstance(default, float) and type(literal) is int:
        return float(literal)
    if isinstance(default, list | tuple) and key not in _OF_FIXED_LENGTH and _is_one_of(literal, default):
        return type(default)([literal] if literal != "" else [])
    return value


def _is_one_of(value: Any, default: Sequence[Any]) -> bool:
    """Whether a value can be an element of a list with this default: lists that are empty are of names."""
    if isinstance(value, str) and value.startswith(("[", "(")):
        return False  # a list that cannot be read
    if value == "" or (isinstance(value, str) and not default):
        return True
    kinds = {type(element) for element in default} & {str, int, float}
    return type(value) in kinds or (type(value) is int and float in kinds)
