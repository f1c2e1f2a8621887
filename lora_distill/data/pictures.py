"""One image file as a picture: the one place where files are decoded, whatever a decoder raises.

An image is here what `datasets` has in its column: {"bytes": ..., "path": ...}, one of them None, or None altogether.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps

from lora_distill.errors import NOT_FETCHED, InputError, is_pointer, one_line

if TYPE_CHECKING:
    from datasets import Dataset


def raw_images(dataset: "Dataset") -> "Dataset":
    """The column `image` of a dataset as it is stored, not decoded."""
    from datasets import Image  # here, so that a training on the teacher's latents does not hold it in memory

    return dataset.select_columns("image").cast_column("image", Image(decode=False))


def opened(image: dict, draft: tuple[str | None, tuple[int, int]] | None = None) -> PIL.Image.Image:
    """An image, decoded, of an animation the first frame; with `draft` (mode, size) a JPEG may be smaller.

    Raises ValueError with the reason, whatever the decoder raises.
    """
    try:
        with PIL.Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as picture:
            if draft:
                picture.draft(*draft)
            picture.load()
            return picture
    except FileNotFoundError:
        raise InputError("missing") from None
    except PIL.UnidentifiedImageError:
        pointer = image["bytes"] is None and is_pointer(image["path"])
        raise InputError(NOT_FETCHED if pointer else "cannot identify image file") from None
    except Exception as error:  # a decoder may raise anything
        raise InputError(one_line(error)) from None


def problem(image: dict | None) -> str | None:
    """Why an image cannot be used, None when it can."""
    if image is None:
        return "missing"
    try:
        picture = opened(image, draft=(None, (1, 1)))  # a JPEG is read to its end, but decoded at an eighth of its size
        if picture.mode != "RGB" or picture.getexif():
            upright_rgb(picture)
    except Exception as error:  # as above
        return one_line(error)
    return None


def picture_reader(dataset: "Dataset") -> Callable[[int], PIL.Image.Image]:
    """A function that decodes the image of a row. It raises ValueError that names an image that cannot be read."""
    images, names = raw_images(dataset), dataset.select_columns("id")

    def read(number: int) -> PIL.Image.Image:
        try:
            return opened(images[number]["image"] or {"bytes": b"", "path": None})
        except InputError as error:
            raise InputError(f"image {names[number]['id']} cannot be read: {error}") from None

    return read


def gradients(image: dict | None) -> np.ndarray | None:
    """A difference hash, (256,) bool: where a grey image of 17 x 16 pixels grows brighter to the right.

    None of what cannot be decoded; `captioned` names it elsewhere.
    """
    if image is None:
        return None
    try:
        picture = opened(image, draft=("L", (64, 64)))
        small = np.asarray(picture.convert("L").resize((17, 16), PIL.Image.Resampling.BOX), dtype=np.int16)
    except Exception:  # as above
        return None
    return (small[:, 1:] > small[:, :-1]).ravel()


# ---------------------------------------------------------------------------------------------- content


def content_digest(image: dict | None) -> str | None:
    """A digest of an image's file; None of an image that is not there."""
    if image is None or (image["bytes"] is None and image["path"] is None):
        return None
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).hexdigest()[:16]
    try:
        status = os.stat(image["path"])
        return _file_digest(image["path"], status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=200_000)
def _file_digest(path: str, size: int, changed: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def image_digests(table: "Dataset") -> Iterator[str]:
    """A digest of the file of each image, in the order of the rows."""
    for number, row in enumerate(raw_images(table)):
        yield content_digest(row["image"]) or f"none at row {number}"  # it is named later, with all that is unusable


# ---------------------------------------------------------------------------------------------- colours


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image of any mode as one shows it: turned as its EXIF data says, alpha on white, 16 bits and floats scaled.

    Raises ValueError for numbers in no known range.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _scaled(image: PIL.Image.Image) -> PIL.Image.Image:
    """A grey image of 16 bits, 32 bits or floats, in 8 bits; Pillow's own conversion cuts all above 255 off.

    Floats are in [0, 1]; floats and 32 bits are also in [0, 255] or [0, 65535]. Floats that pass 1 by less than 1 are
    in no known range: as one of 255 the picture would be black.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535) or (image.mode == "F" and 1 < high < 2):
        raise InputError(f"its values lie between {low:g} and {high:g}, in none of the ranges 0 to 1, 255 and 65535")
    eight_bits = 1 if image.mode == "F" and high <= 1 else 255
    top = 65535 if image.mode.startswith("I;16") or high > 255 else eight_bits
    return PIL.Image.fromarray((values * (255 / top)).round().astype(np.uint8))
