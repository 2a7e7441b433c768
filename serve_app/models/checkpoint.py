"""Checkpoints in diffusers' folder layout: found, checked, and loaded a component at a time.

Only safetensors are read. A folder is checked without reading a weight: file sizes and headers tell a
missing or broken file, the configurations tell components that don't fit each other.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.config.settings import AppConfig, ModelSource
from serve_app.request.errors import ConfigurationError

Role = Literal["base", "refiner"]

BASE_COMPONENTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae", "scheduler")
REFINER_COMPONENTS = ("text_encoder_2", "tokenizer_2", "unet", "scheduler")

_WEIGHTS_STEM = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}

_PROVENANCE = {"_name_or_path", "name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder on this machine."""

    folder: Path
    variant: str | None

    def path(self, component: str) -> Path:
        """A component's folder. A VAE published alone lies at the top."""
        if component == "vae" and not (self.folder / "vae").is_dir() and (self.folder / "config.json").is_file():
            return self.folder
        return self.folder / component

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration. Raises `ConfigurationError` where there is none."""
        return _read_json(
            self.path(component) / ("scheduler_config.json" if component == "scheduler" else "config.json")
        )

    def model_index(self) -> dict[str, Any]:
        return _read_json(self.folder / "model_index.json")

    def weights(self, component: str) -> Path:
        """A component's weights: one safetensors file, or the index of several."""
        stem, middle = _WEIGHTS_STEM[component], f".{self.variant}" if self.variant else ""
        folder = self.path(component)
        for name in (f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"):
            if (folder / name).is_file():
                return folder / name
        other = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".safetensors"))
        raise ConfigurationError(
            f"{folder}: no {stem}{middle}.safetensors"
            + (f"; there is {', '.join(other)}, and only safetensors of the given variant are read" if other else "")
        )

    def digest(self, components: Iterable[str]) -> str:
        """A hash over what the components compute with: equal digests are equal weights, settings and vocabularies.

        Weights of another variant that lie beside are not read, and neither is what a configuration says of
        the program that wrote it.
        """
        hasher = hashlib.sha256()
        for component in components:
            paths = [path for path in self.path(component).iterdir() if path.suffix in (".json", ".txt")]
            paths = [path for path in paths if ".index" not in path.name]
            if component in _WEIGHTS_STEM:
                paths += _weight_files(self.weights(component))
            for path in sorted(paths):
                hasher.update(path.name.encode() + b"\0")
                if path.name in ("config.json", "tokenizer_config.json"):
                    kept = {name: value for name, value in _read_json(path).items() if name not in _PROVENANCE}
                    hasher.update(json.dumps(kept, sort_keys=True).encode())
                    continue
                with path.open("rb") as file:
                    hasher.update(hashlib.file_digest(file, "sha256").digest())
        return hasher.hexdigest()


