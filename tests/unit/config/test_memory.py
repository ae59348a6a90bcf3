"""What `check_only` says of memory and hours, against tensors that are counted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from train_trees import train_tree
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.algebra import batch_algebra, fits
from elpo_ray.config.compose import composed
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.config.measure import EvaluateConfig
from elpo_ray.config.memory import (
    GPU_GIB,
    HEAD_CHUNK,
    Shortage,
    activations,
    fit,
    hours,
    model_states,
    rank_peak,
    step_bytes,
    token_bytes,
)
from elpo_ray.config.model import ModelConfig, TinyArchitecture, TinyModelConfig
from elpo_ray.config.rollout import EngineConfig
from elpo_ray.config.shapes import PUBLISHED, ModelShape, published, shape_of, tiny_shape
from elpo_ray.forest.planning import PlanRules, plan
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.policy import CHUNK_ELEMENTS, PolicyModule
from elpo_ray.models.tiny import tiny_config

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[3]
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-4B": 4_022_468_096,
    "Llama-3.1-8B": 8_030_261_248,
}
"""As the models' cards say."""


def test_the_heads_chunks_are_those_of_the_learner() -> None:
    assert 3 * 4 * CHUNK_ELEMENTS["cuda"] == HEAD_CHUNK


def count(config: object) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_the_parameters_that_they_are_known_for(name: str) -> None:
    assert published(name).parameters == pytest.approx(PARAMETERS[name], rel=1e-4)


