"""What the sync and the async client share: requests to bodies, bytes to events and errors, when to try again.

No I/O.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import ValidationError

from serve_app import __version__
from serve_app.http.info import ServiceInfo
from serve_app.request.errors import InvalidRequest, ServiceError
from serve_app.request.schema import (
    MAX_PARTIAL_IMAGES,
    GeneratedImage,
    ImageReady,
    ImageRequest,
    ImageResult,
    PartialImage,
    Progress,
    StageTiming,
    parse_request,
)

ImageEvent = Progress | PartialImage | ImageReady | ImageResult

GENERATIONS = "/v1/images/generations"
# A service that says to come back later than this is left to the caller, who finds `retry_after_s` on the error.
MAX_WAIT_S = 60.0
_UNSAID_WAIT_S = 1.0
# What Ray's proxy answers, by way of its web server, where the ingress replica with the request in it has died.
_PROXY_500 = "Internal Server Error"
_CUT = "the connection ended before the pictures were finished: a process died, or a time limit is over"


class ServiceUnreachable(ServiceError):
    """No connection, or one that broke or fell silent."""

    status = 503
    code = "unreachable"


class StreamBroken(ServiceUnreachable):
    """A connection that ended while the pictures were on their way.

    A process that died does that, and so does a time limit: the service's `request_timeout_s`, or one before it.
    """


class UnexpectedAnswer(ServiceError):
    """An answer that is none of this service's: of a proxy before it, of another program, of another version.

    `status` is the answer's own.
    """

    status = 502
    code = "unexpected_answer"


@dataclass(frozen=True)
class Asked:
    request: ImageRequest
    partial_images: int
    progress: bool

    @staticmethod
    def of(
        request: ImageRequest | str, fields: dict[str, Any], partial_images: int = 0, progress: bool = False
    ) -> Asked:
        """What a caller asks for, checked by the definition. Raises `InvalidRequest` before anything is sent."""
        if not 0 <= partial_images <= MAX_PARTIAL_IMAGES:
            raise InvalidRequest(
                f"partial_images: {partial_images} is outside 0 to {MAX_PARTIAL_IMAGES}", param="partial_images"
            )
        if isinstance(request, str):
            request = parse_request({"prompt": request, **fields})
        elif fields:
            request = parse_request(request.model_dump(exclude_unset=True) | fields)
        return Asked(request, partial_images, progress)

    def post(self) -> dict[str, Any]:
        """The body and headers, as httpx takes them. What was left open stays open: the service fills it in."""
        fields = self.request.model_dump(mode="json", exclude_unset=True)
        stream = {"stream": True, "partial_images": self.partial_images, "progress": self.progress}
        return {"json": fields | stream, "headers": {"Accept": "text/event-stream"}}


@dataclass
class Retries:
    """How often a call is made again. `retry_after_s` of an error is None where that can't help."""

    left: int

    def wait_s(self, error: ServiceError, begun: bool = False) -> float:
        """Seconds to wait before the next try. Raises the error where there is none, as once its answer has begun."""
        if begun or error.status != 503 or error.retry_after_s is None:
            raise error
        if isinstance(error, StreamBroken):
            self.left = min(self.left, 1)  # where a time limit cut it, another try ends the same way
        if self.left <= 0 or error.retry_after_s > MAX_WAIT_S:
            raise error
        self.left -= 1
        return error.retry_after_s * random.uniform(
            1.0, 1.1
        )  # those who were refused together don't come back together


@dataclass
class StreamReader:
    """Bytes of a stream to events, however they are cut.

    The result is made of what the `completed` events hold: each has a picture, the last has warnings and timings too.
    """

    images: int
    request_id: str
    _rest: bytearray = field(default_factory=bytearray)
    _pictures: dict[int, GeneratedImage] = field(default_factory=dict)
    _ended: bool = False

    def feed(self, chunk: bytes) -> Iterator[ImageEvent]:
        """The events that these bytes complete. Raises the `ServiceError` that an `error` event tells."""
        seen = len(self._rest)
        self._rest += chunk
        while (end := self._rest.find(b"\n", seen)) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            seen = 0
            # An event's name stands in its data as well; comments and blank lines say nothing.
            if line.startswith(b"data:"):
                yield from self._event(line.removeprefix(b"data:"))

    def end(self) -> None:
        """The connection has ended. Raises where the result has not come."""
        if not self._ended:
            raise StreamBroken(_CUT, retry_after_s=_UNSAID_WAIT_S)

    def _event(self, data: bytes) -> Iterator[ImageEvent]:
        try:
            event = json.loads(data)
            if "error" in event:
                raise _error(event["error"], None, None)
            match event["type"]:
                case "image_generation.progress":
                    names = ("stage", "step", "steps", "queue_position")
                    yield Progress(image=event["image_index"], **{name: event[name] for name in names})
                case "image_generation.partial_image":
                    yield PartialImage(event["image_index"], event["partial_image_index"], **_picture(event))
                case "image_generation.completed":
                    ready = ImageReady(event["image_index"], GeneratedImage(seed=event["seed"], **_picture(event)))
                    self._pictures[ready.image] = ready.picture
                    yield ready
                    if "timings" in event:
                        yield self._result(event)
        except (ValueError, KeyError, TypeError) as error:
            raise UnexpectedAnswer(f"the stream holds an event that is not sdxl-serve's ({_said(error)})") from None

    def _result(self, last: dict[str, Any]) -> ImageResult:
        self._ended = True
        pictures = [self._pictures[index] for index in range(self.images)]
        timings = [StageTiming(**timing) for timing in last["timings"]]
        tokens = last["usage"]["input_tokens"]
        return ImageResult(pictures, last["warnings"], timings, self.request_id, last["created_at"], tokens)


