"""The runner on a suite of two steps, and the tables on lines that are made up."""

import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import sys
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from distill.config import CLASS_NODES, detector_config, load_config, student_config
from distill.errors import DistillError
from distill.modeling.inherit import inheritable_weights
from tests.helpers import ROOT, detector_cfg, run_script, write_coco

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import results  # noqa: E402
from cost import measure  # noqa: E402
from run import FolderInUse, Runner, TrainingFailed, summarize, train  # noqa: E402
from suite import config_hash, load_suite, run_config, suite_names  # noqa: E402


def line(suite, row, seed, ap, **more):
    scores = {"AP": ap, "AP50": ap + 20, "AP75": ap, "APs": None, "APm": None}
    where = {"device": "CPU", "detectron2": "0.6", "torch": "2", "seconds": 60.0}
    own_hash = config_hash(suite, suite.row(row))
    return {"row": row, "seed": seed, "status": "finished", "config_hash": own_hash, **scores, **where, **more}


def cost_line(suite, **ratios):
    rows = {
        name: {"ms": 10 * ratio, "ratio": ratio, "config_hash": config_hash(suite, suite.row(name))}
        for name, ratio in ratios.items()
    }
    return {"row": None, "seed": None, "status": "cost", "rounds": 9, "device": "CPU", "rows": rows}


def write_suite(folder, **changes):
    """A suite of three rows on small detectors: without distillation, distilled, and one that cannot be built."""
    if not (folder / "data").exists():
        write_coco(folder / "data")
    scenes = {
        "DATASETS.REGISTER": [f"tiny=coco:{folder}/data/instances.json:{folder}/data"],
        "DATASETS.TRAIN": ["tiny"],
        "DATASETS.TEST": ["tiny"],
        "SOLVER.BASE_LR": 0.0001,
        "INPUT.MIN_SIZE_TRAIN": [32],
        "INPUT.MIN_SIZE_TEST": 32,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 6,
    }
    cfg = detector_cfg("retinanet", **scenes)
    (folder / "small.yaml").write_text(cfg.dump())
    small = str(folder / "small.yaml")
    distilled = {
        "MODEL.META_ARCHITECTURE": "DistillationModel",
        "DISTILL.STUDENT.META_ARCHITECTURE": "RetinaNet",
        "DISTILL.DISTILLERS": ["ImitationDistiller"],
    }
    content = {
        "title": "Tiny",
        "text": "Above.",
        "findings": "Below.",
        "baseline": "alone",
        "seeds": 1,
        "opts": {"TEST.EVAL_PERIOD": 3},
        "teacher": "teacher",
        "rows": {
            "teacher": {"config": small, "opts": {"SEED": 3}},
            "broken": {"config": small, "opts": {"MODEL.FPN.FUSE_TYPE": "none"}},
            "alone": {"config": small},
            "imitation": {"config": small, "opts": distilled, "published": {"AP": 40.1}},
        },
        **changes,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "tiny.yaml")


