"""The viewer's page in headless Chromium: offline, by keyboard, in whatever state the run is.

Needs a Chromium binary: ELPO_CHROMIUM, or chromium, chromium-browser or google-chrome on PATH.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import write_run

from elpo_ray import compare
from elpo_ray.config.algorithm import AlgorithmConfig
from elpo_ray.config.growth import GrowthConfig, GrowthRule, PosteriorConfig, Prior
from elpo_ray.credit.__main__ import credit_lines
from elpo_ray.runs.log import LOG
from elpo_ray.view.__main__ import main
from elpo_ray.view.book import Book
from elpo_ray.view.records import PageLimits
from elpo_ray.view.server import make_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.real
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("ELPO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip(
        f"no browser: set ELPO_CHROMIUM, or put one of {', '.join(NAMES)} on PATH",
        allow_module_level=True,
    )
FIGURE_4 = (Path(__file__).parents[2] / "fixtures/figure4.jsonl").read_text()
STEPS, INPUTS = 3, 4


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "playwright.Browser") -> Iterator["playwright.Page"]:
    """A page that fails the test on any error of its script and on any request to a network."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
            else wrong.append(request.url)
        ),
    )
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "made", STEPS, INPUTS)
    assert main([str(folder)]) == 0
    return folder


def show(page: "playwright.Page", file: Path, route: str = "") -> None:
    page.goto(file.as_uri() + route)
    page.wait_for_selector("html[data-ready]")


def test_the_run_page_has_curves_and_every_tree(page: "playwright.Page", run: Path) -> None:
    show(page, run / "view.html")
    assert page.locator("h1").inner_text() == "made"
    assert "finished, 3 steps" in page.locator(".state").inner_text()
    assert page.locator("figure.chart").count() >= 6
    assert page.locator(".scroller tbody tr.row").count() == STEPS * INPUTS
    assert page.locator(".notices").count() == 0
    wide = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not wide, "wider than a laptop's window"


@pytest.mark.parametrize("route", ["", "#/tree/2/1"])
def test_a_telephone_is_wide_enough(page: "playwright.Page", run: Path, route: str) -> None:
    """390 pixels: nothing but a table or a drawing, which scroll by themselves, is wider."""
    page.set_viewport_size({"width": 390, "height": 844})
    show(page, run / "view.html", route)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        inside = button.evaluate("each => each.closest('.scroller') === null")
        assert box is not None and not (inside and box["x"] + box["width"] > 391)
    page.locator(".scroller tr.row td, g.node").first.click()
    page.wait_for_selector("main.tree .details")
    details = page.locator(".details").bounding_box()
    assert details is not None and round(details["width"]) == 390


