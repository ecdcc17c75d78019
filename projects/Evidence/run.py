#!/usr/bin/env python3
"""Runs the experiments behind docs/results.md, and writes it.

    python projects/Evidence/run.py --suite digits_rcnn --seeds 0 1 2 [--only ROW ...]    # trains what is missing
    python projects/Evidence/run.py --suite digits_rcnn --cost                            # times a step of each row
    python projects/Evidence/run.py --table                                               # prints and writes the tables
    python projects/Evidence/run.py --plot                                                # draws the plots

A suite is suites/NAME.yaml: rows, each a config with overrides, and one teacher. Each finished training is a line of
results/NAME.jsonl and is not repeated while its config stays what it is; a killed runner goes on from the last
checkpoint.
"""

import argparse
import json
import logging
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from results import DOCUMENT, METRICS, costs, document, finished, is_finished, read_lines
from suite import HERE, ROOT, Row, Suite, config_hash, load_suite, run_config, suite_names

from distill.errors import DistillError

sys.path.append(str(ROOT / "tools"))
from runs import TrainingFailed, read_metrics, train

logger = logging.getLogger("detectron2.evidence")


class Runner:
    """Trains the rows of one suite and writes a line for each.

    Args:
        suite: the suite.
        output: where the trainings lie.
        device: "cpu", "cuda", or empty for what the configs say where there is a GPU.
        lines_folder: where the lines go.
        num_gpus: for train_net.py.
    """

    def __init__(self, suite: Suite, output: Path, device: str, lines_folder: Path, num_gpus: int) -> None:
        self.suite = suite
        self.output = output
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.path = lines_folder / f"{suite.name}.jsonl"
        self.num_gpus = num_gpus
        self.spent: list[float] = []
        self.left = 0

    def run(self, seeds: list[int], only: list[str]) -> int:
        """Trains what is missing.

        Args:
            seeds: of the students.
            only: names of rows; empty for all.

        Returns:
            How many trainings failed.
        """
        suite = self.suite
        rows = [suite.row(name) for name in only] if only else suite.rows
        todo: list[tuple[Row, int | None]] = []
        needed = [suite.teacher_of(row) for row in rows if self._is_distilled(row)]
        for teacher in suite.teachers:
            is_there = self._is_finished(teacher, None) and (teacher not in needed or self._weights(teacher).exists())
            if (teacher in rows or teacher in needed) and not is_there:
                todo.append((teacher, None))
        students = [row for row in rows if row not in suite.teachers]
        todo += [(row, seed) for seed in seeds for row in students if not self._is_finished(row, seed)]
        failed = 0
        for index, (row, seed) in enumerate(todo):
            self.left = len(todo) - index - 1
            name = row.name if seed is None else f"{row.name}, seed {seed}"
            try:
                self._train(row, seed, f"[{index + 1}/{len(todo)}] {name}")
            except (TrainingFailed, DistillError) as error:
                failed += 1
                self._write(row, seed, {"status": "failed", "error": str(error).strip().splitlines()[-1]})
                logger.error(f"{name} failed:\n{error}")
                if row in suite.teachers:
                    logger.error("What is to learn from it will fail, too.")
        logger.info(
            f"{suite.name}: {len(todo) - failed} trainings finished, {failed} failed; the lines are in {self.path}"
        )
        return failed

    def cost(self, rounds: int) -> None:
        """Times a step of each row, in turns, and writes a line.

        Args:
            rounds: steps of each row that count.
        """
        from cost import measure

        suite = self.suite
        first = suite.row(suite.baseline)
        rows = [first, *(row for row in suite.rows if row is not first and row not in suite.teachers)]
        configs = {}
        for row in rows:
            configs[row.name] = self._config(row, 0)
            configs[row.name].OUTPUT_DIR = str(self.output / "cost")
        measured = measure(configs, rounds)
        line = {"suite": suite.name, "row": None, "seed": None, "status": "cost", "rounds": rounds, "rows": measured}
        self._append({**line, **self._circumstances()})

    def _folder(self, row: Row, seed: int | None) -> Path:
        name = row.name.replace("+", "_") + ("" if seed is None else f"_{seed}")
        return self.output / self.suite.name / f"{name}_{config_hash(self.suite, row)}"

    def _config(self, row: Row, seed: int | None) -> CfgNode:
        cfg = run_config(self.suite, row, seed, self._teacher(row))
        cfg.MODEL.DEVICE = self.device
        cfg.DATASETS.REGISTER = [
            name.replace("{bccd}", find_bccd()) if "{bccd}" in name else name for name in cfg.DATASETS.REGISTER
        ]
        return cfg

    def _weights(self, teacher: Row) -> Path:
        return self._folder(teacher, None) / "model_final.pth"

    def _teacher(self, row: Row) -> str:
        teacher = self.suite.teacher_of(row)
        return str(self._weights(teacher)) if teacher else ""

    def _is_distilled(self, row: Row) -> bool:
        return run_config(self.suite, row, 0).MODEL.META_ARCHITECTURE == "DistillationModel"

    def _is_finished(self, row: Row, seed: int | None) -> bool:
        lines = read_lines(self.suite.name, self.path.parent)
        return is_finished(lines, row.name, seed, config_hash(self.suite, row))

    def _train(self, row: Row, seed: int | None, title: str) -> None:
        folder = self._folder(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        cfg = self._config(row, seed)
        (folder / "run.yaml").write_text(cfg.dump())
        started = time.monotonic()

        def show(step: dict) -> None:
            own = step["eta_seconds"]
            average = statistics.fmean(self.spent) if self.spent else own + time.monotonic() - started
            total = timedelta(seconds=int(own + self.left * average))
            logger.info(f"{title}: step {step['iteration'] + 1}, {timedelta(seconds=int(own))} left, {total} in all")

        logger.info(f"{title}: training, log in {folder / 'train.log'}")
        arguments = ["--num-gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        peak = train(str(folder / "run.yaml"), folder, [], show, arguments)
        self.spent.append(time.monotonic() - started)
        self._write(row, seed, {"status": "finished", **summarize(folder, peak, cfg.SOLVER.MAX_ITER)})
        if row not in self.suite.teachers:
            shutil.rmtree(folder)  # the line has what counts

    def _write(self, row: Row, seed: int | None, content: dict) -> None:
        line = {"suite": self.suite.name, "row": row.name, "seed": seed, **content}
        self._append({**line, "config_hash": config_hash(self.suite, row), **self._circumstances()})

    def _circumstances(self) -> dict:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        return {
            "git_commit": commit.stdout.strip(),
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "device": describe_device(self.device),
        }

    def _append(self, line: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def summarize(folder: Path, peak_mib: float, iterations: int) -> dict:
    """What a finished run's metrics.json says.

    Args:
        folder: its OUTPUT_DIR.
        peak_mib: the memory of its process, which stands unless a GPU's is in the log.
        iterations: how many there were.

    Returns:
        The metrics of the end, AP over iterations, and what the training took.

    Raises:
        TrainingFailed: there was no evaluation.
    """
    records = read_metrics(folder)
    scores = sorted((x for x in records if "bbox/AP" in x), key=lambda record: record["iteration"])
    if not scores:
        raise TrainingFailed(f"{folder}/metrics.json has no bbox/AP: expected DATASETS.TEST to name a data set.")
    last = scores[-1]
    times = [record["time"] for record in records if "time" in record] or [0.0]  # none for less than four steps
    on_gpu = re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text())
    return {
        **{metric: _number(last.get(f"bbox/{metric}")) for metric in METRICS},
        "AP": _number(last["bbox/AP"]) or 0.0,  # the evaluator says nan where nothing was detected at all
        "curve": [[min(x["iteration"] + 1, iterations), _number(x["bbox/AP"]) or 0.0] for x in scores],
        "iterations": iterations,
        "seconds": round(statistics.fmean(times) * iterations, 1),
        "ms_per_step": round(statistics.median(times) * 1e3, 1),
        "peak_mib": float(on_gpu[-1]) if on_gpu else round(peak_mib, 1),
    }


def find_bccd() -> str:
    """Where the blood-cell images are.

    Returns:
        The folder with JPEGImages and Annotations.

    Raises:
        DistillError: they are nowhere.
    """
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "bccd"
    for place in (folder, ROOT.parent / "shared" / "data" / "bccd"):
        if (place / "Annotations").is_dir():
            return str(place.resolve())
    raise DistillError(
        f"The BCCD images are not in {folder}: download github.com/Shenggan/BCCD_Dataset and put its folder BCCD (with "
        "Annotations, ImageSets and JPEGImages) there, or set $DETECTRON2_DATASETS."
    )


def describe_device(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = found.group(1).strip()
    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    return f"{name}, {threads} thread{'' if str(threads) == '1' else 's'}"


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", metavar="NAME", help=f"{', '.join(suite_names())}, or a yaml of your own")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default as many as the suite wants")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--device", default="", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--num-gpus", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "evidence", metavar="DIR")
    parser.add_argument(
        "--lines", type=Path, default=HERE / "results", metavar="DIR", help="where the lines are written"
    )
    parser.add_argument("--cost", action="store_true", help="time a step of each row, in turns")
    parser.add_argument("--rounds", type=int, default=20, help="of --cost")
    parser.add_argument("--table", action="store_true", help="print and write docs/results.md")
    parser.add_argument("--plot", action="store_true", help="draw the plots of docs/results.md")
    args = parser.parse_args()
    setup_logger()
    try:
        failed = run(args)
    except DistillError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed else 0)


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for.

    Args:
        args: see ``main``.

    Returns:
        How many trainings failed.

    Raises:
        DistillError: a row or a suite is unknown.
    """
    if args.plot:
        from plots import plot_costs, plot_curves  # matplotlib is needed for nothing else

        for name in [args.suite] if args.suite else suite_names():
            suite, lines = load_suite(name), read_lines(name)
            if any(finished(lines, row.name) for row in suite.rows):
                plot_curves(suite, lines, ROOT / "docs" / "images" / f"{name}_curves.png")
            if costs(lines):
                plot_costs(suite, lines, ROOT / "docs" / "images" / f"{name}_cost.png")
    if args.table:
        text = document()
        DOCUMENT.write_text(text)
        print(text)
    if args.plot or args.table:
        return 0
    if not args.suite:
        raise DistillError(f"--suite is missing: expected one of {', '.join(suite_names())}.")
    suite = load_suite(args.suite)
    names = [row.name for row in suite.rows]
    unknown = [name for name in args.only if name not in names]
    if unknown:
        raise DistillError(
            f"The suite {suite.name} has no row {', '.join(unknown)}: expected some of {', '.join(names)}."
        )
    runner = Runner(suite, args.output.resolve(), args.device, args.lines, args.num_gpus)
    if args.cost:
        runner.cost(args.rounds)
        return 0
    return runner.run(args.seeds or list(range(suite.seeds)), args.only)


if __name__ == "__main__":
    main()
