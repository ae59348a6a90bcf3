"""Seconds a batch of GRPO, here and with TRL's GRPOTrainer: same model, prompts, tool and batch.

    python benchmarks/peer_trl.py --model FOLDER [--pairs 3] [--batches 3] [--threads 1]

FOLDER is the quickstart's cold start (runs/cache/cold_start/cold-start-…). A batch is 16 inputs
with 16 trajectories each in two optimizer steps, fp32, on the CPU. The two take turns, each in
processes of its own, and each begins every second pair. The first batch of a turn, which includes
warming up, is given apart. Prints one JSON object, which also says what samples and with how many
threads.

TRL samples with `generate` of transformers and runs the tool in its own process; here vLLM samples
and the tool runs in the sandbox. TRL comes from its wheel (`pip install trl==1.16.*`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from elpo_ray.config.compose import composed  # noqa: E402
from elpo_ray.tasks import make_task  # noqa: E402
from elpo_ray.tasks.countdown import ANSWER  # noqa: E402
from elpo_ray.tools import code_interpreter  # noqa: E402

INPUTS, TRAJECTORIES, OPTIMIZER_STEPS = 16, 16, 2
OURS = (
    "+experiment=quickstart", "algorithm=grpo", "task.eval_problems=1", "task.eval_samples=1",
    f"trainer.inputs_per_step={INPUTS}", f"learner.minibatch_inputs={INPUTS // OPTIMIZER_STEPS}",
    "cold_start.enabled=false", "learner.optimizer.schedule=constant",
    "learner.optimizer.warmup_ratio=0.0", "logging.wandb=disabled", "logging.progress=false",
)  # fmt: skip
Seconds = dict[str, list[float]]
"""`batch` and `update`: the whole, and its share after sampling; one value a batch."""


def ours(model: str, batches: int, threads: int) -> Seconds:
    """Train here, in a run of its own."""
    with TemporaryDirectory() as folder:
        words = [
            *OURS, f"model.path={model}", "model.max_context=384", f"trainer.steps={batches}",
            f"trainer.run_dir={folder}", "trainer.run_name=run",
            f"cluster.engine_threads={threads}", f"cluster.learner_threads={threads}",
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "elpo_ray.main", *words], check=True, stdout=subprocess.DEVNULL
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "rollouts" in row]
    spent = [0.0, *(row["total/train_seconds"] for row in rows)]
    return {
        "batch": [after - before for before, after in pairwise(spent)],
        "update": [row["seconds/update"] for row in rows],
    }


class Session:
    """The tool's state of one trajectory, as TRL wants it: `code_interpreter` is the one tool."""

    def reset(self, setup: str, **_: Any) -> None:
        """Begin a problem."""
        self.names: dict[str, Any] = {}
        exec(setup, self.names)

    def code_interpreter(self, code: str) -> str:
        """Run Python code in a session that keeps its state.

        Args:
            code: What to run.

        Returns:
            What it prints.
        """
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(code, self.names)
            except Exception as fault:  # the policy's code
                return f"{type(fault).__name__}: {fault}"
        return printed.getvalue().strip()


def rewards(
    completions: list[Any], environments: list[Session], target: list[int], **_: Any
) -> list[float]:
    """1 where the numbers left are the target and the answer names it, else -1.1."""
    found = []
    for said, session, wanted in zip(completions, environments, target, strict=True):
        answer = ANSWER.fullmatch(str(said[-1].get("content") or "").strip())
        solved = session.names["_left"] == [wanted] and answer and int(answer[1]) == wanted
        found.append(1.0 if solved else -1.1)
    return found


def trl(model: str, batches: int, threads: int) -> Seconds:
    """Train with TRL, in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.chat_template_utils import qwen2_5_chat_template

    torch.set_num_threads(threads)
    config = composed(list(OURS))
    task = make_task(config.task, 0)
    problems = [task.train_problem(i) for i in range(INPUTS * batches)]
    data = Dataset.from_list(
        [{"prompt": list(p.messages), "setup": p.setup, "target": p.ground_truth} for p in problems]
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = qwen2_5_chat_template  # what TRL can read calls of
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    with TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
            logging_strategy="no", gradient_checkpointing=False, shuffle_dataset=False,
            per_device_train_batch_size=INPUTS * TRAJECTORIES // OPTIMIZER_STEPS,
            steps_per_generation=OPTIMIZER_STEPS, num_generations=TRAJECTORIES,
            max_steps=batches * OPTIMIZER_STEPS, max_completion_length=256,
            max_tool_calling_iterations=config.task.max_turns - 1,
            temperature=1.0, learning_rate=1.5e-4, lr_scheduler_type="constant",
            loss_type="grpo", scale_rewards="group", beta=0.0, epsilon=0.2, delta=10.0,
            max_grad_norm=1.0, weight_decay=0.0, seed=0, disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=rewards, args=settings, train_dataset=data,
            processing_class=tokenizer, environment_factory=Session, callbacks=[Clock()],
        )  # fmt: skip
        trainer._env_tools = {None: [code_interpreter.SCHEMA]}  # the schema of the cold start
        trainer.train()
    last = marks[OPTIMIZER_STEPS::OPTIMIZER_STEPS]
    starts = [marks[0], *last[:-1]]
    alone = zip(marks[1::OPTIMIZER_STEPS], last, strict=True)
    # The first optimizer step follows the sampling; one without it takes as long as the last.
    return {
        "batch": [after - before for before, after in zip(starts, last, strict=True)],
        "update": [OPTIMIZER_STEPS * (after - first) for first, after in alone],
    }


def turn(side: str, args: argparse.Namespace) -> Seconds:
    """One side's batches, in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--model", args.model]
    words += ["--batches", str(args.batches), "--threads", str(args.threads)]
    threads = {"OMP_NUM_THREADS": str(args.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    found: Seconds = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({side: found}), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the quickstart's cold start")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=3, help="of a turn, the first one apart")
    parser.add_argument("--threads", type=int, default=1, help="of the sampler and of the learner")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    sides = {"ours": ours, "trl": trl}
    if args.side:
        print(json.dumps(sides[args.side](args.model, args.batches, args.threads)))
        return
    taken: dict[str, list[Seconds]] = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            taken[side].append(turn(side, args))
    report: dict[str, Any] = {
        side: {
            "first_batch": [one["batch"][0] for one in turns],
            "batch": median(value for one in turns for value in one["batch"][1:]),
            "update": median(value for one in turns for value in one["update"][1:]),
        }
        for side, turns in taken.items()
    }
    report |= {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    report |= {
        "times_as_fast": report["trl"]["batch"] / report["ours"]["batch"],
        "sampler": {"ours": "vLLM on the CPU, eager", "trl": "transformers, generate"},
        "precision": "fp32",
        "threads": args.threads,
        "batch": f"{INPUTS} x {TRAJECTORIES}, {OPTIMIZER_STEPS} optimizer steps",
        "turns": taken,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
