"""How often searches name the right step, with leaves from real policies and no model at work.

    python benchmarks/localization.py [v0 v20 harder] [--n-total 8 16 32] [--seeds 8]
    python benchmarks/localization.py --model FOLDER_OR_RUN --set task=…        # a bank of its own
    python benchmarks/localization.py --pictures docs/images     # localization.png, search.png

A bank holds what a policy did on the training stream's first problems (`searches/bank.py`): the
tiny policy after its cold start (v0) and after the quickstart's 20 steps (v20), and `harder`: six
numbers, all operators, temperature 1.2. Banks are made once, on CPU in some minutes each, and kept
in `runs/localization/`. Every rule then grows the same trees from them. A line a rule appears
as soon as it is known, with 95 % intervals by bootstrap over problems; `gain` is the difference to
the first rule on the same trees. `--json` writes everything, the calibration too.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # beside this file lies a `sandbox`

from rich.console import Console  # noqa: E402

from benchmarks.searches.bank import facts, make_bank, read_bank, shuffled  # noqa: E402
from benchmarks.searches.pictures import against_budget, one_search  # noqa: E402
from benchmarks.searches.policies import KINDS, Kind, configuration, model_of, policy  # noqa: E402
from benchmarks.searches.replay import replay  # noqa: E402
from benchmarks.searches.rules import RULES, SHUFFLED  # noqa: E402
from benchmarks.searches.tables import HEAD, Row, line, summarize  # noqa: E402

HOME = Path("runs/localization")


def main() -> None:
    args = arguments()
    console = Console(stderr=True)
    names = args.banks or (["model"] if args.model else list(KINDS))
    rows: list[Row] = []
    print(HEAD, flush=True)
    for name in names:
        path = bank_file(name, args, console)
        bank = read_bank(path)
        said = ", ".join(f"{key} {value:.4g}" for key, value in facts(bank).items())
        print(f"{name:8} {said}", flush=True)
        for n_total in args.n_total:
            baseline = None
            for rule in args.rules:
                config = replace(RULES[rule], n_total=n_total)
                tallies = replay(shuffled(bank) if rule == SHUFFLED else bank, config, args.seeds)
                baseline = baseline or tallies
                row = summarize((name, n_total, rule), tallies, baseline)
                rows.append(row)
                print(line(row), flush=True)
        if args.pictures is not None and name == names[0]:
            one_search(bank, RULES["posterior"], args.pictures / "search.png")
    if args.pictures is not None:
        against_budget(rows, args.pictures / "localization.png")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def bank_file(name: str, args: argparse.Namespace, console: Console) -> Path:
    """The file of a bank, which is made if it is not there."""
    path = HOME / f"{name}.jsonl"
    if args.model is not None and name == "model":
        path = HOME / f"model-{Path(args.model).name}.jsonl"
    if not path.exists():
        kind = Kind(tuple(args.set)) if args.model else KINDS[name]
        folder = model_of(args.model) if args.model else policy(name, HOME, console)
        asked = {name: getattr(args, name) for name in ("problems", "roots", "completions")}
        size = replace(kind.size, **{key: value for key, value in asked.items() if value})
        make_bank(configuration(kind), folder, size, path, console)
    return path


def arguments() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("banks", nargs="*", choices=[*KINDS, []], help="all without any")
    parser.add_argument("--model", help="a model folder or a run: make and use its bank")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the quickstart")
    parser.add_argument("--rules", nargs="*", choices=list(RULES), default=list(RULES))
    parser.add_argument("--n-total", nargs="*", type=int, default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, default=8, help="trees of each problem")
    parser.add_argument("--problems", type=int, help="of a new bank")
    parser.add_argument("--roots", type=int, help="trajectories from the prompt of each")
    parser.add_argument("--completions", type=int, help="of each recoverable prefix")
    parser.add_argument("--pictures", type=Path, help="a folder for two pictures")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
