"""The short form: several faults at once under traffic, on one service. `make chaos` has them one by one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.chaos.faulty import POISON_SEED
from tests.chaos.service import HANG_S, Service, Traffic, fault, pool_of, service
from tests.reference import Reference

CLIENTS = 6


@pytest.fixture(scope="module")
def up(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tiny, tmp_path_factory.mktemp("chaos")) as running:
        yield running


async def test_faults_under_traffic_lose_nobody_s_request(up: Service, reference: Reference) -> None:
    traffic = Traffic(up.url, pool_of(reference))

    def strike() -> None:
        up.order("block", "denoise")
        up.signal("decode", signal.SIGSTOP)
        up.signal("encode", signal.SIGKILL)
        up.signal("refine", signal.SIGKILL)

    async with traffic.flowing(CLIENTS):
        await fault("block, stop and kill", up, traffic, strike)
        assert up.was_done("block", "denoise")
        await fault("ingress killed", up, traffic, lambda: up.signal("ingress", signal.SIGKILL), cuts=True)


async def test_poison_is_contained(up: Service, reference: Reference) -> None:
    traffic = Traffic(up.url, pool_of(reference))
    before = up.processes("denoise")
    body = {"prompt": "poison", "seed": POISON_SEED, "num_inference_steps": 12}
    async with traffic.flowing(CLIENTS):
        await traffic.answered(CLIENTS)
        async with httpx.AsyncClient(base_url=up.url, timeout=HANG_S) as http:
            answer = await http.post("/v1/images/generations", json=body)
        assert answer.status_code == 500, answer.text
        assert answer.json()["error"]["code"] == "request_kills_replica"
        assert answer.headers["x-should-retry"] == "false"
        await asyncio.sleep(1)
        await up.until_whole()
        await traffic.answered(CLIENTS)
    assert all(outcome.status == 200 and not outcome.wrong for outcome in traffic.outcomes)
    assert len(before - up.processes("denoise")) <= 2, "it killed two replicas at most"
