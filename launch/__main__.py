"""`python -m launch slurm|kuberay [--submit] [FILE] [KEY=VALUE …] -- [the run's KEY=VALUE …]`.

Prints a Slurm script or a KubeRay manifest; with `--submit` the script is kept under `logs` and
given to sbatch. `python -m launch monitoring FOLDER` writes what Prometheus and Grafana read.
Exit codes: 0 done; 1 sbatch refused; 2 a mistake, one line on stderr.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from elpo_ray.config import Config
from elpo_ray.config.arguments import VERSION, into_a_pipe, version
from elpo_ray.config.compose import Command
from elpo_ray.config.files import is_file
from elpo_ray.config.rules import require
from elpo_ray.runs.atomic import check_writable
from launch.config import KubeRayConfig, SlurmConfig
from launch.monitoring.dashboard import write
from launch.render import kuberay_manifest, slurm_script

CONF = Path(__file__).parent / "conf"
SUBMIT = "--submit"


def slurm(config: SlurmConfig, *, overrides: list[str], submit: bool) -> int:
    """Print the script, or keep and submit it."""
    require(
        not submit or shutil.which("sbatch") is not None,
        SUBMIT,
        "slurm",
        "there is no sbatch on this machine's PATH; run it where jobs are submitted, or leave "
        f"{SUBMIT} out to print the script",
    )
    script = slurm_script(config, overrides)
    logs = Path(config.checkout or ".") / config.logs
    if not submit:
        print(script, end="")
        if not logs.is_dir():
            made = f"mkdir -p {shlex.quote(str(logs.absolute()))}"
            print(f"launch: before sbatch, which writes no log otherwise: {made}", file=sys.stderr)
        return 0
    check_writable(logs, "logs", config.logs)
    logs.mkdir(parents=True, exist_ok=True)  # sbatch writes no log where there is no folder
    kept = logs / f"{config.name}.sbatch"
    kept.write_text(script, encoding="utf-8")
    print(f"script: {kept}")
    return int(subprocess.run(["sbatch", str(kept)]).returncode != 0)


def kuberay(config: KubeRayConfig, *, overrides: list[str]) -> int:
    """Print the manifest of a RayJob and return the exit code."""
    print(kuberay_manifest(config, overrides), end="")
    return 0


def main() -> None:
    """Run the launcher that the first word names."""
    words = sys.argv[1:]
    kind = words[0] if words else ""
    if kind in ("-h", "--help", VERSION):
        with into_a_pipe():
            print(version() if kind == VERSION else __doc__)
        return
    if kind == "monitoring" and len(words) == 2 and not words[1].startswith("-"):
        try:
            write(Path(words[1]))
        except OSError as error:
            print(f"launch: {words[1]}: {error.strerror}; name another folder", file=sys.stderr)
            sys.exit(2)
        return
    if kind not in ("slurm", "kuberay"):
        print("launch: use slurm --help, kuberay --help or monitoring FOLDER", file=sys.stderr)
        sys.exit(2)
    cut = words.index("--") if "--" in words else len(words)
    own, rest = words[1:cut], words[cut + 1 :]
    rest = [*filter(is_file, own), *rest]  # a run's file may also stand before the dashes
    own = [word for word in own if not is_file(word)]
    schema: type = SlurmConfig if kind == "slurm" else KubeRayConfig
    ours = {field.name for field in fields(schema)}
    theirs = {field.name for field in fields(Config)} - ours
    for word in own:
        if word.lstrip("+").partition("=")[0].split(".")[0] in theirs:
            remedy = f"write the run's own keys after --, as in launch {kind} … -- {word}"
            print(f"elpo_ray: {word}: no key of the job; {remedy}", file=sys.stderr)
            sys.exit(2)
    sys.argv[1:] = [word for word in own if word != SUBMIT]
    if kind == "slurm":
        run = partial(slurm, overrides=rest, submit=SUBMIT in own)
        Command(SlurmConfig, "slurm", run, CONF)()
    Command(KubeRayConfig, "kuberay", partial(kuberay, overrides=rest), CONF)()


if __name__ == "__main__":
    main()
