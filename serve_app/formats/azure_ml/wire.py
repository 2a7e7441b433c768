"""Azure Machine Learning's online endpoint for SDXL: `POST /score`.

Two servers exist: the MLflow scorer, with its many shapes of `input_data`, and an earlier container,
with more `parameters`. What either takes is taken here.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from serve_app.formats.json_body import NotJson, parse_json
from serve_app.formats.words import Refused, unknown_fields
from serve_app.request.errors import InvalidRequest, ServiceError, UnsupportedMediaType
from serve_app.request.schema import ImageRequest, ImageResult, parse_request

# What a row of `input_data` may hold, under the names of its columns.
COLUMNS: dict[str, str] = {
    "prompt": "A row's prompt.",
    "negative_prompt": "A row's negative prompt, before that of the parameters; null is empty, as on that server.",
    "image": Refused("Is refused: image-to-image is not served."),
    "mask_image": Refused("Is refused: inpainting is not served."),
}
FIELDS: dict[str, str] = {
    "input_data.columns": "The names of the rows' values; `input_data` may have other shapes, without it.",
    "input_data.data": "The rows.",
    "input_data.index": Refused("Names nothing; one that is not as long as the data is refused."),
    "parameters": "As input_data.parameters.",
    "params": "As input_data.parameters, in MLflow's word; within input_data as well.",
}
_COLUMNS = ("prompt", "negative_prompt")
_RENAMED = {"num_images_per_prompt": "n"}
_PARAMETERS = (set(ImageRequest.model_fields) - {"prompt"}) | set(_RENAMED)


@dataclass(frozen=True)
class Decoded:
    """One request a row, in the order of `data`."""

    requests: list[ImageRequest]
    warnings: tuple[str, ...]


def decode(body: bytes, content_type: str | None, max_rows: int) -> Decoded:
    """A body's rows. Raises `InvalidRequest` with the server's own words where it has some."""
    if (content_type or "").split(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Expects Content-Type to be application/json")
    fields = _object(body)
    if fields.get("input_data") is None:
        raise InvalidRequest("A value is not provided for the 'input_data' parameter.", param="input_data")
    warnings = unknown_fields(name for name in fields if name not in _TOP_LEVEL)
    rows, given = _rows(fields["input_data"], warnings)
    if len(rows) > max_rows:  # here, before each is read: that alone would take seconds
        raise _bad(f"{len(rows)} rows, this service takes at most {max_rows}")
    for place in ("parameters", "params"):  # `params` is MLflow's
        if fields.get(place) is not None:
            _add_parameters(given, _parameters(fields[place], place), place)
    common = _request_fields(given, warnings)
    parse_request({"prompt": "any"} | common)  # wrong parameters are wrong without a row, too
    requests = [parse_request(_row_fields(row, common)) for row in rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    warnings += unknown_fields(name for name in columns if name not in _COLUMNS)
    if "negative_prompt" in common and any(row.get("negative_prompt") is not None for row in rows):
        warnings.append("negative_prompt of the parameters has no effect on rows with their own")
    return Decoded(requests, tuple(warnings))


def encode(results: list[tuple[ImageRequest, ImageResult]]) -> list[dict[str, Any]]:
    """The response: a row an image, in the order of `data`."""
    return [
        {
            "prompt": request.prompt,
            "generated_image": base64.b64encode(image.data).decode("ascii"),
            "nsfw_content_detected": None,
        }
        for request, result in results
        for image in result.images
    ]


def encode_error(error: ServiceError) -> dict[str, Any]:
    return {"message": error.message}


def parameter_names() -> dict[str, str]:
    """The names that `parameters` may hold, each with the field of `ImageRequest` that it is."""
    return {name: _RENAMED.get(name, name) for name in (*ImageRequest.model_fields, *_RENAMED) if name in _PARAMETERS}


_TOP_LEVEL = ("input_data", "parameters", "params")


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise InvalidRequest("POST body is empty. Expecting a JSON dictionary.")
    try:
        fields = parse_json(body)
    except NotJson as error:
        raise InvalidRequest(f"POST body could not be decoded as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("POST body should be a JSON dictionary.")
    return fields


def _rows(input_data: Any, warnings: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of any shape, and the parameters that stand among them."""
    if isinstance(input_data, list):
        if not all(isinstance(row, dict) for row in input_data):
            raise _bad("a list must hold one object a row, each with a prompt")
        return input_data, {}
    if not isinstance(input_data, dict):
        raise _bad("must be an object or a list of objects")
    given: dict[str, Any] = {}
    if input_data.get("parameters") is not None:
        given = _parameters(input_data["parameters"], "input_data.parameters")
    columns = {name: value for name, value in input_data.items() if name != "parameters"}
    if not isinstance(columns.get("params", []), list):  # a list would be a column
        more = columns.pop("params")
        if more is not None:
            _add_parameters(given, _parameters(more, "input_data.params"), "input_data.params")
    if "data" in columns or "columns" in columns or "index" in columns:
        return _split_rows(columns, warnings), given
    return _column_rows(columns), given


