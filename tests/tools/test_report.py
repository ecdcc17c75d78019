"""The report: right numbers, nothing from outside, and a word in the place of what is missing."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from distill.config import write_record
from distill.errors import DistillError
from tests.helpers import detector_cfg, distillation_cfg, run_script, write_coco
from tests.test_train_net_lazy import teacher_arguments, write_student
from tests.tools.html_page import Page

EVIL = "<script>alert('c1')</script>"
SHAPES = {"path", "use", "rect", "circle"}


def write_run(folder, cfg, records, log=""):
    """What a training leaves, its weights random."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "log.txt").write_text(log)
    own = cfg.clone()
    own.MODEL.META_ARCHITECTURE = "RetinaNet"
    torch.manual_seed(len(folder.name))
    model = build_model(own)
    model.head.cls_score.bias.data.zero_()  # an untrained detector is sure of nothing
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")


def scores(iteration, ap, *by_class):
    names = ("c0", EVIL, "c2")
    classes = {f"bbox/AP-{name}": value for name, value in zip(names, by_class)}
    return {"bbox/AP": ap, "bbox/AP50": ap + 20, "bbox/APl": math.nan, **classes, "iteration": iteration}


LOG = """[01/01 10:00:00] detectron2 INFO: Environment info:
detectron2             0.6 @/somewhere/detectron2
PyTorch                2.9.9+cpu @/somewhere/torch
[01/01 10:00:01] distill.modeling.distillation_model INFO: Distillers:
| distiller       |   loss weight |   warmup iterations |   decay |   parameters (M) |
|:----------------|--------------:|--------------------:|--------:|-----------------:|
| ReviewDistiller |           1.5 |                  10 |    0.25 |            0.001 |
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, a plain student, and a distilled one, on three images of noise with a class of an evil name."""
    folder = tmp_path_factory.mktemp("report")
    json_file, images = write_coco(folder / "data")
    content = json.loads(Path(json_file).read_text())
    content["categories"][1]["name"] = EVIL
    Path(json_file).write_text(json.dumps(content))
    settings = {
        "DATASETS.REGISTER": [f"noise=coco:{json_file}:{images}"],
        "DATASETS.TRAIN": ["noise"],
        "DATASETS.TEST": ["noise"],
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 96,
        "SOLVER.MAX_ITER": 40,
        "TEST.DETECTIONS_PER_IMAGE": 5,
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    }
    plain = detector_cfg("retinanet", **settings)
    write_run(folder / "teacher", plain, [scores(40, 50.0, 40.0, 50.0, 60.0)])
    losses = [{"iteration": i, "total_loss": 2.0, "loss_cls": 1.5, "loss_box_reg": 0.5} for i in (19, 39)]
    write_run(folder / "student", plain, [*losses, scores(40, 20.0, 10.0, 41.5, 30.0)])
    teacher = {
        "DISTILL.TEACHER.CONFIG_FILE": str(folder / "teacher" / "config.yaml"),
        "DISTILL.TEACHER.WEIGHTS": str(folder / "teacher" / "model_final.pth"),
        "DISTILL.BALANCE": 0.5,
    }
    more = [{"loss_review": math.nan, "weight/loss_review": 1.2}, {"loss_review": 3.0, "weight/loss_review": 1.5}]
    distilled = [record | other for record, other in zip(losses, more)]
    ratios = [{"gradient_ratio/ReviewDistiller": 0.75, "iteration": 0}]
    # first up to iteration 39 with another AP, then resumed from 20 on
    abandoned = [*distilled, *ratios, scores(20, 1.5, 1.0, 2.0, 3.0), scores(40, 3.5, 1.0, 2.0, 3.0)]
    records = [*abandoned, distilled[1], scores(40, 27.5, 20.0, 60.5, math.nan)]
    write_run(folder / "distilled", distillation_cfg(plain, teacher), records, LOG)
    return folder


@pytest.fixture(scope="module")
def page(runs):
    """The text of the distilled run's page, beside the student's."""
    before = sorted(path.name for path in (runs / "distilled").iterdir())
    result = make(runs / "distilled", runs / "student", "--min-score", "0.1", output=runs / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(path.name for path in (runs / "distilled").iterdir()) == before
    return (runs / "page.html").read_text()


def make(*arguments, output):
    settings = ["--rounds", "2", "--images", "2"]
    return run_script("tools/report.py", *map(str, arguments), *settings, "--output", str(output))


def test_the_page_refers_to_nothing_outside(page):
    parsed = Page(page)
    assert "http://" not in page and "https://" not in page and "url(#" in page
    assert not re.findall(r"url\((?!#)", page) and "@import" not in page and "<script" not in page
    assert len(parsed.images) == 2 * 3
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in parsed.addresses)
    for image in parsed.images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as picture:
            assert picture.format == "JPEG" and min(picture.size) >= 384 and np.asarray(picture).std() > 20


