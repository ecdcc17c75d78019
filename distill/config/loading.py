"""How config files are read, and what configs are made of them."""

import contextlib
import difflib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import guess_version
from detectron2.modeling import META_ARCH_REGISTRY

from ..errors import DistillError
from .defaults import add_distill_config
from .lenient import fit, fit_overrides

# the node of MODEL that has NUM_CLASSES, by meta-architecture
CLASS_NODES = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}

# what yacs and fvcore raise for a file or an override that they cannot merge
_MERGE_ERRORS = (KeyError, ValueError, AssertionError, TypeError, AttributeError, OSError)


def family(arch: str | type) -> str:
    """Which of Detectron2's detectors a meta-architecture is, or is derived from.

    Args:
        arch: a name of META_ARCH_REGISTRY's, or a class.

    Returns:
        A key of :data:`CLASS_NODES`; for a detector of another kind its own name.
    """
    name = arch if isinstance(arch, str) else arch.__name__
    if isinstance(arch, str) and arch not in CLASS_NODES and arch in META_ARCH_REGISTRY:
        arch = META_ARCH_REGISTRY.get(arch)
    parents = [parent.__name__ for parent in getattr(arch, "__mro__", ())]
    return next((parent for parent in parents if parent in CLASS_NODES), name)


def resolve_config_file(name: str) -> tuple[str, bool]:
    """Finds a config file.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo.

    Returns:
        Its path, and whether it is the model zoo's.

    Raises:
        DistillError: there is no such file or name.
    """
    if os.path.isfile(name):
        return name, False
    try:
        return model_zoo.get_config_file(name), True
    except RuntimeError:
        raise DistillError(
            f"Config {name!r} is neither a file nor a config of Detectron2's model zoo. Give a path (from the "
            "current folder) or a name such as 'COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml'."
        ) from None


def load_config(name: str, opts: Sequence[str] = (), imports: Sequence[str] = ()) -> CfgNode:
    """Reads a config, with the keys of this package and of the modules in DISTILL.IMPORTS, and safe YAML only.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo. Only the zoo's own files, read
            from inside its package, may contain ``!!python`` tags.
        opts: overrides, ``[KEY, VALUE, ...]``.
        imports: modules that may have keys of their own, besides DISTILL.IMPORTS.

    Returns:
        The config, not frozen.

    Raises:
        DistillError: no such file, not safe YAML, an unknown key (the nearest known one is named), a value of the
            wrong type, or a module that cannot be imported.
    """
    path, from_zoo = resolve_config_file(name)
    cfg = get_cfg()
    add_distill_config(cfg)
    try:
        loaded = cfg.load_yaml_with_base(path, allow_unsafe=from_zoo)
    except yaml.constructor.ConstructorError as error:
        raise DistillError(
            f"Config {path} is not safe YAML: {error.problem}{error.problem_mark or ''}. Python tags can run any "
            f"code and are refused: {_beside(path)}."
        ) from None
    except yaml.YAMLError as error:
        raise DistillError(f"Config {path} is not valid YAML: {error}") from None
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, f"config {path}") from None
    for module in import_modules(dict.fromkeys([*imports, *_named_imports(loaded, opts, path)])):
        if hasattr(module, "add_config"):
            module.add_config(cfg)
    try:
        if (loaded["VERSION"] if "VERSION" in loaded else guess_version(loaded, path)) == cfg.VERSION:
            cfg.merge_from_other_cfg(fit(loaded, cfg))
        else:
            cfg.merge_from_file(path, allow_unsafe=from_zoo)  # which upgrades it
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, f"config {path}") from None
    for label, settings in cfg.DISTILL.VARIANTS.items():  # their keys have the types of the distillers' own
        if isinstance(settings, CfgNode):
            cfg.DISTILL.VARIANTS[label] = fit(settings, cfg.DISTILL)
    try:
        cfg.merge_from_list(fit_overrides(opts, cfg))
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, "the overrides (KEY VALUE ...)") from None
    return cfg


