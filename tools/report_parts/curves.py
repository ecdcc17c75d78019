"""Charts as SVG that takes the page's colours, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from report_parts.reading import Metric, Run, Scores

NUM_COLORS = 8  # --c0 ... of page.html
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# what is drawn in these colours gets those of the page
_INK, _GRID = "#010203", "#040506"


class Line(NamedTuple):
    """A line of a chart: its name in the legend, points (iteration, value), the number of its colour, and whether it is
    dashed."""

    name: str
    points: list[tuple[float, float]]
    color: int
    dashed: bool = False


class Chart(NamedTuple):
    """A chart of the page, with its legend: name, number of the colour, and whether it is dashed."""

    title: str
    caption: str
    svg: Markup
    legend: list[tuple[str, int, bool]]


def draw_chart(title: str, caption: str, lines: Sequence[Line], is_log: bool = False) -> Chart | None:
    """Draws lines over iterations.

    Args:
        title: a few words.
        caption: a sentence.
        lines: points that are NaN leave a gap.
        is_log: logarithmic, if all values are above zero.

    Returns:
        The chart; None if there is nothing to draw.
    """
    lines = [line for line in lines if any(math.isfinite(value) for _, value in line.points)]
    if not lines:
        return None
    values = [value for line in lines for _, value in line.points if math.isfinite(value)]
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure, axis = plt.subplots(figsize=(4.8, 2.9))
        for line in lines:
            iterations, ys = zip(*line.points)
            few = sum(map(math.isfinite, ys)) == 1
            style = "--" if line.dashed else "-"
            marker = "o" if few and not line.dashed else None
            axis.plot(iterations, ys, style, color=_color(line.color), linewidth=1.8, marker=marker, markersize=6)
        if is_log and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
            axis.yaxis.set_minor_locator(LogLocator(subs=()))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        elif min(values) >= 0:
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axis.set_xlabel("iteration", color=_INK)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.tick_params(color=_GRID, labelcolor=_INK)
        for spine in axis.spines.values():
            spine.set_color(_GRID)
        axis.set_axisbelow(True)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05)
        plt.close(figure)
    return Chart(title, caption, _inline(stream.getvalue()), [(x.name, x.color, x.dashed) for x in lines])


def _color(number: int) -> str:
    return f"#0a0b{number % NUM_COLORS:02x}"


def _inline(svg: str) -> Markup:
    """An SVG file as a part of a page: without what names other documents, without ids that charts share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 role="img" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    return Markup(re.sub(r"#0a0b(\d\d)", lambda found: f"var(--c{int(found[1])})", svg))


def draw_run(runs: Sequence[Run], teacher: Scores) -> list[Chart]:
    """The charts of the page.

    Args:
        runs: the one that the page is about, and those beside it.
        teacher: its results, where known.

    Returns:
        AP of all of them; of the run its losses, the weights of those of its distillers, and the ratio of gradients.
    """
    run = runs[0]
    distilled = [key.removeprefix("weight/") for key in run.keys("weight/")]
    own = [key for key in run.keys("loss") if key not in distilled and "/" not in key]
    ratios = run.keys("gradient_ratio/")
    weighed = "as they are added to the detection losses, weights included"
    found = [
        _ap_chart(runs, teacher),
        draw_chart("Detection losses", f"The student's own losses in {run.name}.", _lines(run, own), is_log=True),
        draw_chart("Distillation losses", f"The distillers' losses, {weighed}.", _lines(run, distilled), is_log=True),
        draw_chart(
            "Weights",
            "What each of the distillers' losses is multiplied by, after ramps and the balance of gradients.",
            _lines(run, [f"weight/{key}" for key in distilled], "weight/"),
            is_log=True,
        ),
        draw_chart(
            "Gradient ratios",
            "Each distiller's gradient at the student's features, relative to that of the detection losses. "
            "Far above 1 a distiller drowns them.",
            _lines(run, ratios, "gradient_ratio/"),
        ),
    ]
    return [chart for chart in found if chart is not None]


def _lines(run: Run, keys: Sequence[str], prefix: str = "") -> list[Line]:
    return [Line(key.removeprefix(prefix), run.curve(key), index) for index, key in enumerate(keys)]


def _ap_chart(runs: Sequence[Run], teacher: Scores) -> Chart | None:
    first = next((metric for run in runs for metric in run.scores), None)
    if first is None:
        return None
    metric = Metric(first.dataset, first.task, "AP")
    lines = []
    for index, run in enumerate(runs):
        points = [(i, scores.get(metric, math.nan)) for i, scores in run.evaluations.items()]
        lines.append(Line(run.name, points or [(0, math.nan)], index))
    if metric in teacher:
        end = max(x for line in lines for x, _ in line.points)
        lines.append(Line("teacher", [(0, teacher[metric]), (end, teacher[metric])], NUM_COLORS - 1, dashed=True))
    return draw_chart("AP", "Average precision on the test set after so many iterations.", lines)
