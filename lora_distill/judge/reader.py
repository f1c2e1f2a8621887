"""The reader: says what a picture of the bundled world shows, by analysis by synthesis. It may find nothing."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_distill.data.scenes import BACKGROUNDS, CORNERS, KINDS, PLACES, QUARTER, SIZES, STYLES, Scene, sprites

EMPTY, OTHER = "empty", "something else"
MARGIN = 2  # pixels by which a generated object may stand outside its quarter
WORST = 2.0  # where an error ends: nothing like any sprite
CANDIDATES = 4  # of a quarter's coarse search, that are looked at in full


@dataclass(frozen=True)
class Reading:
    """What the reader recognises in an image; None for a background or style that it does not.

    `kinds` has for each quarter, in the order of `PLACES`, a kind, "empty" or "something else". `errors` has the error
    of the sprite that fits each quarter best, as a share of the sprite's detail; 2, the worst, for one that is empty.
    """

    background: str | None = None
    style: str | None = None
    kinds: tuple[str, ...] = (OTHER,) * len(PLACES)
    errors: tuple[float, ...] = (WORST,) * len(PLACES)


class Reader:
    """Reads the background, and of each quarter the object, from images, by analysis by synthesis.

    The background is the colour of the border. A quarter with hardly any difference from it is empty. Else every
    sprite of every style, size and side is laid over the quarter at every position, and the one that leaves the least
    squared error, of the whole quarter, is what fits: a second object, or the half of one, is not overlooked. It is
    found where that error is at most `tolerance` times the sprite's detail, what a strong blur takes from it. At 1 a
    picture is no nearer to the sprite than a blot of its colours.
    """

    background_tolerance = 17.0  # Euclidean distance in 0..255 RGB: half the smallest distance in the palette
    tolerance = 1.0  # as a fraction of the detail: with it the eye agrees, see figures/reader
    empty = 0.25  # a quarter with less than this part of the weakest sprite's energy is empty

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=self.device)
        self.names = [(style, kind) for style in STYLES for kind in KINDS for _ in range(2)]  # as drawn, mirrored
        self.templates = [[self._templates(size, colour / 255) for size in SIZES] for colour in self.palette]
        self.details = [[_detail(t) for t in sizes] for sizes in self.templates]
        self.weakest = [min(float(t.square().sum((1, 2, 3)).min()) for t in sizes) for sizes in self.templates]

    def _templates(self, size: int, background: Tensor) -> Tensor:
        """The difference that each sprite makes on a background: (styles x kinds x 2 sides, 3, size, size)."""
        rgba = torch.from_numpy(np.concatenate([sprites(style, size) for style in STYLES])).permute(0, 3, 1, 2)
        rgb, alpha = rgba[:, :3].to(self.device), rgba[:, 3:].to(self.device)
        drawn = rgb - alpha * background[:, None, None]
        return torch.stack([drawn, drawn.flip(3)], dim=1).flatten(0, 1)

    def read(self, images: np.ndarray | Tensor, batch_size: int = 64) -> list[Reading]:
        """The readings of images (n, 64, 64, 3) uint8."""
        images = torch.as_tensor(images)
        return [reading for batch in images.split(batch_size) for reading in self._read_batch(batch)]

    @torch.no_grad()
    def _read_batch(self, images: Tensor) -> list[Reading]:
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()  # (n, 3, h, w)
        border = torch.cat([pixels[..., :2, :].flatten(2), pixels[..., -2:, :].flatten(2)], dim=2)  # (n, 3, 4 w)
        colour = border.median(dim=2).values  # (n, 3)
        distance, nearest = torch.cdist(colour, self.palette).min(dim=1)
        readings = [Reading()] * len(pixels)
        for code, name in enumerate(BACKGROUNDS):
            rows = torch.nonzero((nearest == code) & (distance <= self.background_tolerance)).flatten()
            if len(rows):
                residual = (pixels[rows] - colour[rows, :, None, None]) / 255
                for row, found in zip(rows.tolist(), self._quarters(residual, code), strict=True):
                    readings[row] = Reading(name, *found)
        return readings

    def _quarters(self, residual: Tensor, background: int) -> list[tuple[str | None, tuple, tuple]]:
        """Style, kinds and errors of images (n, 3, h, w) in [-1, 1] whose background has been subtracted."""
        padded = F.pad(residual, (MARGIN,) * 4)
        side = QUARTER + 2 * MARGIN
        quarters = torch.stack(
            [padded[..., top : top + side, left : left + side] for top, left in CORNERS.values()], dim=1
        ).flatten(0, 1)  # (n x 4, 3, side, side)
        inside = quarters[..., MARGIN:-MARGIN, MARGIN:-MARGIN].square().sum((1, 2, 3))
        full = inside >= self.empty * self.weakest[background]
        errors, sprite = torch.full((len(quarters),), WORST), torch.full((len(quarters),), -1)
        if full.any():
            found = [error.cpu() for error in self._best(quarters[full], background)]
            errors[full.cpu()], sprite[full.cpu()] = found
        return [
            self._describe(*quarter)
            for quarter in zip(errors.view(-1, 4).tolist(), sprite.view(-1, 4).tolist(), strict=True)
        ]

    def _best(self, quarters: Tensor, background: int) -> tuple[Tensor, Tensor]:
        """Error, as a share of the detail, and number of the sprite that fits each quarter (q, 3, side, side) best."""
        fits = [self._fit(quarters, templates) for templates in self.templates[background]]
        errors, numbers = (torch.stack(parts) for parts in zip(*fits, strict=True))  # (sizes, q)
        shares = torch.stack([d[n] for d, n in zip(self.details[background], numbers, strict=True)])  # (sizes, q)
        best = errors.min(dim=0, keepdim=True).indices
        return (errors / shares).gather(0, best)[0], numbers.gather(0, best)[0]

    def _fit(self, quarters: Tensor, templates: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and number of the best of the templates (t, 3, size, size) of one size.

        All are tried at half the resolution; the best few then in full, at every pixel around.
        """
        error = _errors(_halved(quarters), _halved(templates), MARGIN // 2)  # (q, t, y, x)
        width = error.shape[-1]
        coarse, position = error.flatten(2).min(dim=2)  # (q, t)
        number = coarse.topk(CANDIDATES, dim=1, largest=False).indices  # (q, candidates)
        place = position.gather(1, number)
        return _refined(quarters, templates, number, 2 * (place // width), 2 * (place % width))

    def _describe(self, errors: list[float], sprite: list[int]) -> tuple[str | None, tuple, tuple]:
        kinds, styles = [], set()
        for error, number in zip(errors, sprite, strict=True):
            style, kind = self.names[number] if number >= 0 and error <= self.tolerance else (None, OTHER)
            kinds.append(EMPTY if number < 0 else kind)
            styles |= {style} - {None}
        return styles.pop() if len(styles) == 1 else None, tuple(kinds), tuple(errors)


def _detail(templates: Tensor) -> Tensor:
    """The energy that a Gaussian blur of an eighth of their size takes from templates (t, 3, size, size): (t,)."""
    size = templates.shape[-1]
    distance = torch.arange(-(size // 2), size // 2 + 1, device=templates.device)
    kernel = (-0.5 * (distance / (size / 8)).square()).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    channels = templates.flatten(0, 1)[:, None]  # (t x 3, 1, size, size)
    blurred = F.conv2d(F.conv2d(channels, kernel, padding="same"), kernel.mT, padding="same")
    return (channels - blurred).square().sum((1, 2, 3)).view(-1, 3).sum(1)


def _halved(pixels: Tensor) -> Tensor:
    """Pixels (n, 3, h, w) at half the resolution; an odd side is padded with nothing."""
    return F.avg_pool2d(F.pad(pixels, (0, pixels.shape[3] % 2, 0, pixels.shape[2] % 2)), 2)


def _unexplained(quarters: Tensor, margin: int, size: int) -> Tensor:
    """The energy of quarters (q, 3, h, w) that a sprite at a position has to explain: (q, 1, y, x).

    That of the quarter itself, wherever the sprite lies, and that of the margin where the sprite lies on it.
    """
    square = quarters.square().sum(1, keepdim=True)  # (q, 1, h, w)
    inside = square[..., margin:-margin, margin:-margin].sum((2, 3), keepdim=True)
    square[..., margin:-margin, margin:-margin] = 0
    return inside + F.avg_pool2d(square, size, 1, divisor_override=1)


def _errors(quarters: Tensor, templates: Tensor, margin: int) -> Tensor:
    """Squared errors of templates (t, 3, s, s) at positions of quarters (q, 3, h, w).

    (q, t, y, x). |r - t|^2 = |r|^2 - 2 r t + |t|^2.
    """
    energy = templates.square().sum((1, 2, 3))[:, None, None]  # (t, 1, 1)
    return _unexplained(quarters, margin, templates.shape[-1]) - 2 * F.conv2d(quarters, templates) + energy


def _refined(quarters: Tensor, templates: Tensor, number: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and number of the best of candidates (q, c) and of the pixels around them.

    Each is the template `number` at (y, x) of its quarter.
    """
    size, side = templates.shape[-1], quarters.shape[-1]
    steps = torch.arange(-1, 2, device=quarters.device)
    ys = (y[..., None, None] + steps[:, None]).clamp(0, side - size).expand(*y.shape, 3, 3).flatten(1)  # (q, c x 9)
    xs = (x[..., None, None] + steps).clamp(0, side - size).expand(*x.shape, 3, 3).flatten(1)
    windows = quarters.unfold(2, size, 1).unfold(3, size, 1)  # (q, 3, y, x, size, size), a view
    rows = torch.arange(len(quarters), device=quarters.device)[:, None]
    patches = windows[rows, :, ys, xs].flatten(2)  # (q, c x 9, 3 size size)
    unexplained = _unexplained(quarters, MARGIN, size)[rows, 0, ys, xs]  # (q, c x 9)
    numbers = number.repeat_interleave(9, dim=1)
    flat = templates.flatten(1)
    energy = flat.square().sum(1)[numbers]
    product = (patches * flat[numbers]).sum(2)
    error = unexplained - 2 * product + energy
    best = error.min(dim=1)
    return best.values, numbers.gather(1, best.indices[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------- against the scene


@dataclass(frozen=True)
class Verdicts:
    """What the reader says of n images against their scenes, image by image.

    `right` has boolean arrays (n,) by attribute. `objects`: every quarter has its object, or is empty as it should be.
    `background`. `style`. `content`: objects and background, all that a caption says. `all`: content and style.
    `object_share` (n,) is the share of the scene's objects that are in their place. `fit_error` (n,) is the mean error
    of what fits their quarters best, at most 2, be it the right object or not: it has no threshold, and a melted object
    counts by how much.
    """

    right: dict[str, np.ndarray]
    object_share: np.ndarray
    fit_error: np.ndarray


def judge_images(images: np.ndarray | Tensor, scenes: list[Scene], reader: Reader | None = None) -> Verdicts:
    """The reader's verdicts on images (n, 64, 64, 3) uint8 of scenes."""
    return compare_readings((reader or Reader()).read(images), scenes)


def compare_readings(readings: list[Reading], scenes: list[Scene]) -> Verdicts:
    """The verdicts on images that were read before."""
    pairs = list(zip(readings, scenes, strict=True))
    right = {
        "objects": [reading.kinds == asked(scene) for reading, scene in pairs],
        "background": [reading.background == scene.background for reading, scene in pairs],
        "style": [reading.style == scene.style for reading, scene in pairs],
    }
    right = {name: np.array(values, dtype=bool) for name, values in right.items()}
    content = right["objects"] & right["background"]
    quarters = [
        [(seen == wanted, min(error, WORST)) for seen, error, wanted in zip(r.kinds, r.errors, asked(s), strict=True)
         if wanted != EMPTY]
        for r, s in pairs
    ]  # fmt: skip
    means = np.array([np.mean(found, axis=0) for found in quarters]).reshape(-1, 2)  # (n, 2)
    return Verdicts({**right, "content": content, "all": content & right["style"]}, *means.T)


def asked(scene: Scene) -> tuple[str, ...]:
    """What each quarter should show, in the order of `PLACES`: a kind or "empty"."""
    return tuple(scene.kinds.get(place, EMPTY) for place in PLACES)
