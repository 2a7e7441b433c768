"""`sdxl-serve plan`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from serve_app.planning.plan import find_plan, requests_to_simulate
from serve_app.planning.profile import Cores, Profile, read_profile, shipped_profiles
from serve_app.planning.simulate import STAGES, Replicas, Run, percentile, simulate
from serve_app.planning.workload import Ask, Mix, closed_loop, poisson
from serve_app.request.errors import ConfigurationError
from serve_app.request.fields import MAX_IMAGES, MAX_STEPS
from serve_app.runtime.scheduling import POLICIES

_SHARES = (0.5, 0.95, 0.99)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", required=True, help=f"a machine's figures: a file, or one of ours: {', '.join(shipped_profiles())}"
    )
    load = parser.add_argument_group("load (one of --rate and --concurrency)")
    load.add_argument("--rate", type=_positive, help="requests a second, at random (Poisson)")
    load.add_argument("--burst", type=_count, help="requests that come at a time, the bursts at random (default 1)")
    load.add_argument("--concurrency", type=_count, help="clients that each wait for their answer before they go on")
    aim = parser.add_argument_group("aim (one of --p99 and --simulate)")
    aim.add_argument("--p99", type=_positive, help="seconds within which 99%% of requests must be answered")
    aim.add_argument("--simulate", metavar="STAGE=N,...", help="only simulate so many replicas (a stage left out: 1)")
    mix = parser.add_argument_group("requests (each property evenly and by itself)")
    mix.add_argument("--steps", default="50", help="denoising steps: one number, or a range as 10-50 (default 50)")
    mix.add_argument("--size", nargs="+", default=["1024x1024"], help="sizes in pixels (default 1024x1024)")
    mix.add_argument("--n", default="1", help="pictures of a request: one number, or a range as 1-4 (default 1)")
    mix.add_argument("--guidance", action=argparse.BooleanOptionalAction, default=True, help="two rows, or one")
    mix.add_argument(
        "--high-noise-frac", type=_share, default=1.0, help="the base's share of the steps; the refiner has the rest"
    )
    mix.add_argument("--refiner-share", type=_share, help="the share of requests that go on to the refiner (default 1)")
    mix.add_argument("--deadline-s", type=_positive, help="seconds within which each request is wanted")
    run = parser.add_argument_group("run")
    run.add_argument("--policy", choices=sorted(POLICIES), help="order of work in the denoisers (the profile's)")
    run.add_argument("--cores", help="cores that all replicas share, or `own`: a device each (the profile's)")
    run.add_argument("--requests", type=_count, help="how many to simulate (enough for a steady state)")
    run.add_argument("--seed", type=int, default=0, help="of everything that is random (default 0)")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.set_defaults(run=plan)


def plan(options: argparse.Namespace) -> int:
    """Searches or simulates, and prints a table."""
    if (options.rate is None) == (options.concurrency is None):
        raise ConfigurationError("give one of --rate (an open loop) and --concurrency (a closed one)")
    if (options.p99 is None) == (options.simulate is None):
        raise ConfigurationError("give one of --p99 (how many replicas?) and --simulate (how fast are these?)")
    if options.burst is not None and options.rate is None:
        raise ConfigurationError("--burst is of an open loop: it goes with --rate")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigurationError(f"{options.json.parent}: no such folder")
    profile = _profile(options)
    mix = _mix(options, profile)
    count = options.requests or requests_to_simulate(profile, mix, options.rate, options.concurrency)
    asks: Sequence[Ask]
    if options.rate is not None:
        asks = poisson(mix, options.rate, count, options.seed, options.burst or 1)
    else:
        asks = closed_loop(mix, count, options.seed)
    tried = 1
    if options.simulate is not None:
        replicas = _replicas(options.simulate, mix)
        run = simulate(profile, replicas, asks, concurrency=options.concurrency, seed=options.seed)
    else:
        found = find_plan(
            profile,
            asks,
            options.p99,
            rate=options.rate,
            concurrency=options.concurrency,
            seed=options.seed,
            tell=_show_progress,
        )
        replicas, run, tried = found.replicas, found.run, found.tried
    figures = summary(replicas, run) | {"settings_tried": tried}
    _print(options, profile, mix, figures)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def summary(replicas: Replicas, run: Run) -> dict[str, Any]:
    """The figures of a run as plain data; latencies of requests that were answered, in seconds."""
    answered = [record for record in run.counted if record.done is not None]
    latencies = [record.latency_s for record in answered]
    waits = [record.first_step - record.arrived for record in answered if record.first_step is not None]
    return {
        "replicas": asdict(replicas),
        "stages": {stage: asdict(use) for stage, use in run.stages.items()},
        "latency_s": _percentiles(latencies),
        "to_first_step_s": _percentiles(waits),
        "images_per_s": run.throughput,
        "requests": len(run.records),
        "measured_requests": len(run.counted),
        "refused": len(run.counted) - len(answered),
        "measured_s": run.window[1] - run.window[0],
    }


def _percentiles(values: list[float]) -> dict[str, float | None]:
    names = ("mean", *(f"p{share * 100:g}" for share in _SHARES))
    if not values:
        return dict.fromkeys(names)
    figures = (math.fsum(values) / len(values), *(percentile(values, share) for share in _SHARES))
    return dict(zip(names, figures, strict=True))


def _show_progress(replicas: Replicas, run: Run) -> None:
    slow = percentile([record.latency_s for record in run.counted], 0.99)
    print(f"  {replicas}: p99 {slow:.2f} s", file=sys.stderr)


def _print(options: argparse.Namespace, profile: Profile, mix: Mix, figures: dict[str, Any]) -> None:
    made = profile.made
    print(f"{made.machine}, {made.dtype}: {made.how} {made.date}")
    for size in mix.sizes:
        if not profile.measured_sizes(size[0] * size[1]):
            print(f"note: {size[0]}x{size[1]} is outside the profile's sizes: its times are extrapolated")
    if profile.cores is not None:
        print(f"all replicas share {profile.cores.count} cores")
    print()
    print("stage    replicas  utilisation  rows a pass  waits s  stays s")
    for stage in STAGES:
        use = figures["stages"][stage]
        if use["replicas"]:
            rows = f"{use['rows']:.1f} of {_most_rows(profile, stage)}"
            print(
                f"{stage:8} {use['replicas']:8d}  {use['utilisation']:11.0%}  {rows:>11}  "
                f"{use['queued_s']:7.3f}  {use['stayed_s']:7.3f}"
            )
    print()
    print("seconds               mean      p50      p95      p99")
    for name, title in (("latency_s", "latency"), ("to_first_step_s", "to the first step")):
        values = (figures[name][key] for key in ("mean", "p50", "p95", "p99"))
        print(f"{title:17} " + " ".join(f"{'-' if value is None else f'{value:.3f}':>8}" for value in values))
    print()
    print(
        f"{figures['images_per_s']:.2f} images/s over {figures['measured_s']:.0f} s; "
        f"{figures['measured_requests']} requests measured of {figures['requests']}, {figures['refused']} refused; "
        f"{figures['settings_tried']} settings tried"
    )
    if options.rate is not None and figures["latency_s"]["p99"] is not None:
        lives = figures["measured_s"] / figures["latency_s"]["p99"]
        if lives < 5:
            print(f"note: the run is {lives:.1f} times as long as its p99: give more --requests")


def _most_rows(profile: Profile, stage: str) -> int:
    if stage == "ingress":
        return 1
    budget = {"encode": profile.encode, "denoise": profile.denoise, "refine": profile.refine, "decode": profile.decode}
    found = budget[stage]
    assert found is not None
    return found.budget.rows


def _profile(options: argparse.Namespace) -> Profile:
    profile = read_profile(options.profile)
    if options.policy is not None:
        profile = profile.with_policy(options.policy)
    if options.cores == "own":
        profile = profile.model_copy(update={"cores": None})
    elif options.cores is not None:
        if not re.fullmatch(r"[1-9]\d{0,3}", options.cores):
            raise ConfigurationError(f"--cores {options.cores}: neither a number of cores nor `own`")
        if profile.cores is None:
            raise ConfigurationError(f"--cores {options.cores}: in {options.profile} each replica has its own device")
        count = int(options.cores)
        slowdown = profile.cores.slowdown if count > 1 else 1.0
        cores = Cores(count=count, slowdown=slowdown, beside_s=profile.cores.beside_s)
        profile = profile.model_copy(update={"cores": cores})
    return profile


def _mix(options: argparse.Namespace, profile: Profile) -> Mix:
    if options.high_noise_frac < 1 and profile.refine is None:
        raise ConfigurationError(f"--high-noise-frac {options.high_noise_frac:g}: {options.profile} has no refiner")
    if options.refiner_share is not None and options.high_noise_frac == 1:
        raise ConfigurationError("--refiner-share: --high-noise-frac is 1 and leaves the refiner nothing")
    limit = profile.ingress.max_images_in_flight
    n = _range("--n", options.n, min(MAX_IMAGES, limit))
    return Mix(
        steps=_range("--steps", options.steps, MAX_STEPS),
        sizes=tuple(parse_size(text) for text in options.size),
        n=n,
        guided_share=1.0 if options.guidance else 0.0,
        high_noise_frac=options.high_noise_frac,
        refined_share=1.0 if options.refiner_share is None else options.refiner_share,
        deadline_s=options.deadline_s,
    )


def _range(flag: str, text: str, most: int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    if match is None:
        raise ConfigurationError(f"{flag} {text}: neither a number nor a range as 10-50")
    low = int(match[1])
    high = int(match[2] or low)
    if not 1 <= low <= high <= most:
        raise ConfigurationError(f"{flag} {text}: must lie within 1 to {most}, the smaller number first")
    return low, high


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None or int(match[1]) % 8 or int(match[2]) % 8 or not int(match[1]) * int(match[2]):
        raise ConfigurationError(f"size {text}: not WIDTHxHEIGHT in multiples of 8")
    return int(match[1]), int(match[2])


def _replicas(text: str, mix: Mix) -> Replicas:
    given: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(\w+)=(\d{1,5})", part.strip())
        if match is None or match[1] not in STAGES:
            raise ConfigurationError(f"--simulate {part.strip()!r}: not one of {', '.join(f'{s}=N' for s in STAGES)}")
        if match[1] in given:
            raise ConfigurationError(f"--simulate: {match[1]} is given twice")
        given[match[1]] = int(match[2])
    if given.get("refine") and mix.high_noise_frac == 1:
        raise ConfigurationError("--simulate: refine has nothing to do, --high-noise-frac is 1")
    return replace(Replicas(refine=int(mix.high_noise_frac < 1)), **given)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# What argparse says of a wrong value: "invalid seconds above 0 value".
_positive.__name__, _share.__name__, _count.__name__ = "positive number", "share (0 < x <= 1)", "positive whole number"
