"""Distillation of classifications: which boxes, which classes, which heads."""

import pytest
import torch
import torch.distributed as dist
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from distill.distillers.instances import mean_over_processes
from distill.errors import DistillError
from distill.losses import box_overlap, decoupled_divergence, quality_focal_loss, soft_label_divergence
from distill.modeling.classes import build_class_map
from tests.data.test_register import make_voc
from tests.distillers.test_cross_head import flat
from tests.distillers.test_global_knowledge import give_prototypes
from tests.distillers.test_methods import build_hooks, build_pair, step
from tests.helpers import detector_cfg, distillation_cfg, random_batch, write_teacher

LOGIT = {"DISTILL.DISTILLERS": ["LogitDistiller"]}
NODES = {"faster_rcnn": "MODEL.ROI_HEADS", "retinanet": "MODEL.RETINANET", "fcos": "MODEL.FCOS"}


def seven_class_pair(tmp_path, kind, classes, **overrides):
    given = write_teacher(tmp_path, detector_cfg(kind, **{f"{NODES[kind]}.NUM_CLASSES": 7}))
    overrides = {**LOGIT, "DISTILL.CLASS_MAP": classes, **overrides}
    return build_model(distillation_cfg(detector_cfg(kind), given, **overrides)).train()


@pytest.mark.parametrize("kind", ["KD", "DKD"])
@pytest.mark.parametrize("classes", [[], ["0=4", "2=1"]])
def test_a_box_heads_ground_truth_is_compared(tmp_path, kind, classes):
    settings = {"DISTILL.LOGIT.INSTANCES": "ground_truth", "DISTILL.LOGIT.KIND": kind, "DISTILL.LOGIT.TEMPERATURE": 2.0}
    if classes:
        model = seven_class_pair(tmp_path, "faster_rcnn", classes, **settings)
    else:
        model = build_pair(tmp_path, "faster_rcnn", names=["LogitDistiller"], **settings)
    batch = random_batch((64, 96), (61, 75))
    loss = step(model, batch)["loss_logit"]
    logits = []
    for detector in (model.student, model.teacher.model):
        features = detector.backbone(detector.preprocess_image(batch).tensor)
        heads = detector.roi_heads
        pooled = heads.box_pooler(
            [features[x] for x in heads.box_in_features], [x["instances"].gt_boxes for x in batch]
        )
        logits.append(heads.box_predictor(heads.box_head(pooled))[0])
    labels = torch.cat([x["instances"].gt_classes for x in batch])
    if classes:
        kept = labels != 1
        logits = logits[0][kept][:, [0, 2, 3]], logits[1][kept][:, [4, 1, 7]]
        labels = torch.tensor([{0: 0, 2: 1}[x] for x in labels[kept].tolist()])
    if kind == "KD":
        expected = soft_label_divergence(*logits, 2.0).mean()
    else:
        expected = decoupled_divergence(*logits, labels, 1.0, 0.25, 2.0).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("classes", [[], ["0=4", "2=1"]])
