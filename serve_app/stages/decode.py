"""decode: latents to pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from serve_app import checkpoint
from serve_app.checkpoint import Checkpoint
from serve_app.errors import PictureFailed
from serve_app.stages.device import Compute

logger = logging.getLogger("ray.serve")

if TYPE_CHECKING:
    from serve_app.tasks import Bytes, Floats


class Decoder:
    """The VAE's decoder.

    In float16 SDXL's own VAE overflows to NaN. Where its checkpoint says so (`force_upcast`) it runs in
    float32 from the start; a picture that is not finite all the same is decoded again in float32.
    """

    def __init__(self, source: Checkpoint, compute: Compute) -> None:
        self._vae = checkpoint.load_vae(source, compute.dtype)
        if compute.dtype == torch.float16 and self._vae.config.force_upcast:
            self._vae = self._vae.float()
        self._vae.to(compute.device)
        self._device = compute.device
        self.float32_retries = 0

    @torch.inference_mode()
    def decode(self, batch: Sequence[Floats]) -> list[Bytes | PictureFailed]:
        """Latents (4, h, w) float32 of equal shape -> pixels (8h, 8w, 3) uint8, one forward pass.

        A picture that is not finite even in float32 is a `PictureFailed` in its place: its batch mates
        have theirs.
        """
        latents = self._unscale(torch.from_numpy(np.stack(batch)).to(self._device))
        images = self._decode(latents)
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite) and self._vae.dtype != torch.float32:
            rows = [row for row, good in enumerate(finite) if not good]
            self.float32_retries += len(rows)
            for row in rows:
                images[row] = self._decode_in_float32(latents[row : row + 1])[0]
            finite = images.isfinite().flatten(1).all(dim=1).tolist()
        # The arithmetic of diffusers' VaeImageProcessor.postprocess.
        pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [
            pixels[row].copy() if good else PictureFailed("the model gave no finite picture for this request")
            for row, good in enumerate(finite)
        ]

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        config = self._vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            shape = (1, -1, 1, 1)
            mean_row = torch.tensor(mean, dtype=latents.dtype, device=latents.device).view(shape)
            std_row = torch.tensor(std, dtype=latents.dtype, device=latents.device).view(shape)
            return latents * std_row / config.scaling_factor + mean_row
        return latents / config.scaling_factor

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0].float()

    def _decode_in_float32(self, latents: torch.Tensor) -> torch.Tensor:
        """One picture. Where float32 does not fit into the replica's memory it stays not finite."""
        dtype = self._vae.dtype
        try:
            self._vae.float()
            return self._decode(latents)
        except torch.OutOfMemoryError:
            logger.error("a picture is not finite in %s, and decoding it in float32 does not fit into memory", dtype)
            return torch.full((1, 1, 1, 1), float("nan"), device=latents.device)
        finally:
            self._vae.to(dtype)
