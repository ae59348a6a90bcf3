"""The sandbox's data and bytes, without a process."""

from __future__ import annotations

import math
import pickle
import struct
import time
from dataclasses import fields, replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import seccomp
from sandbox.fusion import FusionSandbox
from sandbox.limits import Limits
from sandbox.metrics import Metrics
from sandbox.results import CallResult, Kind, Put, ReplayReason, SessionState, WorkFile
from sandbox.streams import HeadTail
from sandbox.supervisor import Sandbox
from sandbox.syscalls import ALLOWED, DENIED, NUMBERS
from sandbox.wire import Breach, Reply, pack_reply, unpack_reply

NONCE = b"12345678"
REPLY = Reply(Kind.ERROR, None, "ValueError", "Traceback …\ud800", ("traceback",))


def test_digest_covers_what_repeats_and_nothing_else() -> None:
    result = CallResult(kind=Kind.OK, stdout="a", value="1")
    same = replace(result, duration_s=9.0, cpu_s=1.0, queue_s=2.0, restored_by="replay", stderr="w")
    assert result.digest() == same.digest()
    for change in ({"stdout": "b"}, {"value": None}, {"kind": Kind.ERROR}, {"error_type": "E"}):
        assert replace(result, **change).digest() != result.digest()


def test_digest_ignores_addresses_and_session_folders() -> None:
    first = CallResult(kind=Kind.OK, value="<f at 0x7f00aa> '/tmp/sandbox-a_b1/3/x' 0xff")
    again = replace(first, value="<f at 0x7f11bb> '/tmp/sandbox-c2/14/x' 0xff")
    assert first.digest() == again.digest()
    assert first.digest() != replace(first, value=again.value.replace("0xff", "0xfe")).digest()  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["/a" * 50_000, "0x" * 50_000, "/sandbox-" * 10_000, "f" * 99_000])
def test_digest_takes_linear_time(text: str) -> None:
    start = time.process_time()
    CallResult(kind=Kind.OK, stdout=text).digest()
    assert time.process_time() - start < 0.5


def test_state_grows_by_calls_and_survives_pickling() -> None:
    ok, lost = CallResult(kind=Kind.OK), CallResult(kind=Kind.TIMEOUT, state_kept=False)
    empty = SessionState("setup")
    state = empty.after("a", ok).after("b", lost)
    assert [(entry.code, entry.lost) for entry in state.entries] == [("a", False), ("b", True)]
    assert (empty.entries, state.setup) == ((), "setup")
    assert state.after("c", CallResult(kind=Kind.SANDBOX_FAILURE, state_kept=False)) is state
    assert pickle.loads(pickle.dumps(state)) == state


def test_reply_round_trip_byte_by_byte() -> None:
    data = pack_reply(NONCE, REPLY)
    assert all(unpack_reply(data[:cut], NONCE, 1000) is None for cut in range(len(data)))
    read = unpack_reply(data, NONCE, 1000)
    assert read == replace(REPLY, traceback="Traceback …\\ud800")


@pytest.mark.parametrize(
    "data",
    [
        pack_reply(b"other!!!", REPLY),
        pack_reply(NONCE, REPLY) + b"x",
        pack_reply(NONCE, replace(REPLY, kind=Kind.SANDBOX_FAILURE)),
        pack_reply(NONCE, replace(REPLY, traceback="t" * 2000)),
        NONCE + b"\xff" * 100,
    ],
)
def test_dishonest_replies_are_breaches(data: bytes) -> None:
    with pytest.raises(Breach):
        unpack_reply(data, NONCE, 1000)


@given(st.binary(max_size=200))
def test_no_bytes_harm_the_reader(data: bytes) -> None:
    for received in (data, NONCE + data):
        try:
            reply = unpack_reply(received, NONCE, 100)
        except Breach:
            continue
        assert reply is None or isinstance(reply, Reply)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_head_and_tail_are_kept(parts: list[bytes], half: int) -> None:
    kept, whole = HeadTail(2 * half), b"".join(parts)
    for part in parts:
        kept.add(part)
    assert kept.truncated == (len(whole) > 2 * half)
    if not kept.truncated:
        assert kept.text() == whole.decode("utf-8", "replace")
    else:
        assert kept.text().startswith(whole[:half].decode("utf-8", "replace"))
        assert kept.text().endswith(whole[-half:].decode("utf-8", "replace"))
        assert f"[{len(whole) - 2 * half} bytes left out]" in kept.text()


