"""The config nodes of this package, and how config files are read."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from .errors import DistillError

CN = CfgNode

# the node of MODEL that has NUM_CLASSES, by meta-architecture
CLASS_NODES = {"GeneralizedRCNN": "ROI_HEADS", "RetinaNet": "RETINANET", "FCOS": "FCOS"}

# what yacs and fvcore raise for a file or an override that they cannot merge
_MERGE_ERRORS = (KeyError, ValueError, AssertionError, TypeError, AttributeError, OSError)


def add_distill_config(cfg: CfgNode) -> None:
    """Adds the keys of this package to a Detectron2 config, in place.

    Args:
        cfg: what ``detectron2.config.get_cfg`` returns.
    """
    _C = cfg
    _C.DISTILL = CN()

    _C.DISTILL.STUDENT = CN()
    # The student's meta-architecture. The rest of MODEL.* describes the student, as in plain Detectron2.
    _C.DISTILL.STUDENT.META_ARCHITECTURE = "GeneralizedRCNN"
    # Prefixes of the student's weights that are copied from the teacher at the start, such as
    # "backbone.fpn_" or "roi_heads" (Kang et al., NeurIPS 2021). All that they name must fit.
    _C.DISTILL.STUDENT.INHERIT = []

    _C.DISTILL.TEACHER = CN()
    # A config file, or the name of a config in Detectron2's model zoo
    _C.DISTILL.TEACHER.CONFIG_FILE = ""
    # A file or URL. Empty: the model zoo's weights for a zoo config, else the MODEL.WEIGHTS of that config.
    _C.DISTILL.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on the command line: [KEY, VALUE, ...]
    _C.DISTILL.TEACHER.OPTS = []

    # Names in DISTILLER_REGISTRY; their losses add up. "Name/variant" is another of the kind, with settings of its own.
    _C.DISTILL.DISTILLERS = []
    # The settings of variants, as keys of DISTILL that differ, such as {boxes: {IMITATION: {REGION: boxes}}}. A config
    # file defines them; the command line may change what is defined.
    _C.DISTILL.VARIANTS = CN(new_allowed=True)
    # Modules to import first, so that the distillers in them register; their add_config(cfg), if any, adds keys
    _C.DISTILL.IMPORTS = []
    # Every so many iterations the gradient of each distiller at the student's features is measured and logged, as a
    # ratio to that of the detection losses. 0: never.
    _C.DISTILL.GRADIENT_LOG_PERIOD = 50
    # Scales every distiller's losses so that this ratio, in its running average, is the one given here, before
    # LOSS_WEIGHT. 0: off, as the papers have it, whose weights suit their own data.
    _C.DISTILL.BALANCE = 0.0

    # Knowledge review (arXiv 2104.09044)
    _C.DISTILL.REVIEW = CN()
    add_weight_config(_C.DISTILL.REVIEW)
    # FPN levels to compare, such as ["p3", "p4"]. Empty: all that student and teacher share.
    _C.DISTILL.REVIEW.LEVELS = []
    # Channels inside the fusion modules
    _C.DISTILL.REVIEW.MID_CHANNELS = 256
    # Norm of the fusion modules, in Detectron2's terms: "BN", "SyncBN", "GN", "" ...
    _C.DISTILL.REVIEW.NORM = "BN"
    # Sizes that the maps are pooled to, besides their own, in the hierarchical context loss
    _C.DISTILL.REVIEW.POOL_SIZES = [4, 2, 1]
    # What compares the reviewed features: "HCL" (hierarchical context loss, as published) or "SSIM", with the settings
    # of STRUCTURAL
    _C.DISTILL.REVIEW.CRITERION = "HCL"

    # Structural similarity (arXiv 2211.13133)
    _C.DISTILL.STRUCTURAL = CN()
    add_weight_config(_C.DISTILL.STRUCTURAL)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.STRUCTURAL.LEVELS = []
    # Convolution from the student's to the teacher's channels: "1x1", "3x3", or "auto": 1x1 where the channels differ,
    # none where they agree
    _C.DISTILL.STRUCTURAL.ADAPTATION = "auto"
    # How both sides come to one scale: "minmax" (the teacher's minimum and maximum of the level over the batch become 0
    # and 1), "standard" (the teacher's mean and deviation of each channel become 0 and 1), or "none"
    _C.DISTILL.STRUCTURAL.SCALE = "minmax"
    # The Gaussian window, in cells, and the constants that keep the quotients stable
    _C.DISTILL.STRUCTURAL.WINDOW_SIZE = 11
    _C.DISTILL.STRUCTURAL.SIGMA = 1.5
    _C.DISTILL.STRUCTURAL.K1 = 0.01
    _C.DISTILL.STRUCTURAL.K2 = 0.03
    # Exponents of luminance, contrast and structure; 0 leaves a term out
    _C.DISTILL.STRUCTURAL.EXPONENTS = [1.0, 1.0, 1.0]

    # Imitation: a norm of the difference of the features
    _C.DISTILL.IMITATION = CN()
    add_weight_config(_C.DISTILL.IMITATION)
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.IMITATION.LEVELS = []
    # As STRUCTURAL.ADAPTATION
    _C.DISTILL.IMITATION.ADAPTATION = "auto"
    # "l1", "l2" (squared) or "smooth_l1"
    _C.DISTILL.IMITATION.NORM = "l2"
    # Which cells count: "all", "boxes" (those that touch a ground-truth box) or "gaussian" (a Gaussian around the
    # centre of each box, as wide and high as the box asks for)
    _C.DISTILL.IMITATION.REGION = "all"

    # Global knowledge (arXiv 2210.09022). DECAY is for its global and local parts; the response part keeps its weight.
    _C.DISTILL.GLOBAL = CN()
    add_weight_config(_C.DISTILL.GLOBAL)
    _C.DISTILL.GLOBAL.DECAY = 1.0
    # FPN levels to compare. Empty: all that student and teacher share.
    _C.DISTILL.GLOBAL.LEVELS = []
    # Prototypes of a class at a level, and how they are picked, see distill.prototypes.select_prototypes
    _C.DISTILL.GLOBAL.NUM_PROTOTYPES = 10
    _C.DISTILL.GLOBAL.ALPHA = 10.0
    _C.DISTILL.GLOBAL.DENSITY_SIGMA = 0.1
    _C.DISTILL.GLOBAL.DENSITY_QUANTILE = 0.4
    # Iterations from one search for prototypes to the next. 0: an epoch.
    _C.DISTILL.GLOBAL.UPDATE_PERIOD = 0
    # Images that are searched for a class, and the shorter side of a box, in pixels as the detectors see it
    _C.DISTILL.GLOBAL.MAX_IMAGES = 800
    _C.DISTILL.GLOBAL.MIN_BOX_SIZE = 30
    # Which boxes are compared: "proposals" (the student's sampled positive ones; of a dense detector, the annotations)
    # or "ground_truth"
    _C.DISTILL.GLOBAL.INSTANCES = "proposals"
    # Distances to the prototypes
    _C.DISTILL.GLOBAL.GLOBAL_ON = True
    _C.DISTILL.GLOBAL.GLOBAL_WEIGHT = 5.0
    # Features, inside and outside of the boxes
    _C.DISTILL.GLOBAL.LOCAL_ON = True
    _C.DISTILL.GLOBAL.LOCAL_FOREGROUND_WEIGHT = 4.0
    _C.DISTILL.GLOBAL.LOCAL_BACKGROUND_WEIGHT = 1.0
    # Empty: their squared difference. Or a distiller that takes weights, such as "ImitationDistiller", with the
    # settings of its own node
    _C.DISTILL.GLOBAL.LOCAL_DISTILLER = ""
    # Classifications of the same boxes, softened by the temperature
    _C.DISTILL.GLOBAL.RESPONSE_ON = True
    _C.DISTILL.GLOBAL.RESPONSE_WEIGHT = 1.0
    _C.DISTILL.GLOBAL.TEMPERATURE = 2.0

    # Data sets to register first: "name=voc:ROOT:SPLIT[:class,class,...]" or "name=coco:JSON:IMAGE_ROOT"
    _C.DATASETS.REGISTER = []

    # "SGD" (with SOLVER.MOMENTUM and NESTEROV) or "AdamW"
    _C.SOLVER.OPTIMIZER = "SGD"

    # torchvision classification networks, for build_torchvision_fpn_backbone
    _C.MODEL.TORCHVISION = CN()
    # A name of torchvision.models, such as "resnet18" or "mobilenet_v2"
    _C.MODEL.TORCHVISION.NAME = "mobilenet_v2"
    # Nodes of torchvision's feature extraction whose outputs the FPN takes, finest first
    _C.MODEL.TORCHVISION.OUT_FEATURES = ["features.3", "features.6", "features.13", "features.17"]
    # What takes the place of the network's batch norms: "BN", "FrozenBN", "SyncBN", "GN" ...
    _C.MODEL.TORCHVISION.NORM = "FrozenBN"
    # Empty: random; a name of torchvision's weights, such as "IMAGENET1K_V1"; or a file with a state dict
    _C.MODEL.TORCHVISION.WEIGHTS = ""

    # FCOS, which Detectron2 has as Python only; the losses and the heads are Detectron2's
    _C.MODEL.FCOS = CN()
    _C.MODEL.FCOS.NUM_CLASSES = 80
    _C.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each tower of the head, and the norm after them
    _C.MODEL.FCOS.NUM_CONVS = 4
    _C.MODEL.FCOS.NORM = "GN"
    # Foreground probability that the classification starts from
    _C.MODEL.FCOS.PRIOR_PROB = 0.01
    # A point is positive within this many strides of a box's centre
    _C.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    _C.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    _C.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    _C.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    _C.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    _C.MODEL.FCOS.NMS_THRESH_TEST = 0.6


def add_weight_config(node: CfgNode, loss_weight: float = 1.0) -> None:
    """Adds the keys that every distiller has to its config node, in place.

    Args:
        node: the node of a distiller, such as ``cfg.DISTILL.REVIEW``.
        loss_weight: the default of LOSS_WEIGHT.
    """
    # Factor of the distiller's losses
    node.LOSS_WEIGHT = loss_weight
    # The weight grows linearly from zero over so many iterations. 0: it is there at once.
    node.WARMUP_ITERS = 0
    # The weight falls linearly to zero over this last part of the training, from 0 (never) to 1 (all along)
    node.DECAY = 0.0


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


def load_config(name: str, opts: Sequence[str] = ()) -> CfgNode:
    """Reads a config, with the keys of this package and of the modules in DISTILL.IMPORTS, and safe YAML only.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo. Only the zoo's own files, read
            from inside its package, may contain ``!!python`` tags.
        opts: overrides, ``[KEY, VALUE, ...]``.

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
        for module in import_modules(_named_imports(loaded, opts)):
            if hasattr(module, "add_config"):
                module.add_config(cfg)
        cfg.merge_from_file(path, allow_unsafe=from_zoo)
    except DistillError:
        raise
    except yaml.constructor.ConstructorError as error:
        raise DistillError(
            f"Config {path} is not safe YAML: {error.problem}{error.problem_mark or ''}. Python tags can run any "
            "code and are refused: write the value out."
        ) from None
    except yaml.YAMLError as error:
        raise DistillError(f"Config {path} is not valid YAML: {error}") from None
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, f"config {path}") from None
    try:
        cfg.merge_from_list(list(opts))
    except _MERGE_ERRORS as error:
        raise _explain(error, cfg, "the overrides (KEY VALUE ...)") from None
    return cfg


