"""Reading a JSON body strictly."""

from __future__ import annotations

import json
from typing import Any

from serve_app.request.errors import InvalidRequest


class NotJson(ValueError):
    """The body is no JSON. The message says why, in one line."""


def parse_json(body: bytes) -> Any:
    """Plain data from UTF-8 JSON, with or without a byte order mark.

    NaN and Infinity, which Python's reader lets pass, are no JSON.
    """
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_object)
    except NotJson:
        raise
    except UnicodeDecodeError as error:
        raise NotJson(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except ValueError:  # a number of more digits than Python reads
        raise NotJson("a number has too many digits") from None


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body must be. Raises `InvalidRequest`."""
    try:
        fields = parse_json(body)
    except NotJson as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise NotJson(f"{name[:40]!r} stands twice in one object")
            seen.add(name)
    return fields


def _no_constant(name: str) -> Any:
    raise NotJson(f"{name} is not a JSON value")
