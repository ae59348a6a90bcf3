"""The tiny model is a real model folder: it loads by the usual classes and is reproducible."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from elpo_ray.config import CountdownConfig, TaskConfig, TinyModelConfig
from elpo_ray.tasks.countdown import Countdown
from elpo_ray.tiny import build_tiny, render

TASK = Countdown(TaskConfig(countdown=CountdownConfig()), seed=0)
SHAPE = TinyModelConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_layers=2)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return render([TASK.demonstration(i) or [] for i in range(100)], TASK.tools)


def build(folder: Path, texts: list[str], seed: int = 0) -> Path:
    return build_tiny(folder, SHAPE, texts=texts, max_context=256, seed=seed)


def test_loads_by_the_usual_classes_and_fits_the_tokenizer(
    tmp_path: Path, texts: list[str]
) -> None:
    folder = build(tmp_path, texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 256
    assert model.config.vocab_size == len(tokenizer) <= 500
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_conversations_are_short_and_reversible(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(build(tmp_path, texts))
    for text in [*texts, "Ünïcode 12345 <tool_call> \n\n x\ty"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert max(lengths) <= 200
    for number in range(100):
        assert len(tokenizer(str(number))["input_ids"]) == 1


def test_the_seed_decides_the_weights_and_only_the_weights(
    tmp_path: Path, texts: list[str]
) -> None:
    state = torch.get_rng_state()
    folders = [build(tmp_path / str(i), texts, seed) for i, seed in enumerate((3, 3, 4))]
    assert torch.equal(state, torch.get_rng_state())
    same, again, other = ((f / "model.safetensors").read_bytes() for f in folders)
    assert same == again != other
    files = [(f / "tokenizer.json").read_bytes() for f in folders]
    assert files[0] == files[1] == files[2]


def test_too_small_a_vocabulary_is_a_configuration_error(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"model\.tiny\.vocab_size=200: use at least \d+"):
        build_tiny(tmp_path, TinyModelConfig(vocab_size=200), texts=texts, max_context=256, seed=0)
