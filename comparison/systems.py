"""What is compared, with the settings each is tried in; starting one in a process of its own, and ending it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parent.parent
GRAPH = ROOT / "comparison" / "graph.yaml"
READY_TIMEOUT_S, END_TIMEOUT_S = 240.0, 60.0

OURS = "ours"
UNTRACED = "untraced"  # ours, its UNets run as diffusers' Python runs them, as the rivals' are: what the trace gives
NAMES = {
    OURS: "sdxl-serve",
    "sequential": "(a) diffusers, one after another",
    "one_deployment": "(b) one Ray Serve deployment",
    "serve_batch": "(c) the same with @serve.batch",
}


class SystemFailed(Exception):
    """A system that did not start, or draws something else; one line."""


@dataclass(frozen=True)
class Setting:
    """A system with its numbers of processes and threads."""

    system: str
    options: tuple[tuple[str, float], ...]  # flags of the rival's module; of ours: replicas of the base

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in self.options)

    @property
    def plain(self) -> dict[str, float]:
        return dict(self.options)

    def command(self, port: int, folder: Path) -> list[str]:
        if self.system == OURS:
            config = _graph(self.plain, folder)
            return [sys.executable, "-m", "serve_app.cli", "serve", str(config), "--port", str(port)]
        flags = [text for name, value in self.options for text in (f"--{name.replace('_', '-')}", f"{value:g}")]
        return [sys.executable, "-m", f"comparison.rivals.{self.system}", "--port", str(port), *flags]


def _graph(options: dict[str, float], folder: Path) -> Path:
    """comparison/graph.yaml with other numbers of base replicas and threads, and without traces where `trace` is 0."""
    content: dict[str, Any] = yaml.safe_load(GRAPH.read_text(encoding="utf-8"))
    (application,) = content["applications"]
    for deployment in application["deployments"]:
        if deployment["name"] == "BaseDenoiser":
            deployment["num_replicas"] = int(options["base_replicas"])
    for stage in ("text_encoder", "base_denoiser", "refiner_denoiser", "vae_decoder"):
        application["args"][stage]["torch_threads"] = int(options["threads"])
    if not options.get("trace", 1):
        for stage in ("base_denoiser", "refiner_denoiser"):
            application["args"][stage]["trace"] = False
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def setting(system: str, **options: float) -> Setting:
    return Setting(system, tuple(options.items()))


def untraced(ours: Setting) -> Setting:
    return Setting(OURS, (*ours.options, ("trace", 0)))


# What each is tried in. Two processes of two threads on two cores lose to both of their halves, so that is left out
# where batch sizes multiply the choices.
SETTINGS: dict[str, list[Setting]] = {
    OURS: [setting(OURS, base_replicas=replicas, threads=1) for replicas in (2, 1)],
    "sequential": [setting("sequential", threads=threads) for threads in (1, 2)],
    "one_deployment": [
        setting("one_deployment", replicas=replicas, threads=threads) for replicas, threads in ((2, 1), (1, 2), (2, 2))
    ],
    "serve_batch": [
        setting("serve_batch", replicas=replicas, threads=threads, batch=batch, wait_s=wait_s)
        for replicas, threads, batch, wait_s in (
            (2, 1, 4, 0.05), (2, 1, 8, 0.05), (2, 1, 8, 0.5), (1, 2, 8, 0.05), (1, 2, 16, 0.1),
        )
    ],
}  # fmt: skip
ONE_THREAD = setting("sequential", threads=1)


@contextmanager
def running(which: Setting) -> Iterator[str]:
    """Starts a system, waits until it draws, gives its address; ends it by its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",  # of what torch itself does not set
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with tempfile.TemporaryDirectory(prefix="sdxl-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                which.command(port, Path(folder)), cwd=ROOT, env=environment, stdout=output, stderr=output
            )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_it_draws(process, url, which, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_it_draws(process: subprocess.Popen[bytes], url: str, which: Setting, log: Path) -> None:
    body = {"prompt": "a red circle on a white background", "seed": 0, "num_inference_steps": 2, "guidance_scale": 7.5}
    deadline = time.monotonic() + READY_TIMEOUT_S
    said = "no answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise SystemFailed(f"{which.system} ({which}) ended before it was ready: {lines[-1]}")
        try:
            answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False)
            if answer.status_code == 200:
                return
            said = f"HTTP {answer.status_code}: {answer.text[:200]}"
            if answer.status_code in (400, 422):
                raise SystemFailed(f"{which.system} does not speak the rivals' HTTP: {said}")
        except httpx.TransportError as error:
            said = type(error).__name__
        time.sleep(0.25)
    raise SystemFailed(f"{which.system} ({which}) was not ready within {READY_TIMEOUT_S:g} s: {said}")
