"""Collecting candidates from a dataset and searching prototypes, in one process and in two."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

from distill.data import register_from_config
from distill.engine import Trainer
from distill.errors import DistillError
from distill.losses import box_means
from distill.prototypes import select_prototypes
from distill.prototypes.collect import InstanceCollector, _slim_record, choose_images, large_annotations
from distill.prototypes.hook import PrototypeHook, find_prototypes
from distill.recipes import YamlRecipe
from tests.helpers import detector_cfg, distillation_cfg, run_script, set_all, write_teacher

NAME = "GlobalKnowledgeDistiller"


def write_coco(folder, num_images=10, boxes_per_image=6, size=None):
    """Images of noise with random boxes of three classes, of which some are small; returns the entry to register."""
    rng = np.random.default_rng()
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        height, width = size or rng.integers(100, 160, 2).tolist()
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for _ in range(boxes_per_image):
            w, h = rng.integers(8, 60, 2).tolist()
            x, y = rng.integers(0, width - w).item(), rng.integers(0, height - h).item()
            annotation = {"id": len(annotations) + 1, "image_id": i, "category_id": rng.integers(3).item() + 1}
            annotations.append({**annotation, "bbox": [float(v) for v in (x, y, w, h)], "area": w * h, "iscrowd": 0})
    categories = [{"id": k + 1, "name": f"class{k}"} for k in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return f"{folder.name}=coco:{folder}/annotations.json:{folder}/images"


def make_cfg(tmp_path, name, size=None, num_images=10, boxes_per_image=6, **overrides):
    entry = write_coco(tmp_path / name, num_images, boxes_per_image, size)
    student = detector_cfg(
        "faster_rcnn",
        depth=18,  # group norm wants 32 channels
        **{
            "DATASETS.REGISTER": [entry],
            "DATASETS.TRAIN": [name],
            "DATASETS.TEST": [],
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": [64],
            "INPUT.MIN_SIZE_TEST": 64,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": 4,
            "SOLVER.BASE_LR": 1e-4,
            "OUTPUT_DIR": str(tmp_path / "out"),
            "MODEL.RESNETS.NORM": "GN",  # random weights without a norm that works at once diverge
            "SEED": 5,
        },
    )
    return distillation_cfg(
        student,
        write_teacher(tmp_path, detector_cfg("faster_rcnn", channels=24)),
        **{
            "DISTILL.DISTILLERS": [NAME],
            "DISTILL.GLOBAL.NUM_PROTOTYPES": 3,
            "DISTILL.GLOBAL.DENSITY_SIGMA": 0.5,
            "DISTILL.GLOBAL.MIN_BOX_SIZE": 10,
            "DISTILL.GLOBAL.UPDATE_PERIOD": 3,
            **overrides,
        },
    )


def train(cfg, resume=False):
    register_from_config(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_prototypes_are_searched_before_training_and_every_period(tmp_path, monkeypatch):
    searched = []
    search = PrototypeHook.search
    monkeypatch.setattr(
        PrototypeHook, "search", lambda self: (searched.append(getattr(self.trainer, "iter", -1)), search(self))
    )
    trainer = train(make_cfg(tmp_path, "period", boxes_per_image=20, **{"SOLVER.MAX_ITER": 6}))
    assert searched == [0, 2]  # before the first step, after three; the sixth is the last
    bank = trainer.model.distillers[NAME].prototypes
    assert bank.searches == 2
    for level in ("p2", "p3", "p4", "p5", "p6"):
        student, teacher, labels = bank.at(level)
        assert student.shape == (len(labels), 16) and teacher.shape == (len(labels), 24)
        assert set(labels.tolist()) == {0, 1, 2} and max(labels.bincount()) <= 3
    assert trainer.model.training and trainer.model.student.training


def test_an_epoch_is_the_default_period(tmp_path):
    cfg = make_cfg(tmp_path, "epoch", **{"DISTILL.GLOBAL.UPDATE_PERIOD": 0, "SOLVER.MAX_ITER": 7})
    trainer = train(cfg)  # ten images, two in a batch: five steps
    assert trainer.model.distillers[NAME].prototypes.searches == 2
    cfg = make_cfg(tmp_path, "longer", **{"DISTILL.GLOBAL.UPDATE_PERIOD": 0, "SOLVER.MAX_ITER": 7})
    cfg.SOLVER.ACCUMULATE = 2  # two steps
    assert train(cfg).model.distillers[NAME].prototypes.searches == 4


def test_a_resumed_run_does_not_search_again(tmp_path, caplog):
    cfg = make_cfg(tmp_path, "resume", **{"DISTILL.GLOBAL.UPDATE_PERIOD": 100})
    before = train(cfg).model.distillers[NAME].prototypes
    cfg.SOLVER.MAX_ITER = 5
    resumed = train(cfg, resume=True)
    after = resumed.model.distillers[NAME].prototypes
    assert resumed.start_iter == 4 and after.searches == 1
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())


def test_a_resumed_run_with_other_settings_searches_anew(tmp_path):
    cfg = make_cfg(tmp_path, "other", **{"DISTILL.GLOBAL.UPDATE_PERIOD": 100})
    train(cfg)
    cfg.SOLVER.MAX_ITER, cfg.DISTILL.GLOBAL.NUM_PROTOTYPES = 5, 4  # the checkpoint's buffers do not fit
    bank = train(cfg, resume=True).model.distillers[NAME].prototypes
    assert not bank.is_empty and bank.searches == 2


def test_a_run_that_was_stopped_at_a_search_goes_on_as_if_it_was_not(tmp_path):
    settings = {"SOLVER.CHECKPOINT_PERIOD": 3, "SOLVER.MAX_ITER": 7, "SOLVER.BASE_LR": 0.0}
    cfg = make_cfg(tmp_path, "stopped", **settings)
    whole = train(cfg).model.distillers[NAME].prototypes.state_dict()
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000002.pth")
    resumed = train(cfg, resume=True)
    bank = resumed.model.distillers[NAME].prototypes
    assert resumed.start_iter == 3 and bank.searches == whole["searches"] == 3
    for key, value in bank.state_dict().items():
        if key.endswith(("student", "teacher", "labels")):
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-4)


def test_features_that_are_not_finite_are_named():
    instances = {"labels": torch.zeros(4).long(), "student.p2": torch.full((4, 2), torch.nan)}
    instances["teacher.p2"] = torch.zeros(4, 2)
    with pytest.raises(DistillError, match="prototypes of class 0 at p2: .*not all finite"):
        find_prototypes(instances, "p2", 1, {}, torch.device("cpu"))


def test_crowds_and_a_small_object_alone_are_a_warning(tmp_path, caplog):
    cfg = make_cfg(tmp_path, "crowds", **{"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False})
    path = tmp_path / "crowds" / "annotations.json"
    content = json.loads(path.read_text())
    for x in content["annotations"][1:]:
        x["iscrowd"] = 1
    content["annotations"][0]["bbox"] = [8, 8, 4, 4]
    path.write_text(json.dumps(content))
    caplog.set_level(logging.INFO, "distill")  # so that the trainer sets up no log of its own
    trainer = train(cfg)
    assert trainer.iter == 4 and any("No class has a prototype" in record.getMessage() for record in caplog.records)


def test_collected_rows_are_the_features_of_the_annotated_boxes(tmp_path):
    cfg = make_cfg(tmp_path, "rows", (120, 150))  # of one size, so that they are padded alike in any batch
    register_from_config(cfg)
    model = Trainer.build_model(cfg).train()
    state = torch.random.get_rng_state()
    collector = InstanceCollector(YamlRecipe(cfg), ["p2", "p4"], 800, 20)
    rows = collector.collect(model)
    assert torch.equal(torch.random.get_rng_state(), state)  # the training draws the same numbers
    images = YamlRecipe(cfg).training_images()
    expected = sorted(
        (i, x["category_id"], *x["bbox"])
        for i, image in enumerate(images)
        for x in image["annotations"]
        if min(x["bbox"][2] - x["bbox"][0], x["bbox"][3] - x["bbox"][1]) > 20  # pixels of the file
    )
    got = sorted(
        (i, label, *(round(v) for v in box))
        for i, label, box in zip(rows["images"].tolist(), rows["labels"].tolist(), rows["boxes"].tolist())
    )
    assert got == [tuple(round(v) for v in x) for x in expected] and len(got) < 60
    # one row by hand: the image resized as in testing, both sides in evaluation
    index = rows["images"][0].item()
    from detectron2.data import transforms as T
    from detectron2.data.detection_utils import read_image

    pixels = read_image(images[index]["file_name"], "BGR")
    resized = T.AugInput(pixels)
    T.ResizeShortestEdge(64, cfg.INPUT.MAX_SIZE_TEST)(resized)
    image = torch.from_numpy(resized.image.transpose(2, 0, 1).copy())
    scale = torch.tensor([resized.image.shape[1] / pixels.shape[1], resized.image.shape[0] / pixels.shape[0]] * 2)
    model.student.eval()
    student, teacher = model.frozen_views([{"image": image}])
    for side, view in (("student", student), ("teacher", teacher)):
        mean = box_means(view.features["p4"], [rows["boxes"][:1] * scale], 16)
        torch.testing.assert_close(rows[f"{side}.p4"][:1], mean, rtol=1e-3, atol=1e-3)


def test_the_search_sees_the_scale_of_training(tmp_path):
    """INPUT.*_TEST is the size of a half-size student, whose teacher sees twice that."""
    sizes = {"INPUT.MIN_SIZE_TRAIN": [128], "INPUT.MAX_SIZE_TEST": 400}
    cfg = make_cfg(tmp_path, "half", (96, 128), **{"DISTILL.STUDENT.INPUT_SCALE": 0.5, **sizes})
    register_from_config(cfg)
    model = Trainer.build_model(cfg).train()
    seen = {"student": set(), "teacher": set()}
    for side, backbone in (("student", model.student.backbone), ("teacher", model.teacher.model.backbone)):
        backbone.register_forward_pre_hook(lambda _, args, side=side: seen[side].add(tuple(args[0].shape[2:])))
    levels = list(model.distillers[NAME].prototypes.levels)
    rows = InstanceCollector(YamlRecipe(cfg), levels, 800, 10).collect(model)
    assert seen == {"student": {(64, 96)}, "teacher": {(128, 192)}}  # 64 x 86 and 128 x 171, padded
    assert rows["boxes"][:, 2].max() > 64  # still in pixels of the file


def test_the_student_is_searched_in_evaluation_mode_and_trains_on(tmp_path):
    cfg = make_cfg(tmp_path, "modes")
    register_from_config(cfg)
    model, modes = Trainer.build_model(cfg).train(), []
    model.student.backbone.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    InstanceCollector(YamlRecipe(cfg), ["p4"], 800, 20).collect(model)
    assert modes and not any(modes) and model.student.training


def test_only_objects_of_the_classes_that_an_image_was_chosen_for_are_kept():
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS}
    image = {"file_name": "x", "annotations": [{**box, "category_id": i, "iscrowd": i == 2} for i in range(3)]}
    assert [x["category_id"] for x in _slim_record(image, 0, {1, 2})["annotations"]] == [1]


def test_small_boxes_take_no_image_from_large_ones(tmp_path):
    cfg = make_cfg(tmp_path, "few", (120, 150), num_images=8, boxes_per_image=1)
    register_from_config(cfg)
    images = DatasetCatalog.get("few")
    for index, image in enumerate(images):
        image["annotations"][0].update(category_id=0, bbox=[0.0, 0.0, 30.0 + index % 2, 50.0])
    large = [{**image, "annotations": large_annotations(image, 30)} for image in images]
    assert len(choose_images(large, 4)) == 4 and all(index % 2 for index in choose_images(large, 800))


def test_the_teacher_runs_in_the_first_search_only(tmp_path):
    cfg = make_cfg(tmp_path, "once")
    register_from_config(cfg)
    model = Trainer.build_model(cfg).train()
    calls = []
    model.teacher.model.backbone.register_forward_hook(lambda *args: calls.append(1))
    collector = InstanceCollector(YamlRecipe(cfg), ["p2"], 800, 10)
    first = collector.collect(model)
    searched = len(calls)
    assert searched > 0
    with torch.no_grad():
        for p in model.student.backbone.parameters():
            p.mul_(1.5)
    second = collector.collect(model)
    assert len(calls) == searched
    assert torch.equal(first["teacher.p2"], second["teacher.p2"]) and torch.equal(first["boxes"], second["boxes"])
    assert not torch.allclose(first["student.p2"], second["student.p2"])


def test_picks_are_those_of_each_class_at_each_level():
    n, labels = 60, torch.randint(3, (60,))
    labels[labels == 1] = 2  # a class without instances
    instances = {"labels": labels, "images": torch.arange(n), "boxes": torch.rand(n, 4)}
    for level in ("p2", "p3"):
        instances[f"student.{level}"], instances[f"teacher.{level}"] = torch.randn(n, 4), torch.randn(n, 6)
    selection = {"num_prototypes": 4, "density_sigma": 0.5}
    for level in ("p2", "p3"):
        kept = find_prototypes(instances, level, 3, selection, torch.device("cpu"))
        expected = []
        for label in (0, 2):
            rows = [i for i in range(n) if labels[i] == label]
            sides = (instances[f"{side}.{level}"][rows] for side in ("student", "teacher"))
            expected += [rows[i] for i in select_prototypes(*sides, **selection)]
        assert kept["images"].tolist() == expected
        assert torch.equal(kept["teacher"], instances[f"teacher.{level}"][expected])
        assert torch.equal(kept["labels"], labels[expected])


def test_each_class_gets_up_to_so_many_images():
    images = [{"annotations": [{"category_id": c} for c in classes]} for classes in ([0], [0, 1], [0], [0], [2], [])]
    images.append({"annotations": [{"category_id": 3, "iscrowd": 1}]})
    chosen = choose_images(images, 2)
    counts = [sum(label in wanted for wanted in chosen.values()) for label in range(4)]
    assert counts == [2, 1, 1, 0] and chosen == choose_images(images, 2)
    assert all(label in {x["category_id"] for x in images[i]["annotations"]} for i in chosen for label in chosen[i])
    assert len(choose_images(images, 800)) == 5


def test_no_large_box_is_a_warning_and_training_goes_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "distill")  # so that the trainer sets up no log of its own
    trainer = train(make_cfg(tmp_path, "small", **{"DISTILL.GLOBAL.MIN_BOX_SIZE": 500}))
    assert any("No class has a prototype" in record.getMessage() for record in caplog.records)
    assert trainer.iter == 4


# One image leaves a process without a share. Boxes of one image that touch the same cells have one feature; rounding
# decides which of them is denser than the other; so where there is more than one batch, an image has one box.
@pytest.mark.parametrize("num_images, boxes_per_image", [(60, 1), (1, 6)])
def test_two_processes_hold_the_same_prototypes_as_one(tmp_path, num_images, boxes_per_image):
    cfg = make_cfg(
        tmp_path,
        f"two{num_images}",
        (128, 128),  # all of them, so that they are padded alike whatever batch they are in
        num_images,
        boxes_per_image,
        **{"DISTILL.GLOBAL.UPDATE_PERIOD": 2, "SOLVER.MAX_ITER": 3},
    )
    set_all(cfg, {"SOLVER.BASE_LR": 0.0})  # so that the second search sees the same student in one process and in two
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    worker = ["tests/prototypes/search_worker.py", str(tmp_path / "cfg.yaml")]
    for name, processes in (("one", 1), ("both", 2)):
        out = str(tmp_path / f"{name}_out")
        result = run_script(*worker, str(tmp_path / name), "OUTPUT_DIR", out, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:] + result.stderr[:3000]
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "both0", "both1"))
    assert first["searches"] == 2 and first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    for key, value in one.items():  # of boxes with one feature any may be picked
        if key.endswith(("student", "teacher", "labels")):
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-3, msg=key)
    assert num_images == 1 or (one["levels.p2.labels"] >= 0).sum() >= 3


@pytest.fixture(autouse=True)
def forget_datasets():
    known = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
