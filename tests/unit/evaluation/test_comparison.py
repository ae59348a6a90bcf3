"""Evaluations beside each other: one table, one plot, and what must not be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import sample_of

from elpo_ray.compare import main
from elpo_ray.evaluation.comparison import Evaluation, short_names, table, warnings
from elpo_ray.evaluation.summary import summarize


def evaluation(
    folder: Path,
    model: str,
    *,
    tasks: tuple[str, ...] = ("aime24",),
    problems: str = "x",
    n: int = 4,
    **changes: Any,
) -> Path:
    """A folder as `elpo evaluate` leaves it; the share of successes grows with the name."""
    path = folder / f"evaluate-{model.replace('/', '-')}"
    path.mkdir(parents=True)
    samples = [
        sample_of(f"p{problem}", index, success=index < len(model) % 4, tool_calls=len(model),
                  tokens=100 * len(model), answer=str(index < len(model) % 4))
        for problem in range(3)
        for index in range(n)
    ]  # fmt: skip
    identity = {
        "kind": "evaluate",
        "sampler": {"temperature": 1.0, "top_p": 0.6, "seed": 0},
        "sandbox": {},
        "tasks": {task: {"problems": problems, "settings": {}} for task in tasks},
    } | changes
    (path / "manifest.json").write_text(json.dumps({"model": model, "identity": identity}))
    numbers = {"n": n, "missing": 0, **summarize(samples, [k for k in (2, 4, 8) if k <= n])}
    (path / "summary.json").write_text(json.dumps(dict.fromkeys(tasks, numbers)))
    return path


def test_one_table_has_every_model_and_measure(tmp_path: Path) -> None:
    one = Evaluation.read(evaluation(tmp_path, "a", tasks=("aime24", "aime25")))
    two = Evaluation.read(evaluation(tmp_path, "bb", n=8))
    heads, rows = table([one, two])
    assert heads == ["task", "", "a", "bb"]
    assert [row[0] for row in rows if row[0]] == ["aime24", "aime25"]
    cells = {row[1]: row[2:] for row in rows[: len(rows) // 2 + 1]}
    assert cells["avg@n"] == ["25.0%", "25.0%"] and cells["Pass@2"] == ["50.0%", "46.4%"]
    assert cells["Pass@8"] == ["–", "100.0%"] and cells["Major@4"][0] == "0.0%"
    assert cells["tool calls a sample"] == ["1.0", "2.0"]
    assert cells["tokens a sample"] == ["100.0", "200.0"]
    assert [row[3] for row in rows if row[1] == "avg@n"] == ["25.0%", "–"]


def test_the_command_writes_one_page_and_one_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [evaluation(tmp_path, name) for name in ("a", "bb", "<ccc>")]
    out = tmp_path / "page.html"
    assert main([*map(str, paths), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Pass@4" in printed and "Major@4" in printed and "note:" not in printed
    page = out.read_text()
    assert "&lt;ccc&gt;" in page and page.count("data:image/png;base64,") == 1
    assert len(re.findall("<table>", page)) == 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_in_another_way_is_said(tmp_path: Path) -> None:
    one = Evaluation.read(evaluation(tmp_path, "a"))
    two = Evaluation.read(evaluation(tmp_path, "bb", n=8, problems="y", sampler={"top_p": 1.0}))
    assert warnings([one, two]) == [
        "the sampler differs",
        "aime24: the problems differ",
        "aime24: samples of a problem differ (a 4, bb 8)",
    ]
    assert warnings([one, one]) == []


def test_two_folders_of_one_model_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [evaluation(tmp_path / part, "m") for part in ("x", "y")]
    paths[1] = paths[1].rename(tmp_path / "again")
    assert main([*map(str, paths), "--out", str(tmp_path / "page.html")]) == 0
    assert "(again)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda p: (p / "summary.json").unlink(), "has not ended; run its elpo evaluate command"),
        (lambda p: (p / "manifest.json").write_text("{"), "not a folder of elpo evaluate"),
        (lambda p: (p / "manifest.json").unlink(), "not a folder of elpo evaluate"),
        (
            lambda p: (p / "manifest.json").write_text('{"identity": {"kind": "analyze"}}'),
            "a folder of elpo analyze",
        ),
    ],
)
def test_what_is_no_evaluation_is_one_line(
    break_it: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = evaluation(tmp_path, "a"), evaluation(tmp_path, "bb")
    break_it(bad)
    assert main([str(good), str(bad), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and str(bad) in error


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/runs/grpo-1", "/a/runs/elpo-1/", "/b/cache/cold"], ["grpo-1", "elpo-1", "cold"]),
        (["Qwen/Qwen3-4B", "/runs/elpo"], ["Qwen3-4B", "elpo"]),
        (["/a/run/model", "/b/run/model", "model"], ["a/run/model", "b/run/model", "model"]),
        (["/a/one", "/a/one", "/b/one"], ["a/one", "a/one", "b/one"]),
        (["/a/one", "/a/one/"], ["one", "one"]),
    ],
)
def test_names_are_the_shortest_ends_that_tell_different_paths_apart(
    paths: list[str], names: list[str]
) -> None:
    assert short_names(paths) == names


def test_models_in_deep_folders_have_short_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = "/data/of/some/project/with/long/paths/runs/study"
    folders = [evaluation(tmp_path, f"{deep}/{name}") for name in ("grpo-1", "elpo-1")]
    assert main([*map(str, folders), "--out", str(tmp_path / "models.html")]) == 0
    assert "<th>grpo-1</th><th>elpo-1</th>" in (tmp_path / "models.html").read_text()
    assert "grpo-1" in capsys.readouterr().out
