"""Writes a random-weight SDXL base + refiner pair of the real classes, small enough for a test.

Plain random weights hide faults: their pictures hardly answer to the prompt or to the size. These are shaped
so that every field of a request shows in the picture, and so that float32 rounding does not.

Each UNet computes `epsilon = x + body(x, t, conditions)`. The first term is the input itself, carried around
the network by its outermost skip connection; it makes the sampler's ODE contract (dx/dsigma is then
x / sqrt(sigma^2 + 1), in the notation of Karras et al., arXiv 2206.00364), so that rounding dies out instead
of growing. The second term is random, and calibrated: how far each kind of condition moves it is measured,
and set.

It does not know Ray, requests or the serving graph: diffusers and transformers only.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

SAMPLE_SIZE = 16  # latent pixels a side: pictures of 128 px
MAX_TOKENS = 77
TIME_ID_WIDTH = 8  # width of one embedded time id (published: 256)
BASE_TIME_IDS, REFINER_TIME_IDS = 6, 5  # sizes and crop; size, crop and aesthetic score
WIDTH_1, WIDTH_2 = 24, 32  # hidden sizes of the two text encoders (published: 768 and 1280)
LAYERS_1, LAYERS_2 = 4, 5  # unequal, as published (12 and 32), so that clip_skip's bound differs

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# Every key of the published scheduler_config.json. Euler ignores some; classes made from its config do not.
SCHEDULER_CONFIG: dict[str, object] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

# The outermost 16 channels of a UNet, two norm groups of 8. In each group two latent channels ride as the
# pairs +x, -x, and the other four belong to the body.
UNET_CHANNELS = (16, 24)
CARRY = [0, 1, 2, 3, 8, 9, 10, 11]
BODY = [4, 5, 6, 7, 12, 13, 14, 15]
CARRY_GAIN = 0.5
# Constant offsets of the body channels before the last norm. They, and not x, set its variance: were it x
# alone, the norm would divide x by its own size, and the smaller x, the steeper epsilon.
BODY_OFFSETS = [2.0, -2.0] * 4
LAST_NORM_STD = 1.6  # of a group: half its channels 0.5 x, half +-2 with a spread of about 1

# How far epsilon moves (rms) when one kind of condition is swapped for another sample's. Time ids weigh most:
# there are five or six of them, and one alone has to show. The base's are small because it walks down from
# sigma 15 under guidance, which multiplies them; the refiner only has sigma 0.4 to 0 to show anything.
BASE_INFLUENCE = {"context": 0.08, "pooled": 0.06, "time_ids": 0.12, "timestep": 0.25}
REFINER_INFLUENCE = {"context": 0.8, "pooled": 0.7, "time_ids": 1.2, "timestep": 1.2}
AESTHETIC_BOOST = 2.5  # an aesthetic score differs by fractions where sizes differ by tens
PIXEL_STD = 0.35  # of the decoder's output, -1 to 1: bright enough, and hardly ever clipped

CALIBRATION_PROMPTS = [
    "",
    "a",
    "a red fox in the snow",
    "a lighthouse at night",
    "portrait of an old sailor, oil on canvas",
    "blurry",
    "low quality, watermark",
    "two glasses of tea on a table",
    "city",
    "a horse",
    "mountain lake, sunrise, 35mm",
    "a cat and a dog",
    "green hills under a stormy sky",
    "robot",
    "an astronaut riding a bicycle on the moon",
]


def make_tiny(directory: Path, seed: int = 0) -> None:
    """Write `directory/base` and `directory/refiner`, diffusers folders of float32 safetensors.

    Takes seconds; the same seed gives the same weights. Leaves torch's global generator as it was.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _alone():
        base, refiner = _build(torch.Generator().manual_seed(seed))
        for pipeline, name in ((base, "base"), (refiner, "refiner")):
            pipeline.save_pretrained(directory / name, safe_serialization=True)
            # Weights are written readable by their owner alone, and a container may run as someone else.
            for path in (directory / name).glob("*/*.safetensors"):
                path.chmod(0o644)


