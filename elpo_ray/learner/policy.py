"""The policy as the learner runs it: a causal LM that returns log-probabilities only.

Invariants: logits exist for trained tokens only and never for more than a chunk of them, forward or
backward; backbone and head sit in one module, so that under ZeRO-3 every weight is gathered inside
the engine's forward; dropout is off, so that old and new log-probabilities are one function's; a
forest goes only through our own attention, which knows what its tokens see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from elpo_ray.config.learner import Packing
from elpo_ray.config.model import Precision
from elpo_ray.forest.items import CostModel
from elpo_ray.forest.trees import TrainForest
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import Inputs
from elpo_ray.learner.products import product, use_in
from elpo_ray.models.architectures import causal_lm, check_trainable

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Most logits of one chunk, of which two or three copies are alive in fp32. A GPU needs more rows
at once: every chunk reads and writes the head's whole gradient, whose bytes take an H100 longer
than the products of a hundred rows do. `config.memory.HEAD_CHUNK` counts with it."""

logger = logging.getLogger(__name__)

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


class _TargetLogProbs(torch.autograd.Function):
    """Log-probability of one target a row, and the row's entropy, from hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """hidden [M, H], weight [V, H], bias [V] or None, targets [M] -> two [M], fp32 or wider."""
        # Written in place: small results kept between large temporaries would fragment the heap.
        logp = hidden.new_empty(len(targets), dtype=_wide(weight.dtype))
        entropy = torch.empty_like(logp)
        for rows in _chunks(len(targets), len(weight), weight.device):
            log_probs = _log_probs(hidden[rows], weight, bias, scale)
            logp[rows] = log_probs.gather(1, targets[rows, None]).squeeze(1)
            entropy[rows] = -log_probs.exp().mul_(log_probs).sum(1)
        ctx.save_for_backward(hidden, weight, targets, *(() if bias is None else (bias,)))
        ctx.scale = scale
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        grad_hidden = torch.empty_like(hidden)
        # fp32 sums over chunks; none of a frozen head.
        grad_weight = _zeros(weight) if ctx.needs_input_grad[1] else None
        grad_bias = _zeros(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(len(targets), len(weight), weight.device):
            # d logp / d logits = scale * (onehot - p)
            grad = _log_probs(hidden[rows], weight, bias, ctx.scale).exp_().neg_()
            grad.scatter_add_(1, targets[rows, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grads[0][rows, None] * ctx.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = product(grad, weight.T)
            if grad_weight is not None:
                grad_weight += product(grad.T, hidden[rows].T)
        sums = [g if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return grad_hidden, *sums, None, None


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=_wide(parameter.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS[device.type] // vocabulary)
    for start in range(0, max(rows, 1), size):
        yield slice(start, start + size)


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = product(hidden, weight, bias)
    return torch.log_softmax(logits.to(_wide(logits.dtype)).mul_(scale), dim=-1)


class LogProbHead(nn.Module):
    """The model's own output head, its parameters shared, never materialising all logits."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        # Registered here too, so that ZeRO-3's hooks on this module gather them.
        self.weight = head.weight
        self.bias = getattr(head, "bias", None)

    def forward(self, hidden: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """hidden [M, H], targets [M] -> log-probability of each target and entropy, both [M]."""
        result: tuple[Tensor, Tensor] = _TargetLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, targets, scale
        )
        return result


class PolicyModule(nn.Module):
    """A Hugging Face causal LM whose forward pass returns log-probabilities of selected tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head = LogProbHead(head)

    @property
    def takes_trees(self) -> bool:
        """Whether its attention is ours; it then takes forests only, never rows."""
        implementation: str | None = self.model.config.get_text_config()._attn_implementation
        return implementation == IMPLEMENTATION

    def forward(self, inputs: Inputs, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities (nats) and entropies at `temperature` of the M scored tokens, [M].

        Raises ValueError on tree positions where the attention is not ours: the model would take
        them for packed documents and mask wrongly.
        """
        if self.takes_trees != (inputs.plan is not None):
            raise ValueError(
                f"attention {self.model.config.get_text_config()._attn_implementation!r}: "
                + ("needs a forest" if self.takes_trees else "cannot read tree positions")
                + "; load the policy with the packing it is given"
            )
        forest: dict[str, Any] = {}
        if inputs.plan is not None:
            forest = {"position_ids": inputs.positions, "tree_plan": inputs.plan}
        hidden = self.model.base_model(
            input_ids=inputs.ids, use_cache=False, **forest
        ).last_hidden_state
        result: tuple[Tensor, Tensor] = self.head(
            hidden.flatten(0, 1)[inputs.predicted_from], inputs.targets, 1.0 / temperature
        )
        return result

    def check_vocabulary(self, forest: TrainForest) -> None:
        """Raises ValueError on token ids that the model does not have."""
        size = self.model.config.get_text_config().vocab_size
        largest = max((int(tree.ids.max()) for tree in forest.trees if len(tree.ids)), default=0)
        if largest >= size:
            raise ValueError(
                f"token id {largest}: the model's vocabulary has {size} entries; train with the "
                "tokenizer of the model folder"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        config = self.model.config.get_text_config()
        given: int | None = getattr(config, "head_dim", None)
        return given or config.hidden_size // config.num_attention_heads

    def cost(self) -> CostModel:
        """FLOPs of a forward pass, from the shapes."""
        config = self.model.config.get_text_config()
        embeddings = {id(p) for p in self.model.get_input_embeddings().parameters()}
        blocks = sum(
            getattr(p, "ds_numel", p.numel()) * (_active_experts(config) if ".experts." in n else 1)
            for n, p in self.model.base_model.named_parameters()
            if id(p) not in embeddings
        )
        return CostModel(
            token=2.0 * blocks,
            pair=4.0 * config.num_attention_heads * self.head_dim * config.num_hidden_layers,
            scored=2.0 * config.hidden_size * config.vocab_size,
        )


def _active_experts(config: Any) -> float:
    """The share of a layer's experts that one token goes through."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    every = next((n for key in keys if (n := getattr(config, key, None))), None)
    active = getattr(config, "num_experts_per_tok", None)
    return active / every if every and active else 1.0


def load_policy(
    folder: Path, precision: Precision, *, max_context: int, checkpointing: bool
) -> PolicyModule:
    """Load a Hugging Face folder, with our attention if the model can be trained on trees.

    Raises ValueError where there is none, and on models that cannot be trained.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder}: no config.json; name a Hugging Face model folder")
    verdict = check_trainable(folder, max_context)
    model_class, config = causal_lm(folder)
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    implementation = IMPLEMENTATION
    if verdict.packing is Packing.flat:
        logger.warning("%s: no shared prefixes in training, since %s", folder.name, verdict.reason)
        implementation = "sdpa" if model_class._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=DTYPES[precision], attn_implementation=implementation
    )
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    use_in(model)
    model.train()  # checkpointing is off in eval mode
    return PolicyModule(model)