@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_bckd_compares_all_anchors_and_their_boxes(tmp_path, kind, classes):
    settings = {"DISTILL.LOGIT.KIND": "BCKD", "MODEL.FCOS.NORM": ""}
    if classes:
        model = seven_class_pair(tmp_path, kind, classes, **settings)
    else:
        model = build_pair(tmp_path, kind, names=["LogitDistiller"], **settings)
    batch = random_batch((64, 96), (61, 75))
    losses = step(model, batch)
    student = model.student
    logits, boxes = [], []
    for detector, number in ((student, 3), (model.teacher.model, 7 if classes else 3)):
        features = detector.backbone(detector.preprocess_image(batch).tensor)
        features = [features[x] for x in detector.head_in_features]
        with torch.no_grad():
            outputs = detector.head(features)
        logits.append(flat(outputs[0], number))
        anchors = torch.cat([x.tensor for x in detector.anchor_generator(features)])
        boxes.append(torch.stack([detector.box2box_transform.apply_deltas(x, anchors) for x in flat(outputs[1], 4)]))
    if classes:
        logits = logits[0][..., [0, 2]], logits[1][..., [4, 1]]
    scores = logits[1].sigmoid()
    anchors = student.anchor_generator(features)
    labels = torch.cat(student.label_anchors(anchors, [x["instances"] for x in batch])[0])
    positives = max(1, int(((labels >= 0) & (labels < 3)).sum()))
    expected = quality_focal_loss(logits[0], scores).sum() / positives
    torch.testing.assert_close(losses["loss_logit"], expected, rtol=1e-4, atol=1e-6)
    weights = (scores - logits[0].sigmoid()).abs().amax(2)
    expected = 4 * (weights * (1 - box_overlap(*boxes))).sum() / positives
    torch.testing.assert_close(losses["loss_logit_box"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", NODES)
def test_global_knowledge_takes_a_class_map_too(tmp_path, kind):
    overrides = {"DISTILL.DISTILLERS": ["GlobalKnowledgeDistiller"]}
    model = seven_class_pair(tmp_path, kind, ["0=4", "2=1"], **overrides)
    build_hooks(model)
    give_prototypes(model, classes=(0, 1, 2))
    batch = random_batch((64, 96), (61, 75))
    for index, x in enumerate(batch):
        x["instances"].gt_classes[:] = 2 * index
    detector = model.teacher.model
    scores = detector.roi_heads.box_predictor.cls_score if kind == "faster_rcnn" else detector.head.cls_score

    def response(number=None):
        torch.manual_seed(0)  # of sampled proposals
        with torch.no_grad():
            before = scores.bias.clone()
            if number is not None:
                scores.bias[number :: 8 if kind == "faster_rcnn" else 7] += 1
        loss = step(model, batch)["loss_response"]
        scores.bias.data.copy_(before)
        return loss

    assert response() > 0
    for number in range(7):  # only what is mapped counts
        assert (response(number) == response()) == (number not in (1, 4))


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_images_without_boxes_give_zero(tmp_path, kind):
    model = build_pair(tmp_path, kind, names=["LogitDistiller"])
    losses = step(model, random_batch((64, 96), boxes=0))
    assert losses["loss_logit"] == 0
    sum(losses.values()).backward()


def test_other_classes_are_refused_before_the_first_step(tmp_path):
    model = seven_class_pair(tmp_path, "faster_rcnn", [])
    with pytest.raises(DistillError, match="has 3 classes and the teacher 7.*DISTILL.CLASS_MAP"):
        build_hooks(model)
    model = seven_class_pair(tmp_path, "faster_rcnn", ["0=7"])
    with pytest.raises(DistillError, match="class 7 of the teacher, which has 7"):
        build_hooks(model)


def test_one_class_of_a_dense_head_is_refused(tmp_path):
    model = seven_class_pair(tmp_path, "retinanet", ["0=1"])
    with pytest.raises(DistillError, match="KIND KD compares classes .* one class only, without background: .* BCKD"):
        build_hooks(model)


def test_one_class_of_a_dense_head_has_no_response(tmp_path, caplog):
    model = seven_class_pair(tmp_path, "retinanet", ["0=1"], **{"DISTILL.DISTILLERS": ["GlobalKnowledgeDistiller"]})
    build_hooks(model)
    assert "there is one only, without background: the part is left out" in caplog.text
    give_prototypes(model, classes=(0, 1, 2))
    losses = step(model, random_batch((64, 96)))
    assert "loss_response" not in losses and losses["loss_global"] > 0


@pytest.mark.parametrize("name", ["LogitDistiller", "GlobalKnowledgeDistiller"])
def test_one_class_of_a_box_head_is_compared_with_background(tmp_path, name):
    model = seven_class_pair(tmp_path, "faster_rcnn", ["0=1"], **{"DISTILL.DISTILLERS": [name]})
    build_hooks(model)
    if name == "GlobalKnowledgeDistiller":
        give_prototypes(model, classes=(0, 1, 2))
    losses = step(model, random_batch((64, 96)))
    assert losses["loss_logit" if name == "LogitDistiller" else "loss_response"] > 0


@pytest.mark.parametrize("kind", ["KD", "BCKD"])
@pytest.mark.parametrize(
    "anchors",
    [
        {"SIZES": [[24], [48], [96], [192], [384]]},
        {"SIZES": [[14], [32], [64], [128], [256]]},  # a difference that is small beside the largest
        {"ASPECT_RATIOS": [[2.0, 1.0, 0.5]]},
        {"OFFSET": 0.5},
    ],
)
def test_anchors_that_mean_other_boxes_are_refused(tmp_path, kind, anchors):
    same = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]]}
    given = write_teacher(tmp_path, detector_cfg("retinanet", **same))
    for other in ({}, {f"MODEL.ANCHOR_GENERATOR.{key}": value for key, value in anchors.items()}):
        student = detector_cfg("retinanet", **same | other)
        model = build_model(distillation_cfg(student, given, **LOGIT, **{"DISTILL.LOGIT.KIND": kind}))
        if other:
            with pytest.raises(DistillError, match="The anchors of student and teacher differ in size"):
                build_hooks(model)
        else:
            build_hooks(model)


