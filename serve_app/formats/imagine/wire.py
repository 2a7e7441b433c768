"""`GET /imagine`: Ray's own example route, a prompt in the address and a picture back.

`img_size` sets both sides, as there; every field of `ImageRequest` may stand beside it. A pair is given
as two values: `original_size=512&original_size=768`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from serve_app.formats.words import unknown_fields
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import FieldKind, ImageRequest, field_kinds, parse_request, read_text

_KINDS = field_kinds()
_MAX_FIELDS = 100
_MAX_BYTES = 64 * 2**10


@dataclass(frozen=True)
class Decoded:
    request: ImageRequest
    warnings: tuple[str, ...]


def decode(query: bytes) -> Decoded:
    """The request of a query as it stands in the address, percent-encoded. Raises `InvalidRequest`."""
    if len(query) > _MAX_BYTES:
        raise InvalidRequest(f"the query is longer than {_MAX_BYTES} bytes")
    try:
        texts = parse_qs(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=_MAX_FIELDS)
    except UnicodeDecodeError:
        raise InvalidRequest("the query is not UTF-8") from None
    except ValueError:
        raise InvalidRequest(f"the query has more than {_MAX_FIELDS} fields") from None
    fields: dict[str, Any] = {}
    if "img_size" in texts:
        size = read_text("img_size", FieldKind(int), texts.pop("img_size"))
        fields = {"width": size, "height": size}
        if "width" in texts or "height" in texts:
            raise InvalidRequest("img_size: contradicts width and height; send one or the other", param="img_size")
    warnings = unknown_fields(name for name in texts if name not in _KINDS)
    fields |= {name: read_text(name, _KINDS[name], given) for name, given in texts.items() if name in _KINDS}
    if "prompt" not in fields:
        raise InvalidRequest("prompt: field required", param="prompt")
    if fields.get("n", 1) != 1:
        raise InvalidRequest("n: this route answers with one picture", param="n")
    return Decoded(parse_request(fields), tuple(warnings))