@pytest.mark.parametrize("name", ["wall_s", "memory_mib", "output_kib", "threads"])
def test_limits_name_what_is_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=rf"limits\.{name}=0: use a value above 0"):
        Limits(**{name: 0})


NAMES = [each.name for each in fields(Limits)]
WRONG = [
    ("'10'", "10"), ("None", None), ("True", True), ("False", False), ("[]", []), ("1j", 1j),
    ("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf), ("-1", -1), ("0", 0),
    ("1e+300", 1e300), ("10", Decimal(10)), ("1", Fraction(1)), ("", np.int64(1)),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shown", "value"), WRONG)
def test_a_wrong_limit_is_refused_in_one_line(name: str, shown: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^limits\.{name}=[^\n]*: use [^\n]*$") as refused:
        Limits(**{name: value})
    assert shown in str(refused.value)


@pytest.mark.parametrize("name", ["memory_mib", "file_mib", "files", "threads", "snapshots"])
def test_whole_numbers_are_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=rf"limits\.{name}=1\.0: use a whole number"):
        Limits(**{name: 1.0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"limits\.{name}=4294967296: use at most"):
        Limits(**{name: 1 << 32})  # type: ignore[arg-type]
    assert Limits(wall_s=np.float64(2)).wall_s == 2  # a float


@pytest.mark.parametrize("kind", [Sandbox, partial(FusionSandbox, "http://localhost")])
@pytest.mark.parametrize("name", ["sessions", "running"])
@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, True, "8", 1 << 40])
def test_wrong_numbers_of_a_sandbox_are_refused_in_one_line(
    kind: Any, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=[^\n]*: use [^\n]*$"):
        kind(**{name: value})


@pytest.mark.parametrize(
    "wrong", [{"replay_below_s": math.nan}, {"snapshot_mib": "1"}, {"preload": "numpy"}]
)
def test_wrong_arguments_of_a_sandbox_are_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(wrong))}=[^\n]*: use [^\n]*$"):
        Sandbox(**wrong)


def test_metrics_count_replays_by_their_reasons() -> None:
    metrics = Metrics()
    metrics.count_replay(ReplayReason.EVICTED, 3)
    metrics.count_replay(ReplayReason.LOST, 2)
    seen = metrics.values()
    assert (seen["replays"], seen["replayed_calls"]) == (2, 5)
    named = {key: value for key, value in seen.items() if key.startswith("replays_")}
    assert {key for key, value in named.items() if value} == {"replays_evicted", "replays_lost"}
    assert len(named) == len(ReplayReason)


def test_images_and_files_are_no_part_of_what_a_replay_compares() -> None:
    result = CallResult(kind=Kind.OK, stdout="a")
    other = replace(result, figures=(b"x",), files=(WorkFile("a", 1),), truncated=("figures",))
    assert result.digest() == other.digest()


def test_a_put_is_a_step_of_the_log() -> None:
    put = Put("a", b"data")
    state = (
        SessionState()
        .after("x = 1", CallResult(kind=Kind.OK))
        .after(put, CallResult(kind=Kind.OK, node="n"))
    )
    assert [entry.work for entry in state.entries] == ["x = 1", put]
    assert pickle.loads(pickle.dumps(state)) == state


def test_metrics_count_kinds_and_percentiles() -> None:
    metrics = Metrics()
    for milliseconds in range(100):
        metrics.count(CallResult(kind=Kind.OK, duration_s=milliseconds / 1000))
    metrics.count(CallResult(kind=Kind.SANDBOX_FAILURE))
    seen = metrics.values()
    assert (seen["calls"], seen["calls_ok"], seen["failures"]) == (101, 100, 1)
    assert seen["call_p50_s"] == pytest.approx(0.049) and seen["call_p99_s"] >= 0.098


