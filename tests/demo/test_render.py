"""The pictures that the model learns from, and the data built of them."""

import random

import numpy as np
import pytest

from serve_app.demo.grammar import Scene, Thing, sample_scenes
from serve_app.demo.training import data
from serve_app.demo.training.render import BACKGROUND_RGB, COLOUR_RGB, Place, render, sample_layout


@pytest.mark.parametrize("size", data.SIZES_PX)
def test_things_keep_apart_and_inside(size: tuple[int, int]):
    width, height = size
    for scene in sample_scenes(100, seed=6, held_out=False):
        places = sample_layout(scene, width, height, random.Random(0))
        for place in places:
            assert place.radius <= place.x <= width - place.radius
            assert place.radius <= place.y <= height - place.radius
        if len(places) == 2:
            first, second = places
            dx, dy = second.x - first.x, second.y - first.y
            along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
            assert along > 0.95 * (first.radius + second.radius)


def test_plain_thing_is_its_colour_on_its_background():
    picture = np.asarray(render(Scene((Thing("square", "green"),), "cream"), 64, 48, [Place(32, 24, 10)]))
    assert picture.shape == (48, 64, 3)
    assert tuple(picture[24, 32]) == COLOUR_RGB["green"]
    assert tuple(picture[2, 2]) == BACKGROUND_RGB["cream"]


@pytest.mark.parametrize("look", ["outlined", "striped", "dotted"])
def test_every_look_shows(look: str):
    plain, dressed = (
        np.asarray(
            render(Scene((Thing("circle", "red", "", word),), "white"), 64, 64, [Place(32, 32, 20)]),
            dtype=int,
        )
        for word in ("", look)
    )
    assert np.abs(plain - dressed).mean() > 5


def test_samples_tell_their_crop_and_their_original_size():
    rng = random.Random(7)
    scene = sample_scenes(1, seed=7, held_out=False)[0]
    samples = [data.draw_sample(scene, 128, 96, rng) for _ in range(200)]
    plain = [sample for sample in samples if sample.time_ids() == [96, 128, 0, 0, 96, 128]]
    cropped = [sample for sample in samples if sample.original_size > (96, 128)]
    enlarged = [sample for sample in samples if sample.original_size < (96, 128) and sample.crop == (0, 0)]
    assert len(plain) > 130 and len(cropped) > 5 and len(enlarged) > 5
    assert all(sample.picture.size == (128, 96) for sample in samples)


def test_pixels_survive_the_way_to_tensors_and_back():
    picture = render(Scene((Thing("star", "pink"),), "gray"), 32, 32, [Place(16, 16, 10)])
    assert np.array_equal(np.asarray(data.to_picture(data.to_tensor(picture))), np.asarray(picture))
