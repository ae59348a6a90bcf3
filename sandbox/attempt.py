"""Do what cannot be undone in a throwaway process, to learn whether it works here."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable


def attempt(action: Callable[[], object]) -> OSError | None:
    """Run `action` in a forked process; the OSError that it raised there, or None.

    `action` may fork and end the outer process: the one that returns from it reports.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writing, b"[]")
        except OSError as error:
            os.write(writing, json.dumps([error.errno, error.strerror]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        return OSError(errno.ECHILD, "the process that tried it died")
    report = json.loads(said)
    return OSError(*report) if report else None