def locate(source: ModelSource, components: Sequence[str]) -> Checkpoint:
    """The folder of a checkpoint. Of a hub id only the named components are fetched, safetensors only."""
    if source.folder is not None:
        return Checkpoint(source.folder, source.variant)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    middle = f".{source.variant}" if source.variant else ""
    patterns = ["model_index.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.txt"]
        if component in _WEIGHTS_STEM:
            stem = _WEIGHTS_STEM[component]
            patterns += [f"{component}/{stem}{middle}.safetensors", f"{component}/{stem}{middle}-*.safetensors"]
        if component == "vae":
            patterns += ["config.json", f"diffusion_pytorch_model{middle}.safetensors"]
    assert source.hub_id is not None
    try:
        folder = snapshot_download(source.hub_id, revision=source.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(f"{source}: can't be fetched from the hub: {reason}") from None
    return Checkpoint(Path(folder), source.variant)


def check(checkpoint: Checkpoint, components: Sequence[str], role: Role = "base") -> None:
    """Raises `ConfigurationError`, one line, where a component is missing, broken or doesn't fit its role."""
    folder = checkpoint.folder
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: no such folder")
    for component in components:
        if not checkpoint.path(component).is_dir():
            raise ConfigurationError(f"{folder}: no {component} folder")
        if component.startswith("tokenizer"):
            _check_tokenizer(checkpoint.path(component))
            continue
        config = checkpoint.config(component)
        if component == "scheduler":
            continue
        _check_weights(checkpoint.weights(component))
        if component == "unet":
            _check_unet(checkpoint, config, role)


def check_sources(config: AppConfig, *, missing_ok: bool = False) -> None:
    """Checks the local folders of a configuration; a hub id is checked by the replica that fetches it.

    With `missing_ok` a folder that is not on this machine passes: a head node has no model volume.
    """
    base_components = tuple(c for c in BASE_COMPONENTS if c != "vae" or config.vae is None)
    sources: list[tuple[ModelSource | None, tuple[str, ...], Role]] = [
        (config.base, base_components, "base"),
        (config.refiner, REFINER_COMPONENTS, "refiner"),
        (config.vae, ("vae",), "base"),
    ]
    for source, components, role in sources:
        if source is None or source.folder is None or (missing_ok and not source.folder.exists()):
            continue
        check(locate(source, components), components, role)


def _check_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ConfigurationError(f"{folder}: no {name}")


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files behind `Checkpoint.weights`: itself, or what an index lists."""
    if path.suffix != ".json":
        return [path]
    return [path.parent / name for name in sorted(set(_read_json(path).get("weight_map", {}).values()))]


def _check_weights(path: Path) -> None:
    for file in _weight_files(path):
        if not file.is_file():
            raise ConfigurationError(f"{file}: missing, though {path.name} lists it")
        _check_safetensors(file)


def _check_safetensors(path: Path) -> None:
    # Format: 8 bytes little-endian header length, a JSON header with every tensor's byte range, the data.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            if 8 + length > size:
                raise ValueError
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{path}: not a safetensors file, or cut short") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ConfigurationError(f"{path}: {size} bytes where its header says {expected}: an incomplete copy")


def _check_unet(checkpoint: Checkpoint, unet: dict[str, Any], role: Role) -> None:
    where = checkpoint.path("unet")
    if unet.get("addition_embed_type") != "text_time" or unet.get("in_channels") != 4:
        raise ConfigurationError(f"{where}: not an SDXL text-to-image UNet (text_time, 4 latent channels)")
    if unet.get("time_cond_proj_dim") is not None:
        raise ConfigurationError(f"{where}: guidance-distilled UNets (time_cond_proj_dim) are not served")
    encoders = ("text_encoder", "text_encoder_2") if role == "base" else ("text_encoder_2",)
    if not all((checkpoint.path(name) / "config.json").is_file() for name in encoders):
        return  # a denoiser fetches its UNet alone; the encoders are the text encoder's to check
    configs = [checkpoint.config(name) for name in encoders]
    width = sum(config["hidden_size"] for config in configs)
    if unet.get("cross_attention_dim") not in (width, [width]):
        raise ConfigurationError(
            f"{where}: expects text embeddings {unet.get('cross_attention_dim')} wide, a {role}'s "
            f"{' and '.join(encoders)} give {width}"
        )
    scored = role == "refiner" and checkpoint.model_index().get("requires_aesthetics_score", False)
    time_ids = 5 if scored else 6
    needed = configs[-1]["projection_dim"] + time_ids * unet.get("addition_time_embed_dim", 0)
    if unet.get("projection_class_embeddings_input_dim") != needed:
        raise ConfigurationError(
            f"{where}: expects {unet.get('projection_class_embeddings_input_dim')} added values where the pooled text "
            f"and {time_ids} time ids give {needed} (requires_aesthetics_score is {bool(scored)})"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: not a JSON object")
    return content


# Loading. Each imports what it needs alone: a replica starts with one component's code and weights.


def load_unet(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The UNet, in eval mode on the CPU."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _load_diffusers(UNet2DConditionModel, checkpoint, "unet", dtype)


def load_vae(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The VAE, in eval mode on the CPU."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _load_diffusers(AutoencoderKL, checkpoint, "vae", dtype)


def load_scheduler(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own scheduler."""
    import diffusers.schedulers

    # As diffusers' pipelines do: of the class that model_index.json names, whichever saved the configuration.
    _, named = checkpoint.model_index().get("scheduler") or (None, None)
    name = named or checkpoint.config("scheduler").get("_class_name", "")
    scheduler_class = getattr(diffusers.schedulers, name, None)
    if scheduler_class is None:
        raise ConfigurationError(f"{checkpoint.folder / 'scheduler'}: diffusers has no scheduler {name!r}")
    return scheduler_class.from_pretrained(checkpoint.path("scheduler"), local_files_only=True)


def load_text_encoder(checkpoint: Checkpoint, component: str, dtype: Any) -> Any:
    """A CLIP text encoder, in eval mode on the CPU."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    encoder_class = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]
    checkpoint.weights(component)  # raises where transformers would say it at length
    model = encoder_class.from_pretrained(
        checkpoint.path(component),
        dtype=dtype,
        variant=checkpoint.variant,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint, component: str) -> Any:
    """A CLIP tokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(checkpoint.path(component), local_files_only=True)


def _load_diffusers(model_class: Any, checkpoint: Checkpoint, component: str, dtype: Any) -> Any:
    checkpoint.weights(component)
    model = model_class.from_pretrained(
        checkpoint.path(component),
        torch_dtype=dtype,
        variant=checkpoint.variant,
        use_safetensors=True,
        local_files_only=True,
    )
    return model.eval().requires_grad_(False)
