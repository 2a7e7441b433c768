"""Every fault in every stage, one by one, on one service: prints how long each took to get over. `make chaos`.

Of each fault: the answers given meanwhile, the connections that were cut, the longest that anybody waited after it, and
the time until there were two replicas again. A pass that blocks or freezes is one of those that come after the order.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import httpx

from serve_app.demo.tiny import make_tiny
from tests.chaos.faulty import POISON_SEED, POISON_WORD
from tests.chaos.service import HANG_S, Service, Traffic, fault, pool_of, service
from tests.reference import Reference

CLIENTS = 6
WITHIN_S = 45.0  # of the fault, on a quiet machine, everybody is answered
STAGES = ("encode", "denoise", "refine", "decode")


async def poison(up: Service, traffic: Traffic, body: dict[str, object]) -> float:
    """Sends a request that kills its replica and checks how it ends; the seconds that this takes."""
    await traffic.answered(CLIENTS)
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=up.url, timeout=HANG_S) as http:
        answer = await http.post("/v1/images/generations", json=body)
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "request_kills_replica", answer.text
    return time.monotonic() - began


async def run(up: Service, traffic: Traffic) -> list[str]:
    """All faults; what took longer than it may."""
    strikes = [(stage, strike) for stage in STAGES for strike in ("SIGKILL", "SIGSTOP", "block", "freeze")]
    late: list[str] = []
    print(f"{'fault':24} {'answers':>8} {'cut':>4} {'slowest s':>10} {'whole s':>8}")
    async with traffic.flowing(CLIENTS):
        for stage, strike in [*strikes, ("ingress", "SIGKILL")]:
            name, told = f"{strike} {stage}", await fault(up, traffic, **{stage: strike})
            print(f"{name:24} {told.answers:8} {told.cut:4} {told.slowest_s:10.1f} {told.whole_s:8.1f}", flush=True)
            if told.slowest_s > WITHIN_S:
                late.append(name)
        for stage, body in (
            ("denoise", {"prompt": "poison", "seed": POISON_SEED, "num_inference_steps": 12}),
            ("encode", {"prompt": POISON_WORD, "num_inference_steps": 12}),
        ):
            before, first = up.processes(stage), len(traffic.outcomes)
            took_s = await poison(up, traffic, body)
            await up.until_replaced({stage: before})
            await traffic.settled(time.monotonic())
            deaths = up.deaths(stage)
            assert deaths == 2, f"{deaths} replicas died"
            assert all(o.status == 200 and not o.wrong for o in traffic.outcomes[first:]), "others paid for the poison"
            print(f"{'poison ' + stage:24} ended after {took_s:.1f} s and {deaths} deaths", flush=True)
    return late


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sdxl-serve-chaos-") as name:
        folder = Path(name)
        make_tiny(folder / "tiny")
        pool = pool_of(Reference(folder / "tiny"))
        with service(folder / "tiny", folder / "service") as up:
            late = asyncio.run(run(up, Traffic(up.url, pool)))
    for name in late:
        print(f"later than {WITHIN_S:.0f} s: {name}")
    return bool(late)


if __name__ == "__main__":
    sys.exit(main())
