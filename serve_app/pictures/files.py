"""Pixels to the bytes of a picture file, with the parameters that draw it again inside.

PNG holds them in the text chunk `sdxl-serve`, JPEG and WebP in EXIF's UserComment, as JSON. NumPy and
Pillow are imported on first use.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from serve_app import __version__
from serve_app.pictures.text import escape_controls, json_text
from serve_app.request.fields import OutputFormat

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats
    from serve_app.request.facts import PreviewMap

PNG_KEY = "sdxl-serve"
_PREVIEW_QUALITY = 80
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

# EXIF tags: the software, the EXIF directory, and its UserComment, which begins with its encoding.
_SOFTWARE, _EXIF_IFD, _USER_COMMENT = 0x0131, 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"
# An EXIF block ends at 64 KiB, and a character takes up to 12 bytes of JSON: four texts cut to this many fit.
_EXIF_MAX_BYTES, _EXIF_TEXT_CHARS = 60_000, 1_000


def encode_image(
    pixels: Bytes,
    output_format: OutputFormat,
    quality: int,
    parameters: dict[str, Any],
    png_texts: Mapping[str, str] | None = None,
) -> bytes:
    """Encodes pixels (H, W, 3) uint8.

    `quality`, 0 to 100, acts on jpeg and webp; `png_texts` are further text chunks of a png, in which control
    characters but the line feed are escaped.
    """
    from PIL import Image, PngImagePlugin

    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if output_format == "png":
        text = PngImagePlugin.PngInfo()
        text.add_text(PNG_KEY, json_text(parameters))
        for key, value in (png_texts or {}).items():
            text.add_text(key, escape_controls(value))
        text.add_text("Software", f"sdxl-serve {__version__}")
        picture.save(buffer, "PNG", pnginfo=text)
    else:
        exif = Image.Exif()
        exif[_SOFTWARE] = f"sdxl-serve {__version__}"
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + _exif_json(parameters)
        picture.save(buffer, output_format.upper(), quality=quality, exif=exif)
    return buffer.getvalue()


def encode_preview(
    latents: Floats, preview_map: PreviewMap, width: int, height: int, output_format: OutputFormat
) -> bytes:
    """A rough picture of latents (4, H/8, W/8), enlarged to its size in pixels: one colour a latent, blurred."""
    import numpy as np
    from PIL import Image

    weights = np.asarray(preview_map, dtype=np.float32)  # (5, 3), the offset last
    colours = np.moveaxis(latents, 0, -1) @ weights[:-1] + weights[-1]
    picture = Image.fromarray(colours.clip(0, 255).round().astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if output_format == "png" else {"quality": _PREVIEW_QUALITY}
    picture.save(buffer, output_format.upper(), **options)
    return buffer.getvalue()


def read_parameters(data: bytes) -> dict[str, Any] | None:
    """The parameters inside a picture file that `encode_image` made; None where there are none."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data))
    if picture.format == "PNG":
        text = picture.info.get(PNG_KEY)
    else:
        comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
        text = bytes(comment).removeprefix(_ASCII).decode("ascii", "replace")
    return json.loads(text) if text else None


def _exif_json(parameters: dict[str, Any]) -> bytes:
    text = json_text(parameters)
    if len(text) > _EXIF_MAX_BYTES:
        text = json_text(
            {name: value[:_EXIF_TEXT_CHARS] if isinstance(value, str) else value for name, value in parameters.items()}
        )
    return text.encode("ascii")
