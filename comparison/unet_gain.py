"""What batching gains on this machine: milliseconds a row of the bare UNets by rows of a pass, one thread.

    python -m comparison.unet_gain [--json FILE] [--quick] [--keep-memory]

With one process, and with two at once, as two replicas on two cores are; as diffusers runs them, and traced as the
replicas run them. With --keep-memory they keep what a pass frees, as replicas do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

ROWS = (2, 4, 8, 16, 32)
MODELS = {"base": 6, "refiner": 5}  # time ids of a row
# What a table calls it, processes, and whether they are traced.
WAYS = (("1 process", 1, False), ("2 processes", 2, False), ("2 processes, traced", 2, True))


def measure(model: str, seconds: float, keep_memory: bool, traced: bool, start_together: Any) -> dict[int, float]:
    """Milliseconds a row, by rows: the median pass within `seconds`, at least three."""
    import torch

    from serve_app.config.settings import DEMO_FOLDER
    from serve_app.models.backends.eager import Eager
    from serve_app.models.backends.rows import Backend, Rows
    from serve_app.models.backends.traced import Traced
    from serve_app.models.checkpoint import Checkpoint
    from serve_app.models.device import Compute, keep_freed_memory
    from serve_app.models.loading import load_unet

    torch.set_num_threads(1)
    if keep_memory:
        keep_freed_memory()
    unet = load_unet(Checkpoint(DEMO_FOLDER / model, None), torch.float32)
    compute = Compute(torch.device("cpu"), torch.float32)
    predict: Backend = Traced(unet, compute, MODELS[model]) if traced else Eager(unet)
    side = unet.config.sample_size
    figures = {}
    for rows in ROWS:
        given = Rows.example(unet.config, compute, MODELS[model], rows, side, side, 77)
        took: list[float] = []
        with torch.inference_mode():
            predict(given)  # warms up
            start_together.wait()
            end = time.perf_counter() + seconds
            while len(took) < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                predict(given)
                took.append(time.perf_counter() - start)
        figures[rows] = statistics.median(took) / rows * 1000
    return figures


def _measure_beside(model: str, seconds: float, keep_memory: bool, traced: bool, barrier: Any, results: Any) -> None:
    results.put(measure(model, seconds, keep_memory, traced, barrier))


def measure_processes(model: str, seconds: float, keep_memory: bool, traced: bool, processes: int) -> dict[int, float]:
    """The same in several processes at once: the mean over them."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_measure_beside, args=(model, seconds, keep_memory, traced, barrier, results))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    figures = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return {rows: statistics.fmean(figure[rows] for figure in figures) for rows in ROWS}


def limit_images_per_s(figures: dict[str, Any], steps: int = 30, share: float = 0.8) -> float:
    """Guided pictures a second if traced UNet passes of the best size were all there is to do, on two cores."""
    processes = 2
    best = {model: min(figures[model]["2 processes, traced"].values()) for model in MODELS}
    row_ms = share * best["base"] + (1 - share) * best["refiner"]
    return processes * 1000 / (2 * steps * row_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description="the bare UNet's gain from batching")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep-memory", action="store_true")
    options = parser.parse_args()
    seconds = 0.2 if options.quick else 1.0
    figures: dict[str, Any] = {}
    for model in MODELS:
        figures[model] = {
            name: measure_processes(model, seconds, options.keep_memory, traced, count) for name, count, traced in WAYS
        }
        for name, by_rows in figures[model].items():
            cells = "  ".join(f"{rows} rows {ms:.2f}" for rows, ms in by_rows.items())
            gain = by_rows[ROWS[0]] / min(by_rows.values())
            print(f"{model} UNet, {name}: ms a row: {cells}; gain {gain:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
