"""A small Qwen2 with its own tokenizer, built from nothing: every part of a real model folder.

Tokenizer class, chat template, Hermes tool calls and special tokens are Qwen2.5's. The byte-level
BPE is trained on the task's demonstrations; what all of them repeat (template, tool schema, the
frame of a call) is added as whole tokens, and so are the integers below 100: a turn is short.
No phrase crosses the end of the generation prompt: what follows never changes how that is
tokenised. The same texts, shape and seed give the same folder.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from elpo_ray.config.model import TinyModelConfig
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

INITIALIZER_RANGE = 0.06
"""Standard deviation of the weights. Three times Qwen2's: at this width, on a few thousand
demonstrations, planning is learned several times sooner."""


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(  # type: ignore[no-untyped-call]
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                max_position_embeddings=max_context,
                initializer_range=INITIALIZER_RANGE,
                tie_word_embeddings=True,
                dtype="float32",
                **ids,
            )
        )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, **ids
    )
    _write(model, folder)
    return folder


def _write(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write what `save_pretrained` would, which itself loads DeepSpeed to look at its argument."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


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
