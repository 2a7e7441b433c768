"""The training command, a step a stage: it makes both checkpoints from nothing, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from serve_app.demo.training.train import main

STAGES = ("autoencoder", "layout", "base", "decoder", "refiner")


def train(folder: Path, **steps: int) -> None:
    counts = dict.fromkeys(STAGES, 1) | steps
    main(
        ["--out", str(folder / "out"), "--work", str(folder / "work"), "--pictures", "24"]
        + [flag for stage, count in counts.items() for flag in (f"--{stage}-steps", str(count))]
    )


def steps_taken(folder: Path) -> dict[str, int]:
    return {
        stage: torch.load(folder / "work" / f"{stage}.pt", weights_only=True, map_location="cpu")["step"]
        for stage in STAGES
    }


def test_from_nothing_to_both_checkpoints_and_on(tmp_path: Path) -> None:
    train(tmp_path)
    assert steps_taken(tmp_path) == dict.fromkeys(STAGES, 1)
    times = json.loads((tmp_path / "work" / "times.json").read_text())
    assert set(STAGES) <= times.keys()
    base = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "base")
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "out" / "refiner")
    assert base.unet.config.addition_embed_type == refiner.unet.config.addition_embed_type == "text_time"
    assert refiner.text_encoder is None and refiner.config.requires_aesthetics_score

    encoded = (tmp_path / "work" / "latents.pt").stat().st_mtime_ns
    refiner_before = (tmp_path / "work" / "refiner.pt").stat().st_mtime_ns
    train(tmp_path, base=2)
    assert steps_taken(tmp_path) == dict.fromkeys(STAGES, 1) | {"base": 2}
    assert (tmp_path / "work" / "latents.pt").stat().st_mtime_ns == encoded, "the autoencoder is the same"
    assert (tmp_path / "work" / "refiner.pt").stat().st_mtime_ns > refiner_before, "another base, another refiner"

    base_before = (tmp_path / "work" / "base.pt").stat().st_mtime_ns
    train(tmp_path, base=2, layout=2)
    assert steps_taken(tmp_path) == dict.fromkeys(STAGES, 1) | {"layout": 2, "base": 2}
    assert (tmp_path / "work" / "latents.pt").stat().st_mtime_ns == encoded
    assert (tmp_path / "work" / "base.pt").stat().st_mtime_ns > base_before, "another start, another base"
