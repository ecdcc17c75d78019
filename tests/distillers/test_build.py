"""Which distillers are built, on which levels, and the errors of a wrong choice."""

import pytest
from detectron2.layers import ShapeSpec

from distill.distillers import build_distillers, shared_levels
from distill.errors import DistillError
from tests.helpers import detector_cfg, set_all


def shapes(*levels: str, stride_factor: int = 1) -> dict[str, ShapeSpec]:
    return {level: ShapeSpec(channels=8, stride=stride_factor * 2 ** int(level[1:])) for level in levels}


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
    with pytest.raises(
        DistillError, match="p3 has stride 16 in the student and 8 in the teacher.*aligned distillation"
    ):
        shared_levels([], shapes("p3", stride_factor=2), shapes("p3"), "KEY")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"DISTILL.DISTILLERS": ["ReviewDistill"]},
            "Unknown distiller 'ReviewDistill'.*Registered are: .*ReviewDistiller",
        ),
        ({"DISTILL.DISTILLERS": []}, "DISTILL.DISTILLERS and .*INHERIT are both empty.*ReviewDistiller"),
        ({"DISTILL.DISTILLERS": ["ReviewDistiller"] * 2}, "names 'ReviewDistiller' 2 times"),
        ({"DISTILL.IMPORTS": ["no_such_module"]}, "'no_such_module', which cannot be imported"),
        ({"DISTILL.REVIEW.LEVELS": ["p9"]}, "DISTILL.REVIEW.LEVELS asks for p9"),
    ],
)
def test_mistakes_are_named(overrides, message):
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": ["ReviewDistiller"], **overrides})
    with pytest.raises(DistillError, match=message):
        build_distillers(cfg, shapes("p3"), shapes("p3"))


def test_a_module_outside_registers_by_import(tmp_path, monkeypatch):
    (tmp_path / "outside_distiller.py").write_text(
        "from distill.distillers import DISTILLER_REGISTRY, Distiller\n"
        "@DISTILLER_REGISTRY.register()\n"
        "class OutsideDistiller(Distiller):\n"
        "    def __init__(self, cfg, student_shape, teacher_shape):\n"
        "        super().__init__()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": ["OutsideDistiller"], "DISTILL.IMPORTS": ["outside_distiller"]})
    assert list(build_distillers(cfg, shapes("p3"), shapes("p3"))) == ["OutsideDistiller"]


def test_inheriting_needs_no_distiller():
    cfg = detector_cfg("faster_rcnn")
    set_all(cfg, {"DISTILL.DISTILLERS": [], "DISTILL.STUDENT.INHERIT": ["backbone.fpn_"]})
    assert not build_distillers(cfg, shapes("p3"), shapes("p3"))
