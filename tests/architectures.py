"""Tiny random models of every architecture that is checked, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from elpo_ray.config.model import TinyArchitecture, TinyModelConfig
from elpo_ray.models.tiny import tiny_config, write_model

VOCAB = 300
END_OF_TURN = 1


def tiny_model(architecture: TinyArchitecture, max_context: int, **changes: Any) -> PreTrainedModel:
    """Two layers in fp32, sharp enough that entropies vary, every norm and bias moved."""
    shape = TinyModelConfig(
        architecture=architecture,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
    )
    ids = {"bos_token_id": None, "eos_token_id": END_OF_TURN, "pad_token_id": 0}
    changes = {"initializer_range": 0.15, **ids, **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(shape, max_context, **changes))
    move(model, 0.1, seed=1, only_vectors=True)
    return model


def write_tiny(architecture: TinyArchitecture, folder: Path, max_context: int) -> Path:
    write_model(tiny_model(architecture, max_context), folder)
    return folder


@torch.no_grad()
def move(model: PreTrainedModel, by: float, seed: int, *, only_vectors: bool = False) -> None:
    """Add noise to the weights."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1 or not only_vectors:
            parameter.add_(by * torch.randn_like(parameter))
