"""Both text encoders and the base UNet, together."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo import data, models, ranks
from serve_app.demo.training.loop import SEED, Stage, Trainer, half_on
from serve_app.demo.training.noise import DROPPED_PROMPTS, add_noise, alphas_cumprod
from serve_app.demo.training.pictures import Pictures, encode_pictures


def train_base(stage: Stage, vae: AutoencoderKL, pictures: int, work: Path, out: Path, device: torch.device) -> None:
    tokenizer, tokenizer_2 = models.make_tokenizer("<|endoftext|>"), models.make_tokenizer("!")
    drawn = Pictures("latents", pictures, data.draw_sample, data.Sample.time_ids, tokenizer)
    buckets = encode_pictures(drawn, vae, work, device)
    torch.manual_seed(SEED)
    first, second = models.make_text_encoders(tokenizer, tokenizer_2)
    for encoder in (first, second):
        encoder.set_attn_implementation("eager")  # the quickest on a CPU for 77 tokens
    modules = nn.ModuleDict({"unet": models.make_unet(), "text_encoder": first, "text_encoder_2": second}).to(device)
    trainer = Trainer(stage, modules, work)
    signal = alphas_cumprod(device)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} base {step} {ranks.rank()}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        bucket = random.Random(step).choices(buckets, data.SIZE_SHARES)[0]  # of one size on all ranks
        latents, tokens, time_ids = bucket.batch(stage.batch, rng, device)
        timesteps = high_noise_timesteps(stage.batch, generator, device)
        noised, target = add_noise(latents, timesteps, signal, generator)
        with half_on(device):
            context, pooled = encode_text(first, second, tokens, repad(tokens, tokenizer_2))
            kept = (torch.rand(stage.batch, generator=generator, device=device) > DROPPED_PROMPTS).to(context.dtype)
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            noise = modules["unet"](noised, timesteps, context, added_cond_kwargs=conditions).sample
        # Flat colour is decided at the highest noise, where the plain loss hardly sees it.
        weight = signal[timesteps].rsqrt().clamp(max=10)
        return ((noise.float() - target).pow(2).mean((1, 2, 3)) * weight).mean()

    trainer.run(loss_of)
    average = trainer.average.cpu()
    with ranks.first_rank_first():
        if ranks.rank() == 0:
            models.save_base(
                out / "base", vae.cpu(), average["text_encoder"], average["text_encoder_2"], average["unet"]
            )


def high_noise_timesteps(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Timesteps drawn as 1000 u^0.5, stratified over the batch: more of the high noise."""
    u = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count
    return (1000 * u.pow(0.5)).long().clamp(max=999)


def repad(tokens: Tensor, tokenizer_2: CLIPTokenizer) -> Tensor:
    """The second tokenizer's ids for the first one's: the same but for the padding behind the first end."""
    end = tokenizer_2.eos_token_id
    behind = (tokens == end).cumsum(1) > 1
    return tokens.masked_fill(behind, tokenizer_2.pad_token_id)


def encode_text(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, tokens: Tensor, tokens_2: Tensor
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: last-but-one states of both encoders side by side (B, 77, 128), pooled second (B, 64)."""
    states = first(tokens, output_hidden_states=True).hidden_states[-2]
    output_2 = second(tokens_2, output_hidden_states=True)
    return torch.cat([states, output_2.hidden_states[-2]], dim=-1), output_2.text_embeds
