"""What a run's folder holds: config, metrics, log, weights. And who taught it."""

from __future__ import annotations

import copy
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.evaluation.testing import flatten_results_dict
from runs import read_metrics

from distill.config import is_record, read_record
from distill.data import register_from_config
from distill.engine import evaluate_teacher
from distill.engine.checkpoints import PREVIOUS_BEST
from distill.errors import DistillError
from distill.modeling.teacher import teacher_recipe
from distill.recipes import Recipe, load_recipe

_METRIC = re.compile(r"(?:(.*?)/)??(bbox|segm|keypoints)/(AP.*)", re.DOTALL)
_SCALED = re.compile(r"The schedule is for (\d+) processes")
_ROW = re.compile(r"\| *(\S+) *\| *([-+.\de]+) *\| *(\d+) *\| *([-+.\de]+) *\|")


class Metric(NamedTuple):
    """What was measured: on which test set, for "bbox", "segm" or "keypoints", and "AP", "AP50", "AP-CLASS"..."""

    dataset: str
    task: str
    name: str


Scores = dict[Metric, float]


def parse_scores(record: dict[str, Any], test_sets: Sequence[str]) -> Scores:
    """The results of an evaluation among what Detectron2 logs.

    Args:
        record: by name. Results on one test set do not say on which; those on several begin with its name.
        test_sets: of the run.

    Returns:
        The results; empty if there are none.
    """
    found = {}
    for key, value in record.items():
        match = _METRIC.fullmatch(key)
        if match and isinstance(value, int | float):
            dataset, task, name = match.groups()
            found[Metric(dataset or ", ".join(test_sets), task, name)] = float(value)
    return found


def merge_records(records: Sequence[dict]) -> dict[int, dict]:
    """The records of metrics.json by iteration. Of an iteration that was logged twice the later record counts; what a
    training logged beyond the iteration that a resumed one went on from is left out.

    Args:
        records: in the order of the file.

    Returns:
        By iteration, ascending.
    """
    merged: dict[int, dict] = {}
    last = -1
    for record in records:
        iteration = record.get("iteration")
        if not isinstance(iteration, int):
            continue
        if "total_loss" in record:
            if iteration <= last:
                merged = {key: value for key, value in merged.items() if key < iteration}
            last = iteration
        merged.setdefault(iteration, {}).update(record)
    return dict(sorted(merged.items()))


def find_config(folder: Path) -> Path | None:
    """The config that train_net.py wrote to a folder: of a run from a Python config the config.py, since its
    config.yaml is text alone. Another config.py is not executed."""
    record = folder / "config.py"
    if record.is_file() and is_record(record):
        return record
    return folder / "config.yaml" if (folder / "config.yaml").is_file() else None


class Run:
    """A folder that train_net.py wrote.

    Args:
        folder: its OUTPUT_DIR.
        recipe: of the run; by default that of the config in there.

    Attributes:
        recipe: of the run, on the CPU where there is no CUDA. A Python config is executed.
        records: what metrics.json holds, see :func:`merge_records`.
        versions: of "Detectron2" and "PyTorch", as the log has them.
        weighing: of each distiller, its LOSS_WEIGHT, WARMUP_ITERS and DECAY, as the log has them.

    Raises:
        DistillError: the folder is none of a run, or its config cannot be read.
    """

    def __init__(self, folder: Path, recipe: Recipe | None = None) -> None:
        self.folder = folder = folder.resolve()
        self.name = folder.name
        config = find_config(folder)
        if config is None:
            raise DistillError(
                f"{folder} is no run: expected the OUTPUT_DIR of a training, with the config.yaml or config.py that "
                "train_net.py writes there."
            )
        self.recipe = recipe or load_recipe(str(config))
        if self.cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
        self.records = merge_records(read_metrics(folder))
        self.versions, self.weighing, num_processes = _read_log(folder / "log.txt")
        if num_processes:
            self.recipe.scale_workers(num_processes)

    @property
    def cfg(self) -> Any:
        """The config in yaml keys."""
        return self.recipe.cfg

    @property
    def max_iter(self) -> int:
        """Iterations that the training takes."""
        return self.cfg.SOLVER.MAX_ITER

    @property
    def done(self) -> int:
        """Iterations of which the losses are logged."""
        return max((i + 1 for i, record in self.records.items() if "total_loss" in record), default=0)

    @property
    def weights(self) -> Path | None:
        """model_final.pth, if it is there."""
        path = self.folder / "model_final.pth"
        return path if path.is_file() else None

    def is_evaluated_as(self, other: Run) -> bool:
        """Whether the test sets that both name are the same ones, by the same metric, as far as the configs say."""
        sides = []
        for run in (self, other):
            node = run.cfg.DATASETS
            entries = dict(str(entry).split("=", 1) for entry in node.REGISTER if "=" in str(entry))
            sides.append({name: (entries.get(name), entries.get(name) and node.METRIC) for name in node.TEST})
        return all(sides[0][name] == sides[1][name] for name in sides[0].keys() & sides[1].keys())

    @property
    def evaluations(self) -> dict[int, Scores]:
        """The results of all evaluations by iteration."""
        return _evaluations(self.records, self.cfg.DATASETS.TEST)

    @property
    def scores(self) -> Scores:
        """The results of the last evaluation; empty if there was none."""
        return list(self.evaluations.values())[-1] if self.evaluations else {}

    def curve(self, key: str) -> list[tuple[int, float]]:
        """A number that was logged, over the iterations; where it is not finite it is NaN."""
        points = [(i, record[key]) for i, record in self.records.items() if isinstance(record.get(key), int | float)]
        return [(i, float(value) if math.isfinite(value) else math.nan) for i, value in points]

    def keys(self, prefix: str) -> list[str]:
        """The names of what was logged that begin so."""
        return sorted({key for record in self.records.values() for key in record if key.startswith(prefix)})

    def detector(self) -> Recipe:
        """The recipe of the trained detector alone, which is the student's where there is one.

        Raises:
            DistillError: there is no model_final.pth.
        """
        if self.weights is None:
            raise DistillError(f"There is no model_final.pth in {self.folder}: the training has not ended.")
        return self.recipe.detector(str(self.weights))


