"""The command line. The flags of `generate` are made from `ImageRequest`. Loads Ray and torch on use only."""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve_app import __version__
from serve_app.load.command import add_flags as add_bench_flags
from serve_app.load.command import run as run_bench
from serve_app.pictures.files import MEDIA_TYPES
from serve_app.planning.command import add_plan_flags
from serve_app.planning.measure import add_profile_flags
from serve_app.request.errors import ConfigurationError, ServiceError
from serve_app.request.schema import (
    GROUPS,
    ImageRequest,
    ImageResult,
    Progress,
    StreamEvent,
    field_kinds,
    parse_request,
)

_PACKAGE = Path(__file__).parent
# Inside the package where it was installed as a wheel, beside it in a checkout.
_CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
DEMO_CONFIG = _CONFIGS / "demo.yaml"
_LOOK_EVERY_S = 0.1


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Every expected fault is one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ConfigurationError, ServiceError) as error:
        # What a replica raised comes in Ray's wrapper, which prints as a report of many lines.
        print(f"sdxl-serve: {getattr(error, 'cause', error)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"sdxl-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdxl-serve", description="Stable Diffusion XL as a Ray Serve graph.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw pictures, by a running service or by a graph of its own")
    generate.add_argument("prompt", help=ImageRequest.model_fields["prompt"].description)
    generate.add_argument(
        "-o", "--output", type=Path, default=Path("out.png"), help="picture file; with n > 1 numbered (out-0.png ...)"
    )
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--url", help="address of a running service, e.g. http://127.0.0.1:8000")
    where.add_argument("--config", type=Path, default=DEMO_CONFIG, help="config of the graph to start (embedded demo)")
    _add_request_flags(generate)
    generate.set_defaults(run=_generate)

    serve = commands.add_parser("serve", help="serve a config file until Ctrl-C")
    serve.add_argument("config", type=Path, nargs="?", default=DEMO_CONFIG)
    serve.add_argument("--host", help="address to listen on; the config's if absent")
    serve.add_argument("--port", type=int, help="port; the config's if absent")
    serve.add_argument("--address", help="a running Ray cluster to deploy to; a Ray of its own if absent")
    serve.add_argument(
        "--replace", action="store_true", help="put this application in the place of the one that is at --address"
    )
    serve.add_argument(
        "--drain-timeout-s",
        type=_seconds,
        default=120.0,
        help="at SIGTERM or Ctrl-C, seconds for what is under way (default 120); a second signal ends it at once",
    )
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check", help="check a config file and the checkpoints it names")
    check.add_argument("config", type=Path)
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="put load on a running service and measure it")
    add_bench_flags(bench)
    bench.set_defaults(run=run_bench)

    plan = commands.add_parser("plan", help="how many replicas a load needs, and how fast it will be, on paper")
    add_plan_flags(plan)

    profile = commands.add_parser("profile", help="measure this machine for `plan`")
    add_profile_flags(profile, DEMO_CONFIG)

    tiny = commands.add_parser("make-tiny", help="write a random-weight base and refiner, for tests")
    tiny.add_argument("directory", type=Path)
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_make_tiny)
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: no number of seconds from 0 up")
    return value


def _add_request_flags(parser: argparse.ArgumentParser) -> None:
    kinds = field_kinds()
    for title, group in GROUPS.items():
        arguments = parser.add_argument_group(f"request: {title}", group.__doc__)
        for name, field in group.model_fields.items():
            if name == "prompt":
                continue
            kind = kinds[name]
            default = "" if field.default is None else f" (default {field.default})"
            arguments.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                type=kind.base,
                nargs=None if kind.values == 1 else kind.values,
                choices=kind.choices or None,
                default=argparse.SUPPRESS,
                help=f"{field.description}{default}".replace("%", "%%"),
            )


def _generate(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name) for name in ImageRequest.model_fields if hasattr(options, name)}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    _apply_output(options.output, given)
    request = parse_request(given)
    result = _draw_at(options.url, request) if options.url else _draw_here(options.config, request)
    for index, image in enumerate(result.images):
        path = options.output
        if len(result.images) > 1:
            path = path.with_stem(f"{path.stem}-{index}")
        path.write_bytes(image.data)
        print(f"{path}  {image.width}x{image.height}  seed {image.seed}")
    print("  ".join(f"{timing.stage} {timing.seconds:.2f} s" for timing in result.timings))
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _apply_output(output: Path, given: dict[str, Any]) -> None:
    """The file's suffix is its format; found wrong before anything is drawn."""
    if not output.parent.is_dir():
        raise ConfigurationError(f"{output.parent}: no such folder")
    suffix = output.suffix.lower().lstrip(".").replace("jpg", "jpeg")
    if suffix not in MEDIA_TYPES:
        raise ConfigurationError(f"{output}: ends in none of .png, .jpg, .jpeg and .webp")
    if given.setdefault("output_format", suffix) != suffix:
        raise ConfigurationError(f"{output}: is no name for a {given['output_format']}")


