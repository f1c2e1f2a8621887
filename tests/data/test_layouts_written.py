"""Whatever is written in a layout is read back, image for image and caption for caption, or refused in one line."""

import csv
import io
import json
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_distill.data.captioned import SPLITS, captioned_images
from lora_distill.errors import InputError

FOLDERS = {"train": "train", "val": "validation", "test": "test"}


@cache
def content(number: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (number, 7, 99)).save(buffer, "png")
    return buffer.getvalue()


@dataclass(frozen=True)
class Written:
    """A set of pictures; picture number i has the name, the captions and the split number i."""

    names: list[str]
    captions: list[list[str]]
    splits: list[str] | None

    def __len__(self) -> int:
        return len(self.names)

    def rows(self) -> Iterator[tuple[int, str, str]]:
        yield from ((n, name, said) for n, name in enumerate(self.names) for said in self.captions[n])


letters = st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"), exclude_characters="/\\\0")
stems = st.text(letters | st.sampled_from(" .'\"#,|;%@[]()éë~"), min_size=1, max_size=8)
stems |= st.sampled_from(["train", "test 1", "captions", "metadata", "a.token", "results", "dataset", "x.txt", "con"])
said = st.text(letters | st.sampled_from(" .'\"#,|;\t/\\éë[]{}"), min_size=1, max_size=20).filter(str.strip)


@st.composite
def sets(draw: st.DrawFn) -> Written:
    stem = draw(st.lists(stems, min_size=1, max_size=5, unique_by=lambda s: unicodedata.normalize("NFC", s).casefold()))
    names = [one + draw(st.sampled_from([".jpg", ".PNG", ".jpeg", ".webp"])) for one in stem]
    captions = [draw(st.lists(said, min_size=1, max_size=3)) for _ in names]
    splits = draw(st.none() | st.lists(st.sampled_from(SPLITS), min_size=len(names), max_size=len(names)))
    return Written(names, captions, splits)


def images(folder: Path, written: Written, below: Callable[[int], str] = lambda n: "images") -> None:
    for number, name in enumerate(written.names):
        path = folder / below(number) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number))


def text(path: Path, lines: list[str]) -> None:
    path.write_bytes("".join(line + "\n" for line in lines).encode())


def json_lines(folder: Path, written: Written) -> None:
    images(folder, written)
    text(
        folder / "metadata.jsonl",
        [
            json.dumps(
                {"file_name": f"images/{name}", "captions": written.captions[n]}
                | ({"split": written.splits[n]} if written.splits else {}),
                ensure_ascii=n % 2 == 0,
            )
            for n, name in enumerate(written.names)
        ],
    )


def json_lines_in_folders(folder: Path, written: Written) -> None:
    home = [FOLDERS[split] for split in written.splits or ["train"] * len(written)]
    images(folder, written, home.__getitem__)
    for place in set(home):
        rows = [(name, said) for n, name, said in written.rows() if home[n] == place]
        text(folder / place / "metadata.jsonl", [json.dumps({"file_name": i, "text": t}) for i, t in rows])


def table(name: str, delimiter: str, header: bool, quoting: int = csv.QUOTE_MINIMAL) -> Callable[[Path, Written], None]:
    def write(folder: Path, written: Written) -> None:
        images(folder, written)
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter=delimiter, quoting=quoting)
            own = written.splits if header else None
            if header:
                rows.writerow(["image", *(["split"] if own else []), "caption"])
            rows.writerows([image, *([own[n]] if own else []), said] for n, image, said in written.rows())

    return write


def kaggle_30k(folder: Path, written: Written) -> None:
    images(folder, written)
    lines = [f"{image}| {n}| {said}" for n, image, said in written.rows()]
    text(folder / "results.csv", ["image_name| comment_number| comment", *lines])


def tokens(folder: Path, written: Written) -> None:
    images(folder, written)
    text(folder / "Flickr8k.token.txt", [f"{image}#{n}\t{said}" for n, image, said in written.rows()])
    for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
        if written.splits:
            mine = [image for n, image in enumerate(written.names) if written.splits[n] == split]
            text(folder / f"Flickr_8k.{word}Images.txt", mine)


