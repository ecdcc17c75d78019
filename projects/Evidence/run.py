#!/usr/bin/env python3
"""Runs the experiments behind docs/results.md, and writes it.

    python projects/Evidence/run.py --suite demo --seeds 0 1 2 [--only ROW ...]   # trains what is missing
    python projects/Evidence/run.py --suite demo --cost                           # times a step of each row
    python projects/Evidence/run.py --table                                       # prints and writes the tables
    python projects/Evidence/run.py --plot                                        # draws the plots

A suite is suites/NAME.yaml: rows, each a config with overrides, and one teacher. Each finished training is a line of
results/NAME.jsonl and is not repeated while its config stays what it is; a killed runner goes on from the last
checkpoint.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import detectron2
import torch
from cost import measure
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from results import LINES, METRICS, costs, is_finished, read_lines, table, where, write_documents
from suite import ROOT, Row, Suite, config_hash, load_suite, run_config, suite_names

from distill.errors import DistillError

sys.path.append(str(ROOT / "tools"))
from runs import FolderInUse, TrainingFailed, read_metrics, train

logger = logging.getLogger("detectron2.evidence")

CODE = ("distill", "configs", "projects/AttentionTransfer", "train_net.py")  # what a training is made of


class Runner:
    """Trains the rows of one suite and writes a line for each.

    Args:
        suite: the suite.
        output: where the trainings lie.
        device: "cpu", "cuda", or empty for what the configs say where there is a GPU.
        lines_folder: where the lines go.
        num_gpus: for train_net.py.

    Raises:
        DistillError: there is no such device.
    """

    def __init__(self, suite: Suite, output: Path, device: str, lines_folder: Path, num_gpus: int) -> None:
        self.suite = suite
        self.output = output
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise DistillError("--device is cuda, but torch finds no GPU here: expected cpu.")
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
            How many trainings failed, or were left out.
        """
        suite = self.suite
        rows = [suite.row(name) for name in only] if only else suite.rows
        students = [row for row in rows if row not in suite.teachers]
        todo = [(row, seed) for seed in seeds for row in students if not self._is_finished(row, seed)]
        needed = [self._learns_from(row) for row, _ in todo]
        teachers = [
            (row, None)
            for row in suite.teachers
            if (row in rows and not self._is_finished(row, None)) or (row in needed and not self._weights(row).exists())
        ]
        configs = [(row, seed, self._config(row, seed)) for row, seed in teachers + todo]  # errors now, not in an hour
        failed: list[str] = []
        for index, (row, seed, cfg) in enumerate(configs):
            self.left = len(configs) - index - 1
            name = row.name if seed is None else f"{row.name}, seed {seed}"
            teacher = self._learns_from(row)
            if teacher and teacher.name in failed:
                logger.error(f"{name} is left out: its teacher is not there.")
                continue
            if seed is not None and self._is_finished(row, seed):
                continue  # by another runner
            line = self._line(row, seed)
            try:
                outcome = {"status": "finished", **self._train(row, seed, cfg, f"[{index + 1}/{len(configs)}] {name}")}
            except FolderInUse as error:  # by another runner, which will write the line
                failed.append(row.name)
                logger.error(f"{name} is left out: {error}")
                continue
            except (TrainingFailed, DistillError) as error:
                failed.append(row.name)
                outcome = {"status": "failed", "error": "\n".join(str(error).strip().splitlines()[-2:])}
                logger.error(f"{name} failed:\n{error}")
            self._append({**line, **outcome})
        logger.info(f"{suite.name}: {len(failed)} of {len(configs)} runs not done; the lines are in {self.path}")
        return len(failed)

    def cost(self, rounds: int) -> None:
        """Times a step of each row, in turns, and writes a line.

        Args:
            rounds: steps of each row that count.

        Raises:
            DistillError: no row is compared with another.
        """
        suite = self.suite
        baselines = {row.name: other.name for row in suite.rows if (other := suite.baseline_of(row))}
        if not baselines:
            raise DistillError(f"The suite {suite.name} names no baseline, which costs are relative to.")
        baselines = {**{name: name for name in baselines.values()}, **baselines}  # a baseline may have one of its own
        configs = {name: self._config(suite.row(name), 0) for name in baselines}
        for cfg in configs.values():
            cfg.OUTPUT_DIR = str(self.output / "cost")
        line = {"suite": suite.name, "row": None, "seed": None, "status": "cost", "rounds": rounds}
        line.update(self._circumstances())
        measured = measure(configs, baselines, rounds)
        for name, numbers in measured.items():
            numbers["config_hash"] = config_hash(suite, suite.row(name))
        self._append({**line, "rows": measured})

    def _folder(self, row: Row, seed: int | None) -> Path:
        name = row.name.replace("+", "_") + ("" if seed is None else f"_{seed}")
        return self.output / self.suite.name / f"{name}_{config_hash(self.suite, row)}"

    def _config(self, row: Row, seed: int | None) -> CfgNode:
        teacher = self.suite.teacher_of(row)
        cfg = run_config(self.suite, row, seed, str(self._weights(teacher)) if teacher else "")
        cfg.MODEL.DEVICE = self.device
        cfg.DATASETS.REGISTER = [
            name.replace("{bccd}", find_bccd()) if "{bccd}" in name else name for name in cfg.DATASETS.REGISTER
        ]
        return cfg

    def _weights(self, teacher: Row) -> Path:
        return self._folder(teacher, None) / "model_final.pth"

    def _learns_from(self, row: Row) -> Row | None:
        is_distilled = run_config(self.suite, row, 0).MODEL.META_ARCHITECTURE == "DistillationModel"
        return self.suite.teacher_of(row) if is_distilled else None

    def _is_finished(self, row: Row, seed: int | None) -> bool:
        return is_finished(self.suite, row, seed, read_lines(self.suite.name, self.path.parent))

    def _train(self, row: Row, seed: int | None, cfg: CfgNode, title: str) -> dict:
        folder = self._folder(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
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
        for checkpoint in (*folder.glob("model_0*.pth"), *folder.glob("model_best.pth")):
            checkpoint.unlink()
        return summarize(folder, peak, cfg)

    def _line(self, row: Row, seed: int | None) -> dict:
        line = {"suite": self.suite.name, "row": row.name, "seed": seed, "config_hash": config_hash(self.suite, row)}
        teacher = self._learns_from(row)
        if teacher and self._weights(teacher).exists():  # trainings of one config differ between kinds of processors
            line["teacher_sha256"] = hashlib.sha256(self._weights(teacher).read_bytes()).hexdigest()[:12]
        return {**line, **self._circumstances()}

    def _circumstances(self) -> dict:
        def git(*args: str) -> subprocess.CompletedProcess:
            return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)

        is_dirty = git("diff", "--quiet", "HEAD", "--", *CODE).returncode
        return {
            "git_commit": git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if is_dirty else ""),
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "device": describe_device(self.device, self.num_gpus),
        }

    def _append(self, line: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")  # by a runner that was killed
        with self.path.open("a") as stream:
            stream.write(is_torn * "\n" + json.dumps(line) + "\n")


def summarize(folder: Path, peak_mib: float, cfg: CfgNode) -> dict:
    """What a finished run's metrics.json says.

    Args:
        folder: its OUTPUT_DIR.
        peak_mib: the memory of its process; on a GPU that in the log stands instead.
        cfg: its config.

    Returns:
        The metrics of the end, and what the training took.

    Raises:
        TrainingFailed: there was no evaluation.
    """
    records = read_metrics(folder)
    scores = sorted((x for x in records if "bbox/AP" in x), key=lambda record: record["iteration"])
    if not scores:
        raise TrainingFailed(f"{folder}/metrics.json has no bbox/AP: expected DATASETS.TEST to name a dataset.")
    last = {metric: scores[-1].get(f"bbox/{metric}") for metric in METRICS}
    if math.isnan(last["AP"]):  # the evaluator's way of saying that nothing was detected at all
        last.update({metric: 0.0 for metric in METRICS if last[metric] is not None})
    times = [record["time"] for record in records if "time" in record] or [0.0]  # none for less than four steps
    if cfg.MODEL.DEVICE != "cpu":
        peak_mib = float(re.findall(r"max_mem: (\d+)M", (folder / "log.txt").read_text())[-1])
    iterations = cfg.SOLVER.MAX_ITER
    return {
        **{metric: _number(value) for metric, value in last.items()},
        "iterations": iterations,
        "seconds": round(statistics.fmean(times) * iterations, 1),
        "ms_per_step": round(statistics.median(times) * 1e3, 1),
        "peak_mib": round(peak_mib, 1),
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


def describe_device(device: str, num_gpus: int) -> str:
    """The GPU's name and their number, or the processor's with that of threads."""
    if device == "cuda":
        return f"{num_gpus} {torch.cuda.get_device_name()}"
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
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="by default all rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="by default a GPU where there is one")
    parser.add_argument("--num-gpus", type=int, default=1, help="of one training")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "evidence", metavar="DIR", help="trainings")
    parser.add_argument("--lines", type=Path, default=LINES, metavar="DIR", help="where the lines are")
    parser.add_argument("--cost", action="store_true", help="time a step of each row, in turns")
    parser.add_argument("--rounds", type=int, default=20, help="of --cost")
    parser.add_argument(
        "--table",
        action="store_true",
        help="print and write docs/results.md, and the tables of README.md; with --suite, print its table alone",
    )
    parser.add_argument("--plot", action="store_true", help="draw the plots of docs/results.md")
    args = parser.parse_args()
    setup_logger()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends, too
    try:
        failed = run(args)
    except DistillError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if failed else 0)


