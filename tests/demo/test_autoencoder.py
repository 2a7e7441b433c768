"""What the autoencoder's stage makes of latents, before any denoiser learns from them."""

from __future__ import annotations

import random

import torch
from torch import nn

from serve_app.demo.training import models
from serve_app.demo.training.autoencoder import colour_loss, draw_crops, normalise_latents


@torch.no_grad()
def test_normalised_latents_are_white_and_decode_to_the_same_pictures() -> None:
    torch.manual_seed(5)
    vae = models.make_autoencoder().eval()
    vae.quant_conv.weight[: models.LATENT_CHANNELS] *= torch.tensor([0.1, 1.0, 3.0, 9.0])[:, None, None, None]
    vae.quant_conv.bias[: models.LATENT_CHANNELS] = torch.tensor([1.0, -2.0, 0.0, 5.0])
    pictures = draw_crops(96, True, random.Random(1))
    before = vae.encode(pictures).latent_dist
    drawn = vae.decode(before.mean[:8]).sample
    spread = (vae.decode(before.mean[:8] + before.std[:8]).sample - drawn).abs().mean()

    normalise_latents(vae)

    after = vae.encode(pictures).latent_dist
    latents = after.mean.movedim(1, -1).reshape(-1, models.LATENT_CHANNELS) * models.SCALING_FACTOR
    assert latents.mean(0).abs().max() < 0.3
    assert torch.allclose(latents.T.cov(), torch.eye(models.LATENT_CHANNELS), atol=0.3)
    assert torch.allclose(vae.decode(after.mean[:8]).sample, drawn, atol=1e-3 * float(drawn.std()))
    # What it is unsure of, it is still: one deviation moves a picture about as far.
    moved = (vae.decode(after.mean[:8] + after.std[:8]).sample - drawn).abs().mean()
    assert 0.3 < moved / spread < 3


def test_colours_that_a_linear_map_tells_cost_nothing() -> None:
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    assert colour_loss(nn.functional.avg_pool2d(pixels, 8), pixels) < 1e-6
    assert colour_loss(torch.zeros(2, 3, 2, 3), torch.ones(2, 3, 16, 24)) == 1
