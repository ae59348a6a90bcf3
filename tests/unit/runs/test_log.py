"""The log of a run: one line a step, whatever is added to it and however it is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elpo_ray.runs.log import (
    LOG,
    PASS_AT_1,
    HeldOut,
    JsonlSink,
    held_out,
    last_step,
    read_columns,
)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_numbers_of_a_step_that_has_a_line_are_added_to_it(tmp_path: Path) -> None:
    log = JsonlSink(tmp_path / LOG)
    assert log.last() == {}
    log.write(0, {PASS_AT_1: 0.4})
    log.write(1, {"reward": 1.0})
    log.write(2, {"reward": 2.0})
    log.write(2, {PASS_AT_1: 0.5})
    log.write(2, {PASS_AT_1: 0.25})
    assert log.last() == {"step": 2, "reward": 2.0, PASS_AT_1: 0.25}
    log.write(3, {"reward": 3.0})
    log.close()
    assert rows(tmp_path) == [
        {"step": 0, PASS_AT_1: 0.4},
        {"step": 1, "reward": 1.0},
        {"step": 2, "reward": 2.0, PASS_AT_1: 0.25},
        {"step": 3, "reward": 3.0},
    ]
    assert last_step(tmp_path) == 3


def test_a_log_that_was_shortened_meanwhile_goes_on_at_its_end(tmp_path: Path) -> None:
    """A run that goes back to a checkpoint cuts the file while the sink has it open."""
    log = JsonlSink(tmp_path / LOG)
    for step in (1, 2, 3):
        log.write(step, {"reward": float(step)})
    end = len("".join(json.dumps(row) + "\n" for row in rows(tmp_path)[:1]))
    with (tmp_path / LOG).open("r+b") as file:
        file.truncate(end)
    log.write(2, {"reward": 7.0})
    assert rows(tmp_path) == [{"step": 1, "reward": 1.0}, {"step": 2, "reward": 7.0}]


@pytest.mark.parametrize("size", [1, 4_000, 9_000])
def test_lines_of_any_length_are_found_again(tmp_path: Path, size: int) -> None:
    log = JsonlSink(tmp_path / LOG)
    many = {f"metric/{number:05d}": 0.5 for number in range(size)}
    log.write(1, many)
    log.write(2, many)
    log.write(2, {"added": 1.0})
    assert rows(tmp_path) == [{"step": 1, **many}, {"step": 2, **many, "added": 1.0}]


def test_an_opened_log_goes_on_with_its_last_line(tmp_path: Path) -> None:
    first = JsonlSink(tmp_path / LOG)
    first.write(4, {"reward": 1.0})
    first.close()
    JsonlSink(tmp_path / LOG).write(4, {PASS_AT_1: 0.5})
    assert rows(tmp_path) == [{"step": 4, "reward": 1.0, PASS_AT_1: 0.5}]


def test_the_curves_of_held_out_pass_at_1_are_read_from_the_columns(tmp_path: Path) -> None:
    log = JsonlSink(tmp_path / LOG)
    log.write(0, {PASS_AT_1: 0.4, f"{PASS_AT_1}_low": 0.3, f"{PASS_AT_1}_high": 0.5})
    log.write(1, {"reward": 1.0, "pass_at_1": 0.9})
    log.write(2, {"reward": 1.0, PASS_AT_1: 0.6, "eval/aime24/pass_at_1": 0.1})
    curves = held_out(read_columns(tmp_path)[0])
    assert curves == {
        "": [HeldOut(0, 0.4, 0.3, 0.5), HeldOut(2, 0.6, 0.6, 0.6)],
        "aime24": [HeldOut(2, 0.1, 0.1, 0.1)],
    }
    assert held_out({"step": [1.0], "reward": [1.0]}) == {}
