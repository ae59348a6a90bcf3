"""Short forms of a configuration, names of parts, and options of the user's own."""

from __future__ import annotations

import pytest

from elpo_ray.config.compose import composed
from elpo_ray.config.values import expanded


def test_a_reward_as_one_value_is_its_name() -> None:
    config = composed(["task=jsonl", "model.path=a/b", "task.reward=shop:reward"])
    assert config.task.reward.name == "shop:reward"
    assert expanded({"task": {"reward": "verify"}}) == {"task": {"reward": {"name": "verify"}}}
    old = {"task": {"reward": {"name": "verify", "function": None}}}
    assert expanded(old) == {"task": {"reward": {"name": "verify"}}}


def test_options_need_no_sign() -> None:
    words = ["algorithm.growth.rule=m:grow", "algorithm.growth.options.width=3"]
    assert composed(words).algorithm.growth.options == {"width": 3}
    whole = composed(["algorithm.credit.rule=m:parts", "algorithm.credit.options={by: 2}"])
    assert whole.algorithm.credit.options == {"by": 2}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("algorithm.growth.rule=bell", "did you mean bel.*name your own as module:attribute"),
        ("algorithm.credit.rule=grup", "did you mean group.*module:attribute"),
        ("task.name=cuntdown", "did you mean countdown.*module:attribute"),
        ("task.reward=verif", "did you mean verify.*module:attribute"),
        ("task.eval_sets=[aime]", r"did you mean aime25 or aime24\? Else use one of"),
        ("task.reward.function=a:b", "write task.reward=module:function"),
        ("algorithm.growth.options.a=1", "rule=bel has none"),
        ("logging.trackers=[tensorbord]", "did you mean tensorboard"),
    ],
)
def test_a_mistyped_name_is_one_line_with_the_nearest(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        composed([word])
    assert "\n" not in str(caught.value)