def test_trains_what_is_missing_records_what_failed_and_repeats_nothing(tmp_path):
    suite = write_suite(tmp_path)
    command = ["projects/Evidence/run.py", "--suite", suite, "--lines", str(tmp_path / "lines"), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out")]
    result = run_script(*command, "--seeds", "5")
    assert result.returncode == 1, result.stderr[-3000:]
    lines = results.read_lines("tiny", tmp_path / "lines")
    assert [(x["row"], x["seed"], x["status"]) for x in lines] == [
        ("teacher", None, "finished"),
        ("broken", 5, "failed"),
        ("alone", 5, "finished"),
        ("imitation", 5, "finished"),
    ]
    assert "exit status 1" in lines[1]["error"] and "AP" not in lines[1]
    last = lines[-1]
    assert last["suite"] == "tiny" and last["iterations"] == 6 and last["AP"] is not None
    assert last["ms_per_step"] > 0 and last["seconds"] > 0 and last["peak_mib"] > 100
    assert {"git_commit", "detectron2", "torch", "device"} <= last.keys()
    weights = next((tmp_path / "out" / "tiny").glob("teacher*/model_final.pth"))
    assert last["teacher_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    assert not any("teacher_sha256" in x for x in lines[:-1])
    assert [x.name for x in (tmp_path / "out" / "tiny").glob("alone*/*.pth")] == ["model_final.pth"]
    assert "[3/4] alone, seed 5: " in result.stdout and " in all" in result.stdout

    # what is finished needs no teacher any more
    teacher = next((tmp_path / "out" / "tiny").glob("teacher*"))
    teacher.rename(tmp_path / "away")
    again = run_script(*command, "--seeds", "5", "--only", "alone", "imitation")
    assert again.returncode == 0 and "0 of 0 runs not done" in again.stdout
    (tmp_path / "away").rename(teacher)
    # another config is another run, and so is what depends on it
    changed = yaml.safe_load(Path(suite).read_text())
    changed["opts"]["SOLVER.BASE_LR"] = 0.0002
    Path(suite).write_text(yaml.safe_dump(changed, sort_keys=False))
    again = run_script(*command, "--seeds", "5", "--only", "alone")
    assert "0 of 1 runs not done" in again.stdout
    lines = results.read_lines("tiny", tmp_path / "lines")
    assert len([x for x in lines if x["row"] == "alone" and x["status"] == "finished"]) == 2

    changed["rows"].pop("broken")
    Path(suite).write_text(yaml.safe_dump(changed, sort_keys=False))
    timed = run_script(*command, "--cost", "--rounds", "2")
    assert timed.returncode == 0, timed.stderr[-3000:]
    costs = results.costs(load_suite(suite), results.read_lines("tiny", tmp_path / "lines"))
    assert costs["alone"] == 1 and costs["imitation"] > 0
    again = run_script(*command, "--seeds", "5", "--only", "alone")
    assert again.returncode == 0 and "0 of 0 runs not done" in again.stdout


def test_summary_of_a_run(tmp_path):
    cfg = detector_cfg("retinanet", **{"SOLVER.MAX_ITER": 40})
    steps = [{"iteration": 0, "total_loss": 1.0}, {"iteration": 19, "time": 0.2}, {"iteration": 39, "time": 0.4}]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in steps))
    with pytest.raises(TrainingFailed, match="has no bbox/AP"):
        summarize(tmp_path, 100.0, cfg)
    scores = [{"iteration": 40, "bbox/AP": math.nan, "bbox/AP50": math.nan}, {"iteration": 19, "bbox/AP": 3.21987}]
    with (tmp_path / "metrics.json").open("a") as stream:
        stream.writelines(json.dumps(x) + "\n" for x in scores)
    expected = {"AP": 0.0, "AP50": 0.0, "AP75": None, "APs": None, "APm": None}
    expected |= {"iterations": 40, "seconds": 12.0, "ms_per_step": 300.0, "peak_mib": 100.0}
    assert summarize(tmp_path, 100.0, cfg) == expected


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FolderInUse, match="Another process trains in"):
            train("none.yaml", tmp_path, [], print)


