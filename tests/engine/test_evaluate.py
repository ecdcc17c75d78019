"""How student and teacher are evaluated beside a training, and Python configs by an evaluator of their own."""

import pytest
import torch
from detectron2.data import MetadataCatalog

from distill.config import override
from distill.engine import evaluate
from distill.recipes import LazyRecipe, YamlRecipe, lazy_recipe
from tests.helpers import detector_cfg
from tests.test_train_net_lazy import write_student


def test_a_teachers_own_mapper_reads_the_images_for_it(tmp_path, monkeypatch):
    mapper = (
        "from detectron2.config import LazyCall as L\n\n\ndef read(record):\n    return record\n\n\n"
        "def make(size):\n    return read\n\n\ndataloader.test.mapper = L(make)(size=3)\n"
    )
    path = write_student(tmp_path, more=mapper)
    recipe = LazyRecipe(path, [override("distill.TEACHER.CONFIG_FILE", path), "distill.TEACHER.WEIGHTS=w.pth"])
    seen = []
    monkeypatch.setattr(evaluate, "load_detector", lambda source, role: role)
    monkeypatch.setattr(recipe, "evaluate", lambda model, mapper, folder: seen.append((model, mapper, folder)) or {})
    evaluate.evaluate_teacher(recipe)
    ((model, own, folder),) = seen
    assert (model, folder) == ("teacher", "teacher/inference") and own({"file_name": "x"}) == {"file_name": "x"}


@pytest.mark.parametrize("several", [False, True])
def test_the_evaluator_and_the_mapper_are_the_configs_own(tmp_path, several):
    mapper = (
        "from detectron2.config import LazyCall as L\n\n\n"
        "def read(record):\n    return {'file': record['file_name']}\n\n\n"
        "def make(size):\n    return read\n\n\ndef evaluator(output_dir):\n    return output_dir\n\n\n"
        "dataloader.test.mapper = L(make)(size=3)\ndataloader.evaluator = L(evaluator)(output_dir='x')\n"
        "if several:\n    dataloader.evaluator = [dataloader.evaluator, L(evaluator)(output_dir='y')]\n"
    )
    mapper = f"several = {several}\n{mapper}"
    recipe = LazyRecipe(write_student(tmp_path, more=mapper))
    recipe.check_evaluation(True)  # whatever the dataset's evaluator_type is
    MetadataCatalog.get("digit_scenes_val")
    seen = {}

    def evaluate(model, loader, evaluator, names):
        seen.update(batch=next(iter(loader)), evaluator=evaluator)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_recipe, "evaluate_on", evaluate)
        recipe.evaluate(torch.nn.Identity(), folder="teacher/inference")
    assert seen["batch"][0].keys() == {"file"}
    evaluators = seen["evaluator"] if several else [seen["evaluator"]]
    assert len(evaluators) == several + 1 and all(x.endswith("out/teacher/inference") for x in evaluators)


@pytest.mark.parametrize("metadata, is_kept", [({}, False), ({"json_file": "there.json"}, True)])
def test_an_earlier_runs_ground_truth_is_not_taken(tmp_path, metadata, is_kept):
    cached = tmp_path / "cells_coco_format.json"
    cached.touch()
    evaluator = (
        "from detectron2.config import LazyCall as L\n\n\n"
        "def evaluator(dataset_name, output_dir):\n    return dataset_name\n\n\n"
        f"dataloader.evaluator = L(evaluator)(dataset_name='cells', output_dir='{tmp_path}')\n"
    )
    recipe = LazyRecipe(write_student(tmp_path, more=evaluator))
    MetadataCatalog.get("cells").set(**metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_recipe, "evaluate_on", lambda *args: {})
        recipe.evaluate(torch.nn.Identity())
    MetadataCatalog.remove("cells")
    assert cached.exists() == is_kept


def test_the_last_checkpoint_is_evaluated_where_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    seen = []
    monkeypatch.setattr(evaluate, "load_detector", lambda recipe, role: seen.append(recipe.cfg.MODEL.WEIGHTS))
    for resume in (False, True):
        recipe = YamlRecipe(detector_cfg("retinanet", **{"OUTPUT_DIR": str(tmp_path), "MODEL.WEIGHTS": "given.pth"}))
        monkeypatch.setattr(recipe, "evaluate", lambda model: {})
        evaluate.evaluate_student(recipe, resume)
    assert seen == ["given.pth", f"{tmp_path}/model_0000004.pth"]


@pytest.mark.parametrize("student", ["yaml", "python"])
def test_a_teacher_without_a_test_mapper_sees_its_own_order_of_channels(tmp_path, student):
    more = "dataloader.train.mapper.image_format = 'RGB'\ndel dataloader.test.mapper\n"
    teacher = LazyRecipe(write_student(tmp_path / "teacher", more=more))
    recipe = YamlRecipe(detector_cfg("faster_rcnn")) if student == "yaml" else LazyRecipe(write_student(tmp_path))
    assert evaluate.teacher_mapper(recipe, teacher).mapper.image_format == "RGB"
    assert recipe.build_mapper().mapper.image_format == "BGR"


@pytest.mark.parametrize("student", ["yaml", "python"])
def test_the_mapper_of_prototypes_reads_the_students_order_of_channels(tmp_path, student):
    rgb = "dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = 'RGB'\n"
    recipe = YamlRecipe(detector_cfg("faster_rcnn", **{"INPUT.FORMAT": "RGB"}))
    recipe = recipe if student == "yaml" else LazyRecipe(write_student(tmp_path, more=rgb))
    assert recipe.build_mapper(keep_annotations=True).mapper.image_format == "RGB"
