from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve_app import __version__
from serve_app.pictures.files import encode_image, read_parameters
from serve_app.pictures.infotext import PNG_KEY, infotext, parse_infotext, read_infotext
from serve_app.request.errors import InvalidRequest
from serve_app.request.facts import DenoiserFacts, ModelFacts, TextFacts
from serve_app.request.limits import Limits
from serve_app.request.resolve import parameters, resolve
from serve_app.request.schedulers import SchedulerName
from serve_app.request.schema import ImageRequest, field_kinds, parse_request
from tests.cases import CASES

FACTS = ModelFacts(
    TextFacts(clip_skip_max=10, base_zeroes_missing_negative=True, refiner_clip_skip_max=10),
    DenoiserFacts(native_size_px=128, native_scheduler="EulerDiscreteScheduler"),
    DenoiserFacts(native_size_px=128, native_scheduler="EulerDiscreteScheduler", takes_aesthetic_score=True),
)
LIMITS = Limits(min_side_px=8, max_pixels=2048**2, max_steps=500)


def drawn(request: ImageRequest, index: int = 0) -> dict[str, Any]:
    """The parameters that the service writes into picture `index`."""
    return parameters(resolve(request, FACTS, LIMITS), index)


def of_the_picture(fields: dict[str, Any]) -> ImageRequest:
    """The request, less what says nothing of the picture."""
    fields = {name: value for name, value in fields.items() if name not in ("output_format", "output_compression")}
    if fields.get("refiner_guidance_scale") == fields["guidance_scale"]:
        del fields["refiner_guidance_scale"]
    return parse_request(fields)


def same_picture(one: ImageRequest, other: ImageRequest) -> bool:
    return {**one.model_dump(), "scheduler": one.scheduler or "euler", "clip_skip": one.clip_skip or None} == {
        **other.model_dump(),
        "scheduler": other.scheduler or "euler",
        "clip_skip": other.clip_skip or None,
    }


def test_it_is_what_its_readers_know() -> None:
    request = ImageRequest(
        prompt="a red fox, snow",
        negative_prompt="blurry",
        scheduler="euler",
        num_inference_steps=30,
        guidance_scale=7.0,
        seed=1,
        width=1024,
        height=768,
        high_noise_frac=1.0,
    )
    assert infotext(drawn(request), "sdxl") == (
        "a red fox, snow\n"
        "Negative prompt: blurry\n"
        "Steps: 30, Sampler: Euler, Schedule type: Uniform, CFG scale: 7, Seed: 1, Size: 1024x768, Model: sdxl, "
        f"Version: sdxl-serve {__version__}"
    )


def test_a_refiner_and_what_has_no_key_of_its_own_are_written_too() -> None:
    request = ImageRequest(
        prompt="p",
        prompt_2='an "oil", painting\nof old',
        seed=5,
        scheduler="dpmpp_2m_karras",
        num_inference_steps=10,
        clip_skip=1,
        original_size=(512, 768),
        high_noise_frac=0.5,
        refiner_guidance_scale=2.5,
    )
    assert infotext(drawn(request, 2), "a, b: c") == (
        "p\n"
        "Steps: 10, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 128x128, "
        'Model: "a, b: c", Clip skip: 3, Refiner: "a, b: c", Refiner switch at: 0.5, '
        "Refiner switch by sampling steps: True, high_noise_frac: 0.5, refiner_guidance_scale: 2.5, "
        'prompt_2: "an \\"oil\\", painting\\nof old", original_size: "[512, 768]", '
        f"Version: sdxl-serve {__version__}"
    )


def test_the_checkpoints_own_scheduler_is_named_where_it_is_known() -> None:
    picture = drawn(ImageRequest(prompt="p"))
    assert "Sampler" not in parse_infotext(infotext(picture, "sdxl"))
    assert parse_infotext(infotext(picture, "sdxl", "EulerDiscreteScheduler"))["Sampler"] == "Euler"
    assert "Sampler" not in parse_infotext(infotext(picture, "sdxl", "PNDMScheduler"))


def test_a_foreign_text_is_read_by_webuis_rules() -> None:
    text = (
        "  a (cat:1.2),\nsitting \nNegative prompt: dog,\n bird\n"
        'Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: abc, Model: "x, y", '
        'Hashes: "{\\"a\\": 1}"'
    )
    assert parse_infotext(text) == {
        "Prompt": "a (cat:1.2),\nsitting",
        "Negative prompt": "dog,\nbird",
        "Steps": "20",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "512x768",
        "Model hash": "abc",
        "Model": "x, y",
        "Hashes": '{"a": 1}',
    }
    read = read_infotext(text)
    assert (read.model, read.unread) == ("x, y", ("Model hash", "Hashes"))
    assert parse_request(read.fields) == ImageRequest(
        prompt="a (cat:1.2),\nsitting",
        negative_prompt="dog,\nbird",
        num_inference_steps=20,
        scheduler="dpmpp_2m_karras",
        guidance_scale=7.5,
        seed=42,
        width=512,
        height=768,
        high_noise_frac=1.0,
    )


