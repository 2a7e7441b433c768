"""Walks the table of all fields: each is sent, and does what the table says."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from docs import fields
from docs.fields import Row
from serve_app.formats.automatic1111 import wire as automatic1111
from serve_app.formats.automatic1111.fields import DEFAULTS
from serve_app.formats.azure_ml import wire as azure_ml
from serve_app.formats.hugging_face import wire as hugging_face
from serve_app.formats.imagine import wire as imagine
from serve_app.formats.openai import wire as openai
from serve_app.formats.stability import wire as stability
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import ImageRequest, parse_request
from tests.fakes import FACTS

NAMES = ("sdxl",)
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "fields.md"


def openai_decode(body: dict[str, Any]) -> Any:
    return openai.decode(json.dumps(body).encode(), NAMES)


def hugging_face_decode(body: dict[str, Any]) -> Any:
    accept = body.pop("header Accept", "*/*")
    return hugging_face.decode(json.dumps(body).encode(), accept)


def automatic1111_decode(body: dict[str, Any]) -> Any:
    asked = automatic1111.decode(json.dumps(body).encode(), NAMES, 32, 99, FACTS)
    return dataclasses.replace(asked, parameters={})  # these repeat the body, whatever it does


def stability_decode(body: dict[str, Any]) -> Any:
    accept, engine = body.pop("header Accept", None), body.pop("engine", "sdxl")
    return stability.decode(json.dumps(body).encode(), engine, accept, NAMES)


def azure_decode(body: dict[str, Any]) -> Any:
    return azure_ml.decode(json.dumps(body).encode(), "application/json", 8)


def imagine_decode(body: dict[str, Any]) -> Any:
    return imagine.decode(urlencode(body, doseq=True).encode())


DECODE: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "OpenAI": (openai_decode, {"prompt": "p"}),
    "Hugging Face": (hugging_face_decode, {"inputs": "p"}),
    "AUTOMATIC1111": (automatic1111_decode, {"prompt": "p"}),
    "Stability": (stability_decode, {"text_prompts": [{"text": "p"}]}),
    "Azure ML": (azure_decode, {"input_data": {"columns": ["prompt"], "data": [["p"]]}}),
    "Ray's example": (imagine_decode, {"prompt": "p"}),
}

# What to send where a value of the field's kind would say nothing; and what must stand beside it.
VALUES: dict[tuple[str, str], Any] = {
    ("OpenAI", "model"): "nope",
    ("OpenAI", "size"): "64x128",
    ("OpenAI", "response_format"): "url",
    ("OpenAI", "quality"): "high",
    ("OpenAI", "style"): "vivid",
    ("OpenAI", "background"): "transparent",
    ("OpenAI", "moderation"): "low",
    ("OpenAI", "stream"): True,
    ("OpenAI", "partial_images"): 2,
    ("OpenAI", "progress"): True,
    ("OpenAI", "user"): "me",
    ("OpenAI", "safety_identifier"): "me",
    ("OpenAI", "complexity"): "high",
    ("OpenAI", "svg"): {"width": 5},
    ("OpenAI", "frame_count"): 2,
    ("OpenAI", "frame_duration_ms"): 40,
    ("Hugging Face", "header Accept"): "image/webp",
    ("Hugging Face", "parameters.num_images_per_prompt"): 2,
    ("Hugging Face", "parameters.n"): 2,
    ("AUTOMATIC1111", "seed"): 5,
    ("AUTOMATIC1111", "sampler_name"): "Heun",
    ("AUTOMATIC1111", "sampler_index"): "Heun",
    ("AUTOMATIC1111", "scheduler"): "Karras",
    ("AUTOMATIC1111", "width"): 64,
    ("AUTOMATIC1111", "height"): 64,
    ("AUTOMATIC1111", "eta"): 0.5,
    ("AUTOMATIC1111", "refiner_checkpoint"): "None",
    ("AUTOMATIC1111", "refiner_switch_at"): 0.5,
    ("AUTOMATIC1111", "infotext"): "p\nSteps: 5, Seed: 3, CFG scale: 2",
    ("AUTOMATIC1111", "override_settings.sd_model_checkpoint"): "nope",
    ("AUTOMATIC1111", "override_settings.CLIP_stop_at_last_layers"): 3,
    ("AUTOMATIC1111", "override_settings.samples_format"): "webp",
    ("AUTOMATIC1111", "override_settings.refiner_switch_by_sample_steps"): False,
    ("AUTOMATIC1111", "override_settings.sdxl_crop_top"): 8,
    ("AUTOMATIC1111", "override_settings.sdxl_crop_left"): 8,
    ("AUTOMATIC1111", "override_settings.enable_pnginfo"): False,
    ("Stability", "header Accept"): "image/png",
    ("Stability", "engine"): "nope",
    ("Stability", "text_prompts"): [{"text": "q"}],
    ("Stability", "steps"): 20,
    ("Stability", "sampler"): "K_HEUN",
    ("Stability", "width"): 64,
    ("Stability", "height"): 64,
    ("Stability", "style_preset"): "anime",
    ("Stability", "clip_guidance_preset"): "SLOW",
    ("Azure ML", "input_data.columns"): ["negative_prompt", "prompt"],
    ("Azure ML", "input_data.data"): [["q"]],
    ("Azure ML", "input_data.index"): [1, 2],
    ("Azure ML", "input_data.prompt"): ["q"],
    ("Azure ML", "input_data.negative_prompt"): ["n"],
    ("Azure ML", "input_data.image"): ["aGk="],
    ("Azure ML", "input_data.mask_image"): ["aGk="],
    ("Azure ML", "input_data.parameters.generator"): 5,
    ("Azure ML", "parameters"): {"seed": 5},
    ("Azure ML", "params"): {"seed": 5},
    ("Ray's example", "img_size"): 64,
    ("Ray's example", "n"): 2,
}
PLAIN_COLUMNS = {"input_data": {"prompt": ["p"]}}
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("OpenAI", "partial_images"): {"stream": True},
    ("OpenAI", "progress"): {"stream": True},
    ("AUTOMATIC1111", "scheduler"): {"sampler_name": "DPM++ 2M"},
    ("AUTOMATIC1111", "eta"): {"sampler_name": "DDIM"},
    ("AUTOMATIC1111", "refiner_switch_at"): {"refiner_checkpoint": "refiner"},
    ("AUTOMATIC1111", "override_settings.refiner_switch_by_sample_steps"): {
        "refiner_checkpoint": "refiner",
        "refiner_switch_at": 0.5,
    },
    ("Azure ML", "input_data.columns"): {
        "input_data": {"columns": ["prompt", "negative_prompt"], "data": [["p", "n"]]}
    },
    ("Azure ML", "input_data.prompt"): PLAIN_COLUMNS,
    ("Azure ML", "input_data.negative_prompt"): PLAIN_COLUMNS,
    ("Azure ML", "input_data.image"): PLAIN_COLUMNS,
    ("Azure ML", "input_data.mask_image"): PLAIN_COLUMNS,
}
CANDIDATES = (8, 0.5, 3.0, "q", [8, 16], "webp", "heun", 1, True)
OURS = {"inputs": "prompt", "steps": "num_inference_steps", "cfg_scale": "guidance_scale", "samples": "n",
        "batch_size": "n", "n_iter": "n", "num_images_per_prompt": "n", "jpeg_quality": "output_compression",
        "sdxl_refiner_high_aesthetic_score": "aesthetic_score",
        "sdxl_refiner_low_aesthetic_score": "negative_aesthetic_score"}  # fmt: skip


def telling(row: Row) -> Any:
    """A value that shows whether the field acts: any but its default."""
    if (row.format, row.field) in VALUES:
        return VALUES[row.format, row.field]
    leaf = row.field.rpartition(".")[2]
    ours = OURS.get(leaf, leaf)
    if row.format == "AUTOMATIC1111" and ours not in ImageRequest.model_fields:
        default = DEFAULTS.get(leaf)
        return {bool: not default, int: 5, float: 0.25, list: ["x"], dict: {"x": 1}}.get(type(default), "x")
    if leaf not in OURS and ours not in ImageRequest.model_fields:
        return True
    for value in CANDIDATES:
        try:
            request = parse_request({"prompt": "p", ours: value})
        except InvalidRequest:
            continue
        if request != parse_request({"prompt": "p"}):
            return value
    raise AssertionError(f"{row}: add a telling value")


def with_field(body: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    body = copy.deepcopy(body)
    within = body
    *path, leaf = field.split(".")
    for name in path:
        within = within.setdefault(name, {})
    within[leaf] = value
    return body


@pytest.mark.parametrize("row", fields.table(), ids=lambda row: f"{row.format}: {row.field}")
def test_a_field_does_what_the_table_says(row: Row) -> None:
    decode, plain = DECODE[row.format]
    base = plain | BESIDE.get((row.format, row.field), {})
    body = with_field(base, row.field, telling(row))
    without = decode(copy.deepcopy(base))
    if row.what == "refused":
        with pytest.raises(InvalidRequest) as caught:
            decode(body)
        leaf = row.field.rpartition(".")[2]
        assert caught.value.param in (row.field, leaf) or leaf in caught.value.message
        return
    asked = decode(body)
    said = [line for line in asked.warnings if line not in without.warnings]
    same = dataclasses.replace(asked, warnings=()) == dataclasses.replace(without, warnings=())
    if row.what == "acts":
        assert not same
        assert said == []
    else:
        assert same
        assert len(said) == 1 and row.field.rpartition(".")[2] in said[0]


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == fields.markdown(), "python -m docs.fields > docs/fields.md"


def test_every_format_has_every_field_of_a_request_or_one_of_its_own_for_it() -> None:
    # the answer of these is one picture, or always a PNG
    without = {"Stability": {"output_format", "output_compression"}}
    theirs = {
        "Hugging Face": {"inputs": "prompt"},
        "AUTOMATIC1111": {"steps": "num_inference_steps", "cfg_scale": "guidance_scale", "batch_size": "n",
                          "refiner_switch_at": "high_noise_frac", "CLIP_stop_at_last_layers": "clip_skip",
                          "sdxl_crop_top": "crops_coords_top_left", "samples_format": "output_format"} | OURS,
        "Stability": {"text_prompts": "prompt", "sampler": "scheduler"} | OURS,
    }  # fmt: skip
    for name in fields.ROUTES:
        leaves = {row.field.rpartition(".")[2] for row in fields.table() if row.format == name}
        named = {theirs.get(name, {}).get(leaf, leaf) for leaf in leaves}
        if name == "Stability":
            named.add("negative_prompt")  # a text of negative weight
        assert set(ImageRequest.model_fields) - named == without.get(name, set()), name
