"""Update time and memory: trees with shared prefixes against the same leaves as flat sequences.

    python benchmarks/learner.py [--only NAME] [--trees runs/NAME/trees/step_00010.jsonl]
        [--out learner.json]

Prints one JSON object at its end, and a line of JSON to stderr after every pass. `--only` takes the
parts whose names contain it: cases, `head` and, on a GPU, `agreement`. Every comparison is made
within one run. It times forward and backward passes of one mini-batch over the same leaves,
with the learner's own planning, packing, attention and head. The variants alternate, and the best
of `--rounds` counts; speed-ups are over the fastest variant without sharing. `flat` = the leaves as
sequences side by side, `rows` = right-padded rows under the stock attention, `tree` = shared
prefixes, `chosen` = what the learner decides. On CPU, seconds are processor time, and every pass
runs in a process of its own so that its peak memory can be measured. On a GPU a model in the shape
of Qwen2.5-1.5B runs in bf16 with every attention backend. `--seconds` bounds each case: no further
round begins after so long.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from elpo_ray.config.algorithm import ClipConfig, LossConfig
from elpo_ray.config.learner import AttentionBackend
from elpo_ray.forest.layout import lay_out
from elpo_ray.forest.planning import Plan, PlanRules, plan
from elpo_ray.forest.trees import TrainTree, leaf_weights
from elpo_ray.learner.attention import IMPLEMENTATION
from elpo_ray.learner.batching import BatchLayout, Pack, collate
from elpo_ray.learner.loss import TokenBatch, surrogate_loss
from elpo_ray.learner.policy import LogProbHead, PolicyModule
from elpo_ray.learner.speed import SHARE_GAIN, savings

PROMPT_TOKENS = 62
"""Length of the quickstart's prompts; dumps hold only the steps."""

MODELS = {
    "quickstart": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
                   "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 450},
    "hidden 384": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4,
                   "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 2048},
    "Qwen2.5-1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
}  # fmt: skip


# --- trees --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """A node: its parent, its sampled and its observed tokens. Node 0 is the prompt."""

    parent: int
    actions: int
    observed: int


def grown(
    rng: np.random.Generator, prompt: int, step: tuple[int, int], full: int, anchors: list[int]
) -> list[Sizes]:
    """A tree of 16 leaves: `full` trajectories of 4 to 7 steps, then branches of the first one that
    start at each of `anchors` in turn. Step lengths vary by 40 %."""
    nodes = [Sizes(-1, 0, prompt)]
    first: list[int] = [0]

    def extend(at: int, steps: int) -> list[int]:
        path = []
        for number in range(steps):
            scale = rng.uniform(0.6, 1.4, 2)
            seen = 0 if number == steps - 1 else max(1, int(step[1] * scale[1]))
            nodes.append(Sizes(at, max(1, int(step[0] * scale[0])), seen))
            at = len(nodes) - 1
            path.append(at)
        return path

    for number in range(full):
        path = extend(0, int(rng.integers(4, 8)))
        first += path if number == 0 else []
    for number in range(16 - full):
        anchor = min(anchors[number % len(anchors)], len(first) - 2)
        extend(first[anchor], int(rng.integers(2, 5)))
    return nodes


def dumped(path: Path) -> Iterator[list[Sizes]]:
    """The trees of a run's dump."""
    for line in path.read_text().splitlines():
        records = json.loads(line)["nodes"]
        place = {record["id"]: i for i, record in enumerate(records)}
        yield [
            Sizes(-1, 0, PROMPT_TOKENS)
            if record["parent"] is None
            else Sizes(
                place[record["parent"]],
                record["num_action_tokens"],
                record.get("num_observation_tokens", 0),
            )
            for record in records
        ]