def _split_rows(table: dict[str, Any], warnings: list[str]) -> list[dict[str, Any]]:
    """pandas' `split` orientation: columns, data, and an index that names nothing here."""
    columns, data, index = table.get("columns"), table.get("data"), table.get("index")
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise _bad("'columns' must be a list of names")
    if len(set(columns)) != len(columns):
        raise _bad("'columns' names a column twice")
    if not isinstance(data, list):
        raise _bad("'data' must be a list of rows")
    if index is not None and (not isinstance(index, list) or len(index) != len(data)):
        raise _bad(f"'index' must be a list of {len(data)} entries, one a row")
    warnings += unknown_fields(f"input_data.{name}" for name in table if name not in ("columns", "data", "index"))
    rows = []
    for row in data:
        if isinstance(row, dict):
            rows.append(row)  # as image-to-image samples have it: an object a row, under its columns' names
            continue
        cells = row if isinstance(row, list) else [row]
        if len(cells) != len(columns):
            raise _bad(f"a row of 'data' has {len(cells)} values for {len(columns)} columns")
        rows.append(dict(zip(columns, cells, strict=True)))
    if "prompt" not in columns:
        raise _bad("has no 'prompt' column")
    return rows


def _column_rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """A list a column: {"prompt": ["p", "q"]}."""
    if not isinstance(columns.get("prompt"), list):
        raise _bad("has no 'prompt' column" if "prompt" not in columns else "'prompt' must be a list")
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != len(columns["prompt"]):
            raise _bad(f"{name[:100]!r} must be a list as long as 'prompt'")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _parameters(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    return dict(given)


def _add_parameters(given: dict[str, Any], more: dict[str, Any], where: str) -> None:
    for name, value in more.items():
        if given.setdefault(name, value) != value:
            raise InvalidRequest(f"{where}: {name[:100]!r} is given twice and differs", param=where)


def _request_fields(given: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "generator" in given:
        warnings.append("generator has no effect: send seed")
    warnings += unknown_fields(name for name in given if name not in _PARAMETERS and name != "generator")
    for name, value in given.items():
        if name not in _PARAMETERS:
            continue
        if value is not None and fields.setdefault(_RENAMED.get(name, name), value) != value:
            raise InvalidRequest(f"{name}: contradicts {_RENAMED.get(name, 'num_images_per_prompt')}", param=name)
    return fields


def _row_fields(row: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    for name in ("mask_image", "image"):
        if name in row:
            raise _bad(f"rows with {name!r} are not served, text-to-image alone is")
    if row.get("prompt") is None:
        raise _bad("a row has no 'prompt'")
    fields = common | {"prompt": row["prompt"]}
    if "negative_prompt" in row:
        # That server reads a null as an empty text, which SDXL does not take for an absent one.
        own = row["negative_prompt"]
        fields["negative_prompt"] = common.get("negative_prompt", "") if own is None else own
    return fields


def _bad(reason: str) -> InvalidRequest:
    return InvalidRequest(f"input_data: {reason}", param="input_data")
