"""The bundled captioned world: two emoji in a spatial relation on a pastel background, drawn and captioned.

A prompt's scene is known exactly, so the `Reader` can measure whether a picture shows it. It finds objects by analysis
by synthesis, and may find none.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.resources import files
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

IMAGE_SIZE = 64
SPRITE_SIZE = 26
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
AXES = ("horizontal", "vertical")
RELATIONS = {  # axis: (words for "first is ... second", words for "second is ... first")
    "horizontal": (("left of", "to the left of"), ("right of", "to the right of")),
    "vertical": (("above", "over"), ("below", "under")),
}
TEMPLATES = {  # by style; three of the five are shared
    "noto": (
        "{a} {rel} {b} on a {bg} background",
        "a drawing of {a} {rel} {b}, {bg} background",
        "{a} {rel} {b}, {bg}",
        "on {bg}, {a} {rel} {b}",
        "a {bg} picture with {a} {rel} {b}",
    ),
    "fluent": (
        "{a} {rel} {b}, {bg}",
        "on {bg}, {a} {rel} {b}",
        "a {bg} picture with {a} {rel} {b}",
        "a picture of {a} {rel} {b} on {bg}",
        "a {bg} background with {a} {rel} {b}",
    ),
}
CAPTIONS_PER_IMAGE = 5
SPLIT_SIZES = {
    "8k": {"train": 6_000, "val": 1_000, "test": 1_000},
    "30k": {"train": 29_000, "val": 1_014, "test": 1_000},
}
_SPLIT_CODE = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """What one image shows. `first` is the left or upper object; positions are sprite centres (x, y) in pixels."""

    style: str
    background: str
    first: str
    second: str
    axis: str
    positions: tuple[tuple[int, int], tuple[int, int]]

    @property
    def layout(self) -> tuple[str, str, str]:
        return self.first, self.second, self.axis

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "Scene":
        positions = tuple(tuple(position) for position in fields["positions"])
        return cls(**{**fields, "positions": positions})


# ---------------------------------------------------------------------------------------------- scenes


@cache
def layouts() -> tuple[tuple[str, str, str], ...]:
    """All combinations (first, second, axis): 24 x 23 x 2 = 1,104."""
    return tuple((a, b, axis) for a in KINDS for b in KINDS if a != b for axis in AXES)


@cache
def held_out_layouts() -> frozenset[tuple[str, str, str]]:
    """One layout in eight, which no training or validation image shows; the same for every style and seed."""
    order = np.random.default_rng(0).permutation(len(layouts()))
    return frozenset(layouts()[i] for i in order[: len(order) // 8])


def sample_scenes(style: str, split: str, count: int, seed: int) -> list[Scene]:
    """`count` random scenes of a split. Half of the test scenes have held-out layouts; no other split has any."""
    rng = np.random.default_rng([seed, STYLES.index(style), _SPLIT_CODE[split]])
    held_out = sorted(held_out_layouts())
    seen = [layout for layout in layouts() if layout not in held_out_layouts()]
    scenes = []
    for index in range(count):
        pool = held_out if split == "test" and index % 2 else seen
        first, second, axis = pool[rng.integers(len(pool))]
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        scenes.append(Scene(style, background, first, second, axis, _sample_positions(axis, rng)))
    return scenes


def _sample_positions(axis: str, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    centre = IMAGE_SIZE // 2
    along = centre + np.array([-15, 15]) + rng.integers(-2, 3, 2)
    across = centre + rng.integers(-6, 7, 2)
    xs, ys = (along, across) if axis == "horizontal" else (across, along)
    return (int(xs[0]), int(ys[0])), (int(xs[1]), int(ys[1]))


# ---------------------------------------------------------------------------------------------- captions


def unknown_words(prompts: Iterable[str]) -> list[str]:
    """The words of prompts that no caption of this world has, each once, in their order."""
    templates = [template.format(a="a", rel="an", b="an", bg="") for style in STYLES for template in TEMPLATES[style]]
    relations = [words for axis in AXES for side in RELATIONS[axis] for words in side]
    known = {*_words(templates), *_words(relations), *_words(chain(*KINDS.values())), *_words(BACKGROUNDS)}
    return list(dict.fromkeys(word for word in _words(prompts) if word not in known))


def _words(texts: Iterable[str]) -> Iterator[str]:
    return (word for text in texts for word in re.findall(r"\w+|[^\w\s,.!?;:'-]", text.lower()))


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Five captions of a scene, with different templates and with random words and order of the objects."""
    order = rng.permutation(len(TEMPLATES[scene.style]))[:CAPTIONS_PER_IMAGE]
    return [_caption(scene, TEMPLATES[scene.style][i], rng) for i in order]


def _caption(scene: Scene, template: str, rng: np.random.Generator) -> str:
    flipped = int(rng.integers(2))
    a, b = (scene.second, scene.first) if flipped else (scene.first, scene.second)
    relation = _choose(RELATIONS[scene.axis][flipped], rng)
    a, b = (_with_article(_choose(KINDS[kind], rng)) for kind in (a, b))
    return template.format(a=a, rel=relation, b=b, bg=scene.background)


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# ---------------------------------------------------------------------------------------------- drawing


