"""Trains the embedded model from nothing: `torchrun --nproc-per-node 2 -m serve_app.demo.train --out serve_app/demo`.

A process a core or GPU; `python -m serve_app.demo.train` is one.

Four stages: the autoencoder; the text encoders and the base UNet together; the decoder again, for sharper edges;
the refiner, on the last fifth of the noise alone. Each ends after its steps or its minutes, whichever comes first,
and resumes from its last checkpoint. The folders `base` and `refiner` under --out are ready after their stages; work
files stand in --work.
"""

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.demo import data, models, ranks
from serve_app.demo.grammar import Scene, sample_scenes

SEED = 20
REFINER_SHARE = 0.2
DROPPED_PROMPTS = 0.1
KL_WEIGHT = 1e-6
ALONE = 0.25
"""Share of one-object scenes: which of two objects is the first takes longest to learn."""
TRIAL_EVERY = 240


@dataclass
class Stage:
    """How long a stage may take and how it learns; the rate falls to a thirtieth along a cosine."""

    name: str
    steps: int
    minutes: float
    batch: int
    learning_rate: float
    ema_decay: float = 0.998
    feeds: tuple[str, ...] = ()
    """Work files that are stale once this stage trains on."""


class ThreadTuner:
    """Chooses one thread or all, whichever makes steps quicker at present.

    On a machine that is shared, a step on all cores waits for the slowest of them and can take longer than on one.
    """

    def __init__(self, most: int) -> None:
        self.candidates = sorted({1, most})
        self.trial: list[tuple[float, int]] = []
        self.best = most

    def before(self, step: int) -> None:
        """Every so often, 4 steps of each candidate are timed; more threads must be clearly quicker."""
        phase = step % TRIAL_EVERY
        if phase < 4 * len(self.candidates):
            torch.set_num_threads(self.candidates[phase // 4])
        else:
            torch.set_num_threads(self.best)

    def after(self, step: int, seconds: float) -> None:
        phase = step % TRIAL_EVERY
        if phase < 4 * len(self.candidates):
            self.trial.append((seconds, self.candidates[phase // 4]))
        if phase == 4 * len(self.candidates) - 1:
            one, most = (sum(s for s, n in self.trial if n == m) for m in (1, self.candidates[-1]))
            self.best = self.candidates[-1] if most <= 0.85 * one else 1
            self.trial.clear()


class Trainer:
    """The loop that all stages share: schedule, clip, moving average, progress bar, checkpoints, clock."""

    def __init__(self, stage: Stage, modules: nn.ModuleDict, work: Path) -> None:
        self.stage = stage
        self.modules = modules
        self.average = copy.deepcopy(modules).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in modules.parameters() if p.requires_grad],
            lr=0.0,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            fused=True,
        )
        self.checkpoint = work / f"{stage.name}.pt"
        self.log = work / f"{stage.name}.jsonl"
        self.step = 0
        self.seconds = 0.0
        self.threads = ThreadTuner(torch.get_num_threads())
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def progress(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        return max(self.step / self.stage.steps, self.seconds / (60 * self.stage.minutes))

    def run(self, loss_of: Callable[[int], Tensor], save_every: int = 200) -> None:
        """Train until done; `loss_of(step)` draws its own batch, seeded by step and rank."""
        if self.progress < 1:
            for name in self.stage.feeds:
                (self.checkpoint.parent / name).unlink(missing_ok=True)
        quiet = ranks.rank() > 0
        bar = tqdm(total=self.stage.steps, initial=self.step, desc=self.stage.name, mininterval=10, disable=quiet)
        mean_loss = math.nan
        spent = 0.0  # seconds of the last step
        while self.progress < 1:
            started = time.monotonic()
            self.threads.before(self.step)
            rate = self.stage.learning_rate * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(self.progress, 1))))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.step + 1) / 150)
            loss = loss_of(self.step)
            loss.backward()
            # The clock goes in with the gradients, so that all ranks see the same and end at the same step.
            mean, self.seconds = ranks.average_gradients(self.modules.parameters(), loss.detach(), self.seconds + spent)
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self._update_average()
            spent = time.monotonic() - started
            self.threads.after(self.step, spent)
            self.step += 1
            mean_loss = mean if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * mean
            bar.update()
            if self.step % 50 == 0 and not quiet:
                bar.set_postfix(loss=f"{mean_loss:.4f}", minutes=f"{self.seconds / 60:.1f}", refresh=False)
                entry = {"step": self.step, "seconds": round(self.seconds, 1), "loss": round(mean_loss, 5)}
                with self.log.open("a") as log:
                    log.write(json.dumps({**entry, "threads": self.threads.best}) + "\n")
            if self.step % save_every == 0:
                self.save()
        self.save()
        bar.close()

    def _update_average(self) -> None:
        decay = min(self.stage.ema_decay, (1 + self.step) / (10 + self.step))
        average = list(self.average.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in self.modules.parameters()], 1 - decay)

    def save(self) -> None:
        if ranks.rank() > 0:
            return
        state = {
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        record_seconds(self.checkpoint.parent, self.stage.name, self.seconds)
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)


