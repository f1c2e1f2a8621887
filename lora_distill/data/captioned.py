"""Captioned images of every source: the bundled scenes, Flickr8k/30k as they are distributed, a folder, the hub.

Every source gives a `datasets.Dataset` of one split with the columns `id` (text), `image` (decoded on access),
`captions` (list of text) and `split`. No image is in two splits.
"""

import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from lora_distill import processes
from lora_distill.data import scenes
from lora_distill.data.layouts import has_captions, named, read_folder
from lora_distill.data.parquet import HUB_NAME, parquet_sets, read_hub_set, read_parquet
from lora_distill.data.pictures import content_digest, gradients, image_digests, problem, raw_images
from lora_distill.data.readers import Row, is_text
from lora_distill.data.tables import kept_table
from lora_distill.data.tree import Tree
from lora_distill.errors import InputError, MissingError
from lora_distill.settings import PACKAGE
from lora_distill.storage import cache_key

SPLITS = ("train", "val", "test")
ALL = "all"  # every image, whatever its split
__all__ = ["bundled_scenes", "captioned_images", "image_digests", "scene_dataset", "set_names", "split_by_id"]
WORLD = 2  # version of the drawn scenes, part of the key of their cache: raise it when they change
DESCRIPTION = {"id": Value("string"), "captions": List(Value("string")), "split": Value("string")}
SCENE_FEATURES = Features({"image": Image(), **DESCRIPTION, "scene": Value("string")})


def captioned_images(
    source: str | Path,
    split: str,
    *,
    share: float = 1.0,
    skip_unusable: bool = False,
    cache_dir: Path | None = None,
    without: str | Path = "",
) -> Dataset:
    """One split (train, val or test) of a source, or its first images, the fraction `share` of them.

    The split "all" is every image of the source, whatever its split: for training on pictures of one's own, where
    nothing is judged. Its column `split` still says which one an image is in.

    A source is "scenes/<style>/<size>" (size 8k or 30k), a folder in a layout of `data.layouts` or with parquet
    files, one such file, or a hub id, optionally with a revision: "nlphuji/flickr30k@refs/convert/parquet". Where a
    source has no splits, `split_by_id` makes them; a set that is one single split, without a column for it, has none.
    `without` is another source, whose test split is judged: photographs that are in it are left out, and one line says
    how many (Flickr30k has all of Flickr8k).

    Raises ValueError with number and names of images that are missing, cannot be decoded, have no caption or are in
    two splits (with `skip_unusable` they are left out with a warning, of two splits the earlier one) and for any other
    error in the source, FileNotFoundError when there is no such source.
    """
    if split not in (*SPLITS, ALL):
        raise InputError(f"no split {split!r}; there are {', '.join(SPLITS)}, and {ALL}")
    if not 0 < share <= 1:
        raise InputError(f"share: expected a fraction above 0 and at most 1, got {share:g}")
    if bundled := bundled_scenes(source):
        parts = SPLITS if split == ALL else [split]
        return concatenate_datasets([scene_dataset(*bundled, part, 0, share, cache_dir) for part in parts])
    notes: list[str] = []
    dataset = _split_of(source, split, skip_unusable, cache_dir, notes)
    if without and not bundled_scenes(without) and not _same_source(source, without):
        dataset = _unseen(dataset, _split_of(without, "test", skip_unusable, cache_dir, notes), source, without)
    if not len(dataset):
        raise InputError(f"{source}: all images of split {split!r} are in the test split of {without}")
    dataset = _usable(dataset.select(range(ceil(share * len(dataset)))), source, skip_unusable, notes)
    for note in notes if processes.is_main() else []:
        warnings.warn(note, stacklevel=_callers_level())
    return dataset


def _same_source(one: str | Path, other: str | Path) -> bool:
    paths = local_path(one), local_path(other)
    return str(one) == str(other) if None in paths else paths[0].samefile(paths[1])


