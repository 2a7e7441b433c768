"""What webui's clients read besides pictures: progress, models, samplers, options.

Pure encoders; who is drawing what is the service's to know.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_app import __version__
from serve_app.formats.automatic1111.fields import DEFAULTS
from serve_app.formats.json_body import parse_object
from serve_app.formats.words import unknown_fields
from serve_app.request.resolve import DEFAULT_QUALITY
from serve_app.request.schedulers import AUTOMATIC, KARRAS, SCHEDULES, samplers
from serve_app.request.schema import ImageReady, ImageRequest, Progress, StreamEvent, invalid_request


@dataclass(frozen=True)
class Job:
    """How far the pictures of one txt2img request are."""

    images: int
    images_done: int
    step: int  # of the picture that is furthest: denoising steps taken, base and refiner together
    steps: int  # that it takes in all
    started: int  # Unix time, seconds
    elapsed_s: float
    interrupted: bool = False

    @property
    def progress(self) -> float:
        """The share that is done, 0 to 1."""
        within = min(self.step / self.steps, 1.0) if self.steps else 0.0
        return min((self.images_done + within) / self.images, 1.0) if self.images else 0.0


@dataclass
class Tracker:
    """Follows one txt2img body through the events of its requests' streams.

    `images` and `steps` are of the whole body; `started` is Unix time, seconds.
    """

    images: int
    steps: int
    started: float
    interrupted: bool = False
    _taken: dict[int, dict[str, int]] = field(default_factory=dict)  # image -> stage -> steps taken
    _done: set[int] = field(default_factory=set)

    def see(self, event: StreamEvent, first_image: int = 0) -> None:
        """Takes an event in. `first_image` is the number, within the body, of its request's first picture."""
        if isinstance(event, Progress) and event.stage in ("denoise", "refine"):
            self._taken.setdefault(first_image + event.image, {})[event.stage] = event.step
        elif isinstance(event, ImageReady):
            self._done.add(first_image + event.image)

    def job(self, now: float) -> Job:
        """Where the body is. `now` is Unix time, seconds."""
        under_way = [sum(taken.values()) for image, taken in self._taken.items() if image not in self._done]
        step = max(under_way, default=0)
        return Job(
            self.images, len(self._done), step, self.steps, int(self.started), now - self.started, self.interrupted
        )


def encode_progress(job: Job | None, preview: str | None = None) -> dict[str, Any]:
    """`GET /sdapi/v1/progress`. `job` is None when nothing is drawn; `preview` is a picture in base64."""
    done = job.progress if job is not None else 0.0
    left_s = job.elapsed_s / done - job.elapsed_s if job is not None and done > 0 else 0.0
    return {
        "progress": done,
        "eta_relative": left_s,
        "state": {
            "skipped": False,
            "interrupted": job is not None and job.interrupted,
            "stopping_generation": False,
            "job": "txt2img" if job is not None else "",
            "job_count": job.images if job is not None else 0,
            "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.gmtime(job.started)) if job is not None else "0",
            "job_no": job.images_done if job is not None else 0,
            "sampling_step": job.step if job is not None else 0,
            "sampling_steps": job.steps if job is not None else 0,
        },
        "current_image": preview,
        "textinfo": None,
    }


class ProgressFields(BaseModel):
    """The body of `POST /internal/progress`; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id_task: str | None = Field(None, description="The force_task_id of a txt2img.")
    id_live_preview: int = Field(-1, description="The last preview's number: the same preview is not sent again.")
    live_preview: bool = Field(True, description="false: no preview.")


def progress_schema() -> dict[str, Any]:
    """JSON schema of that body; a field that it doesn't have warns."""
    schema = ProgressFields.model_json_schema()
    del schema["additionalProperties"]
    return schema | {"example": {"id_task": "task(8f2c4a)", "live_preview": True}}


def decode_progress(body: bytes) -> tuple[ProgressFields, list[str]]:
    """What a body asks for, and what to warn of. Raises `InvalidRequest`."""
    fields = {name: value for name, value in parse_object(body).items() if value is not None}
    known = {name: value for name, value in fields.items() if name in ProgressFields.model_fields}
    try:
        return ProgressFields.model_validate(known), unknown_fields(name for name in fields if name not in known)
    except ValidationError as error:
        raise invalid_request(error) from None


def encode_task_progress(
    job: Job | None, completed: bool = False, preview: str | None = None, preview_number: int = -1
) -> dict[str, Any]:
    """`POST /internal/progress`. `job` is None when its task is not under way; `preview` is a PNG in base64."""
    begun = job is not None and (job.step > 0 or job.images_done > 0)
    known = encode_progress(job) if begun else {"progress": None, "eta_relative": None}
    return {
        "active": begun,
        "queued": job is not None and not begun,
        "completed": completed,
        "progress": known["progress"],
        "eta": known["eta_relative"],
        "live_preview": None if preview is None else f"data:image/png;base64,{preview}",
        "id_live_preview": preview_number,
        "textinfo": None if begun else "Waiting..." if job is None else "In queue...",
    }


