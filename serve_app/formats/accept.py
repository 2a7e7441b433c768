"""The `Accept` header: which of the media types on offer a client would have (RFC 9110, section 12.5.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.request.errors import NotAcceptable

_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?", re.ASCII)
_MAX_RANGES = 50
_MAX_CHARS = 8_192


@dataclass(frozen=True)
class _Range:
    media_type: str  # "image/png", "image/*" or "*/*", in lower case
    quality: float

    @property
    def precision(self) -> int:
        return 0 if self.media_type == "*/*" else 1 if self.media_type.endswith("/*") else 2

    def takes(self, media_type: str) -> bool:
        return self.precision == 0 or media_type == self.media_type or self._takes_family(media_type)

    def _takes_family(self, media_type: str) -> bool:
        return self.precision == 1 and media_type.split("/")[0] == self.media_type.split("/")[0]


def choose(accept: str | None, offers: Sequence[str]) -> str:
    """The offer that the header likes best; the earlier one where it likes two alike.

    No header takes anything. Raises `NotAcceptable` where it takes none of them, or says nothing that can be
    read.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = _ranges(accept)
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(f"Accept: {accept[:100]!r} allows none of {', '.join(offers)}", param="Accept")
    return best


def accepted(accept: str | None, media_type: str) -> bool:
    """Whether the header takes this media type at all."""
    return accept is None or not accept.strip() or _quality(media_type, _ranges(accept)) > 0


def _quality(media_type: str, ranges: Sequence[_Range]) -> float:
    """What the header gives this type: the most precise range that takes it decides."""
    matching = [given for given in ranges if given.takes(media_type)]
    return max(matching, key=lambda given: given.precision).quality if matching else 0.0


def _ranges(accept: str) -> list[_Range]:
    """The header's media ranges. One whose quality can't be read takes nothing."""
    if len(accept) > _MAX_CHARS:
        raise NotAcceptable(f"Accept: longer than {_MAX_CHARS} characters", param="Accept")
    ranges = []
    for element in accept.split(",")[:_MAX_RANGES]:
        media_type, *parameters = (part.strip().lower() for part in element.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                quality = float(value) if _QUALITY.fullmatch(value.strip()) else 0.0
        if media_type:
            ranges.append(_Range("*/*" if media_type == "*" else media_type, quality))
    return ranges
