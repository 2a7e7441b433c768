"""The grammar: what captions say, what training never sees, what the service warns about."""

import subprocess
import sys

import pytest

from serve_app.demo.grammar import Scene, Thing, caption, is_held_out, sample_scenes, unknown_prompt


def test_caption_names_what_is_not_plain_and_nothing_else():
    plain, full = Thing("circle", "orange"), Thing("star", "blue", "small", "striped")
    assert caption(Scene((plain,), "navy")) == "an orange circle on a navy background"
    assert (
        caption(Scene((full, plain), "white", "left of"))
        == "a small blue striped star left of an orange circle on a white background"
    )


def test_split_is_by_caption_and_the_same_for_every_seed():
    trained = {caption(scene) for seed in range(3) for scene in sample_scenes(2000, seed, held_out=False)}
    held_out = [caption(scene) for scene in sample_scenes(500, seed=1, held_out=True)]
    assert len(set(held_out)) == len(held_out)
    assert trained.isdisjoint(held_out)
    assert all(map(is_held_out, held_out))


def test_scenes_come_from_the_seed_alone():
    assert sample_scenes(20, seed=4, held_out=True) == sample_scenes(20, seed=4, held_out=True)


def test_two_things_of_a_scene_differ_in_colour():
    for scene in sample_scenes(500, seed=5, held_out=False):
        assert len({thing.colour for thing in scene.things}) == len(scene.things)
        assert bool(scene.relation) == (len(scene.things) == 2)


@pytest.mark.parametrize("prompt", ["a Red dragon", "SQUARE!", "three stars, one star", "on a navy-blue sea"])
def test_known_word_in_any_writing(prompt: str):
    assert not unknown_prompt(prompt)


@pytest.mark.parametrize("prompt", ["", "an astronaut riding a horse", "left of", "日本の猫", "redness"])
def test_unknown_prompt(prompt: str):
    assert unknown_prompt(prompt)


def test_the_service_can_ask_without_loading_anything_heavy():
    code = (
        "import sys; from serve_app.demo.grammar import unknown_prompt; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
