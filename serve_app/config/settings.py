"""The application's own settings: the `args:` of the application in a Ray Serve config file.

Deployment options (replicas, GPU fractions, autoscaling) stand in Ray's own `deployments:` list.
Everything here is strict: an unknown key is an error that names it.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.request.errors import ConfigurationError, first_fault
from serve_app.request.limits import Limits
from serve_app.request.schema import StageName

_EMBEDDED = ("embedded:base", "embedded:refiner")
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
APP_NAME = "sdxl"
DEPLOYMENT_OF: dict[StageName, str] = {
    "encode": "TextEncoder",
    "denoise": "BaseDenoiser",
    "refine": "Refiner",
    "decode": "VaeDecoder",
}
DEPLOYMENTS = (*DEPLOYMENT_OF.values(), "Ingress")

_LABEL = r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*", re.ASCII)
_ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://({_LABEL}(\.{_LABEL})*|\[[0-9a-f:.]+\])(:[1-9][0-9]{{0,4}})?", re.ASCII)
_DEFAULT_PORTS = {"http": "80", "https": "443"}
# The keys of `args` that say how a deployment computes.
COMPUTE_OF = {
    "text_encoder": "TextEncoder",
    "base_denoiser": "BaseDenoiser",
    "refiner_denoiser": "Refiner",
    "vae_decoder": "VaeDecoder",
}

PolicyName = Literal["first_come", "shortest_remaining", "earliest_deadline", "least_slack"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSource(_Strict):
    """Where a checkpoint in diffusers' folder layout comes from: exactly one of `path` and `hub_id`."""

    path: str | None = Field(None, description="A local folder; `embedded:base` and `embedded:refiner` name ours.")
    hub_id: str | None = Field(
        None, description="A Hugging Face hub id such as stabilityai/stable-diffusion-xl-base-1.0."
    )
    revision: str | None = Field(None, description="The commit of the hub id, 40 hex digits: pinned, never a branch.")
    variant: str | None = Field(None, description="Weight file variant, e.g. fp16.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("needs exactly one of path and hub_id")
        if self.hub_id is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.hub_id):
            raise ValueError(f"hub_id {self.hub_id!r} is no hub id, such as owner/name")
        if self.hub_id is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(f"hub_id {self.hub_id} needs a revision of 40 hex digits")
        if self.path is not None and self.revision is not None:
            raise ValueError("revision goes with hub_id, not with path")
        if self.path in ("", "embedded:") or ((self.path or "").startswith("embedded:") and self.path not in _EMBEDDED):
            raise ValueError(f"path {self.path!r} names nothing; embedded are {' and '.join(_EMBEDDED)}")
        return self

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a hub id."""
        if self.path is None:
            return None
        if self.path.startswith("embedded:"):
            return DEMO_FOLDER / self.path.removeprefix("embedded:")
        return Path(self.path).expanduser()

    def __str__(self) -> str:
        return self.path or f"{self.hub_id}@{(self.revision or '')[:8]}"


class ComputeConfig(_Strict):
    """How a tensor stage computes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where the replica has a GPU.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on GPUs that have it, float16 on others, float32 on the CPU."
    )
    torch_threads: int | None = Field(None, ge=1, description="CPU threads of a replica; absent, PyTorch chooses.")


class SchedulingConfig(ComputeConfig):
    """Who goes first where not all fit into one forward pass; see `runtime/scheduling.py`."""

    policy: PolicyName = Field(
        "first_come", description="The order of equally urgent work; priority and deadline go before it."
    )
    patience: int = Field(
        100, ge=1, description="How many forward passes may go to work that came later before what waits goes first."
    )
    first_pass_timeout_s: int = Field(
        300,
        ge=20,
        description="Seconds after which the first forward pass of its size counts as hung and the replica is "
        "replaced; a later one after ten times the slowest of its size, at least 20.",
    )


class DenoiserConfig(SchedulingConfig):
    max_batch_rows: int = Field(
        16, ge=2, description="Rows of one UNet forward pass; a guided image takes two, an unguided one."
    )
    max_batch_pixels: int | None = Field(
        None, ge=1, description="Rows x picture pixels of one forward pass; absent, rows alone bound it."
    )
    trace: Literal["auto", True, False] = Field(
        "auto",
        description="Run the UNet as a TorchScript trace of itself: the same operators, without Python between them. "
        "auto: on the CPU.",
    )


class MicroBatchConfig(SchedulingConfig):
    max_batch_size: int = Field(8, ge=1, description="Items of one forward pass.")


class VaeDecoderConfig(MicroBatchConfig):
    max_batch_pixels: int | None = Field(None, ge=1, description="Picture pixels of one forward pass.")


class TextEncoderConfig(MicroBatchConfig):
    cache_entries: int = Field(512, ge=0, description="Prompts whose embeddings are kept, each about 0.5 MB.")


