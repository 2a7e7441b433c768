"""What a denoising step costs outside the UNet: `python -m comparison.step_overhead`.

The step engine runs over the embedded base on this thread count, with 1, 2, 4 and 8 guided images at once; the UNet's
own forward pass is timed by itself. Everything else of a step (gathering rows, guidance, the images' schedulers,
choosing, reporting) is the rest. Prints a line for each, as medians of the passes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator

import torch

from serve_app.config.settings import DEMO_FOLDER
from serve_app.models.backends.rows import Rows
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.denoise import UNetRunner
from serve_app.models.device import Compute
from serve_app.models.encode import TextEncoders
from serve_app.request.facts import DenoiserFacts, ModelFacts
from serve_app.request.limits import Limits
from serve_app.request.resolve import resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.engine import StepEngine
from serve_app.runtime.scheduling import Budget, StepScheduler
from serve_app.runtime.tasks import Conditioning, DenoiseTask, Urgency, base_task, encode_task

SCHEDULERS = ("euler", "euler_ancestral", "dpmpp_2m", "ddim", "unipc", "dpmpp_2m_sde", "heun", "dpmpp_2m_karras")


class TimedRunner(UNetRunner):
    """Notes how long each pass and, within it, the UNet took."""

    def __init__(self, source: Checkpoint, compute: Compute) -> None:
        super().__init__(source, compute)
        self.unet_s: list[float] = []
        self._untimed, self._backend = self._backend, self._timed

    def _timed(self, rows: Rows) -> torch.Tensor:
        began = time.perf_counter()
        prediction = self._untimed(rows)
        self.unet_s.append(time.perf_counter() - began)
        return prediction


def tasks(encoders: TextEncoders, count: int, steps: int, schedulers: tuple[str, ...]) -> Iterator[DenoiseTask]:
    facts = ModelFacts(encoders.facts, DenoiserFacts(128, "EulerDiscreteScheduler"))
    for number in range(count):
        request = resolve(
            ImageRequest(
                prompt="a red circle above a blue square on a white background",
                num_inference_steps=steps,
                seed=number,
                scheduler=schedulers[number % len(schedulers)],  # type: ignore[arg-type]
            ),
            facts,
            Limits(),
        )
        jobs = encoders.jobs(encode_task(request, Urgency()))
        done = {role: encoders.embed([job])[0] for role, job in jobs.items()}
        conditioning: Conditioning = encoders.assemble(encode_task(request, Urgency()), done)
        yield base_task(request, 0, conditioning, Urgency())


async def measure(denoiser: TimedRunner, work: list[DenoiseTask], listen: bool) -> tuple[float, float, float]:
    """Median seconds of a step, of its UNet pass, and the mean seconds of everything outside, a step."""
    engine = StepEngine(denoiser, StepScheduler(Budget(2 * len(work))), "bench")
    denoiser.unet_s.clear()
    on_step = (lambda report: None) if listen else None
    await asyncio.gather(*(engine.run(task, on_step) for task in work))
    engine.close()
    engine.join()
    stats = engine.stats()
    unet = statistics.median(denoiser.unet_s)
    outside = (stats["busy_s"] - sum(denoiser.unet_s)) / stats["passes"]
    return unet + outside, unet, outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compute = Compute(torch.device("cpu"), torch.float32)
    source = Checkpoint(DEMO_FOLDER / "base", None)
    denoiser, encoders = TimedRunner(source, compute), TextEncoders(source, None, compute)
    print("images  schedulers  listened   step ms   UNet ms   outside ms   share")
    for schedulers in (("euler",), SCHEDULERS):
        for count in (1, 2, 4, 8):
            for listen in (False, True):
                work = list(tasks(encoders, count, options.steps, schedulers))
                asyncio.run(measure(denoiser, work[:1], False))  # warm
                step, unet, outside = asyncio.run(measure(denoiser, work, listen))
                name = "euler" if len(schedulers) == 1 else "mixed"
                print(
                    f"{count:6}  {name:10}  {'yes' if listen else 'no':8}  {step * 1e3:8.2f}  {unet * 1e3:8.2f}  "
                    f"{outside * 1e3:11.2f}  {outside / step:6.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
