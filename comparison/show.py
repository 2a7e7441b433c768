"""The comparison's figures as ratios, as a table, as a picture. Knows nothing of how they were measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from comparison.systems import NAMES, OURS, UNTRACED
from comparison.unet_gain import MODELS, limit_images_per_s
from serve_app.planning.measure import processor_name

# What the service must show: ratio -> (the bound, whether a ratio may not exceed it, the aim).
TARGETS: dict[str, tuple[str, float, bool, float | None]] = {
    "mixed_throughput": ("mixed: throughput against the best rival's", 1.25, False, 1.6),
    "mixed_p95": ("mixed: p95 latency against the best rival's", 0.7, True, 0.5),
    "burst_queue_in_steps": ("bursts: arrival to first denoise step, median, in step times", 2.0, True, None),
    "alone": ("one request alone: latency against (a)'s at one thread", 1.15, True, 1.0),
    "short_behind_long": ("short behind long: latency against that of equals at the same batch size", 1.5, True, None),
}


def machine() -> dict[str, Any]:
    """What kind of machine and which versions; nothing that names it."""
    packages = ("torch", "diffusers", "transformers", "ray")
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
    }


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Ours to the best rival of the same run, figure by figure; what was not measured is absent."""
    systems = figures["systems"]
    ours, rivals = systems.get(OURS, {}), [found for name, found in systems.items() if name != OURS]
    found: dict[str, float] = {}
    for mix in ("mixed", "presets"):
        theirs = [rival[mix] for rival in rivals if mix in rival]
        if mix in ours and theirs:
            found[f"{mix}_throughput"] = ours[mix]["images_per_s"] / max(r["images_per_s"] for r in theirs)
            for q in ("p50", "p95", "p99"):
                found[f"{mix}_{q}"] = ours[mix]["latency_s"][q] / min(r["latency_s"][q] for r in theirs)
    theirs = [rival["mixed"] for rival in rivals if "mixed" in rival]
    if UNTRACED in figures and theirs:
        loop = figures[UNTRACED]["mixed"]
        found["untraced_throughput"] = loop["images_per_s"] / max(r["images_per_s"] for r in theirs)
        found["untraced_p95"] = loop["latency_s"]["p95"] / min(r["latency_s"]["p95"] for r in theirs)
    if ours.get("bursts", {}).get("queue_in_steps") is not None:
        found["burst_queue_in_steps"] = ours["bursts"]["queue_in_steps"]
    theirs = [rival["bursts"] for rival in rivals if "bursts" in rival]
    if "bursts" in ours and theirs:
        found["burst_p95"] = ours["bursts"]["latency_s"]["p95"] / min(r["latency_s"]["p95"] for r in theirs)
    if "short-behind-long" in ours:
        found["short_behind_long"] = ours["short-behind-long"]["ratio"]
        theirs = [rival["short-behind-long"] for rival in rivals if "short-behind-long" in rival]
        if theirs:
            best = min(r["amid_long_s"]["p50"] for r in theirs)
            found["short_behind_long_p50"] = ours["short-behind-long"]["amid_long_s"]["p50"] / best
    if "alone" in figures:
        found["alone"] = figures["alone"]["ratio"]
    return found


def rate_line(found: dict[str, Any]) -> str:
    latency = found["latency_s"]
    return f"{found['images_per_s']:.3f} images/s, latency p50 {latency['p50']:.2f} s, p95 {latency['p95']:.2f} s"


def burst_line(found: dict[str, Any]) -> str:
    line = f"latency p50 {found['latency_s']['p50']:.2f} s, p95 {found['latency_s']['p95']:.2f} s"
    if found["queue_s"] is not None:
        line += f", first step after {found['queue_s']['p50']:.3f} s at the median"
    if found["queue_in_steps"] is not None:
        line += f", {found['queue_in_steps']:.2f} steps"
    return line


def short_line(found: dict[str, Any]) -> str:
    amid, together = found["amid_long_s"]["p50"], found["together_s"]["p50"]
    return f"p50 {amid:.2f} s, {found['ratio']:.2f} times the {together:.2f} s of equals"


