"""Data sets: local files in the sets' own fields, prompts, and what a bad row or no hub says."""

import base64
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from elpo_ray.config.task import TaskConfig, TaskName
from elpo_ray.interfaces import Task
from elpo_ray.tasks import FAMILIES, make_task
from elpo_ray.tasks.grading.programs import Test as Case
from elpo_ray.tasks.grading.programs import (
    decode_private,
    matches,
    read_livecodebench,
    read_tests,
    same_lines,
)
from elpo_ray.tasks.open_agentrl import read, read_plain
from elpo_ray.tasks.rewards import ANSWER_LINE, KIND
from elpo_ray.types import Problem

AIME = {"ID": "2024-I-1", "Problem": "Find $x$.", "Solution": "…", "Answer": 204}
GPQA = {
    "Question": "Which gas?",
    "Correct Answer": "Helium\n",
    "Incorrect Answer 1": "Argon",
    "Incorrect Answer 2": "Neon",
    "Incorrect Answer 3": "Xenon",
    "High-level domain": "Chemistry",
}
PUBLIC = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
PRIVATE = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]


def packed(tests: Any) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


LCB = {
    "question_content": "Add two numbers.",
    "contest_date": "2025-03-01T00:00:00",
    "starter_code": "",
    "public_test_cases": json.dumps(PUBLIC),
    "private_test_cases": packed(PRIVATE),
    "metadata": "{}",
}
RL = {
    "data_source": "skywork",
    "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "reward_model": {"ground_truth": "7", "style": "rule"},
    "extra_info": {"index": 0},
}
CODE = {"inputs": ["1 2"], "outputs": ["3"]}
CALL = {"id": "a", "type": "function",
        "function": {"name": "code_interpreter", "arguments": {"code": "print(7)"}}}  # fmt: skip
TALK = [
    {"role": "user", "content": "What is 3 + 4?", "tool_calls": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_calls": None},
    {"role": "assistant", "content": r"\boxed{7}", "tool_calls": None},
]


def put(folder: Path, name: str, *rows: Any) -> Path:
    """Rows as a file of the type that `name` says."""
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(folder: Path, name: str, seed: int = 0, **settings: Any) -> Task:
    return make_task(TaskConfig(name=TaskName[name], data_dir=str(folder), **settings), seed)


def only(made: Task) -> Problem:
    (problem,) = made.eval_problems(10)
    return problem


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("name", "row", "truth"),
    [
        ("aime24", AIME, "204"),
        ("aime25", {"problem": "q", "answer": "588", "id": "0"}, "588"),
        ("math500", {"problem": "q", "answer": r"\frac{1}{2}", "solution": "…"}, r"\frac{1}{2}"),
        ("math", {"problem": "q", "solution": r"so \boxed{\frac{3}{4}}."}, r"\frac{3}{4}"),
        ("gsm8k", {"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 1,700"}, "1700"),
        ("gsm8k", {"problem": "q", "solution": "#### 18", "answer": "18"}, "18"),
    ],
)
def test_mathematics(tmp_path: Path, suffix: str, name: str, row: Any, truth: str) -> None:
    put(tmp_path, name + suffix, row)
    problem = only(task(tmp_path, name))
    assert (problem.id, problem.ground_truth) == (f"{name}-0", truth)
    text = problem.messages[0]["content"]
    assert str(row.get("problem") or row.get("Problem") or row.get("question")) in text
    assert r"\boxed{answer}" in text and truth not in text.replace(r"\boxed{answer}", "")


def test_a_box_without_braces_is_an_answer(tmp_path: Path) -> None:
    solutions = [r"so our answer is $\boxed 2$.", r"it is \fbox{3}", r"$\boxed{4}$ and $\boxed{5}$"]
    put(tmp_path, "math.jsonl", *({"problem": "q", "solution": text} for text in solutions))
    problems = task(tmp_path, "math").eval_problems(3)
    assert [problem.ground_truth for problem in problems] == ["2", "3", "4, 5"]


