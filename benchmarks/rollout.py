"""What growing trees costs beside decoding: `python benchmarks/rollout.py [SECTION ...]`, JSON.

control   scripted workers that answer at once: trajectories a second, what a driver could serve
memory    the driver's over 1,000 small steps with such a worker
growth    BEL trees against independent trajectories, whole stack against the bare engine, prefix
          hits and engine idleness; quickstart model, one engine, pairs in turns
overlap   steps a minute with staleness 1 against 0, engine and learner pinned to one core each
sync      weights of a 0.5 B-parameter model from a publisher into a serving engine

Every ratio is of one run, its two sides in turns. `--model` names a folder for `growth` and
`overlap`; without it the quickstart's cold start is made (or taken from its cache). `--layers` puts
layers that change nothing on top of it: the same trees from an engine whose tokens cost more, as
those of any model that is not a toy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

import ray  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.config_store import ConfigStore  # noqa: E402
from rich.console import Console  # noqa: E402

from elpo_ray.cluster import Cluster, RolloutGroup  # noqa: E402
from elpo_ray.cluster import cluster as placement  # noqa: E402
from elpo_ray.cluster import rollouts as group_module  # noqa: E402
from elpo_ray.cluster.actors import RemoteEngines, RolloutActor  # noqa: E402
from elpo_ray.cold_start import base_model, starting_model  # noqa: E402
from elpo_ray.collector import relax  # noqa: E402
from elpo_ray.command import typed  # noqa: E402
from elpo_ray.config import CONF_DIR, Config  # noqa: E402
from elpo_ray.credit import assign  # noqa: E402
from elpo_ray.dispatch import JobRunner  # noqa: E402
from elpo_ray.engine import CPU_BLOCK_SIZE  # noqa: E402
from elpo_ray.forest import pack  # noqa: E402
from elpo_ray.growth.dynamic import Batch, collect  # noqa: E402
from elpo_ray.metrics import probe_prefixes  # noqa: E402
from elpo_ray.rollout import RolloutWorker  # noqa: E402
from elpo_ray.schedule import Schedule  # noqa: E402
from elpo_ray.tasks import make_task  # noqa: E402
from elpo_ray.tree import RolloutTree  # noqa: E402
from elpo_ray.types import (  # noqa: E402
    FinishReason,
    Parsed,
    Problem,
    Score,
    ToolCall,
    ToolKind,
    ToolResult,
    Turn,
)
from elpo_ray.weights import HostPublisher  # noqa: E402

Values = dict[str, Any]
PAIRS = 3


def quickstart(*overrides: str) -> Config:
    ConfigStore.instance().store(name="config_schema", node=Config)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = compose("config", ["+experiment=quickstart", *overrides])
    return typed(Config, composed)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# --- control plane --------------------------------------------------------------------------------


class Scripted:
    """Policy, chat, tools and task in one: four turns of 16 tokens with three tool calls, half of
    the trajectories fail, nothing takes any time."""

    tools = ()
    state = None
    call_of_turn = ToolCall("code_interpreter", {"code": "1 + 1"})
    result = ToolResult(ToolKind.OK, "2", duration_s=0.001)

    async def generate(self, prefix: Any, sampling: Any) -> Turn:
        entropy = (sampling.seed >> 8 & 255) / 256
        return Turn(tuple(range(40, 56)), (-0.5,) * 16, (entropy,) * 16, FinishReason.STOP, 0)

    def prompt_ids(self, messages: Any) -> list[int]:
        return list(range(60))

    def parse(self, token_ids: Any) -> Parsed:
        return Parsed("call", call=self.call_of_turn)

    def observation_ids(self, text: str) -> list[int]:
        return list(range(16))

    async def open(self, **_: Any) -> Scripted:
        return self

    async def call(self, call: Any) -> ToolResult:
        return self.result

    async def close(self) -> None: ...

    async def release(self, tree: str) -> None: ...

    async def score(self, problem: Any, steps: Any, tools: Any) -> Score:
        success = steps[-1].turn.entropies[0] > 0.5
        return Score(1.0 if success else -1.0, success)


class ScriptedActor(RolloutActor):
    """A rollout worker without engine and sandbox."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        scripted: Any = Scripted()
        worker = RolloutWorker(scripted, scripted, scripted, scripted, config)
        self.engine, self.runner = None, JobRunner(worker, 512, lambda: None)
        relax()

    async def cpu(self) -> float:
        return cpu_seconds()


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{i}", ({"role": "user", "content": "x"},), None) for i in range(count)]


