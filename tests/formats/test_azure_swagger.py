from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft4Validator

from serve_app.formats.azure_ml import swagger as azure_swagger
from serve_app.formats.azure_ml import wire as azure_ml
from serve_app.request.errors import InvalidRequest
from serve_app.request.schema import GeneratedImage, ImageRequest, ImageResult

DOCUMENTS = {"2": azure_swagger.swagger_2(), "3": azure_swagger.openapi_3()}
# What every operation and response must have, and may not have, in each of the two specifications.
OPERATION = {
    "2": {"operationId", "description", "parameters", "produces", "responses", "security"},
    "3": {"operationId", "description", "parameters", "requestBody", "responses", "security"},
}
RESPONSE = {"2": {"description", "schema"}, "3": {"description", "content"}}
TOP = {
    "2": {"swagger", "info", "schemes", "consumes", "produces", "securityDefinitions", "paths", "definitions"},
    "3": {"openapi", "info", "paths", "components"},
}
# Of JSON schema, what Swagger 2.0 and OpenAPI 3.0 share with draft 4.
KEYWORDS = {
    "type", "format", "description", "default", "enum", "required", "properties", "items", "minItems", "maxItems",
    "uniqueItems", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "maxLength", "example", "$ref",
}  # fmt: skip


def schemas_of(version: str) -> dict[str, Any]:
    document = DOCUMENTS[version]
    return document["definitions"] if version == "2" else document["components"]["schemas"]


def every_schema(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    for inner in (*schema.get("properties", {}).values(), *schema.get("oneOf", ()), schema.get("items")):
        if inner:
            yield from every_schema(inner)


def without_nulls(value: Any) -> Any:
    """The instance as draft 4 sees it, which does not know of `nullable`."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("version", DOCUMENTS)
def test_a_document_has_what_its_specification_knows(version: str) -> None:
    document = DOCUMENTS[version]
    assert set(document) == TOP[version]
    assert set(document["paths"]) == {"/", "/score"}
    for item in document["paths"].values():
        for operation in item.values():
            assert set(operation) <= OPERATION[version]
            for response in operation["responses"].values():
                assert set(response) <= RESPONSE[version] and response["description"]


@pytest.mark.parametrize("version", DOCUMENTS)
def test_every_schema_is_one_of_the_older_dialect(version: str) -> None:
    nullable = {"2": {"x-nullable"}, "3": {"nullable", "oneOf"}}[version]
    for schema in schemas_of(version).values():
        Draft4Validator.check_schema(schema)
        for inner in every_schema(schema):
            assert set(inner) <= KEYWORDS | nullable, inner


@pytest.mark.parametrize("version", DOCUMENTS)
def test_every_reference_leads_somewhere(version: str) -> None:
    text = json.dumps(DOCUMENTS[version])
    where = "#/definitions/" if version == "2" else "#/components/schemas/"
    for part in text.split('"$ref": "')[1:]:
        assert part.split('"')[0].removeprefix(where) in schemas_of(version)


@pytest.mark.parametrize("version", DOCUMENTS)
@pytest.mark.parametrize(
    ("body", "in_version_2"),
    [
        ({"input_data": {"columns": ["prompt"], "data": ["p"], "index": [0], "parameters": {"seed": 5}}}, True),
        ({"input_data": {"columns": ["prompt"], "data": [["p"]]}}, True),
        ({"input_data": {"columns": ["prompt", "negative_prompt"], "data": [["p", None]]}}, True),
        ({"input_data": [{"prompt": "p", "negative_prompt": "n"}]}, False),
        ({"input_data": {"prompt": ["p"]}, "params": {"original_size": [8, 8]}}, False),
    ],
)
def test_what_is_described_is_what_is_read(version: str, body: dict[str, Any], in_version_2: bool) -> None:
    assert azure_ml.decode(json.dumps(body).encode(), "application/json", 8).warnings == ()
    described = Draft4Validator(schemas_of(version)["ServiceInput"]).is_valid(without_nulls(body))
    assert described == (version == "3" or in_version_2)


@pytest.mark.parametrize("version", DOCUMENTS)
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_data": "p"},
        {"input_data": {"columns": ["prompt"], "data": ["p"], "parameters": {"seed": "5"}}},
        {"input_data": {"columns": ["prompt"], "data": ["p"], "parameters": {"high_noise_frac": 0}}},
        {"input_data": {"columns": ["prompt"], "data": ["p"], "parameters": {"original_size": [8]}}},
        {"input_data": {"columns": ["prompt"], "data": ["p"], "parameters": {"num_images_per_prompt": 11}}},
    ],
)
def test_what_is_refused_is_not_described(version: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        azure_ml.decode(json.dumps(body).encode(), "application/json", 8)
    assert not Draft4Validator(schemas_of(version)["ServiceInput"]).is_valid(body)


@pytest.mark.parametrize("version", DOCUMENTS)
def test_the_answer_is_described(version: str) -> None:
    result = ImageResult([GeneratedImage(b"one", 5, "png", 64, 64)])
    rows = azure_ml.encode([(ImageRequest(prompt="p"), result)])
    validator = Draft4Validator(schemas_of(version)["ServiceOutput"])
    # draft 4 does not know of `nullable`
    assert validator.is_valid([row | {"nsfw_content_detected": False} for row in rows])
    assert schemas_of(version)["ErrorResponse"]["required"] == list(azure_ml.encode_error(InvalidRequest("no")))


@pytest.mark.parametrize("version", DOCUMENTS)
def test_every_parameter_is_described(version: str) -> None:
    parameters = schemas_of(version)["ServiceInput"]["properties"]["parameters"]["properties"]
    assert set(parameters) == set(ImageRequest.model_fields) - {"prompt"} | {"num_images_per_prompt"}


def test_the_address_names_the_version() -> None:
    assert azure_swagger.swagger(None) == azure_swagger.swagger("2") == DOCUMENTS["2"]
    assert azure_swagger.swagger("3") == DOCUMENTS["3"]
    with pytest.raises(InvalidRequest) as caught:
        azure_swagger.swagger("4")
    assert caught.value.message == "version: '4' is not 2 or 3"


@pytest.mark.parametrize("version", DOCUMENTS)
def test_the_example_is_accepted(version: str) -> None:
    document = DOCUMENTS[version]
    if version == "2":
        example = document["definitions"]["ServiceInput"]["example"]
    else:
        example = document["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]["example"]
    assert azure_ml.decode(json.dumps(example).encode(), "application/json", 8).warnings == ()
