"""Tables: what was trained, average precision, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from omegaconf import OmegaConf

from distill.config import detector_config
from distill.distillers.build import distiller_names
from distill.modeling.checkpoint import describe_weights
from distill.recipes import LazyRecipe, Recipe
from report_parts.reading import Metric, Run, Scores

MISSING = "\u2013"  # an en dash
_OVERALL = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP small", "APm": "AP medium", "APl": "AP large"}
TASKS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


class Cell(NamedTuple):
    """One of a table's."""

    text: str
    is_best: bool = False


class Table(NamedTuple):
    """A table of the page.

    Attributes:
        caption: a sentence, or nothing.
        columns: their headings, without that of the row's own names.
        rows: the row's name and its cells.
        is_numeric: whether the cells are figures.
    """

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    is_numeric: bool = True


def row_of(values: Sequence[float | None], digits: int, best: Callable | None = max) -> list[Cell]:
    """A row of figures, the best of them marked.

    Args:
        values: None or NaN for what is not known.
        digits: behind the point.
        best: ``max``, ``min`` or None.

    Returns:
        The cells.
    """
    known = [x for x in values if x is not None and math.isfinite(x)]
    top = f"{best(known):.{digits}f}" if best and len(known) > 1 else None
    texts = [MISSING if x is None or not math.isfinite(x) else f"{x:,.{digits}f}" for x in values]
    return [Cell(text, text.replace(",", "") == top) for text in texts]


def signed(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.1f}".replace("-", "\u2212") if math.isfinite(value) else MISSING


def score_tables(models: Mapping[str, Scores], run: str, baseline: str | None) -> list[tuple[str, list[Table]]]:
    """Average precision of the models side by side.

    Args:
        models: by name, their results.
        run: the name of the one that the page is about, whose test sets count.
        baseline: of the one that its gain is over.

    Returns:
        For each test set and task a heading and its tables: overall, and by class if that was measured.
    """
    own = models[run] or next((scores for scores in models.values() if scores), {})
    sections = []
    for dataset, task in dict.fromkeys((m.dataset, m.task) for m in own):
        names = [m.name for scores in models.values() for m in scores if (m.dataset, m.task) == (dataset, task)]
        names = list(dict.fromkeys(names))
        overall = [name for name in _OVERALL if name in names]
        overall += [name for name in names if not name.startswith("AP-") and name not in overall]
        classes = [name for name in names if name.startswith("AP-")]
        place = f" on {dataset}" if dataset else ""
        text = "In percent; AP is the mean over IoU 0.5 to 0.95, AP50 and AP75 are those of one IoU."
        tables = [_score_table(text, overall, dataset, task, models, run, baseline)]
        if classes:
            tables.append(_score_table("AP of each class, in percent.", classes, dataset, task, models, run, baseline))
        sections.append((f"{TASKS[task].capitalize()}{place}", tables))
    return sections


def _score_table(
    caption: str,
    names: Sequence[str],
    dataset: str,
    task: str,
    models: Mapping[str, Scores],
    run: str,
    baseline: str | None,
) -> Table:
    columns = list(models)
    rows = []
    for name in names:
        metric = Metric(dataset, task, name)
        cells = row_of([scores.get(metric) for scores in models.values()], 1)
        if baseline:
            gain = models[run].get(metric, math.nan) - models[baseline].get(metric, math.nan)
            cells.append(Cell(signed(gain)))
        rows.append((name.removeprefix("AP-") if name.startswith("AP-") else _OVERALL.get(name, name), cells))
    if baseline:
        columns.append(f"gain over {baseline}")
    return Table(caption, columns, rows)


def facts_table(models: Mapping[str, dict[str, str]]) -> Table:
    """What was trained from what.

    Args:
        models: by name, what :func:`describe` returned.

    Returns:
        The table, a column for each model. A row that is empty for all is left out.
    """
    keys = dict.fromkeys(key for facts in models.values() for key in facts)
    order = [key for key in keys if any(facts.get(key) for facts in models.values())]
    rows = [(key, [Cell(facts.get(key) or MISSING) for facts in models.values()]) for key in order]
    return Table("", list(models), rows, is_numeric=False)