def test_what_another_runner_trains_is_left_out_without_a_line(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    runner = Runner(suite, tmp_path / "out", "cpu", tmp_path / "lines", 1)
    folder = runner._folder(suite.row("alone"), 0)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runner.run([0], ["alone"]) == 1
    assert results.read_lines(suite.name, tmp_path / "lines") == []


def test_a_line_without_its_end_is_not_written_on(tmp_path):
    runner = Runner(load_suite(write_suite(tmp_path)), tmp_path, "cpu", tmp_path, 1)
    (tmp_path / "tiny.jsonl").write_text('{"row": "alone"}')
    for seed in range(2):
        runner._append({"seed": seed})
    assert results.read_lines("tiny", tmp_path) == [{"row": "alone"}, {"seed": 0}, {"seed": 1}]


def test_a_torn_line_is_named(tmp_path):
    (tmp_path / "tiny.jsonl").write_text('{"row": "alone"}\n{"row": "al\n')
    with pytest.raises(DistillError, match="tiny.jsonl, line 2 is not JSON"):
        results.read_lines("tiny", tmp_path)


def test_a_hash_is_of_what_is_computed_not_of_where(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    alone, imitation = suite.row("alone"), suite.row("imitation")
    teacher = suite.row("teacher")
    assert len({config_hash(suite, row) for row in (alone, imitation, teacher)}) == 3
    assert run_config(suite, alone, 7).SEED == 7 and run_config(suite, teacher, None).SEED == 3
    cfg = run_config(suite, imitation, 7, "there.pth")
    assert (cfg.DISTILL.TEACHER.WEIGHTS, cfg.DISTILL.TEACHER.OPTS) == ("there.pth", ["SEED", 3])
    path = Path(write_suite(tmp_path))
    path.write_text(path.read_text().replace("SEED: 3", "SEED: 4"))
    other = load_suite(str(path))
    assert config_hash(other, other.row("imitation")) != config_hash(suite, imitation)
    assert config_hash(other, other.row("alone")) == config_hash(suite, alone)
    moved = load_suite(write_suite(tmp_path, opts={"TEST.EVAL_PERIOD": 3, "OUTPUT_DIR": "elsewhere"}))
    assert config_hash(moved, moved.row("alone")) == config_hash(suite, alone)


def test_a_baseline_is_timed_against_its_own(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("run.measure", lambda configs, baselines, rounds: seen.update(baselines) or {})
    monkeypatch.chdir(ROOT)
    Runner(load_suite("digits_aligned"), tmp_path, "cpu", tmp_path, 1).cost(1)
    assert seen["aligned"] == "inherit" and seen["inherit"] == "student" and seen["student"] == "student"


def test_rows_that_give_one_name_to_different_data_are_timed_together(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    cfg = run_config(suite, suite.row("alone"), 0)
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = "cpu", str(tmp_path / "out")
    other = copy.deepcopy(cfg)
    write_coco(tmp_path / "more")
    other.DATASETS.REGISTER = [f"tiny=coco:{tmp_path}/more/instances.json:{tmp_path}/more"]
    measured = measure({"alone": cfg, "more": other}, {"alone": "alone", "more": "alone"}, 1)
    assert measured["alone"]["ratio"] == 1 and measured["more"]["ratio"] > 0
    assert cfg.DATASETS.TRAIN == ["alone/tiny"] and other.DATASETS.REGISTER[0].startswith("more/tiny=coco:")
    for name in ("alone/tiny", "more/tiny"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_plots_are_drawn_from_the_lines(tmp_path, monkeypatch):
    import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.extend(figure.axes))
    suite = load_suite(write_suite(tmp_path, seeds=2))
    lines = [line(suite, "alone", seed, 30.0 + seed) for seed in range(2)]
    lines += [line(suite, "imitation", 0, 35.0), cost_line(suite, alone=1.0, imitation=1.3)]
    plots.plot_costs(suite, lines, tmp_path)
    points = {bar.get_label(): bar.lines[0].get_xydata().tolist() for bar in drawn[0].containers}
    assert points == {"alone": [[1.0, 0.0]], "imitation": [[1.3, 4.5]]}


def test_rows_that_have_another_baseline_have_a_panel_of_their_own(tmp_path, monkeypatch):
    import plots

    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes))
    suite = load_suite(write_suite(tmp_path))
    row = dataclasses.replace(suite.row("alone"), name="long", opts=("SOLVER.MAX_ITER", 9))
    other = dataclasses.replace(suite.row("imitation"), name="long_imitation", baseline="long")
    suite = dataclasses.replace(suite, rows=(*suite.rows, row, other), hashes={})
    results_of = {"alone": 30.0, "imitation": 35.0, "long": 32.0, "long_imitation": 36.5}
    lines = [line(suite, name, 0, ap) for name, ap in results_of.items()]
    lines.append(cost_line(suite, alone=1.0, imitation=1.3, long=0.9, long_imitation=1.4))
    plots.plot_costs(suite, lines, tmp_path)
    expected = [
        {"alone": [1.0, 0.0], "imitation": [1.3, 5.0], "long": [0.9, 2.0]},
        {"long": [1.0, 0.0], "long_imitation": [1.4, 4.5]},
    ]
    points = [{x.get_label(): x.lines[0].get_xydata().tolist()[0] for x in axis.containers} for axis in drawn[0]]
    assert points == expected


def test_a_panel_is_as_high_as_its_legend(tmp_path):
    import plots

    figure, axes = plots._figure(load_suite(write_suite(tmp_path)), [13, 2])
    high, low = (axis.get_position().height * figure.get_figheight() for axis in axes)
    assert high > 1.5 * low  # of the same height, the first one's legend would lie over the second's


def test_plots_are_written(tmp_path):
    import plots

    suite = load_suite(write_suite(tmp_path))
    lines = [line(suite, "alone", 0, 30.0), cost_line(suite, alone=1.0)]
    plots.plot_costs(suite, lines, tmp_path / "images" / "cost.png")
    assert (tmp_path / "images" / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", suite_names())
def test_every_row_of_every_suite_can_be_read_and_every_line_has_a_row(name):
    suite = load_suite(name)
    names = {row.name for row in suite.rows}
    assert all(x["row"] in names or x["status"] == "cost" for x in results.read_lines(name))
    for row in suite.rows:
        cfg = student_config(run_config(suite, row, 0))
        if cfg.MODEL.META_ARCHITECTURE == "AlignedTeacher":
            cfg = detector_config(cfg)
        assert cfg.MODEL.META_ARCHITECTURE in CLASS_NODES, row.name
        assert len(config_hash(suite, row)) == 12


@pytest.mark.parametrize("name", [name for name in suite_names() if name != "coco"])  # whose teachers are downloads
def test_what_students_inherit_fits_them(name):
    suite = load_suite(name)
    for row in suite.rows:
        cfg = run_config(suite, row, 0)
        if cfg.DISTILL.STUDENT.INHERIT:
            teacher = suite.teacher_of(row)
            sides = [student_config(cfg), load_config(str(ROOT / teacher.config), list(teacher.opts))]
            for side in sides:
                side.MODEL.DEVICE = "cpu"
            student, teacher = (build_model(side) for side in sides)
            scale = cfg.DISTILL.STUDENT.INPUT_SCALE
            assert inheritable_weights(student, teacher, cfg.DISTILL.STUDENT.INHERIT, scale), row.name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "none"}, "baseline 'none' is none of the rows"),
        ({"extra": 1}, "the keys extra are missing or unknown"),
        ({"seeds": "three"}, "seeds is 'three', expected how many"),
        ({"rows": {"alone": None}}, "row alone is None: expected the keys"),
        ({"rows": {"alone": {"config": "x", "opt": {}}}}, "row alone: the keys opt are missing or unknown"),
        ({"rows": {"alone": {"config": "x", "teacher": "no"}}}, "row alone names the teacher 'no'"),
    ],
)
def test_bad_suites_are_named(tmp_path, changes, message):
    with pytest.raises(DistillError, match=message):
        load_suite(write_suite(tmp_path, **changes))


