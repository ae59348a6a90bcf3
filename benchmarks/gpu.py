"""Speed on one GPU: `python benchmarks/gpu.py [PART ...]`, lines of JSON as it goes.

update   a mini-batch of ELPO's trees, with shared prefixes against flat, in the shape of
         Qwen2.5-1.5B: measured against predicted gain, MFU, peak memory
engine   an engine in the shape of Qwen2.5-1.5B: start to first token, tokens a second
share    that engine beside a learner's weights: sleep and wake in seconds and GiB, weights by IPC
         and their GB a second
rollout  the whole rollout stack against its bare engine, and BEL trees against independent
         trajectories with as many leaves, both in wall-clock: the quickstart's policy, so enlarged
         that a step of the engine takes about as long as one of Qwen2.5-1.5B

Each part is meant to take less than 90 s on an H100; `--seconds` bounds its rounds. `--tiny` tries
a part without a GPU, on models that are no measure of anything. Exit code 1 if a part misses what
is asked of it (`ASKED`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

Values = dict[str, Any]
ASKED: dict[str, Callable[[float], bool]] = {
    "share_of_predicted": lambda value: value >= 0.85,
    "stack_over_bare": lambda value: value >= 0.8,
    "wall_clock_ratio": lambda value: value <= 1.0,
}
"""What a figure must be, wherever a part reports it."""


def update(args: argparse.Namespace) -> Values:
    from benchmarks.gpus import update

    return update.measure(tiny=args.tiny, seconds=args.seconds)


def engine(args: argparse.Namespace) -> Values:
    from benchmarks.gpus import engine

    return engine.speed(tiny=args.tiny, graphs=args.graphs)


def share(args: argparse.Namespace) -> Values:
    from benchmarks.gpus import engine

    return engine.share(tiny=args.tiny)


def rollout(args: argparse.Namespace) -> Values:
    from benchmarks.rollouts import growth

    options = argparse.Namespace(model=None, layers=16, mlp=65536, pairs=2, inputs=64, set=[])
    options.seconds = args.seconds / 2
    options.set = ["cluster=gpu1", "cluster.dashboard=false", "engine.max_num_seqs=64"]
    options.set.append("engine.gpu_memory_utilization=0.4")
    if args.tiny:
        options.inputs, options.pairs, options.layers, options.mlp = 4, 1, None, None
        options.set += ["cluster.gpus=false", "task.countdown.demonstrations=256"]
    return growth.measure(options)["median"]


PARTS = {"update": update, "engine": engine, "share": share, "rollout": rollout}


def part(name: str) -> str:
    """A name of `PARTS`, for argparse: `choices` would also look at the list that stands for all
    parts."""
    if name not in PARTS:
        raise argparse.ArgumentTypeError(f"{name}: no such part; use one of {', '.join(PARTS)}")
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", type=part, help=f"{', '.join(PARTS)}; none = all"
    )
    parser.add_argument("--tiny", action="store_true", help="try it without a GPU")
    parser.add_argument("--graphs", action="store_true", help="engine with compilation and graphs")
    parser.add_argument("--seconds", type=float, default=60, help="after which no round begins")
    args = parser.parse_args()
    if args.tiny:
        os.environ["ELPO_GPU_TESTS"] = "cpu"  # the models and engines are those of tests/gpu
    import torch

    if not args.tiny and not torch.cuda.is_available():
        needed = "this needs an NVIDIA GPU and make TARGET=gpu install"
        print(f"no GPU: torch.cuda.is_available() is false; {needed}, and --tiny tries the parts "
              "without one", file=sys.stderr)  # fmt: skip
        return 2
    import vllm

    device = "cpu" if args.tiny else torch.cuda.get_device_name()
    print(json.dumps({"device": device, "torch": torch.__version__, "vllm": vllm.__version__,
                      "command": " ".join(sys.argv)}), flush=True)  # fmt: skip
    missed = False
    for name in args.parts or PARTS:
        began = time.perf_counter()
        found = PARTS[name](args)
        wrong = [key for key, right in ASKED.items() if key in found and not right(found[key])]
        missed |= bool(wrong)
        line = {"part": name, **found, "missed": wrong, "part_s": time.perf_counter() - began}
        print(json.dumps(line), flush=True)
        gc.collect()  # the part's models, and what vLLM must not leave to the interpreter's end
        if not args.tiny:
            torch.cuda.empty_cache()  # or the next part's engine finds the memory taken
    return int(missed and not args.tiny)


if __name__ == "__main__":
    sys.exit(main())