def _callers_level() -> int:
    """The `stacklevel` by which a warning of the calling function names the line that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def bundled_scenes(source: str | Path) -> tuple[str, str] | None:
    """Style and size of a source that is the bundled world, "scenes/<style>/<size>"; None of photographs."""
    bundled = re.fullmatch(r"scenes/(\w+)/(\w+)", str(source))
    return (bundled[1], bundled[2]) if bundled else None


def set_names(*sources: str) -> list[str]:
    """What the sets of images are called in tables and files, one name a source.

    "8k" and "30k" are Flickr8k and Flickr30k, and the bundled scenes that stand in for them, alone. Another set has the
    name of its folder or its name on the hub.
    """
    names = [_set_name(source) for source in sources]
    return [name if name not in names[:i] else f"{name}_{i + 1}" for i, name in enumerate(names)]


def _set_name(source: str) -> str:
    if bundled := bundled_scenes(source):
        return bundled[1]
    path = local_path(source)
    parts = [path.stem if path and path.is_file() else path.name] if path else [source]
    parts += [inside.name for inside in path.iterdir()] if path and path.is_dir() else []
    plain = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in parts]
    for name, known in (("30k", r"flickr30k|results20130124"), ("8k", r"flicke?r8k")):
        if any(re.search(known, part) for part in plain):
            return name
    name = parts[0] if path else Path(source.partition("@")[0]).name
    return re.sub(r"\W+", "_", name).strip("_") or "images"


def _split_of(source: str | Path, split: str, skip_unusable: bool, cache_dir: Path | None, notes: list[str]) -> Dataset:
    """One split of photographs, before it is looked at whether they can be decoded."""
    rows, images, copies = _read(source, split, skip_unusable, cache_dir, notes)
    return _one_split(rows, images, copies, split, source, skip_unusable, notes)


def split_by_id(image: str) -> str:
    """The split of an image from a hash of its id: 75 % train, 12.5 % val, 12.5 % test, the proportions of Flickr8k.

    It depends on no seed and no other image, so that a new run or an added image moves no test image into training.
    """
    eighth = hashlib.sha256(image.encode()).digest()[0] // 32
    return {0: "test", 1: "val"}.get(eighth, "train")


# ---------------------------------------------------------------------------------------------- the bundled world


def scene_dataset(
    style: str, size: str, split: str, seed: int, share: float = 1.0, cache_dir: Path | None = None
) -> Dataset:
    """A split of the bundled world, as `captioned_images`, with one more column: `scene`, the scene as JSON.

    Raises ValueError for a style, size or split that does not exist.
    """
    if style not in scenes.STYLES or split not in scenes.SPLIT_SIZES.get(size, {}):
        there = f"styles {', '.join(scenes.STYLES)}; sizes {', '.join(scenes.SPLIT_SIZES)}; splits {', '.join(SPLITS)}"
        raise InputError(f"no split {split!r} of scenes/{style}/{size}; there are {there}")

    def rows() -> Iterator[dict]:
        rng = np.random.default_rng([seed, 2])
        whole = split_scenes(style, size, split, seed)
        for number, scene in enumerate(whole[: ceil(share * len(whole))]):
            yield {
                "image": scenes.draw(scene),
                "id": f"{style}-{split}-{number:05}",
                "captions": scenes.captions(scene, rng),
                "split": split,
                "scene": json.dumps(scene.as_dict()),
            }

    world = [style, size, split, seed, share]
    key = cache_key(version=WORLD, columns=list(SCENE_FEATURES), world=world, art=scenes.drawing_fingerprint())
    return kept_table("scenes", key, rows, SCENE_FEATURES, cache_dir)


def split_scenes(style: str, size: str, split: str, seed: int) -> list[scenes.Scene]:
    """The scenes of a split, without those that a later split (in the order train, val, test) has too.

    Splits are sampled independently, and of 30,000 scenes a few are sampled for two splits.
    """
    sizes = scenes.SPLIT_SIZES[size]
    later = SPLITS[SPLITS.index(split) + 1 :]
    taken = {scene for name in later for scene in scenes.sample_scenes(style, name, sizes[name], seed)}
    spare = 100  # for seeds 0 and 1 at most 3 scenes of a split had to be left out
    free = [s for s in scenes.sample_scenes(style, split, sizes[split] + spare, seed) if s not in taken]
    return free[: sizes[split]]


# ---------------------------------------------------------------------------------------------- where the images are


def local_path(source: str | Path) -> Path | None:
    """The folder or file that a source is, absolute; None if there is none of that name."""
    try:
        path = Path(source).expanduser().absolute()
        return path if str(source) and path.exists() else None
    except (RuntimeError, OSError, ValueError):  # a home of nobody, a name too long, a NUL byte
        return None


def _read(
    source: str | Path, split: str, skip_unusable: bool, cache_dir: Path | None, notes: list[str]
) -> tuple[list[Row], Dataset, dict[str, str]]:
    """Rows and images of a source, and a digest of content for each image that may have a copy under another name."""
    path = local_path(source)
    if path is None:
        if not HUB_NAME.fullmatch(str(source)):
            raise MissingError(f"{source}: no such file or folder, and not the name of a set on the hub")
        return *read_hub_set(str(source), cache_dir), {}
    folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
    if only and not has_captions(only):
        raise InputError(f"{path}: expected a folder, a parquet file or a file with captions")
    tree = Tree(folder, only if only and only.endswith(".parquet") else None)
    sets, count, problems = parquet_sets(tree, only)
    try:
        found = read_folder(tree, skip_unusable=skip_unusable, splits=split != ALL, only=only, parquet=count)
    except MissingError:
        if problems:
            raise problems[0] from None
        raise
    if found is None:
        rows, images = read_parquet(tree, sets, cache_dir)
        if tree.images:
            beside = f"{len(tree.images)} images beside it are not: {named(sorted(tree.images))}"
            notes.append(f"{folder}: {sets[0]} is read, {beside}")
        return rows, images, {}
    notes += found.notes
    paths = [str(tree.paths[row.file] if row.file else folder / row.image) for row in found.rows]
    if strange := next((one for one in paths if not is_text(one)), None):
        raise InputError(f"{strange!a}: its name is not UTF-8; rename it")
    images = Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    return found.rows, images, _copies({row.image: path for row, path in zip(found.rows, paths, strict=True)})


def _copies(paths: dict[str, str]) -> dict[str, str]:
    """A digest for each image whose file has the size of another one's: most files need not be read."""
    sizes: dict[int, list[str]] = {}
    for image, path in paths.items():
        with suppress(OSError, ValueError):  # it is missing
            sizes.setdefault(os.stat(path).st_size, []).append(image)
    alike = [image for group in sizes.values() if len(group) > 1 for image in group]
    digests = {image: content_digest({"bytes": None, "path": paths[image]}) for image in alike}
    return {image: digest for image, digest in digests.items() if digest}


