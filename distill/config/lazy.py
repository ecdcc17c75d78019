"""How Python configs (Detectron2's LazyConfig) are read and written."""

from __future__ import annotations

import ast
import copy
import functools
import logging
import os
import re
import traceback
from collections.abc import Sequence

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from ..errors import DistillError
from .loading import resolve_config_file

logger = logging.getLogger(__name__)

_RECORD = '"""What this run was started from, written by train_net.py. Give it as --config-file to start it again."""\n'


def load_lazy_config(name: str, opts: Sequence[str] = ()) -> DictConfig:
    """Executes a Python config, and those that it imports, and applies overrides.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo. It is a program: whoever names it
            trusts it.
        opts: overrides, ``key=value`` in Hydra's grammar, such as ``model.roi_heads.num_classes=3``.

    Returns:
        The config, which has a ``model``; nothing is instantiated.

    Raises:
        DistillError: no such file, it cannot be executed, it describes no model, or an override cannot be applied.
    """
    path = resolve_config_file(name)[0]
    cfg = copy.deepcopy(_execute(os.path.abspath(path), os.stat(path).st_mtime_ns))
    for opt in opts:
        try:
            LazyConfig.apply_overrides(cfg, [opt])
        except Exception as error:  # of Hydra's parser and of OmegaConf
            reason = str(error).strip().split("\n")[0]
            raise DistillError(
                f"Cannot apply the override {opt!r} to {path}: {reason}. A Python config takes key=value, such as "
                "'model.roi_heads.num_classes=3' or 'train.max_iter=1000'."
            ) from error
    if not isinstance(cfg.get("model"), DictConfig):
        raise DistillError(f"The Python config {path} has no model: expected Detectron2's LazyConfig of a detector.")
    return cfg


@functools.cache
def _execute(path: str, changed: int) -> DictConfig:
    """Once a process: a second time, a program that registers its datasets would find them registered."""
    logger.info(f"Executing the Python config {path}")
    try:
        return LazyConfig.load(path)
    except Exception as error:  # whatever the program raises
        places = [f"{x.filename}, line {x.lineno}" for x in traceback.extract_tb(error.__traceback__)]
        hint = ""
        if "already registered" in str(error):
            hint = (
                " Files that several configs import are executed for each: register datasets by "
                "distill.data.register_datasets, or only where DatasetCatalog lacks them."
            )
        raise DistillError(
            f"The Python config {path} cannot be executed: {type(error).__name__}: {error} (at {places[-1]}).{hint}"
        ) from error


def override(key: str, value: str | Sequence[str]) -> str:
    """An override of a Python config, quoted as Hydra's grammar asks for.

    Args:
        key: dotted name.
        value: text, or several.

    Returns:
        ``key=value``.
    """
    return f"{key}={_quote(value) if isinstance(value, str) else '[' + ','.join(map(_quote, value)) + ']'}"


def _quote(text: str) -> str:
    text = re.sub(r"(\\+)('|$)", lambda found: 2 * found[1] + found[2], text)  # elsewhere a backslash is itself
    return "'" + text.replace("'", "\\'") + "'"


def is_of_distillation(opt: str) -> bool:
    """Whether an override is one of ``distill``, in any of Hydra's spellings."""
    return re.match(r"[+~]*distill([.=]|$)", opt) is not None


def write_record(path: str, name: str, opts: Sequence[str], plain: bool = False) -> None:
    """Writes a Python config that is another one with overrides.

    Args:
        path: the file to write.
        name: the other config: a path, or a name in the model zoo. If it is such a record itself, its origin is
            recorded instead.
        opts: overrides of it.
        plain: whether to leave its ``distill`` out.
    """
    source, from_zoo = resolve_config_file(name)
    with open(source) as f:
        text = f.read()
        if text.startswith(_RECORD):
            had_none = ".pop('distill'" in text
            source, earlier = read_record(text)
            earlier = [opt for opt in earlier if not (plain and is_of_distillation(opt))]
            opts, from_zoo, plain = [*earlier, *opts], False, plain or had_none
    location = f"model_zoo.get_config_file({name!r})" if from_zoo else repr(os.path.abspath(source))
    lines = "".join(f"    {opt!r},\n" for opt in opts)
    with open(f"{path}.tmp", "w") as f:  # then renamed: another process may be reading the file
        f.write(
            f"{_RECORD}\n{'from detectron2 import model_zoo' if from_zoo else ''}\n"
            f"from detectron2.config import LazyConfig\n\n_file = {location}\n_overrides = [\n{lines}]\n"
            "_config = LazyConfig.load(_file)\n"
            + ("_config.pop('distill', None)\n" if plain else "")
            + "globals().update(LazyConfig.apply_overrides(_config, _overrides))\n"
        )
    os.replace(f"{path}.tmp", path)


def read_record(text: str) -> tuple[str, list[str]]:
    """What a record (see :func:`write_record`) was started from. It is not executed: the program of the file would be,
    too.

    Args:
        text: of the record.

    Returns:
        The path of the Python config, and the overrides.
    """
    values = {x.targets[0].id: x.value for x in ast.parse(text).body if isinstance(x, ast.Assign)}
    file = values["_file"]
    name = ast.literal_eval(file.args[0] if isinstance(file, ast.Call) else file)
    return resolve_config_file(name)[0], ast.literal_eval(values["_overrides"])


def check_record(path: str) -> None:
    """
    Args:
        path: where :func:`write_record` is to write.

    Raises:
        DistillError: there is a file which it has not written.
    """
    if os.path.isfile(path) and not is_record(path):
        raise DistillError(
            f"{path!r} is not of an earlier run, and this one would write its own config there: give another "
            "train.output_dir, or rename that file."
        )


def is_record(path: str | os.PathLike) -> bool:
    """Whether a ``config.py`` is one that train_net.py wrote.

    Args:
        path: an existing file.

    Returns:
        Whether it begins as those do.
    """
    with open(path, errors="replace") as f:
        return f.read(len(_RECORD)) == _RECORD


def forget_record(folder: str) -> None:
    """Renames the record of an earlier run to ``previous_config.py``.

    Args:
        folder: OUTPUT_DIR. A ``config.py`` there that is no record stays.
    """
    path = os.path.join(folder, "config.py")
    if os.path.isfile(path) and is_record(path):
        os.replace(path, os.path.join(folder, "previous_config.py"))
