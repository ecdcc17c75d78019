"""Evaluation outside of a training: of its detector, and of its teacher."""

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from ..config import student_config
from ..data import check_datasets
from ..errors import DistillError
from ..modeling.checkpoint import load_detector
from ..modeling.teacher import teacher_recipe
from ..recipes import Recipe
from ..recipes.base import Mapper
from .checkpoints import agreed_checkpoint


def teacher_mapper(recipe: Recipe, own: Recipe) -> Mapper:
    """What reads test images for the teacher: as its own config says; where that says nothing, in the student's size
    and the teacher's order of channels.

    Args:
        recipe: of the run.
        own: of its teacher.

    Returns:
        The mapper.
    """
    return own.build_mapper() if own.has_test_mapper else recipe.build_mapper(image_format=own.cfg.INPUT.FORMAT)


def evaluate_teacher(recipe: Recipe) -> dict:
    """Evaluates the teacher on the test sets of a run, resizing images as the teacher's own config says.

    Args:
        recipe: of the run.

    Returns:
        Detectron2's results by task and metric.
    """
    cfg = recipe.cfg
    own = teacher_recipe(cfg)
    own.cfg.DATASETS = cfg.DATASETS
    try:
        check_datasets(own.cfg, is_training=False)
    except DistillError as error:
        file = cfg.DISTILL.TEACHER.CONFIG_FILE
        raise DistillError(f"The teacher ({file}) cannot be evaluated here: {error}") from error
    results = recipe.evaluate(load_detector(own, "teacher"), teacher_mapper(recipe, own), "teacher/inference")
    if comm.is_main_process():
        verify_results(own.cfg, results)
    return results


def evaluate_student(recipe: Recipe, resume: bool) -> dict:
    """Evaluates the detector of a run, which of a distilled run is the student. Its weights must fill it completely.

    Args:
        recipe: of the run.
        resume: whether to take the last checkpoint of OUTPUT_DIR, if there is one.

    Returns:
        Detectron2's results by task and metric.
    """
    cfg = recipe.cfg
    recipe.cfg = own = student_config(cfg)
    if resume:
        own.MODEL.WEIGHTS = agreed_checkpoint(DetectionCheckpointer(nn.Identity(), cfg.OUTPUT_DIR)) or own.MODEL.WEIGHTS
    if not own.MODEL.WEIGHTS:
        raise DistillError(
            "MODEL.WEIGHTS is empty: name the checkpoint to evaluate, or add --resume for the last one in "
            f"{cfg.OUTPUT_DIR}."
        )
    results = recipe.evaluate(load_detector(recipe, "model"))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results