def test_options_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    put(tmp_path, "gpqa_diamond.jsonl", GPQA)
    letters = Counter()
    for seed in range(200):
        problem = only(task(tmp_path, "gpqa_diamond", seed))
        assert problem == only(task(tmp_path, "gpqa_diamond", seed))
        assert f"{problem.ground_truth}. Helium\n" in problem.messages[0]["content"]
        letters[problem.ground_truth] += 1
    assert set(letters) == set("ABCD") and min(letters.values()) > 25


@pytest.mark.parametrize(
    ("name", "row", "asks"),
    [
        ("aime24", AIME, r"state it as \boxed{answer}"),
        ("gpqa_diamond", GPQA, r"as \boxed{letter}"),
        ("livecodebench_v6", LCB, "submit the whole program in one ```python block"),
    ],
)
def test_prompts_speak_of_a_tool_only_where_code_can_be_run(
    tmp_path: Path, name: str, row: Any, asks: str
) -> None:
    put(tmp_path, f"{name}.jsonl", row)
    with_code, without = (
        only(task(tmp_path, name, tools=tools)).messages[0]["content"]
        for tools in (["code_interpreter"], [])
    )
    assert "tool" in with_code and "tool" not in without
    assert asks in with_code and asks in without
    assert "  " not in without and "{" not in without.replace("{answer}", "").replace(
        "{letter}", ""
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_livecodebench(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, "livecodebench_v6" + suffix, LCB)
    problem = only(task(tmp_path, "livecodebench_v6"))
    tests = read_livecodebench(problem.ground_truth)
    assert tests == [Case(input="1 2\n", expected="3\n"), Case(input="5 6\n", expected="11\n")]
    text = problem.messages[0]["content"]
    assert "Add two numbers." in text and "Input:\n1 2\nOutput:\n3" in text and "5 6" not in text
    assert "standard input" in text


def test_livecodebench_functions_and_windows(tmp_path: Path) -> None:
    case = {"input": '[1, 2]\n"a"', "output": "[2, 4]", "testtype": "functional"}
    row = LCB | {
        "starter_code": "class Solution:\n    def double(self, x, y):",
        "public_test_cases": json.dumps([case]),
        "private_test_cases": json.dumps([]),
        "metadata": json.dumps({"func_name": "double"}),
    }
    put(tmp_path, "livecodebench_v6.jsonl", LCB | {"contest_date": "2025-01-31"}, row)
    window = {"contest_from": "2025-02-01", "contest_until": "2025-03-01"}
    problem = only(task(tmp_path, "livecodebench_v6", **window))
    assert "def double" in problem.messages[0]["content"]
    assert "standard input" not in problem.messages[0]["content"]
    assert read_livecodebench(problem.ground_truth) == [
        Case(call="double", arguments=([1, 2], "a"), expected=[2, 4])
    ]
    with pytest.raises(ValueError, match=r"no row within task\.contest_from"):
        task(tmp_path, "livecodebench_v6", contest_from="2026-01-01").eval_problems(1)


def test_private_tests_unpickle_nothing_but_text() -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    for text in (evil, "no base64!", base64.b64encode(b"no zlib").decode(), "[1]", packed({})):
        with pytest.raises(ValueError):
            decode_private(text)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rl_mix_asks_each_source_in_its_own_way(tmp_path: Path, suffix: str) -> None:
    dapo = RL | {"data_source": "math_dapo", "prompt": [{"role": "user", "content": "own words"}]}
    code = RL | {
        "data_source": "code_contests",
        "prompt": [{"role": "user", "content": "Add."}],
        "reward_model": {"ground_truth": json.dumps(CODE), "style": "rule"},
    }
    put(tmp_path, "open_agentrl" + suffix, RL, dapo, code)
    put(tmp_path, "aime24.jsonl", AIME)
    put(tmp_path, "aime25.jsonl", {"problem": "another", "answer": "1"})
    made = task(tmp_path, "open_agentrl", eval_sets=[TaskName.aime24, TaskName.aime25])
    asked = {p.id: p for p in map(made.train_problem, range(3))}
    texts = [asked[f"train-{i}"].messages[0]["content"] for i in range(3)]
    assert texts[0].count("What is 3 + 4?") == 1 and r"\boxed{answer}" in texts[0]
    assert texts[1].startswith("own words") and "step by step" not in texts[1]
    assert all("without units" in text for text in texts[:2])
    assert "```python block" in texts[2] and "standard input" in texts[2]
    assert [p.id for p in made.eval_problems(10)] == ["aime24-0", "aime25-0"]
    assert asked["train-0"].extra["index"] == 0


@pytest.mark.parametrize("source", ["taco", "apps", "code_contests", "encode-math", "dapo", ""])
def test_the_ground_truth_says_what_kind_of_row_it_is(tmp_path: Path, source: str) -> None:
    row = RL | {"data_source": source}
    tests = row | {"reward_model": {"ground_truth": json.dumps(CODE)}}
    unpacked = row | {"reward_model": {"ground_truth": CODE}}
    answer = row | {"reward_model": {"ground_truth": r"\{1, 2\}"}}
    braces = row | {"reward_model": {"ground_truth": "{1,2}"}}
    rows = (tests, unpacked, answer, braces)
    kinds = [read_plain(each, "p").extra[KIND] for each in rows]
    assert kinds == ["code", "code", "math", "math"]


def test_a_prompt_that_asks_for_an_answer_line_is_not_told_of_a_box() -> None:
    prompt = [{"role": "user", "content": "How many? The last line should be Answer: the number."}]
    for source in ("math_dapo", "other"):
        asked = read(RL | {"data_source": source, "prompt": prompt}, "p", 0, code=True)
        text = asked.messages[-1]["content"]
        assert asked.extra[ANSWER_LINE] is True
        assert "box" not in text and text.count("without units") == 1
    assert ANSWER_LINE not in read(RL, "p", 0, code=True).extra


@pytest.mark.parametrize(
    ("truth", "tests"),
    [
        (CODE, [Case(input="1 2", expected="3")]),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, [Case(input="1\n2", expected="3")]),
        ({"inputs": [[[1], 2]], "outputs": [[3]], "fn_name": "f"},
         [Case(call="f", arguments=([1], 2), expected=[3], wrapped=True)]),
        ({"inputs": ["[1]\n2"], "outputs": ["3"], "fn_name": "f"},
         [Case(call="f", arguments=([1], 2), expected=3)]),
        ({"test_code": "def check(f):\n    assert f(1, k=[2]) == (3, 4)\n", "entry_point": "g"},
         [Case(call="g", arguments=(1,), keywords={"k": [2]}, expected=[3, 4])]),
        ({"test_code": "def check(f):\n    assert abs(f(1)) < 2", "entry_point": "g",
          "import_prefix": "import math"},
         [Case(check="import math\ndef check(f):\n    assert abs(f(1)) < 2\ncheck(g)")]),
    ],
)  # fmt: skip
def test_tests_of_rl_data(truth: Any, tests: list[Case]) -> None:
    assert read_tests(truth) == tests
    assert read_tests(json.dumps(truth)) == tests


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [("3\n", "3", True), (" 1 2 \n3", "1 2\n3\n", True), ("1.0", "1", True), ("1 2", "1  2", True),
     ("3", "4", False), ("3\n3", "3", False), ("a", "A", False), ("", "0", False),
     ("a b", "a  b", False), ("12:05", "12:5", False), ("v1.50", "v1.5", False),
     ("50000000000000001", "50000000000000000", False), ("1e999999999", "1e999999999.", False),
     ("nan", "1", False), ("inf", "inf", True), ("1 2", "1 2 3", False), ("3", "2.9999999", False)],
)  # fmt: skip
def test_outputs_are_compared_line_by_line(ours: str, theirs: str, same: bool) -> None:
    assert same_lines(ours, theirs) is same
    assert same_lines(ours, theirs, exact=True) is same


