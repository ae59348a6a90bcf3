"""What the viewer costs: `python benchmarks/viewer.py [--trees 1000] [--run RUN]` prints JSON.

The run is made up (trees of 16 leaves, grown by the real rule, with some 100 tokens per turn and
their entropies and log-probabilities) or the folder of a real run. `build_s` is the time of the
whole command. `open_s` is the time from navigation to a usable page in headless Chromium at 1280 x
800, and `tree_s` the time from a key press to a drawn tree; both are medians over `--rounds` new
windows. Needs Chromium (ELPO_CHROMIUM, or on PATH) and playwright.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from run_folders import write_run  # noqa: E402

INPUTS_PER_STEP = 50


def build(run: Path, page: Path) -> float:
    """Seconds of the command that a user calls."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "elpo_ray.view", str(run), "--out", str(page)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def look(browser: Browser, page: Path) -> dict[str, float]:
    """One window: open the run, then a tree."""
    window = browser.new_page(viewport={"width": 1280, "height": 800})
    window.goto(page.as_uri())
    window.wait_for_selector("html[data-ready]")
    script = "performance.getEntriesByName('ready')[0].startTime / 1000"
    opened = window.evaluate(script)
    trees = window.evaluate("document.querySelector('.trees .muted').textContent")
    began = time.perf_counter()
    window.keyboard.press("Enter")
    window.wait_for_selector("g.node")
    drawn = time.perf_counter() - began
    heap = window.evaluate("performance.memory.usedJSHeapSize")
    window.close()
    assert "tree" in trees, trees
    return {"open_s": opened, "tree_s": drawn, "heap_mb": heap / 1e6}


def measure(run: Path, page: Path, rounds: int) -> dict[str, Any]:
    build_s = build(run, page)
    dumps = list((run / "trees").glob("*.jsonl"))
    chromium = os.environ.get("ELPO_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium)
        version = browser.version
        looks = [look(browser, page) for _ in range(rounds)]
        browser.close()
    return {
        "trees": sum(len(dump.read_text().splitlines()) for dump in dumps),
        "dump_mb": round(sum(dump.stat().st_size for dump in dumps) / 1e6, 1),
        "page_mb": round(page.stat().st_size / 1e6, 1),
        "build_s": round(build_s, 2),
        **{key: round(median(one[key] for one in looks), 3) for key in looks[0]},
        "open_s_all": [round(one["open_s"], 3) for one in looks],
        "chromium": version,
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the viewer; prints JSON.")
    parser.add_argument("--trees", type=int, default=1000)
    parser.add_argument("--run", type=Path, help="a run folder instead of a made-up one")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run
        if run is None:
            steps = max(1, arguments.trees // INPUTS_PER_STEP)
            run = write_run(Path(folder) / "made_up", steps, arguments.trees // steps)
        print(json.dumps(measure(run, Path(folder) / "view.html", arguments.rounds), indent=1))


if __name__ == "__main__":
    main()
