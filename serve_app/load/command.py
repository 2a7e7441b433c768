"""The command `sdxl-serve bench`: its flags, what contradicts what, and the run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.load.arrivals import Arrivals, Bursts, Closed, Poisson
from serve_app.load.mixes import MIXES, RequestMix, parse_mix
from serve_app.request.errors import ConfigurationError, ServiceError

if TYPE_CHECKING:
    from serve_app.load.drive import Load, Settings
    from serve_app.load.records import Record

DEFAULT_REQUESTS = 64


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `sdxl-serve bench`."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a running service (default %(default)s)")
    parser.add_argument(
        "--mix", default="mixed",
        help=f"what to ask: {', '.join(MIXES)}, or a YAML or JSON file (default %(default)s)",
    )  # fmt: skip
    when = parser.add_argument_group("when", "exactly one of --concurrency, --rate and --burst")
    when.add_argument("--concurrency", type=int, help="closed loop: so many clients, each asks again once answered")
    when.add_argument("--rate", type=float, help="open loop: so many requests a second, Poisson")
    when.add_argument("--burst", type=int, help="open loop: so many requests at once, every --every-s")
    when.add_argument("--every-s", type=float, help="seconds between the starts of two bursts")
    bounds = parser.add_argument_group("how much")
    bounds.add_argument("--requests", type=int, help=f"at most (default {DEFAULT_REQUESTS}, if no duration is given)")
    bounds.add_argument("--duration-s", type=float, help="nothing is sent after so many seconds")
    bounds.add_argument("--timeout-s", type=float, default=600.0, help="of one request (default %(default)g)")
    bounds.add_argument("--warmup", type=int, default=0, help="the first so many requests are not measured")
    bounds.add_argument(
        "--steady", action="store_true",
        help="closed loop: keep it full with more requests, not measured, until the last measured one has ended",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the requests and the arrivals (default %(default)s)")
    parser.add_argument("--stream", action="store_true", help="ask for server-sent events")
    parser.add_argument("--partial-images", type=int, help="previews of a picture, 0 to 3; with --stream")
    parser.add_argument("--slo-s", type=float, help="seconds a request may take, where it has no deadline_s of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the settings")
    parser.add_argument("--records", action="store_true", help="each request too; with --json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG; needs matplotlib")


def run(options: argparse.Namespace) -> int:
    """Runs it. Raises `ConfigurationError` before anything is sent, `ServiceError` if nothing succeeded."""
    import asyncio
    from contextlib import closing

    from tqdm import tqdm

    from serve_app.load.drive import drive, reachable
    from serve_app.load.report import document, plot, table
    from serve_app.load.statistics import summarize

    settings = read_settings(options)

    async def load() -> list[Record]:
        await reachable(settings.url)
        total = settings.requests if settings.duration_s is None else None
        with closing(tqdm(total=total, unit="request", dynamic_ncols=True)) as bar:
            return await drive(settings, lambda load: _show(bar, load))

    records = asyncio.run(load())
    if not any(record.measured for record in records):
        raise ConfigurationError(f"--duration-s {options.duration_s:g}: over before a measured request was sent")
    summary = summarize(records, options.slo_s)
    print(table(summary))
    if options.json is not None:
        content = document(summary, _plain(options), records if options.records else None)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(records, summary, f"{options.mix} at {settings.url}: {summary.images_per_s:.2f} images/s", options.plot)
    if not summary.succeeded:
        raise ServiceError("no request succeeded")
    return 0


def _show(bar: Any, load: Load) -> None:
    bar.set_postfix({"in flight": load.in_flight, "failed": load.failed}, refresh=False)
    bar.update(load.finished - bar.n)


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON has them; a mix in full, whose file may change."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    del plain["run"]
    return plain | {"mix_content": _mix(options.mix).model_dump(mode="json", exclude_none=True)}


def read_settings(options: argparse.Namespace) -> Settings:
    """What the flags ask for. Raises `ConfigurationError`, one line, where they make no sense together."""
    from serve_app.load.drive import Settings
    from serve_app.load.report import check_can_plot

    arrivals = _arrivals(options)
    for name in ("requests", "duration_s", "timeout_s", "slo_s"):
        _above_zero(options, name)
    if options.warmup < 0:
        raise ConfigurationError(f"--warmup {options.warmup}: is negative")
    if options.steady and not isinstance(arrivals, Closed):
        raise ConfigurationError("--steady: goes with --concurrency; an open loop asks by its own clock")
    if options.partial_images is not None and not options.stream:
        raise ConfigurationError("--partial-images: goes with --stream")
    if options.partial_images is not None and not 0 <= options.partial_images <= 3:
        raise ConfigurationError(f"--partial-images {options.partial_images}: is not 0 to 3")
    if options.records and options.json is None:
        raise ConfigurationError("--records: goes with --json")
    requests = options.requests
    if requests is None and options.duration_s is None:
        requests = DEFAULT_REQUESTS
    if requests is not None and options.warmup >= requests:
        raise ConfigurationError(f"--warmup {options.warmup}: leaves nothing to measure of {requests} requests")
    for path in (options.json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigurationError(f"{path.parent}: no such folder")
    if options.plot is not None:
        if options.plot.suffix.lower() != ".png":
            raise ConfigurationError(f"{options.plot}: does not end in .png")
        check_can_plot()
    return Settings(
        url=options.url,
        mix=_mix(options.mix),
        arrivals=arrivals,
        requests=requests,
        duration_s=options.duration_s,
        warmup=options.warmup,
        steady=options.steady,
        stream=options.stream,
        partial_images=options.partial_images,
        timeout_s=options.timeout_s,
        seed=options.seed,
    )


def _arrivals(options: argparse.Namespace) -> Arrivals:
    given = [name for name in ("concurrency", "rate", "burst") if getattr(options, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise ConfigurationError(f"exactly one of --concurrency, --rate and --burst is needed, got {found}")
    if (options.burst is None) != (options.every_s is None):
        raise ConfigurationError("--burst and --every-s: go together")
    for name in ("concurrency", "rate", "burst", "every_s"):
        _above_zero(options, name)
    if options.concurrency is not None:
        return Closed(options.concurrency)
    return Poisson(options.rate) if options.rate is not None else Bursts(options.burst, options.every_s)


def _above_zero(options: argparse.Namespace, name: str) -> None:
    value = getattr(options, name)
    if value is not None and not 0 < value < float("inf"):
        raise ConfigurationError(f"--{name.replace('_', '-')} {value:g}: is not above zero")


def _mix(name: str) -> RequestMix:
    """A mix by its name, or of a file; a YAML reader reads JSON too."""
    import yaml

    if name in MIXES:
        return MIXES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigurationError(f"--mix {name}: is none of {', '.join(MIXES)}, and no .yaml or .json file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML or JSON: {' '.join(str(error).split())}") from None
    return parse_mix(content, str(path))
