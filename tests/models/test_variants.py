"""Checkpoints as people have them: each is drawn as diffusers draws it, or refused in one clear line.

Every variant is made from the random-weight pair. Those that are refused say so in `sdxl-serve check`, and say the same
where a replica is the first to see them.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from serve_app.cli import main
from serve_app.config.settings import AppConfig, parse_config
from serve_app.models.check import check, check_sources
from serve_app.models.checkpoint import BASE_COMPONENTS, REFINER_COMPONENTS, Checkpoint, locate
from serve_app.models.decode import Decoder
from serve_app.models.denoise import UNetRunner
from serve_app.models.device import Compute
from serve_app.models.encode import TextEncoders
from serve_app.request.errors import ConfigurationError
from serve_app.runtime.tasks import DenoiseTask, EncodeTask, Noise, TimeInStage

FLOAT32 = Compute(torch.device("cpu"), torch.float32)
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CLIP_1, CLIP_2 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

Tensors = dict[str, torch.Tensor]
Make = Callable[[Path], Any]


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "base", tmp_path / "base"))


def one_line(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@dataclass(frozen=True)
class Parts:
    """The three tensor stages of a base, loaded as its replicas load them."""

    encoders: TextEncoders
    denoiser: UNetRunner
    decoder: Decoder


def start(config: AppConfig) -> Parts:
    """What the replicas' constructors do, in one process."""
    base, vae = locate(config.base, BASE_COMPONENTS), locate(config.vae or config.base, ("vae",))
    check(base, tuple(c for c in BASE_COMPONENTS if c != "vae"))
    check(vae, ("vae",))
    parts = Parts(TextEncoders(base, None, FLOAT32), UNetRunner(base, FLOAT32, trace=False), Decoder(vae, FLOAT32))
    for part in (parts.encoders, parts.denoiser, parts.decoder):
        part.dry_run()
    return parts


# How variants are made.


def settings(file: str, *drop: str, **changes: Any) -> Make:
    def make(base: Path) -> None:
        content = json.loads((base / file).read_text()) | changes
        (base / file).write_text(json.dumps({name: value for name, value in content.items() if name not in drop}))

    return make


def weights(file: str, change: Callable[[Tensors], Tensors]) -> Make:
    def make(base: Path) -> None:
        tensors = load_file(base / file)
        save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, base / file)

    return make


def renamed(file: str, *pairs: tuple[str, str]) -> Make:
    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            for old, new in pairs:
                name = name.replace(old, new)
            found[name] = tensor
        return found

    return weights(file, change)


def prefixed(file: str, prefix: str) -> Make:
    return weights(file, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def without(file: str, part: str) -> Make:
    return weights(file, lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def reshaped(file: str, part: str) -> Make:
    def change(tensors: Tensors) -> Tensors:
        name = next(name for name in sorted(tensors) if part in name)
        return tensors | {name: torch.cat([tensors[name], tensors[name]])}

    return weights(file, change)


def more(file: str, **tensors: torch.Tensor) -> Make:
    return weights(file, lambda found: found | tensors)


def both(*makes: Make) -> Make:
    def make(base: Path) -> None:
        for one in makes:
            one(base)

    return make


def text(file: str, content: str | bytes) -> Make:
    def make(base: Path) -> None:
        (base / file).unlink(missing_ok=True)
        (base / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def dangling(file: str) -> Make:
    def make(base: Path) -> None:
        (base / file).unlink()
        (base / file).symlink_to("../../blobs/0123")

    return make


def linked(base: Path) -> None:
    """As a hub cache holds it: every file a link to a blob."""
    blobs = base.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in base.rglob("*") if path.is_file())):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))


