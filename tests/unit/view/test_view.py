"""The viewer's data: what a run folder holds, in whatever state, becomes a page that says so."""

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import grow, write_run

from elpo_ray.config import Config
from elpo_ray.config.algorithm import AlgorithmConfig, ElcScope
from elpo_ray.config.growth import GrowthConfig, GrowthRule
from elpo_ray.config.model import ModelConfig
from elpo_ray.credit import assign
from elpo_ray.dump import dump_tree, read_line, read_tree
from elpo_ray.view.__main__ import main
from elpo_ray.view.book import Book
from elpo_ray.view.page import whole_page
from elpo_ray.view.records import PageLimits, clipped, short, table_row, tree_record
from sandbox.limits import MAX_FIGURES

ROOT = Path(__file__).parents[3]
FIGURE_4 = (ROOT / "tests/fixtures/figure4.jsonl").read_text()


def opened(run: Path, limits: PageLimits | None = None) -> Book:
    book = Book(run, limits or PageLimits())
    book.refresh()
    return book


def overview(book: Book) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(zlib.decompress(book.overview()))
    return data


def tree_of(book: Book, row: int) -> dict[str, Any]:
    """The record of a line of the table."""
    table = overview(book)["table"]
    chunk = json.loads(zlib.decompress(book.chunks()[table["chunk"][row]]))
    record: dict[str, Any] = chunk["trees"][table["place"][row]]
    return record


def notices(book: Book) -> list[str]:
    return [
        f"{n['count']} x {n['text']}: {', '.join(n['where'])}" for n in overview(book)["notices"]
    ]


def bare_run(folder: Path, *lines: str) -> Path:
    """A folder with one step of dumped trees and nothing else."""
    (folder / "trees").mkdir(parents=True)
    (folder / "trees" / "step_00001.jsonl").write_text("".join(lines))
    return folder


def test_every_tree_of_a_run_is_in_the_table_and_in_a_chunk(tmp_path: Path) -> None:
    book = opened(write_run(tmp_path / "run", 3, 4))
    data = overview(book)
    table = data["table"]
    assert list(zip(table["step"], table["line"], strict=True)) == [
        (step, line) for step in (1, 2, 3) for line in (1, 2, 3, 4)
    ]
    assert {len(column) for column in table.values()} == {12}
    assert [tree_of(book, row)["task"] for row in range(12)] == table["task"]
    assert data["metrics"]["step"] == [1, 2, 3] and data["finished"] and data["notices"] == []
    assert data["algorithm"]["name"] == "elpo" and data["planned"] == 3


def test_credit_is_that_of_the_trainer_with_the_run_s_own_configuration(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, 2)
    config = (run / "config.yaml").read_text()
    assert "lam: 0.5" in config
    (run / "config.yaml").write_text(config.replace("lam: 0.5", "lam: 0.25"))
    algorithm = AlgorithmConfig()
    algorithm.credit.lam = 0.25
    lines = (run / "trees" / "step_00001.jsonl").read_text().splitlines()
    trees = [read_line(line) for line in lines]
    book = opened(run)
    for row, credit in enumerate(assign(trees, algorithm)):
        columns = tree_of(book, row)["columns"]
        for name in ("r", "a_branch", "a_traj", "advantage", "clip_low"):
            assert columns[name] == pytest.approx(getattr(credit, name).tolist(), rel=1e-4)


def test_the_paper_s_figure_4_is_shown_as_it_is_printed(tmp_path: Path) -> None:
    book = opened(bare_run(tmp_path / "run", FIGURE_4))
    record = tree_of(book, 0)
    tree = read_line(FIGURE_4)
    expected = assign([tree], AlgorithmConfig())[0]
    assert record["columns"]["advantage"] == pytest.approx(expected.advantage.tolist(), rel=1e-4)
    assert [found["step"] for found in record["searches"]] == [1, 2]
    assert record["searches"][1]["probes"][1] == {"anchor": 2, "attempts": 3, "successes": 0}
    assert "text" not in record["columns"] and record["messages"] == []
    assert overview(book)["table"]["critical"] == [1]
    assert [n["where"] for n in overview(book)["notices"]] == [["config.yaml"]]


