"""A service of its own with two replicas of each deployment, traffic whose every picture is checked, and faults."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from PIL import Image

from serve_app.request.schema import ImageRequest, parse_request
from tests.graph.test_parity import far_apart
from tests.reference import Reference

ROOT = Path(__file__).parent.parent.parent
DEPLOYMENTS = {
    "encode": "TextEncoder",
    "denoise": "BaseDenoiser",
    "refine": "Refiner",
    "decode": "VaeDecoder",
    "ingress": "Ingress",
}
START_S, HANG_S = 240, 180  # bounds on a hang, no claims
POOL = [
    {"prompt": f"chaos {number}", "seed": number, "num_inference_steps": 12 + 4 * (number % 4), "high_noise_frac": 0.6}
    for number in range(12)
]


class Service:
    """A running one, with handles on its processes."""

    def __init__(self, url: str, process: psutil.Process, folder: Path) -> None:
        self.url = url
        self._process = process
        self._folder = folder

    def replicas(self, stage: str) -> list[psutil.Process]:
        """The processes of a stage's replicas that live and are not stopped."""
        title = f"ray::ServeReplica:sdxl:{DEPLOYMENTS[stage]}"
        found = []
        for process in self._process.children(recursive=True):
            try:
                is_one = "".join(process.cmdline()[:1]).startswith(title)
                if is_one and process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    found.append(process)
            except psutil.Error:
                pass  # it has just ended
        return found

    def signal(self, stage: str, number: signal.Signals) -> None:
        """Sends one replica of a stage a signal."""
        os.kill(self.replicas(stage)[0].pid, number)

    def order(self, fault: str, stage: str) -> None:
        """Has the next pass of a stage go wrong: `block` or `freeze`."""
        (self._folder / f"{fault}-{stage}").touch()

    def deaths(self, stage: str) -> int:
        """How many replicas of a stage have died of poison so far."""
        return len(list(self._folder.glob(f"death-{stage}-*")))

    async def until_done(self, fault: str, stage: str) -> None:
        """Waits until an order was carried out, and takes it back."""
        done, began = self._folder / f"{fault}-{stage}.done", time.monotonic()
        while not done.exists():
            assert time.monotonic() - began < HANG_S, f"no pass of {stage} went wrong"
            await asyncio.sleep(0.05)
        done.unlink()

    async def until_replaced(self, before: dict[str, set[int]]) -> None:
        """Waits until each of these stages has two replicas, and not both those of `before`."""
        began = time.monotonic()
        while missing := {s for s in before if len(now := self.processes(s)) != 2 or now == before[s]}:
            assert time.monotonic() - began < HANG_S, f"not replaced: {missing}"
            await asyncio.sleep(0.5)

    def processes(self, stage: str) -> set[int]:
        return {process.pid for process in self.replicas(stage)}


