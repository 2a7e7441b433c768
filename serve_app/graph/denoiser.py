"""The deployment of the denoise and refine stages: one class, bound twice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from ray import serve

from serve_app.config.settings import AppConfig
from serve_app.graph.calls import Description
from serve_app.graph.metrics import StageMetrics
from serve_app.graph.replica import Call, End, end_when_hung, identity, prepare
from serve_app.models.check import check
from serve_app.models.checkpoint import locate
from serve_app.runtime.engine import StepEngine
from serve_app.runtime.scheduling import Budget, scheduler_for
from serve_app.runtime.tasks import Alive, DenoiseTask, Latents, StepReport
from serve_app.runtime.watch import Watch

if TYPE_CHECKING:
    import torch

    from serve_app.models.denoise import Trajectory


@serve.deployment
class Denoiser:
    """A UNet behind the step engine."""

    def __init__(self, config: AppConfig, stage: Literal["denoise", "refine"]) -> None:
        from serve_app.models.denoise import UNetRunner

        source = config.base if stage == "denoise" else config.refiner
        settings = config.base_denoiser if stage == "denoise" else config.refiner_denoiser
        assert source is not None
        components = ("unet", "scheduler")
        folder = locate(source, components, configs=("text_encoder", "text_encoder_2"))
        check(folder, components, "base" if stage == "denoise" else "refiner")
        self._runner = UNetRunner(folder, prepare(config, settings), settings.trace)
        self._runner.dry_run()
        self._engine: StepEngine[DenoiseTask, Trajectory, torch.Tensor, Latents] = StepEngine(
            self._runner,
            scheduler_for(settings, Budget(settings.max_batch_rows, settings.max_batch_pixels)),
            name=stage,
            watch=Watch(settings.first_pass_timeout_s),
        )
        self._end = End()
        end_when_hung(self._end, self._engine.overdue, self._engine.abandon)
        self._checkpoints = config.checkpoints
        self._metrics = StageMetrics(stage)

    async def run(self, task: DenoiseTask, reporting: bool = False) -> AsyncIterator[Alive | StepReport | Latents]:
        """Takes one image through this stage's steps: signs of life on the way, the latents last.

        `reporting`: a report after each step, and of its place in the queue, too.
        """
        call = Call(suspect=task.deaths > 0)
        work = self._engine.run(task, call.report if reporting else None, call.turn)
        async with aclosing(call.told(self._end, work)) as events:
            async for event in events:
                yield event

    async def describe(self) -> Description:
        """What this replica has loaded."""
        return Description(self._checkpoints, self._runner.facts)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica; see `EngineStats`."""
        return identity() | self._engine.stats()

    async def check_health(self) -> None:
        self._metrics.tell(self._engine.stats())
        self._engine.check_health()

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.close()
