from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.request.errors import InvalidRequest
from serve_app.request.fields import MAX_PROMPT_CHARS, MAX_SEED
from serve_app.request.schema import GROUPS, FieldKind, ImageRequest, field_kinds, parse_request, read_text


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"prompt": "p"} | fields)
    assert "\n" not in caught.value.message
    return caught.value


def test_the_defaults_are_the_published_ones() -> None:
    assert ImageRequest(prompt="p").model_dump() == {
        "prompt": "p",
        "prompt_2": None,
        "negative_prompt": None,
        "negative_prompt_2": None,
        "width": None,
        "height": None,
        "n": 1,
        "seed": None,
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "scheduler": None,
        "high_noise_frac": None,
        "refiner_guidance_scale": None,
        "original_size": None,
        "crops_coords_top_left": (0, 0),
        "target_size": None,
        "negative_original_size": None,
        "negative_crops_coords_top_left": (0, 0),
        "negative_target_size": None,
        "aesthetic_score": 6.0,
        "negative_aesthetic_score": 2.5,
        "clip_skip": None,
        "priority": 0,
        "deadline_s": None,
        "output_format": "png",
        "output_compression": None,
    }


def test_every_field_is_described() -> None:
    for name, field in ImageRequest.model_fields.items():
        assert field.description, name


INTEGER_BOUNDS = [
    ("width", 8, None),
    ("height", 8, None),
    ("n", 1, 10),
    ("seed", 0, MAX_SEED),
    ("num_inference_steps", 1, 500),
    ("clip_skip", 0, None),
    ("priority", -100, 100),
    ("output_compression", 0, 100),
]
NUMBER_BOUNDS = [
    ("guidance_scale", 0.0, 100.0),
    ("guidance_rescale", 0.0, 1.0),
    ("eta", 0.0, 1.0),
    ("refiner_guidance_scale", 0.0, 100.0),
    ("aesthetic_score", 0.0, 100.0),
    ("negative_aesthetic_score", 0.0, 100.0),
]
PAIR_BOUNDS = [
    ("original_size", 1),
    ("target_size", 1),
    ("negative_original_size", 1),
    ("negative_target_size", 1),
    ("crops_coords_top_left", 0),
    ("negative_crops_coords_top_left", 0),
]


def test_the_tables_of_bounds_hold_every_number_of_a_request() -> None:
    tabled = {name for name, *_ in (*INTEGER_BOUNDS, *NUMBER_BOUNDS, *PAIR_BOUNDS)} | {"high_noise_frac", "deadline_s"}
    assert tabled == {name for name, kind in field_kinds().items() if kind.base is not str}


@pytest.mark.parametrize(("name", "lowest", "highest"), [*INTEGER_BOUNDS, *NUMBER_BOUNDS])
def test_a_number_ends_at_its_bounds(name: str, lowest: float, highest: float | None) -> None:
    below = lowest - 8 if isinstance(lowest, int) else math.nextafter(lowest, -1)
    assert getattr(parse_request({"prompt": "p", name: lowest}), name) == lowest
    assert refusal(**{name: below}).param == name
    if highest is not None:
        above = highest + 1 if isinstance(highest, int) else math.nextafter(highest, 1_000)
        assert getattr(parse_request({"prompt": "p", name: highest}), name) == highest
        assert refusal(**{name: above}).param == name


def test_a_deadline_is_above_0_and_within_a_day() -> None:
    for value in (math.nextafter(0, 1), 86_400.0):
        assert parse_request({"prompt": "p", "deadline_s": value}).deadline_s == value
    for value in (0.0, -1.0, math.nextafter(86_400.0, 1e6)):
        assert refusal(deadline_s=value).param == "deadline_s"


def test_high_noise_frac_is_above_0_and_up_to_1() -> None:
    assert parse_request({"prompt": "p", "high_noise_frac": 1}).high_noise_frac == 1
    assert parse_request({"prompt": "p", "high_noise_frac": 1e-9}).high_noise_frac == 1e-9
    for value in (0, 0.0, -0.1, math.nextafter(1, 2)):
        assert refusal(high_noise_frac=value).param == "high_noise_frac"


@pytest.mark.parametrize("name", ["width", "height"])
def test_a_side_is_a_multiple_of_8(name: str) -> None:
    assert getattr(parse_request({"prompt": "p", name: 1024}), name) == 1024
    for side in (12, 1023, 1025):
        assert refusal(**{name: side}).message == f"{name}: input should be a multiple of 8"


@pytest.mark.parametrize(("name", "lowest"), PAIR_BOUNDS)
def test_both_numbers_of_a_pair_end_at_their_bounds(name: str, lowest: int) -> None:
    assert getattr(parse_request({"prompt": "p", name: [lowest, 65536]}), name) == (lowest, 65536)
    for pair in ([lowest - 1, 5], [5, lowest - 1], [65537, 5], [5, 65537]):
        assert refusal(**{name: pair}).param == name


@pytest.mark.parametrize(("name", "lowest"), PAIR_BOUNDS)
@pytest.mark.parametrize("wrong", [5, "55", [], [5], [5, 5, 5], [5, "5"], [5, 5.0], [5, True], [5, None], {"5": 5}])
def test_a_pair_is_two_whole_numbers(name: str, lowest: int, wrong: Any) -> None:
    assert refusal(**{name: wrong}).param == name


