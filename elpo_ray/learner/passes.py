"""Packs through a policy: how they are planned, their log-probabilities and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elpo_ray.config.learner import Packing
from elpo_ray.forest.items import CostModel
from elpo_ray.forest.planning import Rules
from elpo_ray.learner import speed
from elpo_ray.learner.attention import choose_backend
from elpo_ray.learner.backend import LearnerSettings
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.loss import LossStats, Objective, TokenBatch, nll_loss, surrogate_loss
from elpo_ray.learner.policy import DTYPES, PolicyModule
from elpo_ray.learner.stats import entropy_moments


@dataclass(frozen=True)
class Passes:
    """What every pass of one learner has in common. A policy is a `PolicyModule`, mostly inside a
    DeepSpeed engine."""

    settings: LearnerSettings
    layout: BatchLayout
    cost: CostModel
    world_size: int

    @classmethod
    def of(
        cls, policy: PolicyModule, settings: LearnerSettings, device: torch.device, world_size: int
    ) -> Passes:
        """Raises ValueError on an attention backend that cannot run here."""
        dtype, backend = DTYPES[settings.model.precision], None
        if policy.takes_trees:
            asked = settings.learner.attention
            backend = choose_backend(asked, policy.head_dim, device, dtype)
        layout = BatchLayout(device, backend, dtype)
        return cls(settings, layout, policy.cost(), world_size)

    def rules(self, objective: Objective) -> Rules:
        """How the trees of a mini-batch are divided into packs."""
        learner, loss, backend = self.settings.learner, self.settings.loss, self.layout.backend
        shares = learner.packing is Packing.tree and backend is not None
        return Rules(
            max_tokens=learner.max_tokens_per_pack,
            world_size=self.world_size,
            cost=self.cost,
            share_gain=speed.SHARE_GAIN[backend] if shares and backend is not None else None,
            padded=backend is None,
            needs_advantage=objective is Objective.surrogate
            and loss.kl_coef == loss.entropy_advantage == 0,
        )

    def measured_speedup(self, policy: Any, packs: list[Pack]) -> float:
        """`speed.measure` on these packs; 0 where prefixes are never shared."""
        learner = self.settings.learner
        if self.layout.backend is None or learner.packing is Packing.flat:
            return 0.0
        return speed.measure(
            lambda inputs: policy(inputs, 1.0), packs, self.layout, learner.max_tokens_per_pack
        )

    @torch.no_grad()
    def log_probs(self, policy: Any, pack: Pack) -> Tensor:
        """Log-probabilities of a pack's scored tokens, without a gradient. Shape: [M]."""
        inputs = collate(pack, self.layout).inputs
        logp: Tensor = policy(inputs, self.settings.temperature)[0]
        return logp

    @torch.no_grad()
    def entropy_moments(self, policy: Any, packs: list[Pack]) -> tuple[Tensor, Tensor]:
        """`stats.entropy_moments` of the policy over the mini-batch of all ranks."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        for pack in packs:
            batch = collate(pack, self.layout)
            entropy = policy(batch.inputs, self.settings.temperature)[1]
            seen.append((entropy, batch.columns.weight, batch.columns.copies))
        return entropy_moments(seen)

    def loss(
        self, policy: Any, pack: Pack, objective: Objective, moments: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, LossStats, int]:
        """Loss of one pack, its statistics, and its tokens with padding. A pack without old
        log-probabilities gets those of this pass. `moments`: mean and deviation of the entropy, for
        `entropy_advantage` > 0."""
        batch = collate(pack, self.layout)
        padded = batch.inputs.ids.numel()
        if objective is Objective.nll:
            logp, entropy = policy(batch.inputs, 1.0)
            return *nll_loss(logp, batch.columns.weight, entropy), padded
        logp, entropy = policy(batch.inputs, self.settings.temperature)
        if pack.old_logp is None:
            pack.old_logp = logp.detach()
        tokens = TokenBatch(
            columns=batch.columns,
            old_logp=pack.old_logp,
            entropy=entropy,
            ref_logp=pack.ref_logp,
            normed_entropy=None if moments is None else ((entropy - moments[0]) / moments[1]),
        )
        return *surrogate_loss(logp, tokens, self.settings.clip, self.settings.loss), padded
