"""What is said before a start about the models that can be trained and those that cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model, write_tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from elpo_ray.config import Config
from elpo_ray.config.learner import LearnerConfig, Packing
from elpo_ray.config.model import ModelConfig, TinyArchitecture
from elpo_ray.config.rollout import EngineConfig, Transfer
from elpo_ray.config.run import ClusterConfig
from elpo_ray.doctor.finding import Status
from elpo_ray.doctor.policy import architecture
from elpo_ray.models.architectures import architecture_rows, check_trainable, judge
from elpo_ray.models.layout import named_weights, stored, stored_shapes
from elpo_ray.training.checks import check_model
from elpo_ray.weights.host import checkpoint_shapes

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 4096,
}


def of(config: PretrainedConfig, context: int = 4096) -> tuple[Packing | None, str | None]:
    verdict = judge(AutoModelForCausalLM._model_mapping[type(config)], config, context)
    return verdict.packing, verdict.reason


@pytest.mark.parametrize(
    ("config", "packing", "reason"),
    [
        (Qwen2Config(), Packing.tree, None),
        (Qwen3Config(), Packing.tree, None),
        (Qwen2Config(use_sliding_window=True, max_window_layers=1), Packing.tree, None),
        (MistralConfig(sliding_window=8), Packing.tree, None),
        (Qwen3NextConfig(), Packing.flat, "linear_attention layers"),
        (BloomConfig(), Packing.flat, "attention cannot be replaced"),
        (MambaConfig(), Packing.flat, "linear_attention layers"),
        (GptOssConfig(), Packing.flat, "attention cannot be replaced"),
        (Gemma2Config(), None, "final_logit_softcapping=30.0"),
        (Gemma2Config(final_logit_softcapping=None), None, "attn_logit_softcapping=50.0"),
        (GraniteConfig(logits_scaling=8.0), None, "logits_scaling=8.0"),
        (Qwen2Config(rope_parameters=DYNAMIC), None, "longest sequence"),
        (Qwen2Config(quantization_config={"quant_method": "fp8"}), None, "quantized (fp8)"),
    ],
)
def test_what_stands_against_training_or_trees(
    config: PretrainedConfig, packing: Packing | None, reason: str | None
) -> None:
    found = of(config)
    assert found[0] is packing
    assert (found[1] is None) == (reason is None)
    assert reason is None or reason in str(found[1])


def test_a_rotary_embedding_that_depends_on_the_length_is_taken_below_it() -> None:
    config = Phi3Config(rope_parameters=LONG, max_position_embeddings=16384, pad_token_id=0)
    assert of(config, 4096) == (Packing.tree, None)
    packing, reason = of(config, 4097)
    assert packing is None
    assert "lower model.max_context to 4096" in str(reason)


def test_a_model_that_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    Gemma2Config().save_pretrained(tmp_path)
    said = r"model\.path='.*': Gemma2ForCausalLM cannot be trained, since .*; choose another model$"
    with pytest.raises(ValueError, match=said):
        check_model(config_of(tmp_path), tmp_path)


def test_models_that_transformers_does_not_know(tmp_path: Path) -> None:
    for kind, said in (("nope-7", "no causal language model for it"), ("t5", "of type 't5'")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=said) as caught:
            check_trainable(tmp_path, 64)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", TinyArchitecture)
def test_the_files_have_what_the_learner_sends(
    architecture: TinyArchitecture, tmp_path: Path
) -> None:
    """In the layout of transformers' own folders, too."""
    model: Any = tiny_model(architecture, 64)
    model.save_pretrained(tmp_path)
    want = checkpoint_shapes(tmp_path)
    assert stored_shapes(model.config) == want
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sent = stored(loaded, named_weights(loaded))
    files = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == files.keys()
    assert all(torch.equal(sent[name], value) for name, value in files.items())
    assert (
        files.keys()
        == load_file(write_tiny(architecture, tmp_path, 64) / "model.safetensors").keys()
    )


def config_of(folder: Path, **changes: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(folder)),
        cluster=ClusterConfig(gpus=False),
        engine=EngineConfig(transfer=Transfer.host),
        learner=LearnerConfig(**changes),
    )


def test_a_run_says_before_its_start_what_it_will_not_do(tmp_path: Path) -> None:
    write_tiny(TinyArchitecture.gemma3, tmp_path / "gemma", 64)
    assert check_model(config_of(tmp_path / "gemma"), tmp_path / "gemma") is None
    bloom = BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(bloom).save_pretrained(tmp_path / "bloom")
    notice = check_model(config_of(tmp_path / "bloom"), tmp_path / "bloom")
    assert notice == (
        "learner.packing=tree: bloom is trained on flat sequences, since its attention cannot be "
        "replaced"
    )
    flat = config_of(tmp_path / "bloom", packing=Packing.flat)
    assert check_model(flat, tmp_path / "bloom") is None
    findings = [
        next(architecture(config_of(tmp_path / name), tmp_path / name))
        for name in ("gemma", "bloom")
    ]
    assert [finding.status for finding in findings] == [Status.OK, Status.WARNING]
    assert findings[1].detail == notice


def test_weights_that_the_engines_would_not_take_are_named(tmp_path: Path) -> None:
    file = write_tiny(TinyArchitecture.llama, tmp_path, 64) / "model.safetensors"
    whole = load_file(file)
    extra = whole | {"model.visual.patch.weight": torch.ones(3)}
    save_file(extra, file)
    with pytest.raises(ValueError, match=r"hold model\.visual\.patch\.weight, which the learner"):
        check_model(config_of(tmp_path), tmp_path)
    save_file({name.replace("model.", "model.text."): t for name, t in whole.items()}, file)
    with pytest.raises(ValueError, match=r"would send model\.embed_tokens\.weight, .* and 17 more"):
        check_model(config_of(tmp_path), tmp_path)


def test_the_table_has_every_architecture_that_is_checked() -> None:
    rows = architecture_rows()
    assert len(rows) == len(TinyArchitecture)
    assert {row.packing for row in rows} == {"tree"}
    remarks = {row.name: row.remarks for row in rows}
    assert remarks["Qwen3MoeForCausalLM"] == "mixture of experts"
    assert remarks["Gemma3ForCausalLM"] == "sliding windows; tied embeddings"
    for row in rows:
        assert (Path(__file__).parents[3] / row.checked_by.split()[0]).is_file()
