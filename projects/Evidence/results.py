"""Tables from the lines of results/*.jsonl, and nothing else."""

import json
import math
import re
import statistics
from pathlib import Path

import yaml
from suite import HERE, ROOT, Row, Suite, config_hash, load_suite, suite_names

from distill.errors import DistillError

LINES = HERE / "results"
DOCUMENT = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
METRICS = ("AP", "AP50", "AP75", "APs", "APm")
HEAD = """# Results

Written by `python projects/Evidence/run.py --table` from the lines of `projects/Evidence/results/` and the texts of
`projects/Evidence/suites/`. A cell is the mean over the seeds ± its standard error (sample standard deviation / √n);
without ± it is a single run. The gain is the difference from the baseline's mean; errors add in quadrature. All
students of a table have the same teacher unless it says otherwise, so errors leave out what another teacher would
change. Where a teacher was trained more than once, always with the same seed, its row is over all of these runs. The
cost is that of a training step relative to the baseline's, the median over steps that were interleaved in one process,
without occasional work (evaluation, measuring gradients, the search for prototypes). Empty cells were not run, or not
with today's config.
"""


def read_lines(suite: str, folder: Path = LINES) -> list[dict]:
    """The lines of a suite, oldest first.

    Args:
        suite: its name.
        folder: where they lie.

    Returns:
        A dict for each line.

    Raises:
        DistillError: a line is no JSON.
    """
    path = folder / f"{suite}.jsonl"
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise DistillError(f"{path}, line {number} is not JSON: remove it, and run the suite again.") from error
    return lines


def finished(suite: Suite, row: Row, lines: list[dict]) -> list[dict]:
    """The runs of a row that count: those of its config as it is now, all of a teacher, of a student those of the seeds
    that its suite wants.

    Args:
        suite: the suite.
        row: one of its rows.
        lines: of the suite.

    Returns:
        Lines: of a student the latest of each seed, of a teacher all.
    """
    ended = _own(suite, row, lines) if row in suite.teachers else _ended(suite, row, lines).values()
    return [line for line in ended if line["status"] == "finished" and _counts(suite, line["seed"])]


def is_finished(suite: Suite, row: Row, seed: int | None, lines: list[dict]) -> bool:
    """Whether a training need not be repeated: there is a finished line of this very config, of any seed."""
    return _ended(suite, row, lines).get(seed, {}).get("status") == "finished"


def _own(suite: Suite, row: Row, lines: list[dict]) -> list[dict]:
    return [x for x in lines if x["row"] == row.name and x.get("config_hash") == config_hash(suite, row)]


def _ended(suite: Suite, row: Row, lines: list[dict]) -> dict[int | None, dict]:
    """The line of each seed: the latest that finished, or else the latest that failed."""
    own = _own(suite, row, lines)
    own.sort(key=lambda line: line["status"] == "finished")  # stable
    latest = {line["seed"]: line for line in own}
    return {seed: latest[seed] for seed in sorted(latest, key=lambda seed: -1 if seed is None else seed)}


def _counts(suite: Suite, seed: int | None) -> bool:
    return seed is None or seed < suite.seeds


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


def costs(suite: Suite, lines: list[dict]) -> dict[str, float]:
    """What a step costs, relative to one of the baseline.

    Args:
        suite: the suite.
        lines: its lines.

    Returns:
        Ratios by row, from the latest measurement; without rows of which, or of whose baseline, the config is another
        by now.
    """
    measured = cost_line(lines).get("rows", {})

    def is_current(row: Row) -> bool:
        return measured.get(row.name, {}).get("config_hash") == config_hash(suite, row)

    return {
        row.name: measured[row.name]["ratio"]
        for row in suite.rows
        if is_current(row) and is_current(suite.baseline_of(row) or row)
    }


def cost_line(lines: list[dict]) -> dict:
    """The latest measurement of the costs, or an empty dict."""
    return next((line for line in reversed(lines) if line["status"] == "cost"), {})


