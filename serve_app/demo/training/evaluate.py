"""Judges pictures by their pixels, classically: no learned part, so that it cannot share the model's mistakes.

    python -m serve_app.demo.training.evaluate adherence --prompts 200 --guidance 7.5
    python -m serve_app.demo.training.evaluate refiner --prompts 100
    python -m serve_app.demo.training.evaluate detector

`adherence` draws held-out prompts and counts what is right; `refiner` compares base 0.8 + refiner 0.2 with the base
alone at the same number of steps; `detector` judges the judge on rendered truth.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from serve_app.demo.grammar import RELATIONS, SHAPES, Scene, caption, sample_scenes
from serve_app.demo.training.data import SIZES_PX
from serve_app.demo.training.render import BACKGROUND_RGB, COLOUR_RGB, Place, render, render_random, shape_mask

HERE = Path(__file__).parent.parent
FOREGROUND_DISTANCE = 48
"""How far (Euclidean, RGB) a pixel lies from the background to belong to a thing."""
LEAST_AREA_PX = 60


@dataclass(frozen=True)
class Found:
    """One thing found in a picture; centre in px, area in px."""

    shape: str
    colour: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Reading:
    """What the detector reads from one picture."""

    background: str
    things: tuple[Found, ...]


def read_picture(picture: Image.Image) -> Reading:
    """Background by the median of the border, things as connected areas off the background."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)  # (H, W, 3) 0..255
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    background = _nearest(ground[None], BACKGROUND_RGB)[0]
    foreground = np.linalg.norm(pixels - ground, axis=-1) > FOREGROUND_DISTANCE
    things = [_read_thing(pixels, mask) for mask in connected_areas(foreground) if mask.sum() >= LEAST_AREA_PX]
    return Reading(background, tuple(sorted(things, key=lambda thing: -thing.area)))


def _nearest(pixels: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]) -> list[str]:
    names = list(palette)
    distances = np.linalg.norm(pixels[:, None] - np.array([palette[name] for name in names])[None], axis=-1)
    return [names[i] for i in distances.argmin(1)]