def encode_interrupt() -> dict[str, Any]:
    """`POST /sdapi/v1/interrupt` and `/sdapi/v1/skip`."""
    return {}


def encode_ping() -> dict[str, Any]:
    """`GET /internal/ping`."""
    return {}


def encode_models(model_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """`GET /sdapi/v1/sd-models`: the names that `sd_model_checkpoint` may have."""
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for name in model_names
    ]


def encode_samplers() -> list[dict[str, Any]]:
    """`GET /sdapi/v1/samplers`, with the older names that hold a schedule.

    "Automatic" is the checkpoint's own scheduler.
    """
    items: list[dict[str, Any]] = [{"name": AUTOMATIC, "aliases": [], "options": {}}]
    for label, (plain, *others) in samplers().items():
        items.append({"name": label, "aliases": [*plain.aliases, plain.name], "options": {}})
        items += [
            {"name": other.label, "aliases": [other.name], "options": {"scheduler": other.schedule.lower()}}
            for other in others
        ]
    return items


def encode_schedulers() -> list[dict[str, Any]]:
    """`GET /sdapi/v1/schedulers`: the schedules of the noise levels. Karras goes with DPM++ 2M alone."""
    return [
        {
            "name": label.lower(),
            "label": label,
            "aliases": None,
            "default_rho": 7.0 if label == KARRAS else -1.0,
            "need_inner_model": label == AUTOMATIC,
        }
        for label in SCHEDULES
    ]


def encode_options(model_names: tuple[str, ...]) -> dict[str, Any]:
    """`GET /sdapi/v1/options`: what holds where `override_settings` says nothing. They can't be set."""
    defaults = ImageRequest.model_fields
    top, left = defaults["crops_coords_top_left"].default
    return {
        "sd_model_checkpoint": model_names[0],
        "sd_checkpoint_hash": None,
        "sd_vae": AUTOMATIC,
        "CLIP_stop_at_last_layers": 1,
        "samples_format": defaults["output_format"].default,
        "jpeg_quality": DEFAULT_QUALITY,
        "refiner_switch_by_sample_steps": True,
        "sdxl_crop_top": top,
        "sdxl_crop_left": left,
        "sdxl_refiner_high_aesthetic_score": defaults["aesthetic_score"].default,
        "sdxl_refiner_low_aesthetic_score": defaults["negative_aesthetic_score"].default,
        "enable_pnginfo": True,
        "return_grid": False,
        "eta_noise_seed_delta": 0,
        "s_churn": DEFAULTS["s_churn"],
        "s_noise": DEFAULTS["s_noise"],
    }


def encode_cmd_flags() -> dict[str, Any]:
    """`GET /sdapi/v1/cmd-flags`: that the API is on, and what serves it."""
    return {"api": True, "nowebui": True, "listen": True, "api_server": f"sdxl-serve {__version__}"}


_TEXT: dict[str, Any] = {"type": "string"}
ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error", "detail", "body", "errors"],
    "properties": {"error": _TEXT, "detail": _TEXT, "body": _TEXT, "errors": _TEXT},
}
PICTURES_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["images", "parameters", "info", "warnings"],
    "properties": {
        "images": {"type": "array", "items": _TEXT, "description": "The pictures' files in base64."},
        "parameters": {"type": "object", "description": "The request's fields, with their defaults."},
        "info": {"type": "string", "description": "JSON: seeds, prompts, infotexts."},
        "warnings": {"type": "array", "items": _TEXT},
    },
}
TASK_PROGRESS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "active", "queued", "completed", "progress", "eta", "live_preview", "id_live_preview", "textinfo",
    ],
    "properties": {
        "active": {"type": "boolean", "description": "It has taken a step."},
        "queued": {"type": "boolean", "description": "It waits for its first step."},
        "completed": {"type": "boolean", "description": "It was answered lately."},
        "progress": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "eta": {"type": ["number", "null"], "description": "Seconds that are left, as far as can be told."},
        "live_preview": {"type": ["string", "null"], "description": "A data: address, PNG."},
        "id_live_preview": {"type": "integer"},
        "textinfo": {"type": ["string", "null"]},
    },
}  # fmt: skip
PROGRESS_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["progress", "eta_relative", "state", "current_image", "textinfo"],
    "properties": {
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "eta_relative": {"type": "number", "description": "Seconds that are left, as far as can be told."},
        "state": {"type": "object"},
        "current_image": {"type": ["string", "null"], "description": "A preview in base64, PNG."},
        "textinfo": {"type": "null"},
    },
}