def train_trees(shapes: list[list[Sizes]], vocabulary: int, seed: int) -> list[TrainTree]:
    """Random tokens and advantages, weighted by Eq. 1 over all leaves."""
    rng = np.random.default_rng(seed)
    trees = []
    for nodes in shapes:
        start = np.cumsum([0, *(n.actions + n.observed for n in nodes)]).astype(np.int32)
        agent = np.zeros(start[-1], dtype=np.bool_)
        for i, node in enumerate(nodes):
            agent[start[i] : start[i] + node.actions] = True
        parents = {node.parent for node in nodes}
        leaves = [i for i in range(len(nodes)) if i not in parents]
        advantage = rng.normal(size=len(nodes))
        advantage[0] = 0
        trees.append(
            TrainTree(
                ids=rng.integers(0, vocabulary, start[-1]).astype(np.int32),
                agent=agent,
                rollout_logp=np.where(agent, -np.log(vocabulary), 0).astype(np.float32),
                node_start=start,
                node_parent=np.array([node.parent for node in nodes], dtype=np.int32),
                advantage=advantage,
                negative_advantage=np.maximum(-advantage, 0),
                share=np.ones(len(nodes)),
                clip_low=rng.choice([0.8, 0.685], len(nodes)),
                leaves=np.array(leaves, dtype=np.int32),
                leaf_weight=np.zeros(len(leaves)),
            )
        )
    counts = [int(t.agent[s].sum()) for t in trees for s in t.sequences()]
    ends = np.cumsum([len(tree.leaves) for tree in trees])[:-1]
    weights = np.split(leaf_weights(counts, LossConfig()), ends)
    return [replace(tree, leaf_weight=w) for tree, w in zip(trees, weights, strict=True)]


# --- one pass -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and a mini-batch."""

    name: str
    model: str
    shapes: list[list[Sizes]]
    max_tokens: int


@dataclass(frozen=True)
class Variant:
    name: str
    backend: AttentionBackend | None
    share_gain: float | None


CPU_VARIANTS = [
    Variant("rows", None, None),
    Variant("flat", AttentionBackend.blocks, None),
    Variant("tree", AttentionBackend.blocks, 0.0),
    Variant("chosen", AttentionBackend.blocks, SHARE_GAIN[AttentionBackend.blocks]),
]
GPU_VARIANTS = [
    Variant(f"{name} {backend.value}", backend, gain)
    for backend in (AttentionBackend.paths, AttentionBackend.flex, AttentionBackend.blocks)
    for name, gain in (("flat", None), ("tree", 0.0))
]


def build_policy(name: str, device: torch.device, dtype: torch.dtype) -> PolicyModule:
    torch.manual_seed(0)
    config = Qwen2Config(
        **MODELS[name], max_position_embeddings=32768, tie_word_embeddings=True, dtype=dtype
    )
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(dtype).train()
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModule(model)


class Bench:
    """A case that is ready for a pass in any variant."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.policy = build_policy(case.model, device, dtype)
        self.cost = self.policy.cost()
        self.trees = train_trees(case.shapes, MODELS[case.model]["vocab_size"], seed=0)

    def planned(self, variant: Variant) -> Plan:
        rules = PlanRules(
            max_tokens=self.case.max_tokens,
            world_size=1,
            cost=self.cost,
            share_gain=variant.share_gain,
            padded=variant.backend is None,
        )
        return plan(self.trees, rules)

    def update(self, variant: Variant) -> dict[str, Any]:
        """Plan, forward and backward of the whole mini-batch."""
        implementation = "sdpa" if variant.backend is None else IMPLEMENTATION
        self.policy.model.set_attn_implementation(implementation)
        self.policy.zero_grad(set_to_none=True)
        layout = BatchLayout(self.device, variant.backend, self.dtype)
        loss = 0.0
        with Meter(self.device) as meter:
            planned = self.planned(variant)
            for items in planned.ranks[0]:
                batch = collate(Pack(items), layout)
                logp, entropy = self.policy(batch.inputs, 1.0)
                tokens = TokenBatch(columns=batch.columns, old_logp=logp.detach(), entropy=entropy)
                part, _ = surrogate_loss(logp, tokens, ClipConfig(), LossConfig())
                part.backward()
                loss += part.item()
        grads = [p.grad for p in self.policy.parameters() if p.grad is not None]
        return meter.result | {
            "loss": loss,
            "grad_norm": float(torch.nn.utils.get_total_norm(grads)),
            "tokens": planned.actual.tokens,
            "packs": len(planned.ranks[0]),
        }


class Meter:
    """Seconds (of the processor on CPU) and peak memory of a block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.result: dict[str, float] = {}

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.memory = float(torch.cuda.memory_allocated())
            self.start = time.perf_counter()
        else:
            self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
            self.start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.start
            peak = float(torch.cuda.max_memory_allocated())
        else:
            seconds = time.process_time() - self.start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
        self.result = {"seconds": seconds, "peak_mb": (peak - self.memory) / 1e6}