def markdown(figures: dict[str, Any]) -> str:
    """comparison.md: the tables that the README shows."""
    return "\n".join(_lines(figures)) + "\n"


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    at, effort = figures["machine"], figures["effort"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    yield "# Benchmark"
    yield ""
    if not figures["whole"]:
        yield "*A part of the comparison, or a quick one: not to be quoted.*"
        yield ""
    yield (
        f"Written by `make bench` on {at['date']}, in {figures['minutes']:g} minutes, on {at['cores']} cores "
        f"({at['processor']}, {at['architecture']}, {at['system']}), float32, Python {at['python']}, {versions}. The "
        "embedded demo checkpoint at 128x128 pixels with guidance, base and refiner split at 0.8. All systems in one "
        "run, one loaded at a time, the same requests for each; each with the fastest of the settings it was tried in. "
        f"{_rounds(figures)}"
        f"Load average before: {at['load_average_before'][0]:g}."
    )
    yield ""
    yield "![throughput and latency](comparison.png)"
    yield ""
    yield from _against_targets(figures["ratios"])
    yield from _systems(figures, effort)
    yield from _untraced(figures)
    yield from _gain(figures)
    yield from _settings(figures)


def _rounds(figures: dict[str, Any]) -> str:
    """How far the rounds of `mixed` lie apart: a shared machine's speed drifts."""
    by_round = {
        NAMES[system]: found["mixed"]["images_per_s_by_round"]
        for system, found in figures["systems"].items()
        if "images_per_s_by_round" in found.get("mixed", {})
    }
    if not by_round:
        return ""
    rates = "; ".join(f"{name} {', '.join(f'{rate:.2f}' for rate in rates)}" for name, rates in by_round.items())
    return f"Closed loops in rounds, the systems in turn (images/s of `mixed` by round: {rates}). "


def _against_targets(found: dict[str, float]) -> Iterator[str]:
    there = {name: target for name, target in TARGETS.items() if name in found}
    if there:
        yield "| | here | wanted | aim |"
        yield "|---|---|---|---|"
    for name, (text, bound, at_most, aim) in there.items():
        met = found[name] <= bound if at_most else found[name] >= bound
        wanted = f"at {'most' if at_most else 'least'} {bound:g}" + ("" if met else " (**missed**)")
        yield f"| {text} | **{found[name]:.2f}** | {wanted} | {'' if aim is None else f'{aim:g}'} |"
    if there:
        yield ""
    others = [f"{name} {ratio:.2f}" for name, ratio in found.items() if name not in TARGETS]
    if others:
        yield f"Further ratios to the best rival: {', '.join(others)}."
        yield ""


def _systems(figures: dict[str, Any], effort: dict[str, Any]) -> Iterator[str]:
    systems = figures["systems"]
    yield "| | " + " | ".join(NAMES[system] for system in systems) + " |"
    yield "|---|" + "---|" * len(systems)
    for name, place in _figures(systems, effort):
        cells = [_cell(found, place) for found in systems.values()]
        if any(cells):
            yield f"| {name} | " + " | ".join(text or "-" for text in cells) + " |"
    yield ""


def _cell(found: dict[str, Any], place: tuple[str, ...]) -> str:
    value: Any = found
    for key in place:
        value = value.get(key) if value is not None else None  # not measured, or not reported by this system
    return "" if value is None else f"{value:.2f}"


def _figures(systems: dict[str, Any], effort: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The table's rows: a name, and where in a system's figures the cell is."""
    for mix, text in (("mixed", "10 to 50 steps, any number"), ("presets", "10, 20, 30, 40 or 50 steps")):
        name = f"`{mix}` ({text}), {effort['in_flight']} in flight"
        yield f"{name}: images/s", (mix, "images_per_s")
        for q in ("p50", "p95", "p99"):
            yield f"{name}: latency {q}, s", (mix, "latency_s", q)
    for rate in [found["bursts"]["rate_per_s"] for found in systems.values() if "bursts" in found][:1]:
        name = f"bursts of {effort['burst']} at {rate:.2f} images/s"
        for q in ("p50", "p95"):
            yield f"{name}: latency {q}, s", ("bursts", "latency_s", q)
        yield f"{name}: arrival to first denoise step, median, s", ("bursts", "queue_s", "p50")
    name = f"10 steps amid {effort['long_ones']} requests of"
    yield f"{name} 50: latency p50, s", ("short-behind-long", "amid_long_s", "p50")
    yield f"{name} 10, all at once: latency p50, s", ("short-behind-long", "together_s", "p50")


def _untraced(figures: dict[str, Any]) -> Iterator[str]:
    if UNTRACED not in figures:
        return
    found = figures["ratios"]
    yield (
        f"{NAMES[OURS]} runs its UNets as traces (`trace` in the configuration), the rivals run them as diffusers' "
        f"pipelines do. Without traces (`trace: false`) {NAMES[OURS]} in `mixed`: "
        f"{rate_line(figures[UNTRACED]['mixed'])}"
        + (
            f"; {found['untraced_throughput']:.2f} times the best rival's throughput, {found['untraced_p95']:.2f} of "
            "its p95"
            if "untraced_throughput" in found
            else ""
        )
        + ". With and without, its replicas keep the memory that a pass frees for the next one, which the rivals don't."
    )
    yield ""


def _gain(figures: dict[str, Any]) -> Iterator[str]:
    if "unet_gain" not in figures:
        return
    gain = figures["unet_gain"]
    rows = list(next(iter(gain["base"].values())))
    yield "The bare UNets, milliseconds a row by rows of a pass (a guided picture is two rows), one thread a process:"
    yield ""
    yield "| | " + " | ".join(rows) + " | gain |"
    yield "|---|" + "---|" * (len(rows) + 1)
    for model in MODELS:
        for name, by_rows in gain[model].items():
            cells = " | ".join(f"{ms:.2f}" for ms in by_rows.values())
            best = by_rows[rows[0]] / min(by_rows.values())
            yield f"| {model}, {name} | {cells} | {best:.2f} |"
    yield ""
    limit = limit_images_per_s(gain)
    ours = figures["systems"].get(OURS, {}).get("mixed")
    if ours is not None:
        stages = ", ".join(f"{stage} {spread['mean']:.2f} s" for stage, spread in ours["stages_s"].items())
        yield (
            f"With traced UNet passes of the best size and nothing else, two processes would draw {limit:.2f} images/s "
            f"at 30 steps; {NAMES[OURS]} draws {ours['images_per_s']:.2f}, {ours['images_per_s'] / limit:.0%} of it. "
            "The rest is everything else a picture needs, passes that are not full, and the load generator, which "
            f"shares the cores. Mean time of a request by stage, waiting included: {stages}."
        )
        yield ""


def _settings(figures: dict[str, Any]) -> Iterator[str]:
    yield "Settings that were tried (images/s of a short `mixed` run), and the one that was compared:"
    yield ""
    for system, found in figures["settings"].items():
        tried = "; ".join(f"{setting}: {rate:.2f}" for setting, rate in found["tried_images_per_s"].items())
        yield f"- {NAMES[system]}: **{found['chosen']}**" + (f" ({tried})" if tried else "")
    yield ""
    apart = ", ".join(
        f"{NAMES[system]} {found['alone']} ({found['at_once']} with four at once)"
        for system, found in figures["parity"].items()
    )
    first = NAMES[next(iter(figures["parity"]))]
    yield f"Same work: grey levels between each system's pictures and those of {first}: {apart}."


def write(figures: dict[str, Any], folder: Path) -> None:
    """Writes comparison.json, comparison.md and comparison.png."""
    (folder / "comparison.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(figures), encoding="utf-8")
    plot(figures, folder / "comparison.png")


def plot(figures: dict[str, Any], path: Path) -> None:
    """Throughput by system, and the share of requests finished by each latency."""
    from matplotlib.figure import Figure

    systems = figures["systems"]
    colours = dict(zip(NAMES, ("tab:blue", "0.75", "0.55", "0.35"), strict=True))
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    rates, mixed, bursts = figure.subplots(1, 3)
    mixes = [mix for mix in ("mixed", "presets") if any(mix in found for found in systems.values())]
    for place, (system, found) in enumerate(systems.items()):
        heights = [found.get(mix, {}).get("images_per_s", 0.0) for mix in mixes]
        at = [index + 0.2 * (place - (len(systems) - 1) / 2) for index in range(len(mixes))]
        bars = rates.bar(at, heights, 0.18, color=colours[system], label=NAMES[system])
        rates.bar_label(bars, fmt="%.2f", fontsize=7)
        for axes, scenario in ((mixed, "mixed"), (bursts, "bursts")):
            done = found.get(scenario, {}).get("latencies_s", [])
            shares = [(index + 1) / len(done) for index in range(len(done))]
            axes.step([0.0, *done], [0.0, *shares], where="post", color=colours[system], label=NAMES[system])
    rates.set_xticks(range(len(mixes)), mixes)
    rates.set(ylabel="images/s", title=f"{figures['effort']['in_flight']} in flight", ylim=(0, None))
    mixed.set(title="mixed: latency", xlabel="s", ylabel="share of requests", xlim=(0, None), ylim=(0, 1.02))
    bursts.set(title="bursts: latency", xlabel="s", xlim=(0, None), ylim=(0, 1.02))
    mixed.legend(fontsize=8)
    for axes in (mixed, bursts):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, metadata={"Software": None})
