"""`elpo`: one name for all commands.

Each command is a module of its own, and `elpo NAME` does what `python -m elpo_ray.NAME` does. This
module also completes the line in a shell: by Hydra where Hydra configures the command.
"""

from __future__ import annotations

import sys

try:
    import difflib
    import os
    import runpy
    from dataclasses import dataclass
    from typing import NoReturn

    from elpo_ray.config.arguments import (
        EXIT_CONFIGURATION,
        EXIT_INTERRUPTED,
        VERSION,
        into_a_pipe,
        version,
    )
    from elpo_ray.config.files import is_file
    from elpo_ray.config.modules import use_working_folder
except KeyboardInterrupt:  # these take a tenth of a second
    sys.exit(130)

_SHELL = "-sc"
"""Hydra's option for completion: `-sc install=bash`, `-sc query=bash`, …"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One command."""

    module: str
    summary: str
    configured: bool = False
    """Whether Hydra reads its command line."""


COMMANDS: dict[str, Entry] = {
    "new": Entry("elpo_ray.new", "a project of your own to start from"),
    "train": Entry("elpo_ray.main", "train an agent: FILE.yaml key=value …", True),
    "sft": Entry("elpo_ray.sft", "the cold start alone", True),
    "evaluate": Entry("elpo_ray.evaluate", "avg@n, Pass@K and Major@K of a model", True),
    "analyze": Entry("elpo_ray.analyze", "the paper's analyses of a model", True),
    "export": Entry("elpo_ray.export", "a run's weights as a Hugging Face folder"),
    "view": Entry("elpo_ray.view", "a page with a run's curves and rollout trees"),
    "compare": Entry("elpo_ray.compare", "what differs between runs, and what came of it"),
    "study": Entry("elpo_ray.study", "runs of several algorithms, tasks and seeds, and a report"),
    "doctor": Entry("elpo_ray.doctor", "what this machine lacks for a run", True),
    "grade": Entry("elpo_ray.grade", "the verdict on a mathematical answer, and why"),
    "launch": Entry("launch", "a Slurm script or a KubeRay manifest of a run"),
    "credit": Entry("elpo_ray.credit", "advantages and clip bounds of dumped trees"),
    "simulate": Entry("elpo_ray.simulate", "what N_total, X and K a search needs"),
}

MEANT = {
    "run": "train", "rl": "train", "grpo": "train", "finetune": "sft", "eval": "evaluate",
    "test": "evaluate", "init": "new", "create": "new", "merge": "export", "convert": "export",
    "visualize": "view", "show": "view", "serve": "view", "diff": "compare", "env": "doctor",
    "check": "doctor", "submit": "launch", "slurm": "launch slurm", "kuberay": "launch kuberay",
}  # fmt: skip
"""Commands of other programs, and ours that does the same."""


def main() -> None:
    """The console script. Ends the process with the command's exit code, 2 if there is none."""
    given = sys.argv[1:]
    with into_a_pipe():
        if not given or given[0] in ("-h", "--help", "help"):
            print(_help())
        elif given[0] in (VERSION, "version"):
            print(version())
        elif given[0] == _SHELL:
            _complete(given[1:])
        elif given[0] in COMMANDS:
            _run(given[0], given[1:])
        else:
            _refuse(given[0])


def _run(name: str, arguments: list[str]) -> None:
    sys.argv = [f"elpo {name}", *arguments]
    try:
        use_working_folder()
        runpy.run_module(COMMANDS[name].module, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _complete(arguments: list[str]) -> None:
    """What Hydra's shell script asks: the commands' names, or the words that a command takes."""
    if not arguments or not arguments[0].startswith("query="):  # the script itself
        sys.argv = ["elpo", _SHELL, *arguments]
        runpy.run_module(COMMANDS["train"].module, run_name="__main__")
        return
    line = os.environ.get("COMP_LINE", "")
    _, _, rest = line.partition(" ")
    name, typed_on, words = rest.lstrip().partition(" ")
    if not typed_on:
        print(" ".join(each for each in COMMANDS if each.startswith(name)))
    elif name in COMMANDS and COMMANDS[name].configured:
        keys = [word for word in words.split(" ") if not is_file(word)]
        os.environ["COMP_LINE"] = " ".join(["elpo", *keys])
        _run(name, [_SHELL, *arguments])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(
        [
            "usage: elpo COMMAND …",
            "",
            *lines,
            "",
            "elpo COMMAND --help says more. Completion in bash, for this shell:",
            f'  eval "$(elpo {_SHELL} install=bash)"',
        ]
    )


def _refuse(name: str) -> NoReturn:
    near = difflib.get_close_matches(name, COMMANDS, n=1) or [
        command for command in [MEANT.get(name.lstrip("-"))] if command
    ]
    if near:
        remedy = f"did you mean elpo {near[0]}?"
    elif "=" in name or is_file(name):
        remedy = f"a command comes first, as in elpo train {name}"
    else:
        remedy = f"use one of {', '.join(COMMANDS)}"
    print(f"elpo: no command {name!r}; {remedy}", file=sys.stderr)
    sys.exit(EXIT_CONFIGURATION)


if __name__ == "__main__":
    main()
