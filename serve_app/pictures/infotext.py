"""webui's infotext: a picture's parameters as lines of text, which many programs read back.

    a red fox, snow
    Negative prompt: blurry
    Steps: 30, Sampler: Euler, Schedule type: Uniform, CFG scale: 7, Seed: 1, Size: 1024x1024, Model: sdxl

It stands in a PNG's text chunk `parameters` and in `info` of webui's API. What it has no key for stands under
the names of `ImageRequest`, which other readers keep and pass over, so that the text gives the whole request back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app import __version__
from serve_app.pictures.text import escape_controls
from serve_app.request import timesteps
from serve_app.request.errors import InvalidRequest
from serve_app.request.facts import NoiseSchedule
from serve_app.request.fields import OutputFields, UrgencyFields
from serve_app.request.schedulers import find, from_webui, to_webui
from serve_app.request.schema import FieldKind, ImageRequest, field_kinds, read_text
from serve_app.request.timesteps import SDXL

PNG_KEY = "parameters"

_NEGATIVE = "Negative prompt:"
# The parameters of the last line: a name, then a quoted JSON string or anything without a comma. Names and the room
# before them are bounded, as webui's reader doesn't: else a long line without a colon takes quadratic time.
_PARAMETER = re.compile(r'\s{0,9}(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_PARAMETERS = 3  # a last line with fewer is part of the prompt
_KINDS = field_kinds()
# Of the request and not of the picture: the file, the number, and how urgent it was.
_NOT_OF_THE_PICTURE = {"n", *OutputFields.model_fields, *UrgencyFields.model_fields}
# Fields with keys of their own, written and read one by one.
_OWN_KEYS = {
    "prompt", "negative_prompt", "num_inference_steps", "scheduler", "guidance_scale", "seed", "width", "height",
    "clip_skip", "eta", "high_noise_frac", "refiner_guidance_scale",
}  # fmt: skip
_READ = {
    "Prompt", "Negative prompt", "Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip",
    "Eta DDIM", "Refiner", "Refiner switch at", "Refiner switch by sampling steps", "Model", "Version",
}  # fmt: skip


def infotext(
    parameters: Mapping[str, Any], model: str, native_scheduler: str | None = None, noise_schedule: NoiseSchedule = SDXL
) -> str:
    """The text of one picture.

    Args:
        parameters: the fields of the `ImageRequest` that draws it alone, as `resolve.parameters` gives them: seed,
            width and height are there, and `high_noise_frac` where a refiner took part.
        native_scheduler: diffusers' class of the checkpoint's own scheduler, for a picture that named none.
    """
    prompt, negative = parameters["prompt"], parameters.get("negative_prompt")
    values = _values(parameters, model, native_scheduler, noise_schedule)
    plain = _text(prompt, negative, values)
    read = parse_infotext(plain)
    # The form can't hold every text: it strips lines, and a line may begin with "Negative prompt:".
    if read["Prompt"] != prompt:
        values["prompt"] = _json(prompt)
    if (read["Negative prompt"] or None) != negative:
        values["negative_prompt"] = "none" if negative is None else _json(negative)
    return _text(prompt, negative, values)


def parse_infotext(text: str) -> dict[str, str]:
    """The keys and values of an infotext, with "Prompt" and "Negative prompt", by the rules of webui's reader."""
    *lines, last = text.strip().split("\n")
    found = _PARAMETER.findall(last)
    if len(found) < _FEWEST_PARAMETERS:
        lines, found = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    lines_of = prompt
    for line in (line.strip() for line in lines):
        if line.startswith(_NEGATIVE):
            lines_of, line = negative, line.removeprefix(_NEGATIVE).strip()
        lines_of.append(line)
    texts = {"Prompt": "\n".join(prompt).strip("\n"), "Negative prompt": "\n".join(negative).strip("\n")}
    return texts | {name: _unquoted(value) for name, value in found}


@dataclass(frozen=True)
class Read:
    """What an infotext asks for: fields of an `ImageRequest`, and the keys that nothing is made of."""

    fields: dict[str, Any]
    model: str | None
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def read_infotext(text: str, noise_schedule: NoiseSchedule = SDXL) -> Read:
    """The request that draws an infotext's picture again. Raises `InvalidRequest` about `infotext`."""
    values = parse_infotext(text)
    try:
        return _read(values, noise_schedule)
    except InvalidRequest as error:
        raise InvalidRequest(f"infotext: {error.message}", param="infotext") from None


def clip_skip_of(last_layers: int) -> int | None:
    """Our `clip_skip` for webui's "Clip skip", which counts CLIP's layers from the last one.

    SDXL is drawn from the last layer but one: there by 1, which is webui's default, as well as by 2.
    """
    return last_layers - 2 if last_layers > 2 else None


def refiner_share(scheduler: str | None, steps: int, switch_at: float, noise_schedule: NoiseSchedule) -> float:
    """Our `high_noise_frac` for webui's "Refiner switch at" by sampling steps; 1 where the base takes all."""
    wanted = timesteps.steps_before(switch_at, steps)
    return timesteps.high_noise_frac(scheduler or "euler", steps, wanted, noise_schedule)


