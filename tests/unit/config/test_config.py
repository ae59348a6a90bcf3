"""Every configuration error is one line with key, value and remedy, and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import elpo_ray.main
from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.algebra import batch_algebra
from elpo_ray.config.compose import composed
from elpo_ray.models.folder import check_context

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
        (["experiment=quickstart"], ["+experiment=OPTION"]),
        (["algorithm=nope"], ["algorithm=nope", "elpo", "grpo"]),
        (["trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["+trainer.stepz=3"], ["trainer.stepz", "trainer.steps"]),
        (["nonsense=3"], ["nonsense", "trainer"]),
        (["trainer.steps=abc"], ["trainer.steps=abc", "whole number"]),
        (["trainer.steps=0"], ["trainer.steps=0", "1 or more"]),
        (["trainer.steps"], ["trainer.steps", "key=value"]),
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
    code, out, err = run_in_process(monkeypatch, capsys, *overrides)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err + out
    for word in said:
        assert word in err
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


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
    done = run("+experiment=aime", "check_only=true")
    assert done.returncode == 0, done.stderr
    assert "128 inputs x 16 = 2048" in done.stdout
    assert "8 = 4 engines x 1 + 4 learner ranks x 1" in done.stdout
    assert "= 8 a step" in done.stdout


def test_help_names_the_groups() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("quickstart", "algorithm: aepo, arpo, cir", "trainer.resume"):
        assert word in done.stdout
