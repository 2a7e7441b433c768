from __future__ import annotations

import json

import pytest
from hypothesis import given

from serve_app.formats.json_body import MAX_DEPTH, MAX_VALUES, NotJson, parse_json, parse_object
from serve_app.request.errors import InvalidRequest, ServiceError
from tests.strategies import JSON

TOO_MANY = f"the body holds more than {MAX_VALUES} JSON values"
# Around `count` values: at most one is a list or an object within another.
SHAPES = {
    "numbers": lambda count: [0] * (count - 1),
    "texts": lambda count: ['a,b[{\\"'] * (count - 1),
    "fields": lambda count: {f"{number},[": '"' for number in range(count - 1)},
    "rows": lambda count: [[]] * (count - 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_values_are_read_as_the_bound_says(shape: str) -> None:
    # A list's beginning and its first value are counted as two.
    most = SHAPES[shape]((MAX_VALUES - 1) // (2 if shape == "rows" else 1))
    assert parse_json(json.dumps(most).encode()) == most
    more = SHAPES[shape](MAX_VALUES + 3)
    with pytest.raises(InvalidRequest) as error:
        parse_json(json.dumps(more).encode())
    assert error.value.message == TOO_MANY


def test_what_stands_in_texts_is_no_value() -> None:
    text = ',[{"\\,' * MAX_VALUES
    assert parse_json(json.dumps({"prompt": text, text: [text]}).encode()) == {"prompt": text, text: [text]}


@given(JSON)
def test_what_json_writes_is_read_back(data: object) -> None:
    assert parse_json(json.dumps(data).encode()) == data


@pytest.mark.parametrize("opening", ["[", '{"a": '])
def test_as_deep_is_read_as_the_bound_says(opening: str) -> None:
    def body(depth: int) -> bytes:
        closing = "]" if opening == "[" else "}"
        return (opening * depth + "0" + closing * depth).encode()

    parse_json(body(MAX_DEPTH))
    with pytest.raises(NotJson, match="nested too deeply"):
        parse_json(body(MAX_DEPTH + 1))
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        parse_object(body(500))


def test_a_message_is_cut_whatever_it_quotes() -> None:
    assert ServiceError("a" * 2_000).message == "a" * 2_000
    assert ServiceError("a" * 10**6).message == "a" * 2_000 + " ..."
