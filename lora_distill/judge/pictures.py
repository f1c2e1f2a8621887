"""Pictures that are read when they are needed: a set of any size takes the memory of the few that are looked at."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, reading
from lora_distill.storage import unseen
from lora_distill.writing import atomic_write, whole_file

KEY = "key.txt"  # beside pictures: what they depend on
SEAL = "seal"  # the name of the text in a PNG that holds its digest


class Pictures(Sequence):
    """n pictures of one size; an index reads one, as an array (h, w, 3) uint8, a slice those it names, (n, h, w, 3).

    `key`, where it is given, is a digest of all that the pictures depend on: what is made of them can be kept under it
    without reading them.
    """

    def __init__(self, count: int, read: Callable[[int], np.ndarray], key: str = ""):
        self.count, self.read, self.key = count, read, key

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if isinstance(index, slice):
            return np.stack([self.read(i) for i in range(self.count)[index]])
        return self.read(range(self.count)[index])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def batches(images: np.ndarray | Pictures | Iterable[np.ndarray], size: int = 50) -> Iterator[np.ndarray]:
    """Images (n, h, w, 3) uint8, one set or any number of arrays one after another, at most `size` at a time.

    Raises ValueError for other arrays.
    """
    for part in [images] if isinstance(images, np.ndarray | Pictures) else images:
        for start in range(0, max(len(part), 1), size):
            array = part[start : start + size]
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
                raise InputError(f"expected images (n, h, w, 3) uint8, got {array.shape} {array.dtype}")
            yield array


def squared_errors(images: np.ndarray | Pictures, reference: np.ndarray | Pictures) -> np.ndarray:
    """The mean squared difference in grey levels of each image from that of the same noise, (n,).

    Raises ValueError for two shapes.
    """
    errors = []
    for ours, theirs in zip(batches(images), batches(reference), strict=False):
        if ours.shape != theirs.shape or len(images) != len(reference):
            shapes = (len(images), *ours.shape[1:]), (len(reference), *theirs.shape[1:])
            raise InputError(f"images differ in shape, {shapes[0]} and {shapes[1]}")
        errors += list(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2, axis=(1, 2, 3)))
    return np.array(errors)


def kept_pictures(
    folder: Path, key: str, count: int, size: int, make: Callable[[slice], np.ndarray], title: str = "sampling"
) -> Pictures:
    """`make(slice)` of `count` pictures, `size` at a time, kept in a folder as PNG, one a picture.

    A run that was cut goes on with the first missing ones, and several processes each make some. Pictures of another
    `key` are made again, and with a warning those that were altered. Raises FileNotFoundError where the processes do
    not see each other's files.
    """
    paths = [folder / f"{number:05}.png" for number in range(count)]
    if processes.agree(pictures_key(folder) != key):
        if processes.is_main():
            for path in folder.glob("*.png"):
                path.unlink()
            atomic_write(folder / KEY, key)
        processes.wait()
    if processes.is_main():
        _clear_altered(stored_pictures(folder, count, key), paths)
    starts = [start for start in range(0, count, size) if processes.is_main() and unseen(paths[start:][:size], 0)]
    bar = {"desc": title, "mininterval": 2, "leave": False, "disable": not (starts and processes.is_main())}
    for start in tqdm(processes.share(processes.agree(starts)), **bar):
        rows = slice(start, min(start + size, count))
        for path, image in zip(paths[rows], make(rows), strict=True):
            text = PngInfo()
            text.add_text(SEAL, _seal(image, key, path))
            with whole_file(path, by_any=True) as temporary:
                PIL.Image.fromarray(image).save(temporary, "png", compress_level=1, pnginfo=text)
    processes.wait()
    if lost := unseen(paths):
        raise MissingError(f"{lost[0]}: made by another process, not seen by this one; they must share runs/")
    return stored_pictures(folder, count, key)


def _seal(image: np.ndarray, key: str, path: Path) -> str:
    """A digest of a picture, its place and its key: it stands in the PNG."""
    return hashlib.sha256(f"{key} {path.name} {image.shape}".encode() + image.tobytes()).hexdigest()


def _clear_altered(pictures: Pictures, paths: list[Path]) -> None:
    """Delete the pictures that are not as they were made, with one warning."""

    def altered(number: int) -> bool:
        try:
            pictures.read(number)
        except MissingError:
            return False
        except InputError:
            return True
        return False

    with ThreadPoolExecutor() as pool:
        bad = [path for path, is_bad in zip(paths, pool.map(altered, range(len(paths))), strict=True) if is_bad]
    if bad:
        warnings.warn(f"{bad[0]}: {len(bad)} of {len(paths)} pictures there are altered; made again", stacklevel=4)
    for path in bad:
        path.unlink()


def pictures_key(folder: Path) -> str:
    """The key of the pictures in a folder; empty where there are none."""
    with reading(folder / KEY, "the key of pictures"):
        return (folder / KEY).read_text(encoding="ascii", errors="replace") if (folder / KEY).exists() else ""


def stored_pictures(folder: Path, count: int, key: str) -> Pictures:
    """The pictures of a `key` that lie in a folder. One that is not as it was made is named when it is read.

    InputError names it then.
    """
    remedy = "delete it and run its notebook again"

    def read(number: int) -> np.ndarray:
        path = folder / f"{number:05}.png"
        with reading(path, f"a whole picture; {remedy}"), PIL.Image.open(path) as picture:
            image = np.asarray(picture.convert("RGB"))
            if picture.info.get(SEAL) != _seal(image, key, path):
                raise InputError(f"{path}: not the picture that was made; {remedy}")
        return image

    return Pictures(count, read, key)


def slug(name: str) -> str:
    """A method's name as the name of a folder; two names never give one."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"
