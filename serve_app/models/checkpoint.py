"""Checkpoints in diffusers' folder layout: where they are, and which files of theirs are read. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.config.settings import ModelSource
from serve_app.models.files import Entry, is_dangling, one_line, read_header, read_json
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
    hub: str = ""  # what it was fetched from; "" for a folder

    def path(self, component: str) -> Path:
        """A component's folder. A VAE published alone lies at the top."""
        if component == "vae" and not (self.folder / "vae").is_dir() and (self.folder / "config.json").is_file():
            return self.folder
        return self.folder / component

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration. Raises `ConfigurationError` where there is none."""
        return read_json(
            self.path(component) / ("scheduler_config.json" if component == "scheduler" else "config.json")
        )

    def model_index(self) -> dict[str, Any]:
        return read_json(self.folder / "model_index.json")

    def variant_of(self, component: str) -> str | None:
        """The variant of a component's weights: the checkpoint's, or the full ones where only others have it.

        So diffusers does. A variant that no component has is a mistake: then it stands, and its file is missing.
        """
        if self.variant is None or self.has(component, self.variant) or not self.has(component, None):
            return self.variant
        return None if any(self.has(other, self.variant) for other in _WEIGHTS_STEM) else self.variant

    def has(self, component: str, variant: str | None) -> bool:
        """Whether a component's weights are there in a variant; None is the full ones. Others need none."""
        if component not in _WEIGHTS_STEM:
            return self.path(component).is_dir()
        return any(path.is_file() or is_dangling(path) for path in self._candidates(component, variant))

    def weights(self, component: str) -> Path:
        """A component's weights: one safetensors file, or the index of several."""
        candidates = self._candidates(component, self.variant_of(component))
        for path in candidates:
            if path.is_file():
                return path
            if is_dangling(path):
                read_header(path)  # raises, and says so
        folder = self.path(component)
        whole, index = sorted((path.name for path in candidates), key=len)
        other = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".safetensors")
        )
        if any("-00001-of-" in name and name.endswith(".safetensors") for name in other):
            reason = f"; there are shards, {', '.join(other[:2])}, but no {index} that lists them"
        elif other:
            reason = f"; there is {', '.join(other)}, and only safetensors of the given variant are read"
        else:
            reason = self.not_given
        raise ConfigurationError(f"{folder}: no {whole}{reason}")

    def header(self, component: str) -> dict[str, Entry]:
        """The tensors of a component's weights, of all its files. Raises `ConfigurationError` where one isn't whole."""
        path = self.weights(component)
        if path.suffix != ".json":
            return read_header(path)
        header: dict[str, Entry] = {}
        listed = _weight_map(path)
        for file in _weight_files(path):
            if not file.is_file() and not is_dangling(file):
                raise ConfigurationError(f"{file}: missing, though {path.name} lists it")
            held = read_header(file)
            for name in (name for name, place in listed.items() if place == file.name and name not in held):
                raise ConfigurationError(f"{file}: has no {name}, though {path.name} says so")
            header |= held
        return header

    @property
    def not_given(self) -> str:
        """What to add where a file is missing: who else was asked for it."""
        return f"; neither the hub nor this machine's cache gave it of {self.hub}" if self.hub else ""

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
                    kept = {name: value for name, value in read_json(path).items() if name not in _PROVENANCE}
                    hasher.update(json.dumps(kept, sort_keys=True).encode())
                    continue
                with path.open("rb") as file:
                    hasher.update(hashlib.file_digest(file, "sha256").digest())
        return hasher.hexdigest()

    def _candidates(self, component: str, variant: str | None) -> tuple[Path, ...]:
        """Where a component's weights may lie, in the order that its library looks."""
        stem, middle = _WEIGHTS_STEM[component], _middle(variant)
        whole, index = f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"
        # Where both are there, diffusers takes the index and transformers the file.
        names = (index, whole) if stem == "diffusion_pytorch_model" else (whole, index)
        return tuple(self.path(component) / name for name in names)


def locate(source: ModelSource, components: Sequence[str], configs: Sequence[str] = ()) -> Checkpoint:
    """The folder of a checkpoint. Of a hub id only the named components are fetched, safetensors only.

    `configs`: components whose configurations alone are fetched, to check that the others fit them. Raises
    `ConfigurationError` where the hub gives nothing and the cache holds nothing of it.
    """
    if source.folder is not None:
        return Checkpoint(source.folder, source.variant)
    checkpoint = Checkpoint(_fetch(source, components, configs, source.variant), source.variant, str(source))
    weighted = [component for component in components if component in _WEIGHTS_STEM]
    full = [component for component in weighted if not checkpoint.has(component, source.variant)]
    if source.variant is None or not full or not _has_variant(source, checkpoint):
        return checkpoint
    _fetch(source, full, (), None)  # as diffusers does where a variant is published for some components only
    return checkpoint if len(full) < len(weighted) else Checkpoint(checkpoint.folder, None, str(source))


def _fetch(source: ModelSource, components: Sequence[str], configs: Sequence[str], variant: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    middle = _middle(variant)
    patterns = ["model_index.json", *(f"{component}/config.json" for component in configs)]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.txt"]
        if component in _WEIGHTS_STEM:
            stem = _WEIGHTS_STEM[component]
            patterns += [f"{component}/{stem}{middle}.safetensors", f"{component}/{stem}{middle}-*.safetensors"]
            patterns += [f"{component}/{stem}-*-of-*{middle}.safetensors"]  # shards' other spelling
        if component == "vae":
            patterns += ["config.json", f"diffusion_pytorch_model{middle}.safetensors"]
    assert source.hub_id is not None
    try:
        return Path(snapshot_download(source.hub_id, revision=source.revision, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise ConfigurationError(f"{source}: not in this machine's cache, and the hub can't be reached") from None
    except (OSError, ValueError) as error:  # huggingface_hub's own are among them
        raise ConfigurationError(f"{source}: can't be fetched from the hub: {_hub_reason(error)}") from None


def _hub_reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated: its terms must be accepted, and HF_TOKEN set"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and HF_TOKEN is not set"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    return one_line(error)


def _has_variant(source: ModelSource, checkpoint: Checkpoint) -> bool:
    """Whether any component of a hub's checkpoint has weights of the given variant."""
    from huggingface_hub import HfApi

    if any(checkpoint.has(component, source.variant) for component in _WEIGHTS_STEM):
        return True
    assert source.hub_id is not None
    try:
        names = HfApi().list_repo_files(source.hub_id, revision=source.revision)
    except Exception:  # the hub's errors and its HTTP client's: without the hub, what the cache holds decides
        return False
    return any(f"{_middle(source.variant)}." in name and name.endswith(".safetensors") for name in names)


def _middle(variant: str | None) -> str:
    return f".{variant}" if variant else ""


def _weight_map(index: Path) -> dict[str, str]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(place, str) for place in listed.values()):
        raise ConfigurationError(f"{index}: has no weight_map of names to files")
    return listed


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files behind `Checkpoint.weights`: itself, or what an index lists."""
    if path.suffix != ".json":
        return [path]
    return [path.parent / name for name in sorted(set(_weight_map(path).values()))]