def test_points_are_not_compared_with_anchors(tmp_path):
    one = {"MODEL.ANCHOR_GENERATOR.SIZES": [[32]], "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]]}
    given = write_teacher(tmp_path, detector_cfg("retinanet", **one))
    model = build_model(distillation_cfg(detector_cfg("fcos"), given, **LOGIT))
    with pytest.raises(DistillError, match="differ in size"):
        build_hooks(model)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("classes", [[], ["0=2", "2=1"]])
@pytest.mark.parametrize("kind", ["KD", "DKD"])
def test_the_background_of_heads_that_train_with_sigmoids_is_not_compared(tmp_path, side, classes, kind):
    settings = {"DISTILL.LOGIT.KIND": kind, "DISTILL.CLASS_MAP": classes, "DISTILL.LOGIT.INSTANCES": "ground_truth"}
    model = build_pair(tmp_path, "faster_rcnn", names=["LogitDistiller"], **settings)
    batch = random_batch((64, 96), (61, 75))
    predictors = {
        name: x.roi_heads.box_predictor for name, x in (("student", model.student), ("teacher", model.teacher.model))
    }
    losses = []
    for has_sigmoids in (False, True):
        predictors[side].use_sigmoid_ce = has_sigmoids  # an attribute of Detectron2's newer heads
        for bias in (0.0, 3.0):
            predictors["teacher"].cls_score.bias.data[-1] = bias
            losses.append(step(model, batch)["loss_logit"])
    assert abs(losses[0] - losses[1]) > 1e-3
    assert losses[2] == losses[3] > 0


def test_students_that_train_on_predicted_boxes_are_compared_on_what_their_heads_saw(tmp_path):
    overrides = {"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True}
    model = build_pair(tmp_path, "faster_rcnn", names=["LogitDistiller"], teacher_channels=16, **overrides)
    model.student.load_state_dict(model.teacher.model.state_dict())
    model.student.roi_heads.box_predictor.bbox_pred.bias.data.fill_(2.0)  # predicted boxes are far from the proposals
    assert step(model, random_batch((64, 96), (61, 75)))["loss_logit"] < 1e-5  # both sides are the same


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("KIND", "CE", "KIND is 'CE': expected one of KD, DKD, BCKD"),
        ("INSTANCES", "all", "INSTANCES is 'all'"),
        ("TEMPERATURE", 0.0, "TEMPERATURE is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, key, value, message):
    with pytest.raises(DistillError, match=message):
        build_pair(tmp_path, "faster_rcnn", names=["LogitDistiller"], **{f"DISTILL.LOGIT.{key}": value})


@pytest.fixture
def named(tmp_path):
    """A config whose student knows cell, dog and person, and whose teacher is of COCO."""
    DatasetCatalog.register("classes_of_the_student", lambda: [])
    MetadataCatalog.get("classes_of_the_student").thing_classes = ["cell", "dog", "person"]
    cfg = detector_cfg("faster_rcnn", **{"DATASETS.TRAIN": ["coco_2017_train"]})
    cfg = distillation_cfg(detector_cfg("faster_rcnn"), write_teacher(tmp_path, cfg))
    cfg.DATASETS.TRAIN = ("classes_of_the_student",)
    yield cfg
    DatasetCatalog.remove("classes_of_the_student")
    MetadataCatalog.remove("classes_of_the_student")


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([], None),
        (["names"], {1: 16, 2: 0}),
        (["cell=dog", "person=person"], {0: 16, 2: 0}),
        (["cell=5"], {0: 5}),
        (["1=3", "0=2"], {1: 3, 0: 2}),
    ],
)
def test_class_maps(named, pairs, expected):
    named.DISTILL.CLASS_MAP = pairs
    assert build_class_map(named) == expected


@pytest.mark.parametrize("order, warned", [(["cell", "dog", "person"], 0), (["dog", "cell", "person"], 1), (["a"], 0)])
def test_other_names_without_a_map_are_warned_of(named, caplog, order, warned):
    DatasetCatalog.register("classes_of_the_teacher", lambda: [])
    MetadataCatalog.get("classes_of_the_teacher").thing_classes = order
    named.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", "['classes_of_the_teacher']"]
    assert build_class_map(named) is None
    assert caplog.text.count("Class 0 is 'cell' in the student's dataset and 'dog' in the teacher's.") == warned
    DatasetCatalog.remove("classes_of_the_teacher")
    MetadataCatalog.remove("classes_of_the_teacher")


def test_the_teachers_config_says_where_its_classes_have_their_names(named, tmp_path):
    make_voc(tmp_path / "old")
    entry = f"classes_of_its_own=voc:{tmp_path}/old:train:person,cell"
    named.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", "['classes_of_its_own']", "DATASETS.REGISTER", str([entry])]
    named.DISTILL.CLASS_MAP = ["names"]
    assert build_class_map(named) == {0: 1, 2: 0}


def test_another_dataset_by_the_same_name_does_not_name_the_teachers_classes(named, caplog):
    named.DATASETS.REGISTER = ["classes_of_the_student=voc:/new:train"]
    own = ["DATASETS.TRAIN", "['classes_of_the_student']", "DATASETS.REGISTER"]
    for entry, is_same in (("voc:/new:train", True), ("voc:/old:train", False)):
        named.DISTILL.TEACHER.OPTS = [*own, str([f"classes_of_the_student={entry}"])]
        named.DISTILL.CLASS_MAP = []
        assert build_class_map(named) is None and not caplog.text
        named.DISTILL.CLASS_MAP = ["names"]
        if is_same:
            assert build_class_map(named) == {0: 0, 1: 1, 2: 2}
        else:
            with pytest.raises(DistillError, match="those of the teacher are not known, .* config registers it"):
                build_class_map(named)


def test_a_digit_that_is_the_name_of_a_class_is_that_name(named):
    MetadataCatalog.get("classes_of_the_student").thing_classes[:] = ["1", "2", "0"]
    named.DISTILL.CLASS_MAP = ["1=1", "2=7"]  # COCO's names are none
    assert build_class_map(named) == {0: 1, 1: 7}
    named.DATASETS.TRAIN = ("nowhere",)
    assert build_class_map(named) == {1: 1, 2: 7}


@pytest.mark.parametrize(
    "pairs, message",
    [
        (["cell"], r"CLASS_MAP is \['cell'\]: expected \[\]"),
        (["cell=dog=2"], "expected"),
        (["cat=cat"], "names the class 'cat': expected one of cell, dog, person"),
        (["cell=dog", "dog=dog"], "names a class twice"),
        (["0=1", "0=2"], "names a class twice"),
    ],
)
def test_class_maps_that_mean_nothing_are_refused(named, pairs, message):
    named.DISTILL.CLASS_MAP = pairs
    with pytest.raises(DistillError, match=message):
        build_class_map(named)


def test_names_that_are_not_known_are_refused(named):
    named.DISTILL.CLASS_MAP = ["names"]
    MetadataCatalog.get("classes_of_the_student").thing_classes[:] = ["cell", "nucleus"]
    with pytest.raises(DistillError, match="no class of the student is called as one of the teacher's"):
        build_class_map(named)
    named.DATASETS.TRAIN = ("nowhere",)
    with pytest.raises(DistillError, match="those of the student are not known.*'nowhere'"):
        build_class_map(named)


@pytest.mark.parametrize("own, other, expected", [(3, 5, 4.0), (1, 0, 0.5), (0, 0, 0.5)])
def test_the_mean_over_processes_is_that_of_one_with_all_images(monkeypatch, own, other, expected):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(other))
    for number in (own, torch.tensor(own)):
        assert mean_over_processes(number, torch.device("cpu")) == expected
