"""Tables from the lines of results/*.jsonl, and nothing else."""

import json
import math
import statistics
from pathlib import Path

from suite import HERE, ROOT, Suite, load_suite, suite_names

DOCUMENT = ROOT / "docs" / "results.md"
METRICS = ("AP", "AP50", "AP75", "APs", "APm")
HEAD = """# Results

Written by `python projects/Evidence/run.py --table` from the lines of `projects/Evidence/results/` and the texts of
`projects/Evidence/suites/`. A cell is the mean over the seeds ± its standard error (sample deviation / √n). The gain is
the difference to the baseline's mean, its error the root of the sum of both errors' squares. The cost is that of a
training step relative to the baseline's: median of steps that were run in turns in one process. Empty cells were not
run.
"""


def read_lines(suite: str, folder: Path = HERE / "results") -> list[dict]:
    """The lines of a suite, oldest first.

    Args:
        suite: its name.
        folder: where they lie.

    Returns:
        A dict for each line.
    """
    path = folder / f"{suite}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(lines: list[dict], row: str) -> list[dict]:
    """The runs of a row that count: of those that ended well, those of its latest config, the latest of each seed.

    Args:
        lines: of one suite.
        row: name of the row.

    Returns:
        Lines by seed.
    """
    own = [line for line in lines if line["row"] == row and line["status"] == "finished"]
    latest = {line["seed"]: line for line in own if line["config_hash"] == own[-1]["config_hash"]}
    return [latest[seed] for seed in sorted(latest, key=lambda seed: -1 if seed is None else seed)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error.

    Args:
        values: at least one.

    Returns:
        Both; the error of a single value is not known and is nan.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def gain(own: list[float], baseline: list[float]) -> tuple[float, float]:
    """How much better than the baseline, and the error of that.

    Args:
        own: one metric of a row, by seed.
        baseline: the same of the baseline.

    Returns:
        Difference of the means, and its standard error.
    """
    (mean, error), (base, base_error) = mean_and_error(own), mean_and_error(baseline)
    return mean - base, math.hypot(error, base_error)


def costs(lines: list[dict]) -> dict:
    """The latest measurement of the costs: a line with ``rows`` and ``device``, or an empty dict."""
    return next((line for line in reversed(lines) if line["status"] == "cost"), {})


def table(suite: Suite, lines: list[dict]) -> str:
    """The table of a suite in Markdown.

    Args:
        suite: the suite.
        lines: its lines.

    Returns:
        The table, a line for each row.
    """
    published = [key for row in suite.rows for key in row.published]
    published = sorted(set(published), key=published.index)
    runs = {row.name: finished(lines, row.name) for row in suite.rows}
    metrics = [m for m in METRICS if any(run.get(m) is not None for own in runs.values() for run in own)] or ["AP"]
    ratios = costs(lines).get("rows", {})
    headers = ["row", "seeds", *metrics, "gain in AP", "cost", *(f"published {key}" for key in published)]
    table = [headers, ["---", *["---:"] * (len(headers) - 1)]]
    for row in suite.rows:
        base = [run["AP"] for run in runs.get(row.baseline or suite.baseline, [])]
        own = runs[row.name]
        cells = [row.name, str(len(own)) if own else ""]
        cells += [_cell([run[m] for run in own if run.get(m) is not None]) for m in metrics]
        compared = row not in suite.teachers and row.name != suite.baseline and own and base
        cells.append(_signed(*gain([run["AP"] for run in own], base)) if compared else "")
        cells.append(f"{ratios[row.name]['ratio']:.2f}" if row.name in ratios else "")
        cells += [str(row.published.get(key, "")) for key in published]
        table.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def where(suite: Suite, lines: list[dict]) -> str:
    """On what the lines of a table were measured, one sentence."""
    used = [run for row in suite.rows for run in finished(lines, row.name)]
    if not used:
        return ""
    parts = []
    for key, name in (("device", ""), ("detectron2", "Detectron2 "), ("torch", "torch ")):
        parts.append(name + " and ".join(sorted({run[key] for run in used})))
    minutes = sum(run["seconds"] for run in used) / 60
    text = f"Measured on {', '.join(parts)}; {len(used)} trainings, {minutes:.0f} minutes of training in all."
    cost = costs(lines)
    return text + (f" Costs: {cost['device']}, {cost['rounds']} rounds." if cost else "")


def document() -> str:
    """All of docs/results.md."""
    parts = [HEAD]
    for name in suite_names():
        suite, lines = load_suite(name), read_lines(name)
        blocks = [f"## {suite.title}", suite.text.strip(), table(suite, lines).strip()]
        if any(finished(lines, row.name) for row in suite.rows):
            blocks.append(f"![AP over iterations](images/{name}_curves.png)")
        if costs(lines):
            blocks.append(f"![gain against cost](images/{name}_cost.png)")
        blocks += [where(suite, lines), suite.findings.strip()]
        parts.append("\n\n".join(block for block in blocks if block) + "\n")
    return "\n".join(parts)


def is_finished(lines: list[dict], row: str, seed: int | None, config_hash: str) -> bool:
    """Whether a training need not be repeated.

    Args:
        lines: of one suite, also those of costs, which have no config hash.
        row: name of the row.
        seed: of the training.
        config_hash: of the row as it is now.

    Returns:
        Whether there is a finished line of this very config.
    """
    wanted = (row, seed, "finished", config_hash)
    return any((line["row"], line["seed"], line["status"], line.get("config_hash")) == wanted for line in lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.1f}" if math.isnan(error) else f"{value:+.1f} ± {error:.1f}"
