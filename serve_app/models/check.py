"""Checkpoints checked before anything is loaded: what their files and configurations tell, and what the libraries make
of them without a weight.

`check` reads sizes, headers and JSON, and loads no library: the builder runs it, on a head node too. `check_thoroughly`
also has diffusers and transformers build what the configurations describe, without weights; `sdxl-serve check` runs it,
and a replica does the same as it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.config.settings import AppConfig, ModelSource
from serve_app.models.checkpoint import BASE_COMPONENTS, REFINER_COMPONENTS, Checkpoint, Role, locate
from serve_app.models.files import read_json, refusing
from serve_app.request.errors import ConfigurationError

# SDXL's latents: what one UNet draws and the VAE of any other checkpoint decodes.
LATENT_CHANNELS, PIXELS_A_LATENT = 4, 8
_CLIP_DEFAULT_WIDTH = 512  # transformers', of hidden_size and projection_dim

# The classes that are run, by the name that model_index.json gives a component.
_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
}
# The most tokens that a CLIP was ever made to read is some hundreds; transformers writes 10^30 where nothing is said.
_MOST_TOKENS = 100_000

_FROM_SINGLE_FILE = "diffusers' from_single_file reads it, and save_pretrained writes the folder"

_Sources = list[tuple[ModelSource, tuple[str, ...], Role]]


def check(checkpoint: Checkpoint, components: Sequence[str], role: Role = "base") -> None:
    """Raises `ConfigurationError`, one line, where a component is missing, broken or doesn't fit its role."""
    folder = checkpoint.folder
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: {_no_folder(folder)}")
    index = _check_index(checkpoint, components)
    for component in components:
        if not checkpoint.path(component).is_dir():
            what = _other_kind(folder) or _other_pipeline(index) or checkpoint.not_given
            raise ConfigurationError(f"{folder}: no {component} folder{what}")
        with refusing(checkpoint.path(component)):  # values of a type that nobody thought of
            _check_component(checkpoint, component, role)


def check_thoroughly(checkpoint: Checkpoint, components: Sequence[str], role: Role = "base") -> None:
    """`check`, and what diffusers and transformers make of the components, without their weights."""
    check(checkpoint, components, role)
    from serve_app.models.loading import load_scheduler, load_tokenizer
    from serve_app.models.sampling import try_out
    from serve_app.models.weights import check_weights

    for component in components:
        if component == "scheduler":
            with refusing(checkpoint.path(component)):
                try_out(load_scheduler(checkpoint))
        elif component.startswith("tokenizer"):
            load_tokenizer(checkpoint, component)
        else:
            check_weights(checkpoint, component)


def check_sources(config: AppConfig, *, missing_ok: bool = False, thorough: bool = False) -> list[ModelSource]:
    """Checks the checkpoints of a configuration that are on this machine; returns those that are not.

    With `missing_ok` a folder that is not here passes: a head node has no model volume. A hub id is looked for in this
    machine's cache with `thorough` alone, and where that holds only a part of it, it is not here: the replica that
    fetches it checks it.
    """
    one: Callable[[Checkpoint, Sequence[str], Role], None] = check_thoroughly if thorough else check
    absent = []
    for source, components, role in _sources(config):
        if source.folder is not None:
            if not missing_ok or source.folder.exists():
                one(locate(source, components), components, role)
            continue
        cached = _cached(source, components) if thorough else None
        if cached is None:
            absent.append(source)
        else:
            one(cached, components, role)
    return absent


def _sources(config: AppConfig) -> _Sources:
    base_components = tuple(c for c in BASE_COMPONENTS if c != "vae" or config.vae is None)
    found: _Sources = [(config.base, base_components, "base")]
    if config.refiner is not None:
        found.append((config.refiner, REFINER_COMPONENTS, "refiner"))
    if config.vae is not None:
        found.append((config.vae, ("vae",), "base"))
    return found


