"""What an evaluation counts, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTask, Word, make_worker
from fakes import sample_of as sample
from rich.console import Console

from elpo_ray.config.measure import EvaluateConfig
from elpo_ray.config.task import TaskConfig, TaskName
from elpo_ray.evaluation.bench import JsonLines, ResultFolder, _differences, trained_problems
from elpo_ray.evaluation.report import show, write_report
from elpo_ray.evaluation.summary import mean_success, per_problem, summarize
from elpo_ray.evaluation.votes import one_vote_each
from elpo_ray.rollout.sample import Sample
from elpo_ray.tasks import make_task
from elpo_ray.types import Problem


def right(problem: str = "p", index: int = 0, **changes: Any) -> Sample:
    return sample(problem, index, success=True, answer="8", **changes)


async def test_a_sample_says_what_was_done_and_said() -> None:
    def plan(number: int, before: list[str]) -> list[Word]:
        return ["g", "?", "=ok"]

    worker = make_worker(plan)
    made = await worker.evaluate(worker.task.train_problem(0), 3)
    assert (made.problem, made.index, made.success, made.answer) == ("p0", 3, True, "ok")
    assert (made.turns, made.tool_calls, made.end) == (3, 2, "answer")
    assert made.tool_kinds == {"malformed": 1, "ok": 1} and made.tool_seconds == 0.25
    assert made.tokens == len("g~0;") + len("?~0;") + len("=ok~0;")
    assert [step.get("kind") for step in made.transcript] == ["ok", "malformed", None]
    assert Sample.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_numbers_of_a_task_by_hand() -> None:
    samples = [
        right("p"), sample("p", 1), sample("p", 2, answer=None), right("p", 3),
        sample("q"), sample("q", 1, end="turn_length", answer=None, tool_kinds={}),
        sample("q", 2, graded=False), right("q", 3),
    ]  # fmt: skip
    numbers = summarize(samples, [2, 4])
    assert (numbers["problems"], numbers["samples"], numbers["ungraded"]) == (2, 8, 1)
    assert numbers["avg"]["mean"] == mean_success(samples) == pytest.approx((1 / 2 + 1 / 3) / 2)
    # p: 1 - C(2,2)/C(4,2); q has three graded samples, one of them right
    assert numbers["pass_at_k"]["2"] == pytest.approx((5 / 6 + 2 / 3) / 2)
    assert numbers["pass_at_k"]["4"] == 1.0 and numbers["problems_short_of_k"] == {"2": 0, "4": 1}
    # p: pairs {8,8} 1, {8,7} 1/2 twice, {8,-} 1 twice, {7,-} 0; q: {7,8} 1/2, {7,-} 0, {8,-} 1
    assert numbers["major_at_k"]["2"] == pytest.approx((4 / 6 + 1.5 / 3) / 2)
    assert numbers["outcomes"] == {
        "right": 3, "wrong": 2, "no answer": 1, "turn length": 1, "ungraded": 1
    }  # fmt: skip
    assert numbers["tool_results"] == {"ok": 7, "error": 7}
    assert [row["successes"] for row in per_problem(samples)] == [2, 1]


def test_tasks_without_votes_and_without_verdicts_say_nothing_they_do_not_know() -> None:
    numbers = summarize([sample(answer=None), sample(index=1, answer=None)], [2])
    assert numbers["major_at_k"] is None and numbers["outcomes"] == {"wrong": 2}
    nothing = summarize([sample(graded=False)], [1])
    assert nothing["avg"] is None and nothing["pass_at_k"] == {"1": None}
    assert mean_success([]) == 0.0


def test_the_report_shows_the_table_and_stands_alone(tmp_path: Path) -> None:
    samples = [right("p"), sample("p", 1), sample("<b>", 0), sample("<b>", 1)]
    summaries = {
        "aime24": {"n": 2, "missing": 0, **summarize(samples, [2])},
        "empty": {"n": 2, "missing": 8, **summarize([], [2])},
    }
    write_report(tmp_path, "a <model>", summaries)
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;model&gt;" in page and "25.0%" in page and "data:image/png;base64," in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=100)
    show(console, "m", summaries)
    said = console.export_text()
    assert "Pass@2" in said and "8 samples missing" in said


def test_records_survive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl")
    assert lines.load() == []
    lines.append({"a": 1})
    with lines.path.open("a") as file:
        file.write('{"a": 2, "b')
    assert lines.load() == [{"a": 1}]
    lines.append({"a": 3})
    assert lines.load() == [{"a": 1}, {"a": 3}]


def test_identities_differ_by_path_and_tasks_may_be_added() -> None:
    old = {"sampler": {"top_p": 0.6}, "tasks": {"a": {"problems": "x"}, "b": 1}}
    new = {"sampler": {"top_p": 1.0}, "tasks": {"a": {"problems": "y"}, "c": 1}}
    assert list(_differences(old, new)) == [
        ("sampler.top_p", 0.6, 1.0),
        ("tasks.a.problems", "x", "y"),
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "model=''"),
        ({"tasks": []}, "tasks=[]"),
        ({"tasks": ["a", "a"]}, "name a once"),
        ({"n": 0}, "n=0"),
        ({"n": 4, "ks": [8]}, "Pass@8 needs 8 samples of each problem, n=4"),
        ({"problems": 0}, "problems=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as fault:
        EvaluateConfig(**({"model": "m", "tasks": ["t"]} | changes))
    assert said in str(fault.value)


def test_k_beyond_n_is_left_out_unless_asked_for() -> None:
    assert EvaluateConfig(model="m", tasks=["t"], n=4).all_ks == [4]
    assert EvaluateConfig(model="m", tasks=["t"], n=2).all_ks == []
    assert EvaluateConfig(model="m", tasks=["t"]).all_ks == [4, 16, 32]


def test_results_of_another_sampler_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeBench:
        """A bench whose identity is what is set here."""

        config = EvaluateConfig(model="m", tasks=["t"], out=str(tmp_path / "out"))
        source = type("Source", (), {"name": "m", "path": "/m", "served_model": None})
        top_p = 0.6

        def identity(self) -> dict[str, Any]:
            return {"sampler": {"top_p": self.top_p}, "tasks": {"t": 1}}

    bench: Any = FakeBench()
    first = ResultFolder.of(bench, "evaluate", {})
    again = ResultFolder.of(bench, "evaluate", {})
    manifest = again.manifest()
    assert manifest is not None and len(manifest["sessions"]) == 2
    assert "python" in manifest["sessions"][0]["versions"]
    bench.top_p = 1.0
    with pytest.raises(ValueError, match=r"sampler\.top_p=0\.6, not 1\.0; choose another folder"):
        ResultFolder.of(bench, "evaluate", {})
    assert first.path == tmp_path / "out"


def test_each_choice_of_problems_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; in a folder that is named the difference is told in words."""
    monkeypatch.chdir(tmp_path)

    class FakeBench:
        """A bench whose problems follow from the settings alone."""

        source = type("Source", (), {"name": "m", "path": "/m", "served_model": None})

        def __init__(self, **settings: Any) -> None:
            self.config = EvaluateConfig(model="m", tasks=["t"], **settings)

        def identity(self) -> dict[str, Any]:
            problems = f"digest of {self.config.problems}"
            return {"model": {}, "tasks": {"t": {"problems": problems, "settings": {}}}}

    def folder(**settings: Any) -> Path:
        bench: Any = FakeBench(**settings)
        return ResultFolder.of(bench, "evaluate", {}).path

    whole, some = folder(), folder(problems=5)
    assert whole != some == folder(problems=5, n=8), "more samples go to the same folder"
    assert folder(n=2) == whole
    assert len({whole, some, folder(problems=6), folder(task={"max_turns": 2})}) == 4
    folder(out="mine")
    with pytest.raises(ValueError, match=r"out='mine': .*other problems of t .*as in out=NEW"):
        folder(out="mine", problems=5)