@pytest.mark.parametrize(
    ("ours", "theirs", "close"),
    [("0.333333", "0.3333333333", True), ("0.33333", "0.3333333333", False),
     ("1000000.5", "1000001.0", True), ("1000000.5", "1000002.0", False),
     ("0.500001", "0.5", True), ("0.5000011", "0.5", False), ("1e-7", "2e-7", True),
     ("Case #1: 0.50000001", "Case #1: 0.5", True), ("Case #2: 0.5", "Case #1: 0.5", False),
     ("(0.5, -1.0000001)", "(0.5, -1.0)", True), ("[0.5,1.1]", "[0.5,1.0]", False),
     ("1.2.3", "1.2.30", False), ("-0.0", "0.0", True), ("1e400", "2e400", False)],
)  # fmt: skip
def test_two_decimals_are_equal_within_a_millionth(ours: str, theirs: str, close: bool) -> None:
    assert same_lines(ours, theirs) is close
    if ours != "-0.0":
        assert not same_lines(ours, theirs, exact=True)
    assert same_lines(f"x\n{ours}\n", f"x\n{theirs}") is close


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [("4", 4, True), ("4.0", 4, True), ("4", 4.0, True), ("4.0000001", 4, False),
     ("4.0000001", 4.0, True), ('"4"', 4, False), ("4", "4", False), ("[1, [2.0]]", [1, [2]], True),
     ("[1, 2]", [2, 1], False), ('{"b": 1.0, "a": 2}', {"a": 2, "b": 1}, True),
     ('{"a": 1}', {"a": 1, "b": 2}, False), ("NaN", float("nan"), True), ("null", None, True),
     ("null", 0, False), ("true", True, True), ("[" * 9999, [], False), ("", "", False)],
)  # fmt: skip
def test_results_are_compared_as_values(ours: str, theirs: Any, same: bool) -> None:
    assert matches(Case(call="f", expected=theirs), ours, False) is same