def test_unknown_rows_and_suites_are_named(tmp_path):
    with pytest.raises(DistillError, match="There is no suite 'nothing': expected one of demo, "):
        load_suite("nothing")
    own = Path(write_suite(tmp_path)).rename(tmp_path / "demo.yaml")
    with pytest.raises(DistillError, match="to those of the suite demo: give it another name"):
        load_suite(str(own))
    own.write_text("rows: [")
    with pytest.raises(DistillError, match="is not YAML"):
        load_suite(str(own.rename(tmp_path / "mine.yaml")))
    result = run_script("projects/Evidence/run.py", "--suite", write_suite(tmp_path), "--only", "missing")
    assert result.returncode == 1 and "has no row missing: expected some of teacher, broken, alone" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_suite_of_ones_own_has_its_table_and_the_documents_stay(tmp_path):
    path = write_suite(tmp_path)
    before = results.README.read_bytes(), results.DOCUMENT.read_bytes()
    lines = tmp_path / "lines"
    lines.mkdir()
    suite = load_suite(path)
    (lines / f"{suite.name}.jsonl").write_text(json.dumps(line(suite, "alone", 0, 12.34)) + "\n")
    result = run_script("projects/Evidence/run.py", "--suite", path, "--lines", str(lines), "--table")
    assert result.returncode == 0 and "| alone | 1 | 12.3 |" in result.stdout and "Measured on CPU" in result.stdout
    assert (results.README.read_bytes(), results.DOCUMENT.read_bytes()) == before
