"""Mistakes of the first hour: each is answered in one line, before anything starts.

The line names the key, the value and what to do about it; the exit code is 2 and nothing is left
behind. The users of this table come from TRL and verl, and from a shell of their own.
"""

from __future__ import annotations

import copy
import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from elpo_ray import cli
from elpo_ray.config.compose import composed
from elpo_ray.runs.atomic import check_writable
from elpo_ray.runs.folder import RunFolder, RunState

ROOT = Path(__file__).resolve().parents[2]
QUICK = "+experiment=quickstart"
OWN = "task=jsonl task.train_file=rows.jsonl task.eval_file=rows.jsonl model=tiny cluster=local"
RESUME = "trainer.resume=runs/live"
MEASURED = "model=m/m tasks=[countdown]"
SECONDS = 5.0
"""Processor time of an answer."""

WORDS = [
    # how a command line is written
    ("train --experiment quickstart", "--experiment quickstart|write +experiment=quickstart"),
    ("train --experiment=quickstart", "write +experiment=quickstart"),
    ("train experiment=quickstart", "experiment=quickstart|write +experiment=quickstart"),
    ("train quickstart", "quickstart:|write +experiment=quickstart"),
    ("train grpo", "grpo:|write algorithm=grpo"),
    ("train steps=1", "steps=1|did you mean trainer.steps?"),
    ("train learner.lr=1e-5", "learner.lr=1e-5|did you mean learner.optimizer.lr?"),
    (f"train {QUICK} --steps 5", "--steps 5|write trainer.steps=5"),
    ("train --check-only", "--check-only|write check_only=true"),
    ("train --config agent.yaml", "--config agent.yaml|write agent.yaml without --config"),
    ("train --config-name=ppo_trainer", "--config-name=ppo_trainer|without --config-name"),
    ("train agent.yaml", "agent.yaml|no such file"),
    ("train afile", "afile:|rename it"),
    (f"train {QUICK} trainer.steps = 5", "trainer.steps = 5|write trainer.steps=5 without spaces"),
    (f"train {QUICK} +algorithm=grpo", "+algorithm=grpo|write algorithm=grpo"),
    (f"train {QUICK} algorithm.name=grpo", "algorithm.name=grpo|write algorithm=grpo"),
    ("evaluate --tasks aime24", "--tasks aime24|write 'tasks=[aime24]'"),
    ("evaluate model=m/m tasks=aime24", "tasks=aime24|'tasks=[aime24]'"),
    ("evaluate model=m/m tasks=[aime]", "tasks=['aime']|aime24"),
    ("trian", "'trian'|did you mean elpo train?"),
    ("eval model=m/m", "'eval'|did you mean elpo evaluate?"),
    (f"{QUICK}", "a command comes first, as in elpo train +experiment=quickstart"),
    # the words of TRL, verl and prime-rl
    ("train learning_rate=1e-6", "learning_rate=1e-6|learner.optimizer.lr"),
    ("train num_generations=8", "num_generations=8|algorithm.growth.n_total"),
    ("train per_device_train_batch_size=8", "trainer.inputs_per_step"),
    ("train beta=0.04", "beta=0.04|algorithm.loss.kl_coef"),
    ("train model_name_or_path=m/m", "model_name_or_path=m/m|model.path"),
    ("train output_dir=out", "output_dir=out|trainer.run_dir"),
    ("train data.train_batch_size=8", "data.train_batch_size=8|trainer.inputs_per_step"),
    ("train actor_rollout_ref.rollout.n=8", "rollout.n=8|algorithm.growth.n_total"),
    ("train actor_rollout_ref.actor.optim.lr=1e-6", "optim.lr=1e-6|learner.optimizer.lr"),
    ("train trainer.total_epochs=3", "trainer.total_epochs=3|trainer.steps"),
    ("train algorithm=ppo", "algorithm=ppo|choose one of|grpo"),
    ("train model=Qwen/Qwen2.5-7B-Instruct", "model=Qwen/Qwen2.5-7B-Instruct|model.path=Qwen"),
    ("launch slurm cpus_per_task=8", "cpus_per_task=8|cpus_per_node"),
    (f"train {QUICK} +experiment=aime", "experiment: chosen more than once"),
    (f"train {QUICK} ~trainer", "~trainer|not deleted"),
    ("train --cfg jobs", "--cfg jobs|job, hydra, all"),
    ("train --cfg", "--cfg|job, hydra, all"),
    ("launch slurm site=cpu -- --experiment quickstart", "write +experiment=quickstart"),
    (f"launch slurm site=cpu {QUICK}", f"{QUICK}:|-- {QUICK}"),
    ("launch kuberay trainer.steps=3", "trainer.steps=3|after --"),
    # values
    (f"train {QUICK} trainer.steps=1e3", "trainer.steps=1e3|whole number"),
    (f"train {QUICK} trainer.steps=0", "trainer.steps=0|use 1 or more"),
    (f"train {QUICK} logging.wandb=true", "logging.wandb=true|offline, online, disabled"),
    (f"train {QUICK} task.tools=code_interpreter", "task.tools=code_interpreter|give a list"),
    (f"sft {QUICK} -m trainer.steps=0,1", "trainer.steps=0|use 1 or more"),
    ("analyze model=m tasks=[countdown] analysis=recovry", "analysis=recovry|recovery"),
    # files, folders and places
    (f"train {QUICK} trainer.run_dir=afile/x", "trainer.run_dir='afile/x'|name a folder"),
    (f"train {QUICK} trainer.run_dir=/proc/x", "trainer.run_dir='/proc/x'|name a folder"),
    (f"train {QUICK} trainer.run_name=../x", "trainer.run_name='../x'|trainer.run_dir"),
    (f"train {QUICK} trainer.resume=runs/x", "trainer.resume='runs/x'|not a run folder"),
    (f"train {QUICK} trainer.run_name=live", "trainer.run_name='live'|choose another name"),
    (f"train {QUICK} cold_start.cache=/proc/x", "cold_start.cache='/proc/x'|name a folder"),
    (f"train {QUICK} task.demonstrations_file=rows.jsonl", "rows.jsonl'|use task=jsonl"),
    (f"train {QUICK} task.reward=mine:reward", "task.reward.name='mine:reward'|task=jsonl"),
    (f"train {OWN} task.demonstrations_file=none.jsonl", "'none.jsonl'|no such file"),
    (f"train {OWN} task.demonstrations_file=afile", "task.demonstrations_file='afile'|JSON"),
    (f"train {OWN} task.demonstrations_file=bad.jsonl", "'bad.jsonl'|line 2"),
    (f"train {OWN} task.demonstrations_file=rows.jsonl", "'rows.jsonl'|row 1|messages"),
    (f"train {OWN}", "model.path=None|task.demonstrations_file"),
    ("train task=jsonl model.path=m/m cluster=local", "task.train_file=None|docs/tasks.md"),
    (f"train {QUICK} task.tools=[code_interpreter,nowhere:f]", "'nowhere:f'|nowhere"),
    (f"train {QUICK} cluster=gpu8", "cluster.gpus=True|on CPU with cluster=local"),
    (f"train {QUICK} cluster.address=127.0.0.1:1", "cluster.address='127.0.0.1:1'|ray start"),
    ("train model.path=./none", "model.path='./none'|no such folder"),
    (f"sft {QUICK} trainer.run_dir=/proc/x", "trainer.run_dir='/proc/x'|name a folder"),
    ("evaluate", "model=''|name a Hugging Face folder"),
    ("evaluate model=runs/x tasks=[countdown]", "model='runs/x'|no such folder"),
    ("evaluate model=m/m tasks=[countdown] out=afile", "out='afile'|name a folder"),
    ("evaluate model=m/m tasks=[countdown] out=/proc/x", "out='/proc/x'|name a folder"),
    ("evaluate model=m/m tasks=[countdown] out=runs/live", "out='runs/live'|training run"),
    ("analyze model=m/m tasks=[countdown] out=/proc/x", "out='/proc/x'|name a folder"),
    (f"doctor {QUICK[:-10]}quick", "experiment=quick|quickstart"),
    ("credit none.jsonl", "none.jsonl|name a file of dumped trees"),
    ("credit afile", "afile|no tree in it"),
    ("credit trees.jsonl lam=0.3", "lam=0.3|did you mean credit.lam?"),
    ("view runs/x", "runs/x|no such folder"),
    ("view live --serve --port PORT", "--port PORT|choose another, or 0"),
    ("compare live", "1 runs|name 2 to 6"),
    ("export runs/x", "runs/x|name one under runs/"),
    ("new .", ".:|name a new or an empty folder"),
    ("grade 1", "give GOLD and ANSWER, or --file"),
    ("simulate --success much", "'much'|give numbers, as in"),
    ("launch", "slurm --help"),
    # what a newcomer tries next
    ("train", "no run is named|elpo new|+experiment=quickstart|paper_7b"),
    ("sft", "no run is named|agent.yaml|+experiment=quickstart"),
    (f"train {QUICK} {RESUME} trainer.run_name=zz", "run_name='zz'|write trainer.fork=zz instead"),
    (f"sft {QUICK} {RESUME} trainer.run_name=zz", "run_name='zz'|write trainer.fork=zz instead"),
    (f"train {QUICK} trainer.resume=", "trainer.resume=''|trainer.resume=runs/NAME"),
    (f"train {QUICK} trainer.resume=true", "trainer.resume='|give a run's folder"),
    (f"train {QUICK} trainer.resume=auto", "trainer.resume='auto'|give a run's folder"),
    (f"train {QUICK} {RESUME}/checkpoints/step_00001", "step_00001'|trainer.resume=runs/live;"),
    (f"train {QUICK} {RESUME}/checkpoints", "checkpoints'|trainer.resume=runs/live;"),
    (f"train {QUICK} trainer.run_dir=", "trainer.run_dir=''|name a folder"),
    (f"train {QUICK} cluster.learner_ranks=640", "cluster.learner_ranks=640|processors of this"),
    (f"train {QUICK} cluster.rollout_workers=640", "cluster.rollout_workers=640|processors of"),
    (f"train {QUICK} cluster.address=foo", "cluster.address='foo'|ray start --head|auto"),
    (f"train {QUICK} cluster.address=", "cluster.address=''|ray start --head|auto"),
    (f"train {QUICK} cluster.address=foo:bar", "cluster.address='foo:bar'|ray start --head|auto"),
    (f"evaluate {MEASURED} cluster.address=foo", "cluster.address='foo'|ray start --head|auto"),
    (f"train {QUICK} trainer.inputs_per_step=4", "minibatch_inputs=8|.minibatch_inputs=4"),
    (f"train {QUICK} trainer.inputs_per_step=12", "minibatch_inputs=8|.minibatch_inputs=6"),
    ("evaluate runs/none", "runs/none|write model=runs/none"),
    ("evaluate live", "live|write model=live"),
    (f"evaluate {MEASURED} --limit 5", "--limit 5|write problems=5"),
    (f"analyze {MEASURED} --nonsense", "--nonsense|as in problems=5"),
    ("evaluate word", "word|problems=5"),
    ("credit", "required: TREES.jsonl; try --help"),
    ("export", "required: RUN; try --help"),
    ("view live --out=", "--out is empty|name a file"),
    (f"train {QUICK} learner.optimizer.lr=inf", "lr=inf|above 0; it must be finite"),
    (f"train {QUICK} sampling.temperature=nan", "sampling.temperature=nan|use a value"),
    ("train --per_device_train_batch_size=4", "minibatch_inputs|trainer.inputs_per_step"),
    ("train per_device_train_batch_size=4", "learner.minibatch_inputs|trainer.inputs_per_step"),
    ("train use_vllm=true", "use_vllm=true|leave it out"),
    ("train --use_vllm", "--use_vllm|leave it out"),
    ("train deepspeed=ds.json", "deepspeed=ds.json|learner.zero_stage"),
    ("train --deepspeed ds.json", "--deepspeed ds.json|learner.zero_stage"),
    ("train algorithm.adv_estimator=grpo", "adv_estimator=grpo|algorithm=grpo"),
    (f"launch slurm --submit site=cpu -- {QUICK}", "--submit|sbatch|leave --submit out"),
    (f"launch slurm site=mine -- {QUICK}", "site=mine|cpu, default"),
    (f"launch slurm -- {QUICK}", "gpus_per_node=8|site=cpu"),
    (f"launch kuberay name=My_Run gpus_per_worker=0 -- {QUICK}", "name='My_Run'|lower-case"),
]  # fmt: skip
"""Words after `elpo`, and parts of the answer, between bars."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with an empty file, rows, and the folder of a run that is at work."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "afile").touch()
    (folder / "rows.jsonl").write_text('{"prompt": "What is 3 + 4?", "answer": "7"}\n')
    (folder / "bad.jsonl").write_text('{"messages": []}\n{nope\n')
    (folder / "trees.jsonl").write_bytes((ROOT / "tests/fixtures/figure4.jsonl").read_bytes())
    config = composed([QUICK, f"trainer.run_dir={folder}/runs", "trainer.run_name=live"])
    run = RunFolder.of(config)
    run.begin(config)
    with run.checkpoint(RunState(step=1), 1) as checkpoint:
        (checkpoint / "learner").touch()
    (folder / "live").symlink_to(run.path)
    yield folder
    run.close()


@pytest.fixture(scope="module")
def port() -> Iterator[str]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(("words", "said"), WORDS, ids=[words for words, _ in WORDS])
def test_mistakes_are_answered_in_one_line(
    words: str,
    said: str,
    place: Path,
    port: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, which has the imports of all rows behind it."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    store = ConfigStore.instance()  # where commands leave their groups
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["elpo", *words.replace("PORT", port).split()])
    before = listing(place)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    _, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for part in said.replace("PORT", port).split("|"):
        assert part in err
    assert listing(place) == before, "nothing may be left behind"


@pytest.mark.parametrize(
    "words",
    [
        "train --experiment quickstart",
        f"train {QUICK} trainer.run_dir=/proc/x",
        f"train {OWN}",
        "evaluate model=m/m tasks=[countdown] out=afile",
        "credit none.jsonl",
        f"launch slurm --submit site=cpu -- {QUICK}",
    ],
)
def test_mistakes_are_answered_within_seconds(words: str, place: Path) -> None:
    """As a user meets them, each in a process of its own."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *words.split()],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime < SECONDS


