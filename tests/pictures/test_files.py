from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from serve_app.pictures import infotext
from serve_app.pictures.files import MEDIA_TYPES, encode_image, read_parameters
from serve_app.request.fields import MAX_PROMPT_CHARS, OutputFormat
from serve_app.request.resolve import parameters, resolve
from serve_app.request.schema import GeneratedImage, ImageRequest
from tests.fakes import FACTS, LIMITS

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")
NOISE = np.random.default_rng(0).integers(0, 256, (40, 72, 3), np.uint8)
RAMP = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 64, 3)).copy()


def decoded(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_png_holds_the_exact_pixels() -> None:
    assert np.array_equal(decoded(encode_image(NOISE, "png", 95, {})), NOISE)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_a_lossy_picture_is_close_and_quality_sets_how_close(output_format: OutputFormat) -> None:
    fine, coarse = (encode_image(RAMP, output_format, quality, {}) for quality in (95, 10))
    assert np.abs(decoded(fine).astype(int) - RAMP).mean() < 3
    noisy_fine, noisy_coarse = (encode_image(NOISE, output_format, quality, {}) for quality in (95, 10))
    assert len(noisy_coarse) < len(noisy_fine) / 2
    assert decoded(coarse).shape == RAMP.shape


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_file_is_of_the_format_it_says(output_format: OutputFormat) -> None:
    picture = Image.open(io.BytesIO(encode_image(NOISE, output_format, 95, {})))
    assert (Image.MIME[str(picture.format)], picture.mode, picture.size) == (
        MEDIA_TYPES[output_format],
        "RGB",
        (72, 40),
    )


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_parameters_are_read_back(output_format: OutputFormat) -> None:
    request = ImageRequest(
        prompt='ein Mädchen, "東京" \U0001f600\n\x01\x7f\x85',
        negative_prompt="",
        original_size=(1, 2),
        guidance_scale=0.1 + 0.2,
        seed=2**63 - 1,
        output_format=output_format,
    )
    kept = parameters(resolve(request, FACTS, LIMITS), 0)
    read = read_parameters(encode_image(NOISE, output_format, 95, kept))
    assert read == json.loads(json.dumps(kept))
    assert read is not None and read["prompt"] == request.prompt and read["seed"] == 2**63 - 1


CONTROLS = "".join(map(chr, [*range(1, 32), *range(127, 160)]))


def text_chunks(png: bytes) -> dict[str, str]:
    """The text of every text chunk by its keyword, as the standard has them, without Pillow."""
    found, at = {}, 8
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4]), png[at + 4 : at + 8]
        keyword, _, rest = png[at + 8 : at + 8 + length].partition(b"\0")
        if kind == b"tEXt":
            found[keyword.decode("latin-1")] = rest.decode("latin-1")
        elif kind == b"iTXt":
            assert rest[:2] == b"\0\0", "uncompressed"
            found[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode()
        at += length + 12
    return found


def test_no_text_of_a_png_has_a_control_character_but_the_line_feed() -> None:
    request = ImageRequest(
        prompt=f"a{CONTROLS}b\nc", negative_prompt=CONTROLS, prompt_2=CONTROLS, negative_prompt_2=f"\u72d0{CONTROLS}"
    )
    kept = parameters(resolve(request, FACTS, LIMITS), 0)
    png = encode_image(NOISE, "png", 95, kept, {infotext.PNG_KEY: infotext.infotext(kept, CONTROLS)})
    chunks = text_chunks(png)
    assert {"sdxl-serve", "parameters", "Software"} == set(chunks)
    for keyword, text in chunks.items():
        assert not set(CONTROLS) - {"\n"} & set(text), keyword
    assert read_parameters(png) == json.loads(json.dumps(kept)), "and nothing is lost"
    read = infotext.read_infotext(chunks["parameters"]).fields
    assert all(read[name] == kept[name] for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"))


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_largest_texts_of_the_widest_characters_fit(output_format: OutputFormat) -> None:
    longest = "\U0001f600" * MAX_PROMPT_CHARS  # 12 bytes each in JSON
    request = ImageRequest(prompt=longest, prompt_2=longest, negative_prompt=longest, negative_prompt_2=longest, seed=7)
    read = read_parameters(encode_image(NOISE, output_format, 95, parameters(resolve(request, FACTS, LIMITS), 0)))
    assert read is not None and read["seed"] == 7
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        assert len(read[name]) >= 1_000 and longest.startswith(read[name])
    if output_format == "png":
        assert read["prompt"] == longest


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_picture_of_somebody_else_has_no_parameters(output_format: OutputFormat) -> None:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, output_format)
    assert read_parameters(buffer.getvalue()) is None


def test_a_generated_image_opens_as_a_picture() -> None:
    image = GeneratedImage(encode_image(NOISE, "png", 95, {}), 1, "png", 72, 40)
    assert np.array_equal(np.asarray(image.to_pil()), NOISE)
