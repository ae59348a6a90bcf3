"""A run's weights as a model folder: for another run, and for others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import move, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from elpo_ray.config import Config
from elpo_ray.config.learner import LearnerConfig, LoraConfig
from elpo_ray.config.model import ModelConfig, Precision, TinyArchitecture
from elpo_ray.config.run import ClusterConfig, TrainerConfig
from elpo_ray.config.task import TaskConfig
from elpo_ray.export import main
from elpo_ray.learner import lora
from elpo_ray.learner.checkpoint import META, signature
from elpo_ray.learner.saved import export_run, starting_folder
from elpo_ray.models.folder import check_model_path
from elpo_ray.models.tiny import write_model
from elpo_ray.runs.folder import RunFolder, RunState
from elpo_ray.tasks import make_task

IDS = torch.arange(2, 40)[None]
LORA = LoraConfig(rank=4, alpha=8)


def begin(folder: Path, base: Path, adapters: LoraConfig | None = None) -> RunFolder:
    """A run without a step so far."""
    config = Config(
        model=ModelConfig(path=str(base), precision=Precision.fp32),
        learner=LearnerConfig(lora=adapters or LoraConfig()),
        trainer=TrainerConfig(run_dir=str(folder), run_name="run", keep_checkpoints=5),
        cluster=ClusterConfig(gpus=False),
    )
    run = RunFolder.of(config)
    run.begin(config)
    run.keep_base(base)
    return run


def save(run: RunFolder, step: int, model: PreTrainedModel, base: Path, settings: Any) -> None:
    """What one rank of the learner leaves."""
    meta = {
        **signature(model),
        "precision": "fp32",
        "scale": lora.scale(settings),
        "lora": None if settings is None else asdict(settings),
        "reference": str(base),
    }
    with run.checkpoint(RunState(step=step), 5) as folder:
        learner = folder / "learner"
        learner.mkdir()
        (learner / META).write_text(json.dumps(meta))
        tensors = {f"weight/{name}": p.detach().clone() for name, p in model.named_parameters()}
        save_file(tensors, learner / "state_00000_00000.safetensors")


@pytest.fixture(params=["qwen2", "phi3", "qwen3_moe"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunFolder, PreTrainedModel]:
    """A run after steps 1 and 2, and its model after the second."""
    base = tmp_path / "base"
    base.mkdir()
    model = tiny_model(TinyArchitecture(request.param), 64)
    write_model(model, base)
    (base / "chat_template.jinja").write_text("a template")
    (base / "README.md").write_text("the card of another model")
    run = begin(tmp_path, base)
    for step in (1, 2):
        move(model, 0.05, seed=step)
        save(run, step, model, base, None)
    return run, model


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def test_the_newest_weights_become_a_plain_folder(
    trained: tuple[RunFolder, PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = trained
    (tmp_path / "base" / "model.safetensors").unlink()  # it is not needed any more
    (tmp_path / "base" / "config.json").unlink()
    assert main([str(run.path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "out"), model(IDS).logits)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "README.md"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("float32", [type(model).__name__])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| optimizer steps | 2, 32 demonstrations each |" in card
    assert "another model" not in card
    earlier = export_run(run.path, None, step=1)
    assert earlier == run.path / "export"
    assert not torch.allclose(logits(earlier), logits(tmp_path / "out"), atol=1e-3)


def test_adapters_are_merged_or_by_themselves(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tmp_path / "base"
    base.mkdir()
    model = tiny_model(TinyArchitecture.qwen2, 64)
    write_model(model, base)
    run = begin(tmp_path, base, LORA)
    lora.attach(model, LORA)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save(run, 3, model, base, LORA)
    with torch.no_grad():
        want = model(IDS).logits
    torch.testing.assert_close(logits(export_run(run.path, tmp_path / "merged")), want)
    only = export_run(run.path, tmp_path / "only", adapter="only")
    assert not (only / "model.safetensors").exists() and not (only / "config.json").exists()
    assert len(load_file(only / "adapter_model.safetensors")) == 2 * 2 * 7
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        assert (plain(IDS).logits - want).abs().max() > 1e-2
        torch.testing.assert_close(PeftModel.from_pretrained(plain, only)(IDS).logits, want)
    by_itself = AutoModelForCausalLM.from_pretrained(only, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(by_itself(IDS).logits, want)
    assert "LoRA of rank 4, alpha 8, in this folder" in (only / "README.md").read_text()


def test_what_cannot_be_exported_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, full = tmp_path / "base", tmp_path / "full"
    for folder in (base, full):
        folder.mkdir()
    model = tiny_model(TinyArchitecture.qwen2, 64)
    write_model(model, base)
    (full / "a file").write_text("")
    run = begin(tmp_path, base)

    def said(*words: str) -> str:
        assert main(list(words)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no complete checkpoint yet" in said(str(run.path))
    for step in (4, 8):
        save(run, step, model, base, None)
    (run.checkpoints / "step_00008" / "state.json").rename(run.path / "state.json")
    for step in (5, 8):
        refusal = said(str(run.path), f"step={step}")
        assert f"step={step}: " in refusal and "choose one of 4 " in refusal
    assert "step=x: use a number" in said(str(run.path), "step=x")
    assert "adapter=all: use merged or only" in said(str(run.path), "adapter=all")
    assert "steps=4: no such setting" in said(str(run.path), "steps=4")
    assert "exists and is not empty" in said(str(run.path), str(full))
    assert "no adapters, all weights were trained" in said(str(run.path), "adapter=only")
    assert not (run.path / "export").exists()
    assert "not a run" in said(str(base))
    assert "no folder" in said(str(tmp_path / "nowhere"))
    assert "could not be written" in said(str(run.path), str(full / "a file" / "out"))
    broken = run.checkpoints / "step_00004" / "learner" / "state_00000_00000.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    assert "is damaged" in said(str(run.path))


def test_a_run_is_a_model_to_start_from(trained: tuple[RunFolder, PreTrainedModel]) -> None:
    run, model = trained
    check_model_path(str(run.path))
    config = Config(
        model=ModelConfig(path=str(run.path)),
        task=TaskConfig(),
        cluster=ClusterConfig(gpus=False),
    )
    task = make_task(config.task, 0)
    folder = starting_folder(config, task)
    assert folder == run.checkpoints / "step_00002" / "model"
    with torch.no_grad():
        torch.testing.assert_close(logits(folder), model(IDS).logits)
    first = replace(config, model=ModelConfig(path=str(run.checkpoints / "step_00001")))
    check_model_path(str(first.model.path))
    assert starting_folder(first, task) == run.checkpoints / "step_00001" / "model"


def test_neither_a_model_nor_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json in it, .* name a Hugging Face model"):
        check_model_path(str(tmp_path / "notes"))
    run = begin(tmp_path, tmp_path / "notes")
    with pytest.raises(ValueError, match=r"model\.path='.*': has no complete checkpoint yet"):
        check_model_path(str(run.path))
    with pytest.raises(ValueError, match="is no complete checkpoint"):
        check_model_path(str(run.checkpoints / "step_00003"))
