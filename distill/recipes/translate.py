"""What of a Python config has a counterpart in Detectron2's yaml keys, and what errors call it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import CLASS_NODES, add_distill_config, family, merge_distill_node
from ..errors import DistillError

# yaml key: key of Detectron2's Python configs
KEYS = {
    "MODEL.DEVICE": "train.device",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.ACCUMULATE": "train.accumulate",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.PRECISION": "train.amp.precision",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "TEST.BEST_METRIC": "train.best_metric",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "VIS_PERIOD": "model.vis_period",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
}
# what else errors name
_NAMES = {
    "DATASETS.REGISTER": "the Python config's register_datasets",
    "DATASETS.CHECK": "the argument check of register_datasets",
    "DATASETS.METRIC": "the argument metric of register_datasets",
    "INPUT.TRUNCATED": "the argument load_truncated of register_datasets",
    "MODEL.META_ARCHITECTURE": "the model",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "MODEL.RETINANET.NUM_CLASSES": "model.num_classes",
    "MODEL.FCOS.NUM_CLASSES": "model.num_classes",
    "MODEL.ANCHOR_GENERATOR.SIZES": "the anchor_generator's sizes",
    "INPUT.MIN_SIZE_TEST": "the short_edge_length in dataloader.test.mapper",
    "INPUT.MAX_SIZE_TEST": "the max_size in dataloader.test.mapper",
    "MODEL.MASK_ON": "model.roi_heads.mask_in_features None and dataloader.train.mapper.use_instance_mask",
    "MODEL.KEYPOINT_ON": "use_keypoint",
    "INPUT.MASK_FORMAT": "dataloader.train.mapper.instance_mask_format",
    "INPUT.FORMAT": "dataloader.train.mapper.image_format",
    "SOLVER.WARMUP_ITERS": "lr_multiplier's warmup_length",
    "SOLVER.CLIP_GRADIENTS": "an optimizer that does",
}


def translate(lazy: DictConfig, origin: str) -> CfgNode:
    """A Python config in yaml keys: DISTILL, and what :data:`KEYS` and a few special cases give.

    Args:
        lazy: the Python config; only its ``model`` is required.
        origin: its file, for the messages.

    Returns:
        The config, not frozen. What has no counterpart is at its default.

    Raises:
        DistillError: an unknown key under ``distill``, or a value of the wrong type.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (0,), 0  # unknown
    for key, name in KEYS.items():
        *path, leaf = key.split(".")
        node = cfg
        for part in path:
            node = node[part]
        node[leaf] = _value(lazy, name, node[leaf], origin)
    for key, name in (("TRAIN", "train"), ("TEST", "test")):
        names = _select(lazy, f"dataloader.{name}.dataset.names", origin)
        if names is not None:
            cfg.DATASETS[key] = (names,) if isinstance(names, str) else tuple(names)
        # the last one decides: others may be inside of what is applied to some images
        *_, resize = None, *_resizes(_select(lazy, f"dataloader.{name}.mapper.augmentations", origin))
        if resize is not None:
            lengths = resize.short_edge_length
            lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
            cfg.INPUT[f"MIN_SIZE_{key}"] = lengths if key == "TRAIN" else max(lengths)
            cfg.INPUT[f"MAX_SIZE_{key}"] = resize.get("max_size") or 0
    cfg.INPUT.FORMAT = image_format(lazy)
    target = lazy.model.get("_target_", "")
    arch = _name(target)
    with contextlib.suppress(Exception):  # of the import: building the model says what is wrong
        target = locate(target) if isinstance(target, str) else target
    kind = family(arch if isinstance(target, str) else target)
    if kind in CLASS_NODES:
        heads = lazy.model.get("roi_heads", lazy.model)
        cfg.MODEL[CLASS_NODES[kind]].NUM_CLASSES = heads.get("num_classes", 80)
        cfg.MODEL.MASK_ON = heads.get("mask_in_features") is not None
        cfg.MODEL.KEYPOINT_ON = heads.get("keypoint_in_features") is not None
    mask_format = _select(lazy, "dataloader.train.mapper.instance_mask_format", origin)
    cfg.INPUT.MASK_FORMAT = mask_format or cfg.INPUT.MASK_FORMAT
    if not isinstance(lazy.get("distill", {}), Mapping):
        raise DistillError(f"distill is {lazy.distill!r} in {origin}: expected a dict with the keys of DISTILL.")
    if "distill" in lazy:
        merge_distill_node(cfg, OmegaConf.to_container(lazy.distill, resolve=True), origin)
    cfg.DISTILL.STUDENT.META_ARCHITECTURE = arch
    is_distilled = cfg.DISTILL.DISTILLERS or cfg.DISTILL.STUDENT.INHERIT
    cfg.MODEL.META_ARCHITECTURE = "DistillationModel" if is_distilled else arch
    return cfg


def _value(lazy: DictConfig, name: str, default: Any, origin: str) -> Any:
    """A value of a Python config, of the type of the yaml key's default."""
    kind = type(default)
    value = _select(lazy, name, origin)
    try:
        converted = default if value is None else kind(value)
        if value is None or (converted == value and isinstance(value, bool) == isinstance(default, bool)):
            return converted
    except (ValueError, TypeError):
        pass
    raise DistillError(f"{name} is {value!r} in {origin}: expected a value of type {kind.__name__}.")


def _select(lazy: DictConfig, name: str, origin: str) -> Any:
    try:
        return OmegaConf.select(lazy, name)
    except OmegaConfBaseException as error:  # an interpolation of nothing
        raise DistillError(f"{name} of {origin} cannot be resolved: {str(error).splitlines()[0]}.") from error


def image_format(lazy: DictConfig) -> str:
    """The order of channels that a Python config's model takes: the data loader's, else the model's own.

    Args:
        lazy: the Python config.

    Returns:
        "BGR" or "RGB", or whatever else it says.
    """
    names = ("dataloader.train.mapper.image_format", "dataloader.test.mapper.image_format", "model.input_format")
    for name in names:
        # a test mapper may refer to that of training, where another one stands
        with contextlib.suppress(OmegaConfBaseException):
            if found := OmegaConf.select(lazy, name, throw_on_missing=False):
                return found
    return "BGR"


def explain(error: DistillError, config_file: str) -> str:
    """The message of an error with the keys of the config that it is about.

    Args:
        error: what was raised.
        config_file: the config of the command.

    Returns:
        The message for the user.
    """
    message = str(error).rsplit("DistillError: ", 1)[-1].strip()  # a data loader's worker wraps it in its traceback
    is_lazy = config_file.endswith(".py") if error.is_lazy is None else error.is_lazy
    return translate_message(message) if is_lazy else message


def translate_message(message: str) -> str:
    """An error message with the keys of a Python config in place of the yaml keys.

    Args:
        message: the message.

    Returns:
        The same for the user of a Python config.
    """
    for key, name in sorted((KEYS | _NAMES).items(), key=lambda pair: -len(pair[0])):
        message = re.sub(rf"(?<![\w.'\"]){re.escape(key)}(?!\w)", name, message)
    return message.replace("DISTILL.", "distill.")


def _resizes(node: Any) -> Iterator[DictConfig]:
    """The resizes to a shortest edge among augmentations, also inside others."""
    if isinstance(node, DictConfig):
        if "short_edge_length" in node:
            yield node
        for value in node.values():
            yield from _resizes(value)
    elif isinstance(node, ListConfig):
        for value in node:
            yield from _resizes(value)


def _name(target: Any) -> str:
    return target.rpartition(".")[2] if isinstance(target, str) else target.__name__
