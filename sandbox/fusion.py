"""Sessions over a remote executor of the SandboxFusion form: `POST URL/run_code`, stateless.

State is made by replay: every call sends all cells before it again, and their results must come
out as at first. With such a service no sandbox of our own is needed; a branch costs its prefix.
The service is trusted with isolation; what comes back is data, as from any session.
"""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import secrets
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

from sandbox import fusion_harness
from sandbox.files import checked, parts_of
from sandbox.limits import OUTPUT_KILL_BYTES, Limits, check_number
from sandbox.metrics import Metrics
from sandbox.results import (
    ACCIDENTAL,
    FENCED,
    CallResult,
    Entry,
    FileRefused,
    Keep,
    Kind,
    Put,
    ReplayDiverged,
    ReplayReason,
    SandboxFailure,
    SessionState,
    check_opening,
    refusal,
)
from sandbox.streams import HeadTail

_HARNESS = inspect.getsource(fusion_harness)
_PATIENCE_S = 30.0
"""Seconds that the service may take beyond the run itself."""
_MAX_ANSWER_BYTES = 4 * OUTPUT_KILL_BYTES
_KINDS = (Kind.OK, Kind.ERROR, Kind.MEMORY, Kind.EXITED)
"""What the harness may say of a cell."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What the service said of one run."""

    status: str
    stdout: str
    stderr: str
    seconds: float
    code: int | None


@dataclass(frozen=True, slots=True)
class Get:
    """The wish to have a file."""

    name: str


class FusionSession:
    """A session with the interface of `sandbox.supervisor.Session`."""

    def __init__(self, sandbox: FusionSandbox, state: SessionState, keep: Keep) -> None:
        self._sandbox = sandbox
        self._state = replace(state, host=sandbox.id)
        self._keep = keep
        self._how = "replay" if state.entries else "fresh"
        self._one_at_a_time = asyncio.Lock()
        self._closed = False

    @property
    def state(self) -> SessionState:
        return self._state

    async def call(self, code: str) -> CallResult:
        """See `Session.call`. A failure of the service is a result too."""
        async with self._one_at_a_time:
            self._check_open()
            refused = refusal(code)
            if refused is not None:
                self._sandbox.metrics.count(refused)
                return refused
            try:
                result = await self._sandbox.run(self._state, code)
            except SandboxFailure as failure:
                result = CallResult(
                    kind=Kind.SANDBOX_FAILURE,
                    error_type=type(failure).__name__,
                    traceback=str(failure),
                    state_kept=False,
                )
            why = ReplayReason.UNSUPPORTED if self._how == "replay" else ""
            result = replace(result, restored_by=self._how, replay_reason=why, isolation="remote")
            if self._keep is not Keep.NOTHING:
                self._state = self._state.after(code, result)
            self._sandbox.metrics.count(result)
            return result

    async def put(self, name: str, data: bytes) -> None:
        """See `Session.put`."""
        file = checked(name, data, self._sandbox.limits, kept=self._keep is not Keep.NOTHING)
        async with self._one_at_a_time:
            self._check_open()
            result = _answered(await self._sandbox.run(self._state, file))
            self._state = self._state.after(file, result)

    async def get(self, name: str) -> bytes:
        """See `Session.get`; of a file of at most 2 MiB."""
        wanted = Get("/".join(parts_of(name)))
        async with self._one_at_a_time:
            self._check_open()
            result = _answered(await self._sandbox.run(self._state, wanted))
        try:
            return base64.b64decode(result.value or "", validate=True)
        except ValueError as error:
            raise SandboxFailure(f"file {name!r}: {error}") from None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed: open a new one, at its state if need be")

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._sandbox.leave()