@lru_cache
def sprites(style: str, size: int = SPRITE_SIZE) -> np.ndarray:
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
    for kind, (x, y) in zip((scene.first, scene.second), scene.positions, strict=True):
        sprite = sprites(scene.style)[list(KINDS).index(kind)]
        top, left = y - SPRITE_SIZE // 2, x - SPRITE_SIZE // 2
        window = canvas[top : top + SPRITE_SIZE, left : left + SPRITE_SIZE]
        window[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * window
    return np.round(canvas * 255).clip(0, 255).astype(np.uint8)


def drawing_fingerprint() -> str:
    """A digest of all sprites, colours, words and templates of the world."""
    sha = hashlib.sha256(repr((KINDS, BACKGROUNDS, RELATIONS, TEMPLATES, SPRITE_SIZE)).encode())
    for style in STYLES:
        sha.update(sprites(style).tobytes())
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Reading:
    """What the reader recognises in an image; None for what it does not."""

    background: str | None = None
    style: str | None = None
    first: str | None = None
    second: str | None = None
    axis: str | None = None


class Reader:
    """Reads background, style, both objects and their relation from images, by analysis by synthesis.

    The background is the colour of the border. Every sprite of every style is drawn on it and compared with the image
    at every position. A sprite is found where the squared error is at most `tolerance` times the sprite's energy, its
    own squared difference from the background.
    """

    background_tolerance = 17.0  # Euclidean distance in 0..255 RGB: half the smallest distance in the palette
    tolerance = 0.35  # as a fraction of the energy; half-correct sprites have a much larger error

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=self.device)
        self.names = [(style, kind) for style in STYLES for kind in KINDS]
        # (sprites, 4, size, size)
        rgba = torch.from_numpy(np.concatenate([sprites(style) for style in STYLES])).permute(0, 3, 1, 2)
        rgb, alpha = rgba[:, :3].to(self.device), rgba[:, 3:].to(self.device)
        backgrounds = self.palette[:, None, :, None, None] / 255
        self.templates = rgb - alpha * backgrounds  # (backgrounds, sprites, 3, size, size)

    def read(self, images: np.ndarray | torch.Tensor, batch_size: int = 64) -> list[Reading]:
        """The readings of images (n, 64, 64, 3) uint8."""
        images = torch.as_tensor(images)
        return [reading for batch in images.split(batch_size) for reading in self._read_batch(batch)]

    @torch.no_grad()
    def _read_batch(self, images: torch.Tensor) -> list[Reading]:
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()  # (n, 3, h, w)
        border = torch.cat([pixels[..., :2, :].flatten(2), pixels[..., -2:, :].flatten(2)], dim=2)  # (n, 3, 4 w)
        colour = border.median(dim=2).values  # (n, 3)
        distance, nearest = torch.cdist(colour, self.palette).min(dim=1)
        readings = [Reading()] * len(pixels)
        for code, name in enumerate(BACKGROUNDS):
            rows = torch.nonzero((nearest == code) & (distance <= self.background_tolerance)).flatten()
            if len(rows):
                residual = (pixels[rows] - colour[rows, :, None, None]) / 255
                for row, reading in zip(rows.tolist(), self._objects(residual, code), strict=True):
                    readings[row] = Reading(background=name, **reading)
        return readings

    def _objects(self, residual: torch.Tensor, background: int) -> list[dict]:
        """The two sprites that fit best, in images (n, 3, h, w) in [-1, 1] whose background has been subtracted."""
        template = self.templates[background]  # (sprites, 3, size, size)
        energy = template.square().sum((1, 2, 3))[:, None, None]  # (sprites, 1, 1)
        window = F.conv2d(residual.square().sum(1, keepdim=True), torch.ones_like(template[:1, :1]))  # (n, 1, y, x)
        error = (window - 2 * F.conv2d(residual, template)) / energy + 1  # (n, sprites, y, x)
        found = [self._two_best(image_error) for image_error in error]
        return [self._describe(sightings) for sightings in found]

    def _two_best(self, error: torch.Tensor) -> list[tuple[float, int, int, int]]:
        """(error, sprite, x, y) of the best sprite and of the best clear of it, from errors (sprites, y, x)."""
        sightings, (height, width) = [], error.shape[1:]
        clear = SPRITE_SIZE - 6
        for _ in range(2):
            value, index = error.flatten().min(dim=0)
            sprite, y, x = int(index) // (height * width), int(index) // width % height, int(index) % width
            sightings.append((float(value), sprite, x, y))
            error = error.clone()
            error[:, max(0, y - clear) : y + clear + 1, max(0, x - clear) : x + clear + 1] = torch.inf
        return sightings

    def _describe(self, sightings: list[tuple[float, int, int, int]]) -> dict:
        seen = [(self.names[sprite], x, y) for error, sprite, x, y in sightings if error <= self.tolerance]
        styles = {style for (style, _), _, _ in seen}
        style = styles.pop() if len(styles) == 1 else None
        if len(seen) < 2:
            return {"style": style, "first": seen[0][0][1] if seen else None}
        (_, x0, y0), (_, x1, y1) = seen
        axis = "horizontal" if abs(x1 - x0) > abs(y1 - y0) else "vertical"
        seen.sort(key=lambda sighting: sighting[1 if axis == "horizontal" else 2])
        return {"style": style, "first": seen[0][0][1], "second": seen[1][0][1], "axis": axis}


def agreement(readings: list[Reading], scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Which images agree with their scenes: boolean arrays (n,) by attribute.

    `objects`: both kinds, in any order. `relation`: both kinds in the right order on the right axis. `background`.
    `style`. `content`: relation and background, all that a caption says. `all`: content and style.
    """
    pairs = list(zip(readings, scenes, strict=True))
    right = {
        "objects": [{r.first, r.second} == {s.first, s.second} for r, s in pairs],
        "relation": [(r.first, r.second, r.axis) == s.layout for r, s in pairs],
        "background": [r.background == s.background for r, s in pairs],
        "style": [r.style == s.style for r, s in pairs],
    }
    right = {name: np.array(values, dtype=bool) for name, values in right.items()}
    content = right["relation"] & right["background"]
    return {**right, "content": content, "all": content & right["style"]}
