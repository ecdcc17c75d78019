"""Exporting students of Python configs: as Detectron2's dump, or as the original file with overrides."""

from detectron2.config import LazyConfig

from distill.config import write_record
from distill.recipes import LazyRecipe
from tests.helpers import check_same_detections, run_script, take_detections, write_few_scenes
from tests.test_train_net_lazy import teacher_arguments, write_student

PLAIN = """
import sys
sys.modules["distill"] = None  # importing it fails
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset

config, annotations, images = sys.argv[1:]
register_coco_instances("few_scenes", {}, annotations, images)
cfg = LazyConfig.load(config)
model = instantiate(cfg.model).eval()
DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
"""


def test_the_student_leaves_as_plain_detectron2_with_the_same_detections(tmp_path):
    data = write_few_scenes(tmp_path, 12)
    evaluator = (
        "from detectron2.config import LazyCall as L\nfrom detectron2.data import DatasetCatalog\n"
        "from detectron2.data.datasets import register_coco_instances\n"
        "from detectron2.evaluation import COCOEvaluator\n"
        f"if 'few_scenes' not in DatasetCatalog:\n    register_coco_instances('few_scenes', {{}}, *{data!r})\n"
        "dataloader.test.dataset.names = 'few_scenes'\n"
        f"dataloader.evaluator = L(COCOEvaluator)(dataset_name='few_scenes', output_dir={str(tmp_path / 'found')!r})\n"
        "model.roi_heads.box_predictor.test_score_thresh = 0.0\n"
        "model.roi_heads.box_predictor.test_topk_per_image = 10\n"
    )
    config = write_student(tmp_path, more=evaluator)
    arguments = ["--config-file", config, "--distill", "ReviewDistiller", *teacher_arguments(tmp_path)]
    result = run_script("train_net.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    after_training = take_detections(tmp_path / "found")
    assert len(after_training) == 120  # ten of each image
    weights = str(tmp_path / "out" / "model_final.pth")
    record = str(tmp_path / "out" / "config.py")
    (tmp_path / "teacher.pth").unlink()  # neither evaluating nor exporting needs it
    result = run_script("train_net.py", "--eval-only", "--config-file", record, f"train.init_checkpoint={weights}")
    assert result.returncode == 0, result.stderr[-3000:]
    check_same_detections(take_detections(tmp_path / "found"), after_training)

    out = tmp_path / "exported"
    result = run_script("tools/export_student.py", "--config-file", record, "--weights", weights, "--output", str(out))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "distill" not in (out / "config.yaml").read_text().replace(str(tmp_path), "")
    (tmp_path / "plain.py").write_text(PLAIN)
    result = run_script(str(tmp_path / "plain.py"), str(out / "config.yaml"), *data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    check_same_detections(take_detections(out / "output" / "inference"), after_training)
    assert LazyConfig.load(str(out / "config.yaml")).train.output_dir == str(out / "output")  # not the training's


def test_a_config_that_cannot_be_dumped_is_exported_as_its_file_and_overrides(tmp_path):
    more = "model.roi_heads.box_head.conv_norm = lambda channels: None\n"
    opts = ["train.device=cpu", "distill.DISTILLERS=[ReviewDistiller]"]
    recipe = LazyRecipe(write_student(tmp_path, more=f"{more}distill = dict(BALANCE=0.5)\n"), opts)
    written = recipe.plain().write(str(tmp_path), str(tmp_path / "model_final.pth"))
    assert written == str(tmp_path / "config.py") and not list(tmp_path.glob("config.yaml*"))
    loaded = LazyConfig.load(written)
    assert "distill" not in loaded
    assert loaded.train.init_checkpoint == str(tmp_path / "model_final.pth") and loaded.train.device == "cpu"
    assert loaded.train.output_dir == str(tmp_path / "output")
    again, distilled = str(tmp_path / "again.py"), str(tmp_path / "distilled.py")
    write_record(again, written, [])  # of a training that starts from it
    assert not LazyRecipe(again).is_distilled
    write_record(distilled, written, ["distill.DISTILLERS=[CWDDistiller]"])
    assert LazyRecipe(distilled).cfg.DISTILL.DISTILLERS == ["CWDDistiller"]
    assert LazyRecipe(distilled).cfg.DISTILL.BALANCE == 0


def test_every_spelling_of_distillation_is_left_out(tmp_path):
    more = "model.roi_heads.box_head.conv_norm = lambda channels: None\n"  # no dump can be read again
    for opts in (["distill={DISTILLERS:[review]}"], ["+distill.DISTILLERS=[review]"]):
        recipe = LazyRecipe(write_student(tmp_path, more=more), [*opts, "train.device=cpu"])
        assert recipe.is_distilled
        written = recipe.plain().write(str(tmp_path), "model_final.pth")
        write_record(str(tmp_path / "again.py"), written, [], plain=True)
        for record in (written, str(tmp_path / "again.py")):
            assert not LazyRecipe(record).is_distilled


def test_augmentations_that_cannot_be_scaled_are_left_alone(tmp_path, caplog):
    sizes = "target_height=64, target_width=64"
    more = "import detectron2.data.transforms as T\nfrom detectron2.config import LazyCall as L\n"
    more += "dataloader.train.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=60, max_size=None)]\n"
    for resize, warned in (("", False), (f"L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, {sizes})", True)):
        path = write_student(tmp_path, more=more + f"dataloader.train.mapper.augmentations += [{resize}]\n")
        recipe = LazyRecipe(path, ["distill.STUDENT.INPUT_SCALE=0.5", "distill.DISTILLERS=[review]"])
        plain = recipe.plain()
        lengths = [x.short_edge_length for x in plain.lazy.dataloader.train.mapper.augmentations if "max_size" in x]
        assert lengths == [60 if warned else 30]
        assert ("stay those of the teacher. At DISTILL.STUDENT.INPUT_SCALE below 1" in caplog.text) == warned
        plain._opts.append("model.roi_heads.box_head.conv_norm=null")
        write_record(str(tmp_path / "record.py"), path, plain._opts, plain=True)
        resize = LazyConfig.load(str(tmp_path / "record.py")).dataloader.train.mapper.augmentations[0]
        assert resize.max_size is None


def test_a_config_with_a_class_of_its_own_is_exported_as_its_file_and_overrides(tmp_path):
    more = (
        "from detectron2.modeling.meta_arch import GeneralizedRCNN\n"
        "class MyDetector(GeneralizedRCNN):\n    pass\nmodel._target_ = MyDetector\n"
    )
    recipe = LazyRecipe(write_student(tmp_path, more=more), ["train.device=cpu"])
    written = recipe.write(str(tmp_path), str(tmp_path / "model_final.pth"))
    assert written == str(tmp_path / "config.py") and not list(tmp_path.glob("config.yaml*"))
    assert type(LazyRecipe(written).build_detector()).__name__ == "MyDetector"
