"""What a suite is made of: rows of a table, each a config with overrides, and the one teacher of all of them."""

import hashlib
import json
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
# what says where a run lies and on what it runs, not what it computes
_PLACES = ("OUTPUT_DIR", "MODEL.DEVICE", "DISTILL.TEACHER.WEIGHTS", "DATALOADER.NUM_WORKERS", "DATASETS.REGISTER")


@dataclass(frozen=True)
class Row:
    """A row of a suite's table.

    Args:
        name: as in the table.
        config: the config file.
        opts: overrides, ``[KEY, VALUE, ...]``.
        published: metrics from the paper, by name.
    """

    name: str
    config: str
    opts: tuple
    published: dict


@dataclass(frozen=True)
class Suite:
    """One table: see suites/*.yaml.

    Args:
        name: the file's name.
        title: of the table.
        teacher: trained once; its seed is in its config.
        baseline: name of the row that the others are compared with.
        rows: the students.
        seeds: how many each row is to have.
        text: what stands above the table in docs/results.md.
        findings: what stands below it.
    """

    name: str
    title: str
    teacher: Row
    baseline: str
    rows: tuple[Row, ...]
    seeds: int
    text: str
    findings: str

    def row(self, name: str) -> Row:
        """The row of a name, the teacher's among them."""
        return next(row for row in (self.teacher, *self.rows) if row.name == name)


def load_suite(name: str) -> Suite:
    """Reads suites/NAME.yaml, or a file of your own.

    Args:
        name: of the suite, or a path that ends in ".yaml".

    Returns:
        The suite.

    Raises:
        DistillError: there is no such suite, or one of its keys is unknown or missing.
    """
    path = Path(name) if name.endswith(".yaml") else HERE / "suites" / f"{name}.yaml"
    if not path.is_file():
        raise DistillError(f"There is no suite {name!r}: expected one of {', '.join(suite_names())}.")
    content = yaml.safe_load(path.read_text())
    known = {"title", "teacher", "baseline", "opts", "rows", "seeds", "text", "findings"}
    wrong = sorted(known ^ content.keys())
    if wrong:
        raise DistillError(
            f"{path}: the keys {', '.join(wrong)} are missing or unknown; expected {', '.join(sorted(known))}."
        )

    def row(name: str, given: dict, opts: dict) -> Row:
        opts = {**opts, **given.get("opts", {})}
        flat = tuple(item for key, value in opts.items() for item in (key, value))
        return Row(name, given["config"], flat, given.get("published", {}))

    rows = tuple(row(key, given, content["opts"]) for key, given in content["rows"].items())
    teacher = row("teacher", content["teacher"], {})
    if content["baseline"] not in [x.name for x in rows]:
        raise DistillError(f"{path}: the baseline {content['baseline']!r} is none of the rows.")
    keys = ("title", "baseline", "seeds", "text", "findings")
    return Suite(name=path.stem, teacher=teacher, rows=rows, **{key: content[key] for key in keys})


def suite_names() -> list[str]:
    """The suites that there are, as docs/results.md has them."""
    order = ("digits_rcnn", "digits_retinanet", "digits_aligned", "bccd", "coco")
    found = {path.stem for path in (HERE / "suites").glob("*.yaml")}
    return [name for name in order if name in found] + sorted(found - set(order))


def run_config(suite: Suite, row: Row, seed: int | None, teacher_weights: str = "") -> CfgNode:
    """The full config of one run.

    Args:
        suite: the suite.
        row: one of its rows, or its teacher.
        seed: None for the teacher, whose config has one.
        teacher_weights: where the teacher lies, for a distilled row.

    Returns:
        The config, not frozen.
    """
    cfg = load_config(str(ROOT / row.config), list(row.opts))
    if seed is not None:
        cfg.SEED = seed
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel":
        teacher = suite.teacher
        cfg.DISTILL.TEACHER.CONFIG_FILE = teacher.config
        cfg.DISTILL.TEACHER.OPTS = list(teacher.opts)
        cfg.DISTILL.TEACHER.WEIGHTS = teacher_weights
    return cfg


def config_hash(suite: Suite, row: Row) -> str:
    """What finished runs stay valid for: all keys of the config that differ from their defaults, and for a distilled
    row the teacher's.

    Args:
        suite: the suite.
        row: one of its rows, or its teacher.

    Returns:
        Twelve hexadecimal digits, the same for all seeds, devices and places.
    """
    defaults = get_cfg()
    add_distill_config(defaults)
    cfg = run_config(suite, row, seed=None if row is suite.teacher else 0)
    keys = {key: value for key, value in _flat(cfg).items() if key not in _PLACES}
    default = _flat(defaults)
    changed: dict[str, Any] = {k: v for k, v in keys.items() if k not in default or default[k] != v}
    if cfg.MODEL.META_ARCHITECTURE == "DistillationModel":
        changed["teacher"] = config_hash(suite, suite.teacher)
    return hashlib.sha256(json.dumps(changed, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
