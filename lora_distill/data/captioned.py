"""Captioned images of every source: the bundled scenes, Flickr8k/30k as they are distributed, a folder, the hub.

Every source gives a `datasets.Dataset` of one split with the columns `id` (text), `image` (decoded on access),
`captions` (list of text) and `split`. No image is in two splits.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from math import ceil
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset

from lora_distill import processes
from lora_distill.data import scenes
from lora_distill.data.layouts import Row, checked_captions, checked_split, read_caption_file
from lora_distill.data.tables import kept_table, loaded_tables
from lora_distill.errors import InputError, MissingError
from lora_distill.storage import cache_key

SPLITS = ("train", "val", "test")
WORLD = 1  # version of the drawn scenes, part of the key of their cache: raise it when they change
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

    A source is "scenes/<style>/<size>" (size 8k or 30k), a folder in a layout of `data.layouts` or with parquet
    files, or a hub id, optionally with a revision: "nlphuji/flickr30k@refs/convert/parquet". Where a source has no
    splits, `split_by_id` makes them; a set in parquet that is one single split, without a column for it, has none.
    `without` is another source, whose test split is judged: photographs that are in it are left out, and one line says
    how many (Flickr30k has all of Flickr8k).

    Raises ValueError with number and names of images that are missing, cannot be decoded or are in two splits (with
    `skip_unusable` they are left out with a warning, of two splits the earlier one) and for any other error in the
    source, FileNotFoundError when there is no such source.
    """
    if split not in SPLITS:
        raise InputError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if bundled := bundled_scenes(source):
        return scene_dataset(*bundled, split, seed=0, share=share, cache_dir=cache_dir)
    dataset = _split_of(source, split, skip_unusable, cache_dir)
    if without and str(without) != str(source) and not bundled_scenes(without):
        dataset = _unseen(dataset, _split_of(without, "test", skip_unusable, cache_dir), source, without)
    return _usable(dataset.select(range(ceil(share * len(dataset)))), source, skip_unusable)


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
    folder = Path(source).expanduser()
    parts = [folder.name, *(path.name for path in folder.iterdir())] if folder.is_dir() else [source]
    plain = [re.sub(r"[^a-z0-9]", "", part.lower()) for part in parts]
    for name, known in (("30k", r"flickr30k|results20130124"), ("8k", r"flicke?r8k")):
        if any(re.search(known, part) for part in plain):
            return name
    return re.sub(r"\W+", "_", Path(source.partition("@")[0]).name).strip("_") or "images"


