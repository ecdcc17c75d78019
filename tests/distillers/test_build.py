"""Which distillers are built, on which levels, and the errors of a wrong choice."""

import sys

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from distill.config import load_config
from distill.distillers import DISTILLER_REGISTRY, build_adaptation, build_distillers, shared_levels
from distill.distillers.build import DistillerRegistry, distiller_names
from distill.errors import DistillError
from distill.modeling.teacher import teacher_recipe
from tests.helpers import detector_cfg, set_all


def shapes(*levels: str, stride_factor: int = 1) -> dict[str, ShapeSpec]:
    return {level: ShapeSpec(channels=8, stride=stride_factor * 2 ** int(level[1:])) for level in levels}


@pytest.mark.parametrize(
    "name", ["ReviewDistiller", "reviewdistiller", "Review", "review", "REVIEW", "review/x", "ReviewDistiller/x"]
)
def test_names_need_neither_case_nor_ending(name):
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": [name, "fgd", "crosskd/Y"]})
    cfg.DISTILL.VARIANTS.x = CfgNode({"REVIEW": {"LOSS_WEIGHT": 2}})
    cfg.DISTILL.VARIANTS.Y = CfgNode()
    names = ["ReviewDistiller" + "/x" * name.endswith("/x"), "FGDDistiller", "CrossKDDistiller/Y"]
    assert distiller_names(cfg) == names
    cfg.DISTILL.DISTILLERS = [name, "ReviewDistiller" + "/x" * name.endswith("/x")]
    with pytest.raises(DistillError, match=f"names '{names[0]}' 2 times"):
        build_distillers(cfg, shapes("p3"), shapes("p3"))
    cfg.DISTILL.DISTILLERS = [name]
    distillers = build_distillers(cfg, shapes("p3"), shapes("p3"))
    assert list(distillers) == names[:1] and distillers[names[0]].loss_weight == (2.0 if "/x" in name else 1.0)


def test_a_registered_name_that_differs_in_case_alone_is_written_out():
    registry = DistillerRegistry("TEST")
    for name in ("Mine", "MineDistiller", "mine"):
        registry._do_register(name, type(name, (), {}))
    assert [registry.resolve(x) for x in ("Mine", "mine", "MINE", "mineDistiller")] == [
        *("Mine", "mine", "MINE", "mineDistiller")  # the latter two are ambiguous, so unknown
    ]


def test_levels_default_to_those_shared_finest_first():
    student, teacher = shapes("p3", "p4", "p5", "p6", "p7"), shapes("p2", "p3", "p4", "p5", "p6")
    assert shared_levels([], student, teacher, "KEY") == ["p3", "p4", "p5", "p6"]
    assert shared_levels(["p5", "p3"], student, teacher, "KEY") == ["p3", "p5"]


def test_a_level_that_one_side_lacks_is_named_with_those_it_has():
    with pytest.raises(DistillError, match=r"KEY asks for p2, which the student does not have: it has p3, p4\."):
        shared_levels(["p2", "p3"], shapes("p3", "p4"), shapes("p2", "p3"), "KEY")
    with pytest.raises(DistillError, match=r"p7, which the teacher does not have: it has p2, p3\."):
        shared_levels(["p7"], shapes("p3", "p7"), shapes("p2", "p3"), "KEY")
    with pytest.raises(DistillError, match="share no level: the student has p3, the teacher res4"):
        shared_levels([], shapes("p3"), {"res4": ShapeSpec(channels=8, stride=16)}, "KEY")


