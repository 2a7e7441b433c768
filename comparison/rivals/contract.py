"""The HTTP that every rival speaks: the part of `POST /v1/images/generations` that the comparison uses."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

PATH = "/v1/images/generations"


class Asked(BaseModel):
    """One picture. A field that is not here is an error: a rival that ignored it would draw something else."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str
    seed: int = Field(ge=0)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float
    width: int | None = None
    height: int | None = None
    n: Literal[1] = 1
    response_format: Literal["b64_json"] = "b64_json"

    @property
    def key(self) -> tuple[Any, ...]:
        """What must be equal for two requests to share one pipeline call: all but prompt and seed."""
        return self.num_inference_steps, self.guidance_scale, self.width, self.height


class BadBody(ValueError):
    """A body that is no such request; one line."""


def parse(body: bytes) -> Asked:
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise BadBody(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def refusal(error: BadBody) -> Response:
    envelope = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
    return _json({"error": envelope}, 400)


def answer(png: bytes, queue_s: float) -> Response:
    """The picture, and in `Server-Timing` the time from arrival to the first denoise step."""
    response = _json({"created": 0, "data": [{"b64_json": base64.b64encode(png).decode()}]}, 200)
    response.headers["Server-Timing"] = f"queue;dur={queue_s * 1000:.1f}"
    return response


def _json(content: dict[str, Any], status: int) -> Response:
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json")
