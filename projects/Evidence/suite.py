"""What a suite is made of: rows of a table, each a config with overrides, and what they learn from."""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from distill import add_distill_config
from distill.config import load_config
from distill.errors import DistillError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(ROOT))  # for projects.AttentionTransfer
# what says where a run lies and on what it runs, not what it computes
_PLACES = ("OUTPUT_DIR", "MODEL.DEVICE", "DISTILL.TEACHER.WEIGHTS", "DATALOADER.NUM_WORKERS")


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
        hashes: by row, see :func:`config_hash`, which fills it.
    """

    name: str
    title: str
    teacher: str
    baseline: str
    seeds: int
    text: str
    findings: str
    rows: tuple[Row, ...]
    hashes: dict[str, str] = field(default_factory=dict, compare=False)

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

    def baseline_of(self, row: Row) -> Row | None:
        """What a row is compared with, if it is with anything."""
        name = row.baseline or self.baseline
        return self.row(name) if name and name != row.name and row not in self.teachers else None


def load_suite(name: str) -> Suite:
    """Reads suites/NAME.yaml, or a file of your own.

    Args:
        name: of the suite, or a path that ends in ".yaml".

    Returns:
        The suite.

    Raises:
        DistillError: there is no such suite, it has the name of another, it cannot be read, one of its keys is unknown
            or missing, or it names a row that is not.
    """
    path = Path(name).resolve() if name.endswith(".yaml") else HERE / "suites" / f"{name}.yaml"
    if not path.is_file():
        raise DistillError(f"There is no suite {name!r}: expected one of {', '.join(suite_names())}.")
    if path.stem in suite_names() and path.parent != HERE / "suites":
        raise DistillError(f"{path} would write its lines to those of the suite {path.stem}: give it another name.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DistillError(f"{path} is not YAML: {error}") from error
    needed = {"title", "teacher", "baseline", "opts", "rows", "seeds", "text", "findings"}
    _check_keys(content, needed, set(), str(path))
    if not isinstance(content["seeds"], int):
        raise DistillError(f"{path}: seeds is {content['seeds']!r}, expected how many there are to be.")
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


def _check_keys(content: Any, needed: set[str], allowed: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise DistillError(f"{where} is {content!r}: expected the keys {', '.join(sorted(needed | allowed))}.")
    wrong = sorted((content.keys() - needed - allowed) | (needed - content.keys()))
    if wrong:
        expected = ", ".join(sorted(needed | allowed))
        raise DistillError(f"{where}: the keys {', '.join(wrong)} are missing or unknown; expected {expected}.")


def suite_names() -> list[str]:
    """The suites that there are, as docs/results.md has them."""
    order = ("demo", "digits_rcnn", "digits_dense", "digits_full", "digits_aligned", "bccd", "coco")
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
        Twelve hexadecimal digits, the same for all seeds, devices and places. They are those of the files as they were
        at the first call.
    """
    if row.name not in suite.hashes:
        suite.hashes[row.name] = _hash(suite, row)
    return suite.hashes[row.name]


def _hash(suite: Suite, row: Row) -> str:
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
