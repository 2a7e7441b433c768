"""decode: latents to pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from serve_app.models import loading
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.device import Compute
from serve_app.models.files import refusing
from serve_app.request.errors import ConfigurationError, PictureFailed
from serve_app.request.facts import DecoderFacts

logger = logging.getLogger("ray.serve")

if TYPE_CHECKING:
    from serve_app.pictures.arrays import Bytes, Floats
    from serve_app.request.facts import PreviewMap


class Decoder:
    """The VAE's decoder.

    In float16 SDXL's own VAE overflows to NaN. Where its checkpoint says so (`force_upcast`) it runs in
    float32 from the start; a picture that is not finite all the same is decoded again in float32.
    """

    def __init__(self, source: Checkpoint, compute: Compute) -> None:
        self._vae = loading.load_vae(source, compute.dtype)
        if compute.dtype == torch.float16 and self._vae.config.force_upcast:
            self._vae = self._vae.float()
        # Convolutions of few pictures are a quarter quicker so.
        self._vae.to(compute.device, memory_format=torch.channels_last)
        self._device = compute.device
        self._factor = float(self._vae.config.scaling_factor)
        self.float32_retries = 0
        self._folder = source.path("vae")
        with refusing(f"{self._folder}: encoding a few colours"):
            self.facts = DecoderFacts(self._fit_preview_map())

    @property
    def scale_factor(self) -> int:
        """Pixels of a picture's side that one latent covers."""
        return int(2 ** (len(self._vae.config.block_out_channels) - 1))

    def dry_run(self, side: int | None = None) -> None:
        """Decodes latents of nothing, `side` a side, so that what would fail a request fails the replica as it starts.

        Absent, the side is the checkpoint's own on a GPU, whose kernels are loaded and chosen by it, and small on the
        CPU. Raises `ConfigurationError`, one line.
        """
        with refusing(f"{self._folder}: a dry run"):
            if side is None:
                own = self._vae.config.sample_size  # pixels; some configurations have none
                side = own // self.scale_factor if self._device.type != "cpu" and isinstance(own, int) else 8
            channels = self._vae.config.latent_channels
            (pixels,) = self.decode([np.zeros((channels, side, side), dtype=np.float32)])
            if isinstance(pixels, PictureFailed):
                raise ConfigurationError(f"{self._folder}: its pictures are not finite, in float32 either")

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

    @torch.inference_mode()
    def _fit_preview_map(self) -> PreviewMap | None:
        """The linear map from a scaled latent to the mean colour of its pixels, by least squares.

        Fitted to what this VAE makes of a few simple pictures, so that previews need no model of their own. A row for
        each latent channel and one for the offset, three columns: levels 0 to 255. None where the VAE gives
        nothing finite.
        """
        pictures = _simple_pictures(8 * self.scale_factor).to(self._device)
        with self._in_float32():  # float16 may overflow, and this is done once
            try:
                latents = self._scale(self._vae.encode(pictures).latent_dist.mean)
            except torch.OutOfMemoryError:
                return None
        colours = torch.nn.functional.avg_pool2d((pictures + 1) * 127.5, self.scale_factor)
        known = latents.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        wanted = colours.permute(0, 2, 3, 1).flatten(0, 2).double().cpu()
        known = torch.cat([known, torch.ones(len(known), 1, dtype=known.dtype)], dim=1)
        if not known.isfinite().all():
            return None
        fitted = torch.linalg.lstsq(known, wanted).solution
        return tuple((red, green, blue) for red, green, blue in fitted.tolist())

    def _scale(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) * self._factor / std

    def _unscale(self, latents: torch.Tensor) -> torch.Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self._factor + mean

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and deviation of each channel where the configuration has them, else 0 and 1."""
        config = self._vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return 0.0, 1.0
        return latents.new_tensor(mean).view(1, -1, 1, 1), latents.new_tensor(std).view(1, -1, 1, 1)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self._vae.decode(latents.to(self._vae.dtype), return_dict=False)[0]
        return images.float()

    def _decode_in_float32(self, latents: torch.Tensor) -> torch.Tensor:
        """One picture. Where float32 does not fit into the replica's memory it stays not finite."""
        dtype = self._vae.dtype
        try:
            with self._in_float32():
                return self._decode(latents)
        except torch.OutOfMemoryError:
            logger.error("a picture is not finite in %s, and decoding it in float32 does not fit into memory", dtype)
            return torch.full((1, 1, 1, 1), float("nan"), device=latents.device)

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        dtype = self._vae.dtype
        if dtype == torch.float32:
            yield
            return
        try:
            self._vae.float()
            yield
        finally:
            self._vae.to(dtype)


def _simple_pictures(side_px: int) -> torch.Tensor:
    """Pictures of flat colours that run into each other: (48, 3, side, side) float32 in [-1, 1]."""
    generator = torch.Generator("cpu").manual_seed(0)
    colours = torch.rand((48, 3, 3, 3), generator=generator)
    colours[:16] = colours[:16, :, :1, :1]  # some of one colour alone
    return torch.nn.functional.interpolate(colours, size=(side_px, side_px), mode="bilinear") * 2 - 1
