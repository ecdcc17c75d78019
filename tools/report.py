#!/usr/bin/env python3
"""A page to look at: what a run was trained from, what came of it, beside its teacher and other runs.

    python tools/report.py OUTPUT_DIR [OTHER ...] [--output FILE]

Writes one HTML file (OUTPUT_DIR/report.html), which refers to nothing outside of itself. OTHER are the OUTPUT_DIRs of
further runs, the first of which is the baseline. The teacher is that of DISTILL.TEACHER; its results are those of the
metrics.json beside its weights. A run from a Python config executes it again. See docs/report.md.
"""

import argparse
import datetime
import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from drawing import MIN_SCORE
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from report_parts.costs import cost_table
from report_parts.curves import draw_run
from report_parts.pictures import COLORS, class_numbers, read_test_set, show_examples
from report_parts.reading import Metric, Run, Scores, TeacherOf
from report_parts.tables import describe, facts_table, score_tables, short_path, signed
from torch import nn

from distill.config import check_output_dir
from distill.engine import teacher_mapper
from distill.errors import DistillError
from distill.modeling.checkpoint import load_detector

logger = logging.getLogger("detectron2.report")


class Report:
    """The page of a run.

    Args:
        run: what it is about.
        others: further runs, the first of which is the baseline; the teacher's own, if among them, counts once.
        evaluate: whether to evaluate the teacher.
    """

    def __init__(self, run: Run, others: Sequence[Run], evaluate: bool) -> None:
        self.run = run
        self.teacher = TeacherOf(run, evaluate) if run.recipe.is_distilled else None
        own = self.teacher.folder if self.teacher else None
        self.runs = [run, *(other for other in others if other.folder != own)]
        for other in others:  # times of two devices cannot be compared
            other.cfg.MODEL.DEVICE = run.cfg.MODEL.DEVICE
        self.baseline = self.runs[1].name if len(self.runs) > 1 else None
        self._models: dict[str, nn.Module] = {}
        self._missing: dict[str, str] = {}

    def scores(self) -> dict[str, Scores]:
        """The results of all, by name, in the order of the columns."""
        teacher = {"teacher": self.teacher.scores} if self.teacher else {}
        return {**{run.name: run.scores for run in self.runs}, **teacher}

    def facts(self) -> dict[str, dict[str, str]]:
        """What :func:`describe` says of each."""
        found = {run.name: describe(run.recipe, run) for run in self.runs}
        if self.teacher and self.teacher.recipe is not None:
            run = self.teacher.run
            found["teacher"] = describe(run.recipe if run else self.teacher.recipe, run)
        return found

    def load(self) -> None:
        """Loads what detectors there are."""
        recipes = {run.name: run.detector for run in self.runs}
        if self.teacher and self.teacher.recipe is not None:
            recipes["teacher"] = lambda: self.teacher.recipe
        for name, recipe in recipes.items():
            try:
                self._models[name] = load_detector(recipe(), name).eval()
            except DistillError as error:
                self._missing[name] = str(error)

    def headline(self) -> list[tuple[str, str]]:
        """The most important figures, each with what it is."""
        metric = next((Metric(m.dataset, m.task, "AP") for m in self.run.scores), None)
        own = self.run.scores.get(metric)
        if own is None or not math.isfinite(own):  # of no detection Detectron2 computes no AP
            return []
        found = [(f"{own:.1f}", "AP")]
        base = self.runs[1].scores.get(metric) if self.baseline else None
        best = self.teacher.scores.get(metric) if self.teacher else None
        if base is not None:
            found.append((signed(own - base), f"over {self.baseline} ({base:.1f})"))
        if best is not None:
            found.append((signed(own - best), f"to the teacher ({best:.1f})"))
        if base is not None and best is not None and best > base:
            found.append((f"{(own - base) / (best - base):.0%}", f"of the way from {self.baseline} to the teacher"))
        return found

    def images(self, number: int, max_images: int, min_score: float) -> dict:
        """The section of images: examples, what they are, and what is missing."""
        if not number:
            return {"examples": [], "problem": "None were asked for."}
        name = self.run.name
        if name not in self._models:
            return {"examples": [], "problem": self._missing[name]}
        is_taught = self.teacher is not None and "teacher" in self._models
        teacher = (self.teacher.recipe, self._models["teacher"]) if is_taught else None
        note = (self._missing.get("teacher") or self.teacher.problem) if self.teacher and not teacher else ""
        try:
            dataset, records = read_test_set(self.run)
            used = records[:max_images]
            if teacher:
                try:
                    class_numbers(self.run, self.teacher.recipe)
                except DistillError as error:  # its detections cannot be compared
                    teacher, note = None, str(error)
            examples = show_examples(self.run, self._models[name], teacher, used, number, min_score)
        except DistillError as error:
            return {"examples": [], "problem": str(error)}
        pair = "teacher and student" if teacher else f"the ground truth and {name}"
        return {
            "examples": examples,
            "problem": "" if examples else f"In {len(used)} images of {dataset}, {pair} do not differ.",
            "pair": pair,
            "dataset": dataset,
            "number": len(used),
            "min_score": min_score,
            "note": note,
        }

    def costs(self, rounds: int) -> dict:
        """The section of costs: its table, and what is missing."""
        notes = [f"{name}: {reason}" for name, reason in self._missing.items()]
        if not rounds or not self._models:
            return {"table": None, "notes": notes if rounds else ["Not measured, as --rounds 0 asks for."]}
        with tempfile.TemporaryDirectory() as folder:
            try:
                records = read_test_set(self.run)[1]
            except DistillError as error:
                records = [_noise(Path(folder))]
                notes.append(f"Measured on an image of noise, on which next to nothing is detected. {error}")
            try:
                mappers = {run.name: run.recipe.build_mapper() for run in self.runs if run.name in self._models}
                if self.teacher and "teacher" in self._models:
                    mappers["teacher"] = teacher_mapper(self.run.recipe, self.teacher.recipe)
                where = torch.cuda.get_device_name() if self.run.cfg.MODEL.DEVICE.startswith("cuda") else "the CPU"
                table, more = cost_table(self._models, mappers, records, rounds, where)
            except DistillError as error:
                return {"table": None, "notes": [*notes, str(error)]}
        return {"table": table, "notes": notes + more}


