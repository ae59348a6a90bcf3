"""What of a turn is thinking: it stays in the context as sampled and is no place for calls.

Thinking stands between two tags. It begins at the start of a turn (with its opening tag, or because
the generation prompt has written that tag already) and ends at the first closing tag; a turn that
never closes it is thinking to its end. Later in a turn an opening tag begins thinking only if a
closing tag follows; without one it is a word of the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

QUOTES = "`"
"""A tag directly after one of these is quoted, as in an explanation of the format."""


class Opened(Enum):
    """Which generation prompts end inside an open thought."""

    NEVER = auto()
    SOMETIMES = auto()
    """Those before the first turn but not those after a tool's response, or the other way round."""
    ALWAYS = auto()


@dataclass(frozen=True, slots=True)
class Thinking:
    """The tags of a family, and which of its generation prompts have written the first of them."""

    open: str = "<think>"
    close: str = "</think>"
    opened: Opened = Opened.NEVER

    def is_open(self, text: str) -> bool:
        """Whether `text`, a generation prompt, ends inside a thought."""
        return text.rfind(self.open) > text.rfind(self.close)

    def end(self, turn: str) -> int | None:
        """Where the thought at the beginning of a turn ends; None if it never does."""
        begins = turn.lstrip().startswith(self.open) or self.opened is Opened.ALWAYS
        close, inner = turn.find(self.close), turn.find(self.open)
        if not begins and self.opened is Opened.SOMETIMES:
            begins = close >= 0 and not 0 <= inner < close
        if not begins:
            return 0
        return None if close < 0 else close + len(self.close)

    def search(self, marker: re.Pattern[str], turn: str, start: int) -> re.Match[str] | None:
        """The first match at or after `start` that is neither inside a thought nor quoted."""
        while found := marker.search(turn, start):
            thought = turn.find(self.open, start, found.start())
            close = turn.find(self.close, thought) if thought >= 0 else -1
            if close >= 0:
                start = close + len(self.close)
            elif turn[: found.start()].endswith(QUOTES):
                start = found.end()
            else:
                return found
        return None