@contextmanager
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def scripted_group(workers: int) -> Iterator[RolloutGroup]:
    config = quickstart("task.max_turns=4")
    remote: Any = ray.remote(ScriptedActor)

    def spawn(number: int, life: int) -> Any:
        return remote.options(num_cpus=0, max_concurrency=1000).remote()

    handles = [spawn(number, 0) for number in range(workers)]
    ray.get([handle.start.remote(config, "", []) for handle in handles])
    group = RolloutGroup(handles, [], config, "", spawn)
    relax()
    try:
        yield group
    finally:
        group.close()
        for handle in handles:
            ray.kill(handle)


def rate(workers: int, inputs: int) -> Values:
    with scripted_group(workers) as group:
        group.grow(problems(workers * 50), 0)
        rates, driver, worker = [], [], []
        for step in range(PAIRS):
            used, began = cpu_seconds(), time.perf_counter()
            theirs = sum(ray.get([handle.cpu.remote() for handle in group.members]))
            trees = group.grow(problems(inputs), step)
            seconds = time.perf_counter() - began
            theirs = sum(ray.get([handle.cpu.remote() for handle in group.members])) - theirs
            rollouts = sum(tree.budget for tree in trees)
            rates.append(rollouts / seconds)
            driver.append((cpu_seconds() - used) / rollouts * 1e6)
            worker.append(theirs / rollouts * 1e6)
    return {
        "workers": workers,
        "rollouts_per_s": median(rates),
        "rollouts_per_s_runs": rates,
        "driver_cpu_us_per_rollout": median(driver),
        "worker_cpu_us_per_rollout": median(worker),
    }


def memory(args: argparse.Namespace) -> Values:
    steps, marks = 1000, {}
    with local_ray(), scripted_group(1) as group:
        for step in range(steps):
            group.grow(problems(4), step)
            if step + 1 in (100, 250, 500, 750, 1000):
                marks[f"rss_mib_after_{step + 1}"] = rss_mib()
    return {"steps": steps, "rollouts": steps * 4 * 16, **marks}


def exchange_cost(seconds: float) -> float:
    """Processor microseconds of the driver for one exchange without news."""
    patience, group_module.PATIENCE_S = group_module.PATIENCE_S, 0.005
    try:
        with scripted_group(2) as group:
            count, take = 0, group.queue.take

            def counted(worker: int, report: Any) -> None:
                nonlocal count
                count += 1
                take(worker, report)

            group.queue.take = counted  # type: ignore[method-assign]
            time.sleep(1.0)
            count, used = 0, cpu_seconds()
            time.sleep(seconds)
            return (cpu_seconds() - used) / count * 1e6
    finally:
        group_module.PATIENCE_S = patience


def extrapolate(driver_us: float, exchange_us: float) -> list[Values]:
    """Share of a core that one driver needs for so many engines. A worker reports once a second and
    whenever a tree is finished; what its own Python needs does not grow with their number."""
    rows = []
    for engines in (2, 64, 512):
        row: Values = {"engines": engines}
        for each in (1, 5):
            busy = each * driver_us + (1 + each / 16) * exchange_us
            row[f"driver_core_share_at_{each}_rollouts_per_s_each"] = engines * busy / 1e6
        rows.append(row)
    return rows


def control(args: argparse.Namespace) -> Values:
    with local_ray():
        one, two, exchange = rate(1, 400), rate(2, 800), exchange_cost(3.0)
    table = extrapolate(two["driver_cpu_us_per_rollout"], exchange)
    return {
        "one_worker": one,
        "two_workers": two,
        "driver_cpu_us_per_exchange": exchange,
        "extrapolation": table,
    }


# --- growth ---------------------------------------------------------------------------------------


