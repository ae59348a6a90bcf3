"""Launchers: what is rendered, what is refused, how a job goes on, what the preflight says."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from elpo_ray.config.compose import composed
from elpo_ray.config.values import hydra_value
from elpo_ray.doctor.finding import Finding, Status, ok
from launch import preflight
from launch.config import ContainerConfig, KubeRayConfig, Runtime, SlurmConfig
from launch.render import kuberay_manifest, slurm_script
from launch.start import overrides

ROOT = Path(__file__).resolve().parents[3]
CPU = SlurmConfig(gpus_per_node=0, checkout=str(ROOT), time="02:00:00")
QUICK = ["+experiment=quickstart"]
PAPER = ["+experiment=paper_7b"]
SCRIPTS = {
    "one node": (CPU, QUICK),
    "two nodes": (replace(CPU, nodes=2), QUICK),
    "seeds": (replace(CPU, seeds=[4, 7], seeds_at_once=1), QUICK),
    "gpus": (replace(CPU, gpus_per_node=8, memory="0", cpus_per_node=64), PAPER),
    "apptainer": (
        replace(
            CPU,
            gpus_per_node=4,
            nodes=2,
            container=ContainerConfig(
                runtime=Runtime.apptainer, image="/images/it's.sif", mounts=["/data:/data:ro"]
            ),
        ),
        PAPER,
    ),
    "pyxis": (
        replace(
            CPU,
            gpus_per_node=8,
            python="python",
            environment={"NCCL_SOCKET_IFNAME": "^lo"},
            setup=["module load cuda"],
            container=ContainerConfig(runtime=Runtime.pyxis, image="elpo.sqsh"),
        ),
        [*PAPER, "sampling.top_p=0.9", "task.reward.name=verify"],
    ),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_scripts_are_sound_shell(case: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(slurm_script(*SCRIPTS[case]))
    checker = Path(sys.executable).with_name("shellcheck")
    # 2154: variables that Slurm sets; 2317, 2329: functions that a trap calls.
    command = [str(checker), "--severity=warning", "--exclude=SC2154,SC2317,SC2329", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    header = [n for n, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert all(line.startswith("#") for line in lines[: header[-1]]), "sbatch stops at the first"
    assert "#SBATCH --requeue" in lines and "#SBATCH --signal=B:USR1@600" in lines


def test_what_a_script_asks_for() -> None:
    one, two = slurm_script(*SCRIPTS["one node"]), slurm_script(*SCRIPTS["two nodes"])
    assert "symmetric-run" not in one and "--exclusive" not in one
    assert "symmetric-run" in two and "#SBATCH --exclusive" in two
    assert "#SBATCH --array=0-1%1" in slurm_script(*SCRIPTS["seeds"])
    gpus = slurm_script(*SCRIPTS["gpus"]).splitlines()
    assert {"#SBATCH --gres=gpu:8", "#SBATCH --mem=0", "#SBATCH --cpus-per-task=64"} < set(gpus)
    apptainer = slurm_script(*SCRIPTS["apptainer"])
    assert shlex.quote("/images/it's.sif") in apptainer and "exec --nv --bind" in apptainer
    assert "/data:/data:ro" in apptainer
    pyxis = slurm_script(*SCRIPTS["pyxis"])
    assert "--container-image=elpo.sqsh" in pyxis and "export NCCL_SOCKET_IFNAME='^lo'" in pyxis


def test_a_script_asks_for_what_the_actors_of_the_run_need() -> None:
    small = slurm_script(CPU, QUICK).splitlines()
    more = [*QUICK, "cluster.rollout_workers=3", "cluster.engine_threads=2"]
    large = slurm_script(CPU, more).splitlines()
    assert "#SBATCH --cpus-per-task=2" in small and "#SBATCH --cpus-per-task=7" in large
    [one], [other] = ([int(x[14:-1]) for x in each if "--mem=" in x] for each in (small, large))
    assert 4 <= one < other
    gpus = slurm_script(replace(CPU, gpus_per_node=8), PAPER)
    assert re.search(r"^#SBATCH --cpus-per-task=\d\d$", gpus, re.MULTILINE)
    assert "#SBATCH --mem=0" in slurm_script(replace(CPU, nodes=2), QUICK)
    left = slurm_script(replace(CPU, cpus_per_node=0, memory=""), QUICK)
    assert "--cpus-per-task" not in left and "--mem" not in left


def test_an_installation_without_a_checkout_runs_its_own_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = replace(CPU, checkout=None)
    for config in (bare, replace(bare, checkout=str(tmp_path))):
        script = slurm_script(config, QUICK)
        assert f"{sys.executable} -m launch.start" in script and ".venv/bin" not in script.replace(
            sys.executable, ""
        )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").touch()
    assert f"{tmp_path}/.venv/bin/python -m launch.start" in slurm_script(bare, QUICK)


def test_two_runs_on_kubernetes_never_share_a_name_or_a_folder() -> None:
    config = KubeRayConfig(gpus_per_worker=0)
    texts = [kuberay_manifest(config, QUICK) for _ in range(2)]
    texts.append(kuberay_manifest(config, [*QUICK, f"algorithm.name={'A_b/C' * 9}"]))
    names = [yaml.safe_load(text)["metadata"]["name"] for text in texts]
    assert len(set(names)) == 3 and names[0].startswith("quickstart-elpo-")
    for name, text in zip(names, texts, strict=True):
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name)
        assert f"/shared/runs/{name} " in yaml.safe_load(text)["spec"]["entrypoint"]
    named = kuberay_manifest(replace(config, name="mine"), QUICK)
    assert yaml.safe_load(named)["metadata"]["name"] == "mine"


def test_submitting_where_there_is_no_slurm_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "slurm", "--submit", "site=cpu", "--", *QUICK],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "sbatch" in done.stderr and "leave --submit out" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "run", "said"),
    [
        (CPU, PAPER, "nodes x gpus_per_node=0: the run asks for 8 GPUs"),
        (replace(CPU, gpus_per_node=8), QUICK, "the run uses no GPU"),
        (CPU, [*QUICK, "trainer.steps=0"], "trainer.steps=0: use 1 or more"),
        (CPU, [*QUICK, "trainer.stepz=1"], "did you mean trainer.steps"),
        (CPU, [*QUICK, "trainer.run_name=x"], "leave run_name and resume out"),
        (CPU, [*QUICK, "cluster.address=auto"], "the job starts its own Ray"),
        (replace(CPU, seeds=[1]), [*QUICK, "trainer.seed=2"], "trainer.seed or seeds, not both"),
    ],
)
def test_a_run_that_cannot_be_is_refused(config: SlurmConfig, run: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        slurm_script(config, run)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"time": "90"}, "write HH:MM:SS"),
        ({"time": "00:05:00"}, "signal_s=600: must be below time=00:05:00"),
        ({"name": "My Run"}, "lower-case letters"),
        ({"seeds": [1, 1]}, "different values"),
        ({"scratch": "/a/very/long/path/on/this/node"}, "at most 24 characters"),
        ({"nodes": 0}, "use 1 or more"),
        ({"partition": "gpu\nrm -rf /"}, "partition=.*: leave out line breaks"),
        ({"sbatch": ["--mail-type=END\n#SBATCH --uid=0"]}, "sbatch=.*: leave out line breaks"),
        ({"sbatch": ["mail-type=END"]}, "write options as in"),
        ({"logs": "runs/\r"}, "logs=.*: leave out line breaks"),
        ({"logs": "runs/100%"}, "without %"),
        ({"environment": {"A=$(reboot) B": "1"}}, "names no variable"),
    ],
)
def test_keys_have_limits(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SlurmConfig(**values)
    with pytest.raises(ValueError, match=r"container\.image"):
        ContainerConfig(runtime=Runtime.pyxis)


@pytest.mark.parametrize(
    "odd",
    [
        "a\nb",
        "\n#SBATCH --uid=0\n",
        "$(touch hit)",
        "`touch hit`",
        "a'b",
        'a"b',
        "a;b",
        "ü\t\x1b\\",
    ],
)
def test_no_value_of_the_run_becomes_a_line_or_a_command(odd: str, tmp_path: Path) -> None:
    word = f"logging.project={hydra_value(odd)}"
    script = slurm_script(CPU, [*QUICK, word])
    plain = slurm_script(CPU, [*QUICK, "logging.project=x"])
    assert len(script.splitlines()) == len(plain.splitlines())
    assert all(
        a == b or "logging.project" in b
        for a, b in zip(script.splitlines(), plain.splitlines(), strict=True)
    )
    (line,) = (line for line in script.splitlines() if line.startswith("overrides="))
    shown = subprocess.run(
        ["bash", "-c", f"{line}\nprintf '%s\\0' \"${{overrides[@]}}\""],
        capture_output=True,
        cwd=tmp_path,
        check=True,
    )
    assert shown.stdout.decode().split("\0")[:-1] == [*QUICK, word]
    assert not list(tmp_path.iterdir())
    assert composed([*QUICK, word]).logging.project == odd


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"logs": "/my logs"}, '#SBATCH --output="/my logs/%x-%j.log"'),
        ({"logs": '/a"b'}, r'#SBATCH --output="/a\"b/%x-%j.log"'),
        ({"logs": "/ü"}, '#SBATCH --output="/ü/%x-%j.log"'),
        ({"logs": "/logs"}, "#SBATCH --output=/logs/%x-%j.log"),
        ({"logs": "/a b", "seeds": [1, 2]}, '#SBATCH --output="/a b/%x-%A_%a.log"'),
        ({"constraint": "a100&nvlink"}, '#SBATCH --constraint="a100&nvlink"'),
        ({"account": "my group #2"}, '#SBATCH --account="my group #2"'),
    ],
)
def test_what_sbatch_reads_is_quoted_where_it_must_be(values: dict[str, Any], line: str) -> None:
    assert line in slurm_script(replace(CPU, **values), QUICK).splitlines()


def test_folders_with_odd_names_reach_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "my (runs) = ü"
    script = slurm_script(CPU, [*QUICK, f"trainer.run_dir={hydra_value(str(folder))}"])
    assert shlex.quote(f'trainer.run_dir="{folder}"') in script
    run = folder / "job-7"
    assert composed(overrides(run, QUICK, None)).trainer.run_dir == str(folder)
    (run / "checkpoints" / "step_00001").mkdir(parents=True)
    (run / "checkpoints" / "step_00001" / "state.json").write_text("{}")
    assert composed(overrides(run, QUICK, None)).trainer.resume == str(run)


def test_a_printed_script_and_its_command_name_the_folder_that_sbatch_needs(tmp_path: Path) -> None:
    for place in ("jobs", "my jobs"):
        folder = tmp_path / place
        done = subprocess.run(
            [sys.executable, "-m", "launch", "slurm", "site=cpu", f"logs={folder}", "--", *QUICK],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        made = f"mkdir -p {shlex.quote(str(folder))}"
        assert done.returncode == 0 and done.stderr.count("\n") == 1 and made in done.stderr
        before, _, _ = done.stdout.partition("#SBATCH")
        assert made in before
        folder.mkdir()
        again = subprocess.run(
            [sys.executable, "-m", "launch", "slurm", "site=cpu", f"logs={folder}", "--", *QUICK],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert not again.stderr


def test_the_command_prints_a_script_or_one_line() -> None:
    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    variables = ("environment={NCCL_SOCKET_IFNAME: ib0, A: 'x y'}", "environment.B=3")
    done = launch("slurm", "site=cpu", *variables, "--", *QUICK)
    assert done.returncode == 0, done.stderr
    for line in ("NCCL_SOCKET_IFNAME=ib0", "A='x y'", "B=3"):
        assert f"export {line}\n" in done.stdout
    done = launch("slurm", "site=cpu", "nodes=2", "partition=debug", "--", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=debug" in done.stdout and "--min-nodes 2" in done.stdout
    wrong = launch("slurm", "node=2", "--", *QUICK)
    assert wrong.returncode == 2 and wrong.stderr.startswith("elpo_ray: node")
    assert "nodes" in wrong.stderr


# --- going on -------------------------------------------------------------------------------------


def test_a_job_begins_goes_on_and_never_overwrites(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "job-7"
    new = [*QUICK, f"trainer.run_dir={run.parent}", "trainer.run_name=job-7"]
    assert overrides(run, QUICK, None) == new
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("first")
    assert overrides(run, QUICK, None) == new, "nothing to go on from"
    assert (tmp_path / "runs" / "job-7.attempt1" / "config.yaml").read_text() == "first"
    checkpoint = run / "checkpoints" / "step_00003"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text("second")
    (checkpoint / "state.json").write_text("{}")
    resumed = [*QUICK, "cluster.address=n1:20070", f"trainer.resume={run}"]
    assert overrides(run, QUICK, "n1:20070") == resumed


# --- the preflight --------------------------------------------------------------------------------


def place(folder: Path, rank: int = 0, nodes: tuple[str, ...] = ("n1", "n2")) -> preflight.Place:
    return preflight.Place(
        rank=rank, nodes=list(nodes), port=free_port(), shared=folder, timeout_s=0.1
    )


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def test_a_node_that_does_not_share_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "LAST_REPORT_S", 0.1)
    here = place(tmp_path)
    preflight.gather(here, [ok("python", "3.11")])
    reports, (finding,) = preflight.wait_for_reports(here)
    assert list(reports) == ["n1"] and finding.status is Status.FAILURE
    assert "no report of n2" in finding.detail and "same one on all nodes" in finding.remedy


def test_versions_must_be_equal_on_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight.gather(place(tmp_path), [])
    versions = preflight.fingerprint() | {"torch": "2.12.0"}
    monkeypatch.setattr(preflight, "fingerprint", lambda: versions)
    preflight.gather(place(tmp_path, rank=1), [])
    reports, (shared,) = preflight.wait_for_reports(place(tmp_path))
    assert shared.status is Status.OK
    (finding,) = preflight.versions_equal(reports)
    assert finding.status is Status.FAILURE and "2.12.0 on n2" in finding.detail


def test_the_table_shows_the_failures_of_every_node(tmp_path: Path) -> None:
    preflight.gather(place(tmp_path), [ok("python", "3.11")])
    disk = Finding("scratch disk", Status.FAILURE, "0.0 GiB free at /tmp", "free some")
    preflight.gather(place(tmp_path, rank=1), [ok("memory", "much"), disk])
    reports, common = preflight.wait_for_reports(place(tmp_path))
    assert not preflight.table(place(tmp_path), reports, common)
    table = (tmp_path / "preflight.txt").read_text()
    assert "failure  n2, scratch disk: 0.0 GiB free at /tmp" in table and "-> free some" in table
    assert "n1, python" in table and "memory" not in table, "ok lines are the first node's"
    assert table.endswith("preflight: 2 of 2 nodes, 1 failures\n")


def test_nodes_sum_over_gloo_and_say_who_cannot_be_reached(tmp_path: Path) -> None:
    port = free_port()
    program = (
        "import sys; from pathlib import Path; from launch import preflight as p\n"
        "rank, timeout = int(sys.argv[1]), float(sys.argv[2])\n"
        f"place = p.Place(rank=rank, nodes=['localhost', 'other'], port={port},\n"
        "                shared=Path('.'), timeout_s=timeout)\n"
        "for f in p.all_reduce(place, 'gloo'): print(f.status, f.detail, f.remedy)"
    )

    def start(rank: int, timeout: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(rank), str(timeout)]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    for process in [start(0, 60), start(1, 60)]:
        said, _ = process.communicate(timeout=100)
        assert said.startswith("ok 2 nodes"), said
    said, _ = start(0, 2).communicate(timeout=100)
    assert said.startswith("failure") and "GLOO_SOCKET_IFNAME" in said


# --- Kubernetes -----------------------------------------------------------------------------------

TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
QUANTITY = {"type": "string", "pattern": r"^\d+[MG]i$"}


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these fields and no others; all required unless said."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


RESOURCES = closed(["cpu", "memory"], **{"cpu": COUNT, "memory": QUANTITY, "nvidia.com/gpu": COUNT})
POD = closed(
    spec=closed(
        securityContext=closed(runAsNonRoot={"const": True}, runAsUser=COUNT, fsGroup=COUNT),
        containers={
            "type": "array",
            "items": closed(
                ["name", "image", "resources", "volumeMounts", "securityContext"],
                name=TEXT,
                image=TEXT,
                workingDir=TEXT,
                env={"type": "array", "items": closed(name=TEXT, value=TEXT)},
                envFrom={"type": "array", "items": closed(secretRef=closed(name=TEXT))},
                securityContext=closed(
                    allowPrivilegeEscalation={"const": False},
                    capabilities=closed(drop={"const": ["ALL"]}),
                ),
                resources=closed(requests=RESOURCES, limits=RESOURCES),
                volumeMounts={"type": "array", "items": closed(name=TEXT, mountPath=TEXT)},
            ),
        },
        volumes={
            "type": "array",
            "items": closed(
                ["name"],
                name=TEXT,
                persistentVolumeClaim=closed(claimName=TEXT),
                emptyDir=closed(medium={"const": "Memory"}, sizeLimit=QUANTITY),
            ),
        },
    )
)
START = {"type": "object", "additionalProperties": TEXT}
RAY_JOB = closed(
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed(["name"], name=TEXT, namespace=TEXT, labels=START),
    spec=closed(
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=closed(
            rayVersion=TEXT,
            headGroupSpec=closed(rayStartParams=START, template=POD),
            workerGroupSpecs={
                "type": "array",
                "items": closed(
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=START,
                    template=POD,
                ),
            },
        ),
    ),
)
"""The fields of KubeRay's ray.io/v1 that the manifest uses, and their types."""


def test_a_ray_job_has_the_form_that_kuberay_takes() -> None:
    config = KubeRayConfig(
        image="r/elpo:1", workers=2, gpus_per_worker=4, secret="keys", queue="q", namespace="ml"
    )
    job = yaml.safe_load(kuberay_manifest(config, [*PAPER, "task.reward.name=verify"]))
    jsonschema.validate(job, RAY_JOB)
    spec = job["spec"]["rayClusterSpec"]
    (worker,) = spec["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "launch.start"]
    assert f"/shared/runs/{job['metadata']['name']}" in words
    mounts = {m["name"] for m in container["volumeMounts"]}
    volumes = {v["name"] for v in worker["template"]["spec"]["volumes"]}
    assert mounts == volumes == {"shared", "shm"}
    with pytest.raises(ValueError, match="asks for 8 GPUs"):
        kuberay_manifest(replace(config, workers=1), PAPER)
    assert json.dumps(job)  # plain data, no YAML object tags
