"""The refiner: the last fifth of the noise alone."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from serve_app.demo.training import data, models, ranks
from serve_app.demo.training.loop import SEED, Stage, Trainer, half_on
from serve_app.demo.training.noise import DROPPED_PROMPTS, add_noise, alphas_cumprod
from serve_app.demo.training.pictures import Pictures, encode_pictures, tokenize

REFINER_SHARE = 0.2


def train_refiner(stage: Stage, pictures: int, work: Path, out: Path, device: torch.device) -> None:
    """Learns the last fifth of the noise alone, from the base's weights; its text encoder is the base's second."""
    base = StableDiffusionXLPipeline.from_pretrained(out / "base")
    encoder, tokenizer_2 = base.text_encoder_2.to(device), base.tokenizer_2
    drawn = Pictures("refiner-latents", pictures, data.draw_refiner_sample, data.Sample.refiner_time_ids, tokenizer_2)
    buckets = encode_pictures(drawn, base.vae, work, device)
    torch.manual_seed(SEED)
    unet = models.make_unet(refiner=True)
    start_from_base(unet, base.unet)
    modules = nn.ModuleDict({"unet": unet}).to(device)
    trainer = Trainer(stage, modules, work)
    signal = alphas_cumprod(device)
    empty = tokenize(tokenizer_2, [""]).to(device)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} refiner {step} {ranks.rank()}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        bucket = random.Random(step).choices(buckets, data.SIZE_SHARES)[0]  # of one size on all ranks
        latents, tokens, time_ids = bucket.batch(stage.batch, rng, device)
        u = (torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator, device=device)) / stage.batch
        timesteps = (u * REFINER_SHARE * 1000).long()
        noised, target = add_noise(latents, timesteps, signal, generator)
        # Its pipeline encodes an empty negative prompt, and gives it the negative aesthetic score.
        dropped = torch.rand(stage.batch, generator=generator, device=device) < DROPPED_PROMPTS
        dropped &= time_ids[:, -1] >= 5
        tokens = torch.where(dropped[:, None], empty, tokens)
        time_ids[:, -1] = torch.where(dropped, 2.5, time_ids[:, -1])
        with half_on(device):
            with torch.no_grad():
                output = encoder(tokens, output_hidden_states=True)
            conditions = {"text_embeds": output.text_embeds, "time_ids": time_ids}
            noise = unet(noised, timesteps, output.hidden_states[-2], added_cond_kwargs=conditions).sample
        return F.mse_loss(noise.float(), target)

    trainer.run(loss_of)
    if ranks.rank() == 0:
        models.save_refiner(out / "refiner", out / "base", trainer.average["unet"].cpu())


@torch.no_grad()
def start_from_base(refiner: nn.Module, base: nn.Module) -> None:
    """Copy the base's weights; where the refiner lacks inputs, copy the columns of those that it has."""
    source = base.state_dict()
    columns = models.TEXT_WIDTH + 4 * models.TIME_EMBED_DIM  # pooled text, original size, crop
    for name, weight in refiner.state_dict().items():
        if weight.shape == source[name].shape:
            weight.copy_(source[name])
        elif name.startswith("add_embedding"):
            weight[:, :columns] = source[name][:, :columns]
        else:  # keys and values of the text: the second encoder's half
            weight.copy_(source[name][:, models.TEXT_WIDTH :])
