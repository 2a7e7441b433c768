"""`sdxl-serve profile`: measures this machine with the stages' own classes, a pass at a time.

Each entry of a table is a quantile over several passes (the median unless told), each taken as the engine takes it: the
scheduler chooses, the UNet runs, every image steps. The way between deployments, which one process can't show, is
given.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config.settings import AppConfig, SchedulingConfig
from serve_app.models import checkpoint
from serve_app.models.check import check_sources
from serve_app.pictures.files import encode_image
from serve_app.planning.command import parse_size
from serve_app.planning.passes import WARM_UP, load_denoiser, neighbours, time_passes, walk
from serve_app.planning.profile import Profile, parse_profile
from serve_app.request.errors import ConfigurationError
from serve_app.request.facts import ModelFacts
from serve_app.request.resolve import DEFAULT_QUALITY, resolve
from serve_app.request.schema import ImageRequest
from serve_app.runtime.tasks import Conditioning, DenoiseTask, Urgency, base_task, encode_task, refiner_task

if TYPE_CHECKING:
    from serve_app.config.serve_file import ServeConfig
    from serve_app.models.denoise import UNetRunner
    from serve_app.models.device import Compute
    from serve_app.pictures.arrays import Bytes, Floats

# Of a call between deployments on an idle machine: a graph of four takes 5 to 10 ms.
DEFAULT_HOP_S = 0.002
_PROMPT = "a red circle above a blue square on a white background"
_STEPS, _SPLIT = 25, 0.8  # of the picture whose decoding and file are timed
_NOW = Urgency()

Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """What to measure, and which of the repeats stands for all."""

    sizes: tuple[Size, ...] = ()  # the checkpoint's own, half and twice of it where none are given
    repeats: int = 7
    quantile: float = 0.5
    hop_s: float = DEFAULT_HOP_S
    cpu_time: bool = False  # the time that this process computed, in place of the time that passed
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.repeats < 1 or not 0 <= self.quantile <= 1 or not self.hop_s >= 0:
            raise ConfigurationError("repeats must be at least 1, the quantile within 0 to 1, hop_s not below 0")

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter

    def of(self, seconds: Sequence[float]) -> float:
        """The quantile, to the microsecond."""
        return round(sorted(seconds)[int(self.quantile * (len(seconds) - 1))], 6)


@dataclass(frozen=True)
class _Drawn:
    """One picture on its way through the stages: what each of them is given."""

    conditioning: Conditioning
    base: DenoiseTask
    refiner: DenoiseTask | None
    latents: Floats
    pixels: Bytes


def add_profile_flags(parser: argparse.ArgumentParser, default_config: Path) -> None:
    usual = Settings()
    parser.add_argument("--config", type=Path, default=default_config, help="whose checkpoints, dtypes and threads")
    parser.add_argument("-o", "--output", type=Path, default=Path("profile.json"), help="(default profile.json)")
    parser.add_argument("--size", nargs="+", default=[], help="sizes in pixels (the checkpoint's own, half and twice)")
    parser.add_argument(
        "--repeats", type=int, default=usual.repeats, help="passes for each entry (default %(default)s)"
    )
    parser.add_argument(
        "--quantile", type=float, default=usual.quantile, help="which of them counts (default 0.5, the median)"
    )
    parser.add_argument(
        "--hop-s", type=float, default=usual.hop_s, help="seconds of a call between deployments (default %(default)s)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="time computed, not time passed: on one thread of a busy machine"
    )
    parser.add_argument(
        "--in-graph", action="store_true", help="then start the graph and set the profile right by its passes"
    )
    parser.add_argument("--note", action="append", default=[], help="a line for the file on how it was made")
    parser.set_defaults(run=profile)


def profile(options: argparse.Namespace) -> int:
    """Measures, with a bar, and writes the file."""
    from serve_app.config.serve_file import read_serve_config

    if not options.output.parent.is_dir():
        raise ConfigurationError(f"{options.output.parent}: no such folder")
    sizes = tuple(parse_size(text) for text in options.size)
    settings = Settings(sizes, options.repeats, options.quantile, options.hop_s, options.cpu_time, tuple(options.note))
    if options.in_graph:
        from serve_app.graph.environment import set_for_own_ray

        set_for_own_ray()  # before a config file is read, which takes Ray's schema
    config = read_serve_config(options.config)
    found = measure(config.app, settings)
    if options.in_graph:
        found = _in_graph(found, config)
    options.output.write_text(json.dumps(found.model_dump(exclude_none=True), indent=2) + "\n", encoding="utf-8")
    print(options.output)
    return 0


def _in_graph(found: Profile, config: ServeConfig) -> Profile:
    from tqdm import tqdm

    from serve_app.models.device import free_memory
    from serve_app.planning.in_graph import measure_in_graph

    free_memory()  # the graph's replicas may share a GPU with this process
    with tqdm(total=0, unit="request", dynamic_ncols=True) as bar:
        return measure_in_graph(found, config, bar)


def measure(config: AppConfig, settings: Settings, quiet: bool = False) -> Profile:
    """A profile of this machine for a configuration. Loads all its models into this process."""
    from tqdm import tqdm

    with tqdm(unit="entry", dynamic_ncols=True, disable=quiet) as bar:
        return _Measurement(config, settings, bar).profile()


class _Measurement:
    def __init__(self, config: AppConfig, settings: Settings, bar: Any) -> None:
        from serve_app.models.decode import Decoder
        from serve_app.models.encode import TextEncoders

        self._config = config
        self._settings = settings
        self._bar = bar
        check_sources(config)
        names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        refiner = None if config.refiner is None else checkpoint.locate(config.refiner, names[1::2])
        self._encoders = TextEncoders(
            checkpoint.locate(config.base, names), refiner, self._computing(config.text_encoder)
        )
        self._base = load_denoiser(config, "denoise")
        self._refiner = None if config.refiner is None else load_denoiser(config, "refine")
        vae = config.vae or config.base
        self._decoder = Decoder(checkpoint.locate(vae, ("vae",)), self._computing(config.vae_decoder))

    @staticmethod
    def _computing(stage: SchedulingConfig) -> Compute:
        """Sets this process's threads as a replica of the stage sets its own."""
        from serve_app.models.device import set_up

        return set_up(stage, gpu_fraction=1.0)

    def profile(self) -> Profile:
        if self._settings.cpu_time and not self._one_thread():
            raise ConfigurationError("--cpu-time: every stage must compute on the CPU with torch_threads: 1")
        config, settings = self._config, self._settings
        sizes = settings.sizes or self._usual_sizes()
        texts, pictures = _counts(config.text_encoder.max_batch_size), _counts(config.vae_decoder.max_batch_size)
        rows = {
            "denoise": _counts(config.base_denoiser.max_batch_rows),
            "refine": _counts(config.refiner_denoiser.max_batch_rows) if self._refiner else [],
        }
        entries = len(rows["denoise"]) + len(rows["refine"]) + len(pictures) + 2
        self._bar.total = len(self._prompt_encoders()) * len(texts) + len(sizes) * entries + 1

        encode = {name: self._encode(name, texts) for name in self._prompt_encoders()}
        drawn = {size: self._draw(size) for size in sizes}
        stages = {"encode": {"passes": encode, "max_batch_size": config.text_encoder.max_batch_size}}
        stages["denoise"] = self._denoise(self._base, [drawn[size].base for size in sizes], rows["denoise"])
        if self._refiner is not None:
            tasks = [task for size in sizes if (task := drawn[size].refiner) is not None]
            stages["refine"] = self._denoise(self._refiner, tasks, rows["refine"])
        self._computing(config.vae_decoder)
        stages["decode"] = {
            "passes": {_name(size): self._decode(drawn[size].latents, pictures) for size in sizes},
            "max_batch_size": config.vae_decoder.max_batch_size,
        }
        files = {_name(size): self._file(drawn[size].pixels) for size in sizes}
        cores = self._cores(drawn[sizes[0]].base)
        for name, settings_of in self._stage_settings().items():
            stages[name] |= {"policy": settings_of.policy, "patience": settings_of.patience}
            if (pixels := getattr(settings_of, "max_batch_pixels", None)) is not None:
                stages[name]["max_batch_pixels"] = pixels
        return parse_profile(
            {
                "made": self._provenance(),
                "hop_s": settings.hop_s,
                "cores": cores,
                **stages,
                "ingress": {
                    "files": files,
                    "threads": cores["count"] if cores else 1,
                    "max_images_in_flight": config.limits.max_images_in_flight,
                },
            }
        )

    def _stage_settings(self) -> dict[str, SchedulingConfig]:
        config = self._config
        stages = {"encode": config.text_encoder, "denoise": config.base_denoiser, "decode": config.vae_decoder}
        return stages if config.refiner is None else stages | {"refine": config.refiner_denoiser}

    def _one_thread(self) -> bool:
        """Whether every replica is one thread on the CPU."""
        stages = self._stage_settings().values()
        return all(s.torch_threads == 1 and self._computing(s).device.type == "cpu" for s in stages)

    def _usual_sizes(self) -> tuple[Size, ...]:
        own, limits = self._base.facts.native_size_px, self._config.limits
        sides = (side for side in (own, own // 2, own * 2) if limits.min_side_px <= side <= limits.max_side_px)
        return tuple((side, side) for side in sides if side**2 <= limits.max_pixels and side % 8 == 0)

    def _provenance(self) -> dict[str, Any]:
        from serve_app.models.device import describe

        compute = self._computing(self._config.base_denoiser)
        settings = self._settings
        return {
            "how": "measured",
            "machine": describe(compute) or f"{processor_name()}, {len(os.sched_getaffinity(0))} cores",
            "dtype": str(compute.dtype).removeprefix("torch."),
            "date": datetime.date.today().isoformat(),
            "notes": [
                f"sdxl-serve profile: quantile {settings.quantile:g} of {settings.repeats} passes for each entry, in "
                + ("processor time" if settings.cpu_time else "wall time"),
                f"hop_s is given, not measured: {settings.hop_s:g}",
                *settings.notes,
            ],
        }

    def _timed(self, what: str, run: Callable[[], object]) -> float:
        clock = self._settings.clock
        seconds = []
        for _ in range(WARM_UP + self._settings.repeats):
            started = clock()
            run()
            seconds.append(clock() - started)
        self._count(what)
        return self._settings.of(seconds[WARM_UP:])

    def _count(self, what: str) -> None:
        self._bar.set_description(what, refresh=False)
        self._bar.update()

    # The stages.

    def _prompt_encoders(self) -> list[Any]:
        """The encoders that every new prompt goes through; what is negative is soon in the cache."""
        jobs = self._encoders.jobs(encode_task(self._request(self._usual_sizes()[0]), _NOW))
        return list(dict.fromkeys(job.encoder for role, job in jobs.items() if "negative" not in role))

    def _encode(self, name: Any, counts: Sequence[int]) -> dict[str, float]:
        from serve_app.models.encode import TextJob

        self._computing(self._config.text_encoder)
        jobs = [TextJob(name, f"{_PROMPT} {number}") for number in range(counts[-1])]
        return {
            str(count): self._timed(f"encode {count}", partial(self._encoders.embed, jobs[:count])) for count in counts
        }

    def _request(self, size: Size) -> Any:
        facts = ModelFacts(
            self._encoders.facts, self._base.facts, None if self._refiner is None else self._refiner.facts
        )
        request = ImageRequest(
            prompt=_PROMPT,
            width=size[0],
            height=size[1],
            seed=0,
            num_inference_steps=_STEPS,
            high_noise_frac=_SPLIT if facts.refined else None,
        )
        return resolve(request, facts, self._config.limits)

    def _draw(self, size: Size) -> _Drawn:
        """Takes one picture through all stages, so that what is timed is real."""
        request = self._request(size)
        encode = encode_task(request, _NOW)
        jobs = self._encoders.jobs(encode)
        conditioning = self._encoders.assemble(
            encode, {role: self._encoders.embed([job])[0] for role, job in jobs.items()}
        )
        base = base_task(request, 0, conditioning, _NOW)
        latents = walk(self._base, base)
        refiner = None
        if self._refiner is not None:
            refiner = refiner_task(request, base, conditioning, latents, _NOW)
            latents = walk(self._refiner, refiner)
        (pixels,) = self._decoder.decode([latents.samples])
        if isinstance(pixels, Exception):
            raise pixels
        self._count(f"draw {_name(size)}")
        return _Drawn(conditioning, base, refiner, latents.samples, pixels)

    def _denoise(self, denoiser: UNetRunner, tasks: Sequence[DenoiseTask], counts: Sequence[int]) -> dict[str, Any]:
        """The tables and the costs beside the UNet of one denoiser."""
        refine = denoiser is self._refiner
        stage = self._config.refiner_denoiser if refine else self._config.base_denoiser
        self._computing(stage)
        passes: dict[str, dict[str, float]] = {}
        beside: dict[str, list[float]] = {"begin_s": [], "pass_s": [], "step_s": [], "finish_s": []}
        for task in tasks:
            size = (task.width, task.height)
            passes[_name(size)] = {}
            for rows in counts:
                times = time_passes(denoiser, task, rows, self._settings.repeats, self._settings.clock)
                passes[_name(size)][str(rows)] = self._settings.of(times.pop("forward"))
                for name, seconds in times.items():
                    beside[name] += seconds
                self._count(f"{'refine' if refine else 'denoise'} {_name(size)} {rows}")
        return {
            "passes": passes,
            "max_batch_rows": stage.max_batch_rows,
            **{name: self._settings.of(seconds) for name, seconds in beside.items()},
        }

    def _decode(self, latents: Floats, counts: Sequence[int]) -> dict[str, float]:
        return {
            str(count): self._timed(f"decode {count}", partial(self._decoder.decode, [latents] * count))
            for count in counts
        }

    def _file(self, pixels: Bytes) -> float:
        return self._timed("file", lambda: encode_image(pixels, "png", DEFAULT_QUALITY, {"prompt": _PROMPT}))

    def _cores(self, task: DenoiseTask) -> dict[str, Any] | None:
        """How replicas of one thread each share this machine's cores; None where they don't."""
        count = len(os.sched_getaffinity(0))
        slowdown = 1.0
        if self._one_thread() and count > 1:
            rows = self._config.base_denoiser.max_batch_rows
            settings = self._settings
            alone = settings.of(time_passes(self._base, task, rows, settings.repeats, settings.clock)["forward"])
            with neighbours(self._config, task, count - 1):
                beside = settings.of(time_passes(self._base, task, rows, settings.repeats, settings.clock)["forward"])
            slowdown = round(max(beside / alone, 1.0), 3)
        self._count("cores")
        return {"count": count, "slowdown": slowdown} if self._one_thread() else None


def _counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts if most == 1 else [*counts, most]


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def processor_name() -> str:
    """The model of this machine's processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