def test_json_has_lists_where_python_has_tuples() -> None:
    pair = {"prompt": "p", "original_size": [512, 768], "crops_coords_top_left": [1, 2]}
    request = parse_request(json.loads(json.dumps(pair)))
    assert (request.original_size, request.crops_coords_top_left) == ((512, 768), (1, 2))
    assert parse_request(json.loads(request.model_dump_json())) == request


INTEGERS = [name for name, *_ in INTEGER_BOUNDS]
NUMBERS = [*(name for name, *_ in NUMBER_BOUNDS), "high_noise_frac"]
TEXTS = ["prompt", "prompt_2", "negative_prompt", "negative_prompt_2"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("wrong", ["8", 8.0, 8.5, True, [8], {}, math.nan, math.inf])
def test_a_whole_number_is_nothing_else(name: str, wrong: Any) -> None:
    assert refusal(**{name: wrong}).param == name


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrong", ["1", True, [1.0], {}, math.nan, math.inf, -math.inf, 10**400])
def test_a_number_is_finite_and_nothing_else(name: str, wrong: Any) -> None:
    assert refusal(**{name: wrong}).param == name


@pytest.mark.parametrize("name", NUMBERS)
def test_a_whole_number_is_a_number(name: str) -> None:
    assert getattr(parse_request({"prompt": "p", name: 1}), name) == 1.0


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("wrong", [5, True, ["p"], {"p": 1}, b"p"])
def test_a_text_is_nothing_else(name: str, wrong: Any) -> None:
    assert refusal(**{name: wrong}).param == name


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_ends_at_the_limit(name: str) -> None:
    longest = "é" * MAX_PROMPT_CHARS
    assert getattr(parse_request({"prompt": "p", name: longest}), name) == longest
    error = refusal(**{name: longest + "é"})
    assert error.param == name
    assert len(error.message) < 100, "the text itself is not echoed"


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "\udc00\ud800"])
def test_a_lone_surrogate_is_no_text(name: str, text: str) -> None:
    error = refusal(**{name: text})
    assert error.param == name
    error.message.encode()  # itself fit to be sent


@pytest.mark.parametrize("prompt", ["", " ", "\n\t ", "\u3000"])
def test_a_prompt_says_something(prompt: str) -> None:
    assert refusal(prompt=prompt).message == "prompt: is empty"


@pytest.mark.parametrize("name", ["prompt_2", "negative_prompt", "negative_prompt_2"])
def test_the_other_texts_may_be_empty(name: str) -> None:
    assert getattr(parse_request({"prompt": "p", name: ""}), name) == ""


def test_a_prompt_is_needed() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_request({"n": 2})
    assert (caught.value.message, caught.value.param) == ("prompt: field required", "prompt")


@pytest.mark.parametrize(("name", "wrong"), [("scheduler", "Euler"), ("scheduler", ""), ("output_format", "gif")])
def test_a_name_is_one_of_the_list(name: str, wrong: str) -> None:
    error = refusal(**{name: wrong})
    assert error.param == name
    assert "'euler'" in error.message or "'webp'" in error.message


def test_an_unknown_field_is_named() -> None:
    error = refusal(num_steps=5)
    assert error.message == "num_steps: is not a field of this request"
    assert (error.param, error.status, error.type) == ("num_steps", 400, "invalid_request_error")


def test_a_request_does_not_change() -> None:
    request = ImageRequest(prompt="p")
    with pytest.raises(ValidationError):
        request.seed = 5  # type: ignore[misc]


def test_the_kinds_of_the_fields_are_their_annotations() -> None:
    kinds = field_kinds()
    assert list(kinds) == list(ImageRequest.model_fields)
    assert kinds["prompt"] == FieldKind(str)
    assert kinds["negative_prompt"] == FieldKind(str)
    assert kinds["width"] == FieldKind(int)
    assert kinds["n"] == FieldKind(int)
    assert kinds["guidance_scale"] == FieldKind(float)
    assert kinds["high_noise_frac"] == FieldKind(float)
    assert kinds["original_size"] == FieldKind(int, values=2)
    assert kinds["crops_coords_top_left"] == FieldKind(int, values=2)
    assert kinds["output_format"] == FieldKind(str, choices=("png", "jpeg", "webp"))
    assert kinds["scheduler"].choices[:2] == ("euler", "euler_ancestral")


def test_text_is_read_as_its_kind() -> None:
    kinds = field_kinds()
    assert read_text("n", kinds["n"], ["3"]) == 3
    assert read_text("eta", kinds["eta"], ["0.5"]) == 0.5
    assert read_text("prompt", kinds["prompt"], ["5"]) == "5"
    assert read_text("original_size", kinds["original_size"], ["512", "768"]) == (512, 768)


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("n", ["three"], "n: 'three' is not a whole number"),
        ("n", ["1.5"], "n: '1.5' is not a whole number"),
        ("n", [""], "n: '' is not a whole number"),
        ("eta", ["0,5"], "eta: '0,5' is not a number"),
        ("n", ["1", "2"], "n: needs 1 value, got 2"),
        ("original_size", ["512"], "original_size: needs 2 values, got 1"),
        ("original_size", ["512", "x"], "original_size: 'x' is not a whole number"),
    ],
)
def test_text_of_another_kind_is_refused(name: str, texts: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_text(name, field_kinds()[name], texts)
    assert (caught.value.message, caught.value.param) == (message, name)


def test_every_field_is_of_one_group_in_their_order() -> None:
    grouped = [name for group in GROUPS.values() for name in group.model_fields]
    assert grouped == list(ImageRequest.model_fields)
