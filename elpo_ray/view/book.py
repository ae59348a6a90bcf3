"""All that a page shows of one run, kept per step file so that following a run reads only news.

Invariants: the overview names every readable tree and the chunk that holds it; a chunk is a
deflated JSON object of whole trees, its id changes whenever its content does.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.credit import Credit, assign
from elpo_ray.runs.log import LOG, Notice, read_columns
from elpo_ray.view.folder import (
    Dump,
    Settings,
    check_run,
    last_change,
    read_dump,
    read_settings,
    read_summary,
    stamp,
    tree_files,
)
from elpo_ray.view.records import PageLimits, table_row, tree_record

CHUNK_BYTES = 1_000_000
"""JSON in one chunk before compression; opening a tree inflates the chunk that holds it."""
LEVEL = 5
"""Level of compression: it takes half the time of 6, for two percent more bytes."""
EXAMPLES = 3
"""Places named where many lines have the same fault."""


@dataclass
class StepPart:
    """What one step file gives the page."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the table; `chunk` and `place` say where the whole tree is."""
    chunks: dict[str, bytes] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)


class Book:
    """One run."""

    def __init__(self, run: Path, limits: PageLimits) -> None:
        """Raises ValueError if `run` is no run folder."""
        self.run = check_run(run)
        self._limits = limits
        self._settings = Settings()
        self._vocabulary = Vocabulary(run / "tokenizer.json")
        self._parts: dict[int, StepPart] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}

    def refresh(self) -> bool:
        """Read what has changed on disk; whether anything had."""
        files = tree_files(self.run)
        fixed = [self.run / name for name in ("config.yaml", LOG, "summary.json")]
        stamps = {path: stamp(path) for path in (*fixed, *(path for _, path in files))}
        before, self._stamps = self._stamps, stamps
        if stamps == before:
            return False
        config = fixed[0]
        anew = before.get(config) != stamps[config]
        if anew:
            self._settings = read_settings(self.run)
        known = {step for step, path in files if not anew and before.get(path) == stamps[path]}
        parts = {}
        for step, path in files:
            parts[step] = self._parts[step] if step in known else self._part(read_dump(step, path))
        self._parts = parts
        return True

    def chunks(self) -> dict[str, bytes]:
        """Deflated chunks by id, oldest step first."""
        return {name: data for part in self._parts.values() for name, data in part.chunks.items()}

    def overview(self, absent: Iterable[str] = (), notices: Iterable[Notice] = ()) -> bytes:
        """The run page's data, deflated. `absent`: chunks that the page does not hold, whose trees
        are only listed; `notices` are added to the book's own."""
        metrics, faults = read_columns(self.run)
        rows = [row for part in self._parts.values() for row in part.rows]
        missing = set(absent)
        keys = list(rows[0]) if rows else []
        table = {key: [row[key] for row in rows] for key in keys}
        table["chunk"] = [None if row["chunk"] in missing else row["chunk"] for row in rows]
        own = [*self._settings.notices, *faults, *self._vocabulary.notices]
        own += [notice for part in self._parts.values() for notice in part.notices]
        summary = read_summary(self.run)
        return deflate(
            compact(
                {
                    "name": self.run.resolve().name,
                    "read": time.time(),
                    "changed": last_change(self.run),
                    "finished": summary is not None,
                    "planned": self._settings.get("trainer.steps"),
                    "experiment": self._settings.get("experiment"),
                    "seed": self._settings.get("trainer.seed"),
                    "model": self._settings.get("model.path"),
                    "task": self._settings.get("task.name"),
                    "algorithm": describe(self._settings.algorithm),
                    "config": self._settings.text,
                    "summary": summary or {},
                    "metrics": metrics,
                    "table": table,
                    "notices": grouped([*notices, *own]),
                }
            )
        )

    @property
    def num_trees(self) -> int:
        return sum(len(part.rows) for part in self._parts.values())

    @property
    def num_steps(self) -> int:
        return len(self._parts)

    def _part(self, dump: Dump) -> StepPart:
        trees = [tree for _, tree in dump.trees]
        part = StepPart(notices=list(dump.notices))
        credits: list[Credit] | list[None] = [None] * len(trees)
        try:
            credits = assign(trees, self._settings.algorithm)
        except ValueError as error:
            part.notices.append(Notice(f"shown without credit: {error}", f"step {dump.step}"))
        records: list[str] = []
        tokens: set[int] = set()
        for (line, tree), credit in zip(dump.trees, credits, strict=True):
            scope = self._settings.algorithm.clip.scope
            record = tree_record(tree, credit, scope, self._limits)
            where = f"{dump.step}-{len(part.chunks)}-{self._version(dump.step)}"
            place = {"step": dump.step, "line": line, "chunk": where, "place": len(records)}
            part.rows.append(place | table_row(tree, credit))
            records.append(compact(record))
            tokens.update(*filter(None, record["columns"].get("ids", [])))
            if sum(map(len, records)) >= CHUNK_BYTES:
                part.chunks[where] = self._chunk(records, tokens)
                records, tokens = [], set()
        if records:
            part.chunks[where] = self._chunk(records, tokens)
        return part

    def _version(self, step: int) -> int:
        path = self.run / "trees" / f"step_{step:05d}.jsonl"
        return self._stamps.get(path, (0, 0))[1] % 1_000_000_007

    def _chunk(self, records: list[str], tokens: set[int]) -> bytes:
        texts = compact(self._vocabulary.texts(tokens))
        return deflate(f'{{"trees":[{",".join(records)}],"vocabulary":{texts}}}')


class Vocabulary:
    """Texts of token ids, by the tokenizer that the run has kept; empty without a sound one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer: Any = None
        self._known: dict[int, str] = {}
        self.notices: list[Notice] = []

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """The text of each id; bytes that are no whole character come as U+FFFD."""
        if self._tokenizer is None and not self.notices and self._path.is_file():
            self._load()
        if self._tokenizer is None:
            return {}
        for token in ids:
            if token not in self._known:
                self._known[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return {token: self._known[token] for token in ids}

    def _load(self) -> None:
        from tokenizers import Tokenizer  # only a page with token ids needs it

        try:
            self._tokenizer = Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises nothing narrower
            text = f"tokens are shown as ids: {error}"
            self.notices.append(Notice(text, self._path.name))


def describe(algorithm: AlgorithmConfig) -> dict[str, Any]:
    """What the page's legend says of the algorithm."""
    return {
        "name": algorithm.name,
        "growth": algorithm.growth.rule,
        "n_total": algorithm.growth.n_total,
        "verify_final": algorithm.growth.bel.verify_final,
        "credit": algorithm.credit.rule,
        "lam": algorithm.credit.lam,
        "eps_low": algorithm.clip.eps_low,
        "eps_high": algorithm.clip.eps_high,
        "eps_elc": algorithm.clip.eps_elc,
        "scope": algorithm.clip.scope.value,
    }


def grouped(notices: Iterable[Notice]) -> list[dict[str, Any]]:
    """Equal notices as one, with the first places that they are about."""
    places: dict[str, list[str]] = {}
    for notice in notices:
        places.setdefault(notice.text, []).append(notice.where)
    return [
        {"text": text, "count": len(where), "where": where[:EXAMPLES]}
        for text, where in places.items()
    ]


def compact(data: Any) -> str:
    """JSON as a browser reads it: no NaN, no needless space."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def deflate(text: str) -> bytes:
    """Compress into the zlib format, which a browser's DecompressionStream calls `deflate`."""
    return zlib.compress(text.encode("utf-8", errors="replace"), LEVEL)
