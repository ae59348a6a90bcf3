"""Training from Python: what a call configures, and what of the caller reaches other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import elpo_ray as elpo
from elpo_ray.config.dotted import load_object
from elpo_ray.training.api import Run, configured

ROOT = Path(__file__).resolve().parents[3]


def search(query: str) -> str:
    """Look a word up.

    Args:
        query: the word
    """
    return query


class Cart:
    """A cart."""

    def add(self, item: str) -> str:
        """Add something.

        Args:
            item: what
        """
        return item


def reward(problem: elpo.Problem, steps: list[elpo.Step]) -> float:
    return 1.0


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    text = "task: {train_file: t.jsonl, eval_file: t.jsonl, tools: []}\nmodel: qwen3_4b\n"
    (tmp_path / "shop.yaml").write_text(text)
    return "shop.yaml"


def test_objects_stand_where_a_file_has_paths(file: str) -> None:
    tools = [search, Cart, elpo.code_interpreter, {"search": "corpus.jsonl"}]
    config = configured(file, tools, reward, {"trainer": {"steps": 3}, "algorithm": "grpo"})
    assert (config.trainer.steps, config.algorithm.name) == (3, "grpo")
    first, second, *others = config.task.tools
    assert load_object("task.tools[0]", first) is search
    assert load_object("task.tools[1]", second) is Cart
    assert others == ["code_interpreter", {"search": str(Path.cwd() / "corpus.jsonl")}]
    assert load_object("task.reward.name", config.task.reward.name) is reward
    assert config.task.modules == [str(Path.cwd()), str(Path(__file__).parent)]


def test_settings_alone_are_enough(file: str) -> None:
    settings = {"task": {"train_file": Path("a.jsonl"), "eval_file": "b.jsonl"}}
    config = configured(None, None, None, settings | {"model.path": "owner/name"})
    assert config.task.train_file == str(Path.cwd() / "a.jsonl")
    assert (config.experiment, config.model.max_context) == ("python", 20480)
    with pytest.raises(ValueError, match=r"trainer\.stepz=3: unknown key; did you mean"):
        configured(file, None, None, {"trainer": {"stepz": 3}})


def test_a_changed_function_of_the_same_name_is_another_object(file: str) -> None:
    def again(text: str) -> str:
        return text

    first = configured(file, [again], None, {}).task.tools[0]

    def again(text: str) -> str:
        return text * 2

    second = configured(file, [again], None, {}).task.tools[0]
    assert load_object("tools", first)("a") == "a" and load_object("tools", second)("a") == "aa"


def test_objects_of_main_and_of_modules_beside_a_script_reach_another_process(
    tmp_path: Path,
) -> None:
    """As an actor gets them: packed in the driver, loaded in a process that starts elsewhere."""
    (tmp_path / "beside.py").write_text("def twice(text):\n    return text * 2\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        "from beside import twice\n"
        "from elpo_ray.cluster.user_code import packed\n"
        "from elpo_ray.training.api import configured\n"
        "def shout(text: str) -> str:\n"
        "    return twice(text).upper()\n"
        "config = configured(None, [shout, twice], None, {'model.path': 'owner/name'})\n"
        "pickle.dump((config, packed(config)), open(sys.argv[1], 'wb'))\n"
    )
    path = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, tmp_path / "sent"], check=True, env=os.environ | path)
    load = (
        "import pickle, sys\n"
        "from elpo_ray.cluster.user_code import install\n"
        "from elpo_ray.config.dotted import load_object\n"
        "config, objects = pickle.load(open(sys.argv[1], 'rb'))\n"
        "install(config.task.modules, objects)\n"
        "print([load_object('tools', each)('a') for each in config.task.tools])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, tmp_path / "sent"],
        cwd=tmp_path.parent, env=os.environ | path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "['AA', 'aa']\n", done.stderr


def test_a_run_reads_its_folder(tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    rows = [{"step": 0, "eval/pass_at_1": 0.4}, {"step": 1, "reward": 0.5}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 2}))
    tree = (ROOT / "tests" / "fixtures" / "figure4.jsonl").read_text().splitlines()[0]
    (tmp_path / "trees" / "step_00002.jsonl").write_text(tree + "\n")
    run = Run(tmp_path)
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert [(point.step, point.pass_at_1) for point in run.held_out] == [(0, 0.4)]
    assert list(run.trees) == [2] and run.trees[2][0].nodes
    assert run.summary == {"steps": 2}
    assert Run(tmp_path / "trees").summary == {}


def test_the_import_is_light() -> None:
    code = (
        "import time; began = time.perf_counter(); import elpo_ray as elpo\n"
        "elpo.Score, elpo.InfrastructureError, elpo.code_interpreter\n"
        "print(time.perf_counter() - began)"
    )
    taken = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        taken.append(float(done.stdout))
        time.sleep(0.1)
    assert min(taken) < 0.3
    with pytest.raises(AttributeError):
        _ = elpo.nothing
    assert callable(elpo.train) and elpo.Run is Run