def run_filter(code: bytes, number: int, arch: int, *arguments: int) -> int:
    """Interpret the BPF program over one seccomp_data; the verdict."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    at, word = 0, 0
    while True:
        op, jump_true, jump_false, k = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        if op == 0x06:
            return int(k)
        if op == 0x20:
            word = struct.unpack_from("<I", data, k)[0]
        elif op == 0x05:
            at += k
        elif op == 0x54:
            word &= k
        else:
            hit = {0x15: word == k, 0x35: word >= k, 0x45: bool(word & k)}[op]
            at += jump_true if hit else jump_false


@pytest.mark.parametrize(("machine", "column", "arch"), [
    ("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7),
])  # fmt: skip
def test_filter_decides_as_meant_on_both_architectures(
    monkeypatch: pytest.MonkeyPatch, machine: str, column: int, arch: int
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    code = seccomp.program()
    me, allow, eperm = 0x5EED0BAD, 0x7FFF0000, 0x50001

    def verdict(name: str, *arguments: int) -> int:
        number = NUMBERS[name][column]
        return allow if number is None else run_filter(code, number, arch, *arguments)

    assert {verdict(name) for name in ALLOWED} == {allow}
    denied = {verdict(name) for name in DENIED if NUMBERS[name][column] is not None}
    assert denied == {eperm}
    assert verdict("clone", 0x3D0F00) == allow and verdict("clone", 0x01200011) != allow
    for own in (0x100, 0x200, 0x400, 0x800):
        assert verdict("clone", 0x3D0F00 & ~own) == 0x50000 | 11
    assert verdict("close_range", 5, 9) == allow and verdict("close_range", 5, 9, 2) == 0x50000 | 22
    assert verdict("futex", 0, 0x80) == allow and verdict("futex", 0, 0x189) == allow
    assert {verdict("futex", 0, wait) for wait in (0, 9, 0x109)} == {0x50000 | 11}
    assert {verdict("futex", 0, wake) for wake in (1, 3, 10)} == {0x50000}
    for inherits in (6, 7, 8, 11, 12, 13):
        asked = {verdict("futex", 0, inherits | flags) for flags in (0, 0x80, 0x100, 0x180)}
        assert asked == {0x50000 | 38}
    for clock in (0, 1, 2, 11, -2 % 2**32, -6 % 2**32):
        assert verdict("clock_gettime", clock) == allow
    theirs = {verdict("clock_gettime", (~pid << 3 | 2) % 2**32) for pid in (1, 2, 4000, 70_000)}
    assert theirs == {0x50000 | 22}
    assert verdict("getsid") == allow and verdict("getsid", 1) == eperm
    assert verdict("madvise", 0, 0, 14) == allow and verdict("madvise", 0, 0, 12) == 0x50000
    assert verdict("clone", 0x10000000) != allow and verdict("clone3") != allow
    assert verdict("mmap", 0, 4096, 3, 0x22) == allow and verdict("mmap", 0, 4096, 1, 2) == allow
    assert {verdict("mmap", 0, 4096, 1, shared) for shared in (1, 3, 0x21)} == {eperm}
    assert verdict("kill", me, 6) == allow and verdict("kill", me, 9) == eperm
    assert verdict("kill", 1, 6) == eperm and verdict("tgkill", 1, 1, 6) == eperm
    assert verdict("tgkill", me, me, 6) == allow and verdict("tgkill", me, me, 19) == eperm
    assert verdict("socketpair", 1, 0o2000001) == allow and verdict("socketpair", 1, 2) == eperm
    assert verdict("socketpair", 2, 1) == eperm
    assert verdict("fcntl", 3, 4) == allow and verdict("fcntl", 3, 8) == eperm
    assert verdict("prlimit64", 0) == allow and verdict("prlimit64", 1) == eperm
    assert verdict("prctl", 1) == eperm and verdict("ioctl", 0, 0x5412) == eperm
    assert run_filter(code, 9999, arch) == 0x50000 | 38
    assert run_filter(code, 0, 0x40000003) == 0x80000000
    assert run_filter(code, 0x40000027, arch) == 0x80000000


def test_filter_refuses_an_unknown_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(OSError, match="no system call table for riscv64"):
        seccomp.program()
