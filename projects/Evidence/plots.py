"""Plots of a suite's lines: AP over iterations, and gain against cost."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from results import costs, finished, gain, mean_and_error
from suite import Suite


def plot_curves(suite: Suite, lines: list[dict], path: Path) -> None:
    """AP over iterations, the mean over the seeds with a band of one standard error; the teacher as a line.

    Args:
        suite: the suite.
        lines: its lines.
        path: the PNG to write.
    """
    figure, axis = plt.subplots(figsize=(8.5, 4.5))
    colors = _colors(suite)
    for row in suite.rows:
        color = colors[row.name]
        runs = finished(suite, row, lines)
        if row in suite.teachers or not runs:
            continue
        curves = [dict(map(tuple, run["curve"])) for run in runs]
        iterations = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[iteration] for iteration in iterations] for curve in curves])
        mean = values.mean(0)
        style = "--" if row.name == suite.baseline else "-"
        axis.plot(iterations, mean, style, color=color, label=row.name, marker="o", markersize=3)
        if len(runs) > 1:
            error = values.std(0, ddof=1) / np.sqrt(len(runs))
            axis.fill_between(iterations, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    for teacher in suite.teachers:
        for run in finished(suite, teacher, lines):
            axis.axhline(run["AP"], color="black", linewidth=1, label=teacher.name)
    axis.set_xlabel("iteration")
    axis.set_ylabel("AP")
    axis.set_title(suite.title)
    _legend(axis)
    _save(figure, path)


def plot_costs(suite: Suite, lines: list[dict], path: Path) -> None:
    """Gain in AP against the cost of a step, both relative to a row's baseline.

    Args:
        suite: the suite.
        lines: its lines.
        path: the PNG to write.
    """
    figure, axis = plt.subplots(figsize=(8.5, 4.5))
    colors = _colors(suite)
    for name, ratio in costs(suite, lines).items():
        row = suite.row(name)
        own, base = ([x["AP"] for x in finished(suite, x, lines)] for x in (row, suite.baseline_of(row) or row))
        if not own or not base:
            continue
        value, error = gain(own, base) if suite.baseline_of(row) else (0.0, mean_and_error(own)[1])
        axis.errorbar(
            ratio, value, yerr=None if np.isnan(error) else error, fmt="o", capsize=3, color=colors[name], label=name
        )
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("cost of a step, relative to the row's baseline")
    axis.set_ylabel("gain in AP over the row's baseline")
    axis.set_title(suite.title)
    _legend(axis)
    _save(figure, path)


def _legend(axis: plt.Axes) -> None:
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _colors(suite: Suite) -> dict[str, tuple[float, ...]]:
    """A row's color, the same in both plots."""
    palette = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
    return dict(zip((row.name for row in suite.rows), itertools.cycle(palette)))


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
