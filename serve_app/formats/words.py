"""What the wire formats have in common: notes on their fields, unknown fields, errors in a format's own words.

A borrowed format's unknown field warns; a wrong value is a 4xx.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serve_app.request.errors import ServiceError

_MOST_NAMED = 20


class Warns(str):
    """The note on a field that has no effect: the answer says so where it asks for anything but what is done anyway."""


class Refused(str):
    """The note on a field, a value of which is an error of the request."""


def unknown_fields(names: Iterable[str]) -> list[str]:
    """The warnings about fields that a format does not have.

    Names come from the caller: few are named, a long one is cut, and a lone surrogate, which no answer can
    hold, shows as "?".
    """
    all_names = list(names)
    warnings = [f"{_shown(name)} is unknown and was ignored" for name in all_names[:_MOST_NAMED]]
    if len(all_names) > _MOST_NAMED:
        warnings.append(f"{len(all_names) - _MOST_NAMED} more fields are unknown and were ignored")
    return warnings


def in_words(error: ServiceError, words: Mapping[str, str]) -> ServiceError:
    """The same error, its field named in a format's own words (ours -> theirs)."""
    ours = error.param or ""
    if ours not in words:
        return error
    theirs = words[ours]
    message = error.message
    if message.startswith(ours):
        message = theirs + message.removeprefix(ours)
    return type(error)(message, param=theirs, retry_after_s=error.retry_after_s)


def _shown(name: str) -> str:
    shown = name if len(name) <= 100 else name[:100] + "..."
    return shown.encode("utf-8", "replace").decode()
