"""A run from Detectron2's Python config (LazyConfig)."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import default_setup
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import fcos
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from ..config import check_record, is_of_distillation, load_lazy_config, override, resolve_config_file, write_record
from ..data import CheckedMapper
from ..errors import DistillError
from ..evaluation import forget_cached
from .base import Mapper, Recipe, evaluate_on
from .translate import translate

logger = logging.getLogger(__name__)

_PARTS = ("dataloader.train", "optimizer", "lr_multiplier", "train.max_iter", "train.output_dir")
# augmentations that do the same at any size
_OF_ANY_SIZE = ("RandomFlip", "RandomBrightness", "RandomContrast", "RandomSaturation", "RandomLighting")
_AUGMENTATIONS = "dataloader.train.mapper.augmentations"


class LazyRecipe(Recipe):
    """See :class:`Recipe`. Beside Detectron2's own nodes, the config may have ``distill``, with the keys of DISTILL.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo. It is executed.
        opts: overrides, ``key=value``.

    Raises:
        DistillError: see :func:`distill.config.load_lazy_config`; or an unknown key under ``distill``.
    """

    def __init__(self, name: str, opts: Sequence[str] = ()) -> None:
        self.name = name
        self._opts = list(opts)
        self.lazy = load_lazy_config(name, opts)
        self._read()

    def _read(self) -> None:
        self.file = resolve_config_file(self.name)[0]
        self.cfg = translate(self.lazy, self.file)
        ddp = OmegaConf.select(self.lazy, "train.ddp")
        self.ddp_settings = {"broadcast_buffers": False} if ddp is None else OmegaConf.to_container(ddp, resolve=True)
        self.max_checkpoints = OmegaConf.select(self.lazy, "train.checkpointer.max_to_keep")
        self.log_period = OmegaConf.select(self.lazy, "train.log_period", default=20)

    def set_distillation(self, names: Sequence[str], teacher_config: str, teacher_weights: str) -> None:
        given = {"DISTILLERS": names, "TEACHER.CONFIG_FILE": teacher_config, "TEACHER.WEIGHTS": teacher_weights}
        for key, value in given.items():
            if value:
                self._opts.append(override(f"distill.{key}", value))
                OmegaConf.update(self.lazy, f"distill.{key}", value)
        self._read()

    def setup(self, args: Namespace) -> None:
        """Detectron2's, which writes the config as text; and a Python config that starts the run again."""
        record = os.path.join(self.cfg.OUTPUT_DIR, "config.py")
        check_record(record)
        with _silenced("detectron2.config.lazy"):  # the record below is what starts the run again
            default_setup(self.lazy, Namespace(**{**vars(args), "config_file": self.file}))
        setup_logger(self.cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill")
        logger.info(f"The Python config {self.file} was executed.")  # before there was a log
        if comm.is_main_process():
            write_record(record, self.name, self._opts)

    def plain(self) -> LazyRecipe:
        plain = copy.copy(self)
        plain.lazy = copy.deepcopy(self.lazy)
        plain.lazy.pop("distill", None)
        plain._opts = [opt for opt in self._opts if not is_of_distillation(opt)]
        scale = self.cfg.DISTILL.STUDENT.INPUT_SCALE
        augmentations = OmegaConf.select(plain.lazy, _AUGMENTATIONS)
        if scale != 1 and augmentations is not None:  # the sizes of training images become those that the student saw
            try:
                _scale_resizes(augmentations, scale)
            except DistillError as error:  # nobody needs them to detect
                logger.warning(f"The sizes of images in dataloader.train stay those of the teacher. {error}")
                plain.lazy.dataloader.train = copy.deepcopy(self.lazy.dataloader.train)
            else:
                plain._opts += [  # for a record, which executes the original file
                    f"{_AUGMENTATIONS}.{i}.{key}={'null' if node[key] is None else node[key]}"
                    for i, node in enumerate(OmegaConf.to_container(augmentations, resolve=True))
                    for key in ("short_edge_length", "max_size")
                    if key in node
                ]
        plain._read()
        return plain

    def write(self, folder: str, weights: str) -> str:
        """As Detectron2's own dump; where it cannot be read again, as with functions in it, as a Python config of the
        original file with overrides."""
        path = os.path.join(folder, "config.yaml")
        lazy = copy.deepcopy(self.lazy)
        OmegaConf.update(lazy, "train.init_checkpoint", weights)
        own = {"train.output_dir": os.path.join(folder, "output")}
        nodes = {"": OmegaConf.select(lazy, "dataloader.evaluator")}
        if OmegaConf.is_list(nodes[""]):
            nodes = {f".{index}": node for index, node in enumerate(nodes[""])}
        for index, node in nodes.items():
            if node is not None and node.get("output_dir"):
                own[f"dataloader.evaluator{index}.output_dir"] = os.path.join(folder, "output", "inference")
        for key, value in own.items():
            OmegaConf.update(lazy, key, value)
        with _silenced("detectron2.config.lazy"):
            LazyConfig.save(lazy, path)
        try:
            _locate_targets(OmegaConf.to_container(LazyConfig.load(path), resolve=False))
        except Exception:  # the dump is text only, or names what the file itself defines
            for written in (path, f"{path}.pkl"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(written)
            path = os.path.join(folder, "config.py")
            more = {"train.init_checkpoint": weights, **own}
            opts = [*self._opts, *(override(key, value) for key, value in more.items())]
            write_record(path, self.name, opts, plain=True)
        return path

    def check(self) -> None:
        """
        Raises:
            DistillError: what a training takes is missing.
        """
        lacking = [key for key in _PARTS if OmegaConf.select(self.lazy, key) is None]
        if lacking:
            raise DistillError(
                f"The Python config {self.file} has no {', no '.join(lacking)}: a training takes the nodes of "
                "Detectron2's lazyconfig_train_net.py, such as configs/common has them."
            )
        if self.log_period < 1:
            raise DistillError(f"train.log_period is {self.log_period}: expected a number of iterations above 0.")

    def check_evaluation(self, is_required: bool) -> None:
        """
        Raises:
            DistillError: an evaluation is asked for and the config has none.
        """
        lacking = [key for key in ("test", "evaluator") if OmegaConf.select(self.lazy, f"dataloader.{key}") is None]
        if is_required and lacking:
            raise DistillError(
                f"The Python config {self.file} has no dataloader.{', no dataloader.'.join(lacking)}: what is there to "
                "evaluate? See configs/common/data/coco.py of Detectron2."
            )

    def scale_workers(self, num_workers: int) -> None:
        """A Python config has no number of processes that its schedule is for."""

    def build_detector(self) -> nn.Module:
        from ..modeling.meta_arch import FCOS  # it builds on configs, which this module reads

        node = copy.deepcopy(self.lazy.model)
        if node.get("_target_") in (fcos.FCOS, f"{fcos.__name__}.FCOS"):
            node._target_ = FCOS
        try:
            detector = instantiate(node)
        except Exception as error:  # whatever a constructor raises
            raise DistillError(
                f"The model of {self.file} cannot be built: {type(error).__name__}: {error}. Are its overrides right?"
            ) from error
        if getattr(detector, "input_format", self) is None:  # its drawing asks for it
            detector.input_format = self.cfg.INPUT.FORMAT
        return detector.to(torch.device(self.cfg.MODEL.DEVICE))

    def build_model(self) -> nn.Module:
        if not self.is_distilled:
            return self.build_detector()
        build = META_ARCH_REGISTRY.get(self.cfg.MODEL.META_ARCHITECTURE)
        return build(self.cfg, build_student=self.build_detector).to(torch.device(self.cfg.MODEL.DEVICE))

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The config's own, which knows the student's weights by their own names, and the distillers' with them."""
        node = copy.deepcopy(self.lazy.optimizer)
        node.params.model = _by_own_names(model) if hasattr(model, "distillers") else model
        return instantiate(node)

    def build_lr_scheduler(self, optimizer: Optimizer) -> Any:
        return instantiate(self.lazy.lr_multiplier)

    def build_train_loader(self, num_workers: int | None = None) -> Iterable[list[dict]]:
        """The config's own train loader; errors name the image."""
        node = copy.deepcopy(self.lazy.dataloader.train)
        if num_workers is not None:
            node.num_workers = num_workers
        if "mapper" in node:
            node.mapper = CheckedMapper(instantiate(node.mapper))
        return instantiate(node)

    def build_mapper(self, keep_annotations: bool = False, scale: int = 1, image_format: str = "") -> Mapper:
        if not self.has_test_mapper:
            raise DistillError(
                f"The Python config {self.file} has no dataloader.test.mapper, which says how images are resized for "
                "testing."
            )
        node = copy.deepcopy(self.lazy.dataloader.test.mapper)
        if "augmentations" not in node and (keep_annotations or scale != 1):
            raise DistillError(
                f"dataloader.test.mapper of {self.file} has no augmentations, which say how images are resized for "
                "testing: expected Detectron2's DatasetMapper, or a mapper of your own with that argument."
            )
        if scale != 1:
            _scale_resizes(node.augmentations, scale)
        if image_format:
            node.image_format = image_format
        if keep_annotations:
            augmentations = instantiate(node.augmentations)
            image_format = node.get("image_format", self.cfg.INPUT.FORMAT)
            return CheckedMapper(DatasetMapper(True, augmentations=augmentations, image_format=image_format))
        return CheckedMapper(instantiate(node))

    @property
    def has_test_mapper(self) -> bool:
        """Whether the config says how images are read for testing."""
        return OmegaConf.select(self.lazy, "dataloader.test.mapper") is not None

    def training_images(self) -> list[dict]:
        return list(instantiate(self.lazy.dataloader.train.dataset))

    def test_images(self) -> list[dict]:
        return list(instantiate(self.lazy.dataloader.test.dataset))

    def evaluate(self, model: nn.Module, mapper: Mapper | None = None, folder: str = "inference") -> dict:
        """Evaluates on ``dataloader.test`` by ``dataloader.evaluator``; without the latter, there is no result.

        Args:
            model: the detector, or the ``DistillationModel`` around it.
            mapper: what reads the images; by default the config's own.
            folder: where the evaluator writes, in OUTPUT_DIR, if it is not the usual one and the evaluator writes.

        Returns:
            Detectron2's results by task and metric.
        """
        if OmegaConf.select(self.lazy, "dataloader.evaluator") is None:
            logger.warning(f"Nothing is evaluated, since {self.file} has no dataloader.evaluator.")
            return {}
        dataloader = copy.deepcopy(self.lazy.dataloader)
        if mapper is not None:
            dataloader.test.mapper = mapper
        elif "mapper" in dataloader.test:
            dataloader.test.mapper = CheckedMapper(instantiate(dataloader.test.mapper))
        evaluators = dataloader.evaluator
        for node in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
            if folder != "inference" and node.get("output_dir"):
                node.output_dir = os.path.join(self.cfg.OUTPUT_DIR, folder)
            if node.get("output_dir") and isinstance(node.get("dataset_name"), str):
                forget_cached(node.dataset_name, node.output_dir)
        names = ", ".join(self.cfg.DATASETS.TEST) or "dataloader.test"
        return evaluate_on(model, instantiate(dataloader.test), instantiate(dataloader.evaluator), names)


def _locate_targets(node: Any) -> None:
    """Looks for whatever a config builds; an error of Detectron2's if something is nowhere to be found."""
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list)):
            _locate_targets(child)
    if isinstance(node, dict) and isinstance(node.get("_target_"), str):
        locate(node["_target_"])


