"""One rank of the learner: forest in, updated weights out.

Invariants: every method is called on all ranks with equal arguments (a forest too), and every rank
runs the same collectives; an update is a sum with fixed weights, so its result depends on neither
packs nor ranks; an update that is not finite raises on all ranks and leaves the weights alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from itertools import count, repeat
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elpo_ray.config.learner import LoraConfig, OptimizerConfig, Packing
from elpo_ray.forest import Plan, Rules, TrainForest, plan
from elpo_ray.learner import checkpoint, export, lora, resting, speed
from elpo_ray.learner.backend import (
    RankProcess,
    build_engine,
    build_reference,
    clips_itself,
    join_group,
    layout_of,
)
from elpo_ray.learner.batching import Pack, collate
from elpo_ray.learner.loss import LossStats, TokenBatch, nll_loss, surrogate_loss
from elpo_ray.learner.optimizer import apply_config, apply_gradients, forget, learning_rate
from elpo_ray.learner.policy import PolicyModule, model_folder
from elpo_ray.learner.settings import LearnerSettings, Objective
from elpo_ray.learner.stats import (
    OptimizerStep,
    UpdateStats,
    all_reduce,
    entropy_moments,
    summarize,
)

Progress = tuple[int, int]
"""Packs that have gone through a policy, and that will have in all."""


class LearnerRank:
    """The policy, its optimizer and its reference on one of `world_size` processes."""

    def __init__(
        self,
        folder: str | Path,
        settings: LearnerSettings,
        process: RankProcess,
        *,
        total_steps: int,
        seed: int = 0,
    ) -> None:
        """Load `folder` (a Hugging Face folder or hub name) and join the other ranks.

        `total_steps` = optimizer steps of the learning-rate schedule, settings.learner.optimizer.
        The reference policy, built when `kl_coef` > 0 first needs it, is what `folder` holds then.
        """
        self._reference_folder = model_folder(folder)
        self._settings = settings
        self._process = process
        self._device = join_group(process)
        torch.manual_seed(seed)
        self._optimizer_cfg = settings.learner.optimizer
        self._total_steps = total_steps
        self._step = 0
        self._engine = self._load(self._reference_folder)
        self._reference: Any = None
        policy: PolicyModule = self._engine.module
        self._cost = policy.cost()
        self._form = layout_of(policy, settings, self._device)
        self._saving: checkpoint.BackgroundSave | None = None
        self._updates = 0
        self._speedup = 0.0

    def _load(self, folder: Path) -> Any:
        settings = self._settings
        self._folder = folder
        return build_engine(folder, settings.model, settings.learner, self._optimizer_cfg)

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model; under ZeRO-3 its parameters are shards."""
        model: PreTrainedModel = self._engine.module.model
        return model

    @property
    def optimizer_step(self) -> int:
        """Optimizer steps taken so far under the current schedule."""
        return self._step

    def reset_optimizer(
        self, cfg: OptimizerConfig, total_steps: int, reference: str | Path | None = None
    ) -> None:
        """Begin another phase (RL after the cold start) with the weights as they are: moments and
        schedule start afresh. `reference` = folder of the reference policy from now on; adapters
        are its difference from the policy, so with `learner.lora.rank` it must hold the weights as
        they are, and new adapters start on it."""
        self._optimizer_cfg, self._total_steps, self._step = cfg, total_steps, 0
        if reference is not None:
            self._reference_folder, self._reference = model_folder(reference), None
            if self._lora is not None and self._reference_folder != self._folder:
                self._engine.destroy()
                self._engine = None
                gc.collect()  # the old weights make room
                self._engine = self._load(self._reference_folder)
        forget(self._engine.basic_optimizer)
        apply_config(self._engine.basic_optimizer, cfg)
        if not self._clips_itself:
            self._engine.optimizer.clip_grad = cfg.grad_norm

    @property
    def _lora(self) -> LoraConfig | None:
        return self._settings.learner.adapters

    def update(
        self, forest: TrainForest, objective: Objective = Objective.surrogate
    ) -> UpdateStats:
        """`updating`, from beginning to end."""
        going = self.updating(forest, objective)
        while True:
            try:
                next(going)
            except StopIteration as end:
                stats: UpdateStats = end.value
                return stats

    def updating(
        self, forest: TrainForest, objective: Objective = Objective.surrogate
    ) -> Generator[Progress, None, UpdateStats]:
        """One optimizer step per mini-batch (times `learner.epochs` for the surrogate); says after
        each pack how far it is.

        Old log-probabilities are the learner's own, of the weights before the first step: the first
        mini-batch takes them from its own forward pass (ratio exactly 1), the others from a pass
        over the same packs beforehand. Raises ValueError on token ids outside the vocabulary,
        FloatingPointError on all ranks if the loss or a gradient is not finite.
        """
        started = time.monotonic()
        self._engine.module.check_vocabulary(forest)
        surrogate = objective is Objective.surrogate
        plans = [plan(trees, self._rules(objective)) for trees in forest.minibatches]
        active = [
            [Pack(items) for items in planned.ranks[self._process.rank]]
            for planned in plans
            if not planned.empty
        ]
        if active and self._updates % speed.MEASURE_EVERY == 0:
            self._measure(active[0])
        self._updates += 1
        epochs = self._settings.learner.epochs if surrogate else 1
        scored = active[1:] + (active if self._settings.loss.kl_coef > 0 else [])
        passes = sum(map(len, active * epochs + (scored if surrogate else [])))
        progress = zip(count(1), repeat(passes), strict=False)
        if surrogate:
            yield from self._score(active, progress)
        steps: list[OptimizerStep] = []
        for packs in active * epochs:
            steps.append((yield from self._optimize(packs, objective, progress)))
        skipped = epochs * (len(plans) - len(active))
        seconds = time.monotonic() - started
        if not steps:
            return UpdateStats(skipped_steps=skipped, seconds=seconds)
        return summarize(
            steps,
            skipped_steps=skipped,
            forward_tokens=epochs * sum(planned.actual.tokens for planned in plans),
            seconds=seconds,
            mfu=epochs * self._mfu(plans, seconds),
            speedup_measured=self._speedup,
            **speed.savings(plans, self._cost),
        )

    def _mfu(self, plans: list[Plan], seconds: float) -> float:
        flops = speed.training_flops(plans, self._cost, frozen=self._lora is not None)
        return speed.mfu(flops, seconds, self._process.world_size)

    def _rules(self, objective: Objective) -> Rules:
        learner, loss, backend = self._settings.learner, self._settings.loss, self._form.backend
        shares = learner.packing is Packing.tree and backend is not None
        return Rules(
            max_tokens=learner.max_tokens_per_pack,
            world_size=self._process.world_size,
            cost=self._cost,
            share_gain=speed.SHARE_GAIN[backend] if shares and backend is not None else None,
            padded=backend is None,
            needs_advantage=objective is Objective.surrogate
            and loss.kl_coef == loss.entropy_advantage == 0,
        )

    def _measure(self, packs: list[Pack]) -> None:
        if self._form.backend is None or self._settings.learner.packing is Packing.flat:
            return
        budget = self._settings.learner.max_tokens_per_pack
        self._speedup = speed.measure(
            lambda inputs: self._engine(inputs, 1.0), packs, self._form, budget
        )

    def _score(
        self, minibatches: list[list[Pack]], progress: Iterator[Progress]
    ) -> Iterator[Progress]:
        """Store old log-probabilities of all mini-batches but the first, and the reference's."""
        for packs in minibatches[1:]:
            for pack in packs:
                pack.old_logp = self._forward(self._engine, pack)
                yield next(progress)
        if self._settings.loss.kl_coef > 0:
            with self._reference_policy() as reference:
                for packs in minibatches:
                    for pack in packs:
                        pack.ref_logp = self._forward(reference, pack)
                        yield next(progress)

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        """The policy that `kl_coef` holds on to: the one under the adapters, or a second one."""
        if self._lora is not None:
            with lora.disabled(self.model):
                yield self._engine
            return
        if self._reference is None:
            self._reference = build_reference(
                self._reference_folder,
                self._settings.model,
                self._settings.learner,
                self._device,
            )
        yield self._reference

    @torch.no_grad()
    def _forward(self, policy: Any, pack: Pack) -> Tensor:
        """Log-probabilities of a pack's scored tokens, for keeping."""
        inputs = collate(pack, self._form).inputs
        logp: Tensor = policy(inputs, self._settings.temperature)[0]
        return logp

    def _entropy_moments(self, packs: list[Pack]) -> tuple[Tensor, Tensor]:
        """`stats.entropy_moments` of the current policy over the mini-batch of all ranks."""
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.no_grad():
            for pack in packs:
                batch = collate(pack, self._form)
                entropy = self._engine(batch.inputs, self._settings.temperature)[1]
                seen.append((entropy, batch.weight, batch.copies))
        return entropy_moments(seen)

    def _loss(
        self, pack: Pack, objective: Objective, moments: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, LossStats, int]:
        """Loss of one pack, its statistics, and its tokens with padding."""
        batch = collate(pack, self._form)
        padded = batch.inputs.ids.numel()
        if objective is Objective.nll:
            logp, entropy = self._engine(batch.inputs, 1.0)
            return *nll_loss(logp, batch.weight, entropy), padded
        logp, entropy = self._engine(batch.inputs, self._settings.temperature)
        if pack.old_logp is None:
            pack.old_logp = logp.detach()
        tokens = TokenBatch(
            weight=batch.weight,
            advantage=batch.advantage,
            negative_advantage=batch.negative_advantage,
            clip_low=batch.clip_low,
            old_logp=pack.old_logp,
            rollout_logp=batch.rollout_logp,
            entropy=entropy,
            ref_logp=pack.ref_logp,
            normed_entropy=None if moments is None else ((entropy - moments[0]) / moments[1]),
        )
        return *surrogate_loss(logp, tokens, self._settings.clip, self._settings.loss), padded

    def _optimize(
        self, packs: list[Pack], objective: Objective, progress: Iterator[Progress]
    ) -> Generator[Progress, None, OptimizerStep]:
        """One optimizer step over this rank's packs of a mini-batch."""
        stats: list[LossStats] = []
        padded = 0
        weighs_entropy = objective is Objective.surrogate and self._settings.loss.entropy_advantage
        moments = self._entropy_moments(packs) if weighs_entropy else None
        for i, pack in enumerate(packs):
            self._engine.set_gradient_accumulation_boundary(i == len(packs) - 1)
            loss, pack_stats, tokens = self._loss(pack, objective, moments)
            # DeepSpeed averages over ranks, but the weights already are those of a global sum.
            self._engine.backward(loss * self._process.world_size, scale_wrt_gas=False)
            stats.append(pack_stats)
            padded += tokens
            yield next(progress)
        total = all_reduce(reduce(add, stats))
        finite = bool(torch.isfinite(total.loss))
        rate = learning_rate(self._optimizer_cfg, self._step, self._total_steps)
        self._set_rate(rate if finite else 0.0)
        norm = self._apply()
        if not finite or norm is None:
            what = "loss" if not finite else "gradient norm"
            raise FloatingPointError(
                f"optimizer step {self._step}: the {what} is not finite; the weights are as "
                "before the step"
            )
        self._step += 1
        return OptimizerStep(total, norm, rate, padded, len(packs))

    def _apply(self) -> float | None:
        """`optimizer.apply_gradients`."""
        limit = self._optimizer_cfg.grad_norm if self._clips_itself else None
        return apply_gradients(self._engine, limit)

    @property
    def _clips_itself(self) -> bool:
        return clips_itself(self._settings.model, self._settings.learner)

    def _set_rate(self, rate: float) -> None:
        for group in self._engine.basic_optimizer.param_groups:
            group["lr"] = rate

    def weight_buckets(
        self, max_bytes: int, *, everywhere: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """The policy's full tensors by Hugging Face name, in buckets of at most `max_bytes`,
        adapters merged into them.

        All ranks must iterate to the end together; rank 0 gets the tensors, others empty dicts
        unless `everywhere`. A bucket may be views of live weights: use it up before asking for the
        next.
        """
        rank, scale = 0 if everywhere else self._process.rank, lora.scale(self._lora)
        return export.weight_buckets(self.model, rank, max_bytes, scale)

    def offload(self) -> None:
        """Leave the device to others, all states in host memory; nothing but `onload` may follow.
        The reference policy is let go, and built again when it is needed."""
        self._reference = None
        resting.leave(self._engine)

    def onload(self) -> None:
        """Go on after `offload`."""
        resting.enter(self._engine)

    def export(self, path: str | Path) -> None:
        """Write a plain Hugging Face folder. Raises OSError on all ranks; never half a folder."""
        rank, scale = self._process.rank, lora.scale(self._lora)
        export.export(self.model, self._folder, Path(path), rank, scale)

    def save(self, path: str | Path, *, background: bool = False) -> None:
        """Checkpoint weights, optimizer, schedule and RNG to the folder `path`, replacing it whole.
        Raises OSError on all ranks (a full disk); what `path` held before then survives.

        `background`: return once they are copied; `finish_save` completes the folder, or raises.
        """
        assert self._saving is None, "finish_save() comes first"
        meta = {
            **self._signature(),
            "scale": lora.scale(self._lora),
            "step": self._step,
            "total_steps": self._total_steps,
            "reference": str(self._reference_folder),
        }
        if background:
            self._saving = checkpoint.BackgroundSave(self._engine, Path(path), meta)
        else:
            checkpoint.save(self._engine, Path(path), meta)

    def finish_save(self) -> None:
        """Wait for what `save` has left to the background."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.finish()

    def load(self, path: str | Path) -> None:
        """Continue exactly where `save` was called, on as many ranks bit by bit. Raises ValueError
        on a checkpoint of another model, precision or adapters, or none at all."""
        meta = checkpoint.load(self._engine, Path(path), self._signature())
        self._step, self._total_steps = meta["step"], meta["total_steps"]
        self._reference_folder, self._reference = Path(meta["reference"]), None

    def _signature(self) -> dict[str, Any]:
        return {
            "lora": None if self._lora is None else asdict(self._lora),
            **checkpoint.signature(self.model),
            "precision": self._settings.model.precision.value,
        }

    def close(self) -> None:
        """Leave the process group; the object is of no use afterwards."""
        self._engine.destroy()
        torch.distributed.destroy_process_group()