def test_other_strides_point_to_aligned_distillation():
    with pytest.raises(DistillError, match="p3 has stride 16 in the student and 8 in the teacher.*INPUT_SCALE 0.5"):
        shared_levels([], shapes("p3", stride_factor=2), shapes("p3"), "KEY")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"DISTILL.DISTILLERS": ["ReviewDistill"]},
            "Unknown distiller 'ReviewDistill'.*Registered are: .*ReviewDistiller",
        ),
        # no name is near: only the ending, which all share, makes it look like MGDDistiller
        ({"DISTILL.DISTILLERS": ["kd"]}, r"Unknown distiller 'kd' in DISTILL.DISTILLERS\. Registered are"),
        ({"DISTILL.DISTILLERS": []}, "DISTILL.DISTILLERS and .*INHERIT are both empty.*ReviewDistiller"),
        ({"DISTILL.DISTILLERS": ["ReviewDistiller"] * 2}, "names 'ReviewDistiller' 2 times"),
        ({"DISTILL.IMPORTS": ["no_such_module"]}, "'no_such_module', which cannot be imported"),
        ({"DISTILL.REVIEW.LEVELS": ["p9"]}, "DISTILL.REVIEW.LEVELS asks for p9"),
        ({"DISTILL.REVIEW.CRITERION": "KL"}, "DISTILL.REVIEW.CRITERION is 'KL': expected 'HCL' or 'SSIM'"),
        ({"DISTILL.REVIEW.POOL_SIZES": [0, 4, 2, 1]}, r"POOL_SIZES is \[0, 4, 2, 1\]: expected sizes of at least 1"),
        ({"DISTILL.REVIEW.MID_CHANNELS": 0}, "MID_CHANNELS is 0: expected at least 1"),
        ({"DISTILL.REVIEW.NORM": "Bn"}, "DISTILL.REVIEW.NORM is 'Bn': expected one of Detectron2's"),
        ({"DISTILL.REVIEW.NORM": "GN", "DISTILL.REVIEW.MID_CHANNELS": 8}, "'GN' where 32 divides the channels.* 8"),
        ({"DISTILL.REVIEW.DECAY": 1.5}, "ReviewDistiller: DECAY is 1.5, expected the part"),
        (
            {"DISTILL.STRUCTURAL.SCALE": "max"},
            "STRUCTURAL.SCALE is 'max': expected one of own_minmax, minmax, standard",
        ),
        ({"DISTILL.STRUCTURAL.WINDOW_SIZE": 8}, "STRUCTURAL.WINDOW_SIZE is 8: expected an odd number"),
        ({"DISTILL.STRUCTURAL.SIGMA": 0.0}, "STRUCTURAL.SIGMA is 0.0: expected a number of cells above 0"),
        ({"DISTILL.STRUCTURAL.EXPONENTS": [1.0, -1.0, 0.0]}, "STRUCTURAL.EXPONENTS is .*: expected three numbers"),
        ({"DISTILL.STRUCTURAL.EXPONENTS": [1.0]}, "STRUCTURAL.EXPONENTS is .*: expected three numbers"),
        ({"DISTILL.STRUCTURAL.ADAPTATION": "5x5"}, "STRUCTURAL.ADAPTATION is '5x5': expected one of auto, 1x1, 3x3"),
        ({"DISTILL.IMITATION.NORM": "l3"}, "IMITATION.NORM is 'l3': expected one of l1, l2, smooth_l1"),
        ({"DISTILL.IMITATION.REGION": "box"}, "IMITATION.REGION is 'box': expected one of all, boxes, gaussian"),
    ],
)
def test_mistakes_are_named(overrides, message):
    cfg = detector_cfg("faster_rcnn")
    distillers = ["ReviewDistiller", "StructuralDistiller", "ImitationDistiller"]
    set_all(cfg, {"DISTILL.DISTILLERS": distillers, "DISTILL.REVIEW.CRITERION": "SSIM", **overrides})
    with pytest.raises(DistillError, match=message):
        build_distillers(cfg, shapes("p3"), shapes("p3"))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes and forgets a module with distillers of its own."""
    known = dict(DISTILLER_REGISTRY._obj_map)

    def write(code: str, name: str = "outside_distiller") -> None:
        (tmp_path / f"{name}.py").write_text(
            f"from distill.distillers import DISTILLER_REGISTRY, Distiller, ImitationDistiller\n{code}"
        )

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    DISTILLER_REGISTRY._obj_map.clear()
    DISTILLER_REGISTRY._obj_map.update(known)
    for name in ("outside_distiller", "other_distiller"):
        sys.modules.pop(name, None)


CLASS = """
class OutsideDistiller(Distiller):
    def __init__(self, cfg, student_shape, teacher_shape):
        super().__init__(**self.weight_settings(cfg.DISTILL.OUTSIDE) if "OUTSIDE" in cfg.DISTILL else {})
