"""train_net.py as a user runs it: arguments, launching, resuming, and the errors of bad input."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import (
    ROOT,
    SHARED_DATA,
    aligned_cfg,
    check_same_detections,
    detector_cfg,
    distillation_cfg,
    run_script,
    set_all,
    take_detections,
    write_teacher,
)

SMALL_SCENES = {
    "DATASETS.TRAIN": ["digit_scenes_train"],
    "DATASETS.TEST": [],
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.BASE_LR": 0.001,
    "SEED": 1,
}


def write_pair(folder, kind="faster_rcnn", **overrides):
    """A plain student config and a teacher on disk; returns the arguments that distil the one from the other."""
    student = detector_cfg(kind, **{**SMALL_SCENES, "OUTPUT_DIR": str(folder / "out"), **overrides})
    teacher = copy.deepcopy(student)
    set_all(teacher, {"MODEL.FPN.OUT_CHANNELS": 32})
    paths = write_teacher(folder, teacher)
    (folder / "student.yaml").write_text(student.dump())
    return [
        *("--config-file", str(folder / "student.yaml"), "--distill", "ReviewDistiller"),
        *("--teacher-config", paths["DISTILL.TEACHER.CONFIG_FILE"]),
        *("--teacher-weights", paths["DISTILL.TEACHER.WEIGHTS"]),
    ]


def read_metrics(folder):
    """The latest value of everything in metrics.json, whose lines need not be in order."""
    records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    merged = {}
    for record in sorted(records, key=lambda record: record["iteration"]):
        merged.update(record)
    return merged


def test_distil_a_plain_config_and_start_again_from_what_it_wrote(tmp_path):
    arguments = write_pair(tmp_path)
    settings = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "TEST.AUG.ENABLED", "True"]
    result = run_script("train_net.py", *arguments, *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "TEST.AUG.ENABLED has no effect here" in log
    assert "No CUDA GPU is available: running on the CPU." in log and "Mixed precision: torch.bfloat16 on cpu" in log
    for line in ("Student: GeneralizedRCNN, ", "Teacher: GeneralizedRCNN, ", "| ReviewDistiller "):
        assert line in log
    first = read_metrics(tmp_path / "out")
    assert first["loss_review"] > 0 and "loss_review: " in log
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["MODEL"]["META_ARCHITECTURE"] == "DistillationModel"
    assert written["DISTILL"]["STUDENT"]["META_ARCHITECTURE"] == "GeneralizedRCNN"
    assert written["DISTILL"]["TEACHER"]["WEIGHTS"] == str(tmp_path / "teacher.pth")
    record = (tmp_path / "out" / "config.yaml").read_text()
    failed = run_script("train_net.py", *arguments, "--distill", "reveiw", "SOLVER.MAX_ITER", "9")
    assert failed.returncode == 1 and "Unknown distiller 'reveiw'" in failed.stderr
    assert "the nearest is ReviewDistiller" in failed.stderr and "Traceback" not in failed.stderr
    assert (tmp_path / "out" / "config.yaml").read_text() == record  # which starts the first run again
    again = run_script(
        "train_net.py", "--config-file", str(tmp_path / "out" / "config.yaml"), "OUTPUT_DIR", str(tmp_path / "again")
    )
    assert again.returncode == 0, again.stderr[-3000:]
    second = read_metrics(tmp_path / "again")
    assert second["total_loss"] == pytest.approx(first["total_loss"], rel=1e-6)
    assert any(name.startswith("events.out.tfevents") for name in os.listdir(tmp_path / "out"))


def test_two_processes_by_num_gpus_and_an_image_size_that_is_no_multiple_of_32(tmp_path):
    arguments = ["--num-gpus", "2"]
    result = run_script("train_net.py", *write_pair(tmp_path, **{"INPUT.MIN_SIZE_TRAIN": [93]}), *arguments)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "World size: 2" in log and (tmp_path / "out" / "model_final.pth").exists()


def test_resume_goes_on_after_a_kill_without_inheriting_again(tmp_path):
    parts = ["proposal_generator.rpn_head.objectness_logits.bias"]  # of one size for any number of channels
    overrides = {"SOLVER.MAX_ITER": 1000, "SOLVER.CHECKPOINT_PERIOD": 2, "DISTILL.STUDENT.INHERIT": parts}
    command = [sys.executable, "train_net.py", *write_pair(tmp_path, **overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    last = tmp_path / "out" / "last_checkpoint"
    while not (last.exists() and last.read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(tmp_path / "out" / last.read_text())["iteration"] + 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("The student inherits 1 weights") == 1
    result = run_script(*command[1:], "--resume", "SOLVER.MAX_ITER", str(done + 2))
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"Starting training from iteration {done}" in log and log.count("Teacher: GeneralizedRCNN") == 2
    assert log.count("The student inherits") == 1
    assert torch.load(tmp_path / "out" / "model_final.pth")["iteration"] == done + 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--teacher-weights", "/nowhere.pth"], "teacher's weights '/nowhere.pth' cannot be read"),
        (["--distill", "NoDistiller"], "Unknown distiller 'NoDistiller'"),
        (["SOLVER.BASELR", "1"], "nearest existing key is 'SOLVER.BASE_LR'"),
        (["DISTILL.REVIEW.LEVELS", "['p8']"], "asks for p8, which the student does not have: it has p2"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "4"], "has 10 classes (0, 1, .*NUM_CLASSES is 4. Set .*NUM_CLASSES 10"),
        (["DATASETS.REGISTER", "['x=voc:/nowhere:train']"], "the folder '/nowhere' does not exist"),
        (["MODEL.WEIGHTS", "/nowhere.pth"], "Cannot load '/nowhere.pth' into the model"),
        (["SOLVER.OPTIMIZER", "Adam"], "SOLVER.OPTIMIZER is 'Adam': expected 'SGD' or 'AdamW'"),
    ],
)
def test_bad_input_ends_with_one_message(tmp_path, arguments, message, monkeypatch):
    import train_net

    parsed = train_net.argument_parser().parse_args([*write_pair(tmp_path), *arguments])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(train_net.Trainer, "build_train_loader", lambda self: pytest.fail("data was loaded"))
        if "MODEL.WEIGHTS" in arguments:  # the student's own weights are the one thing that Detectron2 loads later
            patch.setattr(train_net.Trainer, "build_train_loader", lambda self: [])
        train_net.run(parsed)
    text = str(exit_.value)
    assert text.startswith("error: ") and all(part in text for part in message.split(".*")), text


def test_a_teacher_without_a_distiller_is_refused(tmp_path):
    import train_net

    arguments = write_pair(tmp_path)
    del arguments[2:4]  # --distill ReviewDistiller
    with pytest.raises(SystemExit, match="is not distilled, so its teacher has no use: add --distill"):
        train_net.run(train_net.argument_parser().parse_args(arguments))


def test_distillers_of_a_config_that_is_not_distilled_are_refused(tmp_path):
    import train_net

    arguments = [*write_pair(tmp_path)[:2], "DISTILL.DISTILLERS", "['ReviewDistiller']"]
    with pytest.raises(SystemExit, match="is not distilled .*GeneralizedRCNN.* have no use: distil it by --distill"):
        train_net.run(train_net.argument_parser().parse_args(arguments))


@pytest.mark.parametrize("processes", ["1", "2"])
def test_bad_input_as_a_user_sees_it(tmp_path, processes):
    arguments = [*write_pair(tmp_path), "--teacher-weights", "/nowhere.pth", "--num-gpus", processes]
    result = run_script("train_net.py", *arguments)
    if processes == "2":
        assert result.returncode == 1 and "error: The teacher's weights '/nowhere.pth'" in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: process ")
        return
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: The teacher's weights '/nowhere.pth'")


def test_without_a_config_file():
    result = run_script("train_net.py")
    assert result.returncode == 1 and "error: --config-file is missing" in result.stderr


def make_voc(folder, num_images=4, size=(64, 80)):
    """A VOC folder of noise with one class."""
    from PIL import Image

    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    pixels = torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()
    for i in range(num_images):
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{i}.jpg")
        (folder / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size><object>"
            "<name>cell</name><pose>x</pose><truncated>0</truncated><difficult>0</difficult><bndbox><xmin>5</xmin>"
            "<ymin>5</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{i}\n" for i in range(num_images)))
    return {"DATASETS.REGISTER": [f"cells=voc:{folder}:train"], "MODEL.ROI_HEADS.NUM_CLASSES": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_and_what_was_learned_is_kept(tmp_path, workers):
    overrides = make_voc(tmp_path / "voc")
    (tmp_path / "voc" / "JPEGImages" / "2.jpg").write_bytes(b"no image")
    overrides.update({"DATASETS.TRAIN": ["cells"], "SOLVER.MAX_ITER": 50, "SOLVER.IMS_PER_BATCH": 1})
    overrides.update({"DISTILL.REVIEW.NORM": "", "DATALOADER.NUM_WORKERS": workers})
    arguments = write_pair(tmp_path, **overrides)
    result = run_script("train_net.py", *arguments)
    assert result.returncode == 1
    assert "1 images cannot be read" in result.stderr and "voc/JPEGImages/2.jpg" in result.stderr
    result = run_script("train_net.py", *arguments, "DATASETS.CHECK", "'off'")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: Cannot read the image") and "voc/JPEGImages/2.jpg" in last
    if workers:  # they read ahead, so training may not have begun
        return
    kept = torch.load(tmp_path / "out" / (tmp_path / "out" / "last_checkpoint").read_text())
    assert kept["iteration"] == read_metrics(tmp_path / "out")["iteration"]


def real_data_arguments(folder, kind, **overrides):
    arguments = write_pair(
        folder,
        kind,
        **{
            "INPUT.MIN_SIZE_TRAIN": [160],
            "INPUT.MIN_SIZE_TEST": 160,
            "SOLVER.MAX_ITER": 4,
            "MODEL.RESNETS.NORM": "BN",  # random weights without a norm that works at once diverge
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST": -1.0,  # an untrained model is sure of nothing
            **overrides,
        },
    )
    return arguments


needs_shared_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared test images are not there")


@needs_shared_data
def test_trains_and_evaluates_on_bccd(tmp_path):
    root = SHARED_DATA / "bccd"
    register = [f"bccd_train=voc:{root}:trainval", f"bccd_test=voc:{root}:test"]
    datasets = {"DATASETS.REGISTER": register, "DATASETS.TRAIN": ["bccd_train"], "DATASETS.TEST": ["bccd_test"]}
    arguments = real_data_arguments(tmp_path, "faster_rcnn", **datasets, **{"MODEL.ROI_HEADS.NUM_CLASSES": 3})
    result = run_script("train_net.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    record = read_metrics(tmp_path / "out")
    assert 0 <= record["bbox/AP50"] <= 100 and record["loss_review"] > 0
    written = (tmp_path / "out" / "config.yaml").read_text()
    gone = ["DATASETS.REGISTER", str(["bccd_train=voc:/nowhere:trainval", register[1]])]
    teacher = run_script("train_net.py", *arguments, "--eval-teacher", *gone)
    assert (tmp_path / "out" / "config.yaml").read_text() == written  # which starts the training again
    assert teacher.returncode == 0 and "Evaluating bccd_test (as VOC) using 2012 metric" in teacher.stdout, (
        teacher.stderr[-3000:]
    )


@needs_shared_data
def test_trains_and_evaluates_mask_rcnn_on_coco_mini_and_evaluates_the_checkpoint_to_the_same(tmp_path):
    root = SHARED_DATA / "coco_mini"
    register = [f"coco_mini_{s}=coco:{root}/instances_{s}2017.json:{root}/{s}2017" for s in ("train", "val")]
    datasets = {
        "DATASETS.REGISTER": register,
        "DATASETS.TRAIN": ["coco_mini_train"],
        "DATASETS.TEST": ["coco_mini_val"],
        "MODEL.ROI_HEADS.NUM_CLASSES": 80,
        "INPUT.MASK_FORMAT": "polygon",
        "TEST.DETECTIONS_PER_IMAGE": 5,
    }
    arguments = real_data_arguments(tmp_path, "mask_rcnn", **datasets)
    result = run_script("train_net.py", *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    trained = read_metrics(tmp_path / "out")
    assert {"bbox/AP", "segm/AP", "loss_mask", "loss_review"} <= trained.keys()
    found = take_detections(tmp_path / "out" / "inference")
    weights = str(tmp_path / "out" / "model_final.pth")
    config = str(tmp_path / "out" / "config.yaml")
    # teacher and training images are gone: evaluating a student does not need them
    (tmp_path / "teacher.pth").unlink()
    (tmp_path / "teacher.yaml").unlink()
    record = Path(config).read_text()
    gone = ["DATASETS.REGISTER", str(["coco_mini_train=coco:/nowhere/train.json:/nowhere", register[1]])]
    results = run_script("train_net.py", "--eval-only", "--config-file", config, "MODEL.WEIGHTS", weights, *gone)
    assert results.returncode == 0, results.stderr[-3000:]
    assert Path(config).read_text() == record  # which starts the training again
    check_same_detections(take_detections(tmp_path / "out" / "inference"), found)


@pytest.mark.parametrize("kind, heads", [("retinanet", ["head"]), ("mask_rcnn", ["proposal_generator", "roi_heads"])])
def test_a_multi_scale_teacher_and_its_half_size_student_train_on_two_processes(tmp_path, kind, heads):
    node = "RETINANET" if kind == "retinanet" else "ROI_HEADS"
    scenes = {**SMALL_SCENES, f"MODEL.{node}.NUM_CLASSES": 10, "SOLVER.MAX_ITER": 3, "INPUT.MIN_SIZE_TRAIN": [93]}
    teacher = aligned_cfg(kind, **{**scenes, "OUTPUT_DIR": str(tmp_path / "teacher")})
    (tmp_path / "teacher.yaml").write_text(teacher.dump())
    result = run_script("train_net.py", "--config-file", str(tmp_path / "teacher.yaml"), processes=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    name = "loss_cls"
    metrics = read_metrics(tmp_path / "teacher")
    assert all(metrics[f"{name}_{scale}"] > 0 for scale in ("high", "low", "fused"))

    half = {"INPUT.MIN_SIZE_TEST": 46, "INPUT.MAX_SIZE_TEST": 667, "DISTILL.STUDENT.INPUT_SCALE": 0.5}
    given = {
        "DISTILL.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
        "DISTILL.TEACHER.WEIGHTS": str(tmp_path / "teacher" / "model_final.pth"),
        "DISTILL.STUDENT.INHERIT": ["backbone", *heads],
        "DISTILL.DISTILLERS": ["AlignedDistiller"],
    }
    cfg = distillation_cfg(aligned_cfg(kind, "half", **scenes), given, OUTPUT_DIR=str(tmp_path / "out"), **half)
    (tmp_path / "cfg.yaml").write_text(cfg.dump())
    result = run_script("train_net.py", "--config-file", str(tmp_path / "cfg.yaml"), processes=2)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "World size: 2" in log and "The student inherits" in log
    metrics = read_metrics(tmp_path / "out")
    assert metrics["loss_aligned"] > 0 and metrics["weight/loss_aligned"] == pytest.approx(0.6 * 2 / 500)
