"""Arguments against their schema: what comes as text is typed, what does not fit is said."""

from typing import Any

import pytest

from elpo_ray.chat.calls import check_schemas, checked_call
from elpo_ray.types import ToolCall

ADD: dict[str, Any] = {
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {
            "item": {"type": "string"},
            "count": {"type": "integer", "minimum": 1},
            "price": {"type": "number"},
            "gift": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "options": {"type": "object", "properties": {"deep": {"type": "boolean"}}},
            "colour": {"enum": ["red", "blue"]},
            "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "label": {"type": ["string", "null"]},
        },
        "required": ["item"],
    },
}


def add(**arguments: Any) -> ToolCall | str:
    return checked_call("add", {"item": "tea", **arguments}, {"add": ADD})


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("count", "3", 3),
        ("count", 3.0, 3),
        ("price", "2.5", 2.5),
        ("price", 2, 2),
        ("gift", "True", True),
        ("gift", "false", False),
        ("tags", '["a", "b"]', ["a", "b"]),
        ("options", '{"deep": true}', {"deep": True}),
        ("size", "None", None),
        ("size", "4", 4),
        ("item", "75001", "75001"),
        ("label", "7", "7"),
        ("colour", "red", "red"),
        ("unknown", "7", "7"),
    ],
)
def test_text_is_typed_by_the_schema(key: str, given: Any, wanted: Any) -> None:
    call = add(**{key: given})
    assert isinstance(call, ToolCall), call
    assert call.arguments[key] == wanted
    assert type(call.arguments[key]) is type(wanted)


@pytest.mark.parametrize(
    ("key", "given", "fault"),
    [
        ("count", "many", "argument count: 'many' is not of type 'integer'"),
        ("count", "3.5", "argument count: '3.5' is not of type 'integer'"),
        ("count", 0, "argument count: 0 is less than the minimum of 1"),
        ("count", True, "argument count: True is not of type 'integer'"),
        ("gift", "maybe", "argument gift: 'maybe' is not of type 'boolean'"),
        ("gift", 1, "argument gift: 1 is not of type 'boolean'"),
        ("tags", "[1]", "argument tags: '[1]' is not of type 'array'"),
        ("tags", [1], "argument tags[0]: 1 is not of type 'string'"),
        ("options", {"deep": 1}, "argument options['deep']: 1 is not of type 'boolean'"),
        ("colour", "green", "argument colour: 'green' is not one of ['red', 'blue']"),
        ("item", 7, "argument item is missing or no string"),
    ],
)
def test_what_does_not_fit_is_said(key: str, given: Any, fault: str) -> None:
    assert add(**{key: given}) == fault


def test_an_error_of_a_long_value_stays_short() -> None:
    error = add(count="x" * 10_000)
    assert isinstance(error, str)
    assert len(error) < 300


def test_tools_that_no_model_can_call_are_refused() -> None:
    tool = {"type": "function", "function": ADD}
    with pytest.raises(ValueError, match=r"add appears twice; give each tool its own name"):
        check_schemas([tool, tool])
    broken = {"type": "function", "function": {"name": "odd", "parameters": {"type": "txt"}}}
    with pytest.raises(ValueError, match=r"tool 'odd': its parameters are no JSON schema .*; corr"):
        check_schemas([broken])
