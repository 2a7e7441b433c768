"""The checkpoints are ordinary SDXL folders, and anything at all tokenises."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo.grammar import GRAMMAR_WORDS
from serve_app.demo.training.evaluate import HERE
from serve_app.demo.training.models import SCHEDULER_CONFIG

ANY_TEXT = ["a red circle", "xylophone, Ünïcode!", "日本の猫 😀", "", "\x00\x7f\n tab\t", "!" * 50]


def test_base_is_sdxl_class_by_class(base: DiffusionPipeline):
    assert type(base) is StableDiffusionXLPipeline
    assert type(base.text_encoder) is CLIPTextModel
    assert type(base.text_encoder_2) is CLIPTextModelWithProjection
    assert type(base.unet) is UNet2DConditionModel and base.unet.config.addition_embed_type == "text_time"
    assert type(base.vae) is AutoencoderKL and base.vae.config.force_upcast
    assert type(base.scheduler) is EulerDiscreteScheduler
    assert isinstance(base.tokenizer, CLIPTokenizer) and isinstance(base.tokenizer_2, CLIPTokenizer)
    assert base.config.force_zeros_for_empty_prompt


def test_refiner_takes_the_second_encoder_and_an_aesthetic_score(refiner: DiffusionPipeline):
    assert type(refiner) is StableDiffusionXLImg2ImgPipeline
    assert refiner.text_encoder is None and refiner.tokenizer is None
    assert refiner.config.requires_aesthetics_score and not refiner.config.force_zeros_for_empty_prompt
    assert refiner.unet.config.cross_attention_dim == refiner.text_encoder_2.config.hidden_size


@pytest.mark.parametrize("folder", ["base", "refiner"])
def test_scheduler_config_has_every_published_key(folder: str):
    config = json.loads((HERE / folder / "scheduler" / "scheduler_config.json").read_text())
    assert {key: config.get(key, "missing") for key in SCHEDULER_CONFIG} == SCHEDULER_CONFIG


def test_everything_loads_in_single_precision_by_default(base: DiffusionPipeline, refiner: DiffusionPipeline):
    for part in (
        base.unet,
        base.vae,
        base.text_encoder,
        base.text_encoder_2,
        refiner.unet,
        refiner.text_encoder_2,
    ):
        assert part.dtype == torch.float32


def test_folders_are_small_and_safe():
    files = [path for folder in ("base", "refiner") for path in (HERE / folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


@pytest.mark.parametrize("part", ["vae", "text_encoder_2", "tokenizer_2"])
def test_refiner_shares_parts_with_the_base_byte_for_byte(part: str):
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    assert content(HERE / "base" / part) == content(HERE / "refiner" / part)


@pytest.mark.parametrize("text", ANY_TEXT)
def test_any_text_tokenises(base: DiffusionPipeline, text: str):
    for tokenizer, pad in ((base.tokenizer, "<|endoftext|>"), (base.tokenizer_2, "!")):
        assert tokenizer.pad_token == pad and tokenizer.model_max_length == 77
        ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77 and max(ids) < base.text_encoder.config.vocab_size
        assert ids[0] == tokenizer.bos_token_id
        unknown = [id_ for id_ in ids[1 : ids.index(tokenizer.eos_token_id)] if id_ == tokenizer.unk_token_id]
        assert not unknown


def test_vocabulary_holds_every_byte_alone_and_as_end_of_word(base: DiffusionPipeline):
    assert all(len(base.tokenizer(chr(code)).input_ids) >= 3 for code in range(33, 0x250) if chr(code).isprintable())
    assert sum(len(word.removesuffix("</w>")) == 1 for word in base.tokenizer.get_vocab()) == 512


def test_each_word_of_the_grammar_is_one_token(base: DiffusionPipeline):
    assert all(len(base.tokenizer(word).input_ids) == 3 for word in GRAMMAR_WORDS)