"""
REGISTERED = f"@DISTILLER_REGISTRY.register(){CLASS}"


def build(*distillers: str, imports: tuple[str, ...] = ("outside_distiller",), **overrides):
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": list(distillers), "DISTILL.IMPORTS": list(imports), **overrides})
    return build_distillers(cfg, shapes("p3", "p4"), shapes("p3", "p4"))


def test_a_module_outside_registers_by_import(outside):
    outside(REGISTERED)
    assert list(build("OutsideDistiller")) == ["OutsideDistiller"]


def test_a_distiller_that_was_not_registered_is_named_with_its_module(outside):
    outside(CLASS)
    with pytest.raises(
        DistillError, match=r"'OutsideDistiller' of module outside_distiller \(.*\) is not registered: add"
    ):
        build("OutsideDistiller")


def test_a_name_that_is_taken_is_named_with_both_modules(outside):
    outside(REGISTERED)
    outside(REGISTERED, "other_distiller")
    with pytest.raises(
        DistillError, match="'OutsideDistiller' of module other_distiller .*registered already, by module outside_dis"
    ):
        build("OutsideDistiller", imports=("outside_distiller", "other_distiller"))


def test_something_registered_that_is_no_distiller_is_refused(outside):
    outside("@DISTILLER_REGISTRY.register()\ndef OutsideDistiller(*args):\n    return 3\n")
    with pytest.raises(DistillError, match="OutsideDistiller in DISTILLER_REGISTRY builds a int: expected a subclass"):
        build("OutsideDistiller")


def test_a_module_brings_its_keys_before_the_config_is_read(outside, tmp_path, monkeypatch):
    outside(
        "from detectron2.config import CfgNode\nfrom distill.config import add_weight_config\n"
        "def add_config(cfg):\n    cfg.DISTILL.OUTSIDE = CfgNode()\n    add_weight_config(cfg.DISTILL.OUTSIDE, 3.0)\n"
        + REGISTERED
    )
    yaml = (
        "DISTILL: {DISTILLERS: [OutsideDistiller], IMPORTS: [outside_distiller], OUTSIDE: {DECAY: 0.5}}\nVERSION: 2\n"
    )
    (tmp_path / "base.yaml").write_text(yaml)
    (tmp_path / "child.yaml").write_text("_BASE_: base.yaml\nDISTILL: {OUTSIDE: {WARMUP_ITERS: 7}}\n")
    cfg = load_config(str(tmp_path / "child.yaml"), ["DISTILL.OUTSIDE.LOSS_WEIGHT", "2.0"])
    (distiller,) = build_distillers(cfg, shapes("p3"), shapes("p3")).values()
    assert (distiller.loss_weight, distiller.warmup_iters, distiller.decay) == (2.0, 7, 0.5)
    # what is written to OUTPUT_DIR reads back alike
    (tmp_path / "written.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "written.yaml")).DISTILL == cfg.DISTILL
    # and by the command line
    (tmp_path / "plain.yaml").write_text("VERSION: 2\n")
    opts = ["DISTILL.OUTSIDE.DECAY", "1.0", "DISTILL.IMPORTS", "['outside_distiller']"]
    assert load_config(str(tmp_path / "plain.yaml"), opts).DISTILL.OUTSIDE.DECAY == 1.0
    # and for the teacher's
    (tmp_path / "teacher.yaml").write_text("MODEL: {WEIGHTS: x.pth}\nDISTILL: {OUTSIDE: {DECAY: 0.25}}\nVERSION: 2\n")
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    assert teacher_recipe(cfg).cfg.DISTILL.OUTSIDE.DECAY == 0.25
    with pytest.raises(DistillError, match="Unknown key 'DISTILL.OUTSIDE.DECAI'.*nearest .*'DISTILL.OUTSIDE.DECAY'"):
        load_config(str(tmp_path / "written.yaml"), ["DISTILL.OUTSIDE.DECAI", "1.0"])


def test_an_error_in_a_users_module_keeps_its_traceback(outside, tmp_path):
    outside("import torch\ntorch.no_such_thing\n")
    (tmp_path / "c.yaml").write_text("DISTILL: {IMPORTS: [outside_distiller]}\nVERSION: 2\n")
    with pytest.raises(AttributeError, match="no_such_thing"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("imports", ["x", "3", "[3]", "{a: b}"])
def test_imports_that_are_no_list_of_names_are_refused(tmp_path, imports):
    (tmp_path / "c.yaml").write_text(f"DISTILL: {{IMPORTS: {imports}}}\nVERSION: 2\n")
    with pytest.raises(DistillError, match="IMPORTS"):
        load_config(str(tmp_path / "c.yaml"))


def test_modules_are_found_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "some_project").mkdir()
    (tmp_path / "some_project" / "part.py").write_text("def add_config(cfg):\n    cfg.DISTILL.PART = 5\n")
    (tmp_path / "c.yaml").write_text("DISTILL: {IMPORTS: [some_project.part], PART: 6}\nVERSION: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_config("c.yaml").DISTILL.PART == 6


def test_two_of_one_kind_have_settings_of_their_own():
    variants = CfgNode({"boxes": {"IMITATION": {"REGION": "boxes", "LOSS_WEIGHT": 5.0}}})
    distillers = build(
        "ImitationDistiller",
        "ImitationDistiller/boxes",
        imports=(),
        **{"DISTILL.VARIANTS": variants, "DISTILL.IMITATION.NORM": "l1"},
    )
    assert list(distillers) == ["ImitationDistiller", "ImitationDistiller/boxes"]
    first, second = distillers.values()
    assert (first.region, first.loss_weight, first.norm) == ("all", 1.0, "l1")
    assert (second.region, second.loss_weight, second.norm) == ("boxes", 5.0, "l1")


def test_variants_come_from_a_file_and_the_command_line(tmp_path):
    (tmp_path / "base.yaml").write_text("DISTILL: {VARIANTS: {fine: {REVIEW: {LEVELS: [p2]}}}}\nVERSION: 2\n")
    (tmp_path / "c.yaml").write_text("_BASE_: base.yaml\nDISTILL: {VARIANTS: {fine: {REVIEW: {NORM: GN}}}}\n")
    cfg = load_config(str(tmp_path / "c.yaml"), ["DISTILL.VARIANTS.fine.REVIEW.NORM", "BN"])
    assert cfg.DISTILL.VARIANTS.fine.REVIEW == {"LEVELS": ["p2"], "NORM": "BN"}
    (tmp_path / "d.yaml").write_text(
        "DISTILL: {VARIANTS: {fine: {REVIEW: {LOSS_WEIGHT: 2, LEVELS: p3}}}}\nVERSION: 2\n"
    )
    cfg = load_config(str(tmp_path / "d.yaml"), ["DISTILL.VARIANTS.fine.REVIEW.LOSS_WEIGHT", "0.5"])
    assert cfg.DISTILL.VARIANTS.fine.REVIEW == {"LEVELS": ["p3"], "LOSS_WEIGHT": 0.5}
    with pytest.raises(DistillError, match="'DISTILL.VARIANTS.new.REVIEW.NORM'.*A config file defines"):
        load_config(str(tmp_path / "c.yaml"), ["DISTILL.VARIANTS.new.REVIEW.NORM", "BN"])
    (tmp_path / "c.yaml").write_text("DISTILL: {VARIANTS: {2: {REVIEW: {NORM: GN}}}}\nVERSION: 2\n")
    with pytest.raises(DistillError, match="VARIANTS has the label 2, expected text: quote it"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    "names, variants, message",
    [
        (["ImitationDistiller/x"], {}, "names the variant 'x', but DISTILL.VARIANTS has: none"),
        (["ImitationDistiller/x"], {"y": {}}, "names the variant 'x', but DISTILL.VARIANTS has: y"),
        (
            ["ImitationDistiller/x"],
            {"x": {"IMITATION": {"REGIO": "all"}}},
            "Unknown key 'IMITATION.REGIO' in DISTILL.VARIANTS.x.*'IMITATION.REGION'",
        ),
        (
            ["ImitationDistiller/x.y"],
            {"x.y": {}},
            "'ImitationDistiller/x.y': expected NAME or NAME/LABEL",
        ),
        (["ImitationDistiller/"], {}, "'ImitationDistiller/': expected NAME or NAME/LABEL"),
        (["ImitationDistiller/x"], {"x": {"BALANCE": 1.0}}, "VARIANTS.x sets BALANCE, which is not a distiller's own"),
        (["ImitationDistiller/x"], {"x": {"TEACHER": {}}}, "VARIANTS.x sets TEACHER, which is not a distiller's own"),
        (["Imitations/x"], {"x": {}}, "Unknown distiller 'Imitations'"),
    ],
)
def test_mistakes_with_variants_are_named(names, variants, message):
    with pytest.raises(DistillError, match=message):
        build(*names, imports=(), **{"DISTILL.VARIANTS": CfgNode(variants)})


def test_inheriting_needs_no_distiller():
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": [], "DISTILL.STUDENT.INHERIT": ["backbone.fpn_"]})
    assert not build_distillers(cfg, shapes("p3"), shapes("p3"))


@pytest.mark.parametrize("kind", ["auto", "1x1", "3x3"])
def test_an_adaptation_starts_as_the_identity_where_channels_agree(kind):
    teacher = {"p3": ShapeSpec(channels=8, stride=8), "p4": ShapeSpec(channels=12, stride=16)}
    adaptation = build_adaptation(["p3", "p4"], shapes("p3", "p4"), teacher, kind)
    x = torch.randn(2, 8, 6, 7)
    torch.testing.assert_close(adaptation["p3"](x), x)
    assert adaptation["p4"](x).shape == (2, 12, 6, 7)
    assert isinstance(adaptation["p3"], torch.nn.Identity) == (kind == "auto")
    assert adaptation["p4"].kernel_size == ((3, 3) if kind == "3x3" else (1, 1))
