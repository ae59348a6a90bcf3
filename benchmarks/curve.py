"""Trains on the same trees twice: with shared prefixes and as flat sequences.

    python benchmarks/curve.py runs/NAME --model FOLDER [--steps 5]

Reads the dumped trees of a run (`logging.dump_tokens=true`) and the model that the run began with.
Two new learners then take the steps of the run, one with learner.packing=tree and one with flat.
Prints one JSON object: loss, gradient norm and seconds of every step with both, and the largest
differences, which should be rounding errors. Credit is assigned once, so both get the same forest.
Dumped log-probabilities have 4 decimals, which affects only the mismatch statistics and
corrections.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from elpo_ray.chat.template import Chat  # noqa: E402
from elpo_ray.config import Config  # noqa: E402
from elpo_ray.config.learner import Packing  # noqa: E402
from elpo_ray.credit import assign  # noqa: E402
from elpo_ray.dump import read_line  # noqa: E402
from elpo_ray.forest.trees import TrainForest, pack  # noqa: E402
from elpo_ray.learner.backend import LearnerSettings, RankProcess  # noqa: E402
from elpo_ray.learner.rank import LearnerRank  # noqa: E402
from elpo_ray.tools.catalog import schemas  # noqa: E402
from elpo_ray.tree import RolloutTree  # noqa: E402
from elpo_ray.types import FinishReason, Step, Turn  # noqa: E402

SECTIONS = ["model", "task", "algorithm", "learner", "sampling", "trainer", "cluster"]
"""The sections of a run's configuration on which its updates depend."""


def with_tokens(tree: RolloutTree, chat: Chat) -> RolloutTree:
    """A dumped tree with its tokens: the sampled ones as dumped, those of prompt and observations
    encoded again."""
    if not tree.messages:
        raise ValueError(f"tree {tree.task_id}: no messages; dump it with logging.dump_tokens=true")
    tree.prompt_ids = tuple(chat.prompt_ids(tree.messages))
    for node in tree.nodes[1:]:
        seen = node.extra.get("observation")
        ids = () if seen is None else tuple(chat.observation_ids(seen))
        counted = node.extra.get("num_observation_tokens", 0)
        if len(ids) != counted:
            raise ValueError(
                f"tree {tree.task_id}: node {node.label} observed {counted} tokens, {len(ids)} "
                "with this tokenizer; give the model that the run began with"
            )
        turn = Turn(
            token_ids=tuple(node.extra["token_ids"]),
            logprobs=tuple(node.extra["token_logprobs"]),
            entropies=tuple(node.extra["token_entropies"]),
            finish=FinishReason.STOP,
            weight_version=node.extra["weight_version"],
        )
        node.step = Step(turn=turn, observation_ids=ids, observation_text=seen or "")
    return tree


def forests(run: Path, config: Config, model: Path, steps: int) -> list[TrainForest]:
    chat = Chat.from_folder(str(model), schemas(config.task, config.sandbox))
    found = []
    for dump in sorted((run / "trees").glob("step_*.jsonl"))[:steps]:
        lines = dump.read_text(encoding="utf-8").splitlines()
        trees = [with_tokens(read_line(line), chat) for line in lines]
        credits = assign(trees, config.algorithm)
        found.append(pack(trees, credits, config.algorithm.loss, config.learner))
    return found


def train(
    config: Config, model: Path, batches: list[TrainForest], packing: Packing, sender: Any
) -> None:
    """Take the steps with one rank on the CPU and send the statistics of each."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = LearnerSettings(
        model=config.model,
        learner=replace(config.learner, packing=packing),
        clip=config.algorithm.clip,
        loss=config.loss,
        temperature=config.sampling.temperature,
    )
    process = RankProcess(master_port=port)
    learner = LearnerRank(model, settings, process, total_steps=config.optimizer_steps)
    sender.send([vars(list(learner.update(batch))[-1]) for batch in batches])
    learner.close()


def alone(*arguments: Any) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=train, args=(*arguments, sender))
    process.start()
    sender.close()
    result: list[dict[str, Any]] = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("--model", type=Path, required=True, help="the folder that it began with")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    saved = OmegaConf.masked_copy(OmegaConf.load(arguments.run / "config.yaml"), SECTIONS)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    assert isinstance(config, Config)
    batches = forests(arguments.run, config, arguments.model, arguments.steps)
    curves = {
        packing.value: alone(config, arguments.model, batches, packing) for packing in Packing
    }
    pairs = list(zip(curves["tree"], curves["flat"], strict=True))
    report: dict[str, Any] = {
        name: {
            key: [step[key] for step in curve] for key in ("loss", "grad_norm", "learner_seconds")
        }
        for name, curve in curves.items()
    }
    report |= {
        f"largest_{key}_difference": max(abs(tree[key] - flat[key]) for tree, flat in pairs)
        for key in ("loss", "grad_norm")
    }
    report["r_tok"] = [tree["r_tok"] for tree, _ in pairs]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
