"""The short form: several faults at once under traffic, on one service. `make chaos` has them one by one."""

from __future__ import annotations

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


@pytest.mark.ray
async def test_faults_under_traffic_lose_nobody_s_request(up: Service, reference: Reference) -> None:
    traffic = Traffic(up.url, pool_of(reference))

    async with traffic.flowing(CLIENTS):
        await fault(up, traffic, encode="SIGKILL", denoise="block", refine="SIGKILL", decode="SIGSTOP")
        await fault(up, traffic, ingress="SIGKILL")


@pytest.mark.ray
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
        await up.until_replaced({"denoise": before})
        await traffic.answered(CLIENTS)
    assert all(outcome.status == 200 and not outcome.wrong for outcome in traffic.outcomes)
    assert up.deaths("denoise") == 2, "the second one had it alone"