class HttpConfig(_Strict):
    """Who may ask over HTTP, and for how long; see `http/guard.py` and docs/security.md."""

    allowed_hosts: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Names that a request's Host may have besides localhost, addresses, and the name in "
        "`http_options.host`: `sdxl.example.com`, `*.example.com` for all below it, `*` for any. Others are refused "
        "(403): a web page can make its own name lead here.",
    )
    loopback: bool | None = Field(
        None,
        description="Nobody but this machine's own users reaches HTTP: then webui's progress and interrupt need no "
        "id_task. Absent, it holds where Serve's proxies bind a loopback address. `false` is for a gateway on the same "
        "machine that lets others in; `true` adds nothing to a loopback address and holds at no other.",
    )
    cors_origins: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Web pages of other origins that may use the service, such as `https://app.example.com`; `*` is "
        "any page that a user's browser opens. Requests of other pages are refused (403).",
    )
    body_timeout_s: float = Field(
        10.0, ge=0.1, le=3600.0, description="Seconds within which a request's body must have arrived (408)."
    )
    request_timeout_s: float = Field(
        600.0,
        ge=1.0,
        description="The most that a client's `x-request-timeout-seconds` may ask for. Where `http_options` has "
        "`request_timeout_s`, the two must be equal; of a cluster's own HTTP options the smaller one holds.",
    )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if host != "*" and not _HOST.fullmatch(host):
                raise ValueError(f"{host!r} is no host name; they stand without scheme, port and path, in lower case")
        return hosts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin such as https://app.example.com, without a path")
            scheme, port = origin.partition(":")[0], re.search(r":([0-9]+)$", origin)
            if port and port[1] == _DEFAULT_PORTS.get(scheme):
                raise ValueError(f"{origin!r}: browsers write it without {scheme}'s own port: drop :{port[1]}")
            if port and int(port[1]) > 65535:
                raise ValueError(f"{origin!r} has no port: they end at 65535")
        return origins


class AppConfig(_Strict):
    """The whole application."""

    base: ModelSource = ModelSource(path="embedded:base")
    refiner: ModelSource | None = Field(None, description="Absent, the base draws the whole trajectory.")
    vae: ModelSource | None = Field(
        None, description="A checkpoint, or a VAE published alone, that replaces the base's VAE."
    )
    model_names: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = Field(
        ("sdxl", "stabilityai-stable-diffusion-xl-base-1.0"),
        description="Names the service answers to; the first is its own.",
    )
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    base_denoiser: DenoiserConfig = DenoiserConfig()
    refiner_denoiser: DenoiserConfig = DenoiserConfig()
    vae_decoder: VaeDecoderConfig = VaeDecoderConfig()
    limits: Limits = Limits()
    http: HttpConfig = HttpConfig()
    max_ongoing_requests: int = Field(
        512,
        ge=1,
        description="Requests a replica, of a tensor stage or the ingress, holds at once, running and waiting. Ray's "
        "default of 5 would cap every batch at 5.",
    )

    @property
    def checkpoints(self) -> str:
        """Equal for two configurations that load the same."""
        return self.model_dump_json(include={"base", "refiner", "vae"})

    def listening_on(self, host: str | None, request_timeout_s: float | None = None) -> AppConfig:
        """The same behind an HTTP proxy that binds this host and gives a request so many seconds; None: not known.

        A name is among those allowed. `http.loopback` is true on a loopback address unless it was set to false, and
        false elsewhere, whatever was set. The smaller `request_timeout_s` holds.
        """
        name = (host or "").lower()
        told: dict[str, Any] = {"loopback": _is_loopback(name) and self.http.loopback is not False}
        if request_timeout_s:  # Serve takes 0 for none
            told["request_timeout_s"] = min(request_timeout_s, self.http.request_timeout_s)
        if _HOST.fullmatch(name) and not _is_address(name) and name not in self.http.allowed_hosts:
            told["allowed_hosts"] = (*self.http.allowed_hosts, name)
        return self.model_copy(update={"http": self.http.model_copy(update=told)})

    @model_validator(mode="after")
    def _the_largest_picture_fits_a_batch(self) -> AppConfig:
        needs = {
            "base_denoiser": (self.base_denoiser.max_batch_pixels, 2),  # with guidance
            "refiner_denoiser": (self.refiner_denoiser.max_batch_pixels, 2),
            "vae_decoder": (self.vae_decoder.max_batch_pixels, 1),
        }
        for stage, (pixels, rows) in needs.items():
            if pixels is not None and pixels < rows * self.limits.max_pixels:
                raise ValueError(
                    f"{stage}.max_batch_pixels is {pixels}, below {rows * self.limits.max_pixels}: "
                    f"{rows} row{'s' * (rows > 1)} of limits.max_pixels ({self.limits.max_pixels})"
                )
        return self

    @model_validator(mode="after")
    def _the_refiners_settings_have_a_refiner(self) -> AppConfig:
        if self.refiner is None and "refiner_denoiser" in self.model_fields_set:
            raise ValueError("refiner_denoiser is given, but refiner is absent")
        return self

    @model_validator(mode="after")
    def _batches_are_not_capped(self) -> AppConfig:
        check_max_ongoing_requests(self, self.max_ongoing_requests, "max_ongoing_requests")
        return self


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_max_ongoing_requests(config: AppConfig, value: int, where: str, ingress_replicas: int = 1) -> None:
    """A replica must be allowed to hold a full batch and the queue behind it, or Ray caps the batch silently.

    Raises `ValueError`. The queue is what all replicas of the ingress may have taken in.
    """
    largest_batch = max(
        config.base_denoiser.max_batch_rows,
        config.refiner_denoiser.max_batch_rows,
        config.text_encoder.max_batch_size,
        config.vae_decoder.max_batch_size,
    )
    needed = largest_batch + ingress_replicas * config.limits.max_images_in_flight
    if value < needed:
        raise ValueError(
            f"{where} is {value}, below {needed}: the largest batch ({largest_batch}) plus "
            f"limits.max_images_in_flight ({config.limits.max_images_in_flight})"
            + (f" for each of {ingress_replicas} ingress replicas" if ingress_replicas > 1 else "")
            + "; it would cap batches silently"
        )


def parse_config(args: dict[str, Any]) -> AppConfig:
    """Validates an application's `args`; raises `ConfigurationError`, one line that names the key at fault."""
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        place, reason = first_fault(error)
        raise ConfigurationError(f"{'.'.join(map(str, ('args', *place)))}: {reason}") from None