def test_mistakes_with_a_folder_that_another_process_writes_to(place: Path) -> None:
    """A second run in the folder of one that is at work."""
    words = ["train", QUICK, "trainer.resume=runs/live", f"trainer.run_dir={place}/runs"]
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.cli", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"trainer.resume='runs/live': process {os.getpid()} is at work" in done.stderr


def test_mistakes_with_a_full_disk(tmp_path: Path) -> None:
    """Folders can be made where there is no room for a file."""
    full = tmp_path / "full"
    full.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        (full / "filler").write_bytes(bytes(60 << 10))
        with pytest.raises(ValueError, match=r"out='full': .*") as told:
            check_writable(full / "new", "out", "full")
        assert os.strerror(errno.ENOSPC) in str(told.value) and "free disk space" in str(told.value)
        assert [path.name for path in full.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_the_first_line_of_a_run_comes_at_once(place: Path) -> None:
    """The first line is there before a second of processor time is spent, the first phase within
    three; on a machine with nothing else to do that is the time by the clock."""
    process = subprocess.Popen(
        [sys.executable, "-m", "elpo_ray.cli", "train", QUICK, "cold_start.cache=cache"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ticks, spent = os.sysconf("SC_CLK_TCK"), []
    try:
        lines = []
        for _ in range(2):
            lines.append(process.stdout.readline())
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            spent.append((int(fields[11]) + int(fields[12])) / ticks)
    finally:
        process.kill()
        process.wait()
    assert lines[0].startswith("quickstart: elpo on countdown, 20 steps of 16 inputs")
    assert lines[1] == "reading the problems …\n"
    assert spent[0] < 1.0 and spent[1] < 3.0, spent
