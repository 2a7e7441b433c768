"""Checkpoints loaded a component at a time. Each function imports what it needs alone: a replica starts with one
component's code and weights.

Weights are held against what the model needs before they are read, and what the libraries say of them afterwards must
agree: nothing is ever filled at random. All raise `ConfigurationError`, one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.models.checkpoint import Checkpoint
from serve_app.models.files import refusing
from serve_app.models.weights import check_types, check_weights, encoder_class, fit_of, judge, model_class, quiet
from serve_app.request.errors import ConfigurationError


def load_unet(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The UNet, in eval mode on the CPU."""
    return _load_diffusers(checkpoint, "unet", dtype)


def load_vae(checkpoint: Checkpoint, dtype: Any) -> Any:
    """The VAE, in eval mode on the CPU."""
    return _load_diffusers(checkpoint, "vae", dtype)


def load_scheduler(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own scheduler."""
    import diffusers.schedulers

    # As diffusers' pipelines do: of the class that model_index.json names, whichever saved the configuration.
    _, named = checkpoint.model_index().get("scheduler") or (None, None)
    name = named or checkpoint.config("scheduler").get("_class_name", "")
    folder = checkpoint.path("scheduler")
    scheduler_class = getattr(diffusers.schedulers, name, None)
    if scheduler_class is None:
        raise ConfigurationError(f"{folder}: diffusers has no scheduler {name!r}")
    with refusing(folder), quiet():
        scheduler = scheduler_class.from_pretrained(folder, local_files_only=True)
    if not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
        kind = "is for flow matching" if "Flow" in name else "is not for diffusion models like SDXL"
        raise ConfigurationError(f"{folder}: {name} {kind}: it scales neither noise nor a model's input")
    return scheduler


def load_text_encoder(checkpoint: Checkpoint, component: str, dtype: Any) -> Any:
    """A CLIP text encoder, in eval mode on the CPU."""
    path = checkpoint.weights(component)
    check_types(path, checkpoint.header(component))  # a file that is not whole is one line here, too
    with refusing(checkpoint.path(component)), quiet():
        model, info = encoder_class(component).from_pretrained(
            checkpoint.path(component),
            dtype=dtype,
            variant=checkpoint.variant_of(component),
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are looked for below
            output_loading_info=True,
        )
    judge(fit_of(info), path, component)
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint, component: str) -> Any:
    """A CLIP tokenizer, of texts as long as its encoder reads and of tokens that it has rows for."""
    from transformers import CLIPTokenizer

    folder = checkpoint.path(component)
    with refusing(folder), quiet():
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    _check_tokenizer(tokenizer, folder, checkpoint, component.replace("tokenizer", "text_encoder"))
    return tokenizer


def _check_tokenizer(tokenizer: Any, folder: Path, checkpoint: Checkpoint, encoder: str) -> None:
    if not (checkpoint.path(encoder) / "config.json").is_file():
        return
    from transformers import CLIPTextConfig

    with refusing(checkpoint.path(encoder)), quiet():
        config = CLIPTextConfig.from_pretrained(checkpoint.path(encoder), local_files_only=True)
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ConfigurationError(
            f"{folder}: texts of {tokenizer.model_max_length} tokens (model_max_length), where {encoder} reads "
            f"{config.max_position_embeddings}"
        )
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= config.vocab_size:
        raise ConfigurationError(
            f"{folder}: token {token!r} has number {last}, where {encoder} has rows for {config.vocab_size} tokens"
        )


def _load_diffusers(checkpoint: Checkpoint, component: str, dtype: Any) -> Any:
    check_weights(checkpoint, component)
    with refusing(checkpoint.path(component)), quiet():
        model, info = model_class(component).from_pretrained(
            checkpoint.path(component),
            dtype=dtype,
            variant=checkpoint.variant_of(component),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if info["missing_keys"]:
        judge(fit_of(info), checkpoint.weights(component), component)
    return model.eval().requires_grad_(False)
