from __future__ import annotations

from urllib.parse import urlencode

import pytest

from serve_app.formats.imagine import wire as imagine
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import ImageRequest


def decode(query: list[tuple[str, str]]) -> imagine.Decoded:
    return imagine.decode(urlencode(query).encode())


def refusal(*query: tuple[str, str]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        decode([("prompt", "p"), *query])
    assert "\n" not in caught.value.message
    return caught.value


def test_rays_own_example() -> None:
    asked = decode([("prompt", "a cat"), ("img_size", "512")])
    assert asked == imagine.Decoded(ImageRequest(prompt="a cat", width=512, height=512), ())


def test_every_field_may_stand_in_the_address() -> None:
    asked = decode(
        [
            ("prompt", "p"),
            ("width", "64"),
            ("guidance_scale", "1.5"),
            ("original_size", "512"),
            ("original_size", "768"),
            ("scheduler", "heun"),
            ("negative_prompt", ""),
            ("n", "1"),
            ("output_format", "webp"),
        ]
    )
    assert asked.request == ImageRequest(
        prompt="p",
        width=64,
        guidance_scale=1.5,
        original_size=(512, 768),
        scheduler="heun",
        negative_prompt="",
        output_format="webp",
    )


def test_an_unknown_field_warns() -> None:
    assert decode([("prompt", "p"), ("steps", "5")]).warnings == ("steps is unknown and was ignored",)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ([("img_size", "big")], "img_size"),
        ([("img_size", "")], "img_size"),
        ([("img_size", "512"), ("img_size", "512")], "img_size"),
        ([("img_size", "512"), ("width", "512")], "img_size"),
        ([("img_size", "512"), ("height", "64")], "img_size"),
        ([("img_size", "65")], "width"),
        ([("prompt", "q")], "prompt"),
        ([("n", "2")], "n"),
        ([("n", "0")], "n"),
        ([("seed", "1.5")], "seed"),
        ([("seed", "9" * 5_000)], "seed"),
        ([("eta", "nan")], "eta"),
        ([("eta", "1e999")], "eta"),
        ([("guidance_scale", "inf")], "guidance_scale"),
        ([("original_size", "512")], "original_size"),
        ([("original_size", "512"), ("original_size", "x")], "original_size"),
        ([("scheduler", "best")], "scheduler"),
        ([("output_format", "gif")], "output_format"),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(query: list[tuple[str, str]], param: str) -> None:
    error = refusal(*query)
    assert (error.status, error.param) == (400, param)


def test_a_prompt_is_needed() -> None:
    for query in ([], [("img_size", "512")], [("prompt", "")], [("prompt", " ")]):
        with pytest.raises(InvalidRequest) as caught:
            decode(query)
        assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (b"prompt=%ff", "the query is not UTF-8"),
        (b"prompt=\xc3\xa9", "the query is not UTF-8"),
        (b"prompt=x" + b"&a=1" * 200, "the query has more than 100 fields"),
        (b"prompt=x&n=1_0", "n: '1_0' is not a whole number"),
        (b"prompt=x&seed=%EF%BC%91", "seed: '\uff11' is not a whole number"),
        (b"prompt=x&eta=nan", "eta: 'nan' is not a number"),
        (b"prompt=x&eta=inf", "eta: 'inf' is not a number"),
    ],
)
def test_what_only_looks_like_text_or_numbers_is_refused(query: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        imagine.decode(query)
    assert caught.value.message == message


def test_text_is_read_as_utf_8() -> None:
    assert imagine.decode(b"prompt=caf%C3%A9+%F0%9F%99%82").request.prompt == "café 🙂"