def test_training_problems_are_the_first_of_the_stream_and_come_once(tmp_path: Path) -> None:
    countdown = make_task(TaskConfig(name=TaskName.countdown), 3)
    taken = trained_problems(countdown, 5)
    assert [each.id for each in taken] == [countdown.train_problem(i).id for i in range(5)]
    assert not {each.ground_truth for each in taken} & {None}
    file = tmp_path / "train.jsonl"
    rows = [{"problem": f"q{i}", "answer": str(i)} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    other = tmp_path / "eval.jsonl"
    other.write_text(json.dumps({"problem": "another", "answer": "7"}))
    few = make_task(TaskConfig(name=TaskName.jsonl, train_file=str(file), eval_file=str(other)), 0)
    assert sorted(each.ground_truth for each in trained_problems(few, 10)) == ["0", "1", "2"]


async def test_equal_answers_are_one_vote_and_join_the_first_class_they_equal() -> None:
    class Near(FakeTask):
        """Numbers that are at most 1 apart are equal, which is not transitive."""

        asked = 0

        async def same_answer(self, problem: Problem, first: str, second: str) -> bool:
            self.asked += 1
            return abs(int(first) - int(second)) <= 1

    task = Near()
    problems = [task.train_problem(0), task.train_problem(1)]
    given = ["5", "6", "7", None, "6", "5", "9"]
    samples = [sample("p0", i, answer=answer) for i, answer in enumerate(given)]
    merged = await one_vote_each(task, problems, [sample("p1", answer="6"), *reversed(samples)])
    answers = {(made.problem, made.index): made.answer for made in merged}
    assert [answers["p0", i] for i in range(7)] == ["5", "5", "7", None, "5", "5", "9"]
    assert answers["p1", 0] == "6" and task.asked == 4


async def test_forms_of_one_answer_win_together(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"problem": "q", "answer": "1/2"}))
    task = make_task(TaskConfig(name=TaskName.aime24, eval_file=str(file)), 0)
    problems = task.eval_problems(1)
    forms = [r"\frac{1}{2}", r"\dfrac{1}{2}", "0.5", "3", "3"]
    samples = [
        sample(problems[0].id, i, answer=form, success=form != "3") for i, form in enumerate(forms)
    ]
    assert summarize(samples, [5])["major_at_k"]["5"] == 0.0
    merged = await one_vote_each(task, problems, samples)
    assert summarize(merged, [5])["major_at_k"]["5"] == 1.0
