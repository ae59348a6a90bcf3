"""Adapters put into a small model and taken out again."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.learner import LoraConfig
from elpo_ray.learner import lora


def build(tied: bool = True) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    ).double()


def stirred(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """With adapters that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_adapted_model(tied: bool) -> None:
    """The query projection has a bias, which stays; the output head takes no adapter."""
    plain, adapted, config = build(tied), build(tied), LoraConfig(rank=3, alpha=12)
    names = list(plain.state_dict())
    lora.attach(adapted, config)
    ids = torch.arange(8)[None]
    assert torch.equal(adapted(ids).logits, plain(ids).logits), "B = 0 at first"
    stirred(adapted)
    state = adapted.state_dict()
    merged = {}
    sources = lora.sources(state)
    for name, part in sources.items():
        base = state[part.base]
        merged[name] = base
        if part.down is not None and part.up is not None:
            merged[name] = lora.merged(base, state[part.down], state[part.up], lora.scale(config))
    assert list(merged) == names
    assert sum(part.down is not None for part in sources.values()) == 2 * 7
    plain.load_state_dict(merged)
    assert (plain(ids).logits - build(tied)(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(adapted(ids).logits, plain(ids).logits, rtol=1e-12, atol=1e-12)


def test_only_adapters_are_trained_and_can_be_set_aside() -> None:
    plain, adapted = build(), build()
    lora.attach(adapted, LoraConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    stirred(adapted)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all(".lora_" in name for name in trained)
    ids = torch.arange(8)[None]
    with lora.disabled(adapted):
        assert torch.equal(adapted(ids).logits, plain(ids).logits)
    assert (adapted(ids).logits - plain(ids).logits).abs().max() > 0.01
    assert trained == {n for n, p in adapted.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "no_such_proj"])
def test_a_wrong_target_is_named(module: str) -> None:
    with pytest.raises(ValueError, match=rf"learner\.lora\.target_modules=.*{module}"):
        lora.attach(build(tied=False), LoraConfig(rank=2, target_modules=["q_proj", module]))


def test_a_name_that_resembles_an_adapter_is_no_adapter() -> None:
    names = ["a.base_layer.bias", "a.weight", "b.lora_A.other.weight"]
    assert list(lora.sources(names)) == ["a.bias", "a.weight", "b.lora_A.other.weight"]
    assert all(part.down is None for part in lora.sources(names).values())
