"""Rival (a): diffusers in one process, one request after another, behind a minimal HTTP server.

python -m comparison.rivals.sequential --port 8001 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
import time

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from comparison.rivals.contract import PATH, BadBody, answer, parse, refusal
from comparison.rivals.pipelines import Pipelines


def build_app(pipelines: Pipelines) -> Starlette:
    """One lock around the pipelines: first come, first served."""
    turn = asyncio.Lock()

    async def generations(request: Request) -> Response:
        arrived_at = time.time()
        try:
            asked = parse(await request.body())
        except BadBody as error:
            return refusal(error)
        async with turn:
            (drawn,) = await asyncio.to_thread(pipelines.draw, [asked])
        return answer(drawn.png, drawn.first_step_at - arrived_at)

    return Starlette(routes=[Route(PATH, generations, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    uvicorn.run(build_app(Pipelines(options.threads)), port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