def _beside(path: str) -> str:
    with open(path) as f:
        if "_target_: " in f.read():
            return "this is the text of a Python config: give the .py that it was written from, or config.py beside it"
    return "write the value out (of Detectron2's Base-RetinaNet.yaml, the SIZES in configs/Base-RetinaNet.yaml)"


def merge_distill_node(cfg: CfgNode, node: Mapping[str, Any], origin: str) -> None:
    """Merges the ``distill`` node of a Python config into DISTILL, in place, with the keys of DISTILL.IMPORTS.

    Args:
        cfg: a config with the keys of this package.
        node: plain dicts, lists and values.
        origin: the config's file, for the messages.

    Raises:
        DistillError: an unknown key (the nearest known one is named), or a value of the wrong type.
    """
    content = {"DISTILL": node}
    for module in import_modules(_named_imports(content, (), origin)):
        if hasattr(module, "add_config"):
            module.add_config(cfg)
    try:
        cfg.merge_from_other_cfg(fit(content, cfg))
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, f"config {origin}") from None


def import_modules(names: Collection[str]) -> list[ModuleType]:
    """Imports the modules of DISTILL.IMPORTS.

    Args:
        names: dotted names, found where Python finds modules, and from the current folder.

    Returns:
        The modules.

    Raises:
        DistillError: there is no such module, it lacks one itself, or a name is no text.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script in another folder, such as tools/, does not have it
    modules = []
    for name in names:
        if not isinstance(name, str):
            raise DistillError(f"DISTILL.IMPORTS holds {name!r}: expected dotted names of modules.")
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:  # another error is one of its program, and keeps its traceback
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not f"{name}.".startswith(f"{missing}."):  # it is there, and lacks something
                frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith("<frozen")]
                raise DistillError(
                    f"Importing {name!r}, which DISTILL.IMPORTS names, raised {type(error).__name__}: {error} "
                    f"({frames[-1].filename}, line {frames[-1].lineno})."
                ) from error
            raise DistillError(
                f"DISTILL.IMPORTS names the module {name!r}, which cannot be imported: {error}. Give a dotted name, "
                "such as 'projects.AttentionTransfer.attention_transfer', from the current folder or from a folder on "
                "PYTHONPATH."
            ) from error
    return modules


def variant_config(cfg: CfgNode, variant: str) -> CfgNode:
    """The config that a variant of a distiller is built from.

    Args:
        cfg: the full config.
        variant: a key of DISTILL.VARIANTS, whose keys replace those of DISTILL.

    Returns:
        A copy, not frozen.

    Raises:
        DistillError: there is no such variant, or it sets what is not a distiller's.
    """
    if variant not in cfg.DISTILL.VARIANTS:
        known = ", ".join(cfg.DISTILL.VARIANTS) or "none"
        raise DistillError(
            f"DISTILL.DISTILLERS names the variant {variant!r}, but DISTILL.VARIANTS has: {known}. Add its settings, "
            f"such as VARIANTS: {{{variant}: {{IMITATION: {{LOSS_WEIGHT: 2.0}}}}}}."
        )
    for key, value in cfg.DISTILL.VARIANTS[variant].items():
        if not isinstance(value, CfgNode) or key in ("STUDENT", "TEACHER", "VARIANTS"):
            raise DistillError(
                f"DISTILL.VARIANTS.{variant} sets {key}, which is not a distiller's own. Expected nodes of distillers, "
                f"such as {variant}: {{IMITATION: {{LOSS_WEIGHT: 2.0}}}}."
            )
    cfg = cfg.clone()
    cfg.defrost()
    try:
        cfg.DISTILL.merge_from_other_cfg(fit(cfg.DISTILL.VARIANTS[variant], cfg.DISTILL))
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg.DISTILL, f"DISTILL.VARIANTS.{variant}") from None
    return cfg


def student_config(cfg: CfgNode) -> CfgNode:
    """The config of the student alone.

    Args:
        cfg: a full config; one without distillation is the student's already.

    Returns:
        A copy, not frozen, in which MODEL.META_ARCHITECTURE is the student's own.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel":
        cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT.META_ARCHITECTURE
    return cfg


