"""Rival (c): rival (b) with `@serve.batch`; of a batch, requests of equal parameters share one pipeline call.

    python -m comparison.rivals.serve_batch --port 8001 --replicas 1 --threads 1 --batch 8 --wait-s 0.1

What `@serve.batch` brings with it, and what is done about it here:

- It seals a batch once `wait_s` has passed, while the replica may still be busy with the one before. Under a closed
  loop whole batches come back at once and ask again at once, so a short wait fills the next one; batch
  size and wait are tried in several combinations and the best is compared.
- It takes requests as they come, whatever their parameters: the groups of a batch run one after another, and
  answers of all groups leave together when the last has been drawn.
- One that raises fails its whole batch. Bodies are checked in the ingress, before the batch.
"""

from __future__ import annotations

import argparse
import asyncio

from ray import serve

from comparison.rivals.contract import Asked
from comparison.rivals.pipelines import Drawn, Pipelines
from comparison.rivals.ray_serving import serve_until_ended


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.2})
class BatchedStableDiffusionXL:
    def __init__(self, threads: int, batch: int, wait_s: float) -> None:
        self._pipelines = Pipelines(threads)
        self.draw.set_max_batch_size(batch)  # type: ignore[attr-defined]
        self.draw.set_batch_wait_timeout_s(wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def draw(self, batch: list[Asked]) -> list[Drawn]:
        # Off the event loop, so that the next batch can gather and health checks answer.
        return await asyncio.to_thread(self._draw, batch)

    def _draw(self, batch: list[Asked]) -> list[Drawn]:
        drawn: dict[int, Drawn] = {}
        for places in groups(batch):
            drawn |= zip(places, self._pipelines.draw([batch[place] for place in places]), strict=True)
        return [drawn[place] for place in range(len(batch))]


def groups(batch: list[Asked]) -> list[list[int]]:
    """The places of a batch by equal parameters, in the order of the first of each."""
    by_key: dict[tuple[object, ...], list[int]] = {}
    for place, asked in enumerate(batch):
        by_key.setdefault(asked.key, []).append(place)
    return list(by_key.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="rival (c)")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--wait-s", type=float, default=0.1)
    options = parser.parse_args()
    model = BatchedStableDiffusionXL.options(num_replicas=options.replicas)  # type: ignore[attr-defined]
    serve_until_ended(model.bind(options.threads, options.batch, options.wait_s), options.port)


if __name__ == "__main__":
    main()