def test_numbers_of_the_later_run_beside_baseline_and_teacher(page):
    parsed = Page(page)
    names = ("distilled", "student", "teacher", "gain over student")
    assert parsed.table("AP") == dict(zip(names, ("27.5", "20.0", "*50.0", "+7.5")))
    assert parsed.table("AP50")["distilled"] == "47.5"
    assert parsed.table("AP large") == dict.fromkeys(names, "–")  # noqa: RUF001
    evil = parsed.table(EVIL)
    assert evil == {"distilled": "*60.5", "student": "41.5", "teacher": "50.0", "gain over student": "+19.0"}
    assert parsed.table("c2")["distilled"] == "–"  # noqa: RUF001  NaN
    assert "27.5 AP +7.5 over student (20.0) −22.5 to the teacher (50.0) 25%" in parsed.words  # noqa: RUF001
    assert "1.5" not in parsed.table("AP").values()


def test_what_was_trained_from_what(page, runs):
    parsed = Page(page)
    assert parsed.table("Distillers") == {
        "distilled": "ReviewDistiller, weight 1.5, grows over 10 iterations, falls over the last 25%",
        "student": "–",  # noqa: RUF001
        "teacher": "–",  # noqa: RUF001
    }
    expected = {
        "Detector": "RetinaNet",
        "Backbone": "ResNet-50 with FPN, 16 channels",
        "Starts from": "random weights",
        "Teacher": str(runs / "teacher" / "model_final.pth"),
        "Balance of gradients": "0.5",
        "Trained on": "noise",
        "Tested on": "noise",
        "Iterations": "40",
        "Images per iteration": "16",
        "Learning rate": "0.001",
        "Optimizer": "SGD",
        "Detectron2": "0.6",
        "PyTorch": "2.9.9+cpu",
    }
    assert {name: parsed.table(name)["distilled"] for name in expected} == expected
    titles = ("AP", "Detection losses", "Distillation losses", "Weights", "Gradient ratios")
    assert page.count("<svg") == len(titles) and all(f"<h3>{title}</h3>" in page for title in titles)
    model = build_model(detector_cfg("retinanet"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert parsed.table("parameters (millions)")["student"].lstrip("*") == f"{millions:.2f}"
    assert all(float(x.lstrip("*")) > 0 for x in parsed.table("GFLOPs per image").values())
    assert all(float(x.lstrip("*")) > 0 for x in parsed.table("ms per image").values())


def test_a_plain_run_and_a_folder_that_is_none(runs, tmp_path):
    result = make(runs / "student", runs / "teacher", "--min-score", "0.1", output=tmp_path / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    parsed = Page((tmp_path / "page.html").read_text())
    assert "A detector, trained without a teacher, beside teacher" in parsed.words
    assert "Where the ground truth and student differ most" in parsed.words and len(parsed.images) == 2 * 2
    assert list(parsed.table("AP")) == ["student", "teacher", "gain over teacher"]
    result = run_script("tools/report.py", str(runs / "data"))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (last,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{runs / 'data'} is no run: expected the OUTPUT_DIR of a training" in last


def test_a_schedule_is_that_of_the_processes_that_trained(tools, tmp_path):
    cfg = detector_cfg("retinanet", **{"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.IMS_PER_BATCH": 16})
    cfg.SOLVER.MAX_ITER = 900
    write_run(tmp_path / "one", cfg, [{"iteration": 3599, "total_loss": 2.0}], "")
    log = "[01/01 10:00:00] d2.distill INFO: The schedule is for 8 processes\n" + LOG
    (tmp_path / "one" / "log.txt").write_text(log + log.replace("for 8", "for 1"))  # the last training counts
    (run,) = tools["report"].read_runs([tmp_path / "one"])
    facts = tools["tables"].describe(run.recipe, run)
    assert (facts["Iterations"], facts["Images per iteration"]) == ("3,600 of 7,200", "2")


def test_runs_of_one_name_are_told_apart(tools, runs, tmp_path):
    shutil.copytree(runs / "student", tmp_path / "student", ignore=shutil.ignore_patterns("*.pth"))
    found = tools["report"].read_runs([runs / "student", tmp_path / "student"])
    assert [run.name for run in found] == [f"{folder.name}/student" for folder in (runs, tmp_path)]
    with pytest.raises(DistillError, match="A folder is given twice"):
        tools["report"].read_runs([runs / "student", runs / "teacher" / ".." / "student"])


def test_what_is_missing_is_said(runs, tmp_path):
    """An interrupted run whose teacher is gone, and one whose dataset is not registered."""
    for name in ("interrupted", "elsewhere"):
        shutil.copytree(runs / "distilled", tmp_path / name)
    (tmp_path / "interrupted" / "model_final.pth").unlink()
    kept = (tmp_path / "interrupted" / "metrics.json").read_text().splitlines()[:1]
    (tmp_path / "interrupted" / "metrics.json").write_text("\n".join([*kept, '{"iteration": 39, "total_l']))
    config = tmp_path / "interrupted" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs / "teacher"), "https://nowhere"))
    config = tmp_path / "elsewhere" / "config.yaml"
    config.write_text(re.sub(r"- noise=.*", "[]", config.read_text()).replace("- noise", "- somewhere"))
    config.write_text(re.sub(r"REGISTER:\n *\[\]", "REGISTER: []", config.read_text()))
    (tmp_path / "elsewhere" / "metrics.json").write_text(kept[0])
    result = make(tmp_path / "interrupted", output=tmp_path / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    text = (tmp_path / "page.html").read_text()
    assert "https://" not in text
    words = Page(text).words
    for said in (
        "This run has not ended: 20 of 40 iterations are logged, and there is no model_final.pth",
        "The teacher's results are not known: Config 'nowhere/config.yaml' is neither a file",
        "Not evaluated yet: interrupted",
        "No images are shown. There is no model_final.pth",
    ):
        assert said in words
    result = make(tmp_path / "elsewhere", output=tmp_path / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    parsed = Page((tmp_path / "page.html").read_text())
    for said in (
        "This run goes on: 20 of 40 iterations are logged. Its model_final.pth, which the images",
        "No images are shown. The dataset somewhere is not registered here",
        "Measured on an image of noise",
        "The teacher was evaluated on noise, not on somewhere. --evaluate-teacher evaluates it",
    ):
        assert said in parsed.words
    assert parsed.table("size of the first image") == dict.fromkeys(("elsewhere", "teacher"), "64 × 85")  # noqa: RUF001


def test_a_real_run_from_a_python_config_whose_teacher_is_evaluated(tmp_path):
    more = (
        "from detectron2.config import LazyCall as L\nfrom detectron2.data import DatasetCatalog, MetadataCatalog\n"
        "from detectron2.evaluation import COCOEvaluator\n"
        "if 'few' not in DatasetCatalog.list():\n"
        "    DatasetCatalog.register('few', lambda: DatasetCatalog.get('digit_scenes_val')[:8])\n"
        "    MetadataCatalog.get('few').thing_classes = list('0123456789')\n"
        "dataloader.test.dataset.names = 'few'\n"
        "dataloader.evaluator = L(COCOEvaluator)(dataset_name='few', output_dir=train.output_dir)\n"
        "model.roi_heads.box_predictor.test_score_thresh = -1.0\n"
    )
    arguments = ["--config-file", write_student(tmp_path, more=more), "--distill", "ReviewDistiller"]
    teacher = teacher_arguments(tmp_path)
    config = tmp_path / "teacher.yaml"
    config.write_text(config.read_text().replace("SCORE_THRESH_TEST: 0.05", "SCORE_THRESH_TEST: -1.0"))
    result = run_script("train_net.py", *arguments, *teacher, "distill.REVIEW.LOSS_WEIGHT=2.0")
    assert result.returncode == 0, result.stderr[-3000:]
    before = sorted(tmp_path.glob("out/**/*"))
    settings = ["--max-images", "4", "--min-score", "0", "--evaluate-teacher"]
    result = make(tmp_path / "out", *settings, output=tmp_path / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    assert sorted(tmp_path.glob("out/**/*")) == before
    parsed = Page((tmp_path / "page.html").read_text())
    assert parsed.table("Detector") == dict.fromkeys(("out", "teacher"), "GeneralizedRCNN")
    assert parsed.table("Distillers")["out"] == "ReviewDistiller, weight 2"
    assert parsed.table("Backbone")["out"] == "ResNet-18 with FPN" and parsed.table("Iterations")["out"] == "2"
    assert all(0 <= float(x.lstrip("*")) < 10 for x in parsed.table("AP").values())
    assert "Boxes on few" in parsed.words and "Masks on few" in parsed.words and len(parsed.images) == 6


def test_images_are_shown_beside_the_truth_where_the_teachers_classes_are_others(runs, tools, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(runs / "teacher", teacher)
    other = detector_cfg("retinanet", **{"MODEL.RETINANET.NUM_CLASSES": 5})
    (teacher / "config.yaml").write_text(other.dump())
    torch.save({"model": build_model(other).state_dict()}, teacher / "model_final.pth")
    shutil.copytree(runs / "distilled", tmp_path / "distilled")
    config = tmp_path / "distilled" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs / "teacher"), str(teacher)))
    result = make(tmp_path / "distilled", "--min-score", "0.1", output=tmp_path / "page.html")
    assert result.returncode == 0, result.stderr[-3000:]
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.images) == 2 * 2 and "The teacher is not shown." in page.words


@pytest.mark.parametrize("change, is_alike", [({}, True), ({"METRIC": "voc"}, False), ({"REGISTER": []}, False)])
def test_another_metric_by_the_same_name_is_told(tools, runs, change, is_alike):
    own, other = (tools["reading"].Run(runs / name) for name in ("distilled", "student"))
    for key, value in change.items():
        other.cfg.DATASETS[key] = value
    assert other.is_evaluated_as(own) == own.is_evaluated_as(other) == is_alike
    other.cfg.DATASETS.TEST = ("elsewhere",)
    assert other.is_evaluated_as(own)


@pytest.mark.parametrize("named, is_known", [("mask_rcnn.py", True), ("other.py", False)])
def test_a_teachers_program_is_executed_only_if_it_is_the_named_one(tools, runs, tmp_path, named, is_known):
    canary, teacher = tmp_path / "canary", tmp_path / "teacher"
    teacher.mkdir()
    original = Path(write_student(tmp_path))
    shutil.copy(original, original.with_name("other.py"))
    write_record(str(teacher / "config.py"), str(original), ["train.max_iter=7"])
    with open(teacher / "config.py", "a") as f:
        f.write(f"open({str(canary)!r}, 'w')\n")
    (teacher / "model_final.pth").write_bytes(b"")
    run = tools["reading"].Run(runs / "distilled")
    run.cfg.DISTILL.TEACHER.WEIGHTS = str(teacher / "model_final.pth")
    run.cfg.DISTILL.TEACHER.CONFIG_FILE = str(original.with_name(named))
    found = tools["reading"].TeacherOf(run)
    assert not canary.exists() and found.folder == teacher and bool(found.run) == is_known
    assert not is_known or found.run.max_iter == 7


def test_all_detectors_run_where_the_first_does(tools, runs):
    own, other = (tools["reading"].Run(runs / name) for name in ("distilled", "student"))
    own.cfg.MODEL.DEVICE = "meta"  # as of a training on a GPU
    report = tools["report"].Report(own, [other], evaluate=False)
    assert [run.cfg.MODEL.DEVICE for run in report.runs] == ["meta", "meta"]


def test_results_of_an_intermediate_checkpoint_are_those_of_its_iteration(tools, runs, tmp_path):
    reading = tools["reading"]
    shutil.copytree(runs / "distilled", tmp_path / "distilled")
    teacher = tmp_path / "teacher"
    shutil.copytree(runs / "teacher", teacher)
    (teacher / "metrics.json").write_text("".join(json.dumps(scores(i, float(i))) + "\n" for i in (9, 19, 40)))
    config = tmp_path / "distilled" / "config.yaml"
    numbered = {"model_0000019": 19.0, "model_0000039": 40.0, "model_0000029": None, "mine": 40.0}
    cases = [(name, {}, expected) for name, expected in numbered.items()]
    cases += [("model_best", {"best": {"iterations": i}}, v) for i, v in ((10, 9.0), (20, 19.0), (40, 40.0))]
    cases += [("model_best", {"iteration": 9}, 9.0), ("model_best", {}, None)]  # Detectron2's, and nobody's
    cases += [("previous_model_best", {"best": {"iterations": 10}}, None)]  # another training's
    for name, more, expected in cases:
        (teacher / "model_final.pth").rename(teacher / f"{name}.pth")
        torch.save({"model": {}, **more}, teacher / f"{name}.pth")
        config.write_text((runs / "distilled" / "config.yaml").read_text().replace(str(runs / "teacher"), str(teacher)))
        config.write_text(config.read_text().replace("model_final.pth", f"{name}.pth"))
        found = reading.TeacherOf(reading.Run(tmp_path / "distilled"))
        assert found.scores.get(reading.Metric("noise", "bbox", "AP")) == expected
        assert bool(found.problem) == (expected is None)
        (teacher / f"{name}.pth").rename(teacher / "model_final.pth")
    with (teacher / "metrics.json").open("a") as file:
        file.write('{"iteration": 41, "bb{"iteration": 42}\n')  # what a full disk leaves
    assert list(reading.Run(teacher).records) == [9, 19, 40]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed here")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it(page, runs, tmp_path, width):
    settings = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    settings += [f"--window-size={width},1600", "--virtual-time-budget=2000"]

    def browse(what):
        command = [BROWSER, *settings, what, (runs / "page.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    result = browse("--dump-dom")
    assert result.returncode == 0, result.stderr[-2000:]
    for text in ("What was trained", "27.5", "over student (20.0)", "&lt;script&gt;alert('c1')&lt;/script&gt;", "<svg"):
        assert text in result.stdout
    browse(f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(float)
    assert pixels.shape == (1600, width)
    assert all(band.std() > 3 for band in np.array_split(pixels, 4))  # text and charts from top to bottom
