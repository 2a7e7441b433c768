"""What one forward pass of a UNet takes, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.models.device import Compute


def text_widths(config: Any, time_ids: int) -> tuple[int, int]:
    """D and P of the text that a UNet of this configuration takes: see `Rows`."""
    text = config.cross_attention_dim
    text = text if isinstance(text, int) else text[0]  # diffusers takes a list, one for each block
    return text, config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim


@dataclass(frozen=True)
class Rows:
    """R rows: the images' own, side by side, a guided one's negative row first.

    Attributes:
        samples: noisy latents, (R, 4, h, w), in the dtype of the weights.
        timesteps: (R,) float32.
        prompt_embeds: (R, 77k, D), in the dtype of the weights.
        pooled: (R, P), in the dtype of the weights.
        time_ids: (R, 6) float32, or (R, 5) where the model takes an aesthetic score.
    """

    samples: torch.Tensor
    timesteps: torch.Tensor
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its tensors in order, for what takes them by position."""
        return (self.samples, self.timesteps, self.prompt_embeds, self.pooled, self.time_ids)

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """All rows of the parts, which have one latent shape and text length."""
        columns = zip(*(part.tensors() for part in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    @classmethod
    def example(
        cls, config: Any, compute: Compute, time_ids: int, rows: int, height: int, width: int, tokens: int
    ) -> Rows:
        """Random rows of h x w latents for a UNet of this configuration; the same every time."""
        generator = torch.Generator("cpu").manual_seed(0)
        text, pooled = text_widths(config, time_ids)
        device, dtype = compute.device, compute.dtype

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        return cls(
            samples=drawn(rows, config.in_channels, height, width),
            timesteps=torch.linspace(900, 100, rows, device=device),
            prompt_embeds=drawn(rows, tokens, text),
            pooled=drawn(rows, pooled),
            time_ids=torch.full((rows, time_ids), 128.0, device=device),
        )


Backend = Callable[[Rows], torch.Tensor]
"""A UNet's forward pass: the prediction, (R, 4, h, w), in the dtype of the weights."""