def import_modules(names: Sequence[str]) -> list[ModuleType]:
    """Imports the modules of DISTILL.IMPORTS.

    Args:
        names: dotted names, found where Python finds modules, and from the current folder.

    Returns:
        The modules.

    Raises:
        DistillError: there is no such module, or a name is no text.
    """
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a script in another folder, such as tools/, does not have it
    modules = []
    for name in names:
        if not isinstance(name, str):
            raise DistillError(f"DISTILL.IMPORTS holds {name!r}: expected dotted names of modules.")
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            raise DistillError(
                f"DISTILL.IMPORTS names the module {name!r}, which cannot be imported: {error}. Give a dotted name, "
                "such as 'projects.PearsonDistiller.pearson', from the current folder or from a folder on PYTHONPATH."
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
        DistillError: there is no such variant, or it sets a key that does not exist.
    """
    if variant not in cfg.DISTILL.VARIANTS:
        known = ", ".join(cfg.DISTILL.VARIANTS) or "none"
        raise DistillError(
            f"DISTILL.DISTILLERS names the variant {variant!r}, but DISTILL.VARIANTS has: {known}. Add its settings, "
            f"such as VARIANTS: {{{variant}: {{IMITATION: {{LOSS_WEIGHT: 2.0}}}}}}."
        )
    cfg = cfg.clone()
    cfg.defrost()
    try:
        cfg.DISTILL.merge_from_other_cfg(cfg.DISTILL.VARIANTS[variant])
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


def plain_config(cfg: CfgNode) -> CfgNode:
    """The student's config as plain Detectron2 reads it.

    The keys of this package are dropped, but for those that the student itself is built from: MODEL.FCOS for an
    FCOS student, MODEL.TORCHVISION for a torchvision backbone. To read such a config, call
    ``add_distill_config`` first.

    Args:
        cfg: a full config.

    Returns:
        A copy, not frozen.
    """
    cfg = student_config(cfg)
    del cfg["DISTILL"], cfg.DATASETS["REGISTER"], cfg.SOLVER["OPTIMIZER"]
    if cfg.MODEL.META_ARCHITECTURE != "FCOS":
        del cfg.MODEL["FCOS"]
    if cfg.MODEL.BACKBONE.NAME != "build_torchvision_fpn_backbone":
        del cfg.MODEL["TORCHVISION"]
    return cfg


def num_classes(cfg: CfgNode) -> int:
    """How many classes the student tells apart.

    Args:
        cfg: the full config, or the student's.

    Returns:
        The number, without background.

    Raises:
        DistillError: the student is of a family that keeps it elsewhere.
    """
    arch = student_config(cfg).MODEL.META_ARCHITECTURE
    if arch not in CLASS_NODES:
        raise DistillError(f"The number of classes of a {arch} is not known: expected one of {', '.join(CLASS_NODES)}.")
    return cfg.MODEL[CLASS_NODES[arch]].NUM_CLASSES


def _named_imports(loaded: Any, opts: Sequence[str]) -> list[str]:
    """DISTILL.IMPORTS as it will be once the file and the overrides are merged; what cannot be is left to that."""
    node = CN({"IMPORTS": []})
    if isinstance(loaded, dict) and isinstance(loaded.get("DISTILL"), dict):
        node.IMPORTS = loaded["DISTILL"].get("IMPORTS", [])
    for key, value in zip(opts[::2], opts[1::2]):
        if key == "DISTILL.IMPORTS":
            node.merge_from_list(["IMPORTS", value])
    return list(node.IMPORTS) if isinstance(node.IMPORTS, (list, tuple)) else []


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
            nearest = difflib.get_close_matches(key, _all_keys(cfg), n=1, cutoff=0)
            return DistillError(f"Unknown key {key!r} in {where}. The nearest existing key is {nearest[0]!r}.")
    return DistillError(f"Cannot use {where}: {message}")
