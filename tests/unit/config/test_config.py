"""Every configuration error is one line with key, value and remedy, and exit code 2."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import elpo_ray.main
import elpo_ray.sft
from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.algebra import batch_algebra
from elpo_ray.config.compose import composed
from elpo_ray.config.model import TinyModelConfig
from elpo_ray.models.folder import check_context
from elpo_ray.models.tiny import build_tiny
from elpo_ray.tools.code_interpreter import SCHEMA
from elpo_ray.types import Message

ROOT = Path(__file__).resolve().parents[3]
EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
ALGORITHMS = sorted(path.stem for path in (CONF_DIR / "algorithm").glob("*.yaml"))


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elpo_ray.main", *overrides],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def run_in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *overrides: str
) -> tuple[int, str, str]:
    """`main` without the cost of an interpreter; returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["main", *overrides])
    try:
        elpo_ray.main.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "override",
    [
        "model.template_options={enable_thinking: false}",
        "model.template_options.enable_thinking=false",
    ],
)
def test_a_dictionary_takes_any_key_and_a_section_only_its_own(override: str) -> None:
    assert composed([override]).model.template_options == {"enable_thinking": False}
    with pytest.raises(ValueError, match=r"unknown key; did you mean model\.template_options"):
        composed(["model.template_option={enable_thinking: false}"])


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_experiment_composes_with_every_algorithm(experiment: str, algorithm: str) -> None:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", [f"+experiment={experiment}", f"algorithm={algorithm}"])
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    assert (config.experiment, config.algorithm.name) == (experiment, algorithm)
    assert batch_algebra(config)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+experiment=nope"], ["experiment=nope", "aime", "quickstart"]),
        (["experiment=quickstart"], ["+experiment=quickstart"]),
        (["algorithm=nope"], ["algorithm=nope", "elpo", "grpo"]),
        (["trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["+trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["nonsense=3"], ["nonsense", "trainer"]),
        (["trainer.steps=abc"], ["trainer.steps=abc", "whole number"]),
        (["trainer.steps=0"], ["trainer.steps=0", "1 or more"]),
        (["trainer.steps"], ["trainer.steps", "key=value"]),
        (["trainer.run_name=a=b"], ["trainer.run_name=a=b", "'trainer.run_name=\"a=b\"'"]),
        (["trainer.run_name=run#2"], ["quoted", "'trainer.run_name=\"run#2\"'"]),
        (["trainer.run_name=größe"], ["quoted", "'trainer.run_name=\"größe\"'"]),
        (["+trainer.run_name=x;y"], ["quoted", "'+trainer.run_name=\"x;y\"'"]),
        (['trainer.run_name=say "x"'], ["quoted", r'"say \"x\""']),
        (["trainer.run_name=it's"], ["quoted", shlex.quote('trainer.run_name="it\'s"')]),
        (["trainer.run_name=a,b"], ["'trainer.run_name=[a,b]'", "'trainer.run_name=\"a,b\"'"]),
        (["trainer.run_name=a\nb"], ["trainer.run_name=a b", "line break"]),
        (["trainer.größe=3"], ["trainer.größe=3: unknown key"]),
        (["task.eval_sets=[aime24"], ["task.eval_sets=[aime24", "close every bracket"]),
        (["trainer.run_dir=/proc/none"], ["trainer.run_dir='/proc/none'", "written to /proc"]),
        (["cold_start.cache=/proc/none", "+experiment=quickstart"], ["cold_start.cache", "/proc"]),
        (
            ["cluster.address=127.0.0.1:1", "cluster.gpus=false", "model=tiny"],
            ["cluster.address='127.0.0.1:1'", "nothing answers"],
        ),
        (["model.precision=fp8"], ["model.precision=fp8", "fp32", "bf16"]),
        (["algorithm.growth.n_total=1"], ["algorithm.growth.n_total=1", "2 or more"]),
        (
            ["+experiment=quickstart", "cold_start.optimizer.lr=-1", "check_only=true"],
            ["elpo_ray: cold_start.optimizer.lr=-1.0: use a value above 0"],
        ),
        (["algorithm.growth.bel.x_min=4"], ["x_max=3", "x_min=4"]),
        (["learner.minibatch_inputs=3"], ["learner.minibatch_inputs=3", "inputs_per_step"]),
        (["task=jsonl", "model=qwen2_5_7b"], ["task.train_file", "JSON-lines"]),
        (
            ["task=jsonl", "model=qwen2_5_7b", "task.train_file=missing.jsonl", "check_only=true"],
            ["task.train_file", "missing.jsonl", "no such file"],
        ),
        (["model.path=./missing"], ["model.path", "./missing", "no such folder"]),
        (["trainer.resume=missing"], ["trainer.resume='missing'", "not a run folder"]),
    ],
)
def test_a_configuration_error_is_one_helpful_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    overrides: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ((), ("check_only=true",)):
        code, out, err = run_in_process(monkeypatch, capsys, *dict.fromkeys([*overrides, *more]))
        assert code == 2, err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err + out
        for word in said:
            assert word in err
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    talk: list[Message] = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "It is 7."},
    ]
    shape = TinyModelConfig(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return build_tiny(folder, shape, [talk] * 50, [SCHEMA], max_context=2048, seed=0)


ROW = {
    "data_source": "dapo",
    "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "reward_model": {"ground_truth": "7"},
}
OTHER = ROW | {"prompt": [{"role": "user", "content": "What is 3 + 5?"}]}
LONG = ROW | {"prompt": [{"role": "user", "content": "What is 3 + 5? " * 500}]}


train = elpo_ray.main.run
NO_DEMONSTRATION = "it has no demonstration within"


@pytest.mark.parametrize(
    ("run", "rows", "changes", "said"),
    [
        (
            train,
            [OTHER, {**OTHER, "prompt": "What?"}],
            {},
            r"train\.jsonl'.*row 2: prompt is not a list",
        ),
        (train, [OTHER, {**OTHER, "reward_model": {}}], {}, r"train\.jsonl'.*row 2: reward_model"),
        (train, [OTHER, ROW], {}, "asks the same as"),
        (train, [OTHER], {"cold_start.enabled": True}, NO_DEMONSTRATION),
        (elpo_ray.sft.run, [OTHER], {}, NO_DEMONSTRATION),
        (train, [LONG], {}, "train-0 alone has .* tokens of prompt"),
        (train, [], {}, "no problems in it"),
    ],
)
def test_what_stops_a_run_before_its_first_actor_stops_check_only_too(
    run: Callable[[Config], int],
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No Ray is started: `train` and `rehearse` come to the same line."""
    monkeypatch.chdir(tmp_path)
    for name, own in (("train", rows), ("eval", [ROW])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    values = {
        "check_only": True, "cluster.gpus": False, "task.name": "jsonl",
        "task.train_file": "train.jsonl", "task.eval_file": "eval.jsonl",
        "model.path": str(tiny_model), "model.max_context": 2048,
        "task.max_turn_tokens": 512, "cold_start.enabled": False, **changes,
    }  # fmt: skip
    node = OmegaConf.structured(Config)
    for key, value in values.items():
        OmegaConf.update(node, key, value)
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match=said):
        run(config)


def test_a_model_folder_without_tokenizer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run_in_process(monkeypatch, capsys, f"model.path={tmp_path}")
    assert code == 2
    assert "no tokenizer" in err and str(tmp_path) in err


def test_a_context_beyond_the_models_positions_is_named(tmp_path: Path) -> None:
    def positions(**values: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    check_context(positions(), "model.max_context", 10**6)
    check_context(positions(max_position_embeddings=4096), "model.max_context", 4096)
    with pytest.raises(ValueError, match=r"model\.max_context=4097: .*_embeddings=4096; lower it"):
        check_context(tmp_path, "model.max_context", 4097)
    inner = {"text_config": {"max_position_embeddings": 64}}
    with pytest.raises(ValueError, match="max_position_embeddings=64"):
        check_context(positions(**inner), "max_context", 65)
    stretched = {"rope_type": "yarn", "factor": 4.0}  # what that allows is the engine's to say
    check_context(positions(max_position_embeddings=64, rope_scaling=stretched), "max_context", 65)


def test_the_exit_code_survives_a_real_process() -> None:
    done = run("trainer.stepz=3")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "trainer.stepz" in done.stderr


def test_aime_is_checked_on_a_machine_without_gpus() -> None:
    """Its sizes are printed; then it is refused, as the run itself would be."""
    done = run("+experiment=aime", "check_only=true")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cluster.gpus=True: 8 GPUs asked for" in done.stderr
    assert "128 inputs x 16 = 2048" in done.stdout
    assert "8 = 4 engines x 1 + 4 learner ranks x 1" in done.stdout
    assert "= 8 a step" in done.stdout


def test_the_quickstart_on_a_gpu_lacks_nothing_but_the_gpu() -> None:
    done = run("+experiment=quickstart", "cluster=gpu1", "check_only=true")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "cluster.gpus=True: 1 GPUs asked for" in done.stderr
    assert "of an engine (with 10% of the memory) and a learner rank in turns" in done.stdout


def test_help_names_the_groups() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("quickstart", "algorithm: aepo, arpo, branpo, cir", "trainer.resume"):
        assert word in done.stdout
