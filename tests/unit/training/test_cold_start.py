"""The cold start as a run: what is trained on, in what order, and how it goes on after a stop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from elpo_ray.config import Config
from elpo_ray.config.learner import ColdStartConfig
from elpo_ray.config.model import ModelConfig
from elpo_ray.config.run import LoggingConfig, TrainerConfig, WandbMode
from elpo_ray.config.task import CountdownConfig, TaskConfig
from elpo_ray.forest.trees import TrainForest
from elpo_ray.models.base import (
    PACKAGE,
    SOURCE,
    base_model,
    code_version,
    demonstrations_key,
    digest,
)
from elpo_ray.models.folder import texts_fingerprint
from elpo_ray.runs.folder import RunFolder
from elpo_ray.runs.metrics import SUPERVISED_COLUMNS, Metrics
from elpo_ray.tasks import make_task
from elpo_ray.training.cold_start import SupervisedTrainer, _cold_start_key, sft_batches


def make_config(folder: Path, **cold_start: Any) -> Config:
    countdown = CountdownConfig(numbers=3, demonstrations=20)
    return Config(
        model=ModelConfig(max_context=400),
        task=TaskConfig(countdown=countdown, max_turn_tokens=64),
        cold_start=ColdStartConfig(cache=str(folder / "cache"), batch_size=4, **cold_start),
        trainer=TrainerConfig(run_dir=str(folder), run_name="sft", checkpoint_every=3),
        logging=LoggingConfig(wandb=WandbMode.disabled),
    )


def test_only_what_the_assistant_wrote_is_trained_on(tmp_path: Path) -> None:
    config = make_config(tmp_path, epochs=2)
    task = make_task(config.task, 0)
    base = base_model(config, task)
    batches = sft_batches(config, task, base)
    assert [len(batch) for batch in batches] == [4] * 10
    tokenizer = AutoTokenizer.from_pretrained(base)
    tree = batches[0][0]
    trained = tokenizer.decode(tree.ids[tree.agent].tolist())
    masked = tokenizer.decode(tree.ids[~tree.agent].tolist())
    assert trained.count("<tool_call>") == 2 and "answer: " in trained
    assert "left: " not in trained and masked.count("left: ") == 3
    weights = sum(len(t.ids[t.agent]) * t.leaf_weight[0] for t in batches[0])
    assert weights == pytest.approx(1), "the mean over a batch's trained tokens"
    first, second = batches[:5], batches[5:]
    keys = [sorted(t.ids.tobytes() for batch in part for t in batch) for part in (first, second)]
    assert keys[0] == keys[1], "every epoch has each conversation once"


def test_long_conversations_are_left_out_or_cut(tmp_path: Path) -> None:
    whole = make_config(tmp_path)
    task = make_task(whole.task, 0)
    base = base_model(whole, task)
    lengths = [len(tree.ids) for batch in sft_batches(whole, task, base) for tree in batch]
    limit = sorted(lengths)[len(lengths) // 2]
    left_out = sft_batches(make_config(tmp_path, max_tokens=limit), task, base)
    kept = [len(tree.ids) for batch in left_out for tree in batch]
    assert sorted(kept) == sorted(length for length in lengths if length <= limit)
    cut = sft_batches(make_config(tmp_path, max_tokens=limit, cut_longer=True), task, base)
    assert max(len(tree.ids) for batch in cut for tree in batch) == limit
    assert sum(map(len, cut)) == len(lengths)
    with pytest.raises(ValueError, match=r"no demonstration within cold_start\.max_tokens=3"):
        sft_batches(make_config(tmp_path, max_tokens=3), task, base)


class Recorder:
    """A learner that writes down what it is given."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[Any] = []
        self.loaded: Path | None = None
        self._stop_after = stop_after

    def update(self, forest: TrainForest, *, supervised: bool) -> dict[str, float]:
        assert supervised
        self.seen += forest.minibatches
        if self._stop_after is not None and len(self.seen) >= self._stop_after:
            raise KeyboardInterrupt
        return {"loss": 1.0, "forward_tokens": 10.0, "learner_seconds": 2.0}

    def save(self, path: Path, *, background: bool) -> None:
        assert not background
        path.mkdir()

    def load(self, path: Path) -> None:
        self.loaded = path

    def export(self, path: Path) -> None:
        (path / "config.json").write_text("{}")


