"""Readers of caption files: the layouts of Flickr8k, Flickr30k and a folder of one's own.

| file, anywhere in the folder | source | splits |
|---|---|---|
| `metadata.jsonl` | one's own: {"file_name": ..., "captions": [...]} per line, optionally with "split" | its own |
| `dataset_flickr8k.json`, `dataset_flickr30k.json` | Karpathy & Fei-Fei (2015) | its own |
| `Flickr8k.token.txt` | the original Flickr8k: image.jpg#0, a tab, the caption | `Flickr_8k.*Images.txt` |
| `results_20130124.token` | the original Flickr30k, in the same form | none |
| `captions.txt`, `results.csv` | Kaggle: a header, then image, number or not, caption, between commas or "| " | none |

The first of these files that is found is read. Images may lie anywhere in the folder, except that `metadata.jsonl`
names them by their path relative to it. Files that end in `trainImages.txt`, `devImages.txt` or `testImages.txt` give
the splits where the caption file has none (`metadata.jsonl` excepted); images in none of them (92 in Flickr8k) are
left out.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lora_distill.errors import InputError, MissingError

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One record of a source: an image, some of its captions and its split, None if the source has none."""

    place: str  # file and line, for error messages
    image: str  # the image's file name, which is its id
    captions: list[str]
    split: str | None = None


def read_caption_file(folder: Path) -> tuple[list[Row], list[Path]]:
    """The rows of the caption file in a folder, and the path of the image of each row, which need not exist.

    Raises FileNotFoundError when there is no caption file; ValueError, with file and line, for what cannot be read,
    for a file without captions and for an image that is in two split files or has no caption.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*"), key=lambda path: (len(path.parts), path)):
        files.setdefault(path.name, path)  # of files with the same name, the one nearest to the folder
    found = next((name for name in READERS if name in files), None)
    if found is None:
        raise MissingError(f"{folder}: no captions; expected *.parquet or one of {', '.join(READERS)}")
    path = files[found]
    try:
        rows = list(READERS[found](path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8 ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no captions")
    if found == "metadata.jsonl":
        return rows, [path.parent / row.image for row in rows]
    if all(row.split is None for row in rows):
        rows = _split_by_files(rows, path, [path for name, path in files.items() if SPLIT_FILE.search(name)])
    return rows, [files.get(row.image, folder / row.image) for row in rows]


def checked_split(name: str, place: str) -> str:
    """A split's name as train, val or test. Raises ValueError for a name that is not in `SPLIT_NAMES`."""
    if name not in SPLIT_NAMES:
        raise InputError(f"{place}: no split is called {name!r}; expected one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name]


def checked_captions(captions: object, place: str) -> list[str]:
    """Captions without blanks around them. Raises ValueError unless it is a list of texts, none of them empty."""
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise InputError(f"{place}: expected captions, none of them empty, got {captions!r}")
    return [caption.strip() for caption in captions]


# ---------------------------------------------------------------------------------------------- split files

SPLIT_FILE = re.compile(r"(train|dev|test)Images\.txt$")


def _split_by_files(rows: list[Row], captions_file: Path, split_files: list[Path]) -> list[Row]:
    """The rows of images that a split file names, with their splits; without split files, all rows unchanged."""
    home: dict[str, Path] = {}
    for path in sorted(split_files):
        for image in path.read_text(encoding="utf-8-sig").split():
            if home.setdefault(image, path) != path:
                raise InputError(f"{path}: image {image} is also in {home[image].name}; splits must not share images")
    uncaptioned = home.keys() - {row.image for row in rows}
    if uncaptioned:
        image = min(uncaptioned)
        raise InputError(f"{home[image]}: image {image} has no captions in {captions_file.name}")
    split_of = {path: SPLIT_NAMES[SPLIT_FILE.search(path.name)[1]] for path in split_files}
    return [replace(row, split=split_of[home[row.image]]) for row in rows if row.image in home] if home else rows


# ---------------------------------------------------------------------------------------------- readers


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line that is not blank."""
    with path.open(encoding="utf-8-sig") as file:
        yield from ((f"{path}, line {number}", line) for number, line in enumerate(file, 1) if line.strip())


def _metadata_rows(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        try:
            record = json.loads(line)
            image, captions, split = record["file_name"], record["captions"], record.get("split")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f'{place}: expected {{"file_name": ..., "captions": [...]}}') from None
        yield Row(place, image, checked_captions(captions, place), split and checked_split(split, place))


def _karpathy_rows(path: Path) -> Iterator[Row]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))["images"]
        fields = [(r["filename"], r["split"], [sentence["raw"] for sentence in r["sentences"]]) for r in records]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(
            f'{path}: expected {{"images": [{{"filename": ..., "split": ..., "sentences": [{{"raw": ...}}]}}]}}'
        ) from None
    for image, split, captions in fields:
        place = f"{path}, image {image}"
        yield Row(place, image, checked_captions(captions, place), checked_split(split, place))


def _token_rows(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        name, tab, caption = line.partition("\t")
        image, hash_sign, number = name.rpartition("#")
        if not (tab and hash_sign and number.isdecimal()):
            raise InputError(f"{place}: expected image.jpg#0, a tab and a caption, got {line.strip()!r}")
        yield Row(place, image, checked_captions([caption], place))


def _table_rows(path: Path) -> Iterator[Row]:
    """Rows of a table whose first column is the image and whose last is the caption.

    With "| " between the columns there is no quoting. One line of Flickr30k's results.csv (2199200615.jpg) has blanks
    between number and caption in place of the delimiter.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        bars = "|" in file.readline()
        file.seek(0)
        form = {"delimiter": "|", "quoting": csv.QUOTE_NONE} if bars else {"delimiter": ","}
        table = csv.reader(file, **form)
        columns = len(next(table, []))
        for cells in filter(None, table):
            place = f"{path}, line {table.line_num}"
            if len(cells) == columns - 1 and (merged := re.fullmatch(r"\s*(\d+)\s+(\S.*)", cells[-1])):
                cells[-1:] = merged.groups()
            if not 2 <= columns <= len(cells):
                expected = "image, number, caption" if columns == 3 else "image, caption"
                raise InputError(f"{place}: expected {expected}, got {cells}")
            caption = form["delimiter"].join(cells[columns - 1 :])  # a caption may contain the delimiter, unquoted
            yield Row(place, cells[0].strip(), checked_captions([caption], place))


READERS = {
    "metadata.jsonl": _metadata_rows,
    "dataset_flickr8k.json": _karpathy_rows,
    "dataset_flickr30k.json": _karpathy_rows,
    "Flickr8k.token.txt": _token_rows,
    "results_20130124.token": _token_rows,
    "captions.txt": _table_rows,
    "results.csv": _table_rows,
}
