"""What of the user's goes to other nodes, and what is said where it cannot."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from elpo_ray.cluster import user_code
from elpo_ray.config import Config, TaskConfig
from elpo_ray.config.dotted import register
from elpo_ray.config.model import ModelConfig


def config(*tools: str) -> Config:
    return Config(task=TaskConfig(tools=["code_interpreter", *tools]), model=ModelConfig(path="m"))


def test_copies_hold_modules_and_small_data_but_nothing_large(tmp_path: Path) -> None:
    for name in ("shop.py", "package/__init__.py", "prices.txt", ".git/config", "runs/a/b.py",
                 "venv/pyvenv.cfg", "venv/x.py", "__pycache__/y.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "large.jsonl").write_bytes(b"x" * (user_code.LARGEST + 1))
    with user_code.copies([str(tmp_path)]) as (brought,):
        found = {str(p.relative_to(brought)) for p in Path(brought).rglob("*") if p.is_file()}
    assert found == {"0/shop.py", "0/package/__init__.py", "0/prices.txt"}
    assert not Path(brought).exists()
    with user_code.copies([]) as nothing:
        assert nothing == []


def test_a_folder_of_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "MOST", 5)
    (tmp_path / "a.py").write_text("x = 1\n")
    with (
        pytest.raises(ValueError, match=r"task\.modules=.*a folder of their own"),
        user_code.copies([str(tmp_path)]),
    ):
        pass


def test_only_objects_that_a_run_names_are_sent() -> None:
    lock = threading.Lock()
    good, bad = register("good", lambda: 3), register("bad", lambda: lock)
    assert user_code.packed(config()) is None
    assert user_code.packed(config(good))
    with pytest.raises(ValueError, match=r"^python:bad\w*: it cannot be sent to another process"):
        user_code.packed(config(bad))


def test_an_object_without_its_module_is_named(tmp_path: Path) -> None:
    import pickle

    objects = pickle.dumps({"search": b"cno_such_module_anywhere\nsearch\n."})
    with pytest.raises(ValueError, match=r"python:search: it cannot be loaded .*task\.modules"):
        user_code.install([], objects)
