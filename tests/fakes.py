"""The four stages without models: what the layers above them are tested on."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from serve_app.config.settings import AppConfig, HttpConfig
from serve_app.request.facts import DecoderFacts, DenoiserFacts, ModelFacts, TextFacts
from serve_app.request.limits import Limits
from serve_app.runtime.pipeline import Stages
from serve_app.runtime.service import ImageService
from serve_app.runtime.tasks import (
    Conditioning,
    DenoiseTask,
    EncodeTask,
    Latents,
    Noise,
    OnStep,
    Resumed,
    StageConditioning,
    StepReport,
    Urgency,
)

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats

FACTS = ModelFacts(
    TextFacts(clip_skip_max=3, base_zeroes_missing_negative=True, refiner_clip_skip_max=2),
    DenoiserFacts(native_size_px=64, native_scheduler="EulerDiscreteScheduler"),
    DenoiserFacts(native_size_px=64, native_scheduler="EulerDiscreteScheduler", takes_aesthetic_score=True),
    # Red is the first channel.
    DecoderFacts(((1.0, 0.0, 0.0),) + ((0.0, 0.0, 0.0),) * 3 + ((0.0, 0.0, 128.0),)),
)
BASE_ALONE = ModelFacts(TextFacts(clip_skip_max=3, base_zeroes_missing_negative=True), FACTS.base)
LIMITS = Limits()


def conditioning() -> StageConditioning:
    return StageConditioning(np.zeros((77, 8), np.float32), np.zeros(4, np.float32))


@dataclass
class FakeStages:
    """Counts every call. A picture is one flat colour: its seed's.

    `fail`: what a stage raises, by its name or by name and seed. `gate`: where given, every denoise
    waits for it, or that of `held_seed` alone. `entered` is set once a denoise has begun.
    """

    fail: dict[str, Exception] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    held_seed: int | None = None
    warnings: tuple[str, ...] = ()
    calls: list[str] = field(default_factory=list)
    tasks: list[DenoiseTask] = field(default_factory=list)
    asked: list[tuple[str, Urgency]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    listened: int = 0  # denoiser calls that somebody listened to

    def stages(self) -> Stages:
        return Stages(self._encode, self._denoise, self._refine, self._decode)

    def urgencies(self, stage: str) -> list[Urgency]:
        return [urgency for name, urgency in self.asked if name == stage]

    async def _encode(self, task: EncodeTask) -> Conditioning:
        self.asked.append(("encode", task.urgency))
        await self._begin("encode", None)
        return Conditioning(conditioning(), conditioning() if task.refined else None, self.warnings)

    async def _denoise(self, task: DenoiseTask, on_step: OnStep | None) -> Latents:
        assert isinstance(task.start, Noise)
        seed = task.start.seed
        self.entered.set()
        self.tasks.append(task)
        self.listened += on_step is not None
        try:
            await self._begin("denoise", seed)
            if self.gate is not None and self.held_seed in (None, seed):
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(f"denoise {seed}")
            raise
        return self._steps(task, seed, 2, on_step)

    async def _refine(self, task: DenoiseTask, on_step: OnStep | None) -> Latents:
        self.tasks.append(task)
        assert isinstance(task.start, Resumed)
        seed = int(task.start.latents.samples[0, 0, 0])
        await self._begin("refine", seed)
        return self._steps(task, seed, 1, on_step)

    async def _decode(self, latents: Floats, urgency: Urgency) -> Bytes:
        self.asked.append(("decode", urgency))
        seed = int(latents[0, 0, 0])
        await self._begin("decode", seed)
        _, height, width = latents.shape
        return np.full((height * 8, width * 8, 3), seed % 256, np.uint8)

    async def _begin(self, stage: str, seed: int | None) -> None:
        self.calls.append(stage if seed is None else f"{stage} {seed}")
        await asyncio.sleep(0)
        for name in (stage, f"{stage} {seed}"):
            if name in self.fail:
                raise self.fail[name]

    @staticmethod
    def _steps(task: DenoiseTask, seed: int, steps: int, on_step: OnStep | None) -> Latents:
        samples = np.full((4, task.height // 8, task.width // 8), seed, np.float32)
        wanted = {max(math.ceil(fraction * steps), 1) for fraction in task.preview_at}
        for step in range(1, steps + 1):
            if on_step is not None:
                on_step(StepReport(step, steps, preview=samples if step in wanted else None))
        return Latents(samples, np.zeros(1, np.uint8), steps)


def service(
    stages: FakeStages,
    facts: ModelFacts = FACTS,
    http: HttpConfig | None = None,
    *,
    loopback: bool = False,
    **limits: int,
) -> ImageService:
    config = AppConfig(limits=Limits(**limits), http=http or HttpConfig(loopback=loopback))
    return ImageService(config, facts, stages.stages())
