"""Runs beside each other: what differs, at which budget, and what must not be compared."""

import base64
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import write_run

from elpo_ray.compare import (
    WINDOW,
    Run,
    common_budgets,
    compared,
    differences,
    main,
    standard_error,
    warnings,
)
from elpo_ray.config.values import flattened


def run_of(
    folder: Path, name: str, rows: list[dict[str, Any]], config: str = "", summary: str = ""
) -> Run:
    path = folder / name
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "config.yaml").write_text(config)
    if summary:
        (path / "summary.json").write_text(summary)
    return Run.read(path)


def rows(steps: int, rollouts: int, **metrics: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "total/leaves": step * rollouts, "reward": step, **metrics}
        for step in range(1, steps + 1)
    ]


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    a = run_of(tmp_path, "a", [], "trainer: {seed: 0, steps: 4, run_name: a}\nmodel: {path: x}\n")
    b = run_of(tmp_path, "b", [], "trainer: {seed: 1, steps: 4, run_name: b}\nextra: [1]\n")
    assert differences([a, b]) == {
        "trainer.seed": [0, 1],
        "model.path": ["x", ""],
        "extra": ["", [1]],
    }
    assert differences([a, a]) == {}


@given(
    st.recursive(
        st.integers(),
        lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, min_size=1),
        max_leaves=8,
    )
)
def test_flattening_keeps_every_value(values: Any) -> None:
    def at(value: Any, key: list[str]) -> Any:
        return at(value[key[0]], key[1:]) if key else value

    flat = flattened({"root": values})
    assert all(at({"root": values}, key.split(".")) == value for key, value in flat.items())
    assert len(flat) == len(re.findall(r"-?\d+", json.dumps(values)))


def test_figures_are_taken_at_the_end_and_at_the_budget_that_all_reached(tmp_path: Path) -> None:
    long, short = (run_of(tmp_path, f"r{n}", rows(n, 100)) for n in (20, 8))
    common = common_budgets([long, short])
    assert common == {"steps": 8, "rollouts": 800, "tokens": None, "seconds": None}
    last = range(8 - WINDOW + 1, 8 + 1)
    assert long.figure("reward", "rollouts", 800) == pytest.approx(sum(last) / WINDOW)
    assert long.figure("reward", "rollouts", math.inf) == 18
    assert short.figure("reward", "rollouts", 800) == long.figure("reward", "rollouts", 800)
    assert long.figure("reward", "rollouts", 99) is None
    assert long.figure("absent", "rollouts", 800) is None


def test_equal_steps_of_unequal_size_are_a_warning(tmp_path: Path) -> None:
    a, b = run_of(tmp_path, "a", rows(4, 100)), run_of(tmp_path, "b", rows(4, 300))
    printed = [notice.text for notice in warnings([a, b])]
    assert "the budgets differ in rollouts" in printed
    assert not any("steps" in text for text in printed)
    assert [t for t in printed if "not ended" in t] == ["a run has not ended: no summary.json"] * 2


def test_pass_at_1_on_other_problems_is_a_warning(tmp_path: Path) -> None:
    a = run_of(tmp_path, "a", rows(2, 9), "task: {eval_problems: 20}\n", "{}")
    b = run_of(tmp_path, "b", rows(2, 9), "task: {eval_problems: 200}\n", "{}")
    assert [notice.where for notice in warnings([a, b])] == ["20, 200"]
    assert warnings([a, a]) == []


def test_sums_stand_in_for_totals_that_an_older_log_does_not_have(tmp_path: Path) -> None:
    lines = [{"step": 1, "rollouts": 10}, {"step": 2, "rollouts": 30}]
    assert run_of(tmp_path, "a", lines).axes["rollouts"] == [10, 40]


def test_standard_error_is_that_of_so_many_problems(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", [], "", '{"pass_at_1_after": 0.5, "eval_problems": 100}')
    assert standard_error(run, "pass_at_1_after") == pytest.approx(0.05)
    assert standard_error(run, "pass_at_1_before") is None


def test_the_command_writes_tables_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run(tmp_path / "a", 3, 2), write_run(tmp_path / "b", 2, 2, planned=5)
    page = tmp_path / "page.html"
    assert main([str(a), str(b), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "trainer.steps" in printed and "the budgets differ in rollouts" in printed
    found = re.search(r'id="overview">([^<]+)<', page.read_text())
    assert found is not None
    data = json.loads(zlib.decompress(base64.b64decode(found[1])))
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert data["common"]["rollouts"] == 2 * 2 * 16
    assert data["differences"]["trainer.steps"] == ["3", "5"]


def test_runs_of_one_name_are_distinguished_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(write_run(tmp_path / seed / "run", 1, 1)) for seed in ("s0", "s1")]
    out = tmp_path / "page.html"
    assert main([*paths, "--out", str(out)]) == 0
    assert re.search(r"<title>.*s0/run / .*s1/run", out.read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "1 runs: name 2 to 6"),
        (["{run}"] * 7, "7 runs: name 2 to 6"),
        (["{run}", "{run}/trees"], "not a run folder"),
        (["{run}", "{run}", "--out", "{run}/no/page.html"], "No such file or directory"),
    ],
)
def test_a_mistake_in_the_call_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = write_run(tmp_path / "run", 1, 1)
    try:
        code = main([argument.replace("{run}", str(run)) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    assert (
        code == 2 and message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    )


def test_compared_data_is_json_of_finite_numbers(tmp_path: Path) -> None:
    run = run_of(tmp_path, "a", [{"step": 1, "loss": math.nan, "reward": 1.0}])
    json.dumps(compared([run, run]), allow_nan=False)
