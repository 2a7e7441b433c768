"""The parts of the embedded model: SDXL's own classes with SDXL's own wiring, at a thousandth of its size.

Saved as ordinary diffusers folders, which `DiffusionPipeline.from_pretrained` loads as they are.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo.grammar import caption, sample_scenes
from serve_app.demo.tiny import SCHEDULER_CONFIG

NATIVE_PX = 128
TEXT_WIDTH = 64
MAX_TOKENS = 77
LATENT_CHANNELS = 4
PIXELS_PER_LATENT = 8
SCALING_FACTOR = 0.13025
"""As in SDXL. `normalise_latents` scales the autoencoder's own last layers until this is true."""
TIME_EMBED_DIM = 32
BASE_TIME_IDS = 6  # original size, crop, target size
REFINER_TIME_IDS = 5  # original size, crop, aesthetic score


def make_tokenizer(pad_token: str) -> CLIPTokenizer:
    """A byte-level BPE trained on captions: a token a word of the grammar, bytes for anything else.

    Laid out as CLIP's: 256 bytes (the first is "!"), the same 256 as ends of words, merges, start, end.
    """
    texts = [caption(scene) for scene in sample_scenes(4000, seed=11, held_out=False)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2),
    )
    merges = [tuple(pair) for pair in _merges(bpe)]
    alphabet = _byte_alphabet()
    words = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:

    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order (OpenAI's `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,  # SDXL conditions on the last but one
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoders(
    tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    first = CLIPTextModel(text_config(tokenizer, "quick_gelu"))
    second = CLIPTextModelWithProjection(text_config(tokenizer_2, "gelu"))
    for encoder in (first, second):
        # CLIP's own start (0.02) leaves words of one caption nearly alike for thousands of steps.
        for name, weight in encoder.named_parameters():
            if "token_embedding" in name or "position_embedding" in name:
                torch.nn.init.normal_(weight, std=0.3 if "token" in name else 0.1)
    return first, second


def make_unet(refiner: bool = False) -> UNet2DConditionModel:
    """Input (B, 4, H/8, W/8); cross-attends to both encoders (base) or the second alone (refiner)."""
    time_ids = REFINER_TIME_IDS if refiner else BASE_TIME_IDS
    return UNet2DConditionModel(
        sample_size=NATIVE_PX // PIXELS_PER_LATENT,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[2, 3, 4],  # numbers of heads, whatever the name says
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH if refiner else 2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=TEXT_WIDTH + time_ids * TIME_EMBED_DIM,
    )


def make_autoencoder() -> AutoencoderKL:
    """Pictures (B, 3, H, W) in -1..1 to latents (B, 4, H/8, W/8) and back."""
    channels = (16, 32, 64, 64)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more groups erase flat colours
        sample_size=NATIVE_PX,
        scaling_factor=SCALING_FACTOR,
        force_upcast=True,
    )
    with torch.no_grad():
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0  # log-variance: begin with almost no noise
    return vae


def make_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler.from_config(SCHEDULER_CONFIG)


def save_base(
    folder: Path,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection,
    unet: UNet2DConditionModel,
) -> None:
    """Write the base as a diffusers folder, half precision, safetensors alone."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=make_tokenizer("<|endoftext|>"),
        tokenizer_2=make_tokenizer("!"),
        unet=unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    _save(pipeline, folder)


def save_refiner(folder: Path, base: Path, unet: UNet2DConditionModel) -> None:
    """Write the refiner beside a saved base, whose second encoder and autoencoder it shares byte for byte."""
    source = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=source.vae,
        text_encoder=None,
        text_encoder_2=source.text_encoder_2,
        tokenizer=None,
        tokenizer_2=source.tokenizer_2,
        unet=unet,
        scheduler=make_scheduler(),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    _save(pipeline, folder)
    for part in ("vae", "text_encoder_2", "tokenizer_2"):
        shutil.rmtree(folder / part)
        shutil.copytree(base / part, folder / part)


def _save(pipeline: StableDiffusionXLPipeline | StableDiffusionXLImg2ImgPipeline, folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    # Half precision on disk for what diffusers loads as float32 anyway; transformers keeps the precision it finds.
    for part in (pipeline.unet, pipeline.vae):
        part.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
