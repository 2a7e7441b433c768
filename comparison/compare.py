"""The whole comparison: `make bench`, or a part of it.

    python -m comparison.compare [--systems ours sequential] [--scenarios mixed alone] [--quick] [--out DIR]

Every system first draws the same pictures as the others, or the comparison ends. Each is tried in its settings and goes
on with the fastest. One system is loaded at a time. Closed loops go in rounds, the systems in turn and then in reverse,
since the speed of a shared machine drifts. A whole run writes docs/benchmark; a part, build/benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from comparison import scenarios, show
from comparison.scenarios import Effort
from comparison.systems import (
    NAMES,
    ONE_THREAD,
    OURS,
    ROOT,
    SETTINGS,
    UNTRACED,
    Setting,
    SystemFailed,
    running,
    untraced,
)
from serve_app.load.records import Record

SCENARIOS = ("gain", "mixed", "presets", "bursts", "short-behind-long", "alone")
MAX_GREY_LEVELS = 1


class Comparison:
    """The figures so far, as plain data."""

    def __init__(self, systems: list[str], wanted: list[str], effort: Effort, quick: bool) -> None:
        self._systems = systems
        self._wanted = wanted
        self._effort = effort
        self._quick = quick
        self._first_pictures: list[np.ndarray] | None = None
        self.figures: dict[str, Any] = {
            "machine": show.machine(),
            "effort": effort.__dict__,
            "parity": {},
            "settings": {},
            "systems": {system: {} for system in systems},
        }

    def run(self) -> None:
        if "gain" in self._wanted:
            self.figures["unet_gain"] = self._gain()
        chosen = {system: self._choose(system) for system in self._systems}
        self._closed_loops(chosen)
        for system, setting in chosen.items():
            if {"bursts", "short-behind-long"} & {*self._wanted}:
                self._measure(system, setting)
        if "alone" in self._wanted and OURS in chosen:
            self._alone(chosen[OURS])
        self.figures["ratios"] = show.ratios(self.figures)

    def _gain(self) -> dict[str, Any]:
        say("the bare UNets")
        path = ROOT / "build" / "unet_gain.json"
        path.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "comparison.unet_gain", "--json", str(path), *(["--quick"] * self._quick)]
        subprocess.run(command, check=True, cwd=ROOT)
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return figures

    def _choose(self, system: str) -> Setting:
        """The setting with the highest throughput in a short run over the mixed mix."""
        settings = SETTINGS[system][: 1 if self._quick else None]
        tried: dict[Setting, float] = {}
        for setting in settings:
            with running(setting) as url:
                if system not in self.figures["parity"]:
                    self._check_pictures(system, url)
                if len(settings) > 1:
                    tried[setting] = scenarios.tune(url, self._effort, f"trying {system}: {setting}")
                    say(f"{system}: {setting}: {tried[setting]:.3f} images/s")
        best = max(settings, key=lambda setting: tried.get(setting, 0.0))
        self.figures["settings"][system] = {
            "chosen": str(best),
            "tried_images_per_s": {str(setting): rate for setting, rate in tried.items()},
        }
        return best

    def _check_pictures(self, system: str, url: str) -> None:
        """Equal pictures mean equal work. All systems are held against the first one."""
        alone, together = (asyncio.run(scenarios.pictures(url, at_once)) for at_once in (False, True))
        if self._first_pictures is None:
            self._first_pictures = alone
        found = {
            "alone": scenarios.far_apart(alone, self._first_pictures),
            "at_once": scenarios.far_apart(together, self._first_pictures),
        }
        say(f"{system}: pictures within {found['alone']} grey levels of the first system's, {found['at_once']} at once")
        if max(found.values()) > MAX_GREY_LEVELS:
            raise SystemFailed(f"{system} draws something else: {max(found.values())} grey levels apart")
        self.figures["parity"][system] = found

    def _closed_loops(self, chosen: dict[str, Setting]) -> None:
        mixes = [mix for mix in ("mixed", "presets") if mix in self._wanted]
        loaded = [(system, setting, mixes) for system, setting in chosen.items()]
        if OURS in chosen and "mixed" in mixes:
            loaded.insert(1, (UNTRACED, untraced(chosen[OURS]), ["mixed"]))
        rounds: dict[tuple[str, str], list[list[Record]]] = {}
        for number in range(self._effort.rounds if mixes else 0):
            for system, setting, asked in loaded[:: -1 if number % 2 else 1]:
                with running(setting) as url:
                    for mix in asked:
                        title = f"{mix}, round {number + 1}: {system}"
                        records = scenarios.closed_loop(url, mix, self._effort, number, title)
                        rounds.setdefault((system, mix), []).append(records)
                        say(f"{title}: {show.rate_line(scenarios.pooled([records], self._effort))}")
        for (system, name), found in rounds.items():
            figures = self.figures["systems"][system] if system != UNTRACED else self.figures.setdefault(UNTRACED, {})
            figures[name] = scenarios.pooled(found, self._effort)

    def _measure(self, system: str, setting: Setting) -> None:
        found, effort = self.figures["systems"][system], self._effort
        with running(setting) as url:
            if "bursts" in self._wanted:
                # The same arrivals for everybody: four fifths of what we can do.
                capacity = self.figures["systems"].get(OURS, {}).get("mixed", found.get("mixed"))["images_per_s"]
                found["bursts"] = scenarios.bursts(url, 0.8 * capacity, effort, f"bursts: {system}")
                say(f"{system}: bursts: {show.burst_line(found['bursts'])}")
            if "short-behind-long" in self._wanted:
                title = f"short behind long: {system}"
                found["short-behind-long"] = asyncio.run(scenarios.short_behind_long(url, effort, title))
                say(f"{system}: short behind long: {show.short_line(found['short-behind-long'])}")

    def _alone(self, ours: Setting) -> None:
        with running(ours) as our_url, running(ONE_THREAD) as rival_url:
            found = asyncio.run(scenarios.alone(our_url, rival_url, self._effort, "alone"))
        self.figures["alone"] = found
        say(f"one request alone: {found['ratio']:.3f} of (a)'s latency")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the comparison of make bench, or a part of it")
    parser.add_argument("--systems", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="see that it works: one setting each, a few requests")
    parser.add_argument("--out", type=Path, help="folder for comparison.json, comparison.md and comparison.png")
    options = parser.parse_args(arguments)
    whole = len(options.systems) == len(NAMES) and len(options.scenarios) == len(SCENARIOS) and not options.quick
    if "bursts" in options.scenarios and "mixed" not in options.scenarios:
        parser.error("bursts needs mixed, which measures the capacity")
    out = options.out or ROOT / ("docs" if whole else "build") / "benchmark"
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    systems = [system for system in NAMES if system in options.systems]  # ours first: its capacity sets the bursts
    effort = Effort.quick() if options.quick else Effort()
    comparison = Comparison(systems, options.scenarios, effort, options.quick)
    try:
        comparison.run()
    except SystemFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    figures = comparison.figures | {"minutes": round((time.monotonic() - started) / 60, 1), "whole": whole}
    show.write(figures, out)
    print(show.markdown(figures))
    say(f"{out}: comparison.json, comparison.md, comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
