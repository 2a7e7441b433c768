"""What the tiny checkpoints must be before anything is measured against them: real, responsive and gentle."""

import filecmp
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from serve_app.demo.tiny import make_tiny

# diffusers' schedulers hand torch tensors to np.array, which numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

MIN_LEVELS = 8  # by how many of 255 grey levels a field must move some pixel
MAX_NOISE_LEVELS = 0.05  # by how many float32 rounding may move any, before the picture is rounded

PROMPT, OTHER_PROMPT = "a red fox in the snow", "a blue whale at night"
STEPS, GUIDANCE_SCALE = 12, 7.5
NATIVE_PX = 128

# As read from the published base and refiner.
PUBLISHED_SCHEDULER_CONFIG = {
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

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "heun": (HeunDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny(directory)
    return directory


class Pair:
    """diffusers' own pipelines on the made folders; the reference call is remembered, not repeated."""

    def __init__(self, directory: Path) -> None:
        self.base = StableDiffusionXLPipeline.from_pretrained(directory / "base", add_watermarker=False)
        self.refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(directory / "refiner", add_watermarker=False)
        for pipeline in (self.base, self.refiner):
            pipeline.set_progress_bar_config(disable=True)
        self.scheduler_config = EulerDiscreteScheduler.load_config(directory / "base" / "scheduler")
        self.latents: dict[str, torch.Tensor] = {}
        self.pictures: dict[str, np.ndarray] = {}

    def denoise(self, split: float, **request: Any) -> torch.Tensor:
        """Base latents (1, 4, H / 8, W / 8) float32, up to `split` of the trajectory."""
        key = f"{split} {request}"
        if key not in self.latents:
            end = split if split < 1.0 else None
            request = self._prepare(self.base, 0, request)
            self.latents[key] = self.base(denoising_end=end, output_type="latent", **request).images
        return self.latents[key]

    def refine(self, latents: torch.Tensor, split: float, **request: Any) -> torch.Tensor:
        """Refined latents, of the same shape."""
        request = self._prepare(self.refiner, 99, request)
        refined: torch.Tensor = self.refiner(
            image=latents, denoising_start=split, output_type="latent", **request
        ).images
        return refined

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """The picture, (H, W, 3) float64, 0 to 255, not yet rounded."""
        with torch.no_grad():
            image: torch.Tensor = self.base.vae.decode(latents / self.base.vae.config.scaling_factor).sample[0]
        pixels: np.ndarray = ((image.double() / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
        return pixels

    def picture(self, split: float, base: dict[str, Any], refiner: dict[str, Any]) -> np.ndarray:
        """The rounded picture, (H, W, 3) int64, of a request that may differ by stage."""
        key = f"{split} {base} {refiner}"
        if key not in self.pictures:
            latents = self.refine(self.denoise(split, **base), split, **refiner)
            self.pictures[key] = self.decode(latents).round().astype(int)
        return self.pictures[key]

    def _prepare(self, pipeline: Any, seed: int, request: dict[str, Any]) -> dict[str, Any]:
        defaults = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
        request = {**defaults, **request}
        scheduler, arguments = SCHEDULERS[request.pop("scheduler", "euler")]
        pipeline.scheduler = scheduler.from_config(self.scheduler_config, **arguments)
        return {**request, "generator": torch.Generator().manual_seed(request.pop("seed", seed))}


@pytest.fixture(scope="module")
def pair(tiny: Path) -> Pair:
    return Pair(tiny)


@dataclass(frozen=True)
class Change:
    """A field's change, told apart by what else the request holds before it."""

    name: str
    after: dict[str, Any]
    before: dict[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] = ("base", "refiner")


NATIVE = (NATIVE_PX, NATIVE_PX)
# The base looks at its negative sizes only when it is given both.
NEGATIVE_SIZES = {"negative_original_size": NATIVE, "negative_target_size": NATIVE}
BASE, REFINER = ("base",), ("refiner",)

CHANGES = [
    Change("prompt, prompt_2 held", {"prompt": OTHER_PROMPT}, {"prompt_2": PROMPT}, BASE),
    Change("prompt", {"prompt": OTHER_PROMPT}),
    Change("prompt, one letter", {"prompt": PROMPT[:-1] + "t"}),
    Change("prompt, guidance off", {"prompt": OTHER_PROMPT}, {"guidance_scale": 1.0}),
    Change("prompt_2", {"prompt_2": OTHER_PROMPT}, stages=BASE),
    # Absent and empty are the same thing to the refiner: see test_the_refiner_encodes_an_absent_negative.
    Change("negative_prompt, absent to empty", {"negative_prompt": ""}, stages=BASE),
    Change("negative_prompt, absent to given", {"negative_prompt": "blurry"}),
    Change("negative_prompt, empty to given", {"negative_prompt": "blurry"}, {"negative_prompt": ""}),
    Change("negative_prompt_2", {"negative_prompt_2": "ugly"}, {"negative_prompt": "blurry"}, BASE),
    Change("original_size, up", {"original_size": (512, 512)}),
    Change("original_size, one side", {"original_size": (128, 256)}),
    Change("crops_coords_top_left", {"crops_coords_top_left": (0, 32)}),
    Change("target_size", {"target_size": (256, 256)}, stages=BASE),
    Change("negative_original_size", {"negative_original_size": (64, 64)}, NEGATIVE_SIZES, BASE),
    Change("negative_target_size", {"negative_target_size": (64, 64)}, NEGATIVE_SIZES, BASE),
    Change("negative_crops", {"negative_crops_coords_top_left": (0, 16)}, NEGATIVE_SIZES, BASE),
    Change("negative_original_size alone", {"negative_original_size": (64, 64)}, stages=REFINER),
    Change("negative_crops alone", {"negative_crops_coords_top_left": (0, 16)}, stages=REFINER),
    Change("aesthetic_score", {"aesthetic_score": 6.5}, stages=REFINER),
    Change("negative_aesthetic_score", {"negative_aesthetic_score": 3.0}, stages=REFINER),
    Change("guidance_scale", {"guidance_scale": 5.0}),
    Change("guidance_scale, off", {"guidance_scale": 1.0}),
    Change("guidance_rescale", {"guidance_rescale": 0.7}),
    Change("clip_skip 1", {"clip_skip": 1}),
    Change("clip_skip 1 to 2", {"clip_skip": 2}, {"clip_skip": 1}),
    Change("seed", {"seed": 1}, stages=BASE),
    Change("seed of a noisy sampler", {"seed": 1}, {"scheduler": "euler_ancestral"}),
    Change("num_inference_steps, by one", {"num_inference_steps": STEPS + 1}),
    Change("num_inference_steps", {"num_inference_steps": 20}),
    Change("eta", {"eta": 0.5}, {"scheduler": "ddim"}),
    *(Change(f"scheduler {name}", {"scheduler": name}) for name in SCHEDULERS if name != "euler"),
]


@pytest.mark.parametrize("split", [0.8, 0.5])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_every_field_shows_in_each_stage_it_reaches(pair: Pair, change: Change, split: float) -> None:
    for stage in change.stages:
        before, after = change.before, {**change.before, **change.after}
        if stage == "base":
            moved = pair.picture(split, after, {}) - pair.picture(split, before, {})
        else:  # the base's latents stay as they are
            moved = pair.picture(split, {}, after) - pair.picture(split, {}, before)
        assert abs(moved).max() >= MIN_LEVELS, stage


def test_the_split_shows(pair: Pair) -> None:
    early, late = pair.picture(0.5, {}, {}), pair.picture(0.8, {}, {})
    base_alone = pair.decode(pair.denoise(1.0)).round()
    assert abs(early - late).max() >= MIN_LEVELS
    assert abs(late - base_alone).max() >= MIN_LEVELS


def test_width_and_height_show_beyond_the_noise_they_draw(pair: Pair) -> None:
    """The same noise and size, told to the UNet as another one: what a batch with wrong time ids would do."""
    wide = {"width": 192, "height": 96}
    told = {**wide, "original_size": NATIVE, "target_size": NATIVE}
    right, wrong = (pair.decode(pair.denoise(1.0, **request)).round() for request in (wide, told))
    assert right.shape == (96, 192, 3)
    assert abs(right - wrong).max() >= MIN_LEVELS


def test_the_refiner_encodes_an_absent_negative(pair: Pair) -> None:
    absent, empty = pair.picture(0.8, {}, {}), pair.picture(0.8, {}, {"negative_prompt": ""})
    assert np.array_equal(absent, empty)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5, 15.0])
def test_a_picture_is_neither_flat_nor_clipped(pair: Pair, guidance_scale: float) -> None:
    request = {"guidance_scale": guidance_scale}
    picture = pair.picture(0.8, request, request)
    assert picture.std() > 15
    assert ((picture > 5) & (picture < 250)).mean() > 0.9


@pytest.mark.parametrize(
    ("scheduler", "steps", "split"),
    [
        ("euler", 1, 1.0),
        ("dpmpp_2m", 2, 1.0),
        ("heun", 12, 0.5),
        ("unipc", 12, 0.5),
        ("euler", 50, 0.8),
        ("ddim", 50, 0.8),
        ("dpmpp_2m_sde", 50, 0.5),
        ("lms", 50, 1.0),
    ],
)
def test_rounding_does_not_grow(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, scheduler: str, steps: int, split: float
) -> None:
    """Rows that share their forward pass with strangers differ in the last bits. No picture may tell."""
    request = {"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": 15.0}

    def draw() -> np.ndarray:
        pair.latents.clear()
        latents = pair.denoise(split, **request)
        return pair.decode(pair.refine(latents, split, **request) if split < 1.0 else latents)

    alone = draw()
    for pipeline in (pair.base, pair.refiner):
        monkeypatch.setattr(pipeline.unet, "forward", in_a_crowd(pipeline.unet.forward))
    crowded = draw()
    pair.latents.clear()

    assert np.isfinite(alone).all()
    assert abs(alone - crowded).max() < MAX_NOISE_LEVELS


def in_a_crowd(forward: Callable[..., Any], rows: int = 8) -> Callable[..., Any]:
    """The same forward pass with others beside the asked rows, up to `rows`; gives the asked ones back."""
    generator = torch.Generator().manual_seed(5)

    def crowd(asked: torch.Tensor) -> torch.Tensor:
        others = torch.randn(rows - len(asked), *asked.shape[1:], generator=generator)
        return torch.cat([asked, others])

    def forward_in_a_crowd(
        sample: torch.Tensor,
        timestep: torch.Tensor,
        *,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor],
        **_: Any,
    ) -> tuple[torch.Tensor]:
        added = {name: crowd(value) for name, value in added_cond_kwargs.items()}
        output = forward(crowd(sample), timestep, crowd(encoder_hidden_states), added_cond_kwargs=added)
        return (output.sample[: len(sample)],)

    return forward_in_a_crowd


def test_scheduler_configs_hold_every_published_key(tiny: Path) -> None:
    for stage in ("base", "refiner"):
        written = json.loads((tiny / stage / "scheduler" / "scheduler_config.json").read_text())
        assert written["_class_name"] == "EulerDiscreteScheduler"
        assert {key: written.get(key, "missing") for key in PUBLISHED_SCHEDULER_CONFIG} == (PUBLISHED_SCHEDULER_CONFIG)


def test_folders_are_ordinary_and_small(tiny: Path) -> None:
    shared = {"scheduler", "text_encoder_2", "tokenizer_2", "unet", "vae", "model_index.json"}
    assert {path.name for path in (tiny / "base").iterdir()} == shared | {"text_encoder", "tokenizer"}
    assert {path.name for path in (tiny / "refiner").iterdir()} == shared
    files = [path for path in tiny.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 3e6

    base_index, refiner_index = (
        json.loads((tiny / stage / "model_index.json").read_text()) for stage in ("base", "refiner")
    )
    assert base_index["_class_name"] == "StableDiffusionXLPipeline"
    assert base_index["force_zeros_for_empty_prompt"] is True
    assert refiner_index["_class_name"] == "StableDiffusionXLImg2ImgPipeline"
    assert refiner_index["force_zeros_for_empty_prompt"] is False
    assert refiner_index["requires_aesthetics_score"] is True
    assert refiner_index["text_encoder"] == refiner_index["tokenizer"] == [None, None]


def test_the_refiner_holds_the_bases_second_encoder(tiny: Path) -> None:
    for folder in ("text_encoder_2", "tokenizer_2"):
        names = [path.name for path in (tiny / "base" / folder).iterdir()]
        same, different, missing = filecmp.cmpfiles(
            tiny / "base" / folder, tiny / "refiner" / folder, names, shallow=False
        )
        assert (sorted(same), different, missing) == (sorted(names), [], [])


@pytest.mark.parametrize("folder", ["base/tokenizer", "base/tokenizer_2", "refiner/tokenizer_2"])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a cat",
        "Ünïcode, naïve",
        "\U0001f98a\u200d\U0001f525",
        "مرحبا",
        "猫",
        "\x00\x01\x1b\x7f\t\n",
        "!" * 500,
    ],
)
def test_any_text_tokenises(tiny: Path, folder: str, text: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny / folder)
    ids = tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = ids.index(eos)
    assert len(ids) == tokenizer.model_max_length == 77
    assert ids[0] == bos
    assert not {bos, eos} & set(ids[1:end]), "an unknown token"
    assert set(ids[end + 1 :]) <= {tokenizer.pad_token_id}
    assert tokenizer.pad_token == ("!" if folder.endswith("_2") else "<|endoftext|>")