def test_a_comparison_fits_a_telephone(page: "playwright.Page", tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    runs = [str(write_run(tmp_path / f"run{steps}", steps, 2)) for steps in (2, 3)]
    out = tmp_path / "compare.html"
    assert compare.main([*runs, "--out", str(out)]) == 0
    show(page, out)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_table_sorts_filters_and_searches(page: "playwright.Page", run: Path) -> None:
    show(page, run / "view.html")
    rows = page.locator(".scroller tbody tr.row")
    page.get_by_role("button", name="reward", exact=True).click()
    rewards = [
        float(cell.inner_text().replace("−", "-"))
        for cell in page.locator(".scroller tbody tr.row td:nth-child(4)").all()
    ]
    assert rewards == sorted(rewards, reverse=True)
    page.get_by_role("searchbox").fill("train-2001")
    assert rows.count() == 1 and "train-2001" in rows.inner_text()
    page.get_by_role("searchbox").fill("")
    chips = page.locator(".chips .chip:visible")
    for chip in chips.all():
        chip.click()
        assert rows.count() == int(chip.locator("small").inner_text())


def test_enter_searches_the_texts_of_every_tree(page: "playwright.Page", run: Path) -> None:
    lines = [
        (step, line, record)
        for step in range(1, STEPS + 1)
        for line, record in enumerate(
            (run / "trees" / f"step_{step:05d}.jsonl").read_text().splitlines(), start=1
        )
    ]
    wanted = json.loads(lines[5][2])["nodes"][1]["text"][:60]
    holding = [place for place in lines if wanted in place[2]]
    show(page, run / "view.html")
    page.get_by_role("searchbox").fill(wanted)
    page.keyboard.press("Enter")
    rows = page.locator(".scroller tbody tr.row")
    playwright.expect(rows).to_have_count(len(holding))


def test_the_tree_page_shows_the_credit_that_the_command_prints(
    page: "playwright.Page", run: Path
) -> None:
    dump = run / "trees" / "step_00002.jsonl"
    credit = json.loads(next(credit_lines(dump, AlgorithmConfig())))["nodes"]
    show(page, run / "view.html", "#/tree/2/1")
    nodes = page.locator("g.node")
    assert nodes.count() == len(credit)
    for i in (1, len(credit) // 2, len(credit) - 1):
        shown = nodes.nth(i).locator(".second text").first.text_content() or ""
        expected = f"{credit[i]['advantage']:+.2f}".replace("-", "−")
        assert shown == f"A {'0.00' if expected in ('+0.00', '−0.00') else expected}"
    leaves = json.loads(dump.read_text().splitlines()[0])["nodes"]
    failed = sum(node.get("success") is False for node in leaves)
    assert page.locator("g.sign.failure").count() == failed
    page.get_by_role("button", name="✗").click()
    dim = page.locator("g.node.leaf.dim").count()
    assert dim == page.locator("g.sign.success").count()


def test_a_tree_is_read_with_the_keyboard_alone(page: "playwright.Page", run: Path) -> None:
    show(page, run / "view.html")
    page.keyboard.press("f")
    assert page.locator(".chip[aria-pressed=true]").inner_text().startswith("mixed")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("main.tree")
    first = page.locator("h1").inner_text()
    page.keyboard.press("]")
    page.wait_for_function("name => document.querySelector('h1').textContent !== name", arg=first)
    page.keyboard.press("[")
    page.wait_for_function("name => document.querySelector('h1').textContent === name", arg=first)
    selected = page.locator("g.node.selected")
    before = selected.get_attribute("aria-label")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert selected.get_attribute("aria-label") != before
    page.keyboard.press("5")
    assert page.locator(".segments [aria-pressed=true]").first.inner_text() == "H"
    page.keyboard.press("t")
    page.keyboard.press("t")
    assert page.get_by_role("tab", selected=True).inner_text() == "Tokens"
    assert page.locator(".token").count() > 20
    page.keyboard.press("d")
    page.wait_for_selector("html[data-theme=dark] main.tree")
    page.keyboard.press("/")
    page.keyboard.type("boxed")
    assert page.locator("g.node.dim").count() > 0
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("dialog.help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.wait_for_selector("main.run")


def test_the_search_for_the_critical_step_is_drawn(page: "playwright.Page", tmp_path: Path) -> None:
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "step_00001.jsonl").write_text(FIGURE_4)
    assert main([str(tmp_path)]) == 0
    show(page, tmp_path / "view.html", "#/tree/1/1")
    assert "config.yaml" not in page.locator("main").inner_text()
    assert page.locator("rect.critical").count() == 2
    assert page.locator(".canvas .anchor .tally").all_text_contents() == ["0/2"]
    page.keyboard.press("s")
    assert sorted(page.locator(".canvas .anchor .tally").all_text_contents()) == ["0/3", "2/2"]
    order = page.locator(".canvas .anchor text:not(.tally)").all_text_contents()
    assert order == ["1", "2"]
    assert "Step 2 of 3" in page.locator(".searches").inner_text()
    # In the regions: 1, 2, 3 and 7 to 10 below node 1; 12, 13 and 24 to 26 below node 12
    assert page.locator("rect.elc").count() == 12


def test_bad_input_is_told_and_the_rest_is_shown(page: "playwright.Page", tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 2, planned=9)
    with (run / "trees" / "step_00002.jsonl").open("a") as file:
        file.write(FIGURE_4.replace('"format": 1', '"format": 0') + FIGURE_4 + FIGURE_4[:500])
    assert main([str(run)]) == 0
    show(page, run / "view.html")
    told = page.locator(".notices").inner_text()
    assert "format=0" in told and "cut off" in told and "step_00002.jsonl:5" in told
    assert "2 of 9 steps" in page.locator(".state").inner_text()
    assert page.locator(".scroller tbody tr.row").count() == 5
    show(page, run / "view.html", "#/tree/2/4")
    assert page.locator("h1").inner_text() == "figure4"
    page.goto((run / "view.html").as_uri() + "#/tree/2/99")
    playwright.expect(page.locator(".notices")).to_contain_text("no tree in line 99")


def test_runs_are_compared_over_what_they_spent(page: "playwright.Page", tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / f"run{steps}", steps, 2)) for steps in (2, 3)]
    out = tmp_path / "compare.html"
    assert compare.main([*runs, "--out", str(out)]) == 0
    show(page, out)
    assert "budgets differ in rollouts" in page.locator(".notices").inner_text()
    axis = page.locator("figure.chart .tick").last
    assert axis.text_content() == "rollouts 96"
    page.get_by_role("button", name="common budget").click()
    assert axis.text_content() == "rollouts 64"
    page.get_by_role("button", name="steps", exact=True).click()
    assert axis.text_content() == "steps 2"
    assert page.get_by_role("row", name="trainer.steps").locator("td").all_inner_texts() == [
        "2",
        "3",
    ]