def _draw_here(config_path: Path, request: ImageRequest) -> ImageResult:
    """Starts the graph, draws with a bar that moves at every denoising step, and ends it."""
    from tqdm import tqdm

    from serve_app.config.serve_file import read_serve_config
    from serve_app.graph.environment import set_for_own_ray
    from serve_app.graph.local import running

    set_for_own_ray()  # before a config file is read, which takes Ray's schema
    config = read_serve_config(config_path)
    print(f"starting the graph of {config_path.name} (four model deployments and the ingress) ...", file=sys.stderr)
    with running(config, http=False, tell=_tell) as graph, tqdm(unit="step", dynamic_ncols=True) as bar:
        try:
            return _follow(graph.handle.options(stream=True).stream.remote(request), bar, request)
        except ServiceError:
            raise
        except Exception as error:  # Ray's, or a fault of a stage: a line here, the report in Ray's logs
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ServiceError(f"the graph failed: {lines[-1].strip()}") from None


def _follow(events: Iterable[StreamEvent], bar: Any, request: ImageRequest) -> ImageResult:
    """The result of a stream; its progress moves the bar."""
    steps: dict[tuple[int, str], tuple[int, int]] = {}
    for event in events:
        if isinstance(event, ImageResult):
            return event
        if isinstance(event, Progress):
            _show(bar, request, steps, event)
    raise ServiceError("the stream ended without a result")


def _show(bar: Any, request: ImageRequest, steps: dict[tuple[int, str], tuple[int, int]], event: Progress) -> None:
    bar.set_description(event.stage, refresh=False)
    if event.steps:
        steps[event.image, event.stage] = (event.step, event.steps)
    # A stage's count is known once it has begun: until then the request's own number stands.
    bar.total = max(request.n * request.num_inference_steps, sum(total for _, total in steps.values()))
    bar.n = sum(step for step, _ in steps.values())
    bar.refresh()


def _draw_at(url: str, request: ImageRequest) -> ImageResult:
    """Asks a running service, with the same bar."""
    from tqdm import tqdm

    from serve_app.client.client import Client

    with Client(url) as client, tqdm(unit="step", dynamic_ncols=True) as bar:
        return _follow(client.stream(request), bar, request)


def _serve(options: argparse.Namespace) -> int:
    """Serves until a signal. What is under way then ends first; a second signal ends everything at once."""
    from serve_app.config.serve_file import read_serve_config
    from serve_app.graph.environment import set_for_own_ray
    from serve_app.graph.local import running

    if options.address is None:
        set_for_own_ray()  # before a config file is read, which takes Ray's schema
    config = read_serve_config(options.config)
    signals = _Signals()
    print(f"starting the graph of {options.config} ...", file=sys.stderr)
    started = time.monotonic()
    with running(
        config, host=options.host, port=options.port, address=options.address, replace=options.replace, tell=_tell
    ) as graph:
        signals.serving = True
        seconds = time.monotonic() - started
        where = f"at {graph.url}" if graph.url else f"on the cluster at {graph.ray_address}"
        print(f"ready {where} after {seconds:.0f} s; Ctrl-C ends it", flush=True)
        joining = " ".join(f"{name}={shlex.quote(value)}" for name, value in graph.environment.items())
        print(f'Python handles: export {joining}; then ray.init(address="auto")', flush=True)
        signals.wait_for_first()
        print(
            f"ending: no new work, up to {options.drain_timeout_s:g} s for what is under way; once more ends at once",
            file=sys.stderr,
            flush=True,
        )
        drained = graph.drain(options.drain_timeout_s)
    if not drained:
        raise ServiceError(f"what was still under way after {options.drain_timeout_s:g} s was cut")
    return 0


class _Signals:
    """SIGTERM and SIGINT: once `serving`, the first ends `wait_for_first`; any other is a `SystemExit`, at once.

    While the graph starts there is nothing to wait for.
    """

    def __init__(self) -> None:
        self.serving = False
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def wait_for_first(self) -> None:
        while not self._asked:
            time.sleep(_LOOK_EVERY_S)  # a handler may not touch the lock of an event that is being waited for

    def _on_signal(self, number: int, _: object) -> None:
        if self.serving and not self._asked:
            self._asked = True
            return
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)  # the end itself is a matter of seconds
        sys.exit(128 + number)  # as a shell says it of a process that a signal ended


def _tell(line: str) -> None:
    print(f"sdxl-serve: {line}", file=sys.stderr, flush=True)


def _check(options: argparse.Namespace) -> int:
    from serve_app.config.serve_file import read_serve_config
    from serve_app.models.check import check_sources

    config = read_serve_config(options.config)
    for source in check_sources(config.app, thorough=True):
        print(f"{source}: not on this machine; the replica that fetches it checks it", file=sys.stderr)
    print(f"{options.config}: fine ({config.app.base}{' + ' + str(config.app.refiner) if config.app.refiner else ''})")
    return 0


def _make_tiny(options: argparse.Namespace) -> int:
    from serve_app.demo.tiny import make_tiny

    make_tiny(options.directory, options.seed)
    print(f"{options.directory}/base and {options.directory}/refiner")
    return 0


if __name__ == "__main__":
    sys.exit(main())
