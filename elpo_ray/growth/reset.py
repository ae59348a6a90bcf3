"""Completions from before the first wrong step of a failure: SRPO and RRPO (arXiv 2605.25507).

SRPO asks the policy itself which step that is, without telling it the right answer; RRPO draws it.
The wording of the question is this project's. A reply that names no step counts as the first one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from elpo_ray.config.growth import GrowthConfig, Locate
from elpo_ray.growth.bel import outcome
from elpo_ray.growth.independent import sample, sample_each
from elpo_ray.growth.pivot import Start, shared_out, start_of
from elpo_ray.interfaces import Rollout
from elpo_ray.tree import Branch, Localization, Probe
from elpo_ray.types import Message, Step

QUESTION = """\
Here is a problem, and an attempt at it in {count} steps. The final answer of the attempt is wrong.

Problem:
{problem}

Attempt:
{attempt}

In which step does the error originate? Name the first step that the problem and the steps before it
do not justify, not a later one where the error only shows. Do not solve the problem again. End with
exactly one number from 1 to {count}, in \\boxed{{}}."""
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NAMED = re.compile(r"[Ss]tep\s+(\d+)")


async def grow(rollout: Rollout, config: GrowthConfig) -> None:
    """Trajectories from the prompt; the first failed one is resumed before its wrong step; the
    rest, all if none failed, from the prompt."""
    cfg, tree = config.reset, rollout.tree
    roots = await sample(rollout, cfg.roots)
    parent = next((leaf for leaf in roots if outcome(tree, leaf) is False), None)
    if parent is None or not rollout.remaining:
        await sample(rollout, rollout.remaining)
        return
    wrong = await wrong_step(rollout, parent, config)
    (count,) = shared_out(rollout.remaining, cfg.resets, 1)
    starts = [start_of(rollout, parent, wrong - 1)] * count
    rest: list[Start] = [(0, None)] * (rollout.remaining - count)
    resets = (await sample_each(rollout, [*starts, *rest]))[:count]
    tree.branches.append(Branch(parent, wrong - 1, resets, resets))
    known = [seen for leaf in resets if (seen := outcome(tree, leaf)) is not None]
    probes = [Probe(wrong - 1, len(known), sum(known))] if wrong > 1 else []
    critical = tree.path(parent)[wrong - 1]
    tree.localizations.append(Localization(parent, critical, False, (wrong, wrong), probes))


async def wrong_step(rollout: Rollout, parent: int, config: GrowthConfig) -> int:
    """The step that is taken for the first wrong one, from 1 to K + 1."""
    cfg, steps = config.reset, rollout.tree.steps(parent)
    if cfg.locate is Locate.random:
        return rollout.random.randint(1, len(steps))
    asked = question(rollout.tree.messages, steps)
    reply = await rollout.ask(
        asked, temperature=cfg.temperature, top_p=cfg.top_p, max_tokens=cfg.max_tokens
    )
    return named_step(reply, len(steps))


def question(prompt: Sequence[Message], steps: Sequence[Step]) -> list[Message]:
    """What the policy is asked about a failed trajectory. It never holds the right answer."""
    problem = "\n".join(str(message["content"]) for message in prompt)
    parts = []
    for number, step in enumerate(steps, start=1):
        part = f"Step {number}: {step.action_text.strip()}"
        if step.result is not None:
            part += f"\nTool response: {step.observation_text.strip()}"
        parts.append(part)
    text = QUESTION.format(count=len(steps), problem=problem, attempt="\n".join(parts))
    return [{"role": "user", "content": text}]


def named_step(reply: str, count: int) -> int:
    """The number in the last box, if it is a step's; else that of the last "Step n"; else 1."""
    for found in (BOXED.findall(reply), NAMED.findall(reply)):
        last = found[-1].strip() if found else ""
        if last.isascii() and last.isdigit() and 1 <= int(last) <= count:
            return int(last)
        if last == "0" and found:
            return 1
    return 1
