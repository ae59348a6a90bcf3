"""The tiny model is a real model folder: it loads by the usual classes and is reproducible."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_ray.chat.template import Chat
from elpo_ray.config.model import TinyModelConfig
from elpo_ray.config.task import CountdownConfig, TaskConfig
from elpo_ray.models.tiny import build_tiny, tiny_config
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tools.code_interpreter import SCHEMA

TASK = Countdown(TaskConfig(countdown=CountdownConfig()), seed=0)
SHAPE = TinyModelConfig(vocab_size=500, intermediate_size=64, num_layers=1)


DEMONSTRATIONS = [TASK.demonstration(i) or [] for i in range(100)]


def build(folder: Path, shape: TinyModelConfig = SHAPE, seed: int = 0) -> Path:
    return build_tiny(folder, shape, DEMONSTRATIONS, [SCHEMA], max_context=256, seed=seed)


def test_loads_by_the_usual_classes_and_fits_the_tokenizer(tmp_path: Path) -> None:
    folder = build(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 256
    assert model.config.vocab_size == len(tokenizer) <= 500
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("left: 1 2", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_conversations_are_short_and_reversible(tmp_path: Path) -> None:
    chat = Chat.from_folder(str(build(tmp_path)), [SCHEMA])
    for messages in DEMONSTRATIONS:
        ids, agent = chat.conversation_ids(messages)
        assert len(ids) <= 170
        assert sum(agent) <= 45
    tokenizer = chat.tokenizer
    text = "Ünïcode 12345 <tool_call> \n\n x\ty"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for number in range(100):
        assert len(tokenizer(str(number))["input_ids"]) == 1


def test_the_seed_decides_the_weights_and_only_the_weights(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    folders = [build(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(state, torch.get_rng_state())
    same, again, other = ((f / "model.safetensors").read_bytes() for f in folders)
    assert same == again != other
    files = [(f / "tokenizer.json").read_bytes() for f in folders]
    assert files[0] == files[1] == files[2]


def test_too_small_a_vocabulary_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.tiny\.vocab_size=200: use at least \d+"):
        build(tmp_path, TinyModelConfig(vocab_size=200))


def test_an_embedding_may_have_more_rows_than_the_tokenizer_has_tokens(tmp_path: Path) -> None:
    """As in a large model, whose shape is tried with a small tokenizer."""
    shape = TinyModelConfig(vocab_size=500, intermediate_size=64, num_layers=1, padded_vocab=3000)
    folder = build(tmp_path, shape)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = Chat.from_folder(str(folder), [SCHEMA])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 3000
    assert len(chat.tokenizer) <= 500
    assert chat.tokenizer.decode([2999, 2998]) == "", "a token of no text"
    with pytest.raises(ValueError, match=r"padded_vocab=499: use vocab_size=500 or more"):
        TinyModelConfig(vocab_size=500, padded_vocab=499)


def test_wider_models_start_with_smaller_weights() -> None:
    def spread(hidden: int) -> float:
        config = TinyModelConfig(hidden_size=hidden, num_heads=2, num_kv_heads=2)
        made = tiny_config(config, 64, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        return float(made.initializer_range)

    assert spread(64) == spread(128) == pytest.approx(0.06)
    assert spread(512) == pytest.approx(0.03)