def _noise(folder: Path) -> dict:
    """An image of noise in Detectron2's dataset format."""
    pixels = np.random.default_rng(0).integers(256, size=(480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return {"file_name": str(folder / "noise.png"), "height": 480, "width": 640, "image_id": 0}


def read_runs(folders: list[Path]) -> list[Run]:
    """Reads the folders of runs.

    Args:
        folders: as given.

    Returns:
        The runs, named by their folders with as much of the path as tells them apart.

    Raises:
        DistillError: see :class:`Run`, or a folder is given twice.
    """
    runs = [Run(folder) for folder in dict.fromkeys(x.resolve() for x in folders)]
    if len(runs) < len(folders):
        raise DistillError("A folder is given twice: expected OUTPUT_DIR and other runs, each once.")
    depth = 1
    while True:
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
        depth += 1
    if runs[0].recipe.is_distilled:  # the column of this name is the teacher's
        names = ["teacher (another run)" if name == "teacher" else name for name in names]
    for run, name in zip(runs, names):
        run.name = name
    return runs


def render(**content: object) -> str:
    """The page.

    Args:
        content: what page.html shows. All text is escaped, and addresses in it do not begin with http.

    Returns:
        HTML.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "report_parts"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_schemes,
    )
    return environment.get_template("page.html").render(**content)


def _without_schemes(value: object) -> object:
    """What browsers and mail programs would take for a link becomes text."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.replace("https://", "").replace("http://", "")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="of the run")
    parser.add_argument("others", type=Path, nargs="*", metavar="OTHER", help="a baseline, and further runs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: OUTPUT_DIR/report.html")
    parser.add_argument("--evaluate-teacher", action="store_true", help="on the run's test sets")
    parser.add_argument("--images", type=int, default=12, help="how many to show (default: 12; 0: none)")
    parser.add_argument("--max-images", type=int, default=200, help="of the test set, to choose from (default: 200)")
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, help="of detections in images (default: 0.5)")
    parser.add_argument("--rounds", type=int, default=20, help="images to time (default: 20; 0: cost is not measured)")
    args = parser.parse_args()
    for name in ("images", "max_images", "rounds"):
        if getattr(args, name) < 0:
            raise DistillError(f"--{name.replace('_', '-')} is {getattr(args, name)}: expected 0 or more.")
    for name in ("detectron2", "distill", "fvcore"):
        setup_logger(name=name)
    run, *others = read_runs([args.folder, *args.others])
    output = args.output or run.folder / "report.html"
    check_output_dir(str(output.parent), "--output")
    if output.is_dir():
        raise DistillError(f"--output is {str(output)!r}, which is a folder: name a file.")
    report = Report(run, others, args.evaluate_teacher)
    if args.images or args.rounds:
        report.load()
    page = render(
        run=run,
        folder=short_path(str(run.folder)),
        baseline=report.baseline,
        others=[other.name for other in report.runs[1:]],
        teacher=report.teacher,
        headline=report.headline(),
        facts=facts_table(report.facts()),
        scores=score_tables(report.scores(), run.name, report.baseline),
        unevaluated=[x.name for x in report.runs if not x.scores],
        unlike=[x.name for x in report.runs if not x.is_evaluated_as(run)],
        charts=draw_run(report.runs, report.teacher.scores if report.teacher else {}),
        images=report.images(args.images, args.max_images, args.min_score),
        costs=report.costs(args.rounds),
        colors=COLORS,
        date=datetime.date.today().isoformat(),
    )
    output.write_text(page, encoding="utf-8")
    print(f"The report: {output}")


if __name__ == "__main__":
    try:
        main()
    except DistillError as error:
        sys.exit(f"error: {error}")
