"""Weights against what a model needs: names, shapes and types, read from safetensors headers.

What a model needs is asked of the libraries themselves, which build it on torch's meta device, without memory and
without weights. transformers draws at random what a file lacks, or holds in another shape, and only warns; a text
encoder loaded so draws another picture on each replica. So whatever is missing or mis-shaped refuses the file.

Weights that the model has no place for are another matter. diffusers and transformers leave them out, and published
checkpoints are full of harmless ones (position ids, a watermarker's keys, the vision half of a CLIP): those are told
in a log line. But where their names show that the file was saved in another form (a wrapper, an adapter, a quantiser,
another library), what is drawn without them is not what the file holds: those refuse it, and the line names the form.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from serve_app.models.checkpoint import Checkpoint
from serve_app.models.files import Entry, refusing
from serve_app.request.errors import ConfigurationError

logger = logging.getLogger("ray.serve")

_LDM = "LDM (single-file) key names; convert with diffusers' from_single_file and save_pretrained"
# Forms that weights are saved in, by names that the model itself has no place for.
_FORMS = (
    (r"(^|\.)_orig_mod\.", "torch.compile's `_orig_mod.` names; save the model within, as in `unet._orig_mod`"),
    (
        r"\.(absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.",
        "weights quantised by bitsandbytes, which are not served",
    ),
    (
        r"\.(weight_scale(_2)?|scale_weight|qweight|qzeros|weight\._(data|scale))$|^scaled_fp8$",
        "quantised weights with scales of their own, which are not served",
    ),
    (r"\.base_layer\.|^base_model\.model\.", "PEFT's `base_layer` names; merge the adapter before saving"),
    (r"(^|[._])lora_", "an adapter's (LoRA) weights; merge it before saving"),
    (r"^encoder_hid_proj\.|_ip\.", "an IP-Adapter's weights, which are not served"),
    (r"motion_modules\.", "AnimateDiff's motion modules, which are not served"),
    (r"^(model\.diffusion_model|first_stage_model|conditioner\.embedders|cond_stage_model)\.", _LDM),
    (r"^(input_blocks|middle_block|output_blocks)\.\d|^(encoder\.down|decoder\.up)\.\d|resblocks\.\d", _LDM),
)
_TINY_VAE = "the names of a tiny autoencoder (TAESD), which is not served"


@dataclass(frozen=True)
class Fit:
    """How weights fit a model."""

    missing: Collection[str]
    misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]  # as it is, as it should be
    foreign: Collection[str]  # the model has no place for them


def compare(needed: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> Fit:
    """Names and shapes that a model needs against those of a file."""
    return Fit(
        missing=needed.keys() - found.keys(),
        misshaped={
            name: (found[name], needed[name]) for name in needed.keys() & found.keys() if found[name] != needed[name]
        },
        foreign=found.keys() - needed.keys(),
    )


def fault(fit: Fit, component: str) -> str | None:
    """What is wrong with weights, in one line; None where they serve."""
    form = _form(fit, component)
    if form is not None:
        return form
    if component == "vae" and fit.missing and all(re.match("(encoder|quant_conv)\\.", name) for name in fit.missing):
        return f"a decoder alone: the encoder's {len(fit.missing)} weights are missing, which previews need"
    if fit.missing:
        return f"lacks weights that its config.json asks for: {_some(fit.missing)}"
    if fit.misshaped:
        name = min(fit.misshaped)
        found, needed = fit.misshaped[name]
        more = f", and {len(fit.misshaped) - 1} more" if len(fit.misshaped) > 1 else ""
        return f"{name} is {found} where its config.json asks for {needed}{more}"
    return None


def _form(fit: Fit, component: str) -> str | None:
    """The form that weights were saved in where it is not the model's own."""
    for pattern, form in _FORMS:
        if any(re.search(pattern, name) for name in fit.foreign):
            return form
    if component == "vae" and fit.missing and any(re.match(r"(en|de)coder\.layers\.\d", name) for name in fit.foreign):
        return _TINY_VAE
    if fit.missing:
        some = min(fit.missing)
        for name in sorted(fit.foreign):
            if name.endswith(f".{some}"):
                return f"names that all begin with `{name.removesuffix(some)}`; save the model within"
    return None


def model_class(component: str) -> Any:
    """diffusers' class of a UNet or a VAE."""
    if component == "unet":
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL


def encoder_class(component: str) -> Any:
    """transformers' class of a text encoder."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}[component]


def check_weights(checkpoint: Checkpoint, component: str) -> None:
    """Compares the weights of a UNet, a VAE or a text encoder with its model, from headers alone.

    Raises `ConfigurationError`, one line.
    """
    path = checkpoint.weights(component)
    header = checkpoint.header(component)
    check_types(path, header)
    if component in ("unet", "vae"):
        model, found = _diffusers_model(checkpoint, component), {name: entry.shape for name, entry in header.items()}
        if path.suffix != ".json":
            # As from_pretrained does, of whole files alone: the names that attention had in 2022.
            model._fix_state_dict_keys_on_load(found)
        fit = compare({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, found)
    else:
        with refusing(checkpoint.path(component)), quiet():
            # On the meta device transformers reads headers alone, and applies its own renamings.
            _, info = encoder_class(component).from_pretrained(
                checkpoint.path(component),
                device_map="meta",
                variant=checkpoint.variant_of(component),
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        fit = fit_of(info)
    judge(fit, path, component)


def judge(fit: Fit, path: Path, component: str) -> None:
    """Raises `ConfigurationError` where weights don't serve; tells in the log which are left out."""
    if line := fault(fit, component):
        raise ConfigurationError(f"{path}: {line}")
    if fit.foreign:
        logger.warning("%s: weights that the model has no place for are left out: %s", path, _some(fit.foreign))


def fit_of(info: Mapping[str, Any]) -> Fit:
    """The loading info of `from_pretrained`."""
    return Fit(
        missing=set(info["missing_keys"]),
        misshaped={name: (tuple(found), tuple(needed)) for name, found, needed in info["mismatched_keys"]},
        foreign=set(info["unexpected_keys"]),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries print of a checkpoint as they read it: bars, names, keys of another class's settings.

    What they say of weights is judged here, and what they raise is one line.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(diffusers_verbosity)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _diffusers_model(checkpoint: Checkpoint, component: str) -> Any:
    kind = model_class(component)
    with refusing(checkpoint.path(component) / "config.json"), quiet(), torch.device("meta"):
        return kind.from_config(kind.load_config(checkpoint.path(component), local_files_only=True))


def check_types(path: Path, header: Mapping[str, Entry]) -> None:
    """Refuses integers, which are no weights of SDXL: position ids apart, a quantiser wrote them."""
    for name, entry in header.items():
        if name.endswith(".weight") and entry.dtype[0] in "IU":
            _, form = next(
                (form for form in _FORMS[1:3] if any(re.search(form[0], name) for name in header)), _FORMS[2]
            )
            raise ConfigurationError(f"{path}: {form} ({name} is of type {entry.dtype})")


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:3]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
