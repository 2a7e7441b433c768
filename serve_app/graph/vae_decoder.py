"""The deployment of the decode stage."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray import serve

from serve_app.config.settings import AppConfig
from serve_app.graph.calls import Description
from serve_app.graph.metrics import StageMetrics
from serve_app.graph.replica import Call, End, end_when_hung, identity, prepare
from serve_app.models.check import check
from serve_app.models.checkpoint import locate
from serve_app.request.errors import PictureFailed
from serve_app.runtime.micro_batch import MicroBatcher
from serve_app.runtime.scheduling import Budget, scheduler_for
from serve_app.runtime.tasks import Alive, StepReport, Urgency
from serve_app.runtime.watch import Watch

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats


@serve.deployment
class VaeDecoder:
    """The VAE's decoder, micro-batched by picture size."""

    def __init__(self, config: AppConfig) -> None:
        from serve_app.models.decode import Decoder
        from serve_app.models.device import is_context_broken, is_out_of_memory

        source = locate(config.vae or config.base, ("vae",))
        check(source, ("vae",))
        self._decoder = Decoder(source, prepare(config, config.vae_decoder))
        self._decoder.dry_run()
        self._batcher: MicroBatcher[Floats, Bytes | PictureFailed] = MicroBatcher(
            self._decoder.decode,
            scheduler_for(
                config.vae_decoder, Budget(config.vae_decoder.max_batch_size, config.vae_decoder.max_batch_pixels)
            ),
            key=lambda latents: latents.shape,
            pixels=lambda latents: latents.shape[1] * latents.shape[2] * self._decoder.scale_factor**2,
            is_fatal=is_context_broken,
            is_out_of_memory=is_out_of_memory,
            watch=Watch(config.vae_decoder.first_pass_timeout_s),
            name="decode",
        )
        self._end = End()
        end_when_hung(self._end, self._batcher.overdue, self._batcher.abandon)
        self._checkpoints = config.checkpoints
        self._metrics = StageMetrics("decode")

    async def decode(
        self, latents: Floats, urgency: Urgency, deaths: int = 0
    ) -> AsyncIterator[Alive | StepReport | Bytes]:
        """Pixels (H, W, 3) uint8 of latents (4, H/8, W/8), after signs of life where it takes long.

        `deaths`: as of the tasks of the other stages.
        """
        call = Call(suspect=deaths > 0)
        async with aclosing(call.told(self._end, self._decode(latents, urgency, deaths, call))) as events:
            async for event in events:
                yield event

    async def _decode(self, latents: Floats, urgency: Urgency, deaths: int, call: Call) -> Bytes:
        pixels = await self._batcher.submit(latents, urgency, alone=deaths > 0, on_turn=call.turn)
        if isinstance(pixels, PictureFailed):
            raise pixels
        return pixels

    async def describe(self) -> Description:
        """What this replica has loaded."""
        return Description(self._checkpoints, self._decoder.facts)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica."""
        return identity() | self._batcher.stats() | {"float32_retries": self._decoder.float32_retries}

    async def check_health(self) -> None:
        self._metrics.tell(await self.stats())
        self._batcher.check_health()
