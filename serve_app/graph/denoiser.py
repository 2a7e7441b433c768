"""The deployment of the denoise and refine stages: one class, bound twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Literal

from ray import serve

from serve_app.config.settings import AppConfig
from serve_app.graph.calls import Description
from serve_app.graph.metrics import StageMetrics
from serve_app.graph.replica import identity, prepare, working
from serve_app.models.check import check
from serve_app.models.checkpoint import locate
from serve_app.runtime.engine import StepEngine
from serve_app.runtime.scheduling import Budget, scheduler_for
from serve_app.runtime.tasks import DenoiseTask, Latents, StepReport

if TYPE_CHECKING:
    import torch

    from serve_app.models.denoise import Trajectory


@serve.deployment
class Denoiser:
    """A UNet behind the step engine."""

    def __init__(self, config: AppConfig, stage: Literal["denoise", "refine"]) -> None:
        from serve_app.models.denoise import Denoiser as UNetDenoiser

        source = config.base if stage == "denoise" else config.refiner
        settings = config.base_denoiser if stage == "denoise" else config.refiner_denoiser
        assert source is not None
        components = ("unet", "scheduler")
        folder = locate(source, components, configs=("text_encoder", "text_encoder_2"))
        check(folder, components, "base" if stage == "denoise" else "refiner")
        self._denoiser = UNetDenoiser(folder, prepare(config, settings), settings.trace)
        self._denoiser.dry_run()
        self._engine: StepEngine[DenoiseTask, Trajectory, torch.Tensor, Latents] = StepEngine(
            self._denoiser,
            scheduler_for(settings, Budget(settings.max_batch_rows, settings.max_batch_pixels)),
            name=stage,
        )
        self._checkpoints = config.checkpoints
        self._metrics = StageMetrics(stage)

    async def run(self, task: DenoiseTask) -> Latents:
        """Takes one image through this stage's steps."""
        with working():
            return await self._engine.run(task)

    async def run_reporting(self, task: DenoiseTask) -> AsyncIterator[StepReport | Latents]:
        """The same, with a report after each step and of its place in the queue; the latents come last."""
        events: asyncio.Queue[StepReport | None] = asyncio.Queue()
        work = asyncio.create_task(self._engine.run(task, events.put_nowait))
        work.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            with working():
                latents = await work
            yield latents
        finally:
            work.cancel()

    async def describe(self) -> Description:
        """What this replica has loaded."""
        return Description(self._checkpoints, self._denoiser.facts)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica; see `EngineStats`."""
        return identity() | self._engine.stats()

    async def check_health(self) -> None:
        self._metrics.tell(self._engine.stats())
        self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
