"""draft"""

import argparse, sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
from rich.console import Console
from benchmarks.searches.bank import BankSize, make_bank, read_bank
from benchmarks.searches.policies import KINDS, configuration, policy


def main():
    p = argparse.ArgumentParser()
    p.add_argument("banks", nargs="*", default=list(KINDS))
    p.add_argument("--problems", type=int, default=64)
    p.add_argument("--roots", type=int, default=40)
    p.add_argument("--completions", type=int, default=16)
    a = p.parse_args()
    c = Console(stderr=True)
    home = Path("runs/localization")
    for name in a.banks:
        path = home / f"bank-{name}.jsonl"
        if not path.exists():
            folder = policy(name, home, c)
            c.print(name, folder)
            make_bank(
                configuration(KINDS[name]),
                folder,
                BankSize(a.problems, a.roots, a.completions),
                path,
                c,
            )


if __name__ == "__main__":
    main()
