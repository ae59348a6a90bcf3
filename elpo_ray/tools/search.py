"""Search over a corpus of the user's, by BM25: `{search: corpus.jsonl}` in `task.tools`.

A line of the corpus is an object with `text` and optionally `title`. The tool returns the best
passages, numbered. The index is made once a process; it has no state that calls could change.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from elpo_ray.config.task import TaskConfig
from elpo_ray.tools.caller import Caller
from elpo_ray.tools.ready_made import check_name, needs, read_entry
from elpo_ray.tools.sources import Schema
from elpo_ray.types import Problem, Score, ToolResult

DEFAULTS: dict[str, Any] = {
    "search": str,
    "name": "search",
    "k": 3,
    "chars": 500,
    "description": "Search the corpus for passages that share words with the query.",
}
"""The corpus, the tool's name, passages in an answer, characters of a passage, what the policy
reads about the tool."""
WORD = r"(?u)\w+"
NOTHING = "No passage has any of these words."


class SearchSource:
    """One corpus."""

    stateful = False
    rewards = False

    def __init__(
        self, where: str, entry: Mapping[str, Any], task: TaskConfig, caller: Caller
    ) -> None:
        """ValueError, which begins with `where`, for a corpus that cannot be read."""
        needs(where, "bm25s")
        values = read_entry(where, entry, DEFAULTS)
        check_name(where, values["name"])
        self.name = f"search {values['search']}"
        self.schemas: Sequence[Schema] = (_schema(values["name"], values["description"]),)
        path = Path(values["search"])
        if not path.is_file():
            raise ValueError(f'{where}: no such file; name JSON lines of {{"text": …, "title": …}}')
        try:
            self._corpus = corpus(path, path.stat().st_mtime_ns)
        except ValueError as fault:
            raise ValueError(f"{where}: {fault}") from None
        self._k, self._chars = values["k"], values["chars"]
        self._caller = caller
        self._opening = asyncio.Lock()

    def check(self, problem: Problem) -> None:
        """Any problem will do."""

    async def open(self, problem: Problem) -> SearchInstance:
        """Makes the index when first called, which takes as long as it takes."""
        async with self._opening:
            await asyncio.to_thread(self._corpus.index)
        return SearchInstance(self._corpus, self._k, self._chars, self._caller)

    async def close(self) -> None: ...


class SearchInstance:
    """The same for all trajectories."""

    opening: str | None = None

    def __init__(self, corpus: Corpus, k: int, chars: int, caller: Caller) -> None:
        self._corpus = corpus
        self._k = k
        self._chars = chars
        self._caller = caller

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        return await self._caller.call(name, self._search, arguments)

    async def fork(self) -> SearchInstance:
        return self

    async def reward(self) -> float | bool | Score | None:
        return None

    async def close(self) -> None: ...

    def _search(self, query: str) -> str:
        found = self._corpus.best(query, self._k)
        parts = []
        for number, place in enumerate(found, start=1):
            title, text = self._corpus.titles[place], self._corpus.texts[place]
            cut = text if len(text) <= self._chars else text[: self._chars].rstrip() + " …"
            parts.append(f"[{number}] {title}\n{cut}" if title else f"[{number}] {cut}")
        return "\n\n".join(parts) or NOTHING


class Corpus:
    """Passages, and an index that is made when it is first needed."""

    def __init__(self, titles: Sequence[str], texts: Sequence[str]) -> None:
        self.titles = titles
        self.texts = texts
        self._index: Any = None

    def index(self) -> Any:
        """The index of titles and texts. Two threads at once may both make it."""
        if self._index is None:
            import bm25s

            pairs = zip(self.titles, self.texts, strict=True)
            index = bm25s.BM25()
            index.index(_words([f"{title} {text}" for title, text in pairs]), show_progress=False)
            self._index = index
        return self._index

    def best(self, query: str, k: int) -> list[int]:
        """Places of the passages with the highest scores, at most `k`, best first; equal ones in
        the corpus's order. Only passages that share a word with the query."""
        import numpy as np

        index = self.index()
        (words,) = _words([query])
        known = [word for word in words if word in index.vocab_dict]
        if not known:
            return []
        scores = index.get_scores(known)
        order = np.argsort(-scores, kind="stable")[:k]
        return [int(place) for place in order if scores[place] > 0]


@lru_cache(maxsize=8)
def corpus(path: Path, changed: int) -> Corpus:
    """A file's passages; `changed` is when it was last written. ValueError for a bad line."""
    titles, texts = [], []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as fault:
                raise ValueError(f"line {number}: not JSON ({fault})") from None
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f'line {number}: no text; write {{"text": "…", "title": "…"}}')
            titles.append(str(row.get("title") or ""))
            texts.append(text.strip())
    if not texts:
        raise ValueError('no passages in it; write {"text": "…", "title": "…"} on each line')
    return Corpus(titles, texts)


def _words(texts: list[str]) -> list[list[str]]:
    import bm25s

    found: list[list[str]] = bm25s.tokenize(
        texts, token_pattern=WORD, stopwords=[], return_ids=False, show_progress=False
    )
    return found


def _schema(name: str, description: str) -> Schema:
    query = {"type": "string", "description": "Words to look for."}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"query": query}, "required": ["query"]},
        },
    }
