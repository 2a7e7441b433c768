"""What the ingress must know of the checkpoints. Each replica reads its own part; `ModelFacts` is all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PreviewMap = tuple[tuple[float, float, float], ...]
"""A row (red, green, blue) for each latent channel and one for the offset: levels 0 to 255 of scaled latents."""


@dataclass(frozen=True)
class NoiseSchedule:
    """What of a checkpoint's scheduler configuration decides its timesteps. As it stands: published SDXL's."""

    timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading"
    steps_offset: int = 1  # of "leading"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085  # of the "scaled_linear" schedule
    beta_end: float = 0.012
    own_sigmas: bool = False  # spaced otherwise (Karras's and others'), whatever the fields above say


@dataclass(frozen=True)
class TextFacts:
    """Of the text encoders."""

    clip_skip_max: int
    base_zeroes_missing_negative: bool
    refiner_clip_skip_max: int = 0


@dataclass(frozen=True)
class DenoiserFacts:
    """Of a UNet and its checkpoint's scheduler."""

    native_size_px: int  # of a picture's sides
    native_scheduler: str  # diffusers class name
    noise_schedule: NoiseSchedule = NoiseSchedule()
    takes_aesthetic_score: bool = False  # in place of a target size


@dataclass(frozen=True)
class DecoderFacts:
    """Of the VAE."""

    preview_map: PreviewMap | None = None  # latents to colours; None where the VAE gave none


@dataclass(frozen=True)
class ModelFacts:
    """All of them."""

    text: TextFacts
    base: DenoiserFacts
    refiner: DenoiserFacts | None = None
    decoder: DecoderFacts = DecoderFacts()
    embedded_demo: bool = False  # the base is the miniature model that ships with the project

    @property
    def refined(self) -> bool:
        """A refiner is configured."""
        return self.refiner is not None
