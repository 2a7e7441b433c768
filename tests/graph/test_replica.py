"""The end of a replica that can't work any more: answers first, then the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HANGS = """
import asyncio
from serve_app.graph.replica import End, end_when_hung

async def main():
    end_when_hung(End(), lambda: "a pass hangs", lambda reason: print("abandoned:", reason, flush=True))
    {meanwhile}

asyncio.run(main())
"""
LOST = """
import asyncio
from serve_app.graph.replica import End, working
from serve_app.request.errors import StageUnavailable

async def main():
    end = End()
    try:
        with working(end):
            raise StageUnavailable("the device is lost")
    except StageUnavailable as error:
        print("answered:", error, flush=True)
    assert end.is_near
    {meanwhile}

asyncio.run(main())
"""


@pytest.mark.parametrize("meanwhile", ["await asyncio.sleep(600)", "import time; time.sleep(600)"])
@pytest.mark.parametrize(
    ("script", "said"), [(HANGS, "abandoned: a pass hangs"), (LOST, "answered: the device is lost")]
)
def test_it_ends_whatever_its_event_loop_does(script: str, said: str, meanwhile: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", script.format(meanwhile=meanwhile)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    if "asyncio" in meanwhile or script is LOST:
        assert run.stdout.strip() == said
