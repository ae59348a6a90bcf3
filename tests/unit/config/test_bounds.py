"""Whatever value is out of bounds, the error names the key that the user wrote."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from math import inf, nan
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from elpo_ray.config import Config
from elpo_ray.config.compose import typed
from elpo_ray.config.learner import ColdStartConfig, LearnerConfig, OptimizerConfig
from elpo_ray.config.measure import AnalyzeConfig, EvaluateConfig
from elpo_ray.config.rules import Bound, above, at_least, between, bounds, check
from launch.config import KubeRayConfig, SlurmConfig

MEASURED = {"model": "m", "tasks": ["t"]}
ROOTS: dict[Any, tuple[int, dict[str, Any]]] = {
    Config: (90, {}),
    EvaluateConfig: (25, MEASURED),
    AnalyzeConfig: (60, MEASURED),
    SlurmConfig: (7, {}),
    KubeRayConfig: (4, {}),
}
"""Each command's schema, the fewest bounds that it may have, and the keys that must be set."""


def bounded(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any, Bound]]:
    """(key, type, bound) of every value with a bound."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        key, kind = prefix + field.name, hints[field.name]
        if is_dataclass(kind):
            yield from bounded(kind, f"{key}.")
        elif (bound := bounds(schema)[field.name]) is not None:
            yield key, kind, bound


def wrong(kind: Any, bound: Bound) -> Iterator[Any]:
    """Values of a type that are out of bounds."""
    low = bound.low if "(" in bound.ends else bound.low - 1
    numbers = [low, *([] if bound.high == inf else [bound.high + 1])]
    if "float" in str(kind):
        numbers += [inf, -inf, nan]
    length = {"list": 1, "tuple": 2}
    times = next((n for name, n in length.items() if name in str(kind)), None)
    yield from numbers if times is None else ([number] * times for number in numbers)


@pytest.mark.parametrize("root", ROOTS)
def test_every_value_out_of_bounds_is_blamed_under_its_own_key(root: Any) -> None:
    found, (least, needed) = list(bounded(root)), ROOTS[root]
    assert len(found) >= least
    composed = OmegaConf.merge(OmegaConf.structured(root), needed)
    for key, kind, bound in found:
        default = deepcopy(OmegaConf.select(composed, key))
        for value in wrong(kind, bound):
            OmegaConf.update(composed, key, value)
            with pytest.raises(ValueError) as error:
                OmegaConf.to_object(composed)
            said, remedy = str(error.value).split(": ", 1)
            assert said.startswith(f"{key}={str(value)[:2]}"), said
            assert remedy.startswith(bound.remedy)
            assert ("or null" in remedy) == (type(None) in get_args(kind))
        OmegaConf.update(composed, key, default)
    assert isinstance(OmegaConf.to_object(composed), root)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ("learner.minibatch_inputs=3", "learner.minibatch_inputs=3"),
        ("learner.max_tokens_per_pack=100", "learner.max_tokens_per_pack=100"),
        ("cold_start.max_tokens=99999", "learner.max_tokens_per_pack=32768"),
        ("task.max_turn_tokens=20480", "task.max_turn_tokens=20480"),
        ("budget.scope=batch budget.min=17", "budget.min=17"),
        ("budget.scope=batch budget.max=7", "budget.max=7"),
        ("budget.scope=batch algorithm.growth.rule=independent", "budget.scope='batch'"),
        ("cluster.colocated=true cluster.learner_ranks=2", "cluster.colocated=True"),
        ("engine.transfer=ipc", "engine.transfer='ipc'"),
        ("task.name=jsonl", "model.path=None"),
        ("model.tiny.num_kv_heads=3", "model.tiny.num_kv_heads=3"),
        ("model.tiny.hidden_size=100", "model.tiny.hidden_size=100"),
        ("task.countdown.low=10", "task.countdown.low=10"),
        ("task.countdown.max_value=8", "task.countdown.max_value=8"),
        ("task.countdown.operators=/", "task.countdown.operators='/'"),
        ("task.reward.overlong_buffer=20481", "task.reward.overlong_buffer=20481"),
        ("task=jsonl task.eval_sets=[math] task.eval_file=x", "task.eval_sets=['math']"),
        ("task.contest_until=tomorrow", "task.contest_until='tomorrow'"),
        ("sandbox.endpoint=ftp://x", "sandbox.endpoint='ftp://x'"),
        ("learner.lora.target_modules=[]", "learner.lora.target_modules=[]"),
        ("algorithm.clip.eps_elc=0.8", "algorithm.clip.eps_elc=0.8"),
        ("algorithm.credit.attribution=each", "algorithm.credit.attribution='each'"),
        ("algorithm.growth.bel.x_min=4", "algorithm.growth.bel.x_max=3"),
        ("algorithm.growth.bel.entropy_tokens=0", "algorithm.growth.bel.entropy_tokens=0"),
        (
            "algorithm.growth.rule=random_branch algorithm.growth.random.chains=5",
            "algorithm.growth.random.trees=4",
        ),
    ],
)
def test_values_that_do_not_go_together_are_blamed_under_their_own_key(
    changes: str, key: str
) -> None:
    with pytest.raises(ValueError) as error:
        typed(Config, OmegaConf.from_dotlist(changes.split()))
    assert str(error.value).startswith(f"{key}: ")


def test_a_section_that_stands_in_two_places_is_blamed_where_it_stands() -> None:
    optimizer = OptimizerConfig(lr=-1)
    with pytest.raises(ValueError, match=r"^cold_start\.optimizer\.lr=-1: use a value above 0$"):
        ColdStartConfig(optimizer=optimizer)
    with pytest.raises(ValueError, match=r"^learner\.optimizer\.lr=-1: use a value above 0$"):
        LearnerConfig(optimizer=optimizer)
    with pytest.raises(ValueError, match=r"^mine\.lr=-1: "):
        check(optimizer, "mine")


def test_a_value_changed_later_is_found_when_the_whole_is_checked() -> None:
    config = Config()
    config.cold_start.optimizer.warmup_ratio = nan
    with pytest.raises(ValueError, match=r"^cold_start\.optimizer\.warmup_ratio=nan: .*\[0, 1\]$"):
        check(config, "")


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (at_least(1), [1, 10**400, None, [], (1, 2)], [0, inf, nan, [1, 0]]),
        (above(0), [1e-300, 7], [0, -1.0, inf, nan]),
        (between(0, 1), [0, 0.5, 1], [-1e-9, 1 + 1e-9, inf, nan]),
        (between(0, 1, ends="(]"), [1], [0]),
        (between(0, 1, ends="[)"), [0], [1, (0, 1)]),
    ],
)
def test_the_ends_of_a_bound(bound: Bound, inside: list[Any], outside: list[Any]) -> None:
    assert all(bound.holds(value) for value in inside)
    assert not any(bound.holds(value) for value in outside)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algorithm.growth.posterior.beta", [0.6]),
        ("algorithm.growth.posterior.beta", [0.6, 1.0, 1.0]),
        ("algorithm.loss.icepop", [0.5]),
        ("learner.optimizer.betas", [0.9]),
        ("learner.optimizer.betas", []),
    ],
)
def test_a_pair_is_two_values(key: str, value: list[float]) -> None:
    composed = OmegaConf.structured(Config)
    assert OmegaConf.select(composed, key, default=0) != 0
    OmegaConf.update(composed, key, value)
    with pytest.raises(ValueError, match=rf"^{key}=\[.*\]: give 2 values$"):
        typed(Config, composed)
