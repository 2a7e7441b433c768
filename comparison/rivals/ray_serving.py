"""A Ray of its own with one rival application on it, until SIGTERM or Ctrl-C; and the rivals' HTTP ingress."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from comparison.rivals.contract import BadBody, answer, parse, refusal
from serve_app.graph.environment import set_for_own_ray

set_for_own_ray()  # loopback and a token, as ours has them; before the first `import ray`

import ray  # noqa: E402
from ray import serve  # noqa: E402


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.1})
class Ingress:
    """Bodies in, pictures out, over one handle to the model deployment, as in Ray's own example; whatever the path.

    Ray's example has FastAPI here. It would only cost time.
    """

    def __init__(self, drawer: Any) -> None:
        self._drawer = drawer

    async def __call__(self, request: Request) -> Response:
        arrived_at = time.time()
        try:
            asked = parse(await request.body())
        except BadBody as error:
            return refusal(error)
        drawn = await self._drawer.draw.remote(asked)
        return answer(drawn.png, drawn.first_step_at - arrived_at)


def serve_until_ended(drawer: Any, port: int) -> None:
    """Serves a bound model deployment on a port of this machine."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="serve")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 600})
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.run(Ingress.bind(drawer), name="rival", route_prefix="/", logging_config=quiet)
        ended.wait()
    finally:
        ray.shutdown()
