"""A small model with its own tokenizer, built from nothing: every part of a real model folder.

Tokenizer class, chat template, Hermes tool calls and special tokens are Qwen2.5's. The byte-level
BPE is trained on the task's demonstrations; what all of them repeat (template, tool schema, the
frame of a call) is added as whole tokens, and so are the integers below 100: a turn is short.
No phrase crosses the end of the generation prompt: what follows never changes how that is
tokenised. The same texts, shape and seed give the same folder.

The model is a Qwen2 unless another architecture is asked for, with the parts that make it special:
windows that end within the context, normed queries, fused weights, experts.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
)

from elpo_ray.config.model import TinyArchitecture, TinyModelConfig
from elpo_ray.models.layout import named_weights, stored
from elpo_ray.types import Message

TEMPLATE = Path(__file__).parent / "templates" / "qwen2_5.jinja"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GENERATION = "assistant\n"
"""Ends the template's generation prompt, after its special token."""
BREAKS = re.compile(
    "|".join(map(re.escape, (END_OF_TEXT, START, END, *TAGS))) + rf"|\d+|(?<={GENERATION})"
)
"""What phrases stay between: special tokens and tags, integers, the generation prompt's end."""
PHRASE_SHARE = 0.1
"""Text in at least this share of the conversations becomes one token."""
WHOLE_INTEGERS = tuple(str(number) for number in range(100))
"""Each of these is one token, so that a model has to learn planning, not arithmetic."""

WINDOWS_A_CONTEXT = 4
"""A sliding window is this part of the context, so that it matters."""
TIED = (TinyArchitecture.qwen2, TinyArchitecture.qwen3, TinyArchitecture.gemma3)
"""Those whose small models use the embedding as their output head."""
EXPERTS, ACTIVE_EXPERTS = 4, 2
"""Experts of a layer, and those that a token goes through."""

INITIALIZER_RANGE, TUNED_WIDTH = 0.06, 128
"""Standard deviation of the weights up to this width; above, it falls with the root of the width.
Three times Qwen2's: at this width, on a few thousand demonstrations, planning is learned several
times sooner."""


def build_tiny(
    folder: Path,
    config: TinyModelConfig,
    conversations: Iterable[Sequence[Message]],
    tools: Sequence[dict[str, Any]],
    *,
    max_context: int,
    seed: int,
) -> Path:
    """Write tokenizer, template, configuration and random fp32 weights; returns `folder`.

    The tokenizer is trained on `conversations`; some hundreds are enough. ValueError if
    `vocab_size` has no room for the bytes, special tokens, shared phrases and integers.
    """
    tokenizer = _tokenizer(_render(conversations, tools), config.vocab_size)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rows = config.padded_vocab or len(tokenizer)
    shape = tiny_config(config, max_context, vocab_size=rows, bos_token_id=None, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(shape)  # type: ignore[no-untyped-call]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, **ids
    )
    write_model(model, folder)
    return folder


def tiny_config(config: TinyModelConfig, max_context: int, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model, with `changes`."""
    kind = config.architecture
    head = config.hidden_size // config.num_heads
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": max_context,
        "initializer_range": INITIALIZER_RANGE
        * math.sqrt(TUNED_WIDTH / max(TUNED_WIDTH, config.hidden_size)),
        "tie_word_embeddings": kind in TIED,
        "dtype": "float32",
    }
    if kind is not TinyArchitecture.qwen2:  # the others have a default of their own
        shape["head_dim"] = head
    if kind in (TinyArchitecture.mistral, TinyArchitecture.gemma3):
        shape["sliding_window"] = max(1, max_context // WINDOWS_A_CONTEXT)
    if kind is TinyArchitecture.gemma3:
        kinds = ("sliding_attention", "full_attention")
        shape["layer_types"] = [kinds[i % 2] for i in range(config.num_layers)]
        shape["query_pre_attn_scalar"] = head
    if kind is TinyArchitecture.qwen3_moe:
        shape["moe_intermediate_size"] = config.intermediate_size // ACTIVE_EXPERTS
        shape |= {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE_EXPERTS}
    name = "gemma3_text" if kind is TinyArchitecture.gemma3 else kind.value
    return AutoConfig.for_model(name, **shape | changes)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` would, which itself loads DeepSpeed to look at its argument."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = stored(model, named_weights(model))
    tensors = {name: value.detach().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _render(
    conversations: Iterable[Sequence[Message]], tools: Sequence[dict[str, Any]]
) -> list[str]:
    """Conversations as text, before there is a tokenizer."""
    tokenizer = Qwen2Tokenizer(chat_template=TEMPLATE.read_text())
    return [
        str(tokenizer.apply_chat_template(list(messages), tools=list(tools), tokenize=False))
        for messages in conversations
    ]


def _tokenizer(texts: Sequence[str], vocab_size: int) -> Qwen2Tokenizer:
    """Bytes and merges first, then whole tokens: special ones, tags, phrases, integers."""
    special = [AddedToken(t, special=True, normalized=False) for t in (END_OF_TEXT, START, END)]
    whole = [*TAGS, *_phrases(texts), *WHOLE_INTEGERS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - len(special) - len(whole)
    if room < len(alphabet):
        raise ValueError(
            f"model.tiny.vocab_size={vocab_size}: use at least "
            f"{vocab_size - room + len(alphabet)}, one id for every byte, tag, phrase and integer"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],  # type: ignore[misc]
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=TEMPLATE.read_text(),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in whole])
    return tokenizer


def _phrases(texts: Sequence[str]) -> list[str]:
    """Text between breaks that many conversations share."""
    shared: Counter[str] = Counter()
    for text in texts:
        shared.update(set(BREAKS.split(text)))
    return sorted(
        phrase
        for phrase, number in shared.items()
        if len(phrase) > 1 and number >= PHRASE_SHARE * len(texts)
    )