def karpathy(folder: Path, written: Written) -> None:
    images(folder, written)
    splits = written.splits or ["train"] * len(written)
    records = [
        {"filename": name, "split": splits[n], "sentences": [{"raw": said} for said in written.captions[n]]}
        for n, name in enumerate(written.names)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": records}), encoding="utf-8")


def beside(folder: Path, written: Written) -> None:
    home = [FOLDERS[split] for split in written.splits] if written.splits else ["10_dog"] * len(written)
    images(folder, written, home.__getitem__)
    for number, name in enumerate(written.names):
        text((folder / home[number] / name).with_suffix(".txt"), written.captions[number])


def parquet(folder: Path, written: Written) -> None:
    home = written.splits or ["all"] * len(written)
    for split in set(home):
        mine = [n for n in range(len(written)) if home[n] == split]
        columns = {
            "image": [{"bytes": content(n), "path": None} for n in mine],
            "caption": [written.captions[n] for n in mine],
            "filename": [written.names[n] for n in mine],
        }
        pq.write_table(pa.table(columns), folder / f"{split}-00000.parquet")


LAYOUTS: dict[str, Callable[[Path, Written], None]] = {
    "metadata.jsonl": json_lines,
    "metadata.jsonl of each split": json_lines_in_folders,
    "metadata.csv": table("metadata.csv", ",", True),
    "captions.txt": table("captions.txt", ",", True),
    "captions.txt without a header": table("captions.txt", ",", False),
    "all quoted": table("captions.csv", ",", True, csv.QUOTE_ALL),
    "semicolons": table("captions.csv", ";", True),
    "tabs": table("captions.tsv", "\t", True),
    "bars": table("captions.csv", "|", True),
    "results.csv": kaggle_30k,
    "tokens": tokens,
    "karpathy": karpathy,
    "beside": beside,
    "parquet": parquet,
}
UNSPLIT = {"captions.txt without a header", "results.csv"}


@contextmanager
def folder_of(layout: str, written: Written) -> Iterator[tuple[Path, Path]]:
    """The set in the layout, and a folder for a cache."""
    with tempfile.TemporaryDirectory() as home:
        folder, cache_dir = Path(home, "set"), Path(home, "cache")
        folder.mkdir()
        LAYOUTS[layout](folder, written)
        yield folder, cache_dir


def read(folder: Path, cache_dir: Path, split: str = "all") -> dict[int, list[str]]:
    """The captions of each picture of a split, none if it has no pictures."""
    try:
        dataset = captioned_images(folder, split, cache_dir=cache_dir)
    except InputError as error:
        if f"no images in split '{split}'" in str(error):
            return {}
        raise
    return {row["image"].getpixel((0, 0))[0]: row["captions"] for row in dataset}


def check(layout: str, written: Written) -> None:
    """All that was written is read, each picture with its captions and in its split."""
    captions = {number: [one.strip() for one in said] for number, said in enumerate(written.captions)}
    with folder_of(layout, written) as (folder, cache_dir):
        assert read(folder, cache_dir) == captions
        splits = written.splits if layout not in UNSPLIT else None
        if splits and len(set(splits)) > 1:  # all in one folder called train are in no split
            for split in SPLITS:
                mine = {number: said for number, said in captions.items() if splits[number] == split}
                assert read(folder, cache_dir, split) == mine


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(written=sets())
def test_what_is_written_is_read_back_or_refused(layout, written):
    with warnings.catch_warnings(action="error"):
        try:
            check(layout, written)
        except InputError as error:
            assert "\n" not in str(error)


PLAIN = {"a dog.jpg": "One, two", "Zoë.png": '"a" b', "x#1, y.jpg": "c|d", "50%.jpeg": "x", "e.jpg": "y"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("splits", [None, ["train", "val", "test", "train", "test"]])
def test_plain_sets_are_never_refused(layout, splits):
    check(layout, Written(list(PLAIN), [[said] for said in PLAIN.values()], splits))
