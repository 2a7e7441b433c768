"""A denoiser's passes, run and timed one by one as the engine runs them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from serve_app.config.settings import AppConfig
from serve_app.models import checkpoint
from serve_app.runtime.scheduling import Budget, StepScheduler
from serve_app.runtime.tasks import DenoiseTask, TimeInStage

if TYPE_CHECKING:
    from serve_app.models.denoise import UNetRunner

WARM_UP = 2  # passes that don't count


def load_denoiser(config: AppConfig, stage: Literal["denoise", "refine"]) -> UNetRunner:
    """A stage's UNet as its replica loads it, threads included."""
    from serve_app.models.denoise import UNetRunner
    from serve_app.models.device import set_up

    source, settings = config.base, config.base_denoiser
    if stage == "refine":
        assert config.refiner is not None
        source, settings = config.refiner, config.refiner_denoiser
    folder = checkpoint.locate(source, ("unet", "scheduler"))
    return UNetRunner(folder, set_up(settings, gpu_fraction=1.0), settings.trace)


def walk(denoiser: UNetRunner, task: DenoiseTask) -> Any:
    """A task's latents after all its steps, alone."""
    state = denoiser.begin(task)
    for _ in range(len(state.timesteps)):
        (output,) = denoiser.forward([state])
        denoiser.advance(state, output)
    return denoiser.finish(state, TimeInStage())


def time_passes(
    denoiser: UNetRunner, task: DenoiseTask, rows: int, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Runs passes of so many rows as the engine does and times their parts.

    Guided images, two rows each; an odd row is an unguided one's.
    """
    times: dict[str, list[float]] = {"begin_s": [], "forward": [], "pass_s": [], "step_s": [], "finish_s": []}
    # The whole slice of a task that is long enough: the refiner's is a fifth of the steps.
    task = replace(task, num_inference_steps=(WARM_UP + repeats) * 6)
    tasks = [task] * (rows // 2) + [replace(task, guidance_scale=1.0)] * (rows % 2)
    scheduler = StepScheduler(Budget(rows))
    states = {}
    for number, one in enumerate(tasks):
        started = clock()
        state = denoiser.begin(one)
        scheduler.add(denoiser.job(state, str(number), started))
        times["begin_s"].append(clock() - started)
        states[str(number)] = state
    for number in range(WARM_UP + repeats):
        started = clock()
        batch = scheduler.next_batch()
        assert batch is not None and batch.rows == rows
        chosen = [states[job.id] for job in batch.jobs]
        ready = clock()
        outputs = denoiser.forward(chosen)
        passed = clock()
        for state, output in zip(chosen, outputs, strict=True):
            denoiser.advance(state, output)
        stepped = clock()
        scheduler.observe(stepped - started)
        if number >= WARM_UP:
            times["pass_s"].append(ready - started)
            times["forward"].append(passed - ready)
            times["step_s"].append((stepped - passed) / len(chosen))
    for state in states.values():
        started = clock()
        denoiser.finish(state, TimeInStage())
        times["finish_s"].append(clock() - started)
    return times


@contextmanager
def neighbours(config: AppConfig, task: DenoiseTask, count: int) -> Iterator[None]:
    """Keeps that many other cores busy with the base's passes."""
    spawn = multiprocessing.get_context("spawn")
    started = spawn.Barrier(count + 1)
    processes = [spawn.Process(target=_keep_busy, args=(config, task, started), daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        started.wait(timeout=120)
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _keep_busy(config: AppConfig, task: DenoiseTask, started: Any) -> None:
    denoiser = load_denoiser(config, "denoise")
    rows = config.base_denoiser.max_batch_rows
    states = [denoiser.begin(task) for _ in range(rows // 2)]
    denoiser.forward(states)
    started.wait(timeout=120)
    while True:
        denoiser.forward(states)
