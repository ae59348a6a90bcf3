"""A folder appears whole, in place of the old one, or not at all."""

from pathlib import Path

import pytest

from elpo_ray.runs.atomic import new_folder


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "model"
    for text in ("old", "new"):
        with new_folder(final) as partial:
            (partial / "shards").mkdir()
            (partial / "shards" / text).write_text(text)
            assert not (final / "shards" / text).exists()
        assert [path.name for path in (final / "shards").iterdir()] == [text]
    assert [path.name for path in final.parent.iterdir()] == ["model"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(final) as partial:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (final / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