def trainer(config: Config, learner: Recorder, batches: list[Any]) -> SupervisedTrainer:
    run = RunFolder.of(config)
    run.begin(config)
    console = Console(quiet=True)
    metrics = Metrics(run.path, config, console, SUPERVISED_COLUMNS)
    return SupervisedTrainer(
        config=config,
        steps=len(batches),
        batches=batches,
        learner=learner,
        run=run,
        metrics=metrics,
        console=console,
    )  # type: ignore[arg-type]


def test_an_interrupted_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    batches: list[Any] = [[i] for i in range(8)]
    stopped = Recorder(stop_after=4)
    assert trainer(config, stopped, batches).train().interrupted
    config.trainer = TrainerConfig(
        run_dir=str(tmp_path), resume=str(tmp_path / "sft"), checkpoint_every=3
    )
    resumed = Recorder()
    outcome = trainer(config, resumed, batches).train()
    assert not outcome.interrupted and resumed.loaded is not None
    assert resumed.seen == batches[3:], "the row that was cut short is taken again"
    rows = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6, 8]
    assert rows[0]["tokens_per_second"] == 5.0
    assert (outcome.folder / "model" / "config.json").exists()
    summary = json.loads((outcome.folder / "summary.json").read_text())
    assert (summary["optimizer_steps"], summary["conversations"]) == (8, 8)


def key_of(config: Config, base: Path) -> str:
    return digest(_cold_start_key(config, make_task(config.task, config.trainer.seed), base))


def test_the_cache_knows_what_a_cold_start_was_made_from(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    base = base_model(config, make_task(config.task, 0))
    key = key_of(config, base)
    assert key == key_of(make_config(tmp_path), base)
    keys = {key, key_of(make_config(tmp_path, epochs=2), base)}
    context = make_config(tmp_path)
    context.model.max_context = 399
    keys.add(key_of(context, base))
    other = make_config(tmp_path)
    other.task.countdown.demonstrations = 21
    keys.add(key_of(other, base))
    parser = make_config(tmp_path)
    parser.model.tool_parser = "hermes"
    keys.add(key_of(parser, base))
    assert len(keys) == 5


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_any_byte_of_tokenizer_template_or_weights_counts(tmp_path: Path, file: str) -> None:
    config = make_config(tmp_path)
    base = base_model(config, make_task(config.task, 0))
    copied = tmp_path / "copy"
    shutil.copytree(base, copied)
    assert key_of(config, copied) == key_of(config, base), "wherever it lies"
    place = copied / file
    place.write_bytes((place.read_bytes() if place.exists() else b"") + b" ")
    assert key_of(config, copied) != key_of(config, base)


def test_a_byte_in_the_middle_of_a_large_tokenizer_counts(tmp_path: Path) -> None:
    for byte in (b"a", b"b"):
        folder = tmp_path / byte.decode()
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(b"x" * 3_000_001 + byte + b"x" * 3_000_000)
    assert texts_fingerprint(tmp_path / "a") != texts_fingerprint(tmp_path / "b")


def test_demonstrations_count_by_what_they_say(tmp_path: Path) -> None:
    """Also those of a built-in set, whose folder and file keep their names."""
    keys = set()
    for answer in ("1", "2", "1"):
        talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        file = tmp_path / "talks.jsonl"
        file.write_text(json.dumps({"messages": talk}) + "\n")
        task = TaskConfig(name="open_agentrl", demonstrations_file=str(file))
        config = replace(make_config(tmp_path), task=task, model=ModelConfig(path="a/b"))
        keys.add(str(demonstrations_key(config, make_task(config.task, 0))))
    assert len(keys) == 2


def test_the_code_that_makes_them_counts(tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    file = tmp_path / "chat" / "template.py"
    versions = []
    for text in ("a = 1", "a = 2", "a = 1"):
        file.write_text(text)
        versions.append(code_version(["chat"], tmp_path))
    assert versions[0] == versions[2] != versions[1]
    (tmp_path / "chat" / "new.jinja").write_text("")
    assert code_version(["chat"], tmp_path) not in versions
    assert all((PACKAGE / name).exists() for name in SOURCE)
