"""The teacher is fully loaded, or it is an error that says why."""

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from distill.errors import DistillError
from distill.modeling import build_teacher
from distill.modeling.checkpoint import WeightsCheckpointer
from distill.modeling.teacher import teacher_recipe
from tests.engine.test_trainer import OneBatchTrainer
from tests.helpers import detector_cfg, distillation_cfg, random_batch, set_all, write_teacher


@pytest.fixture
def cfg(tmp_path):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn"))
    return distillation_cfg(detector_cfg("faster_rcnn"), overrides)


def edit_weights(cfg, edit):
    """Loads the teacher's state dict, edits it in place and writes it back."""
    path = cfg.DISTILL.TEACHER.WEIGHTS
    state = torch.load(path)["model"]
    edit(state)
    torch.save({"model": state}, path)


def test_loads_every_weight(cfg):
    teacher = build_teacher(cfg)
    for key, value in torch.load(cfg.DISTILL.TEACHER.WEIGHTS)["model"].items():
        assert torch.equal(value, teacher.model.state_dict()[key])


def test_the_teacher_of_a_distilled_run_is_its_student(cfg, tmp_path):
    distilled = build_model(cfg)
    torch.save({"model": distilled.state_dict()}, tmp_path / "distilled.pth")
    (tmp_path / "distilled.yaml").write_text(cfg.dump())
    set_all(cfg, {"DISTILL.TEACHER.CONFIG_FILE": str(tmp_path / "distilled.yaml")})
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": str(tmp_path / "distilled.pth")})
    teacher = build_teacher(cfg)
    assert torch.equal(teacher.model.backbone.fpn_lateral2.weight, distilled.student.backbone.fpn_lateral2.weight)


def test_zoo_config_without_weights_takes_the_zoos(cfg):
    name = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    set_all(cfg, {"DISTILL.TEACHER.CONFIG_FILE": name, "DISTILL.TEACHER.WEIGHTS": ""})
    assert teacher_recipe(cfg).cfg.MODEL.WEIGHTS.endswith("/137851257/model_final_f6e8b1.pkl")


@pytest.mark.parametrize(
    "name, opts",
    [
        ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", ["MODEL.WEIGHTS", "mine.pth"]),
        ("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py", ["train.init_checkpoint=mine.pth"]),
    ],
)
def test_weights_among_the_overrides_count(cfg, name, opts):
    values = {"CONFIG_FILE": name, "WEIGHTS": "", "OPTS": opts}
    set_all(cfg, {f"DISTILL.TEACHER.{key}": value for key, value in values.items()})
    assert teacher_recipe(cfg).cfg.MODEL.WEIGHTS == "mine.pth"


def test_a_teacher_that_learned_from_scaled_images_is_warned_of(cfg, tmp_path, caplog):
    for scale in (1.0, 0.5):
        set_all(cfg, {"DISTILL.STUDENT.INPUT_SCALE": scale})
        (tmp_path / f"{scale}.yaml").write_text(cfg.dump())
        other = cfg.clone()
        set_all(other, {"DISTILL.TEACHER.CONFIG_FILE": str(tmp_path / f"{scale}.yaml")})
        teacher_recipe(other)
    assert caplog.text.count("learned from scaled images (DISTILL.STUDENT.INPUT_SCALE 0.5 of its own config)") == 1
    assert "1.0.yaml) learned" not in caplog.text


@pytest.mark.parametrize("wrap", [lambda x: {"state_dict": x}, lambda x: {"model": {**x, "step": 3}}])
def test_checkpoints_of_another_layout_are_one_error(cfg, wrap):
    path = cfg.DISTILL.TEACHER.WEIGHTS
    torch.save(wrap(torch.load(path)["model"]), path)
    with pytest.raises(DistillError, match="cannot be loaded: Unsupported type .*: expected a Detectron2 checkpoint"):
        build_teacher(cfg)


def test_overrides_reach_the_teacher_alone(cfg):
    set_all(cfg, {"DISTILL.TEACHER.OPTS": ["MODEL.FPN.OUT_CHANNELS", 24]})
    assert teacher_recipe(cfg).cfg.MODEL.FPN.OUT_CHANNELS == 24 and cfg.MODEL.FPN.OUT_CHANNELS == 16


def test_missing_keys_are_counted_and_named(cfg):
    edit_weights(cfg, lambda state: [state.pop(key) for key in list(state) if "fpn_lateral" in key])
    with pytest.raises(DistillError, match=r"8 are missing and 0 .*The first: backbone.fpn_lateral2.bias is missing"):
        build_teacher(cfg)


def test_other_shapes_are_counted_and_named(cfg):
    edit_weights(cfg, lambda state: state.update({"backbone.fpn_output2.weight": torch.zeros(1, 2, 3, 3)}))
    with pytest.raises(DistillError, match=r"0 are missing and 1 have another shape.*fpn_output2.weight is \(1, 2, 3"):
        build_teacher(cfg)


def test_weights_of_another_architecture_are_refused(cfg, tmp_path):
    other = write_teacher(tmp_path / "other", detector_cfg("retinanet"))
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": other["DISTILL.TEACHER.WEIGHTS"]})
    with pytest.raises(DistillError, match="very architecture") as error:
        build_teacher(cfg)
    assert str(error.value).count(" is ") <= 6  # five examples, not a list of hundreds


def test_a_backbone_alone_is_refused(cfg):
    edit_weights(cfg, lambda state: [state.pop(key) for key in list(state) if "bottom_up" not in key])
    with pytest.raises(DistillError, match="would not be fully loaded"):
        build_teacher(cfg)


