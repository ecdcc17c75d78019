"""The code that the documentation shows works as it stands."""

import re
import sys
import textwrap

import pytest
import yaml
from detectron2.data import DatasetMapper
from detectron2.modeling import build_model
from PIL import Image

from distill.config import load_config
from distill.distillers import DISTILLER_REGISTRY
from distill.engine import Trainer
from distill.export import build_input_mapper, load_deployed, output_names, write_onnx
from tests.export.test_files import describe_file, finding_detector, image_of
from tests.helpers import ROOT, detector_cfg, distillation_cfg, random_batch, run_script, write_coco, write_teacher

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "projects").glob("*/README.md"))]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The page's modules, importable for one test."""
    known = dict(DISTILLER_REGISTRY._obj_map)
    blocks = [textwrap.dedent(x) for x in re.findall(r"^ *```python\n(.*?)^ *```", EXTENDING, re.DOTALL | re.MULTILINE)]
    parts = {}
    for block in blocks:
        name = re.match(r"# (\w+)\.py", block).group(1)
        parts[name] = parts.get(name, "") + block
    for name, code in parts.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield list(parts)
    DISTILLER_REGISTRY._obj_map.clear()
    DISTILLER_REGISTRY._obj_map.update(known)
    for name in parts:
        sys.modules.pop(name, None)


def anchors(page):
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for target, _, anchor in (link.partition("#") for link in links if not link.startswith("http")):
        other = (page.parent / target) if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def test_the_methods_page_shows_the_aligned_config_as_it_is():
    page = (ROOT / "docs" / "methods.md").read_text()
    assert (ROOT / "configs" / "aligned" / "faster_rcnn_R50.yaml").read_text() in page


def test_the_page_shows_two_modules(modules):
    assert modules == ["my_distiller", "more_distillers"]


def test_the_smallest_distiller_trains(tmp_path, modules):
    cfg = distillation_cfg(
        detector_cfg("retinanet"),
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{"DISTILL.IMPORTS": ["my_distiller"], "DISTILL.DISTILLERS": ["PlainDistiller"]},
    )
    model = build_model(cfg).train()
    losses = model(random_batch((64, 96)))
    losses["loss_plain"].backward()
    assert all(p.grad.abs().sum() > 0 for p in model.distillers.parameters())


def test_the_distiller_with_keys_hooks_and_the_box_head_trains(tmp_path, modules):
    class OneBatchTrainer(Trainer):
        def build_train_loader(self):
            empty = random_batch((64, 96))
            empty[0]["instances"] = empty[0]["instances"][[]]
            return [random_batch((64, 96)), empty]

    cfg = distillation_cfg(
        detector_cfg("faster_rcnn", **{"SOLVER.MAX_ITER": 2, "OUTPUT_DIR": str(tmp_path / "out")}),
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=32)),
        **{"DISTILL.DISTILLERS": ["AnswersDistiller"]},
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    opts = ["DISTILL.IMPORTS", "['more_distillers']", "DISTILL.ANSWERS.TEMPERATURE", "3.0"]
    trainer = OneBatchTrainer(load_config(str(tmp_path / "config.yaml"), opts))
    assert trainer.model.distillers["AnswersDistiller"].temperature == 3.0
    trainer.resume_or_load(resume=False)
    trainer.train()
    boxes = [value for value, _ in trainer.storage.history("boxes").values()]
    losses = [value for value, _ in trainer.storage.history("loss_answers").values()]
    assert boxes == [3, 0] and losses[0] > 0 and losses[1] == 0


def test_the_variants_of_the_page_are_read(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", EXTENDING, re.DOTALL)
    cfg = distillation_cfg(detector_cfg("retinanet"), write_teacher(tmp_path, detector_cfg("retinanet")))
    (tmp_path / "base.yaml").write_text(cfg.dump())
    text = yaml.safe_dump({"_BASE_": "base.yaml", **yaml.safe_load(block)})
    (tmp_path / "config.yaml").write_text(text)
    model = build_model(load_config(str(tmp_path / "config.yaml"))).train()
    losses = model(random_batch((64, 96)))
    assert {"loss_imitation", "loss_imitation_boxes"} < losses.keys()
    assert model.distillers["ImitationDistiller/boxes"].loss_weight == 2.0


def test_the_onnx_snippet_finds_what_the_wrapper_does(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deployment.md").read_text(), re.DOTALL)
    model, image = finding_detector("faster_rcnn"), image_of(75, 90)
    metadata = describe_file(output_names(model, image), max_size=120)
    (tmp_path / "exported").mkdir()
    write_onnx(model, image, tmp_path / "exported" / "model.onnx", metadata)
    photo = tmp_path / "photo.jpg"
    Image.fromarray(image_of(60, 140).permute(1, 2, 0).numpy()).save(photo)
    (tmp_path / "snippet.py").write_text(block.replace("score > 0.5", "score > 0.2"))
    result = run_script("snippet.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]

    detector = load_deployed(tmp_path / "exported" / "model.onnx")
    found = detector([build_input_mapper(detector.metadata)({"file_name": str(photo)})])[0]["instances"]
    lines = [line.split(" ", 2) for line in result.stdout.splitlines()]
    assert len(lines) == len(found) > 4
    for (name, score, box), index in zip(lines, range(len(found))):
        assert name == detector.metadata.class_names[found.pred_classes[index]]
        assert float(score) == pytest.approx(float(found.scores[index]), abs=0.006)
        assert yaml.safe_load(box) == pytest.approx(found.pred_boxes.tensor[index].tolist(), abs=1.0)


def test_the_script_with_a_mapper_of_ones_own_trains(tmp_path, monkeypatch):
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", TRAINING, re.DOTALL) if "class MyRecipe" in x)
    annotations, images = write_coco(tmp_path / "data")
    settings = {"DATASETS.REGISTER": [f"own=coco:{annotations}:{images}"], "DATASETS.TRAIN": ["own"]}
    settings |= {"DATALOADER.NUM_WORKERS": 0, "SOLVER.IMS_PER_BATCH": 2, "OUTPUT_DIR": str(tmp_path / "out")}
    teacher = write_teacher(tmp_path, detector_cfg("retinanet"))
    (tmp_path / "my_distilled.yaml").write_text(distillation_cfg(detector_cfg("retinanet", **settings), teacher).dump())
    monkeypatch.chdir(tmp_path)
    seen = []

    class MyMapper(DatasetMapper):
        def __call__(self, record):
            seen.append(record["file_name"])
            return super().__call__(record)

    names = {"MyMapper": MyMapper}
    exec(code.replace('"1000"', '"1"'), names)
    assert names["trainer"].iter == 1 and len(seen) >= 2
    assert (tmp_path / "out" / "model_final.pth").exists()
