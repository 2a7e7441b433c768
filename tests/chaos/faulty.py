"""The graph's deployments with faults in their passes: `python -m tests.chaos.start CONFIG PORT FOLDER` serves them.

A file in FOLDER orders one fault of one replica: `block-denoise` has one pass of a base replica never end,
`freeze-denoise` has it hold the interpreter's lock meanwhile, so that nothing else of its process runs either.
A picture of the seed POISON_SEED ends its replica after each pass that it is in, a prompt with POISON_WORD the encoder.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve_app.config.serve_file import check_serve_config
from serve_app.config.settings import AppConfig
from serve_app.graph import build
from serve_app.graph.denoiser import Denoiser
from serve_app.graph.local import running
from serve_app.graph.text_encoder import TextEncoder
from serve_app.graph.vae_decoder import VaeDecoder
from serve_app.runtime.tasks import Noise

FOLDER = "SDXL_SERVE_CHAOS_FOLDER"
POISON_SEED, POISON_WORD = 666, "strychnine"

Run = Callable[[Sequence[Any]], Any]


def with_faults(run: Run, stage: str, is_poison: Callable[[Any], bool] = lambda item: False) -> Run:
    """A pass that does what is ordered, and dies of poison."""
    folder = Path(os.environ[FOLDER])

    def ordered(fault: str) -> bool:
        order = folder / f"{fault}-{stage}"
        try:
            order.rename(folder / f"{order.name}.done")  # one replica gets it
        except FileNotFoundError:
            return False
        return True

    def faulty(items: Sequence[Any]) -> Any:
        if ordered("block"):
            time.sleep(3600)
        if ordered("freeze"):
            ctypes.PyDLL(None).sleep(3600)
        outputs = run(items)
        if any(is_poison(item) for item in items):
            (folder / f"death-{stage}-{os.getpid()}").touch()
            os._exit(13)
        return outputs

    return faulty


class FaultyTextEncoder(TextEncoder.func_or_class):  # type: ignore[misc, name-defined]
    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        self._batcher._run = with_faults(self._batcher._run, "encode", lambda job: POISON_WORD in job.text)


class FaultyDenoiser(Denoiser.func_or_class):  # type: ignore[misc, name-defined]
    def __init__(self, config: AppConfig, stage: Any) -> None:
        super().__init__(config, stage)
        forward = with_faults(self._runner.forward, stage, lambda state: state.task.start == Noise(POISON_SEED))
        self._runner.forward = forward


class FaultyVaeDecoder(VaeDecoder.func_or_class):  # type: ignore[misc, name-defined]
    def __init__(self, config: AppConfig) -> None:
        super().__init__(config)
        self._batcher._run = with_faults(self._batcher._run, "decode")


def main() -> None:
    config, port, folder = sys.argv[1:]
    os.environ[FOLDER] = folder
    from ray import serve

    build.TextEncoder = serve.deployment(FaultyTextEncoder)  # type: ignore[attr-defined]
    build.Denoiser = serve.deployment(FaultyDenoiser)  # type: ignore[attr-defined]
    build.VaeDecoder = serve.deployment(FaultyVaeDecoder)  # type: ignore[attr-defined]
    with running(check_serve_config(yaml.safe_load(Path(config).read_text())), port=int(port)):
        print("ready", flush=True)
        sys.stdin.read()  # until whoever started it closes it
