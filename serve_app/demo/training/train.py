"""Trains the embedded model from nothing.

    torchrun --nproc-per-node 2 -m serve_app.demo.training.train --out my-model

A process a core or GPU; `python -m serve_app.demo.training.train` is one.

Five stages: the autoencoder; the text encoders and the base UNet together, first on small pictures and the highest
noise alone, where the text says everything, then on all sizes and all noise; the decoder again, for sharper edges; the
refiner, on the last fifth of the noise alone. Each ends after its steps or its minutes, whichever comes first,
and resumes from its last checkpoint. The folders `base` and `refiner` under --out are ready after their stages; work
files stand in --work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from serve_app.demo.training import ranks
from serve_app.demo.training.autoencoder import train_autoencoder, train_decoder
from serve_app.demo.training.base import train_base, train_layout
from serve_app.demo.training.loop import Stage
from serve_app.demo.training.refiner import train_refiner

AFTER_LAYOUT = ("base.pt", "refiner.pt")
AFTER_AUTOENCODER = ("layout-latents.pt", "layout.pt", "latents.pt", "decoder.pt", "refiner-latents.pt", *AFTER_LAYOUT)
STAGES = (
    Stage("autoencoder", steps=3000, minutes=15, batch=12, learning_rate=7e-4, feeds=AFTER_AUTOENCODER),
    Stage("layout", steps=4000, minutes=8, batch=16, learning_rate=7e-4, feeds=AFTER_LAYOUT),
    Stage("base", steps=16000, minutes=55, batch=16, learning_rate=7e-4, feeds=("refiner.pt",)),
    Stage("decoder", steps=2000, minutes=7, batch=12, learning_rate=5e-4),
    Stage("refiner", steps=2000, minutes=10, batch=32, learning_rate=4e-4),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that base and refiner are written to")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="checkpoints, logs, encoded pictures")
    parser.add_argument(
        "--pictures", type=int, default=12000, help="encoded once for the base; a third for the refiner"
    )
    for stage in STAGES:
        parser.add_argument(f"--{stage.name}-steps", type=int, default=stage.steps)
        parser.add_argument(f"--{stage.name}-minutes", type=float, default=stage.minutes)
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    ranks.start()
    device = ranks.device()
    if device.type == "cpu":
        # For 64 positions plain attention takes a fifth less time than the flash kernel, whose backward pass is slow.
        torch.backends.cuda.enable_flash_sdp(False)  # the switch acts on CPU kernels too, whatever its name
    autoencoder, layout, base, decoder, refiner = (
        replace(stage, steps=getattr(args, f"{stage.name}_steps"), minutes=getattr(args, f"{stage.name}_minutes"))
        for stage in STAGES
    )
    vae = train_autoencoder(autoencoder, args.work, device)
    start = train_layout(layout, vae, args.pictures, args.work, device)
    train_base(base, start, vae, args.pictures, args.work, args.out, device)
    train_decoder(decoder, args.work, args.out, device)
    train_refiner(refiner, args.pictures // 3, args.work, args.out, device)


if __name__ == "__main__":
    main()