def test_text_is_pooled_at_its_end(pair: Pair) -> None:
    for prompt in ("", "a cat", "word " * 100):
        encoder, tokenizer = pair.base.text_encoder_2, pair.base.tokenizer_2
        tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = tokens[0].tolist().index(tokenizer.eos_token_id)
        with torch.no_grad():
            output = encoder(tokens, output_hidden_states=True)
            expected = encoder.text_projection(output.last_hidden_state[:, end])
        torch.testing.assert_close(output.text_embeds, expected)


def test_the_encoders_have_layers_to_skip(pair: Pair) -> None:
    layers = [encoder.config.num_hidden_layers for encoder in (pair.base.text_encoder, pair.base.text_encoder_2)]
    assert layers == [4, 5]


def test_the_seed_alone_decides_the_weights(tiny: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    torch.manual_seed(123)
    make_tiny(tmp_path / "again")
    make_tiny(tmp_path / "other", seed=1)
    assert torch.initial_seed() == 123
    torch.set_rng_state(state)

    weights = [path.relative_to(tiny) for path in tiny.rglob("*.safetensors")]
    assert len(weights) == 7
    for path in weights:
        first, again, other = (load_file(d / path) for d in (tiny, tmp_path / "again", tmp_path / "other"))
        assert all(torch.equal(first[name], again[name]) for name in first), path
        assert not all(torch.equal(first[name], other[name]) for name in first), path