@pytest.mark.parametrize(
    ("inputs", "outputs", "right", "wrong"),
    [([[3]], ["12"], '"12"', "12"), ([[3]], [["12"]], '"12"', "12"), ([[3]], [12], "12", '"12"'),
     (["3"], ["12"], "12", '"12"'), (["3"], ['"12"'], '"12"', "12"), (["3"], ["abc"], '"abc"', "1"),
     ([3], ["[1]"], '"[1]"', "[1]"), ([[3]], [[[1]]], "[1]", "1")],
)  # fmt: skip
def test_results_have_the_rows_own_types(
    inputs: list[Any], outputs: list[Any], right: str, wrong: str
) -> None:
    (test,) = read_tests({"fn_name": "f", "inputs": inputs, "outputs": outputs})
    assert test.arguments == (3,)
    assert matches(test, right, False) and not matches(test, wrong, False)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_cold_start_conversations(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, "open_agentrl-sft" + suffix, {"messages": TALK, "tools": []})
    made = task(tmp_path, "open_agentrl")
    messages = made.demonstration(0)
    assert messages is not None and [m["role"] for m in messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert messages[1]["content"] == "" and "tool_calls" not in messages[3]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"code": "print(7)"}
    assert made.demonstration(1) is None


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([], "messages is not a list"),
        (TALK[:2], "the last message is no assistant answer"),
        (TALK[1:], "message 1: a assistant message after nothing"),
        ([TALK[0], TALK[2]], "message 2: a tool message after user"),
        ([TALK[0], TALK[3], TALK[2]], "message 3: a tool response to a turn that called no tool"),
        ([{"role": "critic", "content": ""}], "message 1: role 'critic'; use one of"),
        ([TALK[0], TALK[1] | {"tool_calls": [CALL, CALL]}], "message 2: more than one call"),
        ([TALK[0], TALK[1] | {"tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}],
         "message 2: a call's arguments are not JSON"),
    ],
)  # fmt: skip
def test_bad_conversations_are_named(tmp_path: Path, messages: Any, fault: str) -> None:
    good = {"messages": TALK}
    path = put(tmp_path, "talks.jsonl", good, {"messages": messages})
    made = task(tmp_path, "open_agentrl", demonstrations_file=str(path))
    with pytest.raises(ValueError, match=rf"talks\.jsonl': row 2: {fault}"):
        made.demonstration(0)