def index_of_nothing(base: Path) -> None:
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00009.safetensors"}}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def index_of_other_names(base: Path) -> None:
    index = {"weight_map": {"conv_in.weights": "diffusion_pytorch_model.safetensors"}}
    (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def sharded(
    file: str, middle: str = "", spelling: str = "{stem}{middle}-{number:05}-of-00002", index: bool = True
) -> Make:
    def make(base: Path) -> None:
        tensors = load_file(base / file)
        (base / file).unlink()
        folder, stem = (base / file).parent, Path(file).stem
        weight_map = {}
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
            name = spelling.format(stem=stem, middle=middle, number=number) + ".safetensors"
            save_file({name: tensors[name] for name in names}, folder / name)
            weight_map |= dict.fromkeys(names, name)
        if index:
            listed = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index{middle}.json").write_text(json.dumps(listed))

    return make


def variant(*files: str, keep: bool = False) -> Make:
    def make(base: Path) -> dict[str, Any]:
        for file in files:
            path = base / file
            (shutil.copy if keep else shutil.move)(path, path.with_suffix(".fp16.safetensors"))
        return {"base": {"path": str(base), "variant": "fp16"}}

    return make


def cast(dtype: torch.dtype, *files: str) -> Make:
    return both(*(weights(file, lambda found: {name: one.to(dtype) for name, one in found.items()}) for file in files))


def vae_alone(*makes: Make) -> Make:
    """The folder's VAE, changed and given alone."""

    def make(base: Path) -> dict[str, Any]:
        alone = base.parent / "alone"
        shutil.copytree(base / "vae", alone / "vae")
        both(*makes)(alone)
        shutil.move(alone / "vae", base.parent / "vae")
        return {"base": {"path": str(base)}, "vae": {"path": str(base.parent / "vae")}}

    return make


def built_vae(**changes: Any) -> Make:
    """A VAE of other settings, with weights that fit them."""

    def make(base: Path) -> None:
        from diffusers import AutoencoderKL

        config = AutoencoderKL.load_config(base / "vae") | changes
        shutil.rmtree(base / "vae")
        AutoencoderKL.from_config(config).save_pretrained(base / "vae")

    return make


def built_tiny_vae(base: Path) -> None:
    from diffusers import AutoencoderTiny

    shutil.rmtree(base / "vae")
    AutoencoderTiny().save_pretrained(base / "vae")


def only(folder: str, file: str, content: str = "", keep: tuple[str, ...] = ()) -> Make:
    """A folder of another kind, with one telling file."""

    def make(base: Path) -> dict[str, Any]:
        other = base.parent / folder
        (other / file).parent.mkdir(parents=True)
        (other / file).write_text(content)
        for name in keep:
            shutil.copytree(base, other / name)
        return {"base": {"path": str(other)}}

    return make


def single_file(base: Path) -> dict[str, Any]:
    return {"base": {"path": str(base / UNET)}}


def nested_text_config(base: Path) -> None:
    path = base / "text_encoder_2" / "config.json"
    inner = json.loads(path.read_text())
    outer = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": inner["projection_dim"]}
    path.write_text(json.dumps(outer | {"text_config": inner, "vision_config": {"model_type": "clip_vision_model"}}))


def token_added(base: Path, rows: bool = False) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    assert tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(base / "tokenizer")
    if rows:
        name = "embeddings.token_embedding.weight"
        config = json.loads((base / "text_encoder" / "config.json").read_text())
        settings("text_encoder/config.json", vocab_size=config["vocab_size"] + 1)(base)

        def add(found: Tensors) -> Tensors:
            (key,) = (key for key in found if key.endswith(name))
            return found | {key: torch.cat([found[key], found[key][:1]])}

        weights(CLIP_1, add)(base)


def slow_tokenizers(base: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        path = base / name / "tokenizer.json"
        model = json.loads(path.read_text())["model"]
        (base / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (base / name / "merges.txt").write_text("".join(f"{line}\n" for line in ("#version: 0.2", *merges)))
        path.unlink()


def reads_more(base: Path) -> None:
    """248 tokens, as of long CLIPs."""
    for name in ("", "_2"):
        settings(f"tokenizer{name}/tokenizer_config.json", model_max_length=248)(base)
        settings(f"text_encoder{name}/config.json", max_position_embeddings=248)(base)

        def longer(found: Tensors) -> Tensors:
            (key,) = (key for key in found if key.endswith("position_embedding.weight"))
            return found | {key: torch.cat([found[key]] * 4)[:248]}

        weights(f"text_encoder{name}/model.safetensors", longer)(base)


def scheduler(name: str, library: str = "diffusers", **changes: Any) -> Make:
    return both(
        settings("model_index.json", scheduler=[library, name]),
        settings("scheduler/scheduler_config.json", _class_name=name, **changes),
    )


def quantised(base: Path) -> None:
    """As bitsandbytes saves 4 bits: packed bytes, with their scales beside."""

    def pack(found: Tensors) -> Tensors:
        packed = dict(found)
        name = "mid_block.attentions.0.proj_in.weight"
        packed[name] = torch.zeros(found[name].numel() // 2, 1, dtype=torch.uint8)
        packed[f"{name}.absmax"] = torch.zeros(4)
        packed[f"{name}.quant_map"] = torch.zeros(16)
        packed[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)
        return packed

    weights(UNET, pack)(base)


REFUSED: dict[str, tuple[Make, str]] = {
    # A wrong picture in silence, until they were refused.
    "text_encoder_2 without its projection": (without(CLIP_2, "text_projection"), "asks for: text_projection.weight"),
    "a text encoder without a layer": (without(CLIP_1, "layers.1."), "lacks weights that its config.json asks for"),
    "a text encoder in LDM names": (
        prefixed(CLIP_1, "conditioner.embedders.0.transformer.text_model."),
        "LDM (single-file) key names",
    ),
    "open_clip's names": (
        renamed(CLIP_2, ("text_model.encoder.layers", "transformer.resblocks")),
        "LDM (single-file) key names",
    ),
    "text_encoder_2 as a plain CLIPTextModel": (
        settings("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is of class CLIPTextModel, where SDXL's is CLIPTextModelWithProjection",
    ),
    "a VAE alone of another factor": (
        vae_alone(
            built_vae(
                block_out_channels=[8, 8, 8],
                down_block_types=["DownEncoderBlock2D"] * 3,
                up_block_types=["UpDecoderBlock2D"] * 3,
                norm_num_groups=1,
            )
        ),
        "one latent covers 4 pixels of a side, where SDXL's cover 8",
    ),
    # UNet.
    "a UNet without some weights": (without(UNET, "mid_block"), "lacks weights that its config.json asks for"),
    "a UNet's weights of another shape": (reshaped(UNET, "conv_in.weight"), "conv_in.weight is (32, 4, 3, 3) where"),
    "a UNet in LDM names": (
        renamed(UNET, ("down_blocks.", "model.diffusion_model.input_blocks.")),
        "LDM (single-file) key names",
    ),
    "a UNet in bare LDM names": (renamed(UNET, ("down_blocks.", "input_blocks.")), "LDM (single-file) key names"),
    "PEFT's names": (renamed(UNET, ("to_q.weight", "to_q.base_layer.weight")), "PEFT's `base_layer` names"),
    "PEFT's whole model": (prefixed(UNET, "base_model.model."), "PEFT's `base_layer` names"),
    "an adapter beside": (
        more(UNET, **{"conv_in.lora_A.default.weight": torch.zeros(4, 4)}),
        "an adapter's (LoRA) weights",
    ),
    "torch.compile's names": (prefixed(UNET, "_orig_mod."), "save the model within, as in `unet._orig_mod`"),
    "DataParallel's names": (prefixed(UNET, "module."), "names that all begin with `module.`"),
    "bitsandbytes' files": (quantised, "weights quantised by bitsandbytes"),
    "a text encoder in whole numbers": (
        weights(CLIP_1, lambda found: {name: tensor.to(torch.int8) for name, tensor in found.items()}),
        "is of type I8",
    ),
    "a quantiser's configuration": (
        settings("unet/config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised weights (bitsandbytes)",
    ),
    "scaled fp8": (
        more(UNET, **{"conv_in.scale_weight": torch.ones(1)}),
        "quantised weights with scales of their own",
    ),
    "IP-Adapter": (
        settings("unet/config.json", encoder_hid_dim_type="ip_image_proj", encoder_hid_dim=32),
        "encoder_hid_dim_type is ip_image_proj",
    ),
    "an index of files that are not there": (index_of_nothing, "00001-of-00009.safetensors: missing, though"),
    "an index of other names": (index_of_other_names, "has no conv_in.weights, though"),
    "an index that is none": (
        text("unet/diffusion_pytorch_model.safetensors.index.json", "{}"),
        "has no weight_map of names to files",
    ),
    "shards without an index": (
        sharded(UNET, index=False),
        "no diffusion_pytorch_model.safetensors.index.json that lists them",
    ),
    "sample_size a list": (settings("unet/config.json", sample_size=[16, 16]), "sample_size is [16, 16]"),
    "sample_size nothing": (settings("unet/config.json", sample_size=0), "sample_size is 0"),
    "sample_size null": (settings("unet/config.json", sample_size=None), "sample_size is None"),
    "block_out_channels a word": (settings("unet/config.json", block_out_channels="wide"), "unet"),
    "widths by block that differ": (
        settings("unet/config.json", cross_attention_dim=[56, 32]),
        "expects text embeddings [56, 32] wide",
    ),
    # Schedulers.
    "an unknown scheduler": (scheduler("EulerHyperScheduler"), "diffusers has no scheduler 'EulerHyperScheduler'"),
    "a scheduler of another library": (
        scheduler("EulerDiscreteScheduler", "my_pipeline"),
        "takes the scheduler EulerDiscreteScheduler from my_pipeline",
    ),
    "a scheduler without its package": (scheduler("DPMSolverSDEScheduler"), "requires the torchsde library"),
    "flow matching": (
        scheduler("FlowMatchEulerDiscreteScheduler"),
        "FlowMatchEulerDiscreteScheduler is for flow matching",
    ),
    "a scheduler of audio models": (scheduler("ScoreSdeVpScheduler"), "ScoreSdeVpScheduler"),
    "a schedule that there is not": (
        settings("scheduler/scheduler_config.json", beta_schedule="steep"),
        "scheduler: NotImplementedError: steep",
    ),
    # JSON.
    "model_index.json a list": (text("model_index.json", "[]"), "model_index.json: not a JSON object"),
    "no model_index.json": (lambda base: (base / "model_index.json").unlink(), "no model_index.json"),
    "model_index.json not JSON": (text("model_index.json", "{"), "model_index.json: can't be read as JSON"),
    "model_index.json with a BOM": (text("model_index.json", b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
    "a config with a BOM": (text("vae/config.json", b"\xef\xbb\xbf{}"), "config.json: begins with a byte order mark"),
    "a tokenizer with a BOM": (text("tokenizer/tokenizer.json", b"\xef\xbb\xbf{}"), "begins with a byte order mark"),
    "a component that is none": (settings("model_index.json", unet=[None, None]), "unet is [None, None], no pair"),
    # Text.
    "a text encoder's weights of another shape": (
        reshaped(CLIP_1, "token_embedding"),
        "where its config.json asks for",
    ),
    "projection_dim missing": (
        settings("text_encoder_2/config.json", "projection_dim"),
        "projection_dim is absent from text_encoder_2/config.json",
    ),
    "a tokenizer without model_max_length": (
        settings("tokenizer/tokenizer_config.json", "model_max_length"),
        "tokenizer_config.json: no model_max_length",
    ),
    "a tokenizer of longer texts": (
        settings("tokenizer/tokenizer_config.json", model_max_length=248),
        "texts of 248 tokens (model_max_length), where text_encoder reads 77",
    ),
    "a token without its row": (token_added, "token '<my-cat>' has number"),
    "a tokenizer of another model": (text("tokenizer_2/tokenizer.json", '{"model": 1}'), "tokenizer_2"),
    # A VAE given alone.
    "TAESD": (vae_alone(built_tiny_vae), "of class AutoencoderTiny, where SDXL's is AutoencoderKL (TAESD"),
    "TAESD's weights": (
        vae_alone(without(VAE, "up_blocks"), renamed(VAE, ("encoder.down_blocks", "encoder.layers"))),
        "a tiny autoencoder (TAESD)",
    ),
    "16 channels": (vae_alone(built_vae(latent_channels=16)), "latents of 16 channels, where SDXL's have 4"),
    "a VAE in LDM names": (vae_alone(renamed(VAE, ("down_blocks", "down"))), "LDM (single-file) key names"),
    "a VAE in whole LDM names": (vae_alone(prefixed(VAE, "first_stage_model.")), "LDM (single-file) key names"),
    "a decoder alone": (
        vae_alone(without(VAE, "encoder.")),
        "a decoder alone",
    ),
    "a VAE's weights of another shape": (vae_alone(reshaped(VAE, "conv_in")), "where its config.json asks for"),
    "a UNet that predicts variances": (settings("unet/config.json", out_channels=8), "not an SDXL text-to-image UNet"),
    "a VAE of another class in a folder": (
        settings("model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"]),
        "vae is of class AsymmetricAutoencoderKL",
    ),
    # Lines that misled.
    "a single file": (single_file, "a single file, where a folder in diffusers' layout is wanted"),
    "a folder of a single file": (only("one", "sd_xl_base_1.0.safetensors"), "it holds a single file, sd_xl_base_1.0"),
    "a dangling link": (dangling(UNET), "a link to a file that is not there"),
    "a dangling configuration": (dangling("unet/config.json"), "a link to a file that is not there"),
    "a dangling index": (dangling("model_index.json"), "a link to a file that is not there"),
    "an LFS pointer": (text(VAE, POINTER), "a Git LFS pointer in place of the file"),
    "an LFS pointer for a vocabulary": (text("tokenizer/tokenizer.json", POINTER), "a Git LFS pointer"),
    "a LoRA": (only("lora", "pytorch_lora_weights.safetensors"), "it holds a LoRA, an adapter and no checkpoint"),
    "PEFT's adapter": (only("peft", "adapter_config.json", "{}"), "it holds a LoRA"),
    "a training run": (only("run", "checkpoint-500/optimizer.bin"), "a training run's folder"),
    "MLflow": (
        only("flow", "MLmodel", keep=("components",)),
        "flow/components holds a model_index.json: name that folder",
    ),
    "a folder within": (only("outer", "README.md", keep=("inner",)), "outer/inner holds a model_index.json"),
    "ONNX": (only("onnx", "unet/model.onnx", ""), "an ONNX export, which is not served"),
    "another pipeline": (
        both(
            settings("model_index.json", _class_name="StableDiffusionPipeline"),
            lambda base: shutil.rmtree(base / "text_encoder_2"),
        ),
        "no text_encoder_2 folder: its pipeline is StableDiffusionPipeline, not Stable Diffusion XL's",
    ),
    "a variant that no component has": (
        lambda base: {"base": {"path": str(base), "variant": "fp16"}},
        "no model.fp16.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(base: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, fragment = REFUSED[name]
    made = make(base)
    config = parse_config(made if isinstance(made, dict) else {"base": {"path": str(base)}})
    capfd.readouterr()
    said = one_line(lambda: check_sources(config, thorough=True))
    assert capfd.readouterr() == ("", ""), "nothing else is printed"
    assert fragment in said
    assert said.startswith(str(base.parent)), "it names the file or folder at fault"
    # A replica of a hub's checkpoint is the first to see it.
    assert fragment in one_line(lambda: start(config))


def built_unet(**changes: Any) -> Make:
    def make(base: Path) -> None:
        config = UNet2DConditionModel.load_config(base / "unet") | changes
        shutil.rmtree(base / "unet")
        UNet2DConditionModel.from_config(config).save_pretrained(base / "unet")

    return make


def no_number(file: str) -> Make:
    return weights(file, lambda found: {name: tensor * float("nan") for name, tensor in found.items()})


# Fine by every header and configuration.
FAILS_DRY: dict[str, tuple[Make, str]] = {
    "a UNet that wants a class": (
        built_unet(class_embed_type="timestep"),
        "unet: a dry step: ValueError: class_labels",
    ),
    "a UNet of no numbers": (no_number(UNET), "unet: its prediction is not finite"),
    "a text encoder of no numbers": (no_number(CLIP_1), "text_encoder: its embeddings are not finite"),
    "a VAE of no numbers": (no_number(VAE), "vae: its pictures are not finite, in float32 either"),
}


@pytest.mark.parametrize("name", FAILS_DRY)
def test_a_dry_step_finds_what_no_file_tells(base: Path, name: str) -> None:
    make, fragment = FAILS_DRY[name]
    make(base)
    config = parse_config({"base": {"path": str(base)}})
    check_sources(config, thorough=True)
    assert fragment in one_line(lambda: start(config))


@pytest.mark.parametrize("trace", [False, True])
def test_what_a_unet_refuses_is_not_laid_to_its_trace(base: Path, trace: bool) -> None:
    built_unet(class_embed_type="timestep")(base)
    said = one_line(lambda: UNetRunner(Checkpoint(base, None), FLOAT32, trace).dry_run())
    assert "class_labels" in said and "trace" not in said


def test_a_dry_step_is_of_the_size_that_is_asked_for(base: Path) -> None:
    denoiser = UNetRunner(Checkpoint(base, None), FLOAT32, trace=False)
    seen = []
    hook = denoiser._unet.register_forward_pre_hook(lambda _, arguments: seen.append(tuple(arguments[0].shape)))
    denoiser.dry_run()
    denoiser.dry_run(size_px=128)
    hook.remove()
    assert seen == [(2, 4, 8, 8), (1, 4, 8, 8), (2, 4, 16, 16), (1, 4, 16, 16)]  # guided and not


def test_the_refiners_weights_are_compared_too(base: Path, tiny: Path) -> None:
    refiner = Path(shutil.copytree(tiny / "refiner", base.parent / "refiner"))
    config = parse_config({"base": {"path": str(base)}, "refiner": {"path": str(refiner)}})
    assert check_sources(config, thorough=True) == []
    without(CLIP_2, "layers.3")(refiner)
    assert f"{refiner / CLIP_2}: lacks weights" in one_line(lambda: check_sources(config, thorough=True))
    check(Checkpoint(refiner, None), REFINER_COMPONENTS, "refiner")  # headers alone, for the builder
    base_checkpoint, refiner_checkpoint = Checkpoint(base, None), Checkpoint(refiner, None)
    assert "lacks weights" in one_line(lambda: TextEncoders(base_checkpoint, refiner_checkpoint, FLOAT32))


def test_the_command_says_it(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = base.parent / "config.yaml"
    args = {"base": {"path": str(base)}}
    application = {"name": "sdxl", "route_prefix": "/", "import_path": "serve_app.graph:build_app", "args": args}
    file.write_text(json.dumps({"applications": [application]}))
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr() == (f"{file}: fine ({base})\n", "")
    without(UNET, "mid_block")(base)
    assert main(["check", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"sdxl-serve: {base / UNET}: lacks weights that its config.json asks for: mid_block.")
    application["args"] = {"base": {"hub_id": "nobody/nothing", "revision": REVISION}}
    file.write_text(json.dumps({"applications": [application]}))
    assert main(["check", str(file)]) == 0
    assert (
        "nobody/nothing@01234567: not on this machine; the replica that fetches it checks it" in capsys.readouterr().err
    )


# The hub, by its cache.

REVISION = "0123456789" * 4


@pytest.fixture
def cached(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's snapshot of the base, every file a link to a blob."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "models--some--body" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    shutil.move(base, snapshot)
    linked(snapshot)
    return snapshot


def hub(variant: str | None = None) -> AppConfig:
    return parse_config({"base": {"hub_id": "some/body", "revision": REVISION, "variant": variant}})


def test_a_hubs_checkpoint_from_its_cache(cached: Path) -> None:
    assert check_sources(hub(), thorough=True) == []
    draw(start(hub()), steps=2)
    (cached / UNET).resolve().unlink()
    assert "a link to a file that is not there" in one_line(lambda: check_sources(hub(), thorough=True))
    assert "a link to a file that is not there" in one_line(lambda: start(hub()))


def test_a_hubs_checkpoint_that_lacks_weights(cached: Path) -> None:
    blob = (cached / CLIP_2).resolve()
    (cached / CLIP_2).unlink()
    shutil.copy(blob, cached / CLIP_2)
    without(CLIP_2, "text_projection")(cached)
    assert "text_projection.weight" in one_line(lambda: check_sources(hub(), thorough=True))
    assert "text_projection.weight" in one_line(lambda: start(hub()))


@pytest.mark.parametrize("part", ["unet", UNET, "tokenizer_2"])
def test_a_part_of_a_hubs_checkpoint(cached: Path, part: str) -> None:
    """The machine that checks may have fetched a part and can fetch the rest; a replica without the hub can't."""
    path = cached / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (absent,) = check_sources(hub(), thorough=True)
    assert str(absent) == "some/body@01234567"
    assert one_line(lambda: start(hub())).endswith(
        "; neither the hub nor this machine's cache gave it of some/body@01234567"
    )


def test_a_variant_that_a_hub_has_of_some_components(cached: Path) -> None:
    variant(UNET)(cached)
    assert check_sources(hub("fp16"), thorough=True) == []
    draw(start(hub("fp16")), steps=2)
    wrong = hub("fp61")
    assert "no model.fp61.safetensors; there is model.safetensors" in one_line(lambda: start(wrong))


def test_a_hub_id_that_is_not_cached(cached: Path) -> None:
    config = parse_config({"base": {"hub_id": "no/body", "revision": REVISION}})
    assert [str(source) for source in check_sources(config, thorough=True)] == ["no/body@01234567"]
    said = one_line(lambda: start(config))
    assert said == "no/body@01234567: not in this machine's cache, and the hub can't be reached"


FETCHES = """
import sys
from serve_app.config.settings import ModelSource
from serve_app.models.checkpoint import locate
for name in sys.argv[2:]:
    try:
        locate(ModelSource(hub_id=name, revision=sys.argv[1]), ("vae",))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_what_the_hub_refuses(tmp_path: Path) -> None:
    codes = {"no/body": (404, "RepoNotFound"), "some/gated": (403, "GatedRepo"), "an/old": (404, "RevisionNotFound")}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = next(answer for name, answer in codes.items() if name in self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        environment = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
        command = [sys.executable, "-c", FETCHES, REVISION, *codes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        server.shutdown()
    start = "ConfigurationError: {}@01234567: can't be fetched from the hub: "
    assert done.stdout.splitlines() == [
        start.format("no/body") + "there is no such repository, or it is private and HF_TOKEN is not set",
        start.format("some/gated") + "it is gated: its terms must be accepted, and HF_TOKEN set",
        start.format("an/old") + "it has no such revision",
    ]


def extra_keys(base: Path) -> None:
    more(UNET, **{"watermark.key": torch.zeros(3), "v_pred": torch.zeros(1)})(base)
    more(CLIP_1, **{"embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(1)})(base)
    more(VAE, **{"loss.discriminator.weight": torch.zeros(2)})(base)
    (base / "unet" / "notes.txt").write_text("by hand")
    (base / "README.md").write_text("# mine")


ATTENTION_OF_2022 = renamed(
    VAE,
    ("attentions.0.to_q", "attentions.0.query"),
    ("attentions.0.to_k", "attentions.0.key"),
    ("attentions.0.to_v", "attentions.0.value"),
    ("attentions.0.to_out.0", "attentions.0.proj_attn"),
)
ALL = (UNET, VAE, CLIP_1, CLIP_2)
DRAWN: dict[str, Make] = {
    "as it is": lambda base: None,
    "fp16 in every component": variant(*ALL),
    "fp16 beside the full ones": variant(*ALL, keep=True),
    "fp16 but for the VAE": variant(UNET, CLIP_1, CLIP_2),  # diffusers falls back component by component
    "fp16 of the UNet alone": variant(UNET),
    "bf16": cast(torch.bfloat16, *ALL),
    "fp8": cast(torch.float8_e4m3fn, UNET),
    "shards": both(sharded(UNET), sharded(CLIP_2)),
    "shards beside a whole file": both(
        lambda base: shutil.copy(base / UNET, base / "whole"),
        sharded(UNET),
        lambda base: shutil.move(base / "whole", base / UNET),
        weights(UNET, lambda found: {name: tensor * 0 for name, tensor in found.items()}),  # diffusers reads the shards
    ),
    "fp16 shards": lambda base: (sharded(UNET, ".fp16")(base), {"base": {"path": str(base), "variant": "fp16"}})[1],
    "fp16 shards, the other spelling": lambda base: (
        sharded(UNET, ".fp16", "{stem}-{number:05}-of-00002{middle}")(base),
        {"base": {"path": str(base), "variant": "fp16"}},
    )[1],
    "a hub's cache": linked,
    "extra keys and files": extra_keys,
    "slow tokenizers": slow_tokenizers,
    "a token with its row": lambda base: token_added(base, rows=True),
    "248 tokens": reads_more,
    "a whole CLIP's configuration": nested_text_config,
    "widths by block": settings("unet/config.json", cross_attention_dim=[56, 56]),
    "attention's names of 2022": ATTENTION_OF_2022,
    "text names without a prefix": renamed(CLIP_1, ("text_model.", "")),
    "text names with a prefix": weights(
        CLIP_1, lambda found: {f"text_model.{name.removeprefix('text_model.')}": one for name, one in found.items()}
    ),
    "spaces and letters": lambda base: {"base": {"path": str(shutil.move(base, base.parent / "mein schönes Modell"))}},
    "LCM's scheduler": scheduler("LCMScheduler", original_inference_steps=4),
    "EDM's scheduler": scheduler("EDMEulerScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
    "a scheduler over v": settings("scheduler/scheduler_config.json", prediction_type="v_prediction"),
}


def draw(parts: Parts, steps: int) -> np.ndarray:
    encode = EncodeTask("a red fox <my-cat>", None, None, None, None, True, False, False)
    jobs = parts.encoders.jobs(encode)
    done = {role: parts.encoders.embed([job])[0] for role, job in jobs.items()}
    conditioning = parts.encoders.assemble(encode, done).base
    ids = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
    task = DenoiseTask("t", conditioning, Noise(1), 64, 64, None, steps, 5.0, 0.0, 0.0, ids, ids)
    state = parts.denoiser.begin(task)
    while state.index < len(state.timesteps):
        parts.denoiser.advance(state, parts.denoiser.forward([state])[0])
    (pixels,) = parts.decoder.decode([parts.denoiser.finish(state, TimeInStage()).samples])
    assert isinstance(pixels, np.ndarray)
    return pixels


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_drawn_as_diffusers_draws_it(base: Path, name: str) -> None:
    made = DRAWN[name](base)
    config = parse_config(made if isinstance(made, dict) else {"base": {"path": str(base)}})
    assert check_sources(config, thorough=True) == []
    ours = draw(start(config), steps=3)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        config.base.folder, variant=config.base.variant, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red fox <my-cat>", width=64, height=64, num_inference_steps=3, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(1), output_type="np",
    ).images[0]  # fmt: skip
    theirs = (picture * 255).round().astype(np.uint8)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
