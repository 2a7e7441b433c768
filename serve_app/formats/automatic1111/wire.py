"""AUTOMATIC1111's webui: `POST /sdapi/v1/txt2img`.

What differs from webui:
- `width` and `height`, 512 there where absent, are the checkpoint's own, so that a smaller checkpoint serves a
  bare request; `prompt` is required. The other defaults are webui's: 50 steps, `cfg_scale` 7. With no sampler the
  checkpoint's own scheduler draws: published SDXL's is webui's default, Euler.
- An empty `negative_prompt` is none: webui zeroes SDXL's conditioning of an empty one, as diffusers does of a
  missing one.
- `refiner_checkpoint` absent is the service's own split; "" or "None" is the base alone.
- `refiner_switch_at` counts sampling steps unless `override_settings.refiner_switch_by_sample_steps` is false;
  webui has had both rules.
- "Clip skip" (`CLIP_stop_at_last_layers`) 1 and 2 both are the layer that SDXL is drawn from.
- A second pass (`enable_hr`) and scripts are refused, not left out: they would change the size or the whole picture.
SDXL's own fields that have no counterpart here (`prompt_2`, `original_size`, ...) may stand beside webui's.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from serve_app import __version__
from serve_app.formats.automatic1111.fields import (
    COUNTERPARTS,
    DEFAULTS,
    OVERRIDES,
    OWN_FIELDS,
    Txt2ImgFields,
    no_effect,
    override_has_no_effect,
)
from serve_app.formats.json_body import parse_object
from serve_app.formats.words import in_words, unknown_fields
from serve_app.pictures.infotext import clip_skip_of, infotext, parse_infotext, read_infotext
from serve_app.request import timesteps
from serve_app.request.errors import InvalidRequest, ModelNotFound, ServiceError
from serve_app.request.facts import ModelFacts
from serve_app.request.fields import MAX_IMAGES, MAX_STEPS
from serve_app.request.resolve import DEFAULT_HIGH_NOISE_FRAC
from serve_app.request.schedulers import AUTOMATIC, BY_NAME, find, from_webui, takes_eta, to_webui
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult, invalid_request, parse_request

_PLAIN_PROMPT = (
    ("extra networks", re.compile(r"<\w{1,20}:[^<>]*>")),
    ("attention weights", re.compile(r"(?<!\\)(\(|\[[^\[\]:|]*\])")),
    ("prompt editing", re.compile(r"\[[^\[\]:]*:[^\[\]]*\]")),
    ("AND and BREAK", re.compile(r"\b(AND|BREAK)\b")),
)


@dataclass(frozen=True)
class Decoded:
    """The requests of one body: several where there are more pictures than one request holds."""

    requests: list[ImageRequest]
    send_images: bool
    task_id: str | None
    parameters: dict[str, Any]  # webui's fields as given, its defaults elsewhere: the answer repeats them
    warnings: tuple[str, ...]


def decode(
    body: bytes,
    model_names: tuple[str, ...],
    max_images: int,
    random_seed: int,
    facts: ModelFacts,
) -> Decoded:
    """A body's requests; picture i of all of them has seed `seed` + i. Raises `InvalidRequest`.

    Args:
        max_images: the most pictures, `batch_size` times `n_iter`, that one body may ask for.
        random_seed: what `seed` -1 stands for, below 2^32.
        facts: of the checkpoints. Their scheduler draws where none is named, and its timesteps convert
            `refiner_switch_at`.
    """
    fields = {name: value for name, value in parse_object(body).items() if value is not None}
    warnings = unknown_fields(name for name in fields if name not in _KNOWN)
    try:
        asked = Txt2ImgFields.model_validate({n: v for n, v in fields.items() if n in Txt2ImgFields.model_fields})
    except ValidationError as error:
        raise invalid_request(error) from None
    warnings += no_effect(asked)
    overrides, override_warnings = _overrides(asked.override_settings, model_names)
    warnings += override_warnings

    request_fields: dict[str, Any] = {"seed": -1} | {ours: DEFAULTS[theirs] for theirs, ours in _DEFAULTED.items()}
    if asked.infotext:
        read = read_infotext(asked.infotext, facts.base.noise_schedule)
        request_fields |= read.fields
        warnings += [f"infotext: {line}" for line in (*read.warnings, *unknown_fields(read.unread))]
        if read.model is not None and read.model not in model_names:
            warnings.append(f"infotext: Model is another than this service's {model_names[0]}")
    request_fields |= {name: value for name, value in fields.items() if name in OWN_FIELDS}
    request_fields |= overrides
    request_fields |= {
        ours: getattr(asked, theirs) for theirs, ours in _SAME.items() if theirs in asked.model_fields_set
    }
    request_fields["negative_prompt"] = request_fields.get("negative_prompt") or None
    if request_fields["seed"] == -1:
        request_fields["seed"] = random_seed
    warnings += _scheduler(asked, request_fields)
    warnings += _eta(asked, request_fields, facts)
    warnings += _refiner(asked, request_fields, model_names, facts)
    if "prompt" not in request_fields:
        raise InvalidRequest("prompt: field required", param="prompt")
    try:
        requests = _requests(request_fields, asked, max_images)
    except InvalidRequest as error:
        raise in_words(error, COUNTERPARTS) from None
    warnings += _prompt_syntax(requests[0])
    return Decoded(requests, asked.send_images, asked.force_task_id or None, _repeated(asked), tuple(warnings))


def encode(asked: Decoded, results: Sequence[ImageResult], model: str, facts: ModelFacts) -> dict[str, Any]:
    """The response body. `info` is a JSON text; `warnings` is ours."""
    drawn = [
        (_parameters(request, image, facts.refined), image)
        for request, result in zip(asked.requests, results, strict=True)
        for image in result.images
    ]
    warnings = dict.fromkeys([*asked.warnings, *(line for result in results for line in result.warnings)])
    return {
        "images": [base64.b64encode(image.data).decode("ascii") for _, image in drawn] if asked.send_images else [],
        "parameters": asked.parameters,
        "info": json.dumps(_info(asked, [fields for fields, _ in drawn], results[0].created, model, facts)),
        "warnings": list(warnings),
    }


def encode_error(error: ServiceError) -> dict[str, Any]:
    """webui's envelope, of any status. `detail`, which FastAPI's own errors have as well, says what is wrong."""
    error = in_words(error, COUNTERPARTS)
    return {"error": type(error).__name__, "detail": error.message, "body": "", "errors": error.message}


def txt2img_schema() -> dict[str, Any]:
    """JSON schema of the request body."""
    theirs, ours = Txt2ImgFields.model_json_schema(), ImageRequest.model_json_schema()
    settings = {name: {"description": note} for name, note in OVERRIDES.items()}
    return {
        "type": "object",
        "anyOf": [{"required": ["prompt"]}, {"required": ["infotext"]}],
        "properties": {name: ours["properties"][name] for name in OWN_FIELDS}
        | theirs["properties"]
        | {"override_settings": theirs["properties"]["override_settings"] | {"properties": settings}},
        "example": {
            "prompt": "a small red circle above a blue square",
            "sampler_name": "Euler",
            "steps": 25,
            "seed": 7,
        },
    }


_MAX_TITLE_CHARS = 1_000
_KNOWN = {*Txt2ImgFields.model_fields, *OWN_FIELDS}
# webui's fields that are ours under the same or another name; the first two have webui's default where absent.
_DEFAULTED = {"steps": "num_inference_steps", "cfg_scale": "guidance_scale"}
_SAME = _DEFAULTED | {name: name for name in ("prompt", "negative_prompt", "seed", "width", "height")}


def _scheduler(asked: Txt2ImgFields, fields: dict[str, Any]) -> list[str]:
    warnings = []
    param = "sampler_name" if asked.sampler_name else "sampler_index"
    sampler = asked.sampler_name or asked.sampler_index
    if asked.sampler_name and asked.sampler_index and asked.sampler_name != asked.sampler_index:
        warnings.append("sampler_index has no effect beside sampler_name")
    if sampler is None and asked.scheduler and "scheduler" in fields:
        sampler = to_webui(fields["scheduler"])[0]  # the infotext's sampler, with a schedule of the body's
    if sampler is None and "scheduler" in fields:
        return warnings
    # With no word on either the checkpoint's own draws: SDXL's is Euler, as webui's default is.
    default = AUTOMATIC if asked.scheduler in (None, "", AUTOMATIC) else "Euler"
    found = from_webui(sampler or default, asked.scheduler, param)
    fields["scheduler"] = found.scheduler
    return [*warnings, *found.warnings]


def _eta(asked: Txt2ImgFields, fields: dict[str, Any], facts: ModelFacts) -> list[str]:
    """webui's eta is DDIM's, and the noise of the ancestral samplers, where 1 is what they have anyway."""
    if asked.eta is None:
        return []
    name = fields["scheduler"] or facts.base.native_scheduler
    if takes_eta(name):
        fields["eta"] = asked.eta
        return []
    scheduler = find(name)
    if scheduler is not None and scheduler.ancestral and asked.eta == 1:
        return []
    return ["eta has no effect: in this service it is DDIM's alone"]


def _refiner(
    asked: Txt2ImgFields, fields: dict[str, Any], model_names: tuple[str, ...], facts: ModelFacts
) -> list[str]:
    """Sets `high_noise_frac`, where a refiner or none is asked for."""
    switch_at = asked.refiner_switch_at
    # What says where to switch, other than what says so by itself: never.
    where = ["refiner_switch_at"] if switch_at not in (None, 1.0) else []
    if asked.override_settings.get("refiner_switch_by_sample_steps") is False:  # true holds anyway
        where.append("override_settings.refiner_switch_by_sample_steps")
    if "refiner_checkpoint" not in asked.model_fields_set:
        # With no word on the refiner the split is the service's own, or the infotext's.
        return [f"{name} has no effect without refiner_checkpoint" for name in where]
    name = asked.refiner_checkpoint or "None"
    if name.lower() == "none":
        fields["high_noise_frac"] = 1.0
        return [f"{name} has no effect: refiner_checkpoint is none" for name in where]
    if _bare(name) not in model_names and "refiner" not in name.lower():
        raise InvalidRequest(
            f"refiner_checkpoint: {name[:100]!r} is unknown; send refiner or {model_names[0]}, None for the base alone",
            param="refiner_checkpoint",
        )
    if not facts.refined:
        raise InvalidRequest("refiner_checkpoint: this service has no refiner", param="refiner_checkpoint")
    if switch_at is None:
        fields.pop("high_noise_frac", None)
        return [f"{name} has no effect without refiner_switch_at" for name in where]
    steps = fields.get("num_inference_steps", DEFAULTS["steps"])
    if not 1 <= steps <= MAX_STEPS:
        return []  # refused with the request: no split is computed for so many
    if asked.override_settings.get("refiner_switch_by_sample_steps") is False:
        fields["high_noise_frac"] = max(switch_at, 1e-6)
        return []
    wanted = timesteps.steps_before(switch_at, steps)
    scheduler = find(fields["scheduler"] or facts.base.native_scheduler) or BY_NAME["euler"]
    share = timesteps.high_noise_frac(scheduler.name, steps, wanted, facts.base.noise_schedule)
    fields["high_noise_frac"] = share
    got = timesteps.base_steps(scheduler.name, steps, share, facts.base.noise_schedule)
    if facts.base.noise_schedule.own_sigmas and not scheduler.own_timesteps:
        return ["refiner_switch_at is met only about: the checkpoint's scheduler spaces its steps in a way of its own"]
    if got == wanted:
        return []
    return [f"refiner_switch_at {switch_at:g} is {wanted} of {steps} steps; the base takes {got}: timesteps coincide"]


def _overrides(settings: dict[str, Any], model_names: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """What `override_settings` set of a request, and what to warn of. Raises `InvalidRequest`."""
    given = {name: value for name, value in settings.items() if value is not None}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        where = f"override_settings.{name}"
        if name == "sd_model_checkpoint":
            if not isinstance(value, str) or _bare(value) not in model_names:
                raise ModelNotFound(
                    f"{where}: {str(value)[:100]!r} does not exist; this service has {', '.join(model_names)}",
                    param=where,
                )
        elif name == "CLIP_stop_at_last_layers":
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
                raise InvalidRequest(f"{where}: must be a whole number from 1 to 100", param=where)
            fields["clip_skip"] = clip_skip_of(value)
        elif name == "samples_format":
            if not isinstance(value, str) or value not in _FORMATS:
                raise InvalidRequest(f"{where}: must be png, jpg or webp", param=where)
            fields["output_format"] = _FORMATS[value]
        elif name == "refiner_switch_by_sample_steps":
            if not isinstance(value, bool):
                raise InvalidRequest(f"{where}: must be true or false", param=where)
        elif name in _SETTINGS:
            fields[_SETTINGS[name]] = value
    if crop := {name for name in _CROP if name in given}:
        for name in crop:
            if isinstance(given[name], bool) or not isinstance(given[name], int):
                raise InvalidRequest(
                    f"override_settings.{name}: must be a whole number", param=f"override_settings.{name}"
                )
        fields["crops_coords_top_left"] = [given.get(name, 0) for name in _CROP]
    warnings = [
        f"override_settings.{name} has no effect" for name in given if override_has_no_effect(name, given[name])
    ]
    return fields, warnings + unknown_fields(f"override_settings.{name}" for name in given if name not in OVERRIDES)


_CROP = ("sdxl_crop_top", "sdxl_crop_left")
_FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_SETTINGS = {
    "jpeg_quality": "output_compression",
    "sdxl_refiner_high_aesthetic_score": "aesthetic_score",
    "sdxl_refiner_low_aesthetic_score": "negative_aesthetic_score",
}


def _repeated(asked: Txt2ImgFields) -> dict[str, Any]:
    """The body as the answer repeats it. Raises `InvalidRequest` where JSON can't: 1e999 is read as infinity."""
    repeated = DEFAULTS | asked.model_dump(exclude_unset=True)
    for name, value in repeated.items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise InvalidRequest(f"{name}: holds a number that is too large", param=name) from None
    return repeated


