"""The detector is judged first, on rendered truth; then it must see what is wrong."""

import dataclasses

import pytest
from PIL import Image, ImageFilter

from serve_app.demo.grammar import Scene, Thing
from serve_app.demo.training.evaluate import Score, distance_to_truth, judge_detector, read_picture, sharpness
from serve_app.demo.training.render import Place, render

SCENE = Scene((Thing("circle", "red"), Thing("star", "blue")), "white", "left of")
LAYOUT = [Place(36, 64, 22), Place(92, 60, 22)]


def test_detector_reads_rendered_truth():
    assert min(judge_detector(64).values()) == 1.0


@pytest.mark.parametrize(
    ("field", "drawn"),
    [
        ("backgrounds", dataclasses.replace(SCENE, background="cream")),
        ("colours", dataclasses.replace(SCENE, things=(Thing("circle", "orange"), SCENE.things[1]))),
        ("shapes", dataclasses.replace(SCENE, things=(Thing("square", "red"), SCENE.things[1]))),
        ("relations", dataclasses.replace(SCENE, things=(Thing("circle", "blue"), Thing("star", "red")))),
        ("counts", Scene(SCENE.things[:1], "white")),
    ],
)
def test_each_fault_lowers_its_figure(field: str, drawn: Scene):
    score = Score()
    assert not score.add(SCENE, read_picture(render(drawn, 128, 128, LAYOUT[: len(drawn.things)])))
    assert score.shares()[field] < 1


def test_empty_picture_has_a_background_and_nothing_else():
    score = Score()
    score.add(SCENE, read_picture(Image.new("RGB", (128, 128), (250, 250, 250))))
    assert score.shares() == {"backgrounds": 1, "colours": 0, "shapes": 0, "relations": 0, "counts": 0}


def test_distance_and_sharpness_notice_softness_and_a_missing_pattern():
    scene = Scene((Thing("circle", "red", "", "striped"),), "white")
    true = render(scene, 128, 128, [Place(60, 66, 30)])
    soft = true.filter(ImageFilter.GaussianBlur(1))
    plain = render(Scene((Thing("circle", "red"),), "white"), 128, 128, [Place(60, 66, 30)])
    assert distance_to_truth(true, scene) < 0.6
    assert distance_to_truth(soft, scene) > 1 and distance_to_truth(plain, scene) > 1
    assert sharpness(soft) < 0.8 * sharpness(true)
