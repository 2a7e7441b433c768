"""Both text encoders and the base UNet, together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo.training import data, models, ranks
from serve_app.demo.training.loop import SEED, Stage, Trainer, half_on
from serve_app.demo.training.noise import DROPPED_PROMPTS, add_noise, alphas_cumprod
from serve_app.demo.training.pictures import Encoded, Pictures, encode_pictures

LAYOUT_SIZES = (((64, 64), 1.0),)
LAYOUT_ABOVE = 800


def train_layout(stage: Stage, vae: AutoencoderKL, pictures: int, work: Path, device: torch.device) -> nn.ModuleDict:
    """What the text says of where things are and of their colours, learned where it is all there is to go by.

    Small pictures and the highest noise alone: hardly anything of a picture shows there, so every sample teaches the
    text, at half the cost. Of the samples of `train_base` a fifth do.
    """
    drawn = Pictures("layout-latents", pictures, data.draw_sample, data.Sample.time_ids, tokenizers()[0], LAYOUT_SIZES)
    buckets = encode_pictures(drawn, vae, work, device)
    trainer = Trainer(stage, make_modules().to(device), work)

    def timesteps(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
        u = spread(count, generator, device)
        return (LAYOUT_ABOVE + (1000 - LAYOUT_ABOVE) * u).long().clamp(max=999)

    trainer.run(loss_function(trainer, buckets, [1.0], timesteps, device))
    return trainer.average


def train_base(
    stage: Stage, start: nn.ModuleDict, vae: AutoencoderKL, pictures: int, work: Path, out: Path, device: torch.device
) -> None:
    """Both text encoders and the base UNet, from the weights of `train_layout`, on all sizes and all noise."""
    drawn = Pictures("latents", pictures, data.draw_sample, data.Sample.time_ids, tokenizers()[0])
    buckets = encode_pictures(drawn, vae, work, device)
    modules = make_modules()
    modules.load_state_dict(start.state_dict())
    trainer = Trainer(stage, modules.to(device), work)
    trainer.run(loss_function(trainer, buckets, data.SIZE_SHARES, high_noise_timesteps, device))
    average = trainer.average.cpu()
    with ranks.first_rank_first():
        if ranks.rank() == 0:
            models.save_base(
                out / "base", vae.cpu(), average["text_encoder"], average["text_encoder_2"], average["unet"]
            )


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return models.make_tokenizer("<|endoftext|>"), models.make_tokenizer("!")


def make_modules() -> nn.ModuleDict:
    torch.manual_seed(SEED)
    first, second = models.make_text_encoders(*tokenizers())
    for encoder in (first, second):
        encoder.set_attn_implementation("eager")  # the quickest on a CPU for 77 tokens
    return nn.ModuleDict({"unet": models.make_unet(), "text_encoder": first, "text_encoder_2": second})


def loss_function(
    trainer: Trainer,
    buckets: list[Encoded],
    shares: Sequence[float],
    timesteps_of: Callable[[int, torch.Generator, torch.device], Tensor],
    device: torch.device,
) -> Callable[[int], Tensor]:
    """`loss_of(step)` for a trainer of `make_modules`, over buckets drawn by their shares."""
    signal = alphas_cumprod(device)
    tokenizer_2 = tokenizers()[1]
    modules, stage = trainer.modules, trainer.stage

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} {stage.name} {step} {ranks.rank()}")
        generator = torch.Generator(device).manual_seed(rng.getrandbits(32))
        bucket = random.Random(step).choices(buckets, shares)[0]  # of one size on all ranks
        latents, tokens, time_ids = bucket.batch(stage.batch, rng, device)
        timesteps = timesteps_of(stage.batch, generator, device)
        noised, target = add_noise(latents, timesteps, signal, generator)
        with half_on(device):
            context, pooled = encode_text(
                modules["text_encoder"], modules["text_encoder_2"], tokens, repad(tokens, tokenizer_2)
            )
            kept = (torch.rand(stage.batch, generator=generator, device=device) > DROPPED_PROMPTS).to(context.dtype)
            context, pooled = context * kept[:, None, None], pooled * kept[:, None]
            conditions = {"text_embeds": pooled, "time_ids": time_ids}
            noise = modules["unet"](noised, timesteps, context, added_cond_kwargs=conditions).sample
        # Flat colour is decided at the highest noise, where the plain loss hardly sees it.
        weight = signal[timesteps].rsqrt().clamp(max=10)
        loss: Tensor = ((noise.float() - target).pow(2).mean((1, 2, 3)) * weight).mean()
        return loss

    return loss_of


def high_noise_timesteps(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Timesteps drawn as 1000 u^0.5, stratified over the batch: more of the high noise."""
    return (1000 * spread(count, generator, device).pow(0.5)).long().clamp(max=999)


def spread(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(count,) in 0..1, one in each of as many equal parts."""
    return (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) / count


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
