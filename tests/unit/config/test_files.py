"""A run's file: what it sets, where its paths lead, and what is said of a mistake in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_ray.config import Config
from elpo_ray.config.compose import composed, measured_tasks
from elpo_ray.config.dotted import load_object
from elpo_ray.config.files import RunFile, file_word
from elpo_ray.config.measure import EvaluateConfig
from elpo_ray.config.modules import check_modules, use_modules
from elpo_ray.config.task import TaskConfig

ROOT = Path(__file__).resolve().parents[3]
TASK = "task: {train_file: train.jsonl, eval_file: data/eval.jsonl}\n"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder beside the working directory, with the files that a run's file names."""
    folder, elsewhere = tmp_path / "shop", tmp_path / "elsewhere"
    (folder / "data").mkdir(parents=True)
    elsewhere.mkdir()
    for name, number in (("train.jsonl", 1), ("data/eval.jsonl", 2)):
        row = {"problem": f"What is {number}?", "answer": str(number)}
        (folder / name).write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(elsewhere)
    return folder


def write(folder: Path, text: str, name: str = "shop.yaml") -> str:
    (folder / name).write_text(text)
    return f"../shop/{name}"


def test_a_file_overrides_defaults_and_the_command_line_overrides_the_file(shop: Path) -> None:
    file = write(shop, TASK + "algorithm: grpo\ntrainer: {steps: 3, seed: 4}\n")
    config = composed([file, "model=qwen3_4b", "trainer.steps=7"])
    assert (config.experiment, config.algorithm.name) == ("shop", "grpo")
    assert (config.trainer.steps, config.trainer.seed) == (7, 4)
    assert composed([file, "algorithm=elpo", "model=qwen3_4b"]).algorithm.name == "elpo"


def test_paths_in_a_file_are_relative_to_it_and_those_of_the_line_to_the_working_directory(
    shop: Path,
) -> None:
    text = TASK + "trainer: {run_dir: out}\nmodel: {path: ./weights}\n"
    config = composed([write(shop, text)])
    assert config.task.train_file == str(shop / "train.jsonl")
    assert config.task.eval_file == str(shop / "data/eval.jsonl")
    assert config.trainer.run_dir == str(shop / "out")
    assert config.model.path == str(shop / "weights")
    assert config.task.modules == [str(shop)]
    assert composed([write(shop, text), "task.train_file=x.jsonl"]).task.train_file == "x.jsonl"
    assert composed([write(shop, TASK + "model: {path: owner/name}")]).model.path == "owner/name"


def test_a_name_chooses_an_option_and_dotted_keys_go_over_it(shop: Path) -> None:
    text = TASK + "algorithm: grpo\nalgorithm.growth.n_total: 8\nmodel: qwen3_4b\n"
    config = composed([write(shop, text)])
    assert (config.algorithm.credit.rule, config.algorithm.growth.n_total) == ("group", 8)
    assert config.model.path == "Qwen/Qwen3-4B-Instruct-2507"
    named = composed([write(shop, "task: {name: countdown, max_turns: 9}\n")])
    assert (named.task.countdown.operators, named.task.max_turns) == ("+-", 9)
    assert composed([write(shop, "algorithm: {name: grpo}\n" + TASK), "model=qwen3_4b"]).loss