def evaluated(run: Path, *steps: int) -> Path:
    """Give a run held-out evaluations of two benchmarks after these steps."""
    rows = {row["step"]: row for line in (run / LOG).open() for row in [json.loads(line)]}
    for step in steps:
        row = rows.setdefault(step, {"step": step, "total/leaves": 0.0})
        for key, value in (("", 0.4), ("aime24/", 0.5), ("aime25/", 0.3)):
            mean = value + step / 100
            ends = {"low": mean - 0.1, "high": mean + 0.1}
            row |= {f"eval/{key}pass_at_1": mean}
            row |= {f"eval/{key}pass_at_1_{end}": x for end, x in ends.items()}
    text = "".join(json.dumps(rows[step]) + "\n" for step in sorted(rows))
    (run / LOG).write_text(text)
    return run


def test_the_run_page_opens_on_the_held_out_curve(page: "playwright.Page", tmp_path: Path) -> None:
    run = evaluated(write_run(tmp_path / "run", 3, 2, planned=9), 0, 2, 3)
    assert main([str(run)]) == 0
    show(page, run / "view.html")
    first = page.locator("figure.chart").first
    assert first.locator("figcaption b").inner_text() == "held-out pass@1"
    assert first.bounding_box()["y"] < 400, "it is seen without scrolling"  # type: ignore[index]
    assert first.locator(".keys").inner_text().split() == ["all", "problems", "aime24", "aime25"]
    assert first.locator("path.band").count() == 3 == first.locator(".point-0").count()
    assert "43.0% (33.0% to 53.0%)" in first.locator(".readout").inner_text()
    assert "held-out pass@1\n43.0%\nstep 3" in page.locator(".tiles").inner_text()


def test_held_out_curves_of_runs_are_compared(page: "playwright.Page", tmp_path: Path) -> None:
    runs = [evaluated(write_run(tmp_path / f"r{n}", n, 2), 0, n) for n in (2, 3)]
    out = tmp_path / "compare.html"
    assert compare.main([*map(str, runs), "--out", str(out)]) == 0
    show(page, out)
    titles = page.locator("figure.chart figcaption b").all_inner_texts()
    assert titles[:3] == ["held-out pass@1", "held-out pass@1, aime24", "held-out pass@1, aime25"]
    assert page.locator("figure.chart").first.locator("path.band").count() == 2
    last = page.get_by_role("row", name="all problems, last").locator("td").all_inner_texts()
    assert last == ["42.0% (32.0 to 52.0), step 2", "43.0% (33.0 to 53.0), step 3"]


def test_a_served_run_is_followed(page: "playwright.Page", tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, 2, planned=2)
    server = make_server(Book(run, PageLimits()), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for_selector("html[data-ready]")
        rows = page.locator(".scroller tbody tr.row")
        assert rows.count() == 2
        text = (run / "trees" / "step_00001.jsonl").read_text()
        (run / "trees" / "step_00002.jsonl").write_text(text)
        playwright.expect(rows).to_have_count(4, timeout=15_000)
        rows.first.click()
        page.wait_for_selector("g.node")
        answer = page.request.get(page.url, headers={"Host": "evil.example"})
        assert answer.status == 403
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_run_of_300_trees_opens_fast(page: "playwright.Page", tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, 100, words=5)
    assert main([str(run)]) == 0
    began = time.monotonic()
    show(page, run / "view.html")
    assert time.monotonic() - began < 10, "ten times what an idle machine takes"
    drawn = page.locator(".scroller tbody tr.row").count()
    assert 10 < drawn < 80, "rows out of sight are drawn"
    page.locator(".scroller").press("End")
    assert page.locator(".scroller tr.row.active").is_visible()


def test_the_searches_panel_draws_the_posterior_as_it_moves(
    page: "playwright.Page", tmp_path: Path
) -> None:
    growth = GrowthConfig(rule=GrowthRule.posterior, posterior=PosteriorConfig(prior=Prior.uniform))
    made = write_run(tmp_path / "posterior", 1, 6, growth=growth)
    assert main([str(made), "--out", str(tmp_path / "view.html")]) == 0
    lines = (made / "trees" / "step_00001.jsonl").read_text().splitlines()
    trees = [json.loads(line)["localizations"] for line in lines]
    place, found = next((i, t[0]) for i, t in enumerate(trees) if t and t[0]["probes"])
    show(page, tmp_path / "view.html", f"#/tree/1/{place + 1}")
    panel = page.locator("section.searches")
    rows = len(found["posterior"]["trail"]) + 1
    assert panel.locator("svg.search .base").count() == rows
    assert panel.locator("svg.search .belief").count() == rows * len(found["posterior"]["prior"])
    assert panel.locator("svg.search .anchor").count() == len(found["probes"])
    last = found["posterior"]["trail"][-1]
    said = panel.text_content() or ""
    if found["critical"] is None:
        assert "No step named" in said
    else:
        assert f"with probability {100 * max(last):.1f}%" in said
