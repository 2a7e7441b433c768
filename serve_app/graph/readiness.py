"""Whether every stage has a replica that answers: what `/ready` of the ingress asks. Cheap, and never long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from ray.serve.handle import DeploymentHandle

_KEPT_S, _PATIENCE_S = 1.0, 2.0

Ask = Callable[[], Awaitable[object]]


def ask_replica(handle: DeploymentHandle) -> Ask:
    """Asks one replica of a deployment, whichever. Serve sends calls to those alone that are up, models and all."""

    async def ask() -> None:
        response = handle.describe.remote()
        try:
            await response
        except BaseException:
            response.cancel()  # it may still wait for a replica
            raise

    return ask


class Readiness:
    """The stages without an answer, by name. One round of questions serves all who ask within a second."""

    def __init__(self, stages: Mapping[str, Ask], kept_s: float = _KEPT_S, patience_s: float = _PATIENCE_S) -> None:
        self._stages = dict(stages)
        self._kept_s, self._patience_s = kept_s, patience_s
        self._round: asyncio.Task[Sequence[str]] | None = None
        self._until = 0.0  # on the monotonic clock; infinite while a round is under way

    async def missing(self) -> Sequence[str]:
        """The stages that did not answer in time, in their order; none where all are ready."""
        if self._round is None or time.monotonic() >= self._until:
            self._until = float("inf")
            self._round = asyncio.create_task(self._ask())
        return await asyncio.shield(self._round)

    async def _ask(self) -> Sequence[str]:
        try:
            answers = await asyncio.gather(*(self._answers(ask) for ask in self._stages.values()))
        finally:
            self._until = time.monotonic() + self._kept_s
        return [name for name, answered in zip(self._stages, answers, strict=True) if not answered]

    async def _answers(self, ask: Ask) -> bool:
        try:
            async with asyncio.timeout(self._patience_s):
                await ask()
        except Exception:
            return False
        return True
