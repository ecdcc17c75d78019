"""train_net.py with Python configs: what a yaml config promises holds for them, too."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.engine import default_argument_parser

from distill.config import override, write_record
from distill.data import check_datasets
from distill.engine import Trainer
from distill.errors import DistillError
from distill.modeling import DistillationModel
from distill.recipes import LazyRecipe, YamlRecipe, load_recipe, translate_message
from tests.helpers import ROOT, detector_cfg, run_script, script_environment, write_few_scenes, write_teacher
from tests.modeling.test_lazy_teachers import write_lazy_teacher
from tests.test_train_net import SMALL_SCENES, read_metrics


def write_student(folder, name="mask_rcnn", more=""):
    """A small Python config on digit scenes; returns its path."""
    shutil.copytree(ROOT / "tests/lazy", folder / "lazy", dirs_exist_ok=True)
    path = folder / "lazy" / f"{name}.py"
    path.write_text(path.read_text() + f"train.output_dir = {str(folder / 'out')!r}\n" + more)
    return str(path)


def write_yaml_teacher(folder, kind="mask_rcnn"):
    paths = write_teacher(folder, detector_cfg(kind, channels=32, **SMALL_SCENES))
    return [f"--teacher-{key}" for key in ("config", "weights")], list(paths.values())


def teacher_arguments(folder, **settings):
    (names, values) = write_yaml_teacher(folder, **settings)
    return [x for pair in zip(names, values) for x in pair]


def test_a_program_that_registers_its_data_is_executed_once(tmp_path):
    register = (
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        f"DatasetCatalog.register({str(tmp_path)!r}, lambda: [])\n"
        f"MetadataCatalog.get({str(tmp_path)!r}).masks = []\n"
        f"dataloader.train.dataset.names = {str(tmp_path)!r}\n"
    )
    path = write_student(tmp_path, more=register)
    recipes = [load_recipe(path), load_recipe(path, ["train.max_iter=7"])]
    assert [recipe.cfg.SOLVER.MAX_ITER for recipe in recipes] == [2, 7]
    with pytest.raises(DistillError, match="has boxes alone, but the model has a mask head") as error:
        check_datasets(recipes[0].cfg)  # as of a yaml config
    assert "Set model.roi_heads.mask_in_features None and" in translate_message(str(error.value))
    record = tmp_path / "config.py"
    for source in (path, record, record):  # the last two: of a record
        write_record(str(record), str(source), ["train.max_iter=9"])
    assert f"_file = {path!r}" in record.read_text()
    (tmp_path / "lazy" / "other.py").write_text((tmp_path / "lazy" / "mask_rcnn.py").read_text())
    with pytest.raises(DistillError, match="already registered.* by distill.data.register_datasets"):
        load_recipe(str(tmp_path / "lazy" / "other.py"))


def test_the_last_resize_is_that_of_training(tmp_path):
    crop = "L(T.RandomApply)(tfm_or_aug=L(T.AugmentationList)(augs=[L(T.ResizeShortestEdge)(short_edge_length=40)]))"
    more = "import detectron2.data.transforms as T\nfrom detectron2.config import LazyCall as L\n"
    more += "resize = L(T.ResizeShortestEdge)(short_edge_length=[48, 80], max_size=133)\n"
    more += f"dataloader.train.mapper.augmentations = [{crop}, resize]\n"
    node = LazyRecipe(write_student(tmp_path, more=more)).cfg.INPUT
    assert (node.MIN_SIZE_TRAIN, node.MAX_SIZE_TRAIN) == ((48, 80), 133)


def test_a_train_mapper_of_ones_own_leaves_the_order_of_channels_known(tmp_path):
    more = "from detectron2.config import LazyCall as L\n\n\ndef make():\n    return dict\n\n\n"
    more += "dataloader.test.mapper.image_format = '${...train.mapper.image_format}'\n"
    more += "dataloader.train.mapper = L(make)()\nmodel.input_format = 'RGB'\n"
    assert LazyRecipe(write_student(tmp_path, more=more)).cfg.INPUT.FORMAT == "RGB"
    with pytest.raises(DistillError, match="dataloader.test.dataset.names of .* cannot be resolved: Interpolation"):
        LazyRecipe(write_student(tmp_path, more="dataloader.test.dataset.names = '${nowhere}'\n"))


@pytest.mark.parametrize("is_source", [True, False])
def test_a_config_that_is_no_record_is_not_overwritten(tmp_path, is_source):
    source = write_student(tmp_path, more=f"train.output_dir = {str(tmp_path / 'lazy')!r}\n")
    own = tmp_path / "lazy" / "config.py"
    own.write_text((tmp_path / "lazy" / "mask_rcnn.py").read_text() if is_source else "mine = 1\n")
    before = own.read_text()
    result = run_script("train_net.py", "--config-file", str(own) if is_source else source)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "config.py' is not of an earlier run" in result.stderr and own.read_text() == before


@pytest.mark.parametrize("name", ["mask_rcnn", "fcos"])
def test_distil_and_start_again_from_what_it_wrote(tmp_path, name):
    teacher = teacher_arguments(tmp_path, kind=name if name == "mask_rcnn" else "retinanet")
    arguments = ["--config-file", write_student(tmp_path, name), "--distill", "ReviewDistiller", *teacher]
    result = run_script("train_net.py", *arguments, "distill.REVIEW.LOSS_WEIGHT=2.0", "train.amp.enabled=True")
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    for line in (
        f"The Python config {tmp_path}",
        "Mixed precision: torch.bfloat16 on cpu",
        "Student: ",
        "| ReviewDistiller ",
    ):
        assert line in log
    assert "Traceback" not in log and "Unable to serialize" not in log
    first = read_metrics(tmp_path / "out")
    assert first["loss_review"] > 0 and first["weight/loss_review"] == 2.0
    state = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    recipe = LazyRecipe(str(tmp_path / "out" / "config.py"), ["train.device=cpu"])
    assert {key for key in state if not key.startswith("distillers.")} == set(recipe.build_detector().state_dict())

    again = run_script(
        *("train_net.py", "--config-file", str(tmp_path / "out" / "config.py")),
        f"train.output_dir={tmp_path / 'again'}",
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert read_metrics(tmp_path / "again")["total_loss"] == pytest.approx(first["total_loss"], rel=1e-6)
    recorded = LazyConfig.load(str(tmp_path / "again" / "config.py"), ("_file", "_overrides"))
    assert recorded[0] == str(tmp_path / "lazy" / f"{name}.py")  # the original, not the record of the first run
    assert recorded[1][0] == "distill.REVIEW.LOSS_WEIGHT=2.0" and "again" in recorded[1][-1]


def test_a_distill_node_a_kill_and_two_processes(tmp_path):
    _, values = write_yaml_teacher(tmp_path)
    node = {
        "DISTILLERS": ["StructuralDistiller", "GlobalKnowledgeDistiller"],
        "TEACHER": {"CONFIG_FILE": values[0], "WEIGHTS": values[1]},
        "STUDENT": {"INHERIT": ["proposal_generator.rpn_head.objectness_logits.bias"]},
        "GLOBAL": {"UPDATE_PERIOD": 500, "MAX_IMAGES": 4, "MIN_BOX_SIZE": 4},
        "BALANCE": 0.5,
    }
    more = f"distill = dict({node!r})\ntrain.max_iter, train.checkpointer.period = 1000, 2\n"
    config = write_student(tmp_path, more=more)
    command = [sys.executable, "train_net.py", "--num-gpus", "2", "--config-file", config]
    process = subprocess.Popen(
        command, cwd=ROOT, env=script_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last, deadline = tmp_path / "out" / "last_checkpoint", time.time() + 400
    while not (last.exists() and last.read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # for its workers to end with it
    saved = torch.load(tmp_path / "out" / last.read_text())
    done = saved["iteration"] + 1
    assert saved["trainer"]["_trainer"]["optimizer"]["state"]  # momentum goes on, too
    config = str(tmp_path / "out" / "config.py")
    more = ["--resume", f"train.max_iter={done + 2}"]
    result = run_script("train_net.py", "--config-file", config, *more, processes=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"Starting training from iteration {done}" in log and log.count("The student inherits 1 weights") == 1
    assert log.count("World size: 2") == 2
    assert log.count("Prototypes: ") == 1  # the checkpoint has them
    metrics = read_metrics(tmp_path / "out")
    assert metrics["loss_structural"] > 0 and metrics["loss_local"] > 0 and "loss_global" in metrics
    final = torch.load(tmp_path / "out" / "model_final.pth")
    assert final["iteration"] == done + 1


def test_a_yaml_run_is_not_taken_for_the_python_one_before_it(tmp_path):
    args = default_argument_parser().parse_args([])
    recipe = LazyRecipe(
        write_student(tmp_path), ["train.device=cpu", override("train.output_dir", str(tmp_path / "out"))]
    )
    recipe.setup(args)
    assert (tmp_path / "out" / "config.py").is_file()
    cfg = detector_cfg("retinanet", OUTPUT_DIR=str(tmp_path / "out"))
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    args.config_file = str(tmp_path / "mine.yaml")
    YamlRecipe(cfg).setup(args)
    assert sorted(path.name for path in (tmp_path / "out").glob("*config.*")) == ["config.yaml", "previous_config.py"]


def test_a_yaml_student_learns_from_a_new_baseline_which_is_evaluated_as_its_config_says(tmp_path):
    register = ["few_scenes=coco:{}:{}".format(*write_few_scenes(tmp_path, 20))]
    scenes = {**SMALL_SCENES, "DATASETS.REGISTER": register, "INPUT.MIN_SIZE_TEST": 96}
    scenes["OUTPUT_DIR"] = str(tmp_path / "out")
    (tmp_path / "student.yaml").write_text(detector_cfg("faster_rcnn", **scenes).dump())
    paths = write_lazy_teacher(tmp_path, "R_50")
    weights = torch.load(paths["DISTILL.TEACHER.WEIGHTS"])["model"]
    with open(paths["DISTILL.TEACHER.CONFIG_FILE"], "a") as f:
        f.write("from .mask_rcnn import dataloader\nmodel.roi_heads.num_classes = 10\n")
    shutil.copy(ROOT / "tests/lazy/mask_rcnn.py", tmp_path)
    recipe = LazyRecipe(paths["DISTILL.TEACHER.CONFIG_FILE"], ["train={device: cpu}"])
    torch.save({"model": {**weights, **fresh_heads(recipe, weights)}}, paths["DISTILL.TEACHER.WEIGHTS"])
    arguments = [
        *("--config-file", str(tmp_path / "student.yaml"), "--distill", "ReviewDistiller"),
        *("--teacher-config", paths["DISTILL.TEACHER.CONFIG_FILE"]),
        *("--teacher-weights", paths["DISTILL.TEACHER.WEIGHTS"]),
    ]
    result = run_script("train_net.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"Executing the Python config {tmp_path / 'teacher.py'}" in log and "Teacher: GeneralizedRCNN" in log
    assert read_metrics(tmp_path / "out")["loss_review"] > 0
    result = run_script(
        *("train_net.py", *arguments, "--eval-only", "--eval-teacher"),
        *("DATASETS.TEST", "['few_scenes']"),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "short_edge_length=(64, 64)" in result.stdout and "short_edge_length=(96, 96)" not in result.stdout
    assert (tmp_path / "out" / "teacher" / "inference" / "coco_instances_results.json").exists()


def fresh_heads(recipe, weights):
    """Random weights of what has another shape since the number of classes changed."""
    state = recipe.build_detector().state_dict()
    return {key: value for key, value in state.items() if value.shape != weights[key].shape}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill.REVIEW.LOS_WEIGHT=2.0"], "Unknown key 'distill.REVIEW.LOS_WEIGHT'.*'distill.REVIEW.LOSS_WEIGHT'"),
        (["distill.REVIEW.LOSS_WEIGHT=high"], "Cannot use config.*LOSS_WEIGHT"),
        (["distill.REVIEW.LEVELS=[p8]"], "distill.REVIEW.LEVELS asks for p8, which the student does not have"),
        (["train.max_iter=0"], "train.max_iter is 0: expected a number of iterations above 0"),
        (["dataloader.train.total_batch_size=-4"], "dataloader.train.total_batch_size is -4"),
        (["SOLVER.MAX_ITER", "2"], "Cannot apply the override 'SOLVER.MAX_ITER'.*takes key=value"),
        (["model.roi_heads.num_classes=4"], "has 10 classes.*model.roi_heads.num_classes is 4"),
        (["model.roi_heads.strange=4"], "The model of .*mask_rcnn.py cannot be built: TypeError"),
        (["dataloader.train.dataset.names=nowhere"], "Unknown dataset 'nowhere' in "),
        (["train.init_checkpoint=/nowhere.pth"], "Cannot load '/nowhere.pth' into the model"),
        (["train.max_iter=abc"], "train.max_iter is 'abc' in .*expected a value of type int"),
        (["train.amp.enabled=maybe"], "train.amp.enabled is 'maybe' in .*expected a value of type bool"),
        (["dataloader.train.total_batch_size=3.5"], "total_batch_size is 3.5 in .*expected a value of type int"),
        (["train.device='${nothing.here}'"], "train.device of .*cannot be resolved"),
        (["distill=3"], "distill is 3 in .*expected a dict"),
        (["--eval-only"], "has no dataloader.evaluator: what is there to evaluate?"),
        (["train.output_dir=/proc/x"], "train.output_dir is '/proc/x', which cannot be written"),
        (["--distill", "NoDistiller"], "Unknown distiller 'NoDistiller' in distill.DISTILLERS"),
        (["--teacher-config", "nothing.py"], "'nothing.py' is neither a file nor a config"),
        (["--teacher-weights", "/nowhere.pth"], "teacher's weights '/nowhere.pth' cannot be read"),
    ],
)
def test_bad_input_ends_with_one_message(tmp_path, arguments, message, monkeypatch):
    import train_net

    given = ["--config-file", write_student(tmp_path), "--distill", "ReviewDistiller", *teacher_arguments(tmp_path)]
    parsed = train_net.argument_parser().parse_args([*given, *arguments])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        loads = "init_checkpoint" in arguments[0]
        loader = (lambda self: []) if loads else (lambda self: pytest.fail("data was loaded"))
        patch.setattr(train_net.Trainer, "build_train_loader", loader)
        train_net.run(parsed)
    text = str(exit_.value)
    assert text.startswith("error: ") and all(part in text for part in message.split(".*")), text


@pytest.mark.parametrize(
    "content, message",
    [
        ("model = dict(", "SyntaxError"),
        ("raise RuntimeError('no data here')", "RuntimeError: no data here (at "),
        ("from .nothing import model", "ImportError"),
        ("weights = 3", "has no model"),
    ],
)
def test_a_program_that_fails_is_named(tmp_path, content, message):
    import train_net

    (tmp_path / "student.py").write_text(content)
    with pytest.raises(SystemExit) as exit_:
        train_net.run(train_net.argument_parser().parse_args(["--config-file", str(tmp_path / "student.py")]))
    assert message in str(exit_.value) and "student.py" in str(exit_.value)


def test_a_config_without_a_schedule_is_refused_for_training(tmp_path):
    import train_net

    for more, message in (
        ("del optimizer, lr_multiplier\n", "has no optimizer, no lr_multiplier: a training takes the nodes"),
        ("train.log_period = 0\n", "train.log_period is 0: expected a number of iterations above 0"),
    ):
        path = write_student(tmp_path, more=more)
        with pytest.raises(SystemExit, match=message):
            train_net.run(train_net.argument_parser().parse_args(["--config-file", path]))


def test_a_student_at_half_the_size_in_python(tmp_path, caplog):
    names, values = write_yaml_teacher(tmp_path)
    opts = [override(f"distill.{key}", value) for key, value in zip(("TEACHER.CONFIG_FILE", "TEACHER.WEIGHTS"), values)]
    opts += ["distill.DISTILLERS=[AlignedDistiller]", "distill.STUDENT.INPUT_SCALE=0.5", "train.device=cpu"]
    path = write_student(tmp_path)
    with pytest.raises(DistillError, match="64, but at DISTILL.STUDENT.INPUT_SCALE 0.5 .* 32 pixels at most") as error:
        LazyRecipe(path, opts).build_model()
    assert "the short_edge_length in dataloader.test.mapper" in translate_message(str(error.value))
    half = "dataloader.test.mapper.augmentations[0].update(short_edge_length=32, max_size=32)\n"
    recipe = LazyRecipe(write_student(tmp_path, more=half), opts)
    assert isinstance(recipe.build_model(), DistillationModel) and names
    image = recipe.build_mapper(keep_annotations=True, scale=2)(recipe.training_images()[0])
    assert max(image["image"].shape[1:]) == 64 and len(image["instances"]) > 0  # as the teacher sees it
    exported = recipe.plain()
    assert exported.cfg.INPUT.MIN_SIZE_TRAIN == (32,) and not exported.is_distilled
    flip = "import detectron2.data.transforms as T\nfrom detectron2.config import LazyCall\n"
    flip += "dataloader.train.mapper.augmentations.append(LazyCall(T.RandomFlip)(horizontal=True))\n"  # as COCO's
    undumped = "model.roi_heads.box_head.conv_norm = lambda channels: None\n"
    recipe = LazyRecipe(write_student(tmp_path, more=half + flip + undumped), opts)
    (tmp_path / "out").mkdir()
    written = recipe.plain().write(str(tmp_path / "out"), "w.pth")
    assert written.endswith("config.py")
    first, last = LazyConfig.load(written).dataloader.train.mapper.augmentations
    assert (first.short_edge_length, first.max_size) == (32, 32) and "short_edge_length" not in last
    crop = "import detectron2.data.transforms as T\nfrom detectron2.config import LazyCall\n"
    crop += (
        "dataloader.train.mapper.augmentations.append(LazyCall(T.RandomCrop)(crop_type='absolute', crop_size=(9, 9)))\n"
    )
    plain = LazyRecipe(write_student(tmp_path, more=half + crop), opts).plain()
    assert "those of RandomCrop cannot be: expected ResizeShortestEdge" in caplog.text
    assert plain.cfg.INPUT.MIN_SIZE_TRAIN == (64,)


def test_an_optimizers_state_of_detectron2s_own_trainer_is_taken_over(tmp_path):
    path = write_student(tmp_path, more="train.device = 'cpu'\n")
    trainer = Trainer(load_recipe(path))
    trainer.train()
    state = {"iteration": 1, "optimizer": trainer.optimizer.state_dict()}  # as SimpleTrainer.state_dict has it
    assert state["optimizer"]["state"]
    other = Trainer(load_recipe(path))
    other.load_state_dict(state)
    momenta = [x["momentum_buffer"] for x in other.optimizer.state_dict()["state"].values()]
    assert momenta and any(x.abs().max() > 0 for x in momenta) and other.iter == 1


def test_numbers_of_a_python_config_in_yaml_keys(tmp_path):
    path = write_student(tmp_path, more="train.eval_period, dataloader.train.mapper.image_format = 70, 'RGB'\n")
    recipe = load_recipe(
        path,
        [
            "train.max_iter=300",
            "dataloader.train.total_batch_size=6",
            "train.device=cpu",
            "train.accumulate=4",
            "train.best_metric=segm/AP",
            "train.amp.precision=bfloat16",
        ],
    )
    cfg = recipe.cfg
    assert (cfg.SOLVER.ACCUMULATE, cfg.TEST.BEST_METRIC, cfg.SOLVER.AMP.PRECISION) == (4, "segm/AP", "bfloat16")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (300, 6, 0.001)
    assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, recipe.max_checkpoints) == (70, 5000, 100)
    assert cfg.DATASETS.TRAIN == ("digit_scenes_train",) and cfg.DATASETS.TEST == ("digit_scenes_val",)
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10
    assert cfg.INPUT.FORMAT == "RGB" and cfg.INPUT.MIN_SIZE_TEST == 64 and cfg.SEED == 1
    assert recipe.ddp_settings == {
        "broadcast_buffers": False,
        "find_unused_parameters": False,
        "fp16_compression": False,
    }


@pytest.mark.parametrize(
    "more, expected",
    [
        ("", "BGR"),
        ("dataloader = {}\nmodel.input_format = 'RGB'\n", "RGB"),
        ("dataloader = {}\ndel model.input_format\n", "BGR"),
    ],
)
def test_the_order_of_channels(tmp_path, more, expected):
    assert expected == LazyRecipe(write_student(tmp_path, more=more)).cfg.INPUT.FORMAT


def test_rules_on_the_names_of_weights_see_the_students_own(tmp_path):
    paths = dict(zip(("CONFIG_FILE", "WEIGHTS"), write_yaml_teacher(tmp_path)[1]))
    opts = [override(f"distill.TEACHER.{key}", value) for key, value in paths.items()]
    recipe = LazyRecipe(write_student(tmp_path), [*opts, "distill.DISTILLERS=[ReviewDistiller]", "train.device=cpu"])
    model = recipe.build_model()
    assert isinstance(model, DistillationModel)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    given = [id(p) for group in recipe.build_optimizer(model).param_groups for p in group["params"]]
    assert len(given) == len(set(given)) and set(given) == trained
    recipe.lazy.optimizer = {"_target_": lambda params: params.model, "params": {}}
    seen = dict(recipe.build_optimizer(model).named_parameters())
    own = dict(model.student.named_parameters())
    assert {name for name in seen if not name.startswith("distillers.")} == own.keys()
    assert all(seen[name] is weight for name, weight in own.items())


def test_messages_speak_of_the_keys_of_a_python_config():
    message = "SOLVER.MAX_ITER is 0 and DISTILL.BALANCE 2, MODEL.WEIGHTS names it; MY.SOLVER.MAX_ITER and SEEDS stay"
    assert translate_message(message) == (
        "train.max_iter is 0 and distill.BALANCE 2, train.init_checkpoint names it; MY.SOLVER.MAX_ITER and SEEDS stay"
    )


def test_overrides_are_quoted(tmp_path):
    config = LazyConfig.apply_overrides(
        LazyConfig.load(write_student(tmp_path)), [override("a.b", "it's, {a} = \\ b"), override("c", ["x/y z", "w"])]
    )
    assert config.a.b == "it's, {a} = \\ b" and json.dumps(list(config.c)) == '["x/y z", "w"]'


@pytest.mark.parametrize("asked", [{"keep_annotations": True}, {"scale": 2}])
def test_a_test_mapper_without_augmentations_cannot_be_changed(tmp_path, asked):
    own = "from detectron2.config import LazyCall\ndataloader.test.mapper = LazyCall(Own)()\n"
    own = "class Own:\n    def __call__(self, record):\n        return record\n" + own
    recipe = LazyRecipe(write_student(tmp_path, more=own), ["train.device=cpu"])
    assert recipe.build_mapper()({"file_name": "a"}) == {"file_name": "a"}
    with pytest.raises(DistillError, match="dataloader.test.mapper of .*py has no augmentations"):
        recipe.build_mapper(**asked)