def connected_areas(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """The 4-connected areas of a mask (H, W), each as a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the greatest label around it, along rows and columns, until none changes
        before = labels.copy()
        for _ in range(16):
            padded = np.pad(labels, 1)
            around = np.stack([padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]).max(0)
            labels = np.where(mask, np.maximum(labels, around), 0)
        if (labels == before).all():
            break
    for label in np.unique(labels):
        if label:
            yield labels == label


def _read_thing(pixels: NDArray[np.float32], mask: NDArray[np.bool_]) -> Found:
    ys, xs = np.nonzero(mask)
    colours = _nearest(_most_saturated_half(pixels[mask]), COLOUR_RGB)
    colour = max(set(colours), key=colours.count)
    x, y = float(xs.mean()), float(ys.mean())
    shape = max(SHAPES, key=lambda name: _overlap(mask, template(name, x, y, float(mask.sum()), mask.shape)))
    return Found(shape, colour, x, y, float(mask.sum()))


def _most_saturated_half(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Leaves out the outline, the lighter stripes or dots, and the soft edge: all duller than the colour itself."""
    saturation = colours.max(1) - colours.min(1)
    kept: NDArray[np.float32] = colours[saturation >= np.quantile(saturation, 0.6)]
    return kept


@cache
def _area_and_centre(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far its centre of mass lies below its place."""
    mask = np.asarray(shape_mask(shape, Place(100, 100, 60), 200, 200), dtype=np.float64)
    rows = np.arange(200) + 0.5
    return mask.sum() / 255 / 60**2, float((mask.sum(1) * rows).sum() / mask.sum() - 100) / 60


def template(shape: str, x: float, y: float, area: float, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """The ideal mask (H, W) of a shape with this centre of mass and area."""
    place = fitted_place(shape, x, y, area)
    return np.asarray(shape_mask(shape, place, size[1], size[0])) > 127


def fitted_place(shape: str, x: float, y: float, area: float) -> Place:
    unit_area, offset = _area_and_centre(shape)
    radius = (area / unit_area) ** 0.5
    return Place(x + 0.5, y + 0.5 - offset * radius, radius)


def _overlap(mask: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((mask & other).sum() / max((mask | other).sum(), 1))


# --- judging -------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Rights and totals over pictures; a thing that is missing is wrong in colour and shape."""

    backgrounds: int = 0
    pictures: int = 0
    colours: int = 0
    shapes: int = 0
    things: int = 0
    relations: int = 0
    pairs: int = 0
    counts: int = 0

    def add(self, scene: Scene, reading: Reading) -> bool:
        """Count one picture; returns whether all of it is right."""
        matched = match(scene, reading)
        colours = [thing.colour == found.colour for thing, found in zip(scene.things, matched, strict=True) if found]
        shapes = [thing.shape == found.shape for thing, found in zip(scene.things, matched, strict=True) if found]
        related = len(scene.things) == 2 and all(colours) and relation_holds(scene.relation, matched)
        self.pictures += 1
        self.things += len(scene.things)
        self.pairs += len(scene.things) == 2
        self.backgrounds += reading.background == scene.background
        self.colours += sum(colours)
        self.shapes += sum(shapes)
        self.relations += related
        self.counts += len(reading.things) == len(scene.things)
        rights = [
            reading.background == scene.background,
            *colours,
            *shapes,
            related or len(scene.things) == 1,
        ]
        return all(rights) and len(colours) == len(scene.things) == len(reading.things)

    def shares(self) -> dict[str, float]:
        return {
            "backgrounds": self.backgrounds / self.pictures,
            "colours": self.colours / self.things,
            "shapes": self.shapes / self.things,
            "relations": self.relations / max(self.pairs, 1),
            "counts": self.counts / self.pictures,
        }


def match(scene: Scene, reading: Reading) -> list[Found | None]:
    """For each thing of the scene the found one that it is judged by: the pairing with most colours and shapes right.

    Only the largest areas stand for things, so that specks cannot lend their colour.
    """
    wanted = scene.things
    found: list[Found | None] = [
        *reading.things[: len(wanted)],
        *[None] * (len(wanted) - len(reading.things)),
    ]

    def rights(order: Iterable[Found | None]) -> float:
        return sum(
            2 * (thing.colour == one.colour) + (thing.shape == one.shape)
            for thing, one in zip(wanted, order, strict=True)
            if one
        )

    return list(max(itertools.permutations(found), key=rights))


def relation_holds(relation: str, found: Sequence[Found | None]) -> bool:
    """Whether the first stands so to the second, and further along that axis than across it."""
    first, second = found
    if first is None or second is None:
        return False
    dx, dy = second.x - first.x, second.y - first.y
    along = dict(zip(RELATIONS, (dx, -dx, dy, -dy), strict=True))[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > abs(across)


def distance_to_truth(picture: Image.Image, scene: Scene) -> float | None:
    """Mean absolute difference (grey levels) to the ideal picture with its things where these were drawn.

    None when the things were not found. An outline or a pattern that is missing counts, as does a soft edge.
    """
    found = match(scene, read_picture(picture))
    places = []
    for thing, one in zip(scene.things, found, strict=True):
        if one is None:
            return None
        places.append(fitted_place(thing.shape, one.x, one.y, one.area))
    truth = render(scene, picture.width, picture.height, places)
    difference = np.abs(np.asarray(truth, dtype=np.float32) - np.asarray(picture.convert("RGB"), dtype=np.float32))
    return float(difference.mean())


def sharpness(picture: Image.Image) -> float:
    """Mean of the steepest hundredth of steps between neighbouring pixels (grey levels)."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    steps = np.concatenate([np.abs(np.diff(grey, axis=0)).ravel(), np.abs(np.diff(grey, axis=1)).ravel()])
    return float(np.sort(steps)[-len(steps) // 100 :].mean())


# --- drawing -------------------------------------------------------------------------------------------------------


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw(
    base: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: float,
    steps: int = 25,
    size_px: tuple[int, int] = (128, 128),
    refiner: DiffusionPipeline | None = None,
    batch: int = 10,
    **extra: object,
) -> list[Image.Image]:
    """Pictures of prompts, in batches; `extra` goes to the base pipeline's call."""
    pictures: list[Image.Image] = []
    width, height = size_px
    common = {"num_inference_steps": steps, "guidance_scale": guidance}
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", mininterval=10, disable=len(prompts) <= batch):
        texts, dice = list(prompts[start : start + batch]), generators(seeds[start : start + batch])
        call = {"prompt": texts, "width": width, "height": height, "generator": dice, **common, **extra}
        if refiner is None:
            pictures += base(**call).images
        else:
            latents: Tensor = base(**call, denoising_end=0.8, output_type="latent").images
            sizes = {"original_size": (height, width), "target_size": (height, width)}
            pictures += refiner(texts, image=latents, denoising_start=0.8, generator=dice, **common, **sizes).images
    return pictures


# --- commands ------------------------------------------------------------------------------------------------------


def adherence(base: DiffusionPipeline, count: int, guidance: float, **options: object) -> dict[str, float]:
    """Shares of what is right on `count` held-out prompts."""
    scenes = sample_scenes(count, seed=1, held_out=True)
    pictures = draw(base, [caption(scene) for scene in scenes], range(count), guidance, **options)  # type: ignore[arg-type]
    return judge(scenes, pictures)


def judge(scenes: Sequence[Scene], pictures: Sequence[Image.Image]) -> dict[str, float]:
    score = Score()
    whole = sum(score.add(scene, read_picture(picture)) for scene, picture in zip(scenes, pictures, strict=True))
    return {**score.shares(), "whole pictures": whole / len(scenes)}


def compare_refiner(
    base: DiffusionPipeline, refiner: DiffusionPipeline, count: int, guidance: float, steps: int = 25
) -> dict[str, float]:
    """Distance to the rendered truth and sharpness, with and without the refiner, over the same prompts and seeds."""
    scenes = sample_scenes(count, seed=2, held_out=True)
    prompts, seeds = [caption(scene) for scene in scenes], range(1000, 1000 + count)
    alone = draw(base, prompts, seeds, guidance, steps)
    refined = draw(base, prompts, seeds, guidance, steps, refiner=refiner)
    pairs = [
        (distance_to_truth(one, scene), distance_to_truth(other, scene))
        for one, other, scene in zip(alone, refined, scenes, strict=True)
    ]
    both = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    return {
        "judged": len(both),
        "distance, base alone": both[:, 0].mean(),
        "distance, base 0.8 + refiner 0.2": both[:, 1].mean(),
        "share of prompts that the refiner brings nearer": (both[:, 1] < both[:, 0]).mean(),
        "sharpness, base alone": float(np.mean([sharpness(picture) for picture in alone])),
        "sharpness, base 0.8 + refiner 0.2": float(np.mean([sharpness(picture) for picture in refined])),
    }


def judge_detector(count: int) -> dict[str, float]:
    """The detector's own figures, on rendered truth of every size."""
    rng = random.Random(3)
    scenes = sample_scenes(count, seed=3, held_out=True)
    return judge(scenes, [render_random(scene, *SIZES_PX[i % len(SIZES_PX)], rng) for i, scene in enumerate(scenes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("adherence", "refiner", "detector"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", default="128x128", help="WIDTHxHEIGHT in px")
    parser.add_argument("--folder", type=Path, default=HERE, help="where base and refiner stand")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    if args.what == "detector":
        figures = judge_detector(args.prompts)
    elif args.what == "adherence":
        base = load(args.folder / "base")
        figures = adherence(base, args.prompts, args.guidance, steps=args.steps, size_px=(width, height))
    else:
        base, refiner = load(args.folder / "base"), load(args.folder / "refiner")
        figures = compare_refiner(base, refiner, args.prompts, args.guidance, args.steps)
    print(json.dumps({name: round(float(value), 4) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
