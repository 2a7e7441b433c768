"""Rival (b): one Ray Serve deployment around the two diffusers pipelines, as Ray's own example has it.

python -m comparison.rivals.one_deployment --port 8001 --replicas 2 --threads 1
"""

from __future__ import annotations

import argparse

from ray import serve

from comparison.rivals.contract import Asked
from comparison.rivals.pipelines import Drawn, Pipelines
from comparison.rivals.ray_serving import serve_until_ended


# A pipeline's scheduler is one object: a replica draws one picture at a time, and the next waits where
# any replica can take it.
@serve.deployment(max_ongoing_requests=1, ray_actor_options={"num_cpus": 0.2})
class StableDiffusionXL:
    def __init__(self, threads: int) -> None:
        self._pipelines = Pipelines(threads)

    def draw(self, asked: Asked) -> Drawn:
        (drawn,) = self._pipelines.draw([asked])
        return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model = StableDiffusionXL.options(num_replicas=options.replicas)  # type: ignore[attr-defined]
    serve_until_ended(model.bind(options.threads), options.port)


if __name__ == "__main__":
    main()