def test_a_named_model_has_the_context_of_one(shop: Path) -> None:
    in_file = composed([write(shop, TASK + "model: {path: owner/name}\n")])
    on_line = composed([write(shop, TASK), "model.path=owner/name"])
    for config in (in_file, on_line):
        assert (config.model.max_context, config.model.precision.value) == (20480, "bf16")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: {stepz: 3}", "trainer.stepz=3: unknown key; did you mean trainer.steps?"),
        ("trainer.stepz: 3", "trainer.stepz=3: unknown key; did you mean trainer.steps?"),
        ("nonsense: 3", "nonsense=3: unknown key"),
        ("trainer: {steps: soon}", "trainer.steps=soon: "),
        ("trainer: 3", "trainer=3: give its keys one by one, as in trainer.steps: …"),
        ("trainer:", "trainer=None: "),
        ("task: {tools: 'shop:search'}", "task.tools=shop:search: give a list, as in [a, b]"),
        ("task: {tools: {search: a}}", "task.tools={'search': 'a'}: give a list"),
        (
            """task: {tools: [{mcp: "python 'a"}]}""",
            """task.tools: {'mcp': "python 'a"}: no closing quotation; close every quote""",
        ),
        ("task: {tools: null}", "task.tools=None: give a list, as in [a, b]; [] is an empty one"),
        ("task.env: {TOKEN: 1}", "task.env={'TOKEN': 1}: give a list"),
        ("task.tool_actors: [a]", "task.tool_actors=['a']: give names with values, as in {name: "),
        ("task.reward.options: [1]", "task.reward.options=[1]: give names with values"),
        ("algorithm: grop", "algorithm=grop: no such option; choose one of aepo"),
        ("model: {precision: fp8}", "model.precision=fp8: "),
        ("defaults: [task]", "defaults: a run's file has no such list"),
        ("- 3", "not keys with values"),
        ("a: [1\nb: 2", "line 2: not YAML"),
        ("trainer: {seed: 1}\ntrainer: {seed: 2}", "line 2: not YAML (found duplicate key trainer"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_file_and_key(
    shop: Path, text: str, said: str
) -> None:
    file = write(shop, text)
    with pytest.raises(ValueError) as error:
        composed([file])
    line = str(error.value)
    assert line.startswith(f"{shop}/shop.yaml: {said}") and "\n" not in line


def test_a_missing_file_and_two_files_are_refused(shop: Path) -> None:
    with pytest.raises(ValueError, match=r"nope\.yaml: no such file under"):
        composed(["nope.yaml"])
    with pytest.raises(ValueError, match=r"a\.yaml b\.yaml: a run has one file"):
        composed(["a.yaml", "b.yaml"])


def test_words_with_values_are_no_files() -> None:
    assert file_word(["+x=a.yaml", "-cn", "b.yaml", "task=c.yml", "d.yml"]) == "d.yml"
    assert file_word(["trainer.steps=3"]) is None


def test_a_model_or_cluster_chosen_over_a_file_replaces_its_own(shop: Path) -> None:
    text = TASK + "model: {path: owner/name, max_context: 99, tool_parser: hermes}\n"
    text += "cluster: {gpus: true, learner_ranks: 3, call_timeout_s: 5}\n"
    file = write(shop, text + "task.demonstrations_file: d.jsonl\n")
    config = composed([file, "model=tiny", "cluster=local"])
    assert (config.model.path, config.model.max_context) == (None, 384)
    assert config.model.tool_parser == "hermes", "what the option does not set stays"
    assert (config.cluster.gpus, config.cluster.learner_ranks) == (False, 1)
    assert config.cluster.call_timeout_s == 5
    over = composed(["model=qwen3_4b", file, "model.max_context=77"]).model
    assert (over.path, over.max_context) == ("Qwen/Qwen3-4B-Instruct-2507", 77)
    python = RunFile.read(Path(file)).over({"model": "tiny"})
    assert composed([], python).model.path is None
    values = RunFile.read(Path(file)).measured(EvaluateConfig, file, ["cluster=local"])
    assert "gpus" not in values["cluster"] and values["cluster"]["call_timeout_s"] == 5
    again = composed(
        [write(shop, TASK + "model: qwen3_4b\nmodel.max_context: 88"), "model=qwen3_4b"]
    )
    assert again.model.max_context == 88, "the same option keeps what the file sets over it"


def test_commands_that_measure_take_the_task_of_a_file(shop: Path) -> None:
    file = write(shop, TASK + "cluster: gpu2\nmodel: {path: owner/name, max_context: 99}\n")
    values = RunFile.read(Path(file)).measured(EvaluateConfig, file)
    assert {"override /cluster": "gpu2"} in values["defaults"]
    assert (values["tasks"], values["model"], values["max_context"]) == ([file], "owner/name", 99)
    config = EvaluateConfig(model="m", tasks=[file, "aime24"], task={"max_turns": 3})
    tasks = measured_tasks(config)
    assert list(tasks) == ["shop", "aime24"]
    assert tasks["shop"].eval_file == str(shop / "data/eval.jsonl")
    assert tasks["shop"].max_turns == 3
    with pytest.raises(ValueError, match="only one task shop"):
        measured_tasks(EvaluateConfig(model="m", tasks=[file, str(shop / "shop.yaml")]))


def test_the_commands_run_from_any_folder(shop: Path) -> None:
    """The same file from elsewhere, by the console script's module."""
    file = write(shop, TASK + "model: qwen3_4b\n")
    own = str(ROOT / "examples" / "shop" / "agent.yaml")
    for words in (
        ["train", own, "check_only=true", "trainer.steps=5"],
        ["sft", own, "check_only=true", "trainer.steps=5"],
        ["launch", "slurm", file, "site=cpu", "--", "trainer.steps=5"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "elpo_ray.cli", *words],
            capture_output=True, text=True, timeout=120,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert f"overrides=({shop}/shop.yaml trainer.steps=5)" in done.stdout
    assert f"start=({sys.executable} -m launch.start" in done.stdout


def test_values_over_a_file_keep_what_they_do_not_name(shop: Path) -> None:
    file = RunFile.read(Path(write(shop, TASK + "algorithm: grpo\ntrainer: {steps: 3, seed: 1}\n")))
    over = file.over({"trainer": {"steps": 9}, "model": "qwen3_4b", "task": {"data_dir": "d"}})
    config = composed([], over)
    assert (config.trainer.steps, config.trainer.seed, config.algorithm.name) == (9, 1, "grpo")
    assert config.task.data_dir == str(Path.cwd() / "d")
    assert config.task.train_file == str(shop / "train.jsonl")


# --- modules beside the file ----------------------------------------------------------------------


def test_modules_beside_the_file_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "only_beside_the_file.py").write_text("value = 3\n")
    use_modules([str(tmp_path)])
    import only_beside_the_file

    assert only_beside_the_file.value == 3
    use_modules([str(tmp_path)])
    assert sys.path.count(str(tmp_path)) == 1


def test_a_node_without_the_folder_uses_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "elpo_ray_modules" / "0"
    copy.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    use_modules([str(tmp_path / "not-here")])
    assert sys.path[0] == str(copy)


@pytest.mark.parametrize("name", ["random.py", "sandbox.py", "ray/__init__.py", "yaml.py"])
def test_a_module_that_would_hide_one_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"task\.modules=.*would hide the module .*; rename it"):
        check_modules([str(tmp_path)])
    with pytest.raises(ValueError, match="no such folder"):
        check_modules([str(tmp_path / "nope")])


def test_a_folder_with_data_and_tests_is_fine(tmp_path: Path) -> None:
    for name in ("shop.py", "test_shop.py", "train.jsonl", "tools.py", "pytest.py"):
        (tmp_path / name).touch()
    check_modules([str(tmp_path), str(ROOT)])


def test_modules_are_part_of_a_task() -> None:
    assert TaskConfig().modules == [] and Config().task.modules == []


def test_runs_in_one_process_may_have_modules_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name_in_both.py").write_text(f"value = {name!r}\n")
    for name in ("one", "other", "one"):
        use_modules([str(tmp_path / name)])
        assert load_object("task.reward", "same_name_in_both:value") == name
    use_modules([])
    assert not any(entry.startswith(str(tmp_path)) for entry in sys.path)