def detector_config(cfg: CfgNode) -> CfgNode:
    """The config of the detector that a config comes down to.

    Args:
        cfg: a full config.

    Returns:
        A copy, not frozen, in which MODEL.META_ARCHITECTURE is Detectron2's: the student's, or the one that an
        AlignedTeacher is made of.
    """
    cfg = student_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "AlignedTeacher":
        cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.ALIGNED_TEACHER.META_ARCHITECTURE
    return cfg


def slim_config(cfg: CfgNode) -> CfgNode:
    """The config of a slimmable ResNet with an FPN in Detectron2's own keys.

    Args:
        cfg: a detector's config, with MODEL.RESNETS.WIDTH_MULT.

    Returns:
        A copy, not frozen, in which the widths are multiplied and the backbone is Detectron2's.

    Raises:
        DistillError: the factor is not one of 0.25, 0.5, 0.75 and 1.0, or the ResNet has basic blocks, whose widths
            Detectron2 fixes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    node = cfg.MODEL.RESNETS
    if node.WIDTH_MULT not in (0.25, 0.5, 0.75, 1.0):
        raise DistillError(f"MODEL.RESNETS.WIDTH_MULT is {node.WIDTH_MULT}: expected 0.25, 0.5, 0.75 or 1.0.")
    if node.DEPTH < 50:
        raise DistillError(
            f"MODEL.RESNETS.DEPTH is {node.DEPTH}: a slimmable ResNet has 50, 101 or 152 layers. Detectron2 fixes the "
            "widths of smaller ones."
        )
    for key in ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"):
        node[key] = int(node[key] * node.WIDTH_MULT)
    node.WIDTH_MULT = 1.0
    dense = family(cfg.MODEL.META_ARCHITECTURE) in ("RetinaNet", "FCOS")
    cfg.MODEL.BACKBONE.NAME = f"build_{'retinanet_' if dense else ''}resnet_fpn_backbone"
    return cfg


def drop_backbone_weights(cfg: CfgNode) -> None:
    """Has a backbone of timm built with random weights, in place: others are loaded over them.

    Args:
        cfg: a detector's config, not frozen.
    """
    if "TIMM" in cfg.MODEL:
        cfg.MODEL.TIMM.WEIGHTS = ""


def plain_config(cfg: CfgNode) -> CfgNode:
    """The student's config as plain Detectron2 reads it.

    The keys of this package are dropped, but for those that the student itself is built from: MODEL.FCOS for an
    FCOS student, MODEL.TIMM for a backbone of timm. To read such a config, call
    ``add_distill_config`` first. A slimmable ResNet becomes a plain one of the same widths. The sizes of training
    images become those that the student saw.

    Args:
        cfg: a full config.

    Returns:
        A copy, not frozen.

    Raises:
        DistillError: it is an AlignedTeacher's, or see :func:`slim_config`.
    """
    scale = cfg.DISTILL.STUDENT.INPUT_SCALE if cfg.MODEL.META_ARCHITECTURE == "DistillationModel" else 1.0
    cfg = student_config(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "AlignedTeacher":
        raise DistillError("An AlignedTeacher is no plain Detectron2 detector: export a student that it taught.")
    cfg.INPUT.MIN_SIZE_TRAIN = tuple(math.ceil(size * scale) for size in cfg.INPUT.MIN_SIZE_TRAIN)
    cfg.INPUT.MAX_SIZE_TRAIN = math.ceil(cfg.INPUT.MAX_SIZE_TRAIN * scale)
    if cfg.INPUT.CROP.TYPE.startswith("absolute"):
        cfg.INPUT.CROP.SIZE = [math.ceil(size * scale) for size in cfg.INPUT.CROP.SIZE]
    if cfg.MODEL.BACKBONE.NAME == "build_slimmable_resnet_fpn_backbone":
        cfg = slim_config(cfg)
    del cfg.MODEL.RESNETS["WIDTH_MULT"]
    del cfg["DISTILL"], cfg.SOLVER["OPTIMIZER"], cfg.SOLVER["ACCUMULATE"], cfg.INPUT["TRUNCATED"]
    del cfg.DATASETS["REGISTER"], cfg.DATASETS["CHECK"], cfg.DATASETS["METRIC"]
    del cfg.MODEL["ALIGNED_TEACHER"], cfg.SOLVER.AMP["PRECISION"], cfg.TEST["SCALES"], cfg.TEST["BEST_METRIC"]
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        del cfg.MODEL["FCOS"]
    if cfg.MODEL.BACKBONE.NAME != "build_timm_fpn_backbone":
        del cfg.MODEL["TIMM"]
    return cfg


def num_classes(cfg: CfgNode) -> int:
    """How many classes the student tells apart.

    Args:
        cfg: the full config, or the student's.

    Returns:
        The number, without background.

    Raises:
        DistillError: the detector is of a family that keeps it elsewhere.
    """
    arch = family(detector_config(cfg).MODEL.META_ARCHITECTURE)
    if arch not in CLASS_NODES:
        raise DistillError(f"The number of classes of a {arch} is not known: expected one of {', '.join(CLASS_NODES)}.")
    return cfg.MODEL[CLASS_NODES[arch]].NUM_CLASSES


def _named_imports(loaded: Any, opts: Sequence[str], path: str) -> list[str]:
    """DISTILL.IMPORTS as it will be once the file and the overrides are merged."""
    node = loaded.get("DISTILL") if isinstance(loaded, dict) else None
    node = node if isinstance(node, dict) else {}
    for label in node.get("VARIANTS") or {}:
        if not isinstance(label, str):
            raise DistillError(f"Config {path}: DISTILL.VARIANTS has the label {label!r}, expected text: quote it.")
    names = node.get("IMPORTS", [])
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "DISTILL.IMPORTS":
            names = value
            with contextlib.suppress(yaml.YAMLError):
                names = yaml.safe_load(value) if isinstance(value, str) else value
    if isinstance(names, str) and all(part.isidentifier() for part in names.split(".")):
        names = [names]
    if not isinstance(names, (list, tuple)):
        raise DistillError(f"DISTILL.IMPORTS is {names!r}: expected a list of modules, such as ['my_distiller'].")
    return list(names)


def _all_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _all_keys(value, f"{prefix}{key}.")


def _explain(error: Exception, cfg: CfgNode, where: str) -> DistillError:
    """Turns what yacs raises while merging into one helpful error."""
    message = str(error.args[0]) if error.args and not isinstance(error, OSError) else str(error)
    for start in ("Non-existent config key: ", "Non-existent key: "):
        if message.startswith(start):
            key = message.removeprefix(start).strip()
            if key.startswith("DISTILL.VARIANTS."):
                return DistillError(
                    f"Unknown key {key!r} in {where}. A config file defines DISTILL.VARIANTS with their keys; the "
                    "command line can change what is defined."
                )
            if key.startswith("--"):
                return DistillError(f"{key} stands among {where}: options come before them.")
            nearest = difflib.get_close_matches(key, _all_keys(cfg), n=1, cutoff=0)
            return DistillError(
                f"Unknown key {key!r} in {where}. The nearest existing key is {nearest[0]!r}. Keys of your own come "
                "from a module in DISTILL.IMPORTS that has add_config(cfg)."
            )
    return DistillError(f"Cannot use {where}: {message}.")
