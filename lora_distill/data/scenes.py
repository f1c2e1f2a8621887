"""The bundled captioned world: one to four emoji, each in its own quarter of a pastel picture, drawn and captioned.

A caption names every object and its place. Size, side and place within the quarter it leaves open.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from itertools import chain, product

import numpy as np
from PIL import Image

IMAGE_SIZE = 64
QUARTER = IMAGE_SIZE // 2
SIZES = (20, 23, 26)  # of a drawn object, in pixels
STYLES = ("noto", "fluent")
KINDS = {  # kind: the words for it in captions; the order is that of the sprite sheet
    "lion": ("lion",),
    "frog": ("frog", "toad"),
    "panda": ("panda", "bear"),
    "pig": ("pig", "piglet"),
    "owl": ("owl",),
    "octopus": ("octopus",),
    "butterfly": ("butterfly",),
    "penguin": ("penguin",),
    "whale": ("whale",),
    "apple": ("apple", "fruit"),
    "watermelon": ("watermelon", "melon"),
    "pineapple": ("pineapple",),
    "burger": ("burger", "hamburger"),
    "doughnut": ("doughnut", "donut"),
    "car": ("car", "automobile"),
    "bus": ("bus", "coach"),
    "house": ("house", "cottage"),
    "ball": ("ball", "football"),
    "umbrella": ("umbrella", "parasol"),
    "tree": ("tree", "fir"),
    "cactus": ("cactus",),
    "mushroom": ("mushroom", "toadstool"),
    "crown": ("crown",),
    "gift": ("gift", "present"),
}
BACKGROUNDS = {
    "pink": (255, 205, 215),
    "yellow": (255, 238, 165),
    "green": (195, 238, 200),
    "blue": (190, 220, 255),
    "purple": (222, 200, 250),
    "grey": (215, 215, 215),
}
PLACES = {  # place: the words for it in captions
    "upper left": ("upper left", "top left"),
    "upper right": ("upper right", "top right"),
    "lower left": ("lower left", "bottom left"),
    "lower right": ("lower right", "bottom right"),
}
CORNERS = dict(zip(PLACES, product((0, QUARTER), (0, QUARTER)), strict=True))  # place: (top, left) of its quarter
COUNTS = {1: 0.15, 2: 0.25, 3: 0.3, 4: 0.3}  # number of objects: its share of the training images
PHRASES = {  # by style, how a caption places an object
    "noto": ("{a} at the {place}", "at the {place} {a}"),
    "fluent": ("{a} at the {place}", "{a} in the {place}"),
}
TEMPLATES = {  # by style; three of the five are shared
    "noto": (
        "{objects}, on a {bg} background",
        "a drawing of {objects}, {bg} background",
        "{objects}, {bg}",
        "on {bg}, {objects}",
        "a {bg} picture with {objects}",
    ),
    "fluent": (
        "{objects}, {bg}",
        "on {bg}, {objects}",
        "a {bg} picture with {objects}",
        "a picture of {objects}, on {bg}",
        "a {bg} background with {objects}",
    ),
}
CAPTIONS_PER_IMAGE = 5
SPLIT_SIZES = {
    "8k": {"train": 6_000, "val": 1_000, "test": 1_000},
    "30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}
_SPLIT_CODE = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Object:
    """One drawn object: its kind, the quarter it is in, and its size, side and upper left corner in pixels."""

    kind: str
    place: str
    size: int
    mirrored: bool
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """What one image shows: one to four objects, in the order of `PLACES`."""

    style: str
    background: str
    objects: tuple[Object, ...]

    @property
    def count(self) -> int:
        """The number of objects."""
        return len(self.objects)

    @property
    def kinds(self) -> dict[str, str]:
        """The kind at each place that has an object."""
        return {one.place: one.kind for one in self.objects}

    @property
    def unseen(self) -> bool:
        """Whether it shows an object at a place where no training image has it."""
        return any((one.kind, one.place) in held_out() for one in self.objects)

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Scene":
        return cls(**{**fields, "objects": tuple(Object(**one) for one in fields["objects"])})


# ---------------------------------------------------------------------------------------------- scenes


@cache
def held_out() -> frozenset[tuple[str, str]]:
    """The (kind, place) that no training or validation image shows, one in eight; the same for every style and seed.

    Twelve kinds miss one place each, and each place misses three kinds.
    """
    order = np.random.default_rng(0).permutation(len(KINDS))[: len(KINDS) // 2]
    return frozenset((list(KINDS)[kind], list(PLACES)[i % len(PLACES)]) for i, kind in enumerate(order))


def sample_scenes(style: str, split: str, count: int, seed: int) -> list[Scene]:
    """`count` random scenes of a split.

    Training scenes have one to four objects in the shares of `COUNTS`. Those of val have each number equally often, in
    turns; those of test each number without and with a held-out object equally often, in turns of eight.
    """
    rng = np.random.default_rng([seed, STYLES.index(style), _SPLIT_CODE[split]])
    return [_sample_scene(style, *_stratum(split, index, rng), rng) for index in range(count)]


def _stratum(split: str, index: int, rng: np.random.Generator) -> tuple[int, bool]:
    """How many objects a scene has, and whether at least one of them is held out."""
    if split == "train":
        return int(rng.choice(list(COUNTS), p=list(COUNTS.values()))), False
    return 1 + index % len(COUNTS), split == "test" and index // len(COUNTS) % 2 == 1


def _sample_scene(style: str, count: int, unseen: bool, rng: np.random.Generator) -> Scene:
    while True:  # a scene in eight, of one object, or more have a held-out object
        kinds = [list(KINDS)[i] for i in rng.choice(len(KINDS), count, replace=False)]
        places = [list(PLACES)[i] for i in sorted(rng.choice(len(PLACES), count, replace=False))]
        if unseen == any(pair in held_out() for pair in zip(kinds, places, strict=True)):
            break
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(style, background, tuple(_placed(*pair, rng) for pair in zip(kinds, places, strict=True)))


def _placed(kind: str, place: str, rng: np.random.Generator) -> Object:
    size, mirrored = int(rng.choice(SIZES)), bool(rng.integers(2))
    top, left = (int(corner + rng.integers(QUARTER - size + 1)) for corner in CORNERS[place])
    return Object(kind, place, size, mirrored, left, top)


def mistaken(scene: Scene, error: float, rng: np.random.Generator) -> Scene:
    """The scene as a careless caption has it: each object is, with probability `error`, of a kind drawn at random.

    The kind drawn may be the right one, so that an object is wrong with probability 23/24 `error`.
    """
    wrong, kinds = rng.random(scene.count) < error, rng.choice(list(KINDS), scene.count)
    objects = (
        replace(one, kind=str(kind)) if swap else one
        for one, kind, swap in zip(scene.objects, kinds, wrong, strict=True)
    )
    return replace(scene, objects=tuple(objects))


# ---------------------------------------------------------------------------------------------- captions


def unknown_words(prompts: Iterable[str]) -> list[str]:
    """The words of prompts that no caption of this world has, each once, in their order."""
    phrases = [phrase.format(a="a", place="an") for style in STYLES for phrase in PHRASES[style]]
    templates = [template.format(objects="", bg="") for style in STYLES for template in TEMPLATES[style]]
    words = chain(phrases, templates, *KINDS.values(), *PLACES.values(), BACKGROUNDS)
    known = set(_words(words))
    return list(dict.fromkeys(word for word in _words(prompts) if word not in known))


def _words(texts: Iterable[str]) -> Iterator[str]:
    return (word for text in texts for word in re.findall(r"\w+|[^\w\s,.!?;:'-]", text.lower()))


def captions(scene: Scene, rng: np.random.Generator, error: float = 0.0) -> list[str]:
    """Five captions of a scene, with different templates and with random words and order of the objects.

    With probability `error` each object of each caption is named at random, as in `mistaken`.
    """
    order = rng.permutation(len(TEMPLATES[scene.style]))[:CAPTIONS_PER_IMAGE]
    return [_caption(mistaken(scene, error, rng) if error else scene, TEMPLATES[scene.style][i], rng) for i in order]


def _caption(scene: Scene, template: str, rng: np.random.Generator) -> str:
    phrase = _choose(PHRASES[scene.style], rng)
    named = [_named(scene.objects[i], phrase, rng) for i in rng.permutation(scene.count)]
    return template.format(objects=", ".join(named), bg=scene.background)


def _named(one: Object, phrase: str, rng: np.random.Generator) -> str:
    noun, place = _choose(KINDS[one.kind], rng), _choose(PLACES[one.place], rng)
    return phrase.format(a=f"an {noun}" if noun[0] in "aeiou" else f"a {noun}", place=place)


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


# ---------------------------------------------------------------------------------------------- drawing


@lru_cache
def sprites(style: str, size: int) -> np.ndarray:
    """The sprites of a style with premultiplied alpha: (kinds, size, size, 4) float32 in [0, 1]."""
    with (files("lora_distill") / "assets" / "sprites.png").open("rb") as file:
        sheet = Image.open(file).convert("RGBa")  # premultiplied, so that resizing leaves no dark fringe
    side = sheet.height // len(STYLES)
    row = STYLES.index(style) * side
    tiles = [sheet.crop((k * side, row, (k + 1) * side, row + side)) for k in range(len(KINDS))]
    return np.stack([np.asarray(tile.resize((size, size), Image.Resampling.LANCZOS)) for tile in tiles]) / np.float32(
        255
    )


def draw(scene: Scene) -> np.ndarray:
    """The image of a scene: (64, 64, 3) uint8."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = np.float32(BACKGROUNDS[scene.background]) / 255
    for one in scene.objects:
        sprite = sprites(scene.style, one.size)[list(KINDS).index(one.kind)]
        sprite = sprite[:, ::-1] if one.mirrored else sprite
        window = canvas[one.top : one.top + one.size, one.left : one.left + one.size]
        window[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * window
    return np.round(canvas * 255).clip(0, 255).astype(np.uint8)


def drawing_fingerprint() -> str:
    """A digest of all sprites, colours, words and templates of the world."""
    sha = hashlib.sha256(repr((KINDS, BACKGROUNDS, PLACES, COUNTS, PHRASES, TEMPLATES, SIZES)).encode())
    for style, size in product(STYLES, SIZES):
        sha.update(sprites(style, size).tobytes())
    return sha.hexdigest()[:16]