def _picture(event: dict[str, Any]) -> dict[str, Any]:
    width, height = map(int, event["size"].split("x"))
    data = base64.b64decode(event["b64_json"], validate=True)
    return {"data": data, "output_format": event["output_format"], "width": width, "height": height}


def http_options(url: str, timeout_s: float, headers: dict[str, str] | None) -> dict[str, Any]:
    try:
        base = httpx.URL(url.rstrip("/"))
    except httpx.InvalidURL as error:
        raise ServiceUnreachable(f"{url}: {_said(error)}") from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ServiceUnreachable(f"{url}: is no http:// or https:// address")
    return {
        "base_url": base,
        "headers": {"User-Agent": f"sdxl-serve/{__version__}"} | (headers or {}),
        "timeout": httpx.Timeout(timeout_s, pool=None),
        # A stream holds its connection as long as it lasts: the service says how many are too many.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
    }


@contextmanager
def clear_faults(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """Makes one line about the address of whatever httpx raises."""
    url, timeout_s = str(http.base_url).rstrip("/"), http.timeout.read
    through = proxy_between(http.base_url) if http.trust_env else ""
    try:
        yield
    except httpx.ConnectTimeout:
        raise ServiceUnreachable(f"{url}: no connection in {timeout_s:g} s{through}") from None
    except (httpx.ConnectError, httpx.ProxyError) as error:
        raise ServiceUnreachable(f"{url}: {_said(error)}{through}") from None
    except httpx.TimeoutException:
        raise ServiceUnreachable(f"{url}: silent for {timeout_s:g} s") from None
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
        # It was there: seeded work may be asked for again.
        raise ServiceUnreachable(f"{url}: {_said(error)}", retry_after_s=_UNSAID_WAIT_S) from None
    except httpx.HTTPError as error:
        raise ServiceUnreachable(f"{url}: {_said(error)}") from None


def proxy_between(url: httpx.URL) -> str:
    """Words about the proxy that the environment puts before an address, to end a line with; empty without one."""
    proxies = getproxies()
    variable = f"{url.scheme}_proxy" if url.scheme in proxies else "all_proxy"
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(url.host):
        return ""
    proxy = proxy.rpartition("@")[2]  # without its password
    return f", by the proxy {proxy} that {variable} names; with {url.host} in no_proxy it is left out"


@contextmanager
def broken_streams(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """Within `clear_faults`: says of a connection that breaks that the pictures were on their way."""
    try:
        yield
    except (httpx.ReadError, httpx.RemoteProtocolError):
        raise StreamBroken(f"{str(http.base_url).rstrip('/')}: {_CUT}", retry_after_s=_UNSAID_WAIT_S) from None


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_stream(response: httpx.Response) -> bool:
    return response.status_code == 200 and response.headers.get("content-type", "").startswith("text/event-stream")


def checked(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        raise error_of(response)
    return response


def json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
        if isinstance(body, dict):
            return body
    except ValueError:
        pass
    raise error_of(response)


def model_names(response: httpx.Response) -> list[str]:
    try:
        return [str(model["id"]) for model in json_object(response)["data"]]
    except (KeyError, TypeError):
        raise error_of(response) from None


def service_info(response: httpx.Response) -> ServiceInfo:
    try:
        return ServiceInfo.model_validate(json_object(response))
    except ValidationError:
        raise error_of(response) from None


def error_of(response: httpx.Response) -> ServiceError:
    """The error that an answer tells: the service's own by its envelope, anything else by its status.

    A plain 500 is Ray's proxy's, behind which an ingress replica died: a connection that was cut.
    """
    is_text = response.headers.get("content-type", "").startswith("text/plain")
    if response.status_code == 500 and is_text and response.text.strip() == _PROXY_500:
        return ServiceUnreachable(f"{response.url}: {_CUT}", retry_after_s=_UNSAID_WAIT_S)
    try:
        return _error(response.json()["error"], response.status_code, _retry_after_s(response))
    except (ValueError, KeyError, TypeError):
        what = f"{response.url}: HTTP {response.status_code} {response.reason_phrase}".rstrip()
        through = proxy_between(response.url)
        error = UnexpectedAnswer(
            f"{what}, not an answer of sdxl-serve{through}", retry_after_s=_retry_after_s(response)
        )
        error.status = response.status_code
        return error


def _error(envelope: dict[str, Any], status: int | None, retry_after_s: float | None) -> ServiceError:
    """An envelope's error. `status`: None of an event in a stream, which has neither a status nor headers."""
    message, kind = str(envelope["message"]), _BY_CODE.get(envelope["code"])
    if kind is None:
        kind = InvalidRequest if envelope["type"] == InvalidRequest.type else ServiceError
    if status is None and kind.status == 503:
        retry_after_s = _UNSAID_WAIT_S
    error = kind(message, param=envelope["param"], retry_after_s=retry_after_s)
    if status is not None:
        error.status = status
    return error


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds; None where the answer says, or its status means, that trying again can't help."""
    if response.status_code != 503 or response.headers.get("x-should-retry") == "false":
        return None
    said = response.headers.get("retry-after", "")
    if said.isdecimal():
        return float(said)
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except ValueError:
        return _UNSAID_WAIT_S


def _kinds(base: type[ServiceError]) -> Iterator[type[ServiceError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == base.__module__:  # where Ray is loaded, it makes subclasses of its own
            yield kind
            yield from _kinds(kind)


_BY_CODE: dict[Any, type[ServiceError]] = {kind.code: kind for kind in _kinds(ServiceError) if kind.code is not None}