class FusionSandbox:
    """A sandbox with the interface of `supervisor.Sandbox`, without snapshots and trees."""

    def __init__(
        self, url: str, limits: Limits | None = None, *, sessions: int = 64, running: int = 16
    ) -> None:
        """`running` bounds the requests that the service gets at once."""
        for name, value in (("sessions", sessions), ("running", running)):
            check_number(name, value, whole=True, least=1)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: begin with http:// or https://")
        self.id = secrets.token_hex(8)
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._url = f"{url.rstrip('/')}/run_code"
        self._running = asyncio.Semaphore(running)
        self._places = asyncio.Semaphore(sessions)
        self._open = 0

    async def open(
        self,
        setup: str = "",
        at: SessionState | None = None,
        *,
        tree: str | None = None,
        keep: Keep = Keep.STATES,
    ) -> FusionSession:
        """See `Sandbox.open`. Nothing is kept, so a `tree` is only a name."""
        check_opening(setup, at, tree, keep)
        await self._places.acquire()
        self._open += 1
        self.metrics.opened += 1
        state = at or SessionState(setup)
        return FusionSession(self, replace(state, tree=tree or state.tree), keep)

    async def release(self, tree: str) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is left behind."""

    def gauges(self) -> dict[str, float]:
        """The metrics."""
        return {**self.metrics.values(), "live_sessions": self._open}

    def leave(self) -> None:
        """A session is closed: its place is free."""
        self._open -= 1
        self._places.release()

    async def run(self, state: SessionState, work: str | Put | Get) -> CallResult:
        """Do one thing after all others. Raises SandboxFailure, ReplayDiverged."""
        mark = secrets.token_hex(16)
        cells = [_told(step) for step in (*(entry.work for entry in state.effective), work)]
        payload = {
            "setup": state.setup,
            "cells": cells,
            "mark": mark,
            "keep": self.limits.output_kib << 10,
            "accidental": ACCIDENTAL.pattern,
            "fenced": FENCED.pattern,
        }
        program = f"{_HARNESS}\nrun_cells(**json.loads({json.dumps(payload)!r}))\n"
        asked = time.monotonic()
        async with self._running:
            queue_s = time.monotonic() - asked
            run = await asyncio.to_thread(self._post, program, 1 + len(state.effective))
        if state.effective:
            self.metrics.count_replay(ReplayReason.UNSUPPORTED, len(state.effective))
        return replace(self._read(run, mark, state), queue_s=queue_s)

    def _post(self, program: str, cells: int) -> _Run:
        """Send one request. It blocks, so it runs in a thread."""
        seconds = self.limits.wall_s * cells
        request = {
            "code": program,
            "language": "python",
            "run_timeout": seconds,
            "memory_limit_MB": self.limits.memory_mib,
        }
        message = urllib.request.Request(
            self._url, json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(message, timeout=seconds + _PATIENCE_S) as answer:
                said = json.loads(answer.read(_MAX_ANSWER_BYTES))
            if said["status"] == "SandboxError":
                raise SandboxFailure(f"{self._url}: {said.get('message')}")
            ran = said["run_result"]
            return _Run(
                status=str(ran["status"]),
                stdout=str(ran.get("stdout") or ""),
                stderr=str(ran.get("stderr") or ""),
                seconds=float(ran.get("execution_time") or 0.0),
                code=ran.get("return_code"),
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SandboxFailure(f"{self._url}: {type(error).__name__}: {error}") from error

    def _read(self, run: _Run, mark: str, state: SessionState) -> CallResult:
        printed, found, said = run.stdout.rpartition("\n" + mark)
        if not found:
            return self._lost(run)
        try:
            reply = json.loads(said.split("\n")[0])
            if "setup" in reply:
                raise SandboxFailure(f"the setup code failed: {reply['setup']}")
            word, value, error_type, trace = reply["told"]
            digests = list(reply["digests"])
            kind = _KINDS[[each.value for each in _KINDS].index(word)]
        except (ValueError, LookupError, TypeError):
            return self._lost(run)
        _compare(state.effective, digests)
        stdout, out_cut = self._cut(printed)
        stderr, err_cut = self._cut(run.stderr)
        return CallResult(
            kind=kind,
            stdout=stdout,
            stderr=stderr,
            value=None if value is None else str(value),
            error_type=None if error_type is None else str(error_type),
            traceback=str(trace),
            truncated=tuple(n for n, cut in (("stdout", out_cut), ("stderr", err_cut)) if cut),
            duration_s=run.seconds,
            snapshot="unsupported",
            node=secrets.token_hex(16),
        )

    def _lost(self, run: _Run) -> CallResult:
        """The run did not come to the end of the last cell."""
        kind, why = Kind.EXITED, f"exit status {run.code}"
        if run.status == "TimeLimitExceeded":
            kind, why = Kind.TIMEOUT, f"ran for {self.limits.wall_s:g} s"
        return CallResult(
            kind=kind,
            stdout=self._cut(run.stdout)[0],
            stderr=self._cut(run.stderr)[0],
            traceback=why,
            duration_s=run.seconds,
            state_kept=False,
        )

    def _cut(self, text: str) -> tuple[str, bool]:
        kept = HeadTail(self.limits.output_kib << 10)
        kept.add(text.encode("utf-8", "backslashreplace"))
        return kept.text(), kept.truncated


def _answered(result: CallResult) -> CallResult:
    """What came of a file. Raises FileRefused, and SandboxFailure if the run did not get there."""
    if result.kind is Kind.ERROR:
        raise FileRefused(result.traceback)
    if result.kind is not Kind.OK:
        raise SandboxFailure(f"no file: {result.traceback}")
    return result


def _told(work: str | Put | Get) -> str | list[str]:
    """A step as the harness takes it."""
    if isinstance(work, Put):
        return ["put", work.name, base64.b64encode(work.data).decode()]
    return work if isinstance(work, str) else ["get", work.name]


def _compare(entries: tuple[Entry, ...], digests: list[Any]) -> None:
    """Raises ReplayDiverged."""
    recorded = [entry.digest for entry in entries]
    for number, (expected, seen) in enumerate(zip(recorded, digests, strict=False), 1):
        if expected != seen:
            raise ReplayDiverged(
                f"replay diverged: call {number} of {len(entries)} came to another result than "
                "when it was recorded"
            )
