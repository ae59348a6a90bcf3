"""Dotted paths: what loads, and the one line for what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from elpo_ray.config import dotted
from elpo_ray.config.dotted import adopt, check_call, load_object, register, registered


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_attribute_or_one_of_a_class_is_loaded(modules: Path) -> None:
    (modules / "dotted_shop.py").write_text("class Cart:\n    def add(self): ...\n")
    cart = load_object("task.tools[0]", "dotted_shop:Cart")
    assert cart.__name__ == "Cart"
    assert load_object("k", "dotted_shop:Cart.add") is cart.add


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("search", r"k='search': write it as module:attribute"),
        ("shop:", r"k='shop:': write it as module:attribute"),
        (":search", r"write it as module:attribute"),
        ("my shop:search", r"write it as module:attribute"),
        ("no_such_shop:search", r"k='no_such_shop:search': there is no module no_such_shop; put"),
        ("shop.py:search", r"k='shop.py:search': a module is named without .py; write shop:search"),
        ("json.nothing:search", r"there is no module json.nothing; put"),
        ("json:dumbs", r"k='json:dumbs': json has no dumbs; did you mean dumps"),
        ("dotted_bad:f", r"dotted_bad cannot be imported \(ZeroDivisionError.*, line 2\); mend"),
        ("dotted_needs:f", r"dotted_needs cannot be imported \(ModuleNotFoundError.*no_package"),
        ("dotted_exits:f", r"dotted_exits cannot be imported \(SystemExit"),
        ("python:lost", r"k='python:lost': no object was given under this name; start"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(modules: Path, path: str, message: str) -> None:
    (modules / "dotted_bad.py").write_text("x = 0\ny = 1 / x\n")
    (modules / "dotted_needs.py").write_text("import no_package\n")
    (modules / "dotted_exits.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ValueError, match=message) as caught:
        load_object("k", path)
    assert "\n" not in str(caught.value)


def test_objects_given_from_python_have_paths_that_other_processes_adopt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dotted, "_objects", {})
    first, second = (lambda: 1), (lambda: 2)
    assert register("f", first) == register("f", first) == "python:f"
    assert register("f", second) == "python:f_2"
    table = registered()
    monkeypatch.setattr(dotted, "_objects", {})
    adopt(table)
    assert load_object("k", "python:f_2") is second


def rule(rollout: object, config: object, *, width: int = 1) -> None: ...
def open_rule(rollout: object, config: object, **options: object) -> None: ...


@pytest.mark.parametrize("function", [rule, open_rule])
def test_a_call_that_fits_passes(function: object) -> None:
    check_call("k='m:rule'", function, ["rollout", "config"], {"width": 2})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (rule, {"widht": 2}, r"k='m:f': no option widht; it takes width"),
        (lambda rollout, config: None, {"width": 2}, r"no option width; it takes no options"),
        (rule, {"rollout": 2}, r"no option rollout; it takes width"),
        (lambda rollout: None, {}, r"it must take \(rollout, config\)"),
        (lambda a, b, c: None, {}, r"it must take \(rollout, config\): missing a required.*'c'"),
        (7, {}, r"it is int, not something to call"),
    ],
)
def test_a_call_that_does_not_fit_is_one_line(
    function: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_call("k='m:f'", function, ["rollout", "config"], options)  # type: ignore[arg-type]
