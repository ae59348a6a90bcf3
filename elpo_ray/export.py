"""`python -m elpo_ray.export RUN [FOLDER] [step=N] [adapter=merged|only]`: the weights of a run as
a plain Hugging Face folder, which transformers and vLLM load.

Exit codes: 0 done; 2 a mistake in the call or nothing to export, one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from elpo_ray.config.arguments import Parser
from elpo_ray.learner.saved import Adapter, export_run

DESCRIPTION = """\
The weights of a run as a plain Hugging Face folder: weights in the precision in which they were
trained, tokenizer, chat template, generation config, and a model card with what they were trained
on. transformers and vLLM load it, and model.path takes it. No GPU is needed, and memory for the
largest part of the weights only."""
SETTINGS = """\
  step=N          a checkpoint of the run; without it the newest
  adapter=merged  adapters (learner.lora) are added to the weights; this is the default
  adapter=only    the adapters by themselves, for PEFT; the weights below them are not copied

examples:
  elpo export runs/NAME                    to runs/NAME/export
  elpo export runs/NAME out step=40        then: vllm serve out"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser("export", DESCRIPTION, "settings:\n" + SETTINGS)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder or a checkpoint in it")
    parser.add_argument(
        "words", metavar="FOLDER | SETTING=VALUE", nargs="*", help="a new folder, and settings"
    )
    arguments = parser.parse_args(argv)
    return parser.run(lambda: export(arguments.run, arguments.words))


def export(run: Path, words: Sequence[str]) -> None:
    """Export as the words after the run say. Raises ValueError on a word that says nothing."""
    folders = [word for word in words if "=" not in word]
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    if len(folders) > 1:
        raise ValueError(f"{' '.join(folders)}: one folder, please; try --help")
    for key, value in settings.items():
        known = {"step": value.isdecimal(), "adapter": value in {a.value for a in Adapter}}
        if key not in known:
            raise ValueError(f"{key}={value}: no such setting; use step=N or adapter=merged|only")
        if not known[key]:
            remedy = "a number of steps" if key == "step" else "merged or only"
            raise ValueError(f"{key}={value}: use {remedy}")
    step = int(settings["step"]) if "step" in settings else None
    adapter = settings.get("adapter", Adapter.merged.value)
    folder = Path(folders[0]) if folders else None
    print(export_run(run, folder, step, adapter))


if __name__ == "__main__":
    sys.exit(main())
