"""Previews: the finished latents foretold, and the linear map from latents to colours."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from serve_app.config.settings import DEMO_FOLDER
from serve_app.demo.grammar import sample_scenes
from serve_app.demo.training.data import draw_sample, to_tensor
from serve_app.models.checkpoint import Checkpoint
from serve_app.models.decode import Decoder
from serve_app.models.denoise import UNetRunner
from serve_app.models.loading import load_scheduler
from serve_app.models.sampling import make_scheduler, predicted_original, take_timesteps
from serve_app.pictures.files import encode_preview
from serve_app.request.schedulers import NAMES
from serve_app.runtime.tasks import WHOLE, Noise
from tests.models.test_stages import FLOAT32, base, task

__all__ = ["base"]  # the fixture


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "ddim"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_predicted_original_is_the_scheduler_s_own_where_it_tells_one(
    base: Checkpoint, name: str, prediction_type: str
) -> None:
    native = load_scheduler(base)
    native.register_to_config(prediction_type=prediction_type)
    scheduler = make_scheduler(native, name)
    scheduler.set_timesteps(10)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(int(timestep)))
        ours = predicted_original(scheduler, noise, timestep, latents)
        output = scheduler.step(noise, timestep, latents)
        torch.testing.assert_close(ours, output.pred_original_sample, rtol=1e-3, atol=1e-3)
        latents = output.prev_sample


def test_a_first_step_with_no_signal_left_has_a_preview_too(base: Checkpoint) -> None:
    """Zero terminal SNR (arXiv 2305.08891): DDIM's first timestep is noise alone."""
    native = load_scheduler(base)
    native.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler = make_scheduler(native, "ddim")
    scheduler.set_timesteps(3)
    first = scheduler.timesteps[0]
    assert scheduler.alphas_cumprod[first] == 0
    latents, velocity = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    ours = predicted_original(scheduler, velocity, first, latents)
    own = scheduler.step(velocity, first, latents).pred_original_sample
    torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_s_original_is_predicted_by_every_scheduler(base: Checkpoint, name: str) -> None:
    """Where the model tells the very noise that is in the latents, the original is what they were made of."""
    scheduler = make_scheduler(load_scheduler(base), name)
    scheduler.set_timesteps(10)
    take_timesteps(scheduler, Noise(0), WHOLE)
    original = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(latents, timestep)
        signal = float(scheduler.alphas_cumprod[int(timestep)])
        if getattr(scheduler, "step_index", None) is not None and hasattr(scheduler, "sigmas"):
            signal = 1 / (1 + float(scheduler.sigmas[scheduler.step_index]) ** 2)
        over_sigmas = scheduler.init_noise_sigma != 1
        noise = (latents * (signal**0.5 if over_sigmas else 1) - signal**0.5 * original) / (1 - signal) ** 0.5
        predicted = predicted_original(scheduler, noise, timestep, latents)
        torch.testing.assert_close(predicted, original, rtol=1e-3, atol=1e-2)
        latents = scheduler.step(noise, timestep, latents).prev_sample


def test_previews_come_after_the_steps_that_were_asked_for(base: Checkpoint) -> None:
    denoiser = UNetRunner(base, FLOAT32)
    state = denoiser.begin(task(num_inference_steps=4, preview_at=(0.01, 0.5)))
    previews = []
    for _ in range(4):
        (output,) = denoiser.forward([state])
        previews.append(denoiser.advance(state, output))
    assert [preview is not None for preview in previews] == [True, True, False, False]
    assert previews[0] is not None and previews[0].shape == (4, 16, 16)


def test_a_preview_is_near_the_picture(base: Checkpoint) -> None:
    """The embedded model's own VAE: what a preview makes of a picture's latents against the picture made small."""
    decoder = Decoder(Checkpoint(DEMO_FOLDER / "base", None), FLOAT32)
    assert decoder.facts.preview_map is not None
    scenes = sample_scenes(6, seed=3, held_out=False)
    for number, scene in enumerate(scenes):
        picture = draw_sample(scene, 128, 128, random.Random(number)).picture
        with torch.inference_mode():
            latents = decoder._scale(decoder._vae.encode(to_tensor(picture)[None]).latent_dist.mean)[0].numpy()
        data = encode_preview(latents, decoder.facts.preview_map, 128, 128, "png")
        preview = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BICUBIC))
        near = np.abs(preview - small).mean()
        grey = np.abs(small - small.mean((0, 1))).mean() + np.abs(small.mean((0, 1)) - 128).mean()
        assert near < 12 and near < 0.2 * grey, (scene, near, grey)


def test_the_preview_map_undoes_the_vae_s_own_statistics(tiny: Path, tmp_path: Path) -> None:
    """Latents that are scaled another way give the same colours: the map is fitted to scaled latents."""
    plain = Decoder(Checkpoint(tiny / "base", None), FLOAT32)
    other = Path(shutil.copytree(tiny / "base", tmp_path / "base"))
    config = json.loads((other / "vae" / "config.json").read_text())
    config |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 1.5], "scaling_factor": 0.5}
    (other / "vae" / "config.json").write_text(json.dumps(config))
    shifted = Decoder(Checkpoint(other, None), FLOAT32)
    latents = torch.randn((1, 4, 2, 2), generator=torch.Generator().manual_seed(0))
    colours = []
    for decoder in (plain, shifted):
        weights = np.asarray(decoder.facts.preview_map)
        scaled = decoder._scale(latents)[0].movedim(0, -1).numpy()
        colours.append(scaled @ weights[:-1] + weights[-1])
        torch.testing.assert_close(decoder._unscale(decoder._scale(latents)), latents)
    np.testing.assert_allclose(colours[0], colours[1], atol=0.5)