def record_seconds(work: Path, name: str, seconds: float) -> None:
    """Note in `times.json` how long a stage has taken so far, over all runs of the command."""
    path = work / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**times, name: round(seconds, 1)}, indent=2) + "\n")


def half_on(device: torch.device) -> AbstractContextManager[None]:
    """Forward passes in bfloat16, which modern processors and GPUs multiply about twice as fast."""
    return torch.autocast(device.type, torch.bfloat16)


# --- autoencoder --------------------------------------------------------------------------------------------


def train_autoencoder(stage: Stage, work: Path, device: torch.device) -> AutoencoderKL:
    """Learns on 64 px crops, cut along the latent grid, and at the end on whole pictures."""
    torch.manual_seed(SEED)
    modules = nn.ModuleDict({"vae": models.make_autoencoder()}).to(device, memory_format=torch.channels_last)
    trainer = Trainer(stage, modules, work)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} autoencoder {step} {ranks.rank()}")
        whole = trainer.progress > 0.85
        count = max(stage.batch // 4, 1) if whole else stage.batch
        pixels = draw_crops(count, whole, rng)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with half_on(device):
            posterior = modules["vae"].encode(pixels).latent_dist
            decoded = modules["vae"].decode(posterior.sample()).sample
        error = decoded.float() - pixels
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        return error.abs().mean() + error.pow(2).mean() + 0.5 * edges + KL_WEIGHT * posterior.kl().float().mean()

    trainer.run(loss_of)
    vae = trainer.average["vae"].cpu()
    normalise_latents(vae)
    return vae


def draw_crops(count: int, whole: bool, rng: random.Random) -> Tensor:
    """Pictures (count, 3, 64, 64), or (count, 3, 128, 128) where whole, in -1..1."""
    crops = []
    for scene in sample_scenes(count, rng.getrandbits(32), held_out=False):
        picture = data.draw_sample(scene, models.NATIVE_PX, models.NATIVE_PX, rng).picture
        if not whole:
            left, top = (models.PIXELS_PER_LATENT * rng.randint(1, 7) for _ in range(2))
            picture = picture.crop((left, top, left + 64, top + 64))
        crops.append(data.to_tensor(picture))
    return torch.stack(crops)


def picture_loss(error: Tensor) -> Tensor:
    """L1 + L2 + the L1 of differences between neighbouring pixels, which rewards edges and patterns."""
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.pow(2).mean() + 0.5 * edges


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL) -> None:
    """Scale the two 1x1 convolutions beside the latents so that these have mean 0 and deviation 1 / scaling_factor.

    Zero-mean channels matter: at the highest noise a flat colour is no more than a small shift of the mean.
    """
    rng = random.Random(SEED)
    pictures = [
        data.to_tensor(data.draw_sample(scene, models.NATIVE_PX, models.NATIVE_PX, rng).picture)
        for scene in sample_scenes(256, SEED, held_out=False)
    ]
    means = torch.cat([vae.encode(torch.stack(pictures[i : i + 32])).latent_dist.mean for i in range(0, 256, 32)])
    shift = means.mean((0, 2, 3))  # (4,)
    scale = 1 / (models.SCALING_FACTOR * means.std((0, 2, 3)))  # (4,)
    n = models.LATENT_CHANNELS
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ shift
    out.weight /= scale[None, :, None, None]
    into.weight[:n] *= scale[:, None, None, None]
    into.bias[:n] = (into.bias[:n] - shift) * scale
    into.bias[n:] += 2 * scale.log()