class MeasuredActor(RolloutActor):
    """A rollout worker whose engine can be used bare."""

    async def bare(self, requests: list[tuple[list[int], int]]) -> tuple[int, float]:
        """Decode so many tokens after each prefix, everything known beforehand, nothing but tokens
        asked for. Returns tokens and seconds."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        llm: Any = self.engine._llm  # type: ignore[union-attr]

        async def one(number: int, prefix: list[int], count: int) -> int:
            params = SamplingParams(
                temperature=1.0, max_tokens=count, ignore_eos=True, detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            prompt = tokens_input(prefix, cache_salt=f"bare {began}")
            async for output in llm.generate(prompt, params, f"bare-{began}-{number}"):
                last = output
            return len(last.outputs[0].token_ids)

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(i, *request) for i, request in enumerate(requests)))
        return sum(counts), time.perf_counter() - began

    async def forget(self) -> None:
        """Empty the prefix cache."""
        await self.engine._llm.reset_prefix_cache()  # type: ignore[union-attr]

    async def seconds(self) -> tuple[float, float]:
        """(with work, of them with an idle engine) so far."""
        load = self._running._worker.load
        load.settle()
        return load.busy_s, load.idle_s


def turns(trees: list[RolloutTree]) -> list[tuple[list[int], int]]:
    """(prefix, tokens sampled after it) of every turn."""
    return [
        (tree.prefix_ids(node.parent), len(node.step.turn.token_ids))
        for tree in trees
        for node in tree.nodes
        if node.step is not None and node.parent is not None
    ]


def grown(group: RolloutGroup, config: Config, inputs: list[Problem], step: int) -> Values:
    """One growth phase, from an empty prefix cache."""
    (worker,) = group.members
    group.use(config)
    ray.get(worker.forget.remote())
    busy, idle = ray.get(worker.seconds.remote())
    began = time.perf_counter()
    trees = group.grow(inputs, step)
    seconds = time.perf_counter() - began
    busy, idle = (
        b - a for a, b in zip((busy, idle), ray.get(worker.seconds.remote()), strict=True)
    )
    tokens = sum(count for _, count in turns(trees))
    return {"seconds": seconds, "tokens": tokens, "idle": idle / busy, "trees": trees}


def prefix_hits(trees: list[RolloutTree]) -> Values:
    """Shares of the probes' prefix tokens: found in the cache, and lying in whole blocks, beyond
    which vLLM caches nothing."""
    prefixes = probe_prefixes(trees)
    tokens = sum(length for length, _ in prefixes)
    whole = sum((length - 1) // CPU_BLOCK_SIZE * CPU_BLOCK_SIZE for length, _ in prefixes)
    return {
        "probe_prefix_hit": sum(cached for _, cached in prefixes) / tokens,
        "probe_prefix_in_whole_blocks": whole / tokens,
    }


def with_model(args: argparse.Namespace, config: Config, cluster: Cluster) -> Path:
    if args.model is not None:
        return Path(args.model)
    task = make_task(config.task, config.trainer.seed)
    start = starting_model(config, task, base_model(config, task), cluster, Console(stderr=True))
    for rank in start.learner.ranks if start.learner is not None else []:
        ray.kill(rank)
    return start.folder


def deepened(folder: Path, layers: int, to: Path) -> Path:
    """The model of `folder` with so many layers in all, those added without effect: their output
    projections are zero."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = model.state_dict()
    shape = model.config
    shape.num_hidden_layers, shape.layer_types = layers, None
    deeper = AutoModelForCausalLM.from_config(type(shape)(**shape.to_dict()))
    with torch.no_grad():
        for name, weight in deeper.state_dict().items():
            if name in weights:
                weight.copy_(weights[name])
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
    shutil.copytree(folder, to)
    deeper.save_pretrained(to)
    return to


