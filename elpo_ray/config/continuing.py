"""What a setting means to a run that is continued: which may change, and which may not.

`CHANGE` names every key of a run, or a section whose keys are all alike. A test holds it complete.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

from omegaconf import OmegaConf

from elpo_ray.config import Config
from elpo_ray.config.reference import keys
from elpo_ray.config.values import expanded, flattened


class Change(Enum):
    """What a continued run makes of another value."""

    never = "never"
    """The weights of the checkpoint have another form, so that nothing can go on from it."""
    fork = "fork"
    """Other things would be learned from here on: only under another name (`trainer.fork`)."""
    free = "free"
    """Where and how fast it runs, what it writes and how it is measured: at any time."""
    name = "name"
    """What a run is called and how it is started; never compared."""


_KEYS = {
    Change.never: "model.path model.tiny learner.lora",
    Change.fork: """
        model.tool_parser model.template_options model.max_context model.precision
        task.name task.options task.dataset task.reward.name task.reward.options
        task.reward.success_above task.reward.exact_output task.reward.overlong_buffer
        task.reward.overlong_limit task.reward.overlong_factor task.reward.format_penalty
        task.reward.tool_error_penalty task.reward.tool_bonus task.train_file
        task.demonstrations_file task.tools task.tool_timeout_s task.max_turns task.max_turn_tokens
        task.max_observation_chars task.countdown
        algorithm sampling schedule budget
        sandbox.wall_s sandbox.cpu_s sandbox.memory_mib sandbox.output_kib sandbox.preload
        sandbox.stateless sandbox.last_line
        learner.minibatch_inputs learner.epochs learner.optimizer
        cold_start.enabled cold_start.epochs cold_start.batch_size cold_start.max_tokens
        cold_start.cut_longer cold_start.optimizer cold_start.steps
        trainer.inputs_per_step trainer.seed
    """,
    Change.free: """
        model.num_parameters
        task.reward.timeout_s task.reward.grader_cpu_s task.reward.graders
        task.eval_file task.branching task.tool_actors task.env task.data_dir task.modules
        task.eval_sets task.contest_from task.contest_until task.eval_problems task.eval_samples
        task.expected_episode_tokens
        engine cluster logging
        sandbox.isolation sandbox.allow_degraded sandbox.bubblewrap sandbox.endpoint
        sandbox.snapshot_mib sandbox.replay_below_ms sandbox.retries sandbox.max_failure_rate
        learner.zero_stage learner.max_tokens_per_pack learner.packing learner.attention
        learner.gradient_checkpointing learner.offload_optimizer
        cold_start.cache
        trainer.steps trainer.checkpoint_every trainer.keep_checkpoints
        trainer.background_checkpoints trainer.eval_every trainer.eval_part
    """,
    Change.name: """
        experiment check_only trainer.run_dir trainer.run_name trainer.resume trainer.fork
    """,
}
CHANGE = {key: change for change, names in _KEYS.items() for key in names.split()}
_PATHS = ("model.path", "task.train_file", "task.demonstrations_file", "task.eval_file")
"""Keys whose values are the same if they name the same place."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that is not what it was."""

    key: str
    before: Any
    now: Any
    change: Change

    def __str__(self) -> str:
        return f"{self.key}={_text(self.now)} (was {_text(self.before)})"


def change_of(key: str) -> Change:
    """What another value of a dotted key means; KeyError for a key that no entry covers."""
    part = key
    while part not in CHANGE and "." in part:
        part = part.rpartition(".")[0]
    return CHANGE[part]


def differences(saved: str, config: Config) -> list[Difference]:
    """The settings in which `config` is not what the text of a `config.yaml` says, names left out.
    A key that the text does not have, since its version did not, had the default."""
    before, now = _flat(saved), _flat(settings_text(config))
    defaults = _flat(OmegaConf.to_yaml(OmegaConf.structured(Config)))
    schema = {key.name for key in keys(Config)}
    found = []
    for key in dict.fromkeys([*now, *before]):
        if not any(part in schema for part in accumulate(key.split("."), "{}.{}".format)):
            continue  # a key of another version
        old, new, change = before.get(key, defaults.get(key)), now.get(key), change_of(key)
        if change is not Change.name and old != new and not _same_place(key, old, new):
            found.append(Difference(key, old, new, change))
    return found


def settings_text(config: Config) -> str:
    """The text of a run's `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _flat(text: str) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.create(text))
    return flattened(expanded(values))


def _same_place(key: str, old: Any, new: Any) -> bool:
    if key not in _PATHS or not isinstance(old, str) or not isinstance(new, str):
        return False
    return os.path.realpath(old) == os.path.realpath(new)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
