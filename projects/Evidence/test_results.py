"""Tables and documents from the lines of finished trainings."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from distill.distillers import DISTILLER_REGISTRY
from distill.errors import DistillError
from tests.helpers import ROOT

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import results  # noqa: E402
from suite import load_suite  # noqa: E402
from test_evidence import cost_line, line, write_suite  # noqa: E402


def test_a_table_has_means_errors_gains_and_costs(tmp_path):
    suite = load_suite(write_suite(tmp_path, seeds=3))
    alone, imitation = [30.1, 33.5, 31.0], [36.2, 35.0, 39.1]
    lines = [line(suite, "alone", 0, 11.0, config_hash="old"), line(suite, "teacher", None, 50.04)]
    lines += [line(suite, "alone", seed, ap) for seed, ap in enumerate(alone)]
    lines += [line(suite, "imitation", seed, ap) for seed, ap in enumerate(imitation)]
    lines += [line(suite, "broken", 0, 0.0, status="failed"), line(suite, "imitation", 1, imitation[1])]
    lines += [line(suite, "imitation", 2, 0.0, status="failed")]  # has finished, too
    lines += [line(suite, "imitation", 9, 90.0), line(suite, "alone", 1, 90.0, config_hash="other")]
    lines.append(cost_line(suite, alone=1.0, imitation=1.31))
    errors = [np.std(x, ddof=1) / np.sqrt(3) for x in (alone, imitation)]
    table = results.table(suite, lines).splitlines()
    assert table[0] == "| row | seeds | AP | AP50 | AP75 | gain in AP | cost | published AP |"
    assert table[2].startswith("| teacher | 1 | 50.0 | 70.0 |")
    assert table[3] == "| broken | 0 (1 failed) |  |  |  |  |  |  |"
    assert f"| alone | 3 | {np.mean(alone):.1f} ± {errors[0]:.1f} |" in table[4] and "|  | 1.00 |" in table[4]
    difference = np.mean(imitation) - np.mean(alone)
    assert f"| {difference:+.1f} ± {math.hypot(*errors):.1f} | 1.31 | 40.1 |" in table[5]
    assert "7 training runs, 7 minutes" in results.where(suite, lines) and "9 rounds" in results.where(suite, lines)


def test_of_a_suite_that_was_not_run_the_table_has_what_was_published(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    assert results.table(suite, []) == "| row | published AP |\n| --- | ---: |\n| imitation | 40.1 |\n"


def test_several_trainings_of_a_teacher_are_told(tmp_path):
    suite = load_suite(write_suite(tmp_path, seeds=3))
    lines = [line(suite, "imitation", seed, 30.0, teacher_sha256="a") for seed in range(2)]
    lines += [line(suite, "alone", 0, 20.0), line(suite, "imitation", 9, 30.0, teacher_sha256="b")]  # 9 does not count
    assert "learned from" not in results.where(suite, lines)
    lines.append(line(suite, "imitation", 2, 30.0, teacher_sha256="b"))
    assert "Students have learned from 2 training runs of teacher." in results.where(suite, lines)
    lines += [line(suite, "teacher", None, ap) for ap in (50.0, 52.0)]
    lines.append(line(suite, "teacher", None, 9.0, status="failed"))
    assert results.table(suite, lines).splitlines()[2].startswith("| teacher | 2 | 51.0 ± 1.0 |")


def test_costs_of_another_config_do_not_show(tmp_path):
    suite = load_suite(write_suite(tmp_path))
    lines = [cost_line(suite, alone=1.0, imitation=1.31)]
    assert results.costs(suite, lines) == {"alone": 1.0, "imitation": 1.31}
    lines[0]["rows"]["alone"]["config_hash"] = "old"
    assert results.costs(suite, lines) == {}


def test_the_documents_are_what_the_lines_say():
    assert (ROOT / "docs" / "results.md").read_text() == results.document()
    readme = (ROOT / "README.md").read_text()
    assert readme == results.with_tables(readme)
    assert results.methods_table() in readme


def test_the_table_of_methods_has_the_gain_of_each_in_each_suite(tmp_path):
    content = yaml.safe_load((HERE / "methods.yaml").read_text())
    rows = {}
    for number, name in enumerate(content["suites"]):
        suite = load_suite(name)
        lines = [line(suite, "student", seed, 30.0 + seed) for seed in range(2)]
        lines += [line(suite, "review", seed, 35.0 + number + 2 * seed) for seed in range(2)]
        lines.append(cost_line(suite, student=1.0, review=1.25 + number))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        rows[name] = {row.name for row in suite.rows}
    head, _, *table = results.methods_table(tmp_path).splitlines()
    cells = {row.split(" | ")[0].strip("| "): [x.strip() for x in row.split("|")[4:-1]] for row in table}
    # means 30.5 and 36 + n; deviations 0.707 and 1.414, divided by the root of two seeds
    gains = [f"{5.5 + number:+.1f} ± 1.1" for number in range(3)]
    assert list(rows) == ["digits_dense", "digits_rcnn", "bccd"] and content["cost"] == "digits_dense"
    assert cells["knowledge review (ReviewKD)"] == [*gains, "1.25", "Faster R-CNN R18 33.3 → 36.8"]
    assert cells["feature imitation (L2)"] == ["", "", "", "", "RetinaNet R50 36.4 → 39.0"]
    assert head.split("|")[4:7] == [f" {title} " for title in content["suites"].values()]
    shown = {method["row"] for method in content["methods"]}
    assert shown <= set().union(*rows.values()) | {"aligned"}  # which has a suite of its own
    registered = {method["distiller"] for method in content["methods"]}
    assert registered == {name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("distill.")}


def test_tables_in_a_text_are_written_anew(tmp_path):
    suite = load_suite("demo")
    (tmp_path / "demo.jsonl").write_text(json.dumps(line(suite, "student", 0, 40.0)) + "\n")
    text = "a\n<!-- table demo -->\nold\n<!-- end -->\nb\n<!-- table coco -->\n<!-- end -->\n"
    filled = results.with_tables(text, tmp_path)
    assert filled.startswith("a\n<!-- table demo -->\n\n| row |") and "| student | 1 | 40.0 |" in filled
    assert "old" not in filled and filled.count("<!-- end -->") == 2 and "| faster_rcnn_R18_R101 |" in filled
    assert results.with_tables(filled, tmp_path) == filled
    for wrong in (text.replace("<!-- end -->", "", 1), text + "<!-- table demo-->\n<!-- end -->\n"):
        with pytest.raises(DistillError, match="tables begin but"):
            results.with_tables(wrong, tmp_path)