def _scale_resizes(augmentations: Any, scale: float) -> None:
    """Scales the sizes that images are resized to, in place."""
    for resize in augmentations:
        if "short_edge_length" not in resize:
            target = resize.get("_target_")
            name = target if isinstance(target, str) else getattr(target, "__name__", "")
            if name.rpartition(".")[2] in _OF_ANY_SIZE:
                continue
            raise DistillError(
                f"At DISTILL.STUDENT.INPUT_SCALE below 1 the sizes of images are scaled, and those of {name or resize} "
                "cannot be: expected ResizeShortestEdge in dataloader.train.mapper and dataloader.test.mapper, and "
                f"beside it {', '.join(_OF_ANY_SIZE)} only."
            )
        lengths = resize.short_edge_length
        lengths = [lengths] if isinstance(lengths, int) else list(lengths)
        scaled = [math.ceil(length * scale) for length in lengths]
        resize.short_edge_length = scaled if len(scaled) > 1 else scaled[0]
        if resize.get("max_size"):
            resize.max_size = math.ceil(resize.max_size * scale)


@contextlib.contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Keeps a logger from telling with a traceback what is dealt with here."""
    own = logging.getLogger(name)
    before, own.disabled = own.disabled, True
    try:
        yield
    finally:
        own.disabled = before


def _by_own_names(model: nn.Module) -> nn.Module:
    """The student's parts and the distillers in a module of their own, so that rules on the names of weights (such as a
    learning rate for each layer of a ViT) see the student's as those of the student alone."""
    container = nn.Module()
    for name, part in [*model.student.named_children(), ("distillers", model.distillers)]:
        container.add_module(name, part)
    for name, weight in model.student.named_parameters(recurse=False):
        container.register_parameter(name, weight)
    return container
