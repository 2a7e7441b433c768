"""Reading a JSON body strictly, and cheaply whatever it holds.

A body is counted before it is built: no format's largest body comes near these bounds, while a few megabytes of
empty lists take Python's reader, which lets no other thread run, a third of a second, and what reads them on
takes longer.
"""

from __future__ import annotations

import json
from typing import Any

from serve_app.request.errors import InvalidRequest

MAX_VALUES = 20_000
MAX_DEPTH = 64


class NotJson(ValueError):
    """The body is no JSON. The message says why, in one line."""


def parse_json(body: bytes) -> Any:
    """Plain data from UTF-8 JSON, with or without a byte order mark. NaN and Infinity, which Python's reader lets
    pass, are no JSON.

    Raises `NotJson`, also of what nests deeper than `MAX_DEPTH`, and `InvalidRequest` of more than `MAX_VALUES` values.
    """
    if _holds_more(body, MAX_VALUES):
        raise InvalidRequest(f"the body holds more than {MAX_VALUES} JSON values")
    try:
        data = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_object)
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
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _deeper(data, MAX_DEPTH):
        raise NotJson("nested too deeply")
    return data


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body must be. Raises `InvalidRequest`."""
    try:
        fields = parse_json(body)
    except NotJson as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    return fields


def _holds_more(body: bytes, values: int) -> bool:
    """Whether a body holds more values than that: each begins the text, a list or an object, or follows a comma."""
    if _beginnings(body) <= values:
        return False
    # Texts hold such characters, too. Without escapes, every second part between quotes is outside of texts.
    parts = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"', 4 * values)
    if len(parts) > 4 * values:  # two quotes a text, at most two texts a value: its name and itself
        return True
    return _beginnings(b"".join(parts[::2])) > values


def _beginnings(text: bytes) -> int:
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def _deeper(data: Any, depth: int) -> bool:
    level = [data]
    for _ in range(depth + 1):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


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