def table(suite: Suite, lines: list[dict]) -> str:
    """The table of a suite in Markdown.

    Args:
        suite: the suite.
        lines: its lines.

    Returns:
        The table without its empty columns: a line for each row, or for those with a published number where none was
        run.
    """
    published = [key for row in suite.rows for key in row.published]
    published = sorted(set(published), key=published.index)
    runs = {row.name: finished(suite, row, lines) for row in suite.rows}
    ratios = costs(suite, lines)
    headers = ["row", "seeds", *METRICS, "gain in AP", "cost", *(f"published {key}" for key in published)]
    table = []
    for row in suite.rows if lines or not published else [row for row in suite.rows if row.published]:
        own, baseline = runs[row.name], suite.baseline_of(row)
        base = runs[baseline.name] if baseline else []
        failed = [
            x for x in _ended(suite, row, lines).values() if x["status"] == "failed" and _counts(suite, x["seed"])
        ]
        number = str(len(own)) if own or failed else ""
        cells = [row.name, number + (f" ({len(failed)} failed)" if failed else "")]
        cells += [_cell([run[m] for run in own]) if all(run.get(m) is not None for run in own) else "" for m in METRICS]
        cells.append(_signed(*gain([x["AP"] for x in own], [x["AP"] for x in base])) if own and base else "")
        cells.append(f"{ratios[row.name]:.2f}" if row.name in ratios else "")
        cells += [str(row.published.get(key, "")) for key in published]
        table.append(cells)
    used = [column for column in zip(headers, *table) if any(column[1:])]
    rows = [*zip(*used)]
    rows.insert(1, ["---", *["---:"] * (len(used) - 1)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def where(suite: Suite, lines: list[dict]) -> str:
    """On what the lines of a table were measured."""
    used = [run for row in suite.rows for run in finished(suite, row, lines)]
    if not used:
        return ""
    parts = []
    for key, name in (("device", ""), ("detectron2", "Detectron2 "), ("torch", "torch ")):
        parts.append(name + " and ".join(sorted({run[key] for run in used})))
    minutes = sum(run["seconds"] for run in used) / 60
    text = f"Measured on {', '.join(parts)}; {len(used)} training runs, {minutes:.0f} minutes in all."
    for teacher in suite.teachers:
        rows = [row for row in suite.rows if suite.teacher_of(row) == teacher]
        weights = {run.get("teacher_sha256") for row in rows for run in finished(suite, row, lines)} - {None}
        if len(weights) > 1:
            text += f" Students have learned from {len(weights)} training runs of {teacher.name}."
    cost = cost_line(lines) if costs(suite, lines) else {}
    return text + (f" Costs: {cost['device']}, {cost['rounds']} rounds." if cost else "")


def document(folder: Path = LINES) -> str:
    """All of docs/results.md.

    Args:
        folder: where the lines lie.

    Returns:
        Markdown.
    """
    parts = [HEAD]
    for name in suite_names():
        suite, lines = load_suite(name), read_lines(name, folder)
        blocks = [f"## {suite.title}", suite.text.strip(), table(suite, lines).strip()]
        if costs(suite, lines):
            blocks.append(f"![gain against cost](images/{name}_cost.png)")
        blocks += [where(suite, lines), suite.findings.strip()]
        parts.append("\n\n".join(block for block in blocks if block) + "\n")
    parts.append((HERE / "dropped.md").read_text())
    return "\n".join(parts)


def methods_table(folder: Path = LINES) -> str:
    """The table of all methods in Markdown: their gains in AP in several suites.

    Args:
        folder: where the lines lie.

    Returns:
        The table of methods.yaml.
    """
    content = yaml.safe_load((HERE / "methods.yaml").read_text())
    suites = {name: (load_suite(name), read_lines(name, folder)) for name in content["suites"]}
    ratios = costs(*suites[content["cost"]])
    headers = ["method", "distiller", "paper", *content["suites"].values(), "cost of a step", "published, COCO AP"]
    rows = [headers, [*["---"] * 3, *["---:"] * (len(headers) - 4), "---"]]
    for method in content["methods"]:
        papers = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in method["papers"])
        gains = [_gain_of(*suite, method["row"]) for suite in suites.values()]
        cost = f"{ratios[method['row']]:.2f}" if method["row"] in ratios else ""
        rows.append([method["name"], f"`{method['distiller']}`", papers, *gains, cost, method["published"]])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _gain_of(suite: Suite, lines: list[dict], name: str) -> str:
    """The gain of a row over its baseline; empty where there is no such row, or it was not run."""
    row = next((row for row in suite.rows if row.name == name), None)
    baseline = suite.baseline_of(row) if row else None
    if baseline is None:
        return ""
    own, base = ([x["AP"] for x in finished(suite, x, lines)] for x in (row, baseline))
    return _signed(*gain(own, base)) if own and base else ""


def with_tables(text: str, folder: Path = LINES) -> str:
    """A text with today's tables.

    Args:
        text: Markdown, in which a table stands between ``<!-- table SUITE -->`` and ``<!-- end -->``; the suite
            "methods" is :func:`methods_table`.
        folder: where the lines lie.

    Returns:
        The same, its tables written anew.

    Raises:
        DistillError: a table does not end before the next begins, or is of no suite.
    """

    def fill(match: re.Match) -> str:
        name = match[2]
        content = methods_table(folder) if name == "methods" else table(load_suite(name), read_lines(name, folder))
        return f"{match[1]}\n{content}\n{match[3]}"

    pattern = r"(<!-- table (\S+) -->\n)(?:(?!<!-- table ).)*?(<!-- end -->)"
    filled, number = re.subn(pattern, fill, text, flags=re.DOTALL)
    if number != text.count("<!-- table"):
        raise DistillError(
            f"{text.count('<!-- table')} tables begin but {number} end: expected <!-- table SUITE --> and <!-- end -->."
        )
    return filled


def write_documents(folder: Path = LINES) -> str:
    """Writes docs/results.md and the tables of README.md.

    Args:
        folder: where the lines lie.

    Returns:
        docs/results.md.
    """
    text, readme = document(folder), with_tables(README.read_text(), folder)
    DOCUMENT.write_text(text)
    README.write_text(readme)
    return text


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"


def _signed(value: float, error: float) -> str:
    return f"{value:+.1f}" if math.isnan(error) else f"{value:+.1f} ± {error:.1f}"
