"""Every error a caller can see, each with its HTTP status. Formats render them; nothing else does.

An error crosses process borders by pickle, so its whole state is in plain attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


_MAX_MESSAGE_CHARS = 2_000  # a message may quote what a caller sent


class ServiceError(Exception):
    """An error with one clear line for the caller.

    Attributes:
        message: one line, safe to show to anybody; a long one is cut.
        param: the request field at fault, if one is.
        retry_after_s: seconds after which the same request may succeed; None if it will not.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[:_MAX_MESSAGE_CHARS] + " ..."
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.param, self.retry_after_s)


def _rebuild(cls: type[ServiceError], message: str, param: str | None, retry_after_s: float | None) -> ServiceError:
    return cls(message, param=param, retry_after_s=retry_after_s)


class InvalidRequest(ServiceError):
    """The request itself is wrong; sending it again cannot help."""

    status = 400
    type = "invalid_request_error"


class Forbidden(InvalidRequest):
    """The request comes from where none may come from, whatever it asks."""

    status = 403
    code = "forbidden"


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"


class RouteNotFound(InvalidRequest):
    status = 404
    code = "not_found"


class TaskNotFound(InvalidRequest):
    status = 404
    code = "task_not_found"


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"


class NotAcceptable(InvalidRequest):
    """The `Accept` header allows none of the formats that the route can answer in."""

    status = 406
    code = "not_acceptable"


class UnexpectedBody(InvalidRequest):
    """The request has a body, and its route takes none."""

    code = "unexpected_body"


class BodyTimeout(InvalidRequest):
    """The body did not arrive in time."""

    status = 408
    code = "body_timeout"


class RequestTimeout(ServiceError):
    """The request took longer than its client or the operator allows."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"


class HeadTooLarge(InvalidRequest):
    """The address and the headers of a request are longer than any request of ours needs."""

    status = 431
    code = "request_header_fields_too_large"


class UnsupportedMediaType(InvalidRequest):
    status = 415
    code = "unsupported_media_type"


class Overloaded(ServiceError):
    """The service is full. `retry_after_s` says when to come back."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"


class NotReady(ServiceError):
    """A stage has no replica that answers."""

    status = 503
    code = "not_ready"


class Draining(ServiceError):
    """The service ends: it finishes what it has and takes in nothing new. Another one may take it."""

    status = 503
    type = "overloaded_error"
    code = "draining"


class StageUnavailable(ServiceError):
    """A replica of a stage was lost, or its engine is dead. Seeded work may simply be sent again."""

    status = 503
    type = "server_error"
    code = "stage_unavailable"


class PictureFailed(ServiceError):
    """The model gave no finite picture for this request, even in float32."""

    status = 500
    code = "picture_failed"


class RequestKillsReplica(ServiceError):
    """Two replicas died with this request in a pass, the second of them alone with it. Sending it again kills more."""

    status = 500
    code = "request_kills_replica"


class InternalError(ServiceError):
    """A fault of the service. The details are in its log, under the request id."""

    status = 500
    code = "internal_error"


class ConfigurationError(Exception):
    """The configuration or a checkpoint is wrong: one line that says what and where."""


def first_fault(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Where in a file pydantic found the first fault, and what it is, in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    reason = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return first["loc"], reason