def test_a_search_by_evidence_is_shown_with_its_posterior(tmp_path: Path) -> None:
    growth = GrowthConfig(rule=GrowthRule.posterior)
    run = write_run(tmp_path / "run", 1, 4, growth=growth)
    book = opened(run)
    lines = (run / "trees" / "step_00001.jsonl").read_text().splitlines()
    searches = [json.loads(line)["localizations"] for line in lines]
    assert any(searches)
    for row, found in enumerate(searches):
        shown = tree_of(book, row)["searches"]
        for mine, dumped in zip(shown, found, strict=True):
            belief = dumped["posterior"]
            assert mine["posterior"]["free"] == belief["free"]
            assert len(mine["posterior"]["trail"]) == len(dumped["probes"]) + 1
            for seen, stored in zip(mine["posterior"]["trail"], belief["trail"], strict=True):
                assert seen == pytest.approx(stored, rel=1e-4)
    assert overview(book)["algorithm"]["growth"] == "posterior"
    binary = opened(write_run(tmp_path / "binary", 1, 1))
    assert all(search["posterior"] is None for search in tree_of(binary, 0)["searches"])


def test_a_run_that_is_being_written_grows_without_reading_old_steps_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, 2, planned=5)
    third = run / "trees" / "step_00003.jsonl"
    book = opened(run)
    assert not overview(book)["finished"] and overview(book)["planned"] == 5
    assert not book.refresh()
    before = set(book.chunks())
    whole = (run / "trees" / "step_00002.jsonl").read_text()
    third.write_text(whole[: len(whole) * 3 // 4])
    assert book.refresh() and before < set(book.chunks())
    assert overview(book)["table"]["step"] == [1, 1, 2, 2, 3]
    assert len(notices(book)) == 1 and "cut off" in notices(book)[0]
    assert "trees/step_00003.jsonl:2" in notices(book)[0]
    third.write_text(whole)
    assert book.refresh() and overview(book)["table"]["step"] == [1, 1, 2, 2, 3, 3]
    assert notices(book) == [] and before < set(book.chunks())


@pytest.mark.parametrize(
    ("line", "notice"),
    [
        ("{nope\n", "1 x not JSON: trees/step_00001.jsonl:1"),
        ("[]\n", "1 x not a JSON object: trees/step_00001.jsonl:1"),
        ('{"task_id": "t", "budget": 1}\n', "1 x tree not shown: nodes=None: is missing"),
        (FIGURE_4.replace('"format": 1', '"format": 0'), "reader knows format 1"),
        (FIGURE_4.replace('"critical": 12', '"critical": 3'), "must be on the path to 13"),
    ],
)
def test_what_cannot_be_read_is_named_and_the_rest_is_shown(
    tmp_path: Path, line: str, notice: str
) -> None:
    book = opened(bare_run(tmp_path / "run", line, FIGURE_4, "\n"))
    assert overview(book)["table"]["line"] == [2]
    assert any(notice in printed for printed in notices(book)), notices(book)


def test_equal_faults_are_listed_once(tmp_path: Path) -> None:
    old = FIGURE_4.replace('"format": 1', '"format": 0')
    book = opened(bare_run(tmp_path / "run", *[old] * 50))
    assert overview(book)["table"] == {"chunk": []}
    assert notices(book)[1].startswith("50 x ") and notices(book)[1].count("step_00001") == 3


@pytest.mark.parametrize(
    "config", ["", "a: [1\n", "algorithm: {lam: 3}\n", "algorithm: {credit: {lam: 7}}\n", "- 1\n"]
)
def test_a_configuration_of_another_version_is_noticed(tmp_path: Path, config: str) -> None:
    run = bare_run(tmp_path / "run", FIGURE_4)
    (run / "config.yaml").write_text(config)
    book = opened(run)
    assert overview(book)["table"]["task"] == ["figure4"]
    printed = [n for n in notices(book) if "defaults of ELPO" in n]
    assert len(printed) == (1 if config else 0)


def test_a_rule_that_needs_more_than_the_dump_has_leaves_the_tree_without_credit(
    tmp_path: Path,
) -> None:
    run = bare_run(tmp_path / "run", FIGURE_4)
    (run / "config.yaml").write_text("algorithm: {credit: {rule: whitened}}\n")
    book = opened(run)
    assert "advantage" not in tree_of(book, 0)["columns"]
    assert overview(book)["table"]["spread"] == [None]
    assert "num_action_tokens" in notices(book)[0] and "without credit" in notices(book)[0]


def test_metrics_with_faults_and_values_that_are_no_numbers(tmp_path: Path) -> None:
    run = bare_run(tmp_path / "run", FIGURE_4)
    lines = [
        '{"step": 2, "loss": NaN, "reward": 1}',
        "junk",
        '{"loss": 1}',
        '{"step": 1, "reward": 0.5, "note": "text"}',
        '{"step": 2, "reward": 2}',
        '{"step": 3',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    data = overview(opened(run))
    assert data["metrics"] == {"step": [1, 2], "reward": [0.5, 2]}
    assert {n["text"][:20] for n in data["notices"]} >= {"not JSON", "no step in this line"[:20]}


def test_images_are_shown_if_they_are_sound(tmp_path: Path) -> None:
    data = (b"IHDR", struct.pack(">IIBBBBB", 4, 3, 8, 2, 0, 0, 0)), (b"IDAT", b"x"), (b"IEND", b"")
    parts = [struct.pack(">I", len(body)) + name + body + bytes(4) for name, body in data]
    sound = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    script = base64.b64encode(b"<script>").decode()
    record = json.loads(FIGURE_4)
    record["nodes"][1]["figures"] = [sound, script, sound[:-4], "\u00e4", 3, None, sound]
    record["nodes"][2]["figures"] = [script]
    record["nodes"][3]["figures"] = sound
    record["nodes"][4]["figures"] = [sound] * 100
    made = tree_of(opened(bare_run(tmp_path / "run", json.dumps(record) + "\n")), 0)
    figures = made["columns"]["figures"]
    assert sorted(filter(None, figures), key=len) == [[sound] * 2, [sound] * MAX_FIGURES]


leaf_fields = st.dictionaries(
    st.sampled_from(["text", "observation", "tool", "tool_kind", "entropy", "num_action_tokens",
                     "figures", "tool_seconds", "token_ids", "token_entropies", "weight_version"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.lists(leaf_fields, min_size=3, max_size=3))
def test_optional_fields_of_any_kind_never_break_the_page(fields: list[dict[str, Any]]) -> None:
    record = json.loads(FIGURE_4)
    for node, extra in zip(record["nodes"][1:], fields, strict=False):
        node |= extra
    tree = read_tree(record)
    credit = assign([tree], AlgorithmConfig())[0]
    made = tree_record(tree, credit, ElcScope.critical_subtree, PageLimits())
    made |= table_row(tree, credit)
    text = json.dumps(made, allow_nan=False)
    columns = json.loads(text)["columns"]
    assert all(len(column) == made["size"] for column in columns.values())
    assert all(x is None or isinstance(x, str) for x in columns.get("text", []))
    assert all(type(i) is int and i >= 0 for ids in columns.get("ids", []) for i in ids or [])


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_short_numbers_keep_five_digits(value: float) -> None:
    kept = short(value)
    assert kept is not None and kept == pytest.approx(value, rel=1e-4, abs=1e-300)


@given(st.text(max_size=60), st.integers(2, 50))
def test_long_texts_lose_their_middle_and_say_how_much(text: str, limit: int) -> None:
    kept = clipped(text, limit)
    if len(text) <= limit:
        assert kept == text
    else:
        half = limit // 2
        assert kept.startswith(text[:half]) and kept.endswith(text[-half:])
        assert f"{len(text) - 2 * half:,} characters" in kept


def test_a_page_is_one_file_that_runs_only_its_own_script(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, 2)
    hostile = json.loads(FIGURE_4)
    hostile["task_id"] = "</script><script>alert(1)</script>"
    hostile["nodes"][1]["text"] = "<img src=x onerror=alert(1)>"
    with (run / "trees" / "step_00001.jsonl").open("a") as file:
        file.write(json.dumps(hostile) + "\n")
    page = whole_page(opened(run))
    assert "alert(1)" not in page and "onerror" not in page
    assert not re.search(r"""(src|href)=["']?https?:|@import|url\(['"]?http""", page)
    assert page.count("<script>") == 1 and "default-src 'none'" in page
    ids = re.findall(r'id="chunk-([^"]+)">([^<]+)<', page)
    assert len(ids) == len(opened(run).chunks())
    texts = "".join(zlib.decompress(base64.b64decode(data)).decode() for _, data in ids)
    assert "onerror=alert(1)" in texts


def test_a_page_over_its_limit_lists_the_oldest_trees_only(tmp_path: Path) -> None:
    book = opened(write_run(tmp_path / "run", 4, 2))
    sizes = [len(base64.b64encode(data)) for data in book.chunks().values()]
    page = whole_page(book, max_bytes=sum(sizes[2:]))
    found = re.search(r'id="overview">([^<]+)<', page)
    assert found is not None
    data = json.loads(zlib.decompress(base64.b64decode(found[1])))
    table = data["table"]
    absent = [step for step, c in zip(table["step"], table["chunk"], strict=True) if c is None]
    assert absent == [1, 1, 2, 2] and page.count('id="chunk-') == 2
    assert "--serve" in data["notices"][0]["text"] and data["notices"][0]["where"] == [
        "steps 1 to 2"
    ]


def test_tokens_are_shown_with_the_tokenizer_that_the_run_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    run = write_run(tmp_path / "run", 1, 1)
    path = run / "trees" / "step_00001.jsonl"
    used = sorted(
        {t for n in json.loads(path.read_text())["nodes"] for t in n.get("token_ids", [])}
    )
    Tokenizer(models.WordLevel({f"w{i}": token for i, token in enumerate(used)}, "w0")).save(
        str(run / "tokenizer.json")
    )
    book = opened(run)
    chunk = json.loads(zlib.decompress(next(iter(book.chunks().values()))))
    assert chunk["vocabulary"] == {str(token): f"w{i}" for i, token in enumerate(used)}
    columns = chunk["trees"][0]["columns"]
    node = json.loads(path.read_text())["nodes"][1]
    assert columns["ids"][1] == node["token_ids"]
    assert columns["entropies"][1] == [round(100 * x) for x in node["token_entropies"]]


def test_a_broken_tokenizer_leaves_ids(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, 1)
    (run / "tokenizer.json").write_text("{}")
    book = opened(run)
    assert len(notices(book)) == 1 and "shown as ids" in notices(book)[0]
    assert tree_of(book, 0)["columns"]["ids"]


def test_limits_of_a_node_bound_its_part_of_the_page(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(path="some/model"))
    tree = read_tree(dump_tree(grow(1, config)))
    made = tree_record(tree, None, ElcScope.none, PageLimits(chars=20, tokens=3))
    assert max(len(text) for text in made["columns"]["text"] if text) < 80
    assert max(len(ids) for ids in made["columns"]["ids"] if ids) == 3
    assert "advantage" not in made["columns"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 1, 2)
    assert main([str(run)]) == 0
    assert "trees: 2, steps: 1" in capsys.readouterr().out
    assert (run / "view.html").stat().st_size > 20_000
    other = tmp_path / "page.html"
    assert main([str(run), "--out", str(other)]) == 0 and other.exists()


@pytest.mark.parametrize("make", ["absent", "empty", "file"])
def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: str
) -> None:
    path = tmp_path / "x"
    if make == "empty":
        path.mkdir()
    if make == "file":
        path.write_text("")
    assert main([str(path)]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == "" and printed.err.count("\n") == 1 and "name one under runs/" in printed.err
    )


def test_a_page_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bare_run(tmp_path / "run", FIGURE_4)
    assert main([str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "--out FILE" in capsys.readouterr().err
