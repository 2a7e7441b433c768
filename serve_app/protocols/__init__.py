"""Wire formats, each a pure pair: decode a body to `ImageRequest`s, encode results and errors.

A borrowed format's unknown field warns; a wrong value is a 4xx. No I/O, no web framework, no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable

_MOST_NAMED = 20


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


def _shown(name: str) -> str:
    shown = name if len(name) <= 100 else name[:100] + "..."
    return shown.encode("utf-8", "replace").decode()
