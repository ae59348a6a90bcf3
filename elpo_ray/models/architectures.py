"""Which models can be trained, and whether shared prefixes of a tree go through them once.

Every obstacle that is known is a function here. The learner, the check before a run, the doctor and
the table in the documentation all ask `judge`, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from elpo_ray.config.learner import Packing
from elpo_ray.config.model import TinyArchitecture, TinyModelConfig

CHECKED_BY = "tests/real/rollout/test_engine_architectures.py"
"""The test that compares engine with learner and trees with flat sequences."""

CONTEXT = 1024
"""Tokens of context of the tiny models in the table."""


@dataclass(frozen=True)
class Traits:
    """What an obstacle is looked for in."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    max_context: int

    @cached_property
    def text(self) -> Any:
        """The part of the configuration that describes the language model."""
        return self.config.get_text_config()

    def get(self, key: str) -> Any:
        return getattr(self.text, key, None)

    @property
    def rope(self) -> dict[str, Any]:
        found = self.get("rope_parameters") or self.get("rope_scaling")
        return found or {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a model is trained."""

    packing: Packing | None
    """None = not at all."""
    reason: str | None = None
    """Why not on trees, or not at all, as in "since REASON"."""


# --- what rules training out ----------------------------------------------------------------------


def _reads_more_than_text(model: Traits) -> str | None:
    parts = [name for name in ("vision_config", "audio_config") if hasattr(model.config, name)]
    return f"it reads more than text ({', '.join(parts)})" if parts else None


def _is_quantized(model: Traits) -> str | None:
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is None:
        return None
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    return f"its weights are quantized ({method or 'quantization_config'})"


def _changes_its_logits(model: Traits) -> str | None:
    for key in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if model.get(key) not in (None, 1.0):
            return f"its logits are changed after the output head ({key}={model.get(key)})"
    return None


def _caps_its_attention(model: Traits) -> str | None:
    cap = model.get("attn_logit_softcapping")
    return f"its attention logits are capped (attn_logit_softcapping={cap})" if cap else None


def _rotates_by_length(model: Traits) -> str | None:
    """transformers goes by the longest sequence of a batch. vLLM goes by its context window, and
    agrees where the window needs no scaling."""
    kind, original = model.rope.get("rope_type"), model.rope.get("original_max_position_embeddings")
    if kind not in ("dynamic", "longrope"):
        return None
    if kind == "longrope" and original is not None and model.max_context <= original:
        return None
    remedy = f"; lower model.max_context to {original}" if kind == "longrope" and original else ""
    return (
        f"its rotary embedding ({kind}) depends on the longest sequence of a batch in the learner, "
        f"and on the context window in the engine{remedy}"
    )


# --- what rules trees out -------------------------------------------------------------------------


def _has_other_layers(model: Traits) -> str | None:
    known = {"full_attention", "sliding_attention"}
    other = sorted(set(model.get("layer_types") or ()) - known)
    return f"it has {', '.join(other)} layers" if other else None


def _has_its_own_attention(model: Traits) -> str | None:
    replaceable = model.model_class._supports_attention_backend and model.model_class._supports_sdpa
    return None if replaceable else "its attention cannot be replaced"


def _carries_a_state(model: Traits) -> str | None:
    return "it carries a recurrent state" if model.model_class._is_stateful else None


def _uses_alibi(model: Traits) -> str | None:
    return "it uses ALiBi" if model.get("alibi") else None


def _has_values_of_another_width(model: Traits) -> str | None:
    value = model.get("v_head_dim")
    key = (model.get("qk_nope_head_dim") or 0) + (model.get("qk_rope_head_dim") or 0)
    return None if value in (None, key) else f"its keys have width {key} and its values {value}"


Obstacle = Callable[[Traits], str | None]
"""The reason in words, or None where there is no such obstacle."""

AGAINST_TRAINING: tuple[Obstacle, ...] = (
    _reads_more_than_text,
    _is_quantized,
    _changes_its_logits,
    _caps_its_attention,
    _rotates_by_length,
)
AGAINST_TREES: tuple[Obstacle, ...] = (
    _has_other_layers,
    _has_its_own_attention,
    _carries_a_state,
    _uses_alibi,
    _has_values_of_another_width,
)


def judge(
    model_class: type[PreTrainedModel], config: PretrainedConfig, max_context: int
) -> Verdict:
    """How a model is trained with episodes of up to `max_context` tokens."""
    traits = Traits(model_class, config, max_context)
    for packing, obstacles in ((None, AGAINST_TRAINING), (Packing.flat, AGAINST_TREES)):
        for obstacle in obstacles:
            reason = obstacle(traits)
            if reason is not None:
                return Verdict(packing, reason)
    return Verdict(Packing.tree)


def causal_lm(folder: Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Class and configuration of the model in `folder`. Raises ValueError where transformers has
    none."""
    version = transformers.__version__
    unknown = f"model.path={str(folder)!r}: transformers {version} has no causal language model"
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{unknown} for it ({reason}); choose another model") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{unknown} of type {config.model_type!r}; choose another model")
    return _class_of(config), config


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    classes: Any = AutoModelForCausalLM._model_mapping
    found: type[PreTrainedModel] = classes[type(config)]
    return found


def check_trainable(folder: Path, max_context: int) -> Verdict:
    """`judge` for the model in `folder`. Raises ValueError, saying why, if it cannot be trained."""
    model_class, config = causal_lm(folder)
    verdict = judge(model_class, config, max_context)
    if verdict.packing is None:
        remedy = "" if "; " in str(verdict.reason) else "; choose another model"
        raise ValueError(
            f"model.path={str(folder)!r}: {model_class.__name__} cannot be trained, since "
            f"{verdict.reason}{remedy}"
        )
    return verdict


# --- the table of the documentation ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArchitectureRow:
    """One architecture of the generated table."""

    name: str
    """transformers' class."""
    packing: str
    """`tree`, `flat` or `no`."""
    checked_by: str
    """A test, by its path."""
    remarks: str


def architecture_rows() -> list[ArchitectureRow]:
    """Those that the tests compare with vLLM, each a tiny model, as `judge` sees them."""
    from elpo_ray.models.tiny import tiny_config  # with torch

    rows = []
    for architecture in TinyArchitecture:
        shape = TinyModelConfig(architecture=architecture)
        config = tiny_config(shape, CONTEXT, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        model_class = _class_of(config)
        verdict = judge(model_class, config, CONTEXT)
        test = f"{CHECKED_BY} ({architecture.value})"
        packing = "no" if verdict.packing is None else verdict.packing.value
        remarks = [verdict.reason] if verdict.reason else _remarks(config)
        rows.append(ArchitectureRow(model_class.__name__, packing, test, "; ".join(remarks)))
    return rows


def _remarks(config: PretrainedConfig) -> list[str]:
    """What about an architecture needed care, and has it."""
    features = {
        "mixture of experts": hasattr(config, "num_experts_per_tok"),
        "sliding windows": getattr(config, "sliding_window", None) is not None,
        "tied embeddings": bool(config.tie_word_embeddings),
    }
    return [name for name, has in features.items() if has]
