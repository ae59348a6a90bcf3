"""Calls of the user's own functions: async ones on the loop, others each in a thread of its own.

Invariant: a call costs its time limit at most, whatever the function does; one that blocks for ever
keeps its thread, never a place that other calls need, and the thread ends with the process.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable
from typing import Any


async def call(function: Callable[..., Any], timeout_s: float, *given: Any, **options: Any) -> Any:
    """What the function returns, awaited if need be. Raises what it raises, and TimeoutError once
    `timeout_s` seconds have passed. SystemExit becomes a RuntimeError: only the call ends."""
    async with asyncio.timeout(timeout_s):
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - of an object that is called
        ):
            return await _on_loop(function, *given, **options)
        found = await _in_thread(function, *given, **options)
        return await found if inspect.isawaitable(found) else found


async def _on_loop(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    try:
        return await function(*given, **options)
    except SystemExit as end:
        raise RuntimeError(f"SystemExit: {end.code}") from None


async def _in_thread(function: Callable[..., Any], *given: Any, **options: Any) -> Any:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def run() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(function, *given, **options)
        except SystemExit as end:
            error = RuntimeError(f"SystemExit: {end.code}")
        except StopIteration as end:  # a future cannot hold one
            error = RuntimeError(f"StopIteration: {end}")
        except BaseException as fault:  # whatever the user's code raises is the caller's to judge
            error = fault
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=f"user-{function!r:.40}", daemon=True).start()
    return await done