# ---------------------------------------------------------------------------------------------- selection of a split


@dataclass
class _Picture:
    """One image: its first row, its captions, and the splits that its rows say, with the place of each."""

    first: int
    captions: list[str]
    places: dict[str | None, str]


def _pictures(rows: list[Row], source: str | Path, skip_unusable: bool, notes: list[str]) -> dict[str, _Picture]:
    """All images by their ids, without those that have no caption, which are an error unless they may be left out."""
    pictures: dict[str, _Picture] = {}
    blank: dict[str, Row] = {}
    for number, row in enumerate(rows):
        picture = pictures.setdefault(row.image, _Picture(number, [], {}))
        picture.places.setdefault(row.split, row.place)
        picture.captions += [caption for caption in row.captions if caption]
        if not row.captions or not all(row.captions):
            blank.setdefault(row.image, row)
    if blank and not skip_unusable:
        row, more = next(iter(blank.values())), f" (and {len(blank) - 1} more images)" if len(blank) > 1 else ""
        raise InputError(f"{row.place}: expected captions, none of them empty, got {row.captions!r}{more}")
    if blank:
        notes.append(f"{source}: {len(blank)} images have an empty caption, which is left out: {named(blank)}")
    return {image: picture for image, picture in pictures.items() if picture.captions}


def _splits(
    pictures: dict[str, _Picture], copies: dict[str, str], source: str | Path, skip_unusable: bool, notes: list[str]
) -> dict[str, str]:
    """The split of each image. Copies of a picture are in one split: the source's own may not part them.

    What is in two splits is an error or, if it may be left out, in the later one alone: what is judged trains nothing.
    """
    homeless = next((image for image, picture in pictures.items() if None in picture.places), None)
    alike: dict[str, list[str]] = {}
    for image in pictures:
        alike.setdefault(copies.get(image, f"id {image}"), []).append(image)
    if homeless is not None:
        if not all(list(picture.places) == [None] for picture in pictures.values()):
            place = pictures[homeless].places[None]
            raise InputError(f"{place}: image {homeless} has no split, but other images have one")
        latest = {key: max(map(split_by_id, group), key=SPLITS.index) for key, group in alike.items()}
        return {image: latest[key] for key, group in alike.items() for image in group}
    twice: dict[str, None] = {}
    splits: dict[str, str] = {}
    for group in alike.values():
        places = [(split, place, image) for image in group for split, place in pictures[image].places.items()]
        last = max((split for split, _, _ in places), key=SPLITS.index)
        for image in group:
            if any(split != last for split in pictures[image].places):
                twice[image] = None
            if last in pictures[image].places:
                splits[image] = last
        if twice and not skip_unusable:
            raise InputError(_leak(places))
    if twice:
        notes.append(f"{source}: {len(twice)} images are in two splits: {named(twice)}; left out of the earlier")
    return splits


