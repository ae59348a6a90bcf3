"""Which settings of a continued run may change: every key has an answer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml

from elpo_ray.config import Config
from elpo_ray.config.compose import composed
from elpo_ray.config.continuing import CHANGE, Change, change_of, differences, settings_text
from elpo_ray.config.reference import keys

NAMES = [key.name for key in keys(Config)]


def quickstart(*words: str) -> Config:
    return composed(["+experiment=quickstart", *words])


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_classified(name: str) -> None:
    assert change_of(name) in Change


def test_every_entry_of_the_table_is_a_key_or_a_section_and_covers_a_key_alone() -> None:
    covered = Counter(
        entry for name in NAMES for entry in CHANGE if f"{name}.".startswith(f"{entry}.")
    )
    assert set(covered) == set(CHANGE)
    for name in NAMES:
        assert sum(f"{name}.".startswith(f"{entry}.") for entry in CHANGE) == 1, name


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("algorithm=grpo", Change.fork),
        ("learner.optimizer.lr=1e-3", Change.fork),
        ("trainer.seed=4", Change.fork),
        ("task.countdown.numbers=3", Change.fork),
        ("task.reward.options={}", None),
        ("model.max_context=2048", Change.fork),
        ("model.tiny.num_layers=9", Change.never),
        ("learner.lora.rank=4", Change.never),
        ("trainer.steps=40", Change.free),
        ("trainer.eval_every=1", Change.free),
        ("cluster.rollout_workers=3", Change.free),
        ("logging.tensorboard=true", Change.free),
        ("logging.trackers=[tensorboard]", Change.free),
        ("trainer.run_name=other", None),
        ("check_only=true", None),
    ],
)
def test_what_a_word_of_the_command_line_changes(word: str, change: Change | None) -> None:
    found = differences(settings_text(quickstart()), quickstart(word))
    assert {one.change for one in found} == (set() if change is None else {change})


def test_a_difference_names_key_and_both_values() -> None:
    (one,) = differences(settings_text(quickstart()), quickstart("trainer.seed=4"))
    assert str(one) == "trainer.seed=4 (was 0)"


def test_keys_of_other_versions_are_no_differences() -> None:
    saved: Any = yaml.safe_load(settings_text(quickstart()))
    del saved["trainer"]["eval_part"], saved["trainer"]["fork"]
    saved["trainer"]["gone"] = 1
    found = differences(yaml.safe_dump(saved), quickstart("trainer.eval_part=null"))
    assert found == []


def test_options_of_the_users_are_compared_one_by_one() -> None:
    own = ["task=reasoning_gym", "task.dataset=chain_sum", "model.path=a/b"]
    before = composed([*own, "task.options.min_terms=2", "task.options.max_terms=3"])
    now = composed([*own, "task.options.min_terms=2", "task.options.min_digits=1"])
    found = {str(one) for one in differences(settings_text(before), now)}
    assert found == {"task.options.max_terms=null (was 3)", "task.options.min_digits=1 (was null)"}


def test_a_path_may_be_written_in_another_way(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    own = ["task=jsonl", "model.path=a/b"]
    before = settings_text(composed([*own, "task.train_file=a.jsonl"]))
    assert differences(before, composed([*own, f"task.train_file={tmp_path}/a.jsonl"])) == []
    assert differences(before, composed([*own, "task.train_file=b.jsonl"]))


def test_a_fork_needs_a_run_to_go_on_from() -> None:
    with pytest.raises(ValueError, match=r"trainer\.fork='x': .*trainer\.resume"):
        quickstart("trainer.fork=x")
    with pytest.raises(ValueError, match=r"trainer\.run_name='y': .*leave run_name out"):
        quickstart("trainer.fork=x", "trainer.resume=runs/a", "trainer.run_name=y")
