"""What `/ready` asks: cheap, bounded, the same for all who ask at once."""

from __future__ import annotations

import asyncio

from serve_app.graph.readiness import Readiness


class Stage:
    """`fault`: what asking it raises; a `gate` that is shut keeps its answers back."""

    def __init__(self, fault: Exception | None = None, shut: bool = False) -> None:
        self.fault = fault
        self.gate = asyncio.Event()
        self.asked = self.given_up = 0
        if not shut:
            self.gate.set()

    async def __call__(self) -> None:
        self.asked += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.fault is not None:
            raise self.fault


async def test_who_does_not_answer_is_named_in_order() -> None:
    stages = {"encode": Stage(), "denoise": Stage(RuntimeError("gone")), "refine": Stage(shut=True), "decode": Stage()}
    readiness = Readiness(stages, kept_s=0.0, patience_s=0.1)
    assert list(await readiness.missing()) == ["denoise", "refine"]
    assert stages["refine"].given_up == 1, "and nothing is left waiting"
    stages["denoise"].fault = None
    stages["refine"].gate.set()
    assert list(await readiness.missing()) == []


async def test_one_round_serves_all_who_ask_and_is_kept_for_a_while() -> None:
    stage = Stage(shut=True)
    readiness = Readiness({"encode": stage}, kept_s=3600.0, patience_s=60.0)
    many = [asyncio.create_task(readiness.missing()) for _ in range(50)]
    await asyncio.sleep(0.01)
    many[0].cancel()  # who asked first goes away: the others' round goes on
    await asyncio.sleep(0.01)
    stage.gate.set()
    async with asyncio.timeout(10):
        assert [list(await one) for one in many[1:]] == [[]] * 49
    assert (list(await readiness.missing()), stage.asked) == ([], 1)
