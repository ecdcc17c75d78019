"""The plot of a suite's lines: gain against cost."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from results import costs, finished, gain, mean_and_error
from suite import Row, Suite


def plot_costs(suite: Suite, lines: list[dict], path: Path) -> None:
    """Gain in AP against the cost of a step, both relative to a row's baseline; a panel for each baseline.

    Args:
        suite: the suite.
        lines: its lines.
        path: the PNG to write.
    """
    ratios = costs(suite, lines)
    shown = [row for row in suite.rows if row.name in ratios and finished(suite, row, lines)]
    panels = _panels(suite, [row for row in shown if (suite.baseline_of(row) or row) in shown])
    figure, axes = _figure(suite, [len(rows) for rows in panels.values()])
    for axis, (baseline, rows) in zip(axes, panels.items()):
        for row, color in rows:
            own, base = ([run["AP"] for run in finished(suite, x, lines)] for x in (row, suite.row(baseline)))
            is_baseline = row.name == baseline
            value, error = (0.0, mean_and_error(own)[1]) if is_baseline else gain(own, base)
            error = None if np.isnan(error) else error
            ratio = 1.0 if is_baseline else ratios[row.name]
            axis.errorbar(ratio, value, yerr=error, fmt="o", capsize=3, color=color, label=row.name)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_ylabel(f"gain in AP over\n{baseline}")
        _legend(axis)
    axes[-1].set_xlabel("cost of a step, relative to the baseline's")
    _save(figure, path)


def _panels(suite: Suite, rows: list[Row]) -> dict[str, list[tuple[Row, tuple[float, ...]]]]:
    """By baseline, those of the rows that belong to it and their colors, which do not depend on which are asked for."""
    palette = plt.get_cmap("tab10").colors + plt.get_cmap("Dark2").colors
    compared = {baseline.name for row in suite.rows if (baseline := suite.baseline_of(row))}
    panels = {}
    for row in suite.rows:
        baseline = suite.baseline_of(row)
        names = ([baseline.name] if baseline else []) + ([row.name] if row.name in compared else [])
        for name in names or [suite.baseline]:
            members = panels.setdefault(name, [])
            members.append((row, palette[len(members) % len(palette)]))
    panels = {name: [(row, color) for row, color in members if row in rows] for name, members in panels.items()}
    return {name: members for name, members in panels.items() if members} or {suite.baseline: []}


def _figure(suite: Suite, num_rows: list[int]) -> tuple[plt.Figure, list[plt.Axes]]:
    """With a panel for each number of rows, as high as its legend."""
    heights = [max(1.9, 0.6 + 0.2 * number) for number in num_rows] if len(num_rows) > 1 else [4.5]
    settings = {"figsize": (8.5, sum(heights)), "gridspec_kw": {"height_ratios": heights}}
    figure, axes = plt.subplots(len(heights), sharex=True, sharey=True, squeeze=False, **settings)
    axes[0, 0].set_title(suite.title)
    return figure, list(axes[:, 0])


def _legend(axis: plt.Axes) -> None:
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