def _values(
    parameters: Mapping[str, Any], model: str, native_scheduler: str | None, noise_schedule: NoiseSchedule
) -> dict[str, str]:
    """The last line's keys and values, in webui's order."""
    steps, share = parameters["num_inference_steps"], parameters.get("high_noise_frac", 1.0)
    scheduler = find(parameters.get("scheduler") or native_scheduler or "")
    values = {"Steps": str(steps)}
    if scheduler is not None:
        values["Sampler"], values["Schedule type"] = to_webui(scheduler.name)
    values["CFG scale"] = _number(parameters["guidance_scale"])
    values["Seed"] = str(parameters["seed"])
    values["Size"] = f"{parameters['width']}x{parameters['height']}"
    values["Model"] = _quoted(model)
    if parameters.get("clip_skip"):
        values["Clip skip"] = str(parameters["clip_skip"] + 2)
    if parameters.get("eta"):
        values["Eta DDIM"] = _number(parameters["eta"])
    if share < 1:
        drawn_by = None if scheduler is None else scheduler.name
        base = timesteps.base_steps(drawn_by or "euler", steps, share, noise_schedule)
        values["Refiner"] = _quoted(model)
        values["Refiner switch at"] = _number(base / steps)
        values["Refiner switch by sampling steps"] = "True"
        if refiner_share(drawn_by, steps, base / steps, noise_schedule) != share:
            values["high_noise_frac"] = _number(share)
        if parameters.get("refiner_guidance_scale") not in (None, parameters["guidance_scale"]):
            values["refiner_guidance_scale"] = _number(parameters["refiner_guidance_scale"])
    for name, value in parameters.items():
        if name not in _OWN_KEYS | _NOT_OF_THE_PICTURE and value != ImageRequest.model_fields[name].default:
            values[name] = _own_value(value)
    values["Version"] = f"sdxl-serve {__version__}"
    return values


def _own_value(value: Any) -> str:
    if isinstance(value, str):
        return _json(value)
    return _quoted(json.dumps(value)) if isinstance(value, list | tuple) else _number(value)


def _text(prompt: str, negative: str | None, values: Mapping[str, str]) -> str:
    lines = [prompt, f"{_NEGATIVE} {negative}"] if negative else [prompt]
    text = "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())]).strip()
    return escape_controls(text)


def _read(values: Mapping[str, str], noise_schedule: NoiseSchedule) -> Read:
    fields: dict[str, Any] = {"prompt": values["Prompt"], "negative_prompt": values["Negative prompt"] or None}
    warnings: tuple[str, ...] = ()
    for key, name in (("Steps", "num_inference_steps"), ("CFG scale", "guidance_scale"), ("Seed", "seed")):
        if key in values:
            fields[name] = read_text(key, _KINDS[name], [values[key]])
    if "Size" in values:
        fields["width"], fields["height"] = (
            read_text("Size", FieldKind(int), [side]) for side in (*values["Size"].split("x"), "")[:2]
        )
    if "Sampler" in values:
        found = from_webui(values["Sampler"], values.get("Schedule type"), "Sampler")
        fields["scheduler"], warnings = found.scheduler, found.warnings
    if "Clip skip" in values:
        fields["clip_skip"] = clip_skip_of(read_text("Clip skip", FieldKind(int), [values["Clip skip"]]))
    if "Eta DDIM" in values:
        fields["eta"] = read_text("Eta DDIM", _KINDS["eta"], [values["Eta DDIM"]])
    fields["high_noise_frac"] = _read_split(values, fields, noise_schedule)
    own = [name for name in values if name in _KINDS and name not in _NOT_OF_THE_PICTURE]
    fields |= {name: _read_own(name, values[name]) for name in own}
    unread = [name for name in values if name not in _READ and name not in own]
    given = {name: value for name, value in fields.items() if value is not None}
    return Read(given, values.get("Model"), tuple(unread), warnings)


def _read_split(values: Mapping[str, str], fields: Mapping[str, Any], noise_schedule: NoiseSchedule) -> float:
    if values.get("Refiner", "None") == "None":
        return 1.0
    switch_at: float = read_text("Refiner switch at", FieldKind(float), [values.get("Refiner switch at", "")])
    steps: int = fields.get("num_inference_steps", ImageRequest.model_fields["num_inference_steps"].default)
    if not 1 <= steps <= 10_000:
        return switch_at  # such a request is refused in any case
    return refiner_share(fields.get("scheduler"), steps, switch_at, noise_schedule)


def _read_own(name: str, text: str) -> Any:
    kind = _KINDS[name]
    if name == "negative_prompt" and text == "none":
        return None
    if kind.values == 1:
        return read_text(name, kind, [text])
    return read_text(name, kind, re.sub(r"[\[\]\s]", "", text).split(","))


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def _json(text: str) -> str:
    return escape_controls(json.dumps(text, ensure_ascii=False))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or not (text.startswith('"') and text.endswith('"')):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