def _build(generator: torch.Generator) -> tuple[StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline]:
    tokenizer, tokenizer_2 = _tokenizer(EOS), _tokenizer("!")
    text_encoder = CLIPTextModel(_text_config(WIDTH_1, LAYERS_1, "quick_gelu", tokenizer)).eval()
    text_encoder_2 = CLIPTextModelWithProjection(_text_config(WIDTH_2, LAYERS_2, "gelu", tokenizer_2)).eval()
    vae = _vae()
    base_unet = _unet(WIDTH_1 + WIDTH_2, BASE_TIME_IDS)
    refiner_unet = _unet(WIDTH_2, REFINER_TIME_IDS)
    for module in (text_encoder, text_encoder_2, vae, base_unet, refiner_unet):
        _randomise(module, generator)

    context_1, _ = _encode(CALIBRATION_PROMPTS, tokenizer, text_encoder)
    context_2, pooled = _encode(CALIBRATION_PROMPTS, tokenizer_2, text_encoder_2)
    _calibrate_decoder(vae, generator)
    _carry_input(base_unet)
    _calibrate_body(base_unet, torch.cat([context_1, context_2], dim=-1), pooled, BASE_INFLUENCE, generator)
    _carry_input(refiner_unet)
    refiner_unet.add_embedding.linear_1.weight[:, -TIME_ID_WIDTH:] *= AESTHETIC_BOOST
    _calibrate_body(refiner_unet, context_2, pooled, REFINER_INFLUENCE, generator)

    base = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=base_unet,
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    refiner = StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=text_encoder_2,
        tokenizer=None,
        tokenizer_2=tokenizer_2,
        unet=refiner_unet,
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return base, refiner


# Text -----------------------------------------------------------------------------------------------------


def _vocab() -> dict[str, int]:
    """Every byte, every byte that ends a word, and, last as published, the two special tokens: 514 ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's byte-level BPE writes an unprintable byte as the next free letter from 256 on.
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    in_order = [letters[byte] for byte in range(256)]
    return {token: i for i, token in enumerate([*in_order, *(f"{letter}</w>" for letter in in_order), BOS, EOS])}


def _tokenizer(pad: str) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=_vocab(),
        merges=[],
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=pad,
        model_max_length=MAX_TOKENS,
    )


def _text_config(width: int, layers: int, activation: str, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=activation,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,  # the position that transformers pools
        pad_token_id=tokenizer.pad_token_id,
    )


def _encode(prompts: list[str], tokenizer: CLIPTokenizer, encoder: nn.Module) -> tuple[Tensor, Tensor]:
    """Penultimate states (N + 1, 77, width) and the first output, which is (N + 1, width) where it is pooled.

    The last row is zeros, which is what the base is given for an absent negative prompt.
    """
    tokens = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    output = encoder(tokens.input_ids, output_hidden_states=True)
    context, first = output.hidden_states[-2], output[0]
    context, first = (torch.cat([rows, torch.zeros_like(rows[:1])]) for rows in (context, first))
    return context, first


# Pictures -------------------------------------------------------------------------------------------------


def _unet(cross_attention_width: int, time_ids: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 3),  # heads, whatever diffusers calls them
        cross_attention_dim=cross_attention_width,
        norm_num_groups=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=WIDTH_2 + time_ids * TIME_ID_WIDTH,
    ).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=8 * SAMPLE_SIZE,
        scaling_factor=0.13025,
        force_upcast=True,
    ).eval()


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw each weight at the scale that keeps its layer's output at its input's variance; skip the norms."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = 1 if "embedding.weight" in name else parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        elif name.endswith("bias") and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _calibrate_decoder(vae: AutoencoderKL, generator: torch.Generator) -> None:
    """Scale and centre each colour of the decoder's output to `PIXEL_STD` around grey."""
    shape = (16, vae.config.latent_channels, SAMPLE_SIZE, SAMPLE_SIZE)
    latents = torch.randn(shape, generator=generator) + torch.randn(*shape[:2], 1, 1, generator=generator)
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    gain = _rounded(PIXEL_STD / pixels.std(dim=(0, 2, 3)))
    out = vae.decoder.conv_out
    out.weight *= gain[:, None, None, None]
    out.bias.copy_(gain * (out.bias - _rounded(pixels.mean(dim=(0, 2, 3)))))