def describe(recipe: Recipe, run: Run | None) -> dict[str, str]:
    """The facts of a training.

    Args:
        recipe: its config.
        run: its folder, if there is one.

    Returns:
        By name, as text; empty for what is not known or does not apply.
    """
    cfg, node = recipe.cfg, recipe.cfg.DISTILL
    distilled = recipe.is_distilled
    iterations = f"{cfg.SOLVER.MAX_ITER:,}"
    if run is not None and run.done < run.max_iter:
        iterations = f"{run.done:,} of {run.max_iter:,}"
    versions = run.versions if run is not None else {}
    return {
        "Detector": detector_config(cfg).MODEL.META_ARCHITECTURE,
        "Backbone": _backbone(recipe),
        "Starts from": short_path(describe_weights(cfg)),
        "Inherits from the teacher": ", ".join(node.STUDENT.INHERIT) if distilled else "",
        "Teacher": short_path(node.TEACHER.WEIGHTS or node.TEACHER.CONFIG_FILE) if distilled else "",
        "Distillers": _distillers(recipe, run) if distilled else "",
        "Balance of gradients": (f"{node.BALANCE:g}" if node.BALANCE else "off") if distilled else "",
        "Trained on": ", ".join(cfg.DATASETS.TRAIN),
        "Tested on": ", ".join(cfg.DATASETS.TEST),
        "Iterations": iterations,
        "Images per iteration": _images(cfg),
        "Learning rate": f"{cfg.SOLVER.BASE_LR:g}",
        "Optimizer": _optimizer(recipe),
        "Seed": str(cfg.SEED) if cfg.SEED >= 0 else "",
        "Detectron2": versions.get("Detectron2", ""),
        "PyTorch": versions.get("PyTorch", ""),
    }


def short_path(path: str) -> str:
    """A path from the current folder on, if it lies in there."""
    try:
        return str(Path(path).relative_to(Path.cwd())) if Path(path).is_absolute() else path
    except ValueError:
        return path


def _distillers(recipe: Recipe, run: Run | None) -> str:
    weighing = run.weighing if run is not None else {}
    texts = []
    for name in distiller_names(recipe.cfg):
        text = name
        if name in weighing:
            weight, warmup, decay = weighing[name]
            text += f", weight {weight:g}"
            text += f", grows over {warmup} iterations" if warmup else ""
            text += f", falls over the last {decay:.0%}" if decay else ""
        texts.append(text)
    return "; ".join(texts) or "none"


def _images(cfg: CfgNode) -> str:
    batches = cfg.SOLVER.ACCUMULATE
    return f"{cfg.SOLVER.IMS_PER_BATCH}" + (f" times {batches} batches" if batches > 1 else "")


def _optimizer(recipe: Recipe) -> str:
    if isinstance(recipe, LazyRecipe):
        return _target(OmegaConf.select(recipe.lazy, "optimizer"))
    return recipe.cfg.SOLVER.OPTIMIZER


def _backbone(recipe: Recipe) -> str:
    if isinstance(recipe, LazyRecipe):
        node = OmegaConf.select(recipe.lazy, "model.backbone")
        inner = next((node[key] for key in ("bottom_up", "net") if node is not None and key in node), None)
        depth = OmegaConf.select(recipe.lazy, "model.backbone.bottom_up.stages.depth")
        network = f"ResNet-{depth}" if depth else _target(inner)
        return f"{network} with {_target(node)}" if network else _target(node)
    model = recipe.cfg.MODEL
    name = model.BACKBONE.NAME
    if name == "build_timm_fpn_backbone":
        return f"{model.TIMM.NAME} with FPN, {model.FPN.OUT_CHANNELS} channels"
    if "resnet" not in name:
        return name
    width = "" if model.RESNETS.WIDTH_MULT == 1 else f" at {model.RESNETS.WIDTH_MULT:g} of its width"
    fpn = f" with FPN, {model.FPN.OUT_CHANNELS} channels" if "fpn" in name else ""
    return f"ResNet-{model.RESNETS.DEPTH}{width}{fpn}"


def _target(node: Any) -> str:
    """The class that a node of a Python config builds."""
    target = node.get("_target_", "") if node is not None else ""
    return target.rpartition(".")[2] if isinstance(target, str) else getattr(target, "__name__", str(target))
