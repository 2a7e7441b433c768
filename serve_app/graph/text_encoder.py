"""The deployment of the encode stage."""

from __future__ import annotations

import asyncio
import functools
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
from serve_app.runtime.micro_batch import MicroBatcher, SharedCache
from serve_app.runtime.scheduling import Budget, scheduler_for
from serve_app.runtime.tasks import Alive, Conditioning, EncodeTask, OnTurn, StepReport
from serve_app.runtime.watch import Watch

if TYPE_CHECKING:
    from serve_app.models.encode import TextEmbedding, TextJob


@serve.deployment
class TextEncoder:
    """Both text encoders of the base, and the refiner's where its files differ."""

    def __init__(self, config: AppConfig) -> None:
        from serve_app.models.device import is_context_broken, is_out_of_memory
        from serve_app.models.encode import TextEncoders

        components: tuple[str, ...] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        base = locate(config.base, components)
        check(base, components)
        refiner = None
        if config.refiner is not None:
            components = ("text_encoder_2", "tokenizer_2")
            refiner = locate(config.refiner, components)
            check(refiner, components, "refiner")
        self._encoders = TextEncoders(base, refiner, prepare(config, config.text_encoder))
        self._encoders.dry_run()
        self._batcher: MicroBatcher[TextJob, TextEmbedding] = MicroBatcher(
            self._encoders.embed,
            scheduler_for(config.text_encoder, Budget(config.text_encoder.max_batch_size)),
            key=lambda job: job.encoder,
            is_fatal=is_context_broken,
            is_out_of_memory=is_out_of_memory,
            watch=Watch(config.text_encoder.first_pass_timeout_s),
            name="encode",
        )
        self._end = End()
        end_when_hung(self._end, self._batcher.overdue, self._batcher.abandon)
        self._cache: SharedCache[TextJob, TextEmbedding] = SharedCache(config.text_encoder.cache_entries)
        self._checkpoints = config.checkpoints
        self._metrics = StageMetrics("encode")

    async def encode(self, task: EncodeTask) -> AsyncIterator[Alive | StepReport | Conditioning]:
        """The conditioning of one request, after signs of life where it takes long."""
        call = Call(suspect=task.deaths > 0)
        async with aclosing(call.told(self._end, self._encode(task, call))) as events:
            async for event in events:
                yield event

    async def _encode(self, task: EncodeTask, call: Call) -> Conditioning:
        jobs = self._encoders.jobs(task)
        alone, priority = task.deaths > 0, task.urgency.priority
        undone = set(jobs.values())
        waiting = set(undone) if alone else set()

        def turn(job: TextJob, waits: bool) -> None:
            (waiting.add if waits else waiting.discard)(job)
            call.turn(bool(undone) and waiting >= undone)  # not while one of them may be in a pass

        async def embed(job: TextJob, on_turn: OnTurn) -> TextEmbedding:
            return await self._batcher.submit(job, task.urgency, alone=alone, on_turn=on_turn)

        async def embedded(job: TextJob) -> TextEmbedding:
            compute, own_turn = functools.partial(embed, job), functools.partial(turn, job)
            try:
                return await self._cache.get(job, compute, priority, alone=alone, on_turn=own_turn)
            finally:
                undone.discard(job)
                turn(job, False)

        embeddings = await asyncio.gather(*(embedded(job) for job in jobs.values()))
        return self._encoders.assemble(task, dict(zip(jobs, embeddings, strict=True)))

    async def describe(self) -> Description:
        """What this replica has loaded."""
        return Description(self._checkpoints, self._encoders.facts)

    async def stats(self) -> dict[str, Any]:
        """Counters of this replica."""
        return identity() | self._batcher.stats() | self._cache.stats()

    async def check_health(self) -> None:
        self._metrics.tell(await self.stats())
        self._batcher.check_health()