def _leak(places: list[tuple[str, str, str]]) -> str:
    """What is said of a picture in two splits; `places` are (split, place, id)."""
    places = sorted(places, key=lambda one: SPLITS.index(one[0]))
    (split, place, image), (later, elsewhere, other) = places[0], places[-1]
    same = "" if other == image else f", which is the same picture as {image},"
    return f"{elsewhere}: image {other}{same} is in {later} and in {split} ({place})"


def _one_split(
    rows: list[Row],
    images: Dataset,
    copies: dict[str, str],
    split: str,
    source: str | Path,
    skip_unusable: bool,
    notes: list[str],
) -> Dataset:
    """The images of a split with their captions; `rows` and `images` have the same order, and may repeat an image."""
    pictures = _pictures(rows, source, skip_unusable, notes)
    if split == ALL:
        splits = {image: next(filter(None, one.places), None) or split_by_id(image) for image, one in pictures.items()}
    else:
        splits = _splits(pictures, copies, source, skip_unusable, notes)
    chosen = [image for image in pictures if image in splits and split in (ALL, splits[image])]
    if not chosen:
        counts = {name: list(splits.values()).count(name) for name in SPLITS}
        raise InputError(f"{source}: no images in split {split!r}; there are {counts}")
    described = [{"id": row.image, "captions": [], "split": ""} for row in rows]
    for image in chosen:
        described[pictures[image].first] = {
            "id": image,
            "captions": pictures[image].captions,
            "split": splits[image],
        }
    # joined first and selected then: joining a selection would copy its columns, gigabytes of images
    columns = [images, Dataset.from_list(described, features=Features(DESCRIPTION))]
    return concatenate_datasets(columns, axis=1).select([pictures[image].first for image in chosen])


def _usable(dataset: Dataset, source: str | Path, skip_unusable: bool, notes: list[str]) -> Dataset:
    """The dataset without images that cannot be decoded. Raises ValueError for them without `skip_unusable`."""
    problems: list[str | None] = []
    with ThreadPoolExecutor() as pool:  # batch by batch: pool.map would read all rows at once
        for batch in raw_images(dataset).iter(256):
            problems += pool.map(problem, batch["image"])
    bad = [f"{image} ({why})" for image, why in zip(dataset["id"], problems, strict=True) if why]
    if not bad:
        return dataset
    count = f"{source}: {len(bad)} of {len(dataset)} images are missing or unreadable: {named(bad)}"
    if not skip_unusable or len(bad) == len(dataset):
        raise InputError(count)
    notes.append(f"{count}; left out")
    return dataset.select([i for i, why in enumerate(problems) if not why])


# ---------------------------------------------------------------------------------------------- what is judged too

FLICKR_NAME = re.compile(r"(\d{6,})(_[0-9a-f]+)?(\.\w+)?")  # a photograph's number at Flickr; 8k has a secret after it
ALIKE = 25  # of the 256 bits of `_gradients`: copies in another size or quality differ in fewer, other pictures in more


def _unseen(dataset: Dataset, judged: Dataset, source: str | Path, without: str | Path) -> Dataset:
    """The dataset without photographs of `judged`: by their number at Flickr or, where names have none, by content."""
    names = [[FLICKR_NAME.fullmatch(Path(name).name) for name in images["id"]] for images in (dataset, judged)]
    if all(map(all, names)):
        numbers = {name[1] for name in names[1]}
        kept = [i for i, name in enumerate(names[0]) if name[1] not in numbers]
    else:
        kept = _unlike(dataset, judged)
    if (left_out := len(dataset) - len(kept)) and processes.is_main():
        print(f"{source}: {left_out} photographs left out of training, for they are in the test split of {without}")
    return dataset.select(kept) if left_out else dataset


def _unlike(dataset: Dataset, judged: Dataset) -> list[int]:
    """The numbers of the images whose gradients are those of no judged image."""
    taken = np.stack([bits for bits in _all_gradients(judged) if bits is not None] or [np.zeros(256, bool)])
    nearest = (256 if bits is None else (taken != bits).sum(1).min() for bits in _all_gradients(dataset))
    return [i for i, distance in enumerate(nearest) if distance > ALIKE]


def _all_gradients(dataset: Dataset) -> Iterator[np.ndarray | None]:
    with ThreadPoolExecutor() as pool:
        for batch in raw_images(dataset).iter(256):
            yield from pool.map(gradients, batch["image"])