@contextmanager
def service(tiny: Path, folder: Path) -> Iterator[Service]:
    """Serves the random-weight checkpoint on a Ray of its own until the block ends."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    application = content["applications"][0]
    args = application["args"]
    args["base"], args["refiner"] = {"path": str(tiny / "base")}, {"path": str(tiny / "refiner")}
    for part in ("text_encoder", "base_denoiser", "refiner_denoiser", "vae_decoder"):
        args[part]["first_pass_timeout_s"] = 20
    args["text_encoder"]["cache_entries"] = 0  # the texts are few, and each is to take a pass
    for options in application["deployments"]:
        options |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "chaos.yaml"
    config.write_text(yaml.safe_dump(content))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.start", str(config), str(port), str(folder)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        family = psutil.Process(process.pid)
        try:
            assert process.stdout is not None and process.stdin is not None
            said = select.select([process.stdout], [], [], START_S)[0]
            assert said and process.stdout.readline().strip() == "ready", (folder / "log").read_text()
            yield Service(f"http://127.0.0.1:{port}", family, folder)
        finally:
            everybody = family.children(recursive=True)
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
            for left in everybody:  # a stopped process does not end by itself
                try:
                    left.kill()
                except psutil.Error:
                    pass


@dataclass(frozen=True)
class Outcome:
    """What became of one request. `status` is None where the connection was cut."""

    began: float
    ended: float
    status: int | None
    wrong: bool = False
    said: str = ""


@dataclass
class Traffic:
    """Clients that ask one picture after the other, of a pool of requests whose pictures are known."""

    url: str
    pool: list[tuple[ImageRequest, np.ndarray]]
    outcomes: list[Outcome] = field(default_factory=list)
    under_way: set[float] = field(default_factory=set)
    _stopping: bool = False

    @asynccontextmanager
    async def flowing(self, clients: int) -> AsyncIterator[None]:
        self._stopping = False
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(number))
            try:
                yield
            finally:
                self._stopping = True

    async def settled(self, since: float) -> None:
        """Waits until all requests that were under way at that time have ended."""
        while any(began <= since for began in self.under_way):
            assert time.monotonic() - since < HANG_S, "a request hangs"
            await asyncio.sleep(0.1)

    async def answered(self, count: int) -> None:
        """Waits for so many more answers."""
        wanted, began = len(self.outcomes) + count, time.monotonic()
        while len(self.outcomes) < wanted:
            assert time.monotonic() - began < HANG_S, "no more answers"
            await asyncio.sleep(0.05)

    async def _client(self, number: int) -> None:
        while not self._stopping:
            request, picture = self.pool[number % len(self.pool)]
            number += 5
            began = time.monotonic()
            self.under_way.add(began)
            # A connection each, so that a proxy's or an ingress's death cuts only what it had.
            async with httpx.AsyncClient(base_url=self.url, timeout=HANG_S) as http:
                self.outcomes.append(await self._ask(http, request, picture, began))
            self.under_way.discard(began)

    async def _ask(self, http: httpx.AsyncClient, request: ImageRequest, picture: np.ndarray, began: float) -> Outcome:
        try:
            body = request.model_dump(mode="json", exclude_unset=True) | {"response_format": "b64_json"}
            answer = await http.post("/v1/images/generations", json=body)
        except httpx.TransportError as error:
            return Outcome(began, time.monotonic(), None, said=repr(error))
        ended = time.monotonic()
        if answer.status_code != 200:
            plain = answer.headers.get("content-type", "").startswith("text/plain")
            status = None if answer.status_code == 500 and plain else answer.status_code
            return Outcome(began, ended, status, said=answer.text)
        wrong = await asyncio.to_thread(_differs, answer.json()["data"][0]["b64_json"], picture)
        return Outcome(began, ended, 200, wrong)


def _differs(data: str, picture: np.ndarray) -> bool:
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return bool(far_apart(drawn, picture) > 1)


def pool_of(reference: Reference) -> list[tuple[ImageRequest, np.ndarray]]:
    requests = [parse_request(dict(fields)) for fields in POOL]
    return [(request, reference.draw(request).pixels) for request in requests]


@dataclass(frozen=True)
class Recovery:
    """How a fault went: the longest that anybody waited after it, and until there were two of each again."""

    answers: int
    cut: int
    slowest_s: float
    whole_s: float


async def fault(up: Service, traffic: Traffic, **strikes: str) -> Recovery:
    """Strikes stages under traffic and checks what becomes of everybody: no wrong picture, nothing lost.

    `strikes`: what happens to one replica of each: SIGKILL, SIGSTOP, block or freeze. Connections may be cut only where
    it is the ingress.
    """
    await traffic.answered(8)
    before = {stage: up.processes(stage) for stage in strikes}
    first = len(traffic.outcomes)
    began = time.monotonic()
    for stage, strike in strikes.items():
        if strike in ("block", "freeze"):
            up.order(strike, stage)
        else:
            up.signal(stage, signal.Signals[strike])
    for stage, strike in strikes.items():
        if strike in ("block", "freeze"):
            await up.until_done(strike, stage)
    await up.until_replaced(before)
    whole_s = time.monotonic() - began
    await traffic.settled(time.monotonic())
    outcomes = traffic.outcomes[first:]
    lost = [one for one in outcomes if one.status != 200 and not ("ingress" in strikes and one.status is None)]
    assert not lost, (strikes, lost[:3])
    assert not any(one.wrong for one in outcomes), f"{strikes}: a wrong picture"
    slowest_s = max(one.ended - max(one.began, began) for one in outcomes)
    return Recovery(len(outcomes), sum(one.status is None for one in outcomes), slowest_s, whole_s)
