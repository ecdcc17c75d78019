"""What the two kinds of config files have in common."""

from __future__ import annotations

import abc
import copy
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from ..config import student_config
from ..errors import DistillError
from ..evaluation import build_evaluator

logger = logging.getLogger(__name__)

Mapper = Callable[[dict], dict]


class Recipe(abc.ABC):
    """Where a detector and all that trains it come from.

    Attributes:
        cfg: the config in Detectron2's yaml keys. Of a Python config it holds DISTILL and the keys that it has a
            counterpart for (see :mod:`distill.recipes.translate`), the others at their defaults.
        ddp_settings: further arguments of ``DistributedDataParallel``.
        max_checkpoints: how many checkpoints are kept; None for all.
        log_period: iterations from one line of the log to the next.
    """

    cfg: CfgNode
    ddp_settings: dict[str, Any]
    max_checkpoints: int | None = None
    log_period: int = 20

    @property
    def is_distilled(self) -> bool:
        """Whether the model that is trained is a ``DistillationModel``."""
        return self.cfg.MODEL.META_ARCHITECTURE == "DistillationModel"

    @abc.abstractmethod
    def set_distillation(self, names: Sequence[str], teacher_config: str, teacher_weights: str) -> None:
        """Applies what the command line says of distillation; what is empty stays as it is.

        Args:
            names: DISTILL.DISTILLERS; a plain detector becomes the student.
            teacher_config: DISTILL.TEACHER.CONFIG_FILE.
            teacher_weights: DISTILL.TEACHER.WEIGHTS.
        """

    @abc.abstractmethod
    def setup(self, args: Namespace) -> None:
        """Detectron2's ``default_setup``; writes to OUTPUT_DIR the config that starts the run again.

        Args:
            args: the parsed command line.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Checks that the config has what a training takes."""

    @abc.abstractmethod
    def check_evaluation(self, is_required: bool) -> None:
        """Checks that the detector can be evaluated.

        Args:
            is_required: whether the command evaluates and nothing else.
        """

    @abc.abstractmethod
    def scale_workers(self, num_workers: int) -> None:
        """Fits the schedule to the number of processes, where the config asks for it.

        Args:
            num_workers: number of processes.
        """

    @abc.abstractmethod
    def build_detector(self) -> nn.Module:
        """The detector alone (of a distilled run, the student), on MODEL.DEVICE. Its weights are not loaded."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """What is trained: the detector, or the ``DistillationModel`` around it, on MODEL.DEVICE."""

    @abc.abstractmethod
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of a model."""

    @abc.abstractmethod
    def build_lr_scheduler(self, optimizer: Optimizer) -> Any:
        """What Detectron2's ``LRScheduler`` hook takes."""

    @abc.abstractmethod
    def build_train_loader(self, num_workers: int | None = None) -> Iterable[list[dict]]:
        """Batches in Detectron2's format, without end.

        Args:
            num_workers: processes that read the images; by default what the config says.
        """

    @abc.abstractmethod
    def build_mapper(self, keep_annotations: bool = False, scale: int = 1, image_format: str = "") -> Mapper:
        """What reads an image as in testing.

        Args:
            keep_annotations: whether boxes and classes are kept, as in training.
            scale: how many times the size of testing.
            image_format: "BGR" or "RGB"; by default the config's own.
        """

    @abc.abstractmethod
    def training_images(self) -> list[dict]:
        """The images that are trained on, in Detectron2's dataset format; prototypes are named by their index here."""

    @abc.abstractmethod
    def test_images(self) -> list[dict]:
        """The images that are tested on, in Detectron2's dataset format."""

    def detector(self, weights: str) -> Recipe:
        """The recipe of the detector alone (of a distilled run, the student).

        Args:
            weights: its MODEL.WEIGHTS.

        Returns:
            A recipe whose config is a copy, not frozen.
        """
        recipe = copy.copy(self)
        recipe.cfg = student_config(self.cfg)
        recipe.cfg.MODEL.WEIGHTS = weights
        return recipe

    @abc.abstractmethod
    def plain(self) -> Recipe:
        """The detector's recipe as plain Detectron2 has it, without distillation; its config is a copy, not frozen."""

    @abc.abstractmethod
    def write(self, folder: str, weights: str) -> str:
        """Writes a config that plain Detectron2 reads. Its OUTPUT_DIR is ``folder``'s ``output``: even to evaluate,
        Detectron2 would write over the config in that of the training.

        Args:
            folder: an existing folder.
            weights: what the config names as its weights.

        Returns:
            The file.
        """

    @property
    def has_test_mapper(self) -> bool:
        """Whether the config says how images are read for testing."""
        return True

    def evaluate(self, model: nn.Module, mapper: Mapper | None = None, folder: str = "inference") -> dict:
        """Evaluates a detector on the test sets.

        Args:
            model: the detector, or the ``DistillationModel`` around it.
            mapper: what reads the images; by default the config's own.
            folder: where the evaluators write, in OUTPUT_DIR.

        Returns:
            Detectron2's results by task and metric; of several test sets, by their names.
        """
        results = {}
        for name in self.cfg.DATASETS.TEST:
            loader = build_detection_test_loader(self.cfg, name, mapper=mapper or self.build_mapper())
            results[name] = evaluate_on(model, loader, self.build_evaluator(name, folder), name)
        return next(iter(results.values())) if len(results) == 1 else results

    def build_evaluator(self, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
        """The evaluator of a dataset's ``evaluator_type``.

        Args:
            dataset_name: a registered dataset.
            folder: where it writes, in OUTPUT_DIR.

        Returns:
            Detectron2's evaluator.

        Raises:
            DistillError: see :func:`distill.evaluation.check_evaluators`.
        """
        return build_evaluator(self.cfg, dataset_name, f"{self.cfg.OUTPUT_DIR}/{folder}")


def evaluate_on(model: nn.Module, loader: Iterable, evaluator: DatasetEvaluator, name: str) -> dict:
    """Runs a model over a dataset and prints the results, in the main process.

    Args:
        model: the detector.
        loader: the dataset.
        evaluator: of the dataset.
        name: of the dataset, for the log.

    Returns:
        Detectron2's results by task and metric; empty in other processes.
    """
    results = inference_on_dataset(model, loader, evaluator) or {}
    if comm.is_main_process():
        logger.info(f"Evaluation results for {name} in csv format:")
        print_csv_format(results)
    return results


def as_recipe(source: Recipe | CfgNode) -> Recipe:
    """A recipe as it is; a yaml config as the recipe that it is.

    Args:
        source: either.

    Returns:
        The recipe.

    Raises:
        DistillError: it is neither.
    """
    from .yaml_recipe import YamlRecipe

    if isinstance(source, Recipe):
        return source
    if not isinstance(source, CfgNode):
        raise DistillError(
            f"A recipe was expected, or the CfgNode of a yaml config, but got a {type(source).__name__}. Of a Python "
            "config, distill.recipes.load_recipe('my_config.py') returns the recipe."
        )
    return YamlRecipe(source)


def load_recipe(name: str, opts: Sequence[str] = (), imports: Sequence[str] = ()) -> Recipe:
    """Reads a config file.

    Args:
        name: path of a file, or the name of a config in Detectron2's model zoo; one that ends in ``.py`` is a
            LazyConfig, which is executed.
        opts: overrides: ``KEY VALUE ...`` for yaml, ``key=value ...`` for Python.
        imports: modules that may have keys of their own, besides those that a yaml config names.

    Returns:
        The recipe.

    Raises:
        DistillError: see :func:`distill.config.load_config` and :func:`distill.config.load_lazy_config`.
    """
    from ..config import load_config
    from .lazy_recipe import LazyRecipe
    from .yaml_recipe import YamlRecipe

    is_lazy = name.endswith(".py")
    try:
        return LazyRecipe(name, opts) if is_lazy else YamlRecipe(load_config(name, opts, imports))
    except DistillError as error:
        error.is_lazy = is_lazy  # whose keys it is to speak of
        raise
