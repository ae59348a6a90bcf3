"""The Python reference: whatever it shows has a description."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
ENTRY = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)
ENTRIES = ENTRY.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def source() -> griffe.GriffeLoader:
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    for package in ("elpo_ray", "sandbox"):
        loader.load(package)
    return loader


def silent(found: griffe.Object | griffe.Alias) -> Iterator[str]:
    """The public names at or below an object that no docstring describes; a field may be described
    by its annotation."""
    if found.is_alias or found.name.startswith("_") or found.name == "T":
        return
    if not found.docstring and "description=" not in str(getattr(found, "annotation", "")):
        yield found.path
    if found.is_class or found.is_module:
        for member in found.members.values():
            if member.is_alias or not member.is_module:
                yield from silent(member)


@pytest.mark.parametrize(("path", "options"), ENTRIES, ids=[path for path, _ in ENTRIES])
def test_every_name_on_the_page_is_described(
    path: str, options: str, source: griffe.GriffeLoader
) -> None:
    found = source.modules_collection[path]
    shown = (yaml.safe_load(options) or {}).get("options", {}).get("members")
    parts = [found] if shown is None else [found[name] for name in shown]
    assert not [name for part in parts for name in silent(part)]


def test_a_name_without_a_description_is_found(tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text('"""It speaks."""\nX = 1\n"""So does it."""\nY = 2\n')
    module = griffe.GriffeLoader(search_paths=[str(tmp_path)]).load("silent")
    assert list(silent(module)) == ["silent.Y"]


def test_what_the_package_exports_is_on_the_page() -> None:
    import elpo_ray

    places = {path.rpartition(".")[2] for path, _ in ENTRIES}
    for name in elpo_ray.__all__:
        home = getattr(getattr(elpo_ray, name), "__module__", "")
        assert name in places or home in dict(ENTRIES), name