@pytest.mark.parametrize(
    ("name", "bad", "fault"),
    [
        ("aime24", {"Problem": "q"}, "no answer or solution: give it as text"),
        ("aime24", {"Answer": "1"}, "no problem or Problem or question"),
        ("math", {"problem": "q", "solution": "no box"}, r"no answer, and no .boxed"),
        ("gsm8k", {"question": "q", "answer": None}, "no answer or solution"),
        ("gpqa_diamond", GPQA | {"Correct Answer": None}, "no Correct Answer"),
        ("livecodebench_v6", LCB | {"private_test_cases": ""}, "no private_test_cases"),
        ("livecodebench_v6", LCB | {"public_test_cases": "{"}, "not JSON"),
    ],
)
def test_rows_without_an_answer_are_named(tmp_path: Path, name: str, bad: Any, fault: str) -> None:
    row = {"aime24": AIME, "gpqa_diamond": GPQA, "livecodebench_v6": LCB}.get(
        name, {"problem": "p", "answer": "1"}
    )
    put(tmp_path, f"{name}.jsonl", row, bad)
    with pytest.raises(ValueError, match=rf"task\.data_dir='.*{name}\.jsonl: row 2: {fault}"):
        task(tmp_path, name).eval_problems(1)


@pytest.mark.parametrize(
    ("truth", "fault"),
    [
        ('{"inputs": ["1"', "not JSON"),
        ([1], "reward_model.ground_truth is not a string"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ({"inputs": [], "outputs": []}, "the tests have no lists"),
        (None, "reward_model.ground_truth is not a string"),
        ({"test_code": "assert"}, "test_code and entry_point are not both text"),
    ],
)
def test_code_rows_without_tests_are_named(tmp_path: Path, truth: Any, fault: str) -> None:
    row = RL | {"data_source": "code", "reward_model": {"ground_truth": truth}}
    put(tmp_path, "open_agentrl.jsonl", RL, row)
    put(tmp_path, "aime24.jsonl", AIME)
    made = task(tmp_path, "open_agentrl", eval_sets=[TaskName.aime24])
    with pytest.raises(ValueError, match=rf"open_agentrl\.jsonl: row 2: {fault}"):
        made.train_problem(0)


def test_a_missing_split_says_what_to_name(tmp_path: Path) -> None:
    put(tmp_path, "aime24.jsonl", AIME)
    with pytest.raises(ValueError, match=r"task\.train_file=None: aime24 has no training split"):
        task(tmp_path, "aime24").train_problem(0)
    with pytest.raises(ValueError, match=r"task\.eval_file=None: name a JSON-lines or parquet"):
        task(tmp_path, "open_agentrl").eval_problems(1)
    with pytest.raises(ValueError, match=r"task\.eval_sets=countdown: no data set; use some of"):
        task(tmp_path, "open_agentrl", eval_sets=[TaskName.countdown]).eval_problems(1)


def test_files_of_the_user_come_first(tmp_path: Path) -> None:
    put(tmp_path, "aime24.jsonl", AIME)
    own = put(tmp_path, "own.parquet", {"problem": "mine", "answer": "1"})
    made = task(tmp_path, "aime24", eval_file=str(own))
    assert only(made).ground_truth == "1"
    training = put(tmp_path, "train.jsonl", {"problem": "theirs", "answer": "2"})
    assert task(tmp_path, "aime24", train_file=str(training)).train_problem(5).ground_truth == "2"
    with pytest.raises(ValueError, match="train-0 asks the same as aime24-0"):
        same = put(tmp_path, "same.jsonl", AIME)
        task(tmp_path, "aime24", train_file=str(same)).train_problem(0)


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "aime24.parquet").write_bytes(b"PAR?")
    with pytest.raises(ValueError, match=r"aime24\.parquet: not a parquet file"):
        task(tmp_path, "aime24").eval_problems(1)


def test_without_the_hub_one_line_says_which_file_to_put_where() -> None:
    code = (
        "from elpo_ray.config import TaskConfig\n"
        "from elpo_ray.tasks import FAMILIES, make_task\n"
        "for name, family in FAMILIES.items():\n"
        "    if family.held_out:\n"
        "        try: make_task(TaskConfig(name=name, data_dir='.'), 0).eval_problems(1)\n"
        "        except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    sources = [family.held_out for family in FAMILIES.values() if family.held_out]
    lines = done.stdout.strip().split("\n")
    assert len(lines) == len(sources) == 7
    for line, source in zip(lines, sources, strict=True):
        assert line.startswith(f"task.data_dir='.': no {source.name}.jsonl or .parquet there")
        assert source.repo in line and "put a copy of it, with the same fields, at" in line
        assert ("login" in line) == source.gated
