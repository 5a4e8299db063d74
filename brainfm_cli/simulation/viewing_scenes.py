"""The pictures that simulated people see: a small grammar of objects, colours, relations and places, its captions, and drawings.

A scene is "a red dog under a table in the kitchen". Captions of one scene differ as those of people do: other words for
the same thing, another order, something left out. Nothing here knows of brains.
"""

from __future__ import annotations

import io
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

OBJECTS: dict[str, tuple[str, ...]] = {
    "dog": ("dog", "puppy"),
    "cat": ("cat", "kitten"),
    "horse": ("horse", "pony"),
    "bird": ("bird",),
    "cow": ("cow",),
    "man": ("man", "guy"),
    "woman": ("woman", "lady"),
    "child": ("child", "kid"),
    "car": ("car",),
    "bicycle": ("bicycle", "bike"),
    "boat": ("boat",),
    "table": ("table",),
    "chair": ("chair",),
    "umbrella": ("umbrella",),
    "ball": ("ball",),
    "box": ("box",),
}
"""Things, each with the words that captions use for it."""
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
RELATIONS: dict[str, tuple[str, ...]] = {
    "on": ("on top of", "on"),
    "under": ("under", "below"),
    "beside": ("next to", "beside"),
    "before": ("in front of",),
    "behind": ("behind",),
}
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "street": ("on the street", "in the street"),
    "kitchen": ("in the kitchen", "in a kitchen"),
    "forest": ("in the forest", "in the woods"),
    "snow": ("in the snow",),
    "field": ("in a field", "in a meadow"),
    "office": ("in the office", "in an office"),
    "garden": ("in the garden", "in a garden"),
}
SLOTS = ("thing", "colour", "relation", "other", "place")
"""Parts of a scene, in the order of :class:`Scene` and of the semantic features."""
_VALUES: tuple[tuple[str, ...], ...] = (tuple(OBJECTS), COLOURS, tuple(RELATIONS), tuple(OBJECTS), tuple(PLACES))
_LEAVE_OUT = 0.25  # share of captions without the colour, and of captions without the place


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: which thing, of which colour, where it stands to which other thing, and in which place."""

    thing: str
    """What the picture is about."""
    colour: str
    """Its colour."""
    relation: str
    """Where it is, seen from the other thing."""
    other: str
    """The other thing."""
    place: str
    """Where both are."""


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene that the grammar allows: nothing stands beside another of its kind."""
    return tuple(Scene(*values) for values in product(*_VALUES) if values[0] != values[3])


def scene_number(scene: Scene) -> int:
    """Place of a scene in :func:`all_scenes`."""
    return _numbers()[scene]


@cache
def _numbers() -> dict[Scene, int]:
    return {scene: number for number, scene in enumerate(all_scenes())}


@cache
def all_features() -> NDArray[np.float32]:
    """(scenes, features) :func:`features` of every scene of :func:`all_scenes`."""
    return features(list(all_scenes()))


def draw_scenes(count: int, generator: np.random.Generator) -> list[Scene]:
    """Different scenes, uniform over the grammar."""
    scenes = all_scenes()
    return [scenes[place] for place in generator.choice(len(scenes), size=count, replace=False)]


def features(scenes: list[Scene]) -> NDArray[np.float32]:
    """(scenes, features) one column for each value of each slot: 1 where the scene has it, less its mean over the grammar."""
    blocks = []
    for slot, values in zip(zip(*(astuple(scene) for scene in scenes), strict=True), _VALUES, strict=True):
        block = np.array([[value == one for one in values] for value in slot], np.float32)
        blocks.append(block - np.float32(1 / len(values)))
    return np.concatenate(blocks, axis=1)


def feature_slots() -> NDArray[np.int64]:
    """(features,) slot of each column of :func:`features`."""
    return np.repeat(np.arange(len(SLOTS)), [len(values) for values in _VALUES])


def captions(scene: Scene, count: int, generator: np.random.Generator) -> list[str]:
    """``count`` sentences about one scene."""
    return [_sentence(scene, generator) for _ in range(count)]


