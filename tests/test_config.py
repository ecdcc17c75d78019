"""How configs are read, and the errors of a bad one."""

import pytest
from detectron2.config import get_cfg

from distill.config import load_config, plain_config, student_config
from distill.errors import DistillError
from tests.helpers import detector_cfg, distillation_cfg


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_zoo_name_is_read_with_its_unsafe_tag():
    cfg = load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["SOLVER.MAX_ITER", "7"])
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0][0] == 32 and cfg.SOLVER.MAX_ITER == 7


def test_a_users_python_tag_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    path = write(tmp_path / "bad.yaml", f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{canary}"]\nVERSION: 2\n')
    with pytest.raises(DistillError, match="bad.yaml is not safe YAML.*refused"):
        load_config(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("DISTILL: {DISTILLER: [A]}", "Unknown key 'DISTILL.DISTILLER' .*nearest existing key is 'DISTILL.DISTILLERS'"),
        ("SOLVER: {BASE_LRR: 1.0}", "Unknown key 'SOLVER.BASE_LRR' .*'SOLVER.BASE_LR'"),
        ("SOLVER: {MAX_ITER: many}", "MAX_ITER"),
        ("SOLVER: [", "not valid YAML"),
        ("_BASE_: nope.yaml", "Cannot use config .*nope.yaml"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(DistillError, match=message):
        load_config(write(tmp_path / "c.yaml", text + "\nVERSION: 2\n"))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.MAXITER", "3"], "'SOLVER.MAXITER' in the overrides.*'SOLVER.MAX_ITER'"),
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.MAX_ITER", "x"], "MAX_ITER"),
        (["SOLVER.BASE_LR.X", "3"], "Cannot use the overrides"),
        (["DISTILL.BALANCE", "1"], "DISTILL.BALANCE. Write the number with a point"),
        (["DISTILL.IMPORTS", "['name'"], "DISTILL.IMPORTS is .*: expected a list of modules"),
        (["DISTILL.IMPORTS", "name"], "DISTILL.IMPORTS is 'name': expected a list of modules"),
    ],
)
def test_mistakes_on_the_command_line_are_named(opts, message):
    with pytest.raises(DistillError, match=message):
        load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", opts)


def test_a_file_that_holds_no_mapping(tmp_path):
    for text in ("", "- 1\n"):
        with pytest.raises(DistillError, match="Cannot use config"):
            load_config(write(tmp_path / "c.yaml", text))


def test_a_missing_file_is_named():
    with pytest.raises(DistillError, match="'nowhere.yaml' is neither a file nor a config of .*zoo"):
        load_config("nowhere.yaml")


def test_plain_config_is_one_that_plain_detectron2_reads(tmp_path):
    cfg = plain_config(distillation_cfg(detector_cfg("retinanet"), {}))
    path = write(tmp_path / "plain.yaml", cfg.dump())
    plain = get_cfg()
    plain.merge_from_file(path, allow_unsafe=False)
    assert plain.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_student_config_leaves_a_plain_config_as_it_is():
    cfg = detector_cfg("retinanet")
    assert student_config(cfg) == cfg
