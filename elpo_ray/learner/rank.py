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

from elpo_ray.config.learner import LoraConfig, OptimizerConfig
from elpo_ray.forest.planning import Plan, plan
from elpo_ray.forest.trees import TrainForest
from elpo_ray.learner import backend, checkpoint, export, lora, speed
from elpo_ray.learner.backend import LearnerSettings, RankProcess
from elpo_ray.learner.batching import Pack
from elpo_ray.learner.loss import LossStats, Objective
from elpo_ray.learner.passes import Passes
from elpo_ray.learner.stats import OptimizerStep, UpdateStats, all_reduce, summarize
from elpo_ray.models.folder import local_folder

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
        self._reference_folder = local_folder(folder)
        self._settings = settings
        self._process = process
        self._device = backend.join_group(process)
        torch.manual_seed(seed)
        self._optimizer_cfg = settings.learner.optimizer
        self._total_steps = total_steps
        self._step = 0  # optimizer steps taken under the current schedule
        self._engine = self._load(self._reference_folder)
        self._reference: Any = None
        self._passes = Passes.of(self._engine.module, settings, self._device, process.world_size)
        self._saving: checkpoint.BackgroundSave | None = None
        self._updates = 0
        self._speedup = 0.0

    def _load(self, folder: Path) -> Any:
        settings = self._settings
        self._folder = folder
        return backend.build_engine(folder, settings.model, settings.learner, self._optimizer_cfg)

    @property
    def model(self) -> PreTrainedModel:
        """The Hugging Face model; under ZeRO-3 its parameters are shards."""
        model: PreTrainedModel = self._engine.module.model
        return model

    def reset_optimizer(
        self, cfg: OptimizerConfig, total_steps: int, reference: str | Path | None = None
    ) -> None:
        """Begin another phase (RL after the cold start) with the weights as they are: moments and
        schedule start afresh. `reference` = folder of the reference policy from now on; adapters
        are its difference from the policy, so with `learner.lora.rank` it must hold the weights as
        they are, and new adapters start on it."""
        self._optimizer_cfg, self._total_steps, self._step = cfg, total_steps, 0
        if reference is not None:
            self._reference_folder, self._reference = local_folder(reference), None
            if self._lora is not None and self._reference_folder != self._folder:
                self._engine.destroy()
                self._engine = None
                gc.collect()  # the old weights make room
                self._engine = self._load(self._reference_folder)
        backend.restart(self._engine.basic_optimizer, cfg)
        if not self._clips_itself:
            self._engine.optimizer.clip_grad = cfg.grad_norm

    @property
    def _lora(self) -> LoraConfig | None:
        return self._settings.learner.adapters

    def update(
        self, forest: TrainForest, objective: Objective = Objective.surrogate
    ) -> Iterator[Progress | UpdateStats]:
        """Take one optimizer step per mini-batch (times `learner.epochs` for the surrogate). Yields
        after each pack how many are done, and last of all the statistics; must be iterated to its
        end.

        Old log-probabilities are the learner's own, of the weights before the first step: the first
        mini-batch takes them from its own forward pass (ratio exactly 1), the others from a pass
        over the same packs beforehand. Raises ValueError on token ids outside the vocabulary,
        FloatingPointError on all ranks if the loss or a gradient is not finite.
        """
        started = time.monotonic()
        self._engine.module.check_vocabulary(forest)
        surrogate = objective is Objective.surrogate
        plans = [plan(trees, self._passes.rules(objective)) for trees in forest.minibatches]
        active = [
            [Pack(items) for items in planned.ranks[self._process.rank]]
            for planned in plans
            if not planned.empty
        ]
        if active and self._updates % speed.MEASURE_EVERY == 0:
            self._speedup = self._passes.measured_speedup(self._engine, active[0])
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
            yield UpdateStats(skipped_steps=skipped, learner_seconds=seconds)
            return
        yield summarize(
            steps,
            skipped_steps=skipped,
            forward_tokens=epochs * sum(planned.actual.tokens for planned in plans),
            seconds=seconds,
            mfu=epochs * self._mfu(plans, seconds),
            speedup_measured=self._speedup,
            **speed.savings(plans, self._passes.cost),
        )

    def _mfu(self, plans: list[Plan], seconds: float) -> float:
        flops = speed.training_flops(plans, self._passes.cost, frozen=self._lora is not None)
        return speed.mfu(flops, seconds, self._process.world_size)

    def _score(
        self, minibatches: list[list[Pack]], progress: Iterator[Progress]
    ) -> Iterator[Progress]:
        """Store old log-probabilities of all mini-batches but the first, and the reference's."""
        for packs in minibatches[1:]:
            for pack in packs:
                pack.old_logp = self._passes.log_probs(self._engine, pack)
                yield next(progress)
        if self._settings.loss.kl_coef > 0:
            with self._reference_policy() as reference:
                for packs in minibatches:
                    for pack in packs:
                        pack.ref_logp = self._passes.log_probs(reference, pack)
                        yield next(progress)

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        """The policy of the KL penalty: the one under the adapters, or a second one."""
        if self._lora is not None:
            with lora.disabled(self.model):
                yield self._engine
            return
        if self._reference is None:
            self._reference = backend.build_reference(
                self._reference_folder,
                self._settings.model,
                self._settings.learner,
                self._device,
            )
        yield self._reference

    def _optimize(
        self, packs: list[Pack], objective: Objective, progress: Iterator[Progress]
    ) -> Generator[Progress, None, OptimizerStep]:
        """One optimizer step over this rank's packs of a mini-batch."""
        stats: list[LossStats] = []
        padded = 0
        weighs_entropy = objective is Objective.surrogate and self._settings.loss.entropy_advantage
        moments = self._passes.entropy_moments(self._engine, packs) if weighs_entropy else None
        for i, pack in enumerate(packs):
            self._engine.set_gradient_accumulation_boundary(i == len(packs) - 1)
            loss, pack_stats, tokens = self._passes.loss(self._engine, pack, objective, moments)
            # DeepSpeed averages over ranks, but the weights already are those of a global sum.
            self._engine.backward(loss * self._process.world_size, scale_wrt_gas=False)
            stats.append(pack_stats)
            padded += tokens
            yield next(progress)
        total = all_reduce(reduce(add, stats))
        finite = bool(torch.isfinite(total.loss))
        rate = backend.learning_rate(self._optimizer_cfg, self._step, self._total_steps)
        norm = self._apply(rate if finite else 0.0)
        if not finite or norm is None:
            what = "loss" if not finite else "gradient norm"
            raise FloatingPointError(
                f"optimizer step {self._step}: the {what} is not finite; the weights are as "
                "before the step"
            )
        self._step += 1
        return OptimizerStep(total, norm, rate, padded, len(packs))

    def _apply(self, rate: float) -> float | None:
        """`backend.apply_gradients`."""
        limit = self._optimizer_cfg.grad_norm if self._clips_itself else None
        return backend.apply_gradients(self._engine, rate, limit)

    @property
    def _clips_itself(self) -> bool:
        return backend.clips_itself(self._settings.model, self._settings.learner)

    def weight_buckets(
        self, max_bytes: int, *, everywhere: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """The policy's full tensors by Hugging Face name, in buckets of at most `max_bytes`,
        adapters merged into them.

        All ranks must iterate to the end together; rank 0 gets the tensors, others empty dicts
        unless `everywhere`. A bucket may be views of live weights: use it up before asking for the
        next.
        """
        materialize = everywhere or self._process.rank == 0
        return export.weight_buckets(
            self.model, max_bytes, lora.scale(self._lora), materialize=materialize
        )

    def offload(self) -> None:
        """Move all states to host memory and leave the device to others; nothing but `onload` may
        follow. The reference policy is dropped, and built again when it is needed."""
        self._reference = None
        backend.offload(self._engine)

    def onload(self) -> None:
        """Go on after `offload`."""
        backend.onload(self._engine)

    def export(self, path: str | Path) -> None:
        """Write a plain Hugging Face folder. Raises OSError on all ranks; never half a folder."""
        scale, writes = lora.scale(self._lora), self._process.rank == 0
        export.export(self.model, self._folder, Path(path), scale, materialize=writes)

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