# --- base ---------------------------------------------------------------------------------------------------


@dataclass
class Encoded:
    """One bucket of pictures: latents (N, 4, h, w) scaled to deviation 1, tokens (N, 77), time ids (N, 5 or 6)."""

    latents: Tensor
    tokens: Tensor
    time_ids: Tensor

    def batch(self, count: int, rng: random.Random, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.tensor([rng.randrange(len(self.latents)) for _ in range(count)])
        return (
            self.latents[rows].float().to(device),
            self.tokens[rows].to(device),
            self.time_ids[rows].to(device),
        )


@torch.no_grad()
def encode_pictures(
    name: str,
    count: int,
    draw: Callable[[Scene, int, int, random.Random], data.Sample],
    time_ids: Callable[[data.Sample], list[float]],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    work: Path,
    device: torch.device,
) -> list[Encoded]:
    """Draw and encode `count` pictures, once, in the buckets of `data.SIZES_PX`; kept on disk for resuming."""
    path = work / f"{name}.pt"
    with ranks.first_rank_first():
        if not path.exists():
            _encode_pictures(path, name, count, draw, time_ids, vae, tokenizer, work, device)
        return [Encoded(**bucket) for bucket in torch.load(path, weights_only=True)]


@torch.no_grad()
def _encode_pictures(
    path: Path,
    name: str,
    count: int,
    draw: Callable[[Scene, int, int, random.Random], data.Sample],
    time_ids: Callable[[data.Sample], list[float]],
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    work: Path,
    device: torch.device,
) -> None:
    started = time.monotonic()
    vae = vae.to(device)
    buckets = []
    bar = tqdm(total=count, desc=name, mininterval=10)
    for (width, height), share in zip(data.SIZES_PX, data.SIZE_SHARES, strict=True):
        rng = random.Random(f"{SEED} {name} {width}x{height}")
        scenes = sample_scenes(round(count * share), rng.getrandbits(32), held_out=False, alone=ALONE)
        latents, tokens, ids = [], [], []
        for start in range(0, len(scenes), 32):
            samples = [draw(scene, width, height, rng) for scene in scenes[start : start + 32]]
            pixels = torch.stack([data.to_tensor(sample.picture) for sample in samples]).to(device)
            with half_on(device):
                encoded = vae.encode(pixels).latent_dist.mean
            latents.append((encoded.float() * models.SCALING_FACTOR).half().cpu())
            tokens.append(tokenize(tokenizer, [sample.text for sample in samples]))
            ids.append(torch.tensor([time_ids(sample) for sample in samples], dtype=torch.float32))
            bar.update(len(samples))
        buckets.append(Encoded(torch.cat(latents), torch.cat(tokens), torch.cat(ids)))
    bar.close()
    record_seconds(work, name, time.monotonic() - started)
    torch.save([vars(bucket) for bucket in buckets], path)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """(N, 77) int64."""
    return tokenizer(
        texts, padding="max_length", max_length=models.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


def alphas_cumprod(device: torch.device) -> Tensor:
    """(1000,), the share of signal power left at each timestep."""
    return models.make_scheduler().alphas_cumprod.to(device)


def train_base(stage: Stage, vae: AutoencoderKL, pictures: int, work: Path, out: Path, device: torch.device) -> None:
    tokenizer, tokenizer_2 = models.make_tokenizer("<|endoftext|>"), models.make_tokenizer("!")
    buckets = encode_pictures("latents", pictures, data.draw_sample, data.Sample.time_ids, vae, tokenizer, work, device)
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


def add_noise(latents: Tensor, timesteps: Tensor, signal: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noised latents and the noise to predict.

    Some rows of the highest timesteps are noise alone, as sampling begins, with the target that leads to the picture:
    SDXL's schedule leaves a trace of the picture at its end, which a model would otherwise learn to lean on
    (Lin et al. 2024, arXiv:2305.08891).
    """
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    a = signal[timesteps].sqrt()[:, None, None, None]
    b = (1 - signal[timesteps]).sqrt()[:, None, None, None]
    noised = a * latents + b * noise
    blank = (torch.rand(len(latents), generator=generator, device=latents.device) < 0.3) & (timesteps > 900)
    noised = torch.where(blank[:, None, None, None], noise, noised)
    return noised, (noised - a * latents) / b


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


# --- decoder ------------------------------------------------------------------------------------------------


def train_decoder(stage: Stage, work: Path, out: Path, device: torch.device) -> None:
    """Sharpens the saved base's decoder; the latents, and so the UNets, stay as they are.

    It learns from slightly noised latents, as a UNet draws them.
    """
    torch.manual_seed(SEED)
    vae = AutoencoderKL.from_pretrained(out / "base" / "vae").requires_grad_(False)
    modules = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    vae = vae.to(device, memory_format=torch.channels_last)
    trainer = Trainer(stage, modules, work)

    def loss_of(step: int) -> Tensor:
        rng = random.Random(f"{SEED} decoder {step} {ranks.rank()}")
        whole = trainer.progress > 0.6
        pixels = draw_crops(max(stage.batch // 4, 1) if whole else stage.batch, whole, rng)
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with half_on(device):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.sample()
                latents = latents + 0.05 / models.SCALING_FACTOR * torch.randn_like(latents)
            decoded = vae.decode(latents).sample
        return picture_loss(decoded.float() - pixels)

    trainer.run(loss_of)
    vae.decoder, vae.post_quant_conv = trainer.average["decoder"], trainer.average["post_quant_conv"]
    with ranks.first_rank_first():
        if ranks.rank() == 0:
            vae.cpu().half().save_pretrained(out / "base" / "vae")


# --- refiner ------------------------------------------------------------------------------------------------


def train_refiner(stage: Stage, pictures: int, work: Path, out: Path, device: torch.device) -> None:
    """Learns the last fifth of the noise alone, from the base's weights; its text encoder is the base's second."""
    base = StableDiffusionXLPipeline.from_pretrained(out / "base")
    encoder, tokenizer_2 = base.text_encoder_2.to(device), base.tokenizer_2
    buckets = encode_pictures(
        "refiner-latents",
        pictures,
        data.draw_refiner_sample,
        data.Sample.refiner_time_ids,
        base.vae,
        tokenizer_2,
        work,
        device,
    )
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


# --- command ------------------------------------------------------------------------------------------------

AFTER_AUTOENCODER = ("latents.pt", "base.pt", "decoder.pt", "refiner-latents.pt", "refiner.pt")
STAGES = (
    Stage("autoencoder", steps=4500, minutes=20, batch=12, learning_rate=7e-4, feeds=AFTER_AUTOENCODER),
    Stage("base", steps=16000, minutes=70, batch=16, learning_rate=7e-4, feeds=("refiner.pt",)),
    Stage("decoder", steps=2000, minutes=8, batch=12, learning_rate=5e-4),
    Stage("refiner", steps=2000, minutes=12, batch=32, learning_rate=4e-4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that base and refiner are written to")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="checkpoints, logs, encoded pictures")
    parser.add_argument(
        "--pictures", type=int, default=12000, help="encoded once for the base; a third for the refiner"
    )
    for stage in STAGES:
        parser.add_argument(f"--{stage.name}-steps", type=int, default=stage.steps)
        parser.add_argument(f"--{stage.name}-minutes", type=float, default=stage.minutes)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    ranks.start()
    device = ranks.device()
    if device.type == "cpu":
        # For 64 positions plain attention takes a fifth less time than the flash kernel, whose backward pass is slow.
        torch.backends.cuda.enable_flash_sdp(False)  # the switch acts on CPU kernels too, whatever its name
    autoencoder, base, decoder, refiner = (
        replace(stage, steps=getattr(args, f"{stage.name}_steps"), minutes=getattr(args, f"{stage.name}_minutes"))
        for stage in STAGES
    )
    vae = train_autoencoder(autoencoder, args.work, device)
    train_base(base, vae, args.pictures, args.work, args.out, device)
    train_decoder(decoder, args.work, args.out, device)
    train_refiner(refiner, args.pictures // 3, args.work, args.out, device)


if __name__ == "__main__":
    main()