@pytest.mark.parametrize("architecture", TinyArchitecture)
def test_parameters_are_counted_from_a_folder(
    architecture: TinyArchitecture, tmp_path: Path
) -> None:
    tiny = TinyModelConfig(architecture=architecture)
    config = tiny_config(tiny, 1024, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config.save_pretrained(tmp_path)
    shape = shape_of(ModelConfig(path=str(tmp_path)))
    assert shape is not None and shape.exact
    assert shape.parameters == pytest.approx(count(config), rel=0.01)
    if architecture in (TinyArchitecture.qwen2, TinyArchitecture.qwen3_moe):
        assert tiny_shape(tiny).parameters == pytest.approx(shape.parameters, rel=0.01)


def test_a_folder_counts_before_a_name_and_a_name_before_a_number(tmp_path: Path) -> None:
    named = shape_of(ModelConfig(path="Qwen/Qwen2.5-7B-Instruct", num_parameters=1.0))
    assert named == published("Qwen2.5-7B")
    guessed = shape_of(ModelConfig(path="x/y", num_parameters=7.6e9))
    assert guessed is not None and not guessed.exact and guessed.parameters == 7.6e9
    assert shape_of(ModelConfig(path="x/y")) is None
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert shape_of(ModelConfig(path=str(tmp_path))) is None


def saved(model: Qwen2ForCausalLM, tokens: int) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, and the tokens of the pass."""
    policy = PolicyModule(model)
    model.set_attn_implementation(IMPLEMENTATION)
    dtype = next(model.parameters()).dtype
    tree = train_tree(np.random.default_rng(0), [-1, 0], [tokens // 2, tokens // 2], vocab=90)
    tree = replace(tree, leaf_weight=np.ones(1))
    rules = PlanRules(
        max_tokens=2 * tokens, world_size=1, cost=policy.cost(), share_gain=None, padded=False
    )
    ((items,),) = plan([tree], rules).ranks
    layout = BatchLayout(torch.device("cpu"), AttentionBackend.blocks, dtype)
    inputs = collate(Pack(items), layout).inputs
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp, _ = policy(inputs, 1.0)
    assert logp.requires_grad
    return sum(t.untyped_storage().nbytes() for t in kept.values()), inputs.ids.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("hidden", "inner", "layers"), [(128, 512, 4), (256, 256, 3), (128, 64, 9)]
)
def test_a_layer_keeps_what_is_predicted(
    hidden: int, inner: int, layers: int, dtype: torch.dtype
) -> None:
    config = Qwen2Config(
        vocab_size=100, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=4096,
    )  # fmt: skip
    found, tokens = saved(Qwen2ForCausalLM(config).to(dtype).train(), 1000)
    shape = ModelShape.of(config.to_dict())
    per_layer = token_bytes(shape, dtype.itemsize)
    assert found / tokens / layers == pytest.approx(per_layer, rel=0.15)


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    config = composed(["+experiment=aime_1gpu"])
    shape = published("Qwen2.5-1.5B")
    spared = activations(config, shape)
    config.learner.gradient_checkpointing = False
    assert activations(config, shape) > 8 * spared


def test_states_of_the_zero_stages() -> None:
    """As counted in updates of DeepSpeed 0.19 on one rank: bytes a parameter at rest in bf16."""
    config = composed(["+experiment=aime_2gpu"])
    shape = published("Qwen2.5-1.5B")
    for stage, rest, moment in ((0, 14, 20), (1, 18, 20), (2, 14, 22), (3, 20, 24)):
        config.learner.zero_stage = stage
        states = model_states(config)
        assert states is not None
        assert states.rank == pytest.approx(rest * shape.parameters)
        most = states.rank + step_bytes(config, shape)
        arriving = 2 * 500_000_000 if stage else 0
        assert most <= moment * shape.parameters + arriving
        assert rank_peak(config, shape) >= most


def test_more_ranks_and_smaller_packs_take_less() -> None:
    config = composed(["+experiment=aime"])
    shape = published("Qwen2.5-7B")
    before = rank_peak(config, shape)
    config.cluster.learner_ranks = 8
    assert rank_peak(config, shape) < 0.75 * before
    config.learner.max_tokens_per_pack = 20480
    assert activations(config, shape) < activations(composed(["+experiment=aime"]), shape)


@pytest.mark.parametrize(
    ("experiment", "card", "verdict"),
    [
        ("aime_1gpu", "80 GB", "yes"),
        ("aime_1gpu", "24 GB", "no"),
        ("aime_2gpu", "80 GB", "yes"),
        ("aime", "80 GB", "yes"),
        ("aime_lora", "80 GB", "yes"),
        ("aime_lora", "24 GB", "no"),
    ],
)
def test_whether_a_run_fits(experiment: str, card: str, verdict: str) -> None:
    config = composed([f"+experiment={experiment}"])
    shape = shape_of(config.model)
    assert shape is not None
    said = fits(config, shape, card)
    assert said.startswith(verdict), said
    lies = fit(config, shape, GPU_GIB[card] * GIB)
    assert (not lies.missing) == (verdict == "yes")
    if not lies.missing:
        assert lies.contexts >= 1


def test_what_is_too_large_is_named_with_a_remedy() -> None:
    config = composed(["+experiment=aime", "model.path=Qwen/Qwen2.5-32B-Instruct"])
    assert Shortage.rank in fit(config, published("Qwen2.5-32B"), 80 * GIB).missing
    config = composed(["+experiment=aime_2gpu", "engine.gpu_memory_utilization=0.05"])
    said = fits(config, published("Qwen2.5-1.5B"), "80 GB")
    assert "raise engine.gpu_memory_utilization" in said
    config = composed(["+experiment=aime_1gpu", "engine.gpu_memory_utilization=0.99"])
    assert "lower engine.gpu_memory_utilization" in fits(config, published("Qwen2.5-1.5B"), "80 GB")


AGENT = [
    "cluster=gpu2",
    "model=named",
    "model.path=Qwen/Qwen3-4B-Instruct-2507",
    "task=open_agentrl",
]


def verdict(*words: str) -> str:
    config = composed([*AGENT, *words])
    shape = shape_of(config.model)
    assert shape is not None
    return fits(config, shape, "80 GB")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("learner.gradient_checkpointing=false",),
        ("learner.max_tokens_per_pack=20480",),
        ("cluster=gpu1",),
        ("cluster.learner_ranks=2", "model.path=Qwen/Qwen2.5-14B"),
        ("engine.gpu_memory_utilization=0.9", "model.path=Qwen/Qwen2.5-32B"),
    ],
)
def test_every_way_that_is_named_makes_the_learner_fit(words: tuple[str, ...]) -> None:
    said = verdict(*words)
    ways = re.findall(r"with ([^()]+) \(([\d.]+) GiB\)", said.partition("; and for")[0])
    assert said.startswith("no") and ways, said
    for way, size in ways:
        after = verdict(*words, *way.split())
        assert f"a learner rank takes {size} GiB" in after, (way, after)
        assert "too little for a learner rank" not in after, (way, after)
        assert not {*way.split()} & {*words}, "what is set already is not advised"


def test_all_that_is_too_large_is_named() -> None:
    said = verdict("engine.gpu_memory_utilization=0.05")
    assert "too little for a learner rank: it fits with" in said
    assert "; and for an engine's weights and cache: raise engine.gpu_memory_utilization" in said
    said = verdict("model.path=x/y", "model.num_parameters=1e13")
    assert "for a learner rank: take larger GPUs or a smaller model" in said


@pytest.mark.parametrize(
    ("words", "on"),
    [
        ([], True),
        (["cluster=local"], False),
        (["model.path=null", "task=countdown"], False),
        (["learner.gradient_checkpointing=false"], False),
        (["cluster=local", "learner.gradient_checkpointing=true"], True),
    ],
)
def test_real_models_compute_activations_again_on_gpus(words: list[str], on: bool) -> None:
    assert composed([*AGENT, *words]).gradient_checkpointing is on


@pytest.mark.parametrize(
    ("name", "tensor", "right"),
    [
        ("Qwen3-4B", 3, False), ("Qwen3-4B", 5, False), ("Qwen3-4B", 8, True),
        ("Qwen3-4B", 16, True), ("Qwen2.5-1.5B", 8, False), ("Qwen2.5-1.5B", 4, True),
        ("Qwen2.5-1.5B", 3, False), ("Qwen2.5-7B", 7, False), ("unknown", 3, True),
    ],
)  # fmt: skip
def test_heads_must_spread_over_the_gpus_of_an_engine(name: str, tensor: int, right: bool) -> None:
    words = [*AGENT, f"model.path=owner/{name}", f"engine.tensor_parallel_size={tensor}"]
    measure = partial(
        EvaluateConfig, tasks=["aime24"], engine=EngineConfig(tensor_parallel_size=tensor)
    )
    if right:
        composed(words), measure(model=f"owner/{name}")
        return
    with pytest.raises(
        ValueError, match=rf"tensor_parallel_size={tensor}: the model has \d+ heads"
    ):
        composed(words)
    with pytest.raises(
        ValueError, match=rf"tensor_parallel_size={tensor}: the model has \d+ heads"
    ):
        measure(model=f"owner/{name}")


ADVICE = ["README.md", "docs/extending.md", "docs/tutorial.md",
          "elpo_ray/new/project/README.md.template"]  # fmt: skip


@pytest.mark.parametrize("page", ADVICE)
def test_what_the_pages_advise_for_gpus_fits(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split("\n"))
    forms = {"model": r"{path: \S*Qwen3-4B[^}]*}", "learner": "{lora.*?}}", "cluster": r"gpu\d"}
    parts = {key: re.search(f"{key}: ({form})", text) for key, form in forms.items()}
    found = {key: yaml.safe_load(part[1]) for key, part in parts.items() if part}
    assert found.keys() == {"model", "learner", "cluster"}, found
    lora, rate = found["learner"]["lora"]["rank"], found["learner"]["optimizer"]["lr"]
    path, cluster = found["model"]["path"], found["cluster"]
    words = [f"learner.lora.rank={lora}", f"learner.optimizer.lr={rate}", f"cluster={cluster}"]
    said = verdict(*words, f"model.path={path}")
    assert said.startswith("yes"), said


def test_a_short_run_is_less_than_a_minute_of_arithmetic() -> None:
    text = batch_algebra(composed(["+experiment=quickstart_gpu"]))
    assert "less than a minute of arithmetic" in text and "starts," in text


def test_hours_follow_the_work() -> None:
    config = composed(["+experiment=aime"])
    shape = published("Qwen2.5-7B")
    base = hours(config, shape)
    config.trainer.steps *= 2
    assert hours(config, shape) == pytest.approx(2 * base)
    assert 10 < base < 1000


def test_the_lines_of_a_gpu_run_and_of_a_cpu_run() -> None:
    text = batch_algebra(composed(["+experiment=aime_1gpu"]))
    for words in (
        "at the peak",
        "fits 80 GB  yes",
        "parameters  1.544e+09",
        "at 35% and 10% of an",
    ):
        assert words in text, text
    text = batch_algebra(composed(["+experiment=quickstart"]))
    assert "fits" not in text and "at the peak" in text
    text = batch_algebra(composed(["+experiment=aime", "model.path=x/y"]))
    assert "memory  unknown: name a local folder with model.path, or set" in text


def test_every_published_name_is_found() -> None:
    for name in PUBLISHED:
        assert shape_of(ModelConfig(path=f"owner/{name}-Instruct")) == published(name)


def test_random_weights_have_the_shape_of_the_real_model() -> None:
    config = composed(["+experiment=aime_1gpu", "model=random_1_5b", "task=countdown"])
    assert shape_of(config.model) == published("Qwen2.5-1.5B")
    real = composed(["+experiment=aime_1gpu"])
    assert config.learner == real.learner and config.engine == real.engine


def test_the_larger_quickstart_is_as_large_as_it_says() -> None:
    shape = shape_of(composed(["+experiment=quickstart_gpu"]).model)
    assert shape is not None and shape.parameters == pytest.approx(35e6, rel=0.02)
