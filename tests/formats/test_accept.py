from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.formats.accept import accepted, choose
from serve_app.request.errors import NotAcceptable

OFFERS = ("image/png", "image/jpeg", "image/webp")


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "image/png"),
        ("", "image/png"),
        ("*/*", "image/png"),
        ("*", "image/png"),
        ("image/*", "image/png"),
        ("image/webp", "image/webp"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("text/html, image/jpeg;q=0.5", "image/jpeg"),
        ("image/png;q=0.2, image/webp;q=0.9", "image/webp"),
        ("image/jpeg, image/*;q=0.1", "image/jpeg"),
        ("image/png;q=0, */*", "image/jpeg"),
        ("image/png ; q=0.001 , image/jpeg;q=0", "image/png"),
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "image/webp"),
        ("image/png;q=2, image/jpeg;q=0.1", "image/jpeg"),
        ("image/webp;level=1;q=0.7, image/jpeg;q=0.6", "image/webp"),
    ],
)
def test_the_best_liked_offer_is_chosen(accept: str | None, chosen: str) -> None:
    assert choose(accept, OFFERS) == chosen


@pytest.mark.parametrize(
    "accept",
    ["text/html", "image/gif", "application/json;q=1", "*/*;q=0", "image/*;q=0.0", "image/png;q=x", ";;,", "png"],
)
def test_a_header_that_takes_none_is_406(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        choose(accept, OFFERS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (406, "not_acceptable", "Accept")
    assert caught.value.message.endswith("allows none of image/png, image/jpeg, image/webp")


def test_one_type_can_be_asked_about() -> None:
    assert accepted(None, "image/png") and accepted("image/*", "image/webp")
    assert not accepted("image/png", "image/webp")


@given(st.text())
def test_any_header_is_answered(accept: str) -> None:
    try:
        assert choose(accept, OFFERS) in OFFERS
    except NotAcceptable:
        pass