def test_a_deeper_backbone_is_refused(cfg, tmp_path):
    deeper = write_teacher(tmp_path / "deeper", detector_cfg("faster_rcnn", depth=101))
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": deeper["DISTILL.TEACHER.WEIGHTS"]})
    with pytest.raises(DistillError, match=r"backbone are left over. The first: backbone.bottom_up.res4"):
        build_teacher(cfg)


def test_frozen_norms_that_would_be_filled_in_are_missing(cfg):
    edit_weights(cfg, lambda state: [state.pop(key) for key in list(state) if key.endswith("running_mean")])
    with pytest.raises(DistillError, match=r"52 are missing .*running_mean is missing"):
        build_teacher(cfg)


def test_a_head_that_the_teacher_does_not_have_may_be_left_over(cfg, tmp_path):
    masks = write_teacher(tmp_path / "masks", detector_cfg("mask_rcnn"))
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": masks["DISTILL.TEACHER.WEIGHTS"]})
    build_teacher(cfg)


def test_other_classes_are_fine_for_the_teacher(tmp_path):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn", **{"MODEL.ROI_HEADS.NUM_CLASSES": 9}))
    model = build_model(distillation_cfg(detector_cfg("faster_rcnn"), overrides)).train()
    assert model(random_batch((64, 96), (64, 96)))["loss_review"] > 0


@pytest.mark.parametrize("student, teacher, flips", [("BGR", "RGB", True), ("RGB", "RGB", False)])
def test_channels_are_flipped_where_they_differ(tmp_path, student, teacher, flips):
    overrides = write_teacher(tmp_path, detector_cfg("faster_rcnn", **{"INPUT.FORMAT": teacher}))
    cfg = distillation_cfg(detector_cfg("faster_rcnn", **{"INPUT.FORMAT": student}), overrides)
    assert build_teacher(cfg).flip_channels == flips
    set_all(cfg, {"INPUT.FORMAT": "L"})
    with pytest.raises(DistillError, match="INPUT.FORMAT is L"):
        build_teacher(cfg)


def test_missing_file(cfg):
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": "/nowhere/model.pth"})
    with pytest.raises(DistillError, match="'/nowhere/model.pth' cannot be read"):
        build_teacher(cfg)


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_file(cfg, keep):
    path = cfg.DISTILL.TEACHER.WEIGHTS
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[: int(len(content) * keep) if keep < 1 else keep])
    with pytest.raises(DistillError, match=r"teacher.pth' are not a readable checkpoint.*truncated"):
        build_teacher(cfg)


class Exploit:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pth_that_would_run_code_is_refused(cfg, capsys):
    torch.save({"model": {"a": torch.zeros(1)}, "x": Exploit()}, cfg.DISTILL.TEACHER.WEIGHTS)
    with pytest.raises(DistillError, match="not a readable checkpoint"):
        build_teacher(cfg)
    with open(cfg.DISTILL.TEACHER.WEIGHTS, "wb") as f:
        pickle.dump(Exploit(), f)
    with pytest.raises(DistillError, match="not a readable checkpoint"):
        build_teacher(cfg)
    assert "executed" not in capsys.readouterr().out


def test_a_pkl_that_would_run_code_is_refused(cfg, capsys, tmp_path):
    path = str(tmp_path / "teacher.pkl")
    state = {key: value.numpy() for key, value in torch.load(cfg.DISTILL.TEACHER.WEIGHTS)["model"].items()}
    set_all(cfg, {"DISTILL.TEACHER.WEIGHTS": path})
    for protocol in (2, 4):  # as in Detectron2's model zoo, old and new
        content = {"model": collections.OrderedDict(state), "__author__": "us", "number": np.float32(1)}
        Path(path).write_bytes(pickle.dumps(content, protocol))
        found = build_teacher(cfg).model.state_dict()
        assert all(np.array_equal(found[key].numpy(), value) for key, value in state.items())
        Path(path).write_bytes(pickle.dumps({"model": state, "x": Exploit()}, protocol))
        with pytest.raises(DistillError, match="teacher.pkl' are not read: it would run .*builtin.*.print"):
            build_teacher(cfg)
        student = detector_cfg("faster_rcnn", **{"MODEL.WEIGHTS": path, "OUTPUT_DIR": str(tmp_path / "out")})
        with pytest.raises(DistillError, match="teacher.pkl' are not read: it would run .*builtin.*.print"):
            OneBatchTrainer(student).resume_or_load(resume=False)
    hidden = tmp_path / "teacher.pth?f=.pkl"  # Detectron2 v0.6 goes by the ending of the whole
    hidden.write_bytes(Path(path).read_bytes())
    with pytest.raises((AssertionError, ValueError)):  # as v0.6 or main puts it; the last line is what counts
        WeightsCheckpointer(torch.nn.Linear(1, 1)).load(str(hidden))
    Path(path).write_bytes(b"nothing")
    with pytest.raises(DistillError, match="teacher.pkl' are not read"):
        build_teacher(cfg)
    assert "executed" not in capsys.readouterr().out


def test_a_file_without_a_state_dict_is_refused(cfg):
    torch.save({"model": {}}, cfg.DISTILL.TEACHER.WEIGHTS)
    with pytest.raises(DistillError, match="hold no state dict"):
        build_teacher(cfg)


@pytest.mark.parametrize("key", ["CONFIG_FILE", "WEIGHTS"])
def test_an_empty_key_is_named(cfg, key):
    set_all(cfg, {f"DISTILL.TEACHER.{key}": ""})
    with pytest.raises(DistillError, match=f"DISTILL.TEACHER.{key} is empty"):
        build_teacher(cfg)