def _requests(fields: dict[str, Any], asked: Txt2ImgFields, max_images: int) -> list[ImageRequest]:
    total = asked.batch_size * asked.n_iter
    if total > max_images:
        raise InvalidRequest(
            f"n_iter: {asked.n_iter} times batch_size {asked.batch_size} is {total} pictures, this service takes at "
            f"most {max_images}",
            param="n_iter",
        )
    seed = fields["seed"]
    return [
        parse_request(fields | {"seed": seed + first, "n": min(MAX_IMAGES, total - first)})
        for first in range(0, total, MAX_IMAGES)
    ]


def _prompt_syntax(request: ImageRequest) -> list[str]:
    """webui's own language within prompts, which this service reads as plain words."""
    return [
        f"{name}: {', '.join(found)} of webui are read as plain text"
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt))
        if (found := [what for what, pattern in _PLAIN_PROMPT if pattern.search(text or "")])
    ]


def _bare(title: str) -> str:
    """A checkpoint's name without what webui's titles add: "name.safetensors [0123456789]"."""
    if len(title) > _MAX_TITLE_CHARS:  # a search through megabytes holds the interpreter
        return title
    return re.sub(r"(\.safetensors)?( \[[0-9a-f]{1,64}\])?$", "", title.strip())


def _parameters(request: ImageRequest, image: GeneratedImage, refined: bool) -> dict[str, Any]:
    """The fields that draw this picture alone, as `resolve.parameters` has them."""
    fields = request.model_dump(exclude_none=True)
    fields.setdefault("high_noise_frac", DEFAULT_HIGH_NOISE_FRAC if refined else 1.0)
    return fields | {"seed": image.seed, "width": image.width, "height": image.height}