def _cached(source: ModelSource, components: Sequence[str]) -> Checkpoint | None:
    """A hub's checkpoint as this machine's cache holds it; None where not all of its components are there."""
    from huggingface_hub import snapshot_download

    assert source.hub_id is not None
    try:
        folder = Path(snapshot_download(source.hub_id, revision=source.revision, local_files_only=True))
    except (OSError, ValueError):  # huggingface_hub's own are among them
        return None
    checkpoint = Checkpoint(folder, source.variant, str(source))
    whole = all(checkpoint.has(component, checkpoint.variant_of(component)) for component in components)
    return checkpoint if whole else None


def _no_folder(folder: Path) -> str:
    if folder.is_file():
        return f"a single file, where a folder in diffusers' layout is wanted; {_FROM_SINGLE_FILE}"
    return "a link to a folder that is not there" if folder.is_symlink() else "no such folder"


def _other_kind(folder: Path) -> str:
    """What a folder without the wanted components is, as far as its files tell: "" or what follows a colon."""
    names = {path.name for path in folder.iterdir()}
    within = [path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/model_index.json")]
    if {"adapter_config.json", "pytorch_lora_weights.safetensors"} & names:
        return ": it holds a LoRA, an adapter and no checkpoint"
    if "MLmodel" in names:
        what = ": an MLflow model"
    elif any(folder.glob("*/model.onnx")):
        return ": an ONNX export, which is not served"
    elif any(name.startswith("checkpoint-") for name in names) or "optimizer.bin" in names:
        what = ": a training run's folder, without the pipeline that its end saves"
    else:
        what = ""
    if within:
        return f"{what}; {within[0]} holds a model_index.json: name that folder"
    single = sorted(name for name in names if name.endswith((".safetensors", ".ckpt")))
    if single and not what:
        return f": it holds a single file, {single[0]}; {_FROM_SINGLE_FILE}"
    return what


def _other_pipeline(index: dict[str, Any]) -> str:
    name = index.get("_class_name")
    return "" if not isinstance(name, str) or "XL" in name else f": its pipeline is {name}, not Stable Diffusion XL's"


def _check_index(checkpoint: Checkpoint, components: Sequence[str]) -> dict[str, Any]:
    """The checkpoint's model_index.json. A VAE given alone needs none."""
    path = checkpoint.folder / "model_index.json"
    if not path.exists() and not path.is_symlink():
        if tuple(components) == ("vae",):
            return {}
        what = _other_kind(checkpoint.folder) or checkpoint.not_given
        missing = [component for component in components if not checkpoint.path(component).is_dir()]
        raise ConfigurationError(
            f"{checkpoint.folder}: no model_index.json{f', no {missing[0]} folder' if missing else ''}{what}"
        )
    index = read_json(path)
    for component in components:
        if component not in index or not checkpoint.path(component).is_dir():
            continue
        library, name = _entry(path, index, component)
        if component == "scheduler" and library.split(".")[0] != "diffusers":
            raise ConfigurationError(f"{path}: takes the scheduler {name} from {library}; only diffusers' own are run")
        if component in _CLASSES and name not in _CLASSES[component]:
            raise ConfigurationError(
                f"{path}: {component} is of class {name}, where SDXL's is {_CLASSES[component][0]}{_known(name)}"
            )
    return index


def _entry(path: Path, index: dict[str, Any], component: str) -> tuple[str, str]:
    entry = index[component]
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        raise ConfigurationError(f"{path}: {component} is {entry}, no pair of a library and a class")
    return entry[0], entry[1]


def _known(name: str) -> str:
    return " (TAESD, the tiny VAE of previews)" if name == "AutoencoderTiny" else ""


def _check_component(checkpoint: Checkpoint, component: str, role: Role) -> None:
    if component.startswith("tokenizer"):
        _check_tokenizer(checkpoint.path(component))
        return
    config = checkpoint.config(component)
    if component == "scheduler":
        return
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ConfigurationError(f"{checkpoint.path(component)}: quantised weights ({method}), which are not served")
    if component == "vae":
        _check_vae(checkpoint.path(component), config)
    checkpoint.header(component)
    if component == "unet":
        _check_unet(checkpoint, config, role)


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        read_json(folder / "tokenizer.json")
    else:
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ConfigurationError(f"{folder}: no {name}")
        read_json(folder / "vocab.json")
    longest = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if not isinstance(longest, int) or longest > _MOST_TOKENS:
        raise ConfigurationError(
            f"{folder / 'tokenizer_config.json'}: no model_max_length, the tokens that its encoder reads"
        )


def _check_vae(where: Path, vae: dict[str, Any]) -> None:
    name = vae.get("_class_name", "AutoencoderKL")
    if name not in _CLASSES["vae"]:
        raise ConfigurationError(f"{where}: of class {name}, where SDXL's is AutoencoderKL{_known(name)}")
    channels, factor = vae.get("latent_channels", 4), 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
    if channels != LATENT_CHANNELS:
        raise ConfigurationError(f"{where}: latents of {channels} channels, where SDXL's have {LATENT_CHANNELS}")
    if factor != PIXELS_A_LATENT:
        raise ConfigurationError(
            f"{where}: one latent covers {factor} pixels of a side, where SDXL's cover {PIXELS_A_LATENT}"
        )


def _check_unet(checkpoint: Checkpoint, unet: dict[str, Any], role: Role) -> None:
    where = checkpoint.path("unet")
    if unet.get("addition_embed_type") != "text_time" or any(
        unet.get(name, LATENT_CHANNELS) != LATENT_CHANNELS for name in ("in_channels", "out_channels")
    ):
        raise ConfigurationError(f"{where}: not an SDXL text-to-image UNet (text_time, 4 latent channels)")
    if unet.get("time_cond_proj_dim") is not None:
        raise ConfigurationError(f"{where}: guidance-distilled UNets (time_cond_proj_dim) are not served")
    if unet.get("encoder_hid_dim_type") is not None:
        raise ConfigurationError(
            f"{where}: wants more than text (encoder_hid_dim_type is {unet['encoder_hid_dim_type']}): IP-Adapters and "
            "their like are not served"
        )
    side = unet.get("sample_size")  # the size of a picture whose request names none
    if not isinstance(side, int) or side < 1:
        raise ConfigurationError(f"{where}: sample_size is {side}, no number of latents a side")
    encoders = ("text_encoder", "text_encoder_2") if role == "base" else ("text_encoder_2",)
    if not all((checkpoint.path(name) / "config.json").is_file() for name in encoders):
        return  # a denoiser's checkpoint may hold its UNet alone; the encoders are the text encoder's to check
    configs = [_text_config(checkpoint.config(name)) for name in encoders]
    width = sum(config.get("hidden_size", _CLIP_DEFAULT_WIDTH) for config in configs)
    given = unet.get("cross_attention_dim")  # one number, or one for each block
    if not (set(given) == {width} if isinstance(given, list) else given == width):
        raise ConfigurationError(
            f"{where}: expects text embeddings {given} wide, a {role}'s {' and '.join(encoders)} give {width}"
        )
    scored = role == "refiner" and checkpoint.model_index().get("requires_aesthetics_score", False)
    time_ids = 5 if scored else 6
    pooled = configs[-1].get("projection_dim", _CLIP_DEFAULT_WIDTH)
    unsaid = "" if "projection_dim" in configs[-1] else f", projection_dim is absent from {encoders[-1]}/config.json"
    needed = pooled + time_ids * (unet.get("addition_time_embed_dim") or 0)
    if unet.get("projection_class_embeddings_input_dim") != needed:
        raise ConfigurationError(
            f"{where}: expects {unet.get('projection_class_embeddings_input_dim')} added values where the pooled text "
            f"and {time_ids} time ids give {needed} (requires_aesthetics_score is {bool(scored)}{unsaid})"
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's own settings: a whole CLIP's configuration holds them one level deeper."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config