def full_caption(scene: Scene) -> str:
    """The sentence that says everything, in the commonest words: what a perfect decoder would say."""
    words = (OBJECTS[scene.thing][0], RELATIONS[scene.relation][0], OBJECTS[scene.other][0], PLACES[scene.place][0])
    return f"A {scene.colour} {words[0]} {words[1]} {_article(words[2])} {words[3]}."


def _sentence(scene: Scene, generator: np.random.Generator) -> str:
    def one_of(words: tuple[str, ...]) -> str:
        return words[0] if generator.random() < 0.7 else words[int(generator.integers(len(words)))]  # people mostly use the same word

    thing, relation, other = one_of(OBJECTS[scene.thing]), one_of(RELATIONS[scene.relation]), one_of(OBJECTS[scene.other])
    left_out = generator.random()
    named = _article(f"{scene.colour} {thing}" if left_out > _LEAVE_OUT else thing)
    place = "" if left_out > 1 - _LEAVE_OUT else " " + one_of(PLACES[scene.place])
    form = int(generator.integers(4))
    if form == 0:
        text = f"there is {named} {relation} {_article(other)}{place}"
    elif form == 1:
        text = f"{named} is {relation} {_article(other)}{place}"
    else:
        text = f"{named} {relation} {_article(other)}{place}"
    return text[0].upper() + text[1:] + "."


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


_PAINT = {
    "red": (205, 40, 40), "blue": (40, 70, 200), "green": (40, 150, 60), "yellow": (235, 205, 50),
    "white": (245, 245, 245), "black": (25, 25, 25), "": (140, 110, 90),
}  # fmt: skip
# Sky or wall above, ground below.
_GROUND = {
    "beach": ((150, 205, 240), (235, 215, 160)), "street": ((180, 190, 200), (90, 90, 95)),
    "kitchen": ((250, 235, 205), (170, 120, 80)), "forest": ((60, 110, 70), (70, 60, 30)),
    "snow": ((200, 220, 240), (250, 250, 255)), "field": ((140, 200, 250), (120, 190, 70)),
    "office": ((215, 215, 220), (120, 130, 150)), "garden": ((170, 220, 240), (60, 140, 60)),
}  # fmt: skip
# Where the thing is drawn, seen from the other thing: shift to the right and down, in object sizes, and its size.
_PLACED = {"on": (0.0, -0.9, 1.0), "under": (0.0, 0.9, 1.0), "beside": (-1.1, 0.0, 1.0), "before": (0.25, 0.35, 1.25), "behind": (-0.3, -0.3, 0.75)}  # fmt: skip


def draw_picture(scene: Scene, size: int) -> bytes:
    """PNG of a scene, ``size`` × ``size`` pixels: simple shapes, one for each kind of thing."""
    from PIL import Image, ImageDraw

    above, below = _GROUND[scene.place]
    image = Image.new("RGB", (size, size), above)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0.6 * size, size, size), fill=below)
    unit = 0.28 * size
    right, down, scale = _PLACED[scene.relation]
    centre = (0.55 * size, 0.55 * size)
    thing = (centre[0] + right * unit, centre[1] + down * unit)
    shapes = [(scene.other, "", centre, unit), (scene.thing, scene.colour, thing, scale * unit)]
    for name, colour, place, extent in shapes[:: -1 if scene.relation == "behind" else 1]:
        canvas.polygon(_outline(name, place, extent), fill=_PAINT[colour], outline=(0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _outline(name: str, centre: tuple[float, float], extent: float) -> list[tuple[float, float]]:
    """A closed shape that belongs to one kind of thing: a circle whose radius waves."""
    kind = list(OBJECTS).index(name)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = 0.5 * extent * (0.75 + 0.25 * np.cos((2 + kind % 6) * angles + 0.7 * kind))
    stretch = (1.3, 0.7) if kind % 2 else (0.8, 1.2)
    return [(centre[0] + stretch[0] * r * np.cos(a), centre[1] + stretch[1] * r * np.sin(a)) for r, a in zip(radius, angles, strict=True)]
