"""How configs are read, and the errors of a bad one."""

import contextlib

import pytest
import yaml
from detectron2.config import get_cfg

from distill.config import (
    add_distill_config,
    load_config,
    merge_distill_node,
    plain_config,
    records_kept,
    student_config,
)
from distill.errors import DistillError
from distill.recipes import as_recipe
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
        (["DISTILL.BALANCE", "True"], "Type mismatch .* for config key: DISTILL.BALANCE"),
        (["SOLVER.MAX_ITER", "1.5"], "Type mismatch .* for config key: SOLVER.MAX_ITER"),
        (["DATASETS.TEST", "{1: 2}"], "Type mismatch .* for config key: DATASETS.TEST"),
        (["SOLVER.STEPS", "60k"], "SOLVER.STEPS"),
        (["DISTILL.DISTILLERS", "5"], "DISTILL.DISTILLERS"),
        (["INPUT.CROP.SIZE", "512"], "INPUT.CROP.SIZE"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "10"], "BBOX_REG_WEIGHTS"),
        (["DISTILL.DISTILLERS", "[review, structural]"], "DISTILL.DISTILLERS"),
        (["MODEL.RPN.IN_FEATURES", "[p2, p3]"], "MODEL.RPN.IN_FEATURES"),
        (["MODEL.FPN.NORM", False], "MODEL.FPN.NORM"),
        (["DISTILL.IMPORTS", "['name'"], "DISTILL.IMPORTS is .*: expected a list of modules"),
        (["--num-gpus", "2"], "--num-gpus stands among the overrides .*: options come before them"),
        (["MODEL.NO_SUCH", "1"], "Unknown key .* Keys of your own come from a module in DISTILL.IMPORTS"),
        (["DISTILL.IMPORTS", "no_such_module"], "names the module 'no_such_module', which cannot be imported"),
    ],
)
def test_mistakes_on_the_command_line_are_named(opts, message):
    with pytest.raises(DistillError, match=message):
        load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", opts)


VALUES = {
    "DISTILL.BALANCE": ("1", 1.0),
    "SOLVER.BASE_LR": ("1", 1.0),
    "DATASETS.TEST": ("my_val", ("my_val",)),
    "SOLVER.STEPS": ("1000", (1000,)),
    "DISTILL.DISTILLERS": ("review", ["review"]),
    "DATASETS.TRAIN": ("", ()),
    "MODEL.FPN.IN_FEATURES": ("['res3']", ["res3"]),
    "DISTILL.REVIEW.LOSS_WEIGHT": ("2.5", 2.5),
    "SOLVER.MAX_ITER": ("7", 7),
    "DATASETS.CHECK": ("off", "off"),
    "DISTILL.REVIEW.POOL_SIZES": ("4", [4]),
    "TEST.AUG.MIN_SIZES": ("800", (800,)),
}


@pytest.mark.parametrize("way", ["overrides", "file", "without a version", "base", "python"])
def test_whole_numbers_and_single_values_are_taken(tmp_path, way):
    nested = {}
    for key, (text, _) in VALUES.items():
        *path, leaf = key.split(".")
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = yaml.safe_load(text) if text else ""
    base = {"VERSION": 2} if way != "without a version" else {}
    if way == "python":
        cfg = get_cfg()
        add_distill_config(cfg)
        merge_distill_node(cfg, nested["DISTILL"], "config.py")
    elif way == "overrides":
        given = [x for key, (text, _) in VALUES.items() for x in (key, text)]
        cfg = load_config(write(tmp_path / "c.yaml", "VERSION: 2\n"), given)
    else:
        path = write(tmp_path / "c.yaml", yaml.dump({**base, **nested}))
        cfg = load_config(write(tmp_path / "d.yaml", "_BASE_: c.yaml\n") if way == "base" else path)
    for key, (_, expected) in VALUES.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        if way != "python" or key.startswith("DISTILL."):
            assert node == expected and type(node) is type(expected), key


def test_an_old_config_is_still_upgraded(tmp_path):
    cfg = load_config(write(tmp_path / "c.yaml", "MODEL: {WEIGHT: old.pkl}\n"))
    assert cfg.MODEL.WEIGHTS == "old.pkl"


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


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("has_run", [True, False])
def test_a_training_that_fails_before_its_first_step_keeps_the_record_of_the_one_before(tmp_path, fails, has_run):
    (tmp_path / "config.yaml").write_text("before")
    if has_run:
        (tmp_path / "metrics.json").touch()
    with contextlib.suppress(KeyError), records_kept(str(tmp_path), is_training=True):
        (tmp_path / "config.yaml").write_text("after")
        (tmp_path / "config.py").write_text("after")
        if fails:
            raise KeyError
    is_kept = fails and has_run
    assert (tmp_path / "config.yaml").read_text() == ("before" if is_kept else "after")
    assert (tmp_path / "config.py").exists() == (not is_kept)


@pytest.mark.parametrize("name", ["config.yaml", "config.py"])
@pytest.mark.parametrize("is_training", [True, False])
def test_an_evaluation_keeps_the_record_of_a_training(tmp_path, name, is_training):
    (tmp_path / name).write_text("training")
    if is_training:
        (tmp_path / "metrics.json").touch()
    with records_kept(str(tmp_path)):
        (tmp_path / name).write_text("evaluation")
    assert (tmp_path / name).read_text() == ("training" if is_training else "evaluation")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "import no_such_library",
            "Importing 'own_module', .* raised ModuleNotFoundError: .*no_such_library.*, line 1",
        ),
        ("\nfrom math import no_such_name", "Importing 'own_module', .* raised ImportError: .*own_module.py, line 2"),
        (
            "from distill.data import register_datasets\nregister_datasets(['x=voc:nowhere:all'])",
            "^DATASETS.REGISTER, x: the folder 'nowhere' does not exist",
        ),
    ],
)
def test_a_module_that_fails_when_imported_is_not_called_missing(tmp_path, monkeypatch, content, message):
    (tmp_path / "own_module.py").write_text(content + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DistillError, match=message):
        load_config(write(tmp_path / "c.yaml", "DISTILL: {IMPORTS: [own_module]}\nVERSION: 2\n"))


def test_a_missing_package_of_a_module_is_the_modules_name():
    with pytest.raises(DistillError, match="'no_such_package.module', which cannot be imported"):
        load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["DISTILL.IMPORTS", "['no_such_package.module']"])


def test_a_recipe_is_made_of_a_yaml_config_alone():
    with pytest.raises(DistillError, match="got a dict.*load_recipe"):
        as_recipe({"model": {}})
