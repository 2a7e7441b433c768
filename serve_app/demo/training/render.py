"""Draws a scene with Pillow: the pictures that the embedded model is trained on and judged against.

A layout says where the things stand; it is drawn at random so that seeds differ. Patterns keep to a fixed
grid of 8 px (one latent cell), so that the autoencoder can hold them exactly.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from serve_app.demo.grammar import Scene

RGB = tuple[int, int, int]

COLOUR_RGB: dict[str, RGB] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "cyan": (40, 205, 225),
    "blue": (35, 75, 230),
    "purple": (130, 45, 185),
    "pink": (245, 100, 180),
}
BACKGROUND_RGB: dict[str, RGB] = {
    "white": (248, 248, 248),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "cream": (238, 222, 180),
    "navy": (16, 28, 88),
    "brown": (92, 56, 30),
}
RADIUS = {"small": 0.145, "": 0.185, "large": 0.225}
"""Radius of a thing, as a share of the shorter side, when two share the picture."""
ALONE = 1.3
"""How much larger a thing is drawn when it is alone."""

_SUPERSAMPLING = 4
_DARK_BACKGROUNDS = ("black", "navy", "brown")


@dataclass(frozen=True)
class Place:
    """Centre and radius of one thing, in px of the picture."""

    x: float
    y: float
    radius: float


def sample_layout(scene: Scene, width: int, height: int, rng: random.Random) -> list[Place]:
    """Places for the things of a scene that obey its relation and keep inside the picture, without overlap."""
    short = min(width, height)
    radii = [RADIUS[thing.size] * short for thing in scene.things]
    if len(radii) == 1:
        radius = ALONE * radii[0]
        reach = 1.2 * radius + 2
        dx, dy = (max(min(0.14 * side, side / 2 - reach), 0) for side in (width, height))
        return [Place(width / 2 + rng.uniform(-dx, dx), height / 2 + rng.uniform(-dy, dy), radius)]
    horizontal = scene.relation in ("left of", "right of")
    across, along = (height, width) if horizontal else (width, height)
    gap = max(along - 2 * sum(radii), 0)
    first_is_low = scene.relation in ("left of", "above")
    # Equal room before, between and after the two things, shaken a little.
    low, high = (radii[0], radii[1]) if first_is_low else (radii[1], radii[0])
    ends = [gap * (0.3 + rng.uniform(-0.1, 0.1)) + low, along - gap * (0.3 + rng.uniform(-0.1, 0.1)) - high]
    if not first_is_low:
        ends.reverse()
    places = []
    for end, radius in zip(ends, radii, strict=True):
        room = max(min(0.1 * across, across / 2 - radius), 0)
        side = across / 2 + rng.uniform(-room, room)
        places.append(Place(end, side, radius) if horizontal else Place(side, end, radius))
    return places


def outline_of(shape: str, place: Place) -> list[tuple[float, float]]:
    """The corners of a shape, in px; a circle is a polygon of 72 corners."""
    if shape == "circle":
        return _polar(place, [(place.radius, i / 72) for i in range(72)])
    if shape == "square":
        return _polar(place, [(place.radius * 1.25, (i + 0.5) / 4) for i in range(4)])
    if shape == "triangle":
        return _polar(place, [(place.radius * 1.25, i / 3) for i in range(3)])
    if shape == "star":
        return _polar(place, [(place.radius * (1.2 if i % 2 == 0 else 0.5), i / 10) for i in range(10)])
    arm, half = place.radius * 1.05, place.radius * 0.36
    corners = [(-half, -arm), (half, -arm), (half, -half), (arm, -half), (arm, half), (half, half)]
    corners += [(-x, -y) for x, y in corners]
    return [(place.x + x, place.y + y) for x, y in corners]


def _polar(place: Place, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners from (radius, turn from the top, clockwise) around a place."""
    return [
        (place.x + r * math.sin(2 * math.pi * turn), place.y - r * math.cos(2 * math.pi * turn)) for r, turn in points
    ]


def shape_mask(shape: str, place: Place, width: int, height: int) -> Image.Image:
    """Coverage of a shape, mode L, antialiased, (width, height)."""
    s = _SUPERSAMPLING
    mask = Image.new("L", (width * s, height * s))
    ImageDraw.Draw(mask).polygon([(x * s, y * s) for x, y in outline_of(shape, place)], fill=255)
    return mask.resize((width, height), Image.Resampling.BOX)


def render(scene: Scene, width: int, height: int, layout: Sequence[Place]) -> Image.Image:
    """The picture of a scene, RGB, antialiased."""
    picture = Image.new("RGB", (width, height), BACKGROUND_RGB[scene.background])
    for thing, place in zip(scene.things, layout, strict=True):
        mask = shape_mask(thing.shape, place, width, height)
        fill = Image.new("RGB", (width, height), COLOUR_RGB[thing.colour])
        if thing.look in ("striped", "dotted"):
            fill.paste(_tint(COLOUR_RGB[thing.colour]), mask=_pattern(thing.look, width, height))
        if thing.look == "outlined":
            edge = BACKGROUND_RGB["white" if scene.background in _DARK_BACKGROUNDS else "black"]
            picture.paste(edge, mask=mask)
            mask = mask.filter(ImageFilter.MinFilter(5))
        picture.paste(fill, mask=mask)
    return picture


def _tint(colour: RGB) -> RGB:
    """Half way to white: the lighter colour of stripes and dots."""
    red, green, blue = ((value + 255) // 2 for value in colour)
    return red, green, blue


def _pattern(look: str, width: int, height: int) -> Image.Image:
    """Where stripes (4 px of every 8) or dots (radius 2.5 px, every 8 px) lie; mode L."""
    y, x = np.mgrid[0:height, 0:width]
    if look == "striped":
        cover = ((y % 8) < 4) * 255.0
    else:
        distance = np.hypot(x % 8 - 3.5, y % 8 - 3.5)
        cover = np.clip(3.0 - distance, 0, 1) * 255
    return Image.fromarray(cover.astype(np.uint8), "L")


def render_random(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    return render(scene, width, height, sample_layout(scene, width, height, rng))