def _info(
    asked: Decoded, drawn: Sequence[dict[str, Any]], created: int, model: str, facts: ModelFacts
) -> dict[str, Any]:
    # Where it was interrupted before the first picture, what was asked for stands for it.
    first = drawn[0] if drawn else {"width": 0, "height": 0} | asked.requests[0].model_dump(exclude_none=True)
    negative = first.get("negative_prompt", "")
    native = facts.base.native_scheduler
    infotexts = [infotext(fields, model, native, facts.base.noise_schedule) for fields in drawn]
    scheduler = find(first.get("scheduler") or native)
    keys = {"Refiner", "Refiner switch at", "Schedule type"}
    return {
        "prompt": first["prompt"],
        "all_prompts": [fields["prompt"] for fields in drawn],
        "negative_prompt": negative,
        "all_negative_prompts": [negative for _ in drawn],
        "seed": first["seed"],
        "all_seeds": [fields["seed"] for fields in drawn],
        "subseed": -1,
        "all_subseeds": [-1 for _ in drawn],
        "subseed_strength": 0,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": to_webui(None if scheduler is None else scheduler.name)[0],
        "cfg_scale": first["guidance_scale"],
        "steps": first["num_inference_steps"],
        "batch_size": asked.parameters["batch_size"],
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {
            n: v for n, v in (parse_infotext(infotexts[0]) if drawn else {}).items() if n in keys
        },
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(created)),
        "clip_skip": first["clip_skip"] + 2 if first.get("clip_skip") else 1,
        "is_using_inpainting_conditioning": False,
        "version": f"sdxl-serve {__version__}",
    }
