"""What the ingress counts as under way, and what it makes of Serve's HTTP options. No Ray is started here."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from ray.serve.config import HTTPOptions

from serve_app.config.settings import AppConfig, HttpConfig
from serve_app.graph import ingress
from serve_app.http.exchanges import Exchanges
from serve_app.request.errors import Draining
from serve_app.request.schema import ImageRequest, ImageResult
from tests.fakes import FakeStages, service


def an_ingress(stages: FakeStages) -> Any:
    """The deployment's own class over stages that need no replicas."""
    kind: Any = ingress.Ingress.func_or_class.__mro__[1]  # without what Serve wraps it in
    one = kind.__new__(kind)
    one._service, one._exchanges = service(stages), Exchanges()
    return one


async def test_what_a_handle_has_not_read_is_under_way() -> None:
    one = an_ingress(FakeStages())
    reader = one.stream(ImageRequest(prompt="p"))
    await anext(reader)
    while one._service.admission.in_flight:  # it is drawn
        await asyncio.sleep(0.001)
    assert await one.drain() == 1
    with pytest.raises(Draining):
        await one.generate(ImageRequest(prompt="p"))
    with pytest.raises(Draining):
        await anext(one.stream(ImageRequest(prompt="p")))
    assert await one.drain() == 1
    *_, last = [event async for event in reader]
    assert isinstance(last, ImageResult)
    assert await one.drain() == 0


async def test_what_a_handle_waits_for_is_under_way() -> None:
    gate = asyncio.Event()
    stages = FakeStages(gate=gate)
    one = an_ingress(stages)
    drawing = asyncio.create_task(one.generate(ImageRequest(prompt="p")))
    await stages.entered.wait()
    assert await one.drain() == 1
    gate.set()
    assert len((await drawing).images) == 1
    assert await one.drain() == 0


@pytest.mark.parametrize(
    ("options", "configured", "loopback", "seconds", "warns"),
    [
        (HTTPOptions(host="127.0.0.1"), None, True, 600, False),
        (HTTPOptions(host="127.0.0.1", request_timeout_s=30), False, False, 30, False),
        (HTTPOptions(host="0.0.0.0", request_timeout_s=900), None, False, 600, False),
        (HTTPOptions(host="0.0.0.0"), True, False, 600, True),
        (None, True, False, 600, True),
    ],
)
async def test_serves_http_options_hold(
    options: HTTPOptions | None,
    configured: bool | None,
    loopback: bool,
    seconds: float,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def told() -> HTTPOptions | None:
        return options

    monkeypatch.setattr(ingress, "http_options", told)
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    behind = await ingress._behind_the_proxies(AppConfig(http=HttpConfig(loopback=configured)))
    assert (behind.http.loopback, behind.http.request_timeout_s) == (loopback, seconds)
    assert bool(caplog.records) is warns