def growth(args: argparse.Namespace) -> Values:
    trees, flat = quickstart(*args.set), quickstart("algorithm=grpo", *args.set)
    task = make_task(trees.task, 0)
    inputs = [task.train_problem(i) for i in range(args.inputs)]
    rows: list[Values] = []
    placement.RolloutActor = MeasuredActor  # type: ignore[misc]
    with Cluster(trees) as cluster, tempfile.TemporaryDirectory() as scratch:
        folder = with_model(args, trees, cluster)
        if args.layers:
            folder = deepened(folder, args.layers, Path(scratch) / "model")
        group = cluster.rollouts(folder)
        grown(group, trees, inputs[:16], 0)
        for step in range(1, args.pairs + 1):
            bel = grown(group, trees, inputs, step)
            ray.get(group.members[0].forget.remote())
            tokens, seconds = ray.get(group.members[0].bare.remote(turns(bel["trees"])))
            independent = grown(group, flat, inputs, step)
            rows.append(
                {
                    "bel_s": bel["seconds"],
                    "independent_s": independent["seconds"],
                    "wall_clock_ratio": bel["seconds"] / independent["seconds"],
                    "token_ratio": bel["tokens"] / independent["tokens"],
                    "bel_tokens_per_s": bel["tokens"] / bel["seconds"],
                    "bare_tokens_per_s": tokens / seconds,
                    "stack_over_bare": bel["tokens"] / bel["seconds"] / (tokens / seconds),
                    **prefix_hits(bel["trees"]),
                    "engine_idle": bel["idle"],
                    "engine_idle_independent": independent["idle"],
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {
        "inputs": args.inputs,
        "layers": args.layers,
        "n_total": 16,
        "median": {key: median(row[key] for row in rows) for key in rows[0]},
        "rounds": rows,
    }


# --- overlap --------------------------------------------------------------------------------------


def pin(pid: int, core: int) -> None:
    """A process, with all its threads and children, to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
        for child in (task / "children").read_text().split():
            pin(int(child), core)


def overlap(args: argparse.Namespace) -> Values:
    config = quickstart(*args.set)
    task = make_task(config.task, 0)
    per_step, version, cursor = config.trainer.inputs_per_step, 0, 0
    with Cluster(config) as cluster:
        folder = with_model(args, config, cluster)
        learner = cluster.learner(folder, 1000)
        group = cluster.rollouts(folder)
        learner.connect(group)
        getpid: Callable[[Any], int] = lambda _: os.getpid()  # noqa: E731
        for actors, core in ((learner.ranks, 1), ([*group.members, *group.sandboxes], 0)):
            for pid in ray.get([actor.__ray_call__.remote(getpid) for actor in actors]):
                pin(pid, core)

        def grow(step: int, first: int) -> Batch:
            def some(skipped: int, count: int) -> list[Any]:
                begin = first + skipped
                wanted = [task.train_problem(i) for i in range(begin, begin + count)]
                return list(zip(wanted, group.grow(wanted, step), strict=True))

            return collect(some, per_step, config.algorithm.growth.dynamic)

        def run(staleness: int, steps: int) -> Values:
            nonlocal version, cursor
            last = version + steps + 1
            schedule = Schedule(grow, staleness=staleness, steps=last)
            waited = updated = 0.0
            began = time.perf_counter()
            for number in range(steps + 1):
                if number == 1:  # the first batch has nothing to overlap with
                    began, waited, updated = time.perf_counter(), 0.0, 0.0
                mark = time.perf_counter()
                batch = schedule.batch(version, cursor, lambda: None)
                waited += time.perf_counter() - mark
                forest = pack(
                    batch.trained, assign(batch.trained, config.algorithm), config.loss,
                    config.learner,
                )  # fmt: skip
                mark = time.perf_counter()
                with learner.moving():
                    learner.update(forest)
                    learner.publish(version + 1)
                updated += time.perf_counter() - mark
                version, cursor = version + 1, cursor + batch.taken
            seconds = time.perf_counter() - began
            return {
                "steps_per_minute": 60 * steps / seconds,
                "waiting_for_growth_s": waited / steps,
                "update_and_sync_s": updated / steps,
            }

        run(0, 1)
        pairs = []
        for _ in range(args.pairs):
            pairs.append((run(0, args.steps), run(1, args.steps)))
            print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    ratios = [ahead["steps_per_minute"] / turn["steps_per_minute"] for turn, ahead in pairs]
    return {"ratio": median(ratios), "ratios": ratios, "pairs": pairs}


# --- weight sync ----------------------------------------------------------------------------------


def sync(args: argparse.Namespace) -> Values:
    """Random weights in the shape of Qwen2.5-0.5B, bfloat16."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(shape).to(torch.bfloat16)
        model.save_pretrained(folder)
        config = quickstart(
            "model.precision=bf16", "model.max_context=1024", "task.max_turn_tokens=64", *args.set
        )
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        size = sum(tensor.nbytes for tensor in tensors.values())

        def buckets(max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
            bucket: dict[str, torch.Tensor] = {}
            for name, tensor in tensors.items():
                if bucket and sum(t.nbytes for t in bucket.values()) + tensor.nbytes > max_bytes:
                    yield bucket
                    bucket = {}
                bucket[name] = tensor
            yield bucket

        with local_ray():
            actor: Any = ray.remote(BareEngineActor).options(max_concurrency=8).remote()
            ray.get(actor.start.remote(config, folder, []))
            publisher = HostPublisher(0, RemoteEngines([actor], 600), buckets, 256 << 20)
            seconds = []
            for version in range(1, args.pairs + 3):
                began = time.perf_counter()
                publisher.publish(version)
                seconds.append(time.perf_counter() - began)
            phases = ray.get(actor.phases.remote())
    warm = median(seconds[2:])  # until then memory is new: its first touch costs more than the copy
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "gb": size / 1e9,
        "seconds_each": seconds,
        "seconds": warm,
        "gb_per_s": size / 1e9 / warm,
        "seconds_by_call": phases,
    }


class BareEngineActor(RolloutActor):
    """An engine without task and tools, its calls timed."""

    async def start(self, config: Config, folder: str, sandboxes: list[Any]) -> None:
        from elpo_ray.cluster.actors import make_engine

        self.engine = make_engine(config, folder)
        self.timed: dict[str, float] = {}
        await self.engine.start()

    async def engine_call(self, method: str, *args: Any) -> None:
        began = time.perf_counter()
        await super().engine_call(method, *args)
        self.timed[method] = self.timed.get(method, 0.0) + time.perf_counter() - began

    async def phases(self) -> dict[str, float]:
        return self.timed


SECTIONS = {
    "control": control,
    "memory": memory,
    "growth": growth,
    "overlap": overlap,
    "sync": sync,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--model", help="folder for growth and overlap")
    parser.add_argument("--layers", type=int, help="of the model in growth")
    parser.add_argument("--inputs", type=int, default=48, help="of a growth phase")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=3, help="of each side of an overlap pair")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the quickstart")
    args = parser.parse_args()
    random.seed(0)
    print(json.dumps({name: SECTIONS[name](args) for name in args.sections}, indent=2))


if __name__ == "__main__":
    main()
