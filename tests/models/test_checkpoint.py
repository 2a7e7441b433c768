"""A missing or broken checkpoint is one line that says what is missing where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler
from safetensors.torch import load_file, save_file

from serve_app.config.settings import parse_config
from serve_app.graph.build import build_app
from serve_app.models.check import check, check_sources
from serve_app.models.checkpoint import BASE_COMPONENTS, REFINER_COMPONENTS, Checkpoint
from serve_app.models.loading import load_scheduler, load_text_encoder, load_unet, load_vae
from serve_app.request.errors import ConfigurationError


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "base", tmp_path / "base"))


def fault(folder: Path, variant: str | None = None) -> str:
    with pytest.raises(ConfigurationError) as error:
        check(Checkpoint(folder, variant), BASE_COMPONENTS)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_whole_checkpoints_pass(tiny: Path) -> None:
    check(Checkpoint(tiny / "base", None), BASE_COMPONENTS)
    check(Checkpoint(tiny / "refiner", None), REFINER_COMPONENTS, "refiner")


def test_missing_folder(tmp_path: Path) -> None:
    assert fault(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such folder"


@pytest.mark.parametrize("component", BASE_COMPONENTS)
def test_missing_component(base: Path, component: str) -> None:
    shutil.rmtree(base / component)
    assert f"{component}" in fault(base)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "unet", "vae"])
def test_missing_weights(base: Path, component: str) -> None:
    (weights,) = (base / component).glob("*.safetensors")
    weights.unlink()
    assert f"{component}: no {weights.name}" in fault(base)


def test_pickled_weights_are_named_and_not_read(base: Path) -> None:
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "diffusion_pytorch_model.bin" in fault(base) and "only safetensors" in fault(base)


def test_incomplete_copy(base: Path) -> None:
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "incomplete copy" in fault(base)
    weights.write_bytes(b"not a tensor in sight")
    assert "not a safetensors file" in fault(base)


def test_missing_shard(base: Path) -> None:
    folder = base / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "00001-of-00002.safetensors: missing" in fault(base)


def test_variant_must_be_there(base: Path) -> None:
    assert "no model.fp16.safetensors" in fault(base, "fp16")


def test_broken_configuration(base: Path) -> None:
    (base / "unet" / "config.json").write_text("{")
    assert "config.json: can't be read as JSON" in fault(base)


def test_components_that_do_not_fit(base: Path) -> None:
    path = base / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"cross_attention_dim": 2048}))
    assert "expects text embeddings 2048 wide" in fault(base)
    path.write_text(json.dumps(config | {"time_cond_proj_dim": 256}))
    assert "guidance-distilled" in fault(base)
    path.write_text(json.dumps(config | {"addition_embed_type": None}))
    assert "not an SDXL" in fault(base)


@pytest.mark.parametrize(("role", "components"), [("base", BASE_COMPONENTS), ("refiner", REFINER_COMPONENTS)])
def test_each_deployment_is_content_with_its_own_components(
    tiny: Path, tmp_path: Path, role: Literal["base", "refiner"], components: tuple[str, ...]
) -> None:
    """A replica fetches its own component alone: nothing else need be there."""
    for part in (("unet", "scheduler"), tuple(c for c in components if c.startswith(("text", "tok")))):
        folder = tmp_path / "-".join(part)
        folder.mkdir()
        shutil.copy(tiny / role / "model_index.json", folder)
        for component in part:
            shutil.copytree(tiny / role / component, folder / component)
        check(Checkpoint(folder, None), part, role)


def test_a_base_is_no_refiner_and_the_other_way_round(tiny: Path, base: Path) -> None:
    with pytest.raises(ConfigurationError, match="a refiner's text_encoder_2 give 32"):
        check(Checkpoint(base, None), REFINER_COMPONENTS, "refiner")
    refiner = tiny / "refiner"
    with pytest.raises(ConfigurationError, match="no text_encoder folder"):
        check(Checkpoint(refiner, None), BASE_COMPONENTS)
    shutil.rmtree(base)
    shutil.copytree(refiner, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"requires_aesthetics_score": False}))
    with pytest.raises(ConfigurationError, match=r"6 time ids give .* \(requires_aesthetics_score is False\)"):
        check(Checkpoint(base, None), REFINER_COMPONENTS, "refiner")


def test_the_builder_checks_what_is_here_and_needs_nothing(base: Path, tmp_path: Path) -> None:
    build_app({"base": {"path": str(tmp_path / "on-the-workers-only")}})
    shutil.rmtree(base / "vae")
    with pytest.raises(ConfigurationError, match="no vae folder"):
        build_app({"base": {"path": str(base)}})


def test_the_builder_checks_without_torch() -> None:
    script = (
        "import sys; from serve_app.config.settings import parse_config; "
        "from serve_app.models.check import check_sources; "
        "check_sources(parse_config({'refiner': {'path': 'embedded:refiner'}})); "
        "print(*{'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "\n"


def test_the_scheduler_is_the_one_that_model_index_names(base: Path) -> None:
    """Its configuration may have been saved by another class: diffusers' pipelines don't look."""
    checkpoint = Checkpoint(base, None)
    assert type(load_scheduler(checkpoint)) is type(DiffusionPipeline.from_pretrained(base).scheduler)
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    found = type(load_scheduler(checkpoint))
    assert found is type(DiffusionPipeline.from_pretrained(base).scheduler) is EulerAncestralDiscreteScheduler
    index["scheduler"] = ["diffusers", "NoScheduler"]
    (base / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError, match="no scheduler 'NoScheduler'"):
        load_scheduler(checkpoint)


def test_a_vae_published_alone(tiny: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "base" / "vae", tmp_path / "vae")
    shutil.rmtree(base / "vae")
    check_sources(parse_config({"base": {"path": str(base)}, "vae": {"path": str(tmp_path / "vae")}}))
    assert load_vae(Checkpoint(tmp_path / "vae", None), torch.float32).config.latent_channels == 4


def test_variants_and_shards_load(base: Path) -> None:
    whole = load_unet(Checkpoint(base, None), torch.float32).state_dict()
    folder = base / "unet"
    single = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model.fp16-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    encoder = base / "text_encoder"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    checkpoint = Checkpoint(base, "fp16")
    check(checkpoint, ("unet", "text_encoder", "tokenizer"))
    assert all(torch.equal(whole[name], t) for name, t in load_unet(checkpoint, torch.float32).state_dict().items())
    assert load_text_encoder(checkpoint, "text_encoder", torch.float16).dtype == torch.float16
