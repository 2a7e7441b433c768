"""Every shape that reference/azure-ml.md lists as accepted or rejected, and the answers, byte by byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.formats.azure_ml import wire as azure_ml
from serve_app.request.errors import InvalidRequest, Overloaded, ServiceError, UnsupportedMediaType
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult
from tests.strategies import JSON

MAX_ROWS = 10


def decode(body: Any, content_type: str | None = "application/json") -> azure_ml.Decoded:
    return azure_ml.decode(body if isinstance(body, bytes) else json.dumps(body).encode(), content_type, MAX_ROWS)


def rows(input_data: Any, **beside: Any) -> list[ImageRequest]:
    return decode({"input_data": input_data} | beside).requests


def refusal(body: Any, content_type: str | None = "application/json") -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode(body, content_type)
    assert "\n" not in caught.value.message
    return caught.value


P, Q = ImageRequest(prompt="p"), ImageRequest(prompt="q")


def test_the_published_request() -> None:
    asked = decode(
        b'{"input_data": {"columns": ["prompt"], "data": ["a photograph of an astronaut riding a horse"], '
        b'"index": [0], "parameters": {"num_inference_steps": 50, "guidance_scale": 7.5}}}'
    )
    assert asked.requests == [ImageRequest(prompt="a photograph of an astronaut riding a horse")]
    assert (asked.requests[0].num_inference_steps, asked.requests[0].guidance_scale) == (50, 7.5)
    assert asked.warnings == ()


@pytest.mark.parametrize(
    "input_data",
    [
        {"columns": ["prompt"], "data": ["p", "q"], "index": [0, 1]},
        {"columns": ["prompt"], "data": ["p", "q"]},
        {"columns": ["prompt"], "data": ["p", "q"], "index": None},
        {"columns": ["prompt"], "data": [["p"], ["q"]]},
        {"columns": ["prompt"], "data": ["p", ["q"]]},
        {"columns": ["prompt"], "data": ["p", "q"], "index": [7, 7]},
        {"columns": ["prompt"], "data": ["p", "q"], "index": ["b", "a"]},
        {"columns": ["prompt"], "data": ["p", "q"], "index": [1, 0]},
        {"columns": ["prompt"], "data": ["p", "q"], "parameters": None},
        [{"prompt": "p"}, {"prompt": "q"}],
        {"prompt": ["p", "q"]},
    ],
)
def test_every_accepted_shape_gives_its_rows_in_the_order_of_data(input_data: Any) -> None:
    assert rows(input_data) == [P, Q]


@pytest.mark.parametrize("input_data", [{"columns": ["prompt"], "data": []}, {"prompt": []}, []])
def test_no_rows_are_no_requests(input_data: Any) -> None:
    assert rows(input_data) == []


@pytest.mark.parametrize(
    "input_data",
    [
        {"columns": ["prompt", "negative_prompt"], "data": [["p", "x"], ["q", None]]},
        [{"prompt": "p", "negative_prompt": "x"}, {"prompt": "q", "negative_prompt": None}],
        {"prompt": ["p", "q"], "negative_prompt": ["x", None]},
        {"columns": ["negative_prompt", "prompt"], "data": [["x", "p"], [None, "q"]]},
    ],
)
def test_a_negative_prompt_column_acts_and_null_is_an_empty_one(input_data: Any) -> None:
    assert [request.negative_prompt for request in rows(input_data)] == ["x", ""]


def test_a_row_outdoes_the_parameters() -> None:
    given = {"prompt": ["p"], "negative_prompt": ["x"], "parameters": {"negative_prompt": "y"}}
    assert rows(given)[0].negative_prompt == "x"
    assert rows({"prompt": ["p"], "parameters": {"negative_prompt": "y"}})[0].negative_prompt == "y"


@pytest.mark.parametrize(
    "input_data",
    [
        {"data": ["p"]},
        {"data": ["p"], "index": [0]},
        {"index": [0]},
        {"columns": None, "data": ["p"]},
        {"columns": "prompt", "data": ["p"]},
        {"columns": [5], "data": ["p"]},
        {"columns": ["prompt"]},
        {"columns": ["prompt"], "data": "p"},
        {"columns": ["prompt"], "data": {"prompt": "p"}},
        {"columns": ["prompt"], "data": ["p"], "index": [0, 1]},
        {"columns": ["prompt"], "data": ["p"], "index": []},
        {"columns": ["prompt"], "data": ["p"], "index": 0},
        {"columns": ["prompt", "negative_prompt"], "data": ["p", "q"]},
        {"columns": ["prompt", "negative_prompt"], "data": [["p"]]},
        {"columns": ["prompt"], "data": [["p", "q"]]},
        {"columns": ["prompt", "prompt"], "data": [["p", "q"]]},
        {"columns": ["text"], "data": ["p"]},
        {"columns": [], "data": []},
        {"columns": ["prompt"], "data": [None]},
        ["p"],
        ["p", {"prompt": "p"}],
        [["p"]],
        "p",
        5,
        True,
        {},
        {"text": ["p"]},
        {"prompt": "p"},
        {"prompt": ["p", "q"], "negative_prompt": ["x"]},
        {"prompt": ["p"], "negative_prompt": "x"},
        [{"text": "p"}],
        [{"prompt": None}],
        [{}],
    ],
)
def test_every_rejected_shape_is_the_callers_fault(input_data: Any) -> None:
    error = refusal({"input_data": input_data})
    assert error.status == 400
    assert error.message.startswith("input_data: ")
    assert azure_ml.encode_error(error) == {"message": error.message}


@pytest.mark.parametrize("prompt", [5, True, ["p"], {"prompt": "p"}, "", " ", "\ud800", "x" * 4_001])
def test_a_prompt_is_a_text_in_every_shape(prompt: Any) -> None:
    for input_data in (
        {"columns": ["prompt"], "data": [[prompt]]},
        [{"prompt": prompt}],
        {"prompt": [prompt]},
    ):
        assert refusal({"input_data": input_data}).param == "prompt"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "POST body is empty. Expecting a JSON dictionary."),
        (b" \n", "POST body is empty. Expecting a JSON dictionary."),
        (b"[]", "POST body should be a JSON dictionary."),
        (b"null", "POST body should be a JSON dictionary."),
        (b'"p"', "POST body should be a JSON dictionary."),
        (b"{}", "A value is not provided for the 'input_data' parameter."),
        (b'{"input_data": null}', "A value is not provided for the 'input_data' parameter."),
        (b'{"inputs": ["p"]}', "A value is not provided for the 'input_data' parameter."),
        (b'{"input_data"', "POST body could not be decoded as JSON: Expecting ':' delimiter at line 1 column 14"),
        (b'{"input_data": NaN}', "POST body could not be decoded as JSON: NaN is not a JSON value"),
        (b'{"input_data": "\xe9"}', "POST body could not be decoded as JSON: not UTF-8 at byte 16"),
        (b"[" * 10_000, "POST body could not be decoded as JSON: nested too deeply"),
    ],
)
def test_the_servers_own_words(body: bytes, message: str) -> None:
    error = refusal(body)
    assert (error.status, azure_ml.encode_error(error)) == (400, {"message": message})


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/jsonx", "multipart/form-data"])
def test_another_content_type_is_415(content_type: str | None) -> None:
    error = refusal({"input_data": {"prompt": ["p"]}}, content_type)
    assert isinstance(error, UnsupportedMediaType)
    assert (error.status, error.message) == (415, "Expects Content-Type to be application/json")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "application/json ;x"])
def test_json_may_say_its_charset(content_type: str) -> None:
    assert decode({"input_data": {"prompt": ["p"]}}, content_type).requests == [P]


def test_the_earlier_containers_parameters_act() -> None:
    given = {
        "num_images_per_prompt": 2,
        "height": 72,
        "width": 64,
        "negative_prompt": "x",
        "eta": 0.5,
        "seed": 5,
        "num_inference_steps": 7,
        "guidance_scale": 1.5,
    }
    wanted = ImageRequest(
        prompt="p",
        n=2,
        height=72,
        width=64,
        negative_prompt="x",
        eta=0.5,
        seed=5,
        num_inference_steps=7,
        guidance_scale=1.5,
    )
    for body in (
        {"input_data": {"columns": ["prompt"], "data": ["p"], "parameters": given}},
        {"input_data": {"prompt": ["p"], "parameters": given}},
        {"input_data": {"columns": ["prompt"], "data": ["p"], "params": given}},
        {"input_data": {"prompt": ["p"], "params": given}},
        {"input_data": [{"prompt": "p"}], "parameters": given},
        {"input_data": [{"prompt": "p"}], "params": given},
    ):
        assert decode(body) == azure_ml.Decoded([wanted], ())


def test_params_beside_the_columns_are_an_object_or_absent() -> None:
    for shape in ({"columns": ["prompt"], "data": ["p"]}, {"prompt": ["p"]}):
        assert decode({"input_data": shape | {"params": None}}) == azure_ml.Decoded([P], ())
        assert refusal({"input_data": shape | {"params": "x"}}).param == "input_data.params"


def test_an_unknown_key_beside_the_columns_warns() -> None:
    decoded = decode({"input_data": {"columns": ["prompt"], "data": ["p"], "rows": []}})
    assert decoded == azure_ml.Decoded([P], ("input_data.rows is unknown and was ignored",))


def test_a_null_parameter_is_absent() -> None:
    assert rows({"prompt": ["p"], "parameters": {"seed": None, "num_inference_steps": None}}) == [P]


@pytest.mark.parametrize("wrong", [[], "", 0, False, 5, "x", ["seed"]])
def test_parameters_are_an_object(wrong: Any) -> None:
    assert refusal({"input_data": {"prompt": ["p"], "parameters": wrong}}).param == "input_data.parameters"
    assert refusal({"input_data": {"prompt": ["p"]}, "parameters": wrong}).param == "parameters"
    assert refusal({"input_data": {"prompt": ["p"]}, "params": wrong}).param == "params"


@pytest.mark.parametrize(
    ("name", "wrong", "param"),
    [
        ("num_inference_steps", "50", "num_inference_steps"),
        ("num_inference_steps", 0, "num_inference_steps"),
        ("guidance_scale", "7.5", "guidance_scale"),
        ("guidance_scale", -1, "guidance_scale"),
        ("num_images_per_prompt", 11, "n"),
        ("num_images_per_prompt", 0, "n"),
        ("width", 65, "width"),
        ("seed", -1, "seed"),
        ("eta", 2, "eta"),
        ("scheduler", "best", "scheduler"),
        ("negative_prompt", 5, "negative_prompt"),
    ],
)
def test_a_wrong_parameter_is_refused(name: str, wrong: Any, param: str) -> None:
    assert refusal({"input_data": {"prompt": ["p"], "parameters": {name: wrong}}}).param == param


def test_what_has_no_effect_is_said_once() -> None:
    body = {
        "input_data": [{"prompt": "p", "style": "x"}, {"prompt": "q", "style": "y"}],
        "parameters": {"generator": 5, "strength": 0.5},
        "signature_name": "predict",
    }
    assert decode(body) == azure_ml.Decoded(
        [P, Q],
        (
            "signature_name is unknown and was ignored",
            "generator has no effect: send seed",
            "strength is unknown and was ignored",
            "style is unknown and was ignored",
        ),
    )


def test_a_prompt_among_the_parameters_is_no_prompt() -> None:
    body = {"input_data": {"prompt": ["p"], "parameters": {"prompt": "other"}}}
    assert decode(body) == azure_ml.Decoded([P], ("prompt is unknown and was ignored",))


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_a_row_with_an_image_is_refused_and_nothing_is_fetched(name: str) -> None:
    error = refusal({"input_data": {"columns": [name, "prompt"], "data": [["http://127.0.0.1/x.png", "p"]]}})
    assert (error.status, error.param) == (400, "input_data")
    assert "image" in error.message


def test_more_rows_than_the_service_ever_takes_are_refused_before_they_are_read() -> None:
    assert len(rows({"prompt": ["p"] * MAX_ROWS})) == MAX_ROWS
    error = refusal({"input_data": {"prompt": [5] * (MAX_ROWS + 1)}})
    assert error.message == "input_data: 11 rows, this service takes at most 10"


def test_the_answer_is_the_servers_with_a_row_an_image() -> None:
    one = ImageResult([GeneratedImage(b"\x89PNG", 1, "png", 8, 8)])
    two = ImageResult([GeneratedImage(b"a", 2, "png", 8, 8), GeneratedImage(b"b", 3, "png", 8, 8)])
    assert json.dumps(azure_ml.encode([(P, one), (Q, two)])) == (
        '[{"prompt": "p", "generated_image": "iVBORw==", "nsfw_content_detected": null}, '
        '{"prompt": "q", "generated_image": "YQ==", "nsfw_content_detected": null}, '
        '{"prompt": "q", "generated_image": "Yg==", "nsfw_content_detected": null}]'
    )
    assert azure_ml.encode([]) == []


def test_an_error_is_a_message() -> None:
    assert azure_ml.encode_error(Overloaded("full", retry_after_s=1)) == {"message": "full"}


def test_parameters_that_contradict_each_other_are_refused() -> None:
    body = {"input_data": {"prompt": ["p"], "parameters": {"seed": 1}}, "params": {"seed": 2}}
    assert refusal(body).message == "params: 'seed' is given twice and differs"
    body = {"input_data": {"prompt": ["p"]}, "parameters": {"n": 2, "num_images_per_prompt": 3}}
    assert "contradicts" in refusal(body).message


def test_a_null_cell_falls_back_to_the_parameters_and_a_row_of_its_own_is_said() -> None:
    table = {"prompt": ["p", "q"], "negative_prompt": [None, "rain"], "parameters": {"negative_prompt": "fog"}}
    decoded = decode({"input_data": table})
    assert [request.negative_prompt for request in decoded.requests] == ["fog", "rain"]
    assert decoded.warnings == ("negative_prompt of the parameters has no effect on rows with their own",)


def test_unknown_columns_are_said_once_and_few_are_named() -> None:
    table = {"prompt": ["p", "q"]} | {f"column {number}": [1, 2] for number in range(50)}
    warnings = decode({"input_data": table}).warnings
    assert len(warnings) == 21
    assert warnings[-1] == "30 more fields are unknown and were ignored"


def test_wrong_parameters_are_refused_without_a_row_too() -> None:
    body = b'{"input_data": [], "parameters": {"num_inference_steps": "many"}}'
    with pytest.raises(InvalidRequest, match="num_inference_steps"):
        azure_ml.decode(body, "application/json", 8)


NAMES = st.sampled_from([*azure_ml.parameter_names(), "generator", "\ud800", "a\nb"])
PARAMETERS = st.dictionaries(NAMES, JSON, max_size=3)
COLUMNS = st.sampled_from([*azure_ml.COLUMNS, "columns", "data", "index", "parameters", "\ud800"])
INPUTS = (
    st.dictionaries(COLUMNS, JSON, max_size=4)
    | st.fixed_dictionaries({"columns": st.just(["prompt"]), "data": st.lists(JSON, max_size=3)})
    | st.lists(st.dictionaries(COLUMNS, JSON, max_size=3), max_size=3)
    | st.just({"prompt": ["p"]})
)


@settings(max_examples=300, deadline=None)
@given(INPUTS, PARAMETERS, PARAMETERS)
def test_no_body_raises_anything_but_an_error_with_one_line(inputs: Any, some: Any, others: Any) -> None:
    for body in (
        {"input_data": inputs, "parameters": some},
        {"input_data": inputs, "parameters": some, "params": others},
    ):
        try:
            decode(body)
        except ServiceError as error:
            assert "\n" not in error.message
            json.dumps(azure_ml.encode_error(error), ensure_ascii=False).encode()


def test_a_name_that_no_answer_can_hold_is_shown_as_code() -> None:
    body = {"input_data": {"prompt": ["p"]}, "parameters": {"\ud800": 1}, "params": {"\ud800": 2}}
    assert refusal(body).message == r"params: '\ud800' is given twice and differs"