def test_a_text_without_parameters_is_all_prompt() -> None:
    assert parse_infotext("a cat\nstyle: oil, mood: calm") == {
        "Prompt": "a cat\nstyle: oil, mood: calm",
        "Negative prompt": "",
    }


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("Steps: many, CFG scale: 7, Seed: 1", "infotext: Steps: 'many' is not a whole number"),
        ("Steps: 5, CFG scale: x, Seed: 1", "infotext: CFG scale: 'x' is not a number"),
        ("Steps: 5, CFG scale: 7, Seed: 1, Size: 64", "infotext: Size: '' is not a whole number"),
        ("Steps: 5, CFG scale: 7, Seed: 1, Refiner: r", "infotext: Refiner switch at: '' is not a number"),
        ("Steps: 5, CFG scale: 7, Seed: 1, original_size: 5", "infotext: original_size: needs 2 values, got 1"),
    ],
)
def test_a_wrong_value_is_named(last: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_infotext(f"p\n{last}")
    assert (caught.value.message, caught.value.param) == (message, "infotext")


@pytest.mark.parametrize("case", CASES)
def test_every_case_of_the_parity_tests_comes_back(case: str) -> None:
    picture = drawn(CASES[case])
    read = read_infotext(infotext(picture, "sdxl", "EulerDiscreteScheduler"))
    assert (read.unread, read.model) == ((), "sdxl")
    assert same_picture(of_the_picture(read.fields), of_the_picture(picture))


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["Negative prompt: ", "Steps: 5, ", "\n", "\r", " ", ",", ":", '"', "\\", "a", "(b:1.2)"]),
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=5),
    ),
    max_size=12,
).map("".join)


def value_of(name: str) -> st.SearchStrategy[Any]:
    kind = field_kinds()[name]
    if kind.values == 2:
        return st.tuples(st.integers(1, 4000), st.integers(1, 4000))
    if kind.base is float:
        return st.floats(0.01, 1.0)
    return TEXTS


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_request_comes_back(data: st.DataObject) -> None:
    fields: dict[str, Any] = {"prompt": data.draw(TEXTS.filter(lambda text: text.strip()), "prompt")}
    fields |= {
        "seed": data.draw(st.integers(0, 2**40)),
        "width": 8 * data.draw(st.integers(1, 200)),
        "height": 8 * data.draw(st.integers(1, 200)),
        "num_inference_steps": data.draw(st.integers(1, 60)),
        "guidance_scale": data.draw(st.floats(0, 100)),
        "scheduler": data.draw(st.sampled_from([*SchedulerName.__args__])),  # type: ignore[attr-defined]
        "clip_skip": data.draw(st.integers(0, 10)),
    }
    beside = ["negative_prompt", "prompt_2", "negative_prompt_2", "eta", "high_noise_frac", "refiner_guidance_scale",
              "guidance_rescale", "original_size", "crops_coords_top_left", "negative_target_size", "aesthetic_score",
              "negative_aesthetic_score"]  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(beside), unique=True)):
        fields[name] = data.draw(value_of(name), name)
    picture = drawn(parse_request(fields))
    model = data.draw(st.sampled_from(["sdxl", "a, b", "stabilityai/x", '"']))
    read = read_infotext(infotext(picture, model))
    assert (read.unread, read.model, read.warnings) == ((), model, ())
    assert same_picture(of_the_picture(read.fields), of_the_picture(picture))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_reading_any_text_gives_fields_or_one_clear_error(text: str) -> None:
    try:
        read_infotext(f"{text}\nSteps: {text}, Sampler: Euler, Size: {text}, Refiner: {text}, Eta DDIM: {text}")
    except InvalidRequest as error:
        assert error.param == "infotext" and error.message.startswith("infotext: ")


def test_a_png_holds_it_where_its_readers_look() -> None:
    text = infotext(drawn(ImageRequest(prompt="füchse, 狐")), "sdxl")
    data = encode_image(np.zeros((8, 8, 3), np.uint8), "png", 95, {"seed": 1}, {PNG_KEY: text})
    assert Image.open(io.BytesIO(data)).info["parameters"] == text
    assert read_parameters(data) == {"seed": 1}