class TeacherOf:
    """The teacher of a distilled run, as far as it is known here.

    Args:
        run: whose DISTILL.TEACHER counts.
        evaluate: evaluate it on the run's test sets, instead of looking for its metrics.json.

    Attributes:
        recipe: of the detector, with its weights; None where it cannot be read.
        folder: where its weights lie, if it is that of a training.
        run: this training, if its config can be read without executing a program that the student's does not name.
        scores: its results.
        problem: why there are none, in a sentence; empty if there are some.
    """

    def __init__(self, run: Run, evaluate: bool = False) -> None:
        self.recipe: Recipe | None = None
        self.folder: Path | None = None
        self.run: Run | None = None
        self.scores: Scores = {}
        self.problem = ""
        try:
            self.recipe = teacher_recipe(run.cfg)
            weights = self.recipe.cfg.MODEL.WEIGHTS
            config = find_config(Path(weights).parent) if Path(weights).is_file() else None
            if config:
                self.folder = config.parent.resolve()
                self.run = _teachers_run(config, Path(run.cfg.DISTILL.TEACHER.CONFIG_FILE))
            self.scores = _evaluate(run) if evaluate else self._logged(Path(weights))
        except DistillError as error:
            self.problem = f"The teacher's results are not known: {error}"
            return
        wanted = set(run.cfg.DATASETS.TEST)
        if not self.scores:
            self.problem = "The teacher's results are not known, since no evaluation is logged beside its weights."
        elif wanted and not wanted & {metric.dataset for metric in self.scores}:
            others = ", ".join(sorted({metric.dataset for metric in self.scores}))
            self.problem = f"The teacher was evaluated on {others}, not on {', '.join(sorted(wanted))}."
        if self.problem:
            self.problem += " --evaluate-teacher evaluates it."

    def _logged(self, weights: Path) -> Scores:
        """The results in the metrics.json beside its weights: of an intermediate checkpoint or the best, those of its
        iteration."""
        if self.run is None:
            found = _evaluations(merge_records(read_metrics(weights.parent)), self.recipe.cfg.DATASETS.TEST)
        else:
            found = self.run.evaluations
        iteration = _iteration_of(weights)
        if iteration is None:
            return list(found.values())[-1] if found else {}
        # the evaluation after the last iteration is logged one later
        return found.get(iteration) or found.get(iteration + 1, {})


def _teachers_run(config: Path, named: Path) -> Run | None:
    """The training of a teacher's folder. Its ``config.py`` executes another file, which must be the one that the
    student's config names."""
    if config.suffix == ".yaml" or config.resolve() == named.resolve():
        return Run(config.parent)
    origin, overrides = read_record(config.read_text())
    return Run(config.parent, load_recipe(origin, overrides)) if Path(origin).resolve() == named.resolve() else None


def _iteration_of(weights: Path) -> int | None:
    """After which iteration, counted from 0, a run wrote a checkpoint; None for its last. -2 where it does not say."""
    numbered = re.fullmatch(r"model_(\d{7})", weights.stem)
    if numbered:
        return int(numbered[1])
    if weights.name == PREVIOUS_BEST:
        return -2
    if weights.name != "model_best.pth":
        return None
    try:
        content = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        # the second is what Detectron2's BestCheckpointer writes
        return content["best"]["iterations"] - 1 if "best" in content else content.get("iteration", -2)
    except Exception as error:
        raise DistillError(f"'{weights}' cannot be read: {type(error).__name__}: {error}") from error


def _evaluate(run: Run) -> Scores:
    register_from_config(run.cfg, run.cfg.DATASETS.TEST)
    recipe = copy.copy(run.recipe)
    recipe.cfg = run.cfg.clone()
    recipe.cfg.defrost()
    with tempfile.TemporaryDirectory() as folder:  # nothing is written to the run's own
        recipe.cfg.OUTPUT_DIR = folder
        results = evaluate_teacher(recipe)
    return parse_scores(flatten_results_dict(results), run.cfg.DATASETS.TEST)


def _evaluations(records: dict[int, dict], test_sets: Sequence[str]) -> dict[int, Scores]:
    found = {i: parse_scores(record, test_sets) for i, record in records.items()}
    return {i: scores for i, scores in found.items() if scores}


def _read_log(path: Path) -> tuple[dict[str, str], dict[str, tuple[float, int, float]], int]:
    """Versions, the distillers' weights, and how many processes the schedule is for (0: any): the last in a log."""
    versions, weighing, num_processes, in_table = {}, {}, 0, False
    if not path.is_file():
        return versions, weighing, num_processes
    with path.open(errors="replace") as lines:
        for line in lines:
            first, _, rest = line.partition(" ")
            if first in ("detectron2", "PyTorch") and rest.startswith(" ") and rest.split():
                versions[{"detectron2": "Detectron2"}.get(first, first)] = rest.split()[0]
            elif line.rstrip().endswith("INFO: Distillers:"):
                in_table, weighing = True, {}
            elif in_table and line.startswith("|"):
                row = _ROW.match(line)
                if row:
                    weighing[row[1]] = (float(row[2]), int(row[3]), float(row[4]))
            else:
                in_table = False
                scaled = _SCALED.search(line)
                num_processes = int(scaled[1]) if scaled else num_processes
    return versions, weighing, num_processes