def _table(name: str, folder: Path) -> str:
    suite = load_suite(name)
    lines = read_lines(suite.name, folder)
    return f"{table(suite, lines)}\n{where(suite, lines)}"


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for.

    Args:
        args: see ``main``.

    Returns:
        How many trainings failed, or were left out.

    Raises:
        DistillError: a row or a suite is unknown.
    """
    if args.rounds < 1:
        raise DistillError(f"--rounds is {args.rounds}: expected 1 or more.")
    if args.plot:
        from plots import plot_costs  # matplotlib is needed for nothing else

        for name in [args.suite] if args.suite else suite_names():
            suite = load_suite(name)
            lines = read_lines(suite.name, args.lines)
            if costs(suite, lines):
                plot_costs(suite, lines, ROOT / "docs" / "images" / f"{suite.name}_cost.png")
    if args.table:
        print(_table(args.suite, args.lines) if args.suite else write_documents(args.lines))
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
    runner = Runner(suite, args.output.resolve(), args.device, args.lines.resolve(), args.num_gpus)
    os.chdir(ROOT)  # which the paths in configs are relative to
    if args.cost:
        runner.cost(args.rounds)
        return 0
    return runner.run(args.seeds or list(range(suite.seeds)), args.only)


if __name__ == "__main__":
    main()
