"""diffusers' UNet as it is."""

from __future__ import annotations

from typing import Any

import torch

from serve_app.models.backends.rows import Rows


class PositionalUNet(torch.nn.Module):
    """SDXL's UNet of diffusers over the tensors of `Rows` by position, as a trace wants it."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        samples: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.unet(
            samples,
            timesteps,
            encoder_hidden_states=prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return prediction


class Eager:
    """Calls the UNet, Python and all."""

    def __init__(self, unet: Any) -> None:
        self._unet = PositionalUNet(unet)

    def __call__(self, rows: Rows) -> torch.Tensor:
        prediction: torch.Tensor = self._unet(*rows.tensors())
        return prediction
