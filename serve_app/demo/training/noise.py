"""Noise on latents, as both denoisers learn to take it off."""

from __future__ import annotations

import torch
from torch import Tensor

from serve_app.demo.training import models

DROPPED_PROMPTS = 0.1


def alphas_cumprod(device: torch.device) -> Tensor:
    """(1000,), the share of signal power left at each timestep."""
    kept: Tensor = models.make_scheduler().alphas_cumprod
    return kept.to(device)


def add_noise(latents: Tensor, timesteps: Tensor, signal: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noised latents and the noise to predict.

    Some rows of the highest timesteps are noise alone, as sampling begins, with the target that leads to the picture:
    SDXL's schedule leaves a trace of the picture at its end, which a model would otherwise learn to lean on
    (Lin et al. 2024, arXiv:2305.08891).
    """
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    a = signal[timesteps].sqrt()[:, None, None, None]
    b = (1 - signal[timesteps]).sqrt()[:, None, None, None]
    noised = a * latents + b * noise
    blank = (torch.rand(len(latents), generator=generator, device=latents.device) < 0.3) & (timesteps > 900)
    noised = torch.where(blank[:, None, None, None], noise, noised)
    return noised, (noised - a * latents) / b
