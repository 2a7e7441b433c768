"""The OpenAPI description against the service: whatever fits it is answered as it says, and nothing is a fault of ours.

Stages without models, so that hundreds of generated requests take seconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from serve_app.config.settings import HttpConfig
from serve_app.http.app import build_http_app
from tests.fakes import FakeStages, service

HTTP = HttpConfig(allowed_hosts=("testserver",))  # as Starlette's client calls it
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", build_http_app(service(FakeStages(), http=HTTP)))
# All of Schemathesis's checks for one request but positive_data_acceptance: a service has limits that no schema can say
# (pixels, what the checkpoint allows), and refuses what lies beyond them.
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
)


@SCHEMA.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_fits_the_description_is_answered_as_it_says(case: Case) -> None:
    case.call_and_validate(checks=CHECKS)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    app = build_http_app(service(FakeStages()))
    return app.openapi()


def test_every_answer_is_described(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            for status, answer in operation["responses"].items():
                assert answer["description"], f"{where} {status}"
                for media_type, content in answer.get("content", {}).items():
                    assert content.get("schema"), f"{where} {status} {media_type} has no schema"
            if method == "post" and "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                assert schema.get("example") or schema.get("examples"), f"{where} has no example"
                assert {"400", "413", "500", "503"} <= set(operation["responses"]), where
            assert {"400", "403", "408", "431", "500"} <= set(operation["responses"]), where
