"""A test process that cannot end says where it hangs, and fails."""

from __future__ import annotations

import faulthandler
import sys

ENDING_S = 120
"""For threads and atexit handlers, once the last test is through."""


def pytest_unconfigure() -> None:
    faulthandler.dump_traceback_later(ENDING_S, exit=True, file=sys.__stderr__)