def _carry_input(unet: UNet2DConditionModel) -> None:
    """Make epsilon = x + body: lead x past the network in `CARRY`, and keep the body's output in `BODY`.

    conv_in writes +x and -x; the outermost skip connection brings them to the last resnet, whose shortcut
    copies them; conv_out takes silu(z) - silu(-z), which is z exactly.
    """
    sign = torch.tensor([1.0, -1.0] * 4)
    last = unet.up_blocks[-1].resnets[-1]
    body_in = last.in_channels - UNET_CHANNELS[0]  # its input is the body's stream, then conv_in's output
    unet.conv_in.weight[CARRY] = 0
    unet.conv_in.bias[CARRY] = 0
    last.conv_shortcut.weight[CARRY] = 0
    last.conv_shortcut.weight[BODY, body_in:] = 0
    last.conv_shortcut.bias[CARRY] = 0
    last.conv_shortcut.bias[BODY] = torch.tensor(BODY_OFFSETS)
    last.conv2.weight[CARRY] = 0
    last.conv2.bias[CARRY] = 0
    unet.conv_out.weight[:, CARRY] = 0
    for i, channel in enumerate(CARRY):
        unet.conv_in.weight[channel, i // 2, 1, 1] = CARRY_GAIN * sign[i]
        last.conv_shortcut.weight[channel, body_in + channel] = 1
        unet.conv_out.weight[i // 2, channel, 1, 1] = sign[i] * LAST_NORM_STD / CARRY_GAIN


@dataclass(frozen=True)
class _Samples:
    """One row a sample of everything that a UNet is given, float32."""

    x: Tensor  # (N, 4, 16, 16), as scaled by a scheduler
    timestep: Tensor  # (N,), 0 to 999
    context: Tensor  # (N, 77, context width)
    pooled: Tensor  # (N, WIDTH_2)
    time_ids: Tensor  # (N, 5 or 6), px or score

    def swapped(self, field: str) -> "_Samples":
        """The same samples, each with its neighbour's `field`."""
        return replace(self, **{field: getattr(self, field).roll(1, 0)})

    def epsilon(self, unet: UNet2DConditionModel) -> Tensor:
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        output: Tensor = unet(self.x, self.timestep, self.context, added_cond_kwargs=added).sample
        return output  # (N, 4, 16, 16)


def _calibrate_body(
    unet: UNet2DConditionModel,
    context: Tensor,
    pooled: Tensor,
    influence: dict[str, float],
    generator: torch.Generator,
) -> None:
    """Scale the weights by which each kind of condition enters until each has its `influence` on epsilon."""
    attention = [module.attn2 for name, module in unet.named_modules() if name.endswith("transformer_blocks.0")]
    for layer in attention:  # sharper than uniform, so that the order and the words of a prompt matter
        layer.to_q.weight *= 1.5
        layer.to_k.weight *= 1.5
    for name, parameter in unet.named_parameters():
        if name.endswith("time_emb_proj.weight"):  # louder than the picture's own features
            parameter *= 1.5
    added = unet.add_embedding.linear_1.weight
    entrances = {
        "context": [layer.to_out[0].weight for layer in attention],
        "pooled": [added[:, :WIDTH_2]],
        "time_ids": [added[:, WIDTH_2:]],
        "timestep": [unet.time_embedding.linear_2.weight],
    }

    rows, id_count = len(context), (added.shape[1] - WIDTH_2) // TIME_ID_WIDTH
    samples = _Samples(
        x=torch.randn(rows, 4, SAMPLE_SIZE, SAMPLE_SIZE, generator=generator),
        timestep=torch.rand(rows, generator=generator) * 999,
        context=context,
        pooled=pooled,
        time_ids=torch.rand(rows, id_count, generator=generator) * 200,
    )
    wanted_sum = sum(influence.values())
    for _ in range(12):  # the shares first: they pull at one another, so by damped steps
        epsilon = samples.epsilon(unet)
        moved = {field: _rms(samples.swapped(field).epsilon(unet) - epsilon) for field in influence}
        moved_sum = sum(moved.values())
        for field, wanted in influence.items():
            step = (wanted / wanted_sum) / (moved[field] / moved_sum)
            for weight in entrances[field]:
                weight *= round(min(max(step**0.6, 0.5), 2.0), 3)
    scale = round(wanted_sum / moved_sum, 3)  # then the whole
    unet.conv_out.weight[:, BODY] *= scale
    # Without its mean, which is the same whatever was asked, the body leaves the picture in the middle.
    unet.conv_out.bias.copy_(scale * (unet.conv_out.bias - _rounded(epsilon.mean(dim=(0, 2, 3)))))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _rounded(x: Tensor) -> Tensor:
    """To 3 decimals, like all that is measured here: a machine's own rounding shall not reach the weights."""
    return x.round(decimals=3)


@contextmanager
def _alone() -> Iterator[None]:
    """No progress bars, and one thread: quicker at this size, and no sum depends on how many there are."""
    shown, threads = transformers_logging.is_progress_bar_enabled(), torch.get_num_threads()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if shown:
            transformers_logging.enable_progress_bar()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random-weight SDXL base + refiner pair.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_tiny(arguments.directory, arguments.seed)
