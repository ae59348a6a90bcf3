"""Rows of data sets: from a file the user names, from `task.data_dir`, or from the hub.

A row is a dict with the data set's own fields. Invariant: whatever cannot be loaded or used is a
ValueError that says which file to put where, or which row of which file is at fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from elpo_ray.types import Problem

Row = dict[str, Any]
T = TypeVar("T")
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One split of a data set on the Hugging Face hub, and what a local copy of it is called."""

    name: str
    """The local file's name without suffix: `task.data_dir/<name>.jsonl` or `.parquet`."""
    repo: str
    split: str = "train"
    subset: str | None = None
    """The hub's configuration name."""
    files: tuple[str, ...] = field(default=())
    """Files of the repository to read instead of its default layout."""
    gated: bool = False
    """The hub asks for a login (`hf auth login`, or HF_TOKEN)."""


@dataclass(frozen=True, slots=True)
class Table:
    """Loaded rows, and how to name them to the user."""

    origin: str
    rows: list[Row]

    def each(self, read: Callable[[Row, int], T]) -> list[T]:
        """`read(row, number)` of every row; its ValueError gets the row's place."""
        made = []
        for number, row in enumerate(self.rows):
            try:
                made.append(read(row, number))
            except ValueError as fault:
                raise ValueError(f"{self.origin}: row {number + 1}: {fault}") from None
        return made


def load(source: Source | None, key: str, file: str | None, data_dir: str | None) -> Table:
    """The rows of `file` (the value of the setting `key`), else of `data_dir`, else of the hub."""
    if file is not None:
        return read_file(f"{key}={file!r}", Path(file))
    if source is None:
        raise ValueError(
            f"{key}=None: name a JSON-lines or parquet file of problems (see docs/tasks.md)"
        )
    if data_dir is not None:
        for suffix in SUFFIXES:
            path = Path(data_dir) / (source.name + suffix)
            if path.is_file():
                return read_file(f"task.data_dir={data_dir!r}: {path.name}", path)
    return _from_hub(source, data_dir)


def read_file(origin: str, path: Path) -> Table:
    """The rows of a JSON-lines or parquet file."""
    if not path.is_file():
        raise ValueError(f"{origin}: no such file; give the path of a JSON-lines or parquet file")
    rows = _read_parquet(origin, path) if path.suffix == ".parquet" else _read_lines(origin, path)
    if not rows:
        raise ValueError(f"{origin}: no problems in it; put one JSON object on each line")
    return Table(origin, rows)


def _read_lines(origin: str, path: Path) -> list[Row]:
    """Read line by line: `datasets` infers one type a column and cannot name a bad line."""
    rows: list[Row] = []
    number = 0
    try:
        with path.open(encoding="utf-8", errors="strict") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    rows.append(_object(line))
    except UnicodeDecodeError as fault:
        raise ValueError(f"{origin}: not UTF-8 text ({fault}); re-encode it") from None
    except ValueError as fault:
        raise ValueError(f"{origin}: line {number}: {fault}") from None
    return rows


def _object(line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as fault:
        raise ValueError(f"not JSON ({fault}); put one object on each line") from None
    if not isinstance(row, dict):
        raise ValueError("not an object; put one JSON object on each line")
    return row


def _read_parquet(origin: str, path: Path) -> list[Row]:
    import datasets  # a second to import, and most tasks do not need it

    try:
        return list(datasets.Dataset.from_parquet(str(path)))
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as fault:
        raise ValueError(f"{origin}: not a parquet file that can be read ({fault})") from None


def _from_hub(source: Source, data_dir: str | None) -> Table:
    import datasets
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    origin = f"{source.repo} ({', '.join(source.files) or source.split})"
    try:
        if source.files:
            paths = [hf_hub_download(source.repo, f, repo_type="dataset") for f in source.files]
            rows = [row for path in paths for row in read_file(origin, Path(path)).rows]
        else:
            rows = list(datasets.load_dataset(source.repo, source.subset, split=source.split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError, HfHubHTTPError) as fault:
        login = " after `hf auth login`, which this set asks for" if source.gated else ""
        reason = str(fault).strip().split("\n")[0][:200]
        raise ValueError(
            f"task.data_dir={data_dir!r}: no {source.name}.jsonl or .parquet there, and {origin} "
            f"cannot be loaded from the hub ({type(fault).__name__}: {reason}); put a copy of it, "
            f"with the same fields, at <task.data_dir>/{source.name}.jsonl or .parquet, or connect "
            f"to the hub{login}"
        ) from None
    return Table(origin, rows)


# --- reading fields -------------------------------------------------------------------------------


def text_of(row: Row, *names: str) -> str:
    """The first of the fields `names` that is there, as text. ValueError without a usable one."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise ValueError(f"no {' or '.join(names)}: give it as text")


def check_apart(train: Sequence[Problem], held_out: Sequence[Problem], key: str) -> None:
    """ValueError if a held-out prompt is trained on."""
    asked = {json.dumps(problem.messages): problem.id for problem in held_out}
    for problem in train:
        twin = asked.get(json.dumps(problem.messages))
        if twin is not None:
            raise ValueError(
                f"{key}: {problem.id} asks the same as {twin} of the held-out problems; remove it "
                "from one of the two"
            )
