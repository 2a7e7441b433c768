"""The small prompt grammar of the embedded model: scenes, their captions, the held-out split.

    caption  := object " on a " background " background"
              | object " " relation " " object " on a " background " background"
    object   := ("a " | "an ") [size " "] colour " " [look " "] shape

No size word means a middle size, no look word a plain fill. Two objects of one scene differ in colour.
Standard library only: the service imports `unknown_prompt` on its way to a warning. Knows nothing of pixels.
"""

import hashlib
import random
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "", "large")
LOOKS = ("", "outlined", "striped", "dotted")
BACKGROUNDS = ("white", "black", "gray", "cream", "navy", "brown")
RELATIONS = ("left of", "right of", "above", "below")

GRAMMAR_WORDS = frozenset(word for words in (SHAPES, COLOURS, SIZES, LOOKS, BACKGROUNDS) for word in words if word)
"""The words that carry a picture. Words of position and filler ("left", "a", "on") say nothing by themselves."""

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Thing:
    """One object of a scene; an empty `size` or `look` is the unnamed middle size or plain fill."""

    shape: str
    colour: str
    size: str = ""
    look: str = ""

    def phrase(self) -> str:
        words = [word for word in (self.size, self.colour, self.look, self.shape) if word]
        return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


@dataclass(frozen=True)
class Scene:
    """What a caption says: one thing, or two things and `things[0] relation things[1]`, on a background."""

    things: tuple[Thing, ...]
    background: str
    relation: str = ""


def caption(scene: Scene) -> str:
    phrases = [thing.phrase() for thing in scene.things]
    return f" {scene.relation} ".join(phrases) + f" on a {scene.background} background"


def sample_scene(rng: random.Random, alone: float = 0.45) -> Scene:
    """Draw a scene, of one thing in a share `alone`; of two things each names a size or a look more rarely."""
    background = rng.choice(BACKGROUNDS)
    if rng.random() < alone:
        colour = rng.choice(COLOURS)
        return Scene((_sample_thing(rng, colour, named=0.65),), background)
    first, second = rng.sample(COLOURS, 2)
    things = (_sample_thing(rng, first, named=0.35), _sample_thing(rng, second, named=0.35))
    return Scene(things, background, rng.choice(RELATIONS))


def _sample_thing(rng: random.Random, colour: str, named: float) -> Thing:
    size = rng.choice(("small", "large")) if rng.random() < named else ""
    look = rng.choice(LOOKS[1:]) if rng.random() < named else ""
    return Thing(rng.choice(SHAPES), colour, size, look)


def is_held_out(text: str) -> bool:
    """Whether training never sees this caption; decided by the caption alone, so the same for every seed."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def sample_scenes(count: int, seed: int, held_out: bool, alone: float = 0.45) -> list[Scene]:
    """`count` scenes of one side of the split; held-out ones have distinct captions."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    seen: set[str] = set()
    while len(scenes) < count:
        scene = sample_scene(rng, alone)
        text = caption(scene)
        if is_held_out(text) == held_out and not (held_out and text in seen):
            seen.add(text)
            scenes.append(scene)
    return scenes


def unknown_prompt(prompt: str) -> bool:
    """Whether a prompt has no word of the grammar, so that the embedded model can only guess."""
    return GRAMMAR_WORDS.isdisjoint(re.findall(r"[a-z]+", prompt.lower()))