def _split_of(source: str | Path, split: str, skip_unusable: bool, cache_dir: Path | None) -> Dataset:
    """One split of photographs, before it is looked at whether they can be decoded."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        rows, paths = read_caption_file(folder)
        images = Dataset.from_dict({"image": [str(path) for path in paths]}, features=Features({"image": Image()}))
    else:
        rows, images = _read_hub_set(str(folder if folder.is_dir() else source), cache_dir)
    return _one_split(rows, images, split, source, skip_unusable)


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


# ---------------------------------------------------------------------------------------------- sets in parquet

ID_COLUMNS = ("filename", "file_name", "image_id", "img_id", "id")
CAPTION_COLUMNS = ("captions", "caption", "text")


def _read_hub_set(source: str, cache_dir: Path | None) -> tuple[list[Row], Dataset]:
    """The rows and images of a set in parquet, from a folder or the hub.

    Its splits are those of the column `split` if there is one (nlphuji/flickr30k has all rows in the split "test", and
    a column with the real ones), else those of the set if it has more than one.
    """
    name, _, revision = source.partition("@")
    try:
        parts = loaded_tables(partial(load_dataset, name, revision=revision or None), cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise InputError(f"{name} is a loading script; its parquet copy is {name}@refs/convert/parquet") from None
    except (FileNotFoundError, ConnectionError) as error:
        raise MissingError(f"{source}: no such folder, nor a set on the hub that can be reached") from error
    rows: list[Row] = []
    for part, table in parts.items():
        split = checked_split(part, source) if len(parts) > 1 else None
        rows += _table_rows(table, f"{source}, {part}", split)
    images = [table.select_columns("image").cast_column("image", Image()) for table in parts.values()]
    return rows, concatenate_datasets(images)


def _table_rows(table: Dataset, place: str, split: str | None) -> Iterator[Row]:
    """The rows of a table with the column image, and captions in caption_0, caption_1, ... or in one column."""
    columns = table.column_names
    caption_columns = sorted(name for name in columns if re.fullmatch(r"caption_\d+", name))
    caption_columns = caption_columns or [name for name in CAPTION_COLUMNS if name in columns][:1]
    if "image" not in columns or not caption_columns:
        expected = f"image, and caption_0, caption_1, ... or one of {', '.join(CAPTION_COLUMNS)}"
        raise InputError(f"{place}: expected the columns {expected}; it has {', '.join(columns)}")
    id_column = next((name for name in ID_COLUMNS if name in columns), None)
    texts = table.select_columns([name for name in columns if name in (*caption_columns, id_column, "split")])
    ids = (str(text[id_column]) for text in texts) if id_column else image_digests(table)
    for number, (image, text) in enumerate(zip(ids, texts, strict=True)):
        row = f"{place}, row {number}"
        captions = [text[name] for name in caption_columns if text[name] is not None]
        captions = captions[0] if captions and isinstance(captions[0], list) else captions
        own_split = checked_split(text["split"], row) if "split" in text else split
        yield Row(row, image, checked_captions(captions, row), own_split)


def image_digests(table: Dataset) -> Iterator[str]:
    """A digest of the file of each image, in the order of the rows."""
    for number, row in enumerate(table.select_columns("image").cast_column("image", Image(decode=False))):
        if (image := row["image"]) is None:  # it is named later, with all that cannot be used
            yield f"none at row {number}"
            continue
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        yield hashlib.sha256(content).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- selection of a split


def _one_split(rows: list[Row], images: Dataset, split: str, source: str | Path, skip_unusable: bool) -> Dataset:
    """The images of a split with their captions; `rows` and `images` have the same order, and may repeat an image."""
    captions: dict[str, list[str]] = {}
    splits: dict[str, str | None] = {}
    first: dict[str, int] = {}  # the first row of each image
    twice: dict[str, None] = {}  # the images that are in two splits
    unsplit = all(row.split is None for row in rows)
    for number, row in enumerate(rows):
        if row.split is None and not unsplit:
            raise InputError(f"{row.place}: image {row.image} has no split, but other images have one")
        if (other := splits.setdefault(row.image, row.split)) != row.split:
            if not skip_unusable:
                elsewhere = rows[first[row.image]].place
                raise InputError(f"{row.place}: image {row.image} is in {row.split} and in {other} ({elsewhere})")
            twice[row.image] = None
            splits[row.image] = max(row.split, other, key=SPLITS.index)  # what is judged is not trained on
        captions.setdefault(row.image, []).extend(row.captions)
        first.setdefault(row.image, number)
    if twice:
        named = ", ".join(list(twice)[:5]) + (", ..." if len(twice) > 5 else "")
        warnings.warn(
            f"{source}: {len(twice)} images are in two splits: {named}; left out of the earlier", stacklevel=4
        )
    if unsplit:
        splits = {image: split_by_id(image) for image in splits}
    chosen = [number for image, number in first.items() if splits[image] == split]
    if not chosen:
        counts = {name: list(splits.values()).count(name) for name in SPLITS}
        raise InputError(f"{source}: no images in split {split!r}; there are {counts}")
    described = Dataset.from_list(
        [{"id": row.image, "captions": captions[row.image], "split": splits[row.image]} for row in rows],
        features=Features(DESCRIPTION),
    )
    # joined first and selected then: joining a selection would copy its columns, gigabytes of images
    return concatenate_datasets([images, described], axis=1).select(chosen)


def _usable(dataset: Dataset, source: str | Path, skip_unusable: bool) -> Dataset:
    """The dataset without images that cannot be decoded. Raises ValueError for them without `skip_unusable`."""
    problems: list[str | None] = []
    with ThreadPoolExecutor() as pool:  # batch by batch: pool.map would read all rows at once
        for batch in dataset.select_columns("image").cast_column("image", Image(decode=False)).iter(256):
            problems += pool.map(_problem, batch["image"])
    bad = [f"{image} ({problem})" for image, problem in zip(dataset["id"], problems, strict=True) if problem]
    if not bad:
        return dataset
    named = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
    count = f"{source}: {len(bad)} of {len(dataset)} images are missing or unreadable: {named}"
    if not skip_unusable or len(bad) == len(dataset):
        raise InputError(count)
    warnings.warn(f"{count}; left out", stacklevel=3)
    return dataset.select([i for i, problem in enumerate(problems) if not problem])


def _problem(image: dict | None) -> str | None:
    """Why an image cannot be used, None when it can."""
    if image is None:
        return "missing"
    try:
        with PIL.Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as picture:
            picture.draft(None, (1, 1))  # a JPEG is read to its end, but decoded at an eighth of its size
            picture.load()
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # a decoder may raise anything
        return "cannot identify image file" if isinstance(error, PIL.UnidentifiedImageError) else str(error)
    return None


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
        for batch in dataset.select_columns("image").cast_column("image", Image(decode=False)).iter(256):
            yield from pool.map(_gradients, batch["image"])


def _gradients(image: dict | None) -> np.ndarray | None:
    """A difference hash, (256,) bool: where a grey image of 17 x 16 pixels grows brighter to the right.

    None of what cannot be decoded.
    """
    if image is None:
        return None
    try:
        with PIL.Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as picture:
            picture.draft("L", (64, 64))
            small = np.asarray(picture.convert("L").resize((17, 16), PIL.Image.Resampling.BOX), dtype=np.int16)
    except Exception:  # a decoder may raise anything; `_usable` names the image
        return None
    return (small[:, 1:] > small[:, :-1]).ravel()
