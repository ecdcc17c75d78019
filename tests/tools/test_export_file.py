"""tools/export_student.py --format torchscript and onnx, from the command line to the evaluation."""

import json
import logging
import sys

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from distill.errors import DistillError
from distill.export import load_deployed, register_test_sets
from distill.recipes import LazyRecipe, load_recipe
from tests.export.test_files import THRESHOLDS, finding_detector
from tests.helpers import ROOT, detector_cfg, distillation_cfg, run_script, write_coco
from tests.test_train_net_lazy import write_student

SIZES = {"INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 160, "DATALOADER.NUM_WORKERS": 0}
COMPARED = "the largest difference is 0.0e+00 of a box's size, 0.0e+00 of a score"


@pytest.fixture
def log(caplog):
    """What the script logs; Detectron2's own handlers keep the standard output of the first test."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "distill")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
        caplog.set_level(logging.INFO, logger.name)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.fixture
def tool(monkeypatch):
    """The script's module; its ``run`` takes the command line."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import export_student

    monkeypatch.setattr(export_student, "setup_logger", lambda *args, **kwargs: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export_student.py", *map(str, arguments)])
        export_student.main()

    monkeypatch.setattr(export_student, "run", run, raising=False)
    return export_student


def write_trained(folder, kind="retinanet", data=True, **overrides):
    """A config and weights of a student that finds something in noise, and noise to test on; returns the arguments."""
    if data:
        name = f"noise_{folder.name}"  # registered for the whole process
        json_file, images = write_coco(folder / "data")
        overrides = {"DATASETS.REGISTER": [f"{name}=coco:{json_file}:{images}"], "DATASETS.TEST": [name], **overrides}
    student = detector_cfg(kind, **{**THRESHOLDS, **SIZES, "DATASETS.TRAIN": [], **overrides})
    teacher = {"DISTILL.TEACHER.CONFIG_FILE": "gone.yaml", "DISTILL.STUDENT.INPUT_SCALE": 0.5}
    (folder / "config.yaml").write_text(distillation_cfg(student, teacher).dump())
    torch.save({"model": finding_detector(kind).state_dict()}, folder / "model.pth")
    return ["--config-file", folder / "config.yaml", "--weights", folder / "model.pth", "--output", folder / "out"]


def test_the_test_set_is_checked_and_evaluated_as_the_config_says(tmp_path):
    write_trained(tmp_path, **{"DATASETS.CHECK": "skip", "DATASETS.METRIC": "voc"})
    path = tmp_path / "data" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [500, 8, 40, 32]  # outside
    path.write_text(json.dumps(content))
    recipe = load_recipe(str(tmp_path / "config.yaml"))
    register_test_sets(recipe)
    (name,) = recipe.cfg.DATASETS.TEST
    assert len(recipe.test_images()) == 2 and MetadataCatalog.get(name).evaluator_type == "pascal_voc"


@pytest.mark.parametrize("size", [(), ("--size", 128, 160)], ids=["any", "fixed"])
@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_student_is_written_compared_and_evaluated(tmp_path, tool, log, name, size):
    arguments = write_trained(tmp_path)
    tool.run(*arguments, "--format", name, "--evaluate", *size)
    out = log.text
    assert "3 images of noise_" in out and (" and a part of one: " in out) == (not size)
    assert COMPARED in out or name == "onnx"
    assert "The file's bbox/AP" in out and "in PyTorch" in out
    path = tmp_path / "out" / ("model.ts" if name == "torchscript" else "model.onnx")
    metadata = load_deployed(path).metadata
    assert metadata.class_names == ["c0", "c1", "c2"] and metadata.channel_order == "BGR"
    assert metadata.size == ([128, 160] if size else None)
    assert (metadata.short_edge, metadata.max_size) == (96, 160)  # the student's own, whatever its teacher saw
    assert metadata.pixel_std == [58.0, 57.0, 57.0]
    assert {x.name for x in (tmp_path / "out").iterdir()} == {path.name, "evaluation"}


def test_a_python_config(tmp_path, tool, log):
    more = "from detectron2.config import LazyCall as L\nfrom detectron2.evaluation import COCOEvaluator\n"
    more += "dataloader.evaluator = L(COCOEvaluator)(dataset_name='digit_scenes_val', output_dir='nowhere')\n"
    more += "dataloader.test.dataset.names = 'digit_scenes_val'\ndataloader.test.num_workers = 0\n"
    config = write_student(tmp_path, more=more)
    model = LazyRecipe(config, ["train.device=cpu"]).build_detector()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    arguments = ["--config-file", config, "--weights", tmp_path / "model.pth", "--output", tmp_path / "out"]
    tool.run(*arguments, "--format", "torchscript", "--num-images", 2)
    out = log.text
    assert "2 images of digit_scenes_val and a part of one" in out
    assert f"{COMPARED}, 0.0e+00 of a mask's cell" in out and ": 0 detections" not in out
    metadata = load_deployed(tmp_path / "out" / "model.ts").metadata
    resize = LazyRecipe(config).lazy.dataloader.test.mapper.augmentations[0]
    assert (metadata.short_edge, metadata.max_size) == (resize.short_edge_length, resize.max_size)
    assert metadata.class_names == [str(digit) for digit in range(10)]


def test_without_a_test_set_random_images_are_compared(tmp_path, tool, log):
    arguments = write_trained(tmp_path, data=False, **{"DATASETS.TEST": ["not_here"]})
    tool.run(*arguments, "--format", "onnx", "--num-images", 2)
    out = log.text
    assert "checked on random images instead. Unknown dataset 'not_here' in DATASETS. Register it" in out
    assert "The classes are called by their numbers, 0 to 2" in out
    assert "on 2 random images and a part of one: " in out and "the largest difference is" in out
    for opts, message in (
        (["DATASETS.TEST", "[]"], "error: DATASETS.TEST names no test set"),
        ([], "error: Unknown dataset 'not_here'"),
    ):
        with pytest.raises(SystemExit, match=message):
            tool.run(*arguments, "--format", "onnx", "--evaluate", *opts)


def test_a_test_set_that_is_not_on_this_machine(tmp_path, tool, log, monkeypatch):
    overrides = {"DATASETS.TEST": ["coco_2017_val"], "MODEL.RETINANET.NUM_CLASSES": 80}
    arguments = write_trained(tmp_path, data=False, **overrides)
    model = build_model(detector_cfg("retinanet", depth=18, **overrides))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    tool.run(*arguments, "--format", "torchscript")
    out = log.text
    assert "random images instead. The test set coco_2017_val cannot be read: FileNotFoundError" in out
    assert load_deployed(tmp_path / "out" / "model.ts").metadata.class_names[:2] == ["person", "bicycle"]
    assert "the student finds nothing there, so the comparison says little" in out
    with pytest.raises(SystemExit, match="error: The test set coco_2017_val cannot be read: .*DATASETS.REGISTER"):
        tool.run(*arguments, "--format", "torchscript", "--evaluate")


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_wrong_file_is_an_error(tmp_path, tool, monkeypatch, name):
    arguments = write_trained(tmp_path, kind="faster_rcnn")
    file, write = tool.FILES[name]

    def write_another(model, *args):
        weight = model.roi_heads.box_predictor.cls_score.bias
        weight[0] += 0.02
        write(model, *args)
        weight[0] -= 0.02

    monkeypatch.setitem(tool.FILES, name, (file, write_another))
    with pytest.raises(SystemExit, match=r"error: .* of a score; expected at most 0.001. .*do not deploy.* is now .*"):
        tool.run(*arguments, "--format", name)
    assert [x.name for x in (tmp_path / "out").iterdir() if x.is_file()] == [f"rejected_{file}"]


def test_a_file_that_cannot_be_loaded_is_set_aside(tmp_path, tool, monkeypatch):
    arguments = write_trained(tmp_path)
    monkeypatch.setitem(tool.FILES, "onnx", ("model.onnx", lambda model, image, path, about: path.write_bytes(b"half")))
    with pytest.raises(SystemExit, match="cannot be loaded as ONNX: .* The file is now .*rejected_model.onnx"):
        tool.run(*arguments, "--format", "onnx")
    assert [x.name for x in (tmp_path / "out").iterdir() if x.is_file()] == ["rejected_model.onnx"]


def test_what_says_nothing_about_the_file_leaves_it_its_name(tmp_path, tool, monkeypatch):
    def fail(*args, **settings):
        raise DistillError("A test image cannot be read.")

    arguments = write_trained(tmp_path)
    monkeypatch.setattr(tool, "evaluate_both", fail)
    with pytest.raises(SystemExit, match="error: A test image cannot be read. The file is .*/unchecked_model.ts, for"):
        tool.run(*arguments, "--format", "torchscript", "--evaluate")
    assert [x.name for x in (tmp_path / "out").iterdir() if x.is_file()] == ["unchecked_model.ts"]


def test_a_file_that_fails_in_the_evaluation_is_set_aside_and_the_earlier_one_stays(tmp_path, tool, monkeypatch):
    arguments = write_trained(tmp_path)
    tool.run(*arguments, "--format", "onnx", "--evaluate")
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    load = tool.load_deployed

    def load_failing(path):
        detector = load(path)
        run, calls = detector.run, []

        def fail_later(image):  # in the evaluation, after the three images that are compared
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("no kernel\ntrace")
            return run(image)

        detector.run = fail_later
        return detector

    monkeypatch.setattr(tool, "load_deployed", load_failing)
    with pytest.raises(SystemExit, match="error: The file cannot be run on an image of .*: no kernel .*rejected_model"):
        tool.run(*arguments, "--format", "onnx", "--evaluate")
    files = {x.name for x in (tmp_path / "out").iterdir() if x.is_file()}
    assert files == {"model.onnx", "rejected_model.onnx"} and (tmp_path / "out" / "model.onnx").read_bytes() == before


@pytest.mark.parametrize("test_sets", [[], ["not_here"]])
def test_training_sets_name_the_classes_where_there_is_no_test_set(tmp_path, tool, log, test_sets):
    arguments = write_trained(tmp_path)
    name = f"noise_{tmp_path.name}"
    tool.run(*arguments, "--format", "torchscript", "DATASETS.TRAIN", str([name]), "DATASETS.TEST", str(test_sets))
    assert load_deployed(tmp_path / "out" / "model.ts").metadata.class_names == ["c0", "c1", "c2"]


def test_a_file_with_another_ap_is_an_error(tmp_path, tool, monkeypatch):
    arguments = write_trained(tmp_path)
    monkeypatch.setattr(tool, "check_file", lambda *args: None)
    evaluate_both = tool.evaluate_both

    def with_another_file(recipe, model, detector, **settings):
        def finds_nothing(inputs):
            return [{"instances": x["instances"][:0]} for x in detector(inputs)]

        nothing = torch.nn.Module()
        nothing.forward = finds_nothing
        return evaluate_both(recipe, model, nothing, **settings)

    monkeypatch.setattr(tool, "evaluate_both", with_another_file)
    with pytest.raises(
        SystemExit, match=r"error: The file's bbox/AP .* differs by more than 0.1. .* is now .*rejected"
    ):
        tool.run(*arguments, "--format", "torchscript", "--evaluate")
    assert [x.name for x in (tmp_path / "out").iterdir() if x.is_file()] == ["rejected_model.ts"]


def test_arguments_that_cannot_be(tmp_path, tool, monkeypatch):
    arguments = write_trained(tmp_path, data=False)
    for more, message in (
        (["--evaluate", "--size", 64, 64], "--size, --evaluate is for files: add --format torchscript or"),
        (["--format", "onnx", "--num-images", 0], "--num-images is 0: expected a number above 0"),
        (["--format", "onnx", "--size", 64, 0], "--size is 64 0: expected height and width"),
        (["--format", "onnx", "--device", "cuda"], "an ONNX file runs on whatever its runtime has"),
        (["--format", "torchscript", "--device", "tpu"], "--device is tpu: expected cpu or cuda"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tool.run(*arguments, *more)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: --device is cuda, and no CUDA GPU is available"):
        tool.run(*arguments, "--format", "torchscript", "--device", "cuda")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_onnx_one_error_says_what_to_install(tmp_path):
    arguments = write_trained(tmp_path, data=False)
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "onnx.py").write_text("raise ImportError('No module named onnx')\n")
    result = run_script(
        *("tools/export_student.py", *map(str, arguments), "--format", "onnx"),
        PYTHONPATH=f"{tmp_path / 'absent'}:{ROOT}",
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: ONNX files need the package onnx, which cannot be imported" in result.stderr
    assert "pip install -c constraints.txt onnx onnxruntime" in result.stderr