def alone(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)` in a forked process, whose peak memory is its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()  # or nothing would ever come from a process that has died
    result = receiver.recv()
    process.join()
    return result


# --- comparisons --------------------------------------------------------------------------------


def tell(**figures: Any) -> None:
    print(json.dumps(figures), file=sys.stderr, flush=True)


def compare(
    case: Case, variants: list[Variant], rounds: int, device: torch.device, seconds: float = 1e9
) -> dict[str, Any]:
    """Rounds of passes until so many are made, or so many seconds are over."""
    gpu, began = device.type == "cuda", time.perf_counter()
    bench = Bench(case, device, torch.bfloat16 if gpu else torch.float32)
    runs: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        if number and time.perf_counter() - began > seconds:
            break
        for variant in variants:
            run = bench.update(variant) if gpu else alone(bench.update, variant)
            runs[variant.name].append(run)
            tell(case=case.name, variant=variant.name, round=number, seconds=run["seconds"])
    best = {name: min(of_name, key=lambda run: run["seconds"]) for name, of_name in runs.items()}
    without = [run for name, run in best.items() if not name.startswith(("tree", "chosen"))]
    flat = min(without, key=lambda run: run["seconds"])
    saved = savings([bench.planned(variants[-1 if not gpu else 1])], bench.cost)
    out: dict[str, Any] = {"case": case.name, "model": case.model, "max_tokens": case.max_tokens}
    out |= saved
    for name, run in best.items():
        speedup = flat["seconds"] / run["seconds"]
        out[name] = run | {
            "speedup": speedup,
            "share_of_predicted": speedup / saved["speedup_predicted"],
            "loss_error": abs(run["loss"] - flat["loss"]) / max(abs(flat["loss"]), 1e-3),
            "grad_norm_error": abs(run["grad_norm"] / flat["grad_norm"] - 1),
        }
        if gpu:
            flops = 3 * sum(bench.cost(item.size) for v in variants if v.name == name
                            for pack in bench.planned(v).ranks[0] for item in pack)  # fmt: skip
            out[name]["tflops"] = flops / run["seconds"] / 1e12
    return out


def head_memory(vocabulary: int = 150_000, rows: int = 8192, hidden: int = 64) -> dict[str, float]:
    """Memory that the log-probability head adds in both passes, without its weight's gradient."""
    head = LogProbHead(torch.nn.Linear(hidden, vocabulary, bias=False))
    states = torch.randn(rows, hidden, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))
    head.weight.grad = torch.zeros_like(head.weight)
    with Meter(torch.device("cpu")) as meter:
        logp, _ = head(states, targets, 1.0)
        logp.sum().backward()
    return meter.result | {"full_logits_mb": rows * vocabulary * 4 / 1e6}


def agreement(case: Case, device: torch.device) -> dict[str, float]:
    """Mean |Δ log π| in bf16: tree against flat, and flat against fp32 (GPU)."""
    bench = Bench(case, device, torch.bfloat16)
    found: dict[str, torch.Tensor] = {}
    for variant in (*GPU_VARIANTS, Variant("fp32", AttentionBackend.blocks, None)):
        wide = variant.name == "fp32"
        policy = bench.policy.float() if wide else bench.policy
        policy.model.set_attn_implementation(IMPLEMENTATION)
        layout = BatchLayout(device, variant.backend, torch.float32 if wide else torch.bfloat16)
        values: dict[tuple[int, int], float] = {}
        for items in bench.planned(variant).ranks[0]:
            with torch.no_grad():
                logp = policy(collate(Pack(items), layout).inputs, 1.0)[0].tolist()
            places = [(id(i.tree), int(t)) for i in items for t in lay_out([i]).scored]
            values |= dict(zip(places, logp, strict=True))
        found[variant.name] = torch.tensor([values[key] for key in sorted(values)])
    flat = found["flat paths"]
    errors = {f"{n} vs flat paths": float((v - flat).abs().mean()) for n, v in found.items()}
    return errors | {"flat paths vs fp32": float((flat - found["fp32"]).abs().mean())}


def cases(rng: np.random.Generator, dump: Path | None, gpu: bool) -> list[Case]:
    if gpu:  # some 60 thousand tokens as flat sequences: two to three seconds a pass on an H100
        return [
            Case("ELPO", "Qwen2.5-1.5B", [grown(rng, 600, (400, 200), 6, [3, 5, 4])], 32768),
            Case("late", "Qwen2.5-1.5B", [grown(rng, 600, (400, 200), 3, [6, 5])], 32768),
        ]
    small = [grown(rng, PROMPT_TOKENS, (10, 20), 10, [1, 2]) for _ in range(8)]
    base = [grown(rng, 256, (100, 60), 4, [3, 5, 4])]
    listed = [
        Case("quickstart-shaped", "quickstart", small, 8192),
        Case("ELPO", "quickstart", base, 8192),
        Case("ELPO, divided", "quickstart", base, 3072),
        Case("ELPO, wider model", "hidden 384", base, 8192),
        Case("late anchors", "quickstart", [grown(rng, 256, (100, 60), 3, [5, 4])], 8192),
        Case("no search", "quickstart", [grown(rng, 256, (100, 60), 16, [1])], 8192),
        Case("long prompt", "quickstart", [grown(rng, 1500, (30, 20), 4, [2, 3])], 8192),
    ]
    if dump is not None:
        listed.append(Case(f"dump {dump.name}", "quickstart", list(dumped(dump))[:8], 8192))
    return listed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=Path, help="a dump of a run, runs/NAME/trees/step_*.jsonl")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of printing it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="of a case")
    parser.add_argument("--only", default="", help="parts whose names contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    text = json.dumps(measured(arguments, gpu), indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


def measured(arguments: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """The parts that are asked for, each told as it ends."""
    device, only = torch.device("cuda" if gpu else "cpu"), arguments.only
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpu else "cpu, 1 thread",
    }
    if not gpu and only in "head":
        report["head_150k_vocabulary_8k_rows"] = found = alone(head_memory)
        tell(part="head", **found)
    listed = cases(np.random.default_rng(0), arguments.trees, gpu)
    variants = GPU_VARIANTS if gpu else CPU_VARIANTS
    report["updates"] = [
        compare(case, variants, arguments.rounds, device, arguments.seconds)
        for case in listed
        if only in case.name
    ]
    if gpu and only in "agreement":
        small = [grown(np.random.default_rng(1), 200, (100, 60), 6, [3, 5, 4])]
        report["agreement"] = agreement(Case("agreement", "Qwen2.5-1.5B", small, 8192), device)
    tree = [case["chosen"] for case in report["updates"] if not gpu]
    if tree:
        report["worst_speedup"] = min(run["speedup"] for run in tree)
        shares = [run["share_of_predicted"] for run in tree]
        report["share_of_predicted"] = {"worst": min(shares), "median": statistics.median(shares)}
    if len(report) == 3 and not report["updates"]:
        names = ", ".join(["agreement" if gpu else "head", *(case.name for case in listed)])
        sys.exit(f"--only {only}: no such part; use some of {names}")
    return report


if __name__ == "__main__":
    main()
