"""What a suite is made of: rows of a table, each a config with overrides, and the one teacher of all of them."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from distill import add_distill_config
from distill.config import load_config
from distill.errors import DistillError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # for projects.PearsonDistiller
# what says where a run lies and on what it runs, not what it computes
_PLACES = ("OUTPUT_DIR", "MODEL.DEVICE", "DISTILL.TEACHER.WEIGHTS", "DATALOADER.NUM_WORKERS", "DATASETS.REGISTER")


@dataclass(frozen=True)
class Row:
    """A row of a suite's table.

    Args:
        name: as in the table.
        config: the config file.
        opts: overrides, ``[KEY, VALUE, ...]``.
        teacher: name of the row that it learns from; empty for the suite's, if there is one.
        baseline: name of the row that it is compared with; empty for the suite's.
        published: metrics from the paper, by name.
    """

    name: str
    config: str
    opts: tuple
    teacher: str
    baseline: str
    published: dict


@dataclass(frozen=True)
class Suite:
    """One table: see suites/*.yaml.

    Args:
        name: the file's name.
        title: of the table.
        teacher: name of the row that the distilled ones learn from; empty where their configs name a teacher.
        baseline: name of the row that the others are compared with; empty where rows name their own.
        seeds: how many each student is to have.
        text: what stands above the table in docs/results.md.
        findings: what stands below it.
        rows: the rows. Teachers are trained once, by the seed in their configs.
    """

    name: str
    title: str
    teacher: str
    baseline: str
    seeds: int
    text: str
    findings: str
    rows: tuple[Row, ...]

    @property
    def teachers(self) -> list[Row]:
        """The rows that others learn from."""
        names = {self.teacher, *(row.teacher for row in self.rows)}
        return [row for row in self.rows if row.name in names]

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def teacher_of(self, row: Row) -> Row | None:
        """What a row learns from, if it is one of the rows."""
        name = row.teacher or self.teacher
        return self.row(name) if name and row not in self.teachers else None


def load_suite(name: str) -> Suite:
    """Reads suites/NAME.yaml, or a file of your own.

    Args:
        name: of the suite, or a path that ends in ".yaml".

    Returns:
        The suite.

    Raises:
        DistillError: there is no such suite, one of its keys is unknown or missing, or it names a row that is not.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / "suites" / f"{name}.yaml"
    if not path.is_file():
        raise DistillError(f"There is no suite {name!r}: expected one of {', '.join(suite_names())}.")
    content = yaml.safe_load(path.read_text())
    needed = {"title", "teacher", "baseline", "opts", "rows", "seeds", "text", "findings"}
    _check_keys(content, needed, set(), str(path))
    rows = {}
    for key, given in content["rows"].items():
        _check_keys(given, {"config"}, {"opts", "teacher", "baseline", "published"}, f"{path}, row {key}")
        teaches = key in {content["teacher"], *(row.get("teacher") for row in content["rows"].values())}
        opts = {**({} if teaches else content["opts"]), **given.get("opts", {})}  # the suite's are the students'
        flat = tuple(item for pair in opts.items() for item in pair)
        names = given.get("teacher", ""), given.get("baseline", "")
        rows[key] = Row(key, given["config"], flat, *names, given.get("published", {}))
        for role, other in zip(("teacher", "baseline"), names):
            if other and other not in content["rows"]:
                raise DistillError(f"{path}: row {key} names the {role} {other!r}, which is none of the rows.")
    for role in ("teacher", "baseline"):
        if content[role] and content[role] not in rows:
            raise DistillError(f"{path}: the {role} {content[role]!r} is none of the rows.")
    keys = ("title", "teacher", "baseline", "seeds", "text", "findings")
    return Suite(name=path.stem, rows=tuple(rows.values()), **{key: content[key] for key in keys})


def _check_keys(content: dict, needed: set[str], allowed: set[str], where: str) -> None:
    wrong = sorted((content.keys() - needed - allowed) | (needed - content.keys()))
    if wrong:
        expected = ", ".join(sorted(needed | allowed))
        raise DistillError(f"{where}: the keys {', '.join(wrong)} are missing or unknown; expected {expected}.")


def suite_names() -> list[str]:
    """The suites that there are, as docs/results.md has them."""
    order = ("digits_rcnn", "digits_retinanet", "digits_aligned", "bccd", "coco")
    found = {path.stem for path in (HERE / "suites").glob("*.yaml")}
    return [name for name in order if name in found] + sorted(found - set(order))


def run_config(suite: Suite, row: Row, seed: int | None, teacher_weights: str = "") -> CfgNode:
    """The full config of one run.

    Args:
        suite: the suite.
        row: one of its rows.
        seed: None for a teacher, whose config has one.
        teacher_weights: where the teacher lies, for a distilled row.

    Returns:
        The config, not frozen.
    """
    cfg = load_config(str(ROOT / row.config), list(row.opts))
    if seed is not None:
        cfg.SEED = seed
    teacher = suite.teacher_of(row)
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel" and teacher:
        cfg.DISTILL.TEACHER.CONFIG_FILE = teacher.config
        cfg.DISTILL.TEACHER.OPTS = list(teacher.opts)
        cfg.DISTILL.TEACHER.WEIGHTS = teacher_weights
    return cfg


def config_hash(suite: Suite, row: Row) -> str:
    """What finished runs stay valid for: all keys of the config that differ from their defaults, and for a distilled
    row the teacher's.

    Args:
        suite: the suite.
        row: one of its rows.

    Returns:
        Twelve hexadecimal digits, the same for all seeds, devices and places.
    """
    defaults = get_cfg()
    add_distill_config(defaults)
    cfg = run_config(suite, row, seed=None if row in suite.teachers else 0)
    keys = {key: value for key, value in _flat(cfg).items() if key not in _PLACES}
    default = _flat(defaults)
    changed: dict[str, Any] = {k: v for k, v in keys.items() if k not in default or default[k] != v}
    teacher = suite.teacher_of(row)
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel" and teacher:
        changed["teacher"] = config_hash(suite, teacher)
    return hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
