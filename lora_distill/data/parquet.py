"""Sets of images in parquet, from a file, a folder or the hub: the images are in the table, with their captions."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, concatenate_datasets, load_dataset
from datasets.config import HF_DATASETS_CACHE

from lora_distill.data.layouts import split_words
from lora_distill.data.pictures import image_digests
from lora_distill.data.readers import (
    CAPTION_COLUMNS,
    Row,
    checked_captions,
    checked_split,
    columns_of,
    is_split_column,
    own_split,
)
from lora_distill.data.tables import kept_table, loaded_tables
from lora_distill.data.tree import Tree, folder_of
from lora_distill.errors import InputError, MissingError, one_line, reading
from lora_distill.storage import cache_key

HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(@[\w./-]{1,96})?")  # what a set on the hub can be called
ID_COLUMNS = ("filename", "file_name", "image_id", "img_id", "id")
IMAGE = Features({"image": Image()})
COPY = "a whole copy of the set; delete it, and it is made again"  # what a cache should hold
AT_ONCE = 64  # rows that are read at a time


def parquet_sets(tree: Tree, only: str | None = None) -> tuple[list[str], int, list[InputError]]:
    """The parquet files of a folder that hold images and captions, the number of their rows, and why others do not.

    Raises ValueError for a damaged file, or one without captions, beside whole ones.
    """
    fitting, count, problems, damaged = [], 0, [], []
    for name in sorted(tree.paths):
        if not name.lower().endswith(".parquet") or only not in (None, name):
            continue
        schema = None
        try:
            schema = _schema(tree.paths[name])
            _caption_columns(schema.names, str(tree.paths[name]))
            if not (pa.types.is_struct(kind := schema.field("image").type) or _is_binary(kind)):
                continue  # names of images: `layouts` reads them
            rows = pq.read_metadata(tree.paths[name]).num_rows
            if not rows:
                raise InputError(f"{tree.paths[name]}: holds no rows")
            fitting.append(name)
            count += rows
        except InputError as error:
            problems.append(error)
            if schema is None or "image" in schema.names:
                damaged.append(error)
    if fitting and damaged:
        raise damaged[0]
    return fitting, count, problems


def read_parquet(tree: Tree, names: Sequence[str], cache_dir: Path | None) -> tuple[list[Row], Dataset]:
    """The rows of parquet files and their images; ids are names where these can be trusted, else digests of content.

    Splits are those of the column `split` if there is one, else of the files' or folders' names. Raises ValueError
    with file and row.
    """
    words = split_words(names)
    if None in words and any(words):
        inside = next(name for name, word in zip(names, words, strict=True) if word)
        outside = names[words.index(None)]
        raise InputError(f"{tree.root}: {inside} is a split by its name, {outside} is not; rename one")
    if len(set(words)) < 2:
        words = [None] * len(names)
    rows = []
    for name, word in zip(names, words, strict=True):
        with reading(tree.paths[name], "a parquet file with images and captions"):
            table = pq.read_table(tree.paths[name], columns=_texts(_schema(tree.paths[name]).names))
        rows += _table_rows(table.column_names, table.to_pylist(), str(tree.paths[name]), word)
    return identified(rows, images := _images(tree, names, cache_dir)), images


def read_hub_set(source: str, cache_dir: Path | None) -> tuple[list[Row], Dataset]:
    """The rows and images of a set on the hub, "name" or "name@revision".

    Its splits are those of the column `split` if there is one (nlphuji/flickr30k has all rows in the split "test", and
    a column with the real ones), else those of the set if it has more than one.
    """
    name, _, revision = source.partition("@")
    try:
        parts = loaded_tables(partial(load_dataset, name, revision=revision or None), cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        raise MissingError(f"{source}: no such folder, nor a set on the hub that can be reached") from error
    except Exception as error:  # a library may raise anything
        if "scripts are no longer supported" in str(error):
            raise InputError(f"{name} is a loading script; its parquet copy is {name}@refs/convert/parquet") from None
        raise InputError(f"{source}: expected a folder, or a set on the hub ({one_line(error)})") from error
    rows: list[Row] = []
    with reading(cache_dir or HF_DATASETS_CACHE, COPY):
        for part, table in parts.items():
            split = checked_split(part, source) if len(parts) > 1 else None
            texts = table.select_columns(_texts(table.column_names, f"{source}, {part}"))
            rows += _table_rows(table.column_names, texts, f"{source}, {part}", split)
        images = concatenate_datasets([table.select_columns("image").cast(IMAGE) for table in parts.values()])
        return identified(rows, images), images


def identified(rows: list[Row], images: Dataset) -> list[Row]:
    """The rows with ids that are the same for the same picture, and differ for different ones.

    A picture's id is its name where this is the only name of its content and the name of no other content; else it is
    a digest of its content.
    """
    digests = list(image_digests(images))
    names: dict[str, set[str]] = {}
    contents: dict[str, set[str]] = {}
    for row, content in zip(rows, digests, strict=True):
        names.setdefault(content, set()).add(row.image)
        contents.setdefault(row.image, set()).add(content)
    return [
        row if row.image and len(names[content]) == len(contents[row.image]) == 1 else replace(row, image=content)
        for row, content in zip(rows, digests, strict=True)
    ]


# ---------------------------------------------------------------------------------------------- one file


def _schema(path: Path) -> pa.Schema:
    with reading(path, "a parquet file with images and captions"):
        return pq.read_schema(path)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _caption_columns(columns: Sequence[str], place: str) -> list[str]:
    captions = columns_of(columns, place)[1]
    if "image" not in columns or not captions:
        expected = f"image, and caption_0, caption_1, ... or one of {', '.join(CAPTION_COLUMNS)}"
        raise InputError(f"{place}: expected the columns {expected}; it has {', '.join(columns)}")
    return captions


def _texts(columns: Sequence[str], place: str = "") -> list[str]:
    """The columns beside the image that are read."""
    name = next((name for name in ID_COLUMNS if name in columns), None)
    wanted = (*_caption_columns(columns, place), name)
    return [column for column in columns if column in wanted or is_split_column(column)]


def _table_rows(columns: Sequence[str], records: Sequence[dict], place: str, split: str | None) -> Iterator[Row]:
    """A row for each record of a table; its image is the record's name, "" where it has none."""
    caption_columns = columns_of(columns, place)[1]
    name = next((name for name in ID_COLUMNS if name in columns), None)
    decided = any(column.strip().lower() == "split" for column in columns)
    for number, record in enumerate(records):
        row = f"{place}, row {number}"
        values = [record[column] for column in caption_columns if record[column] is not None]
        captions = [text for value in values for text in checked_captions(value, row)]
        own = own_split(record, row) or (None if decided else split)
        yield Row(row, "" if name is None or record[name] is None else str(record[name]), captions, own)


def _images(tree: Tree, names: Sequence[str], cache_dir: Path | None) -> Dataset:
    """The images of parquet files, read once into a table on disk."""
    stats = [(str(tree.paths[name]), (stat := tree.paths[name].stat()).st_size, stat.st_mtime_ns) for name in names]

    def rows() -> Iterator[dict]:
        for name in names:
            for image in _stored(tree.paths[name]):
                yield {"image": _inside(image, name, tree)}

    return kept_table("parquet", cache_key(parquet=stats, version=1), rows, IMAGE, cache_dir)


def _stored(path: Path) -> Iterator[dict | bytes | None]:
    with reading(path, "a parquet file with images and captions"), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(AT_ONCE, columns=["image"]):
            yield from batch.column(0).to_pylist()


def _inside(image: dict | bytes | None, name: str, tree: Tree) -> dict | None:
    """An image of a parquet file as {"bytes", "path"}; one that is named there has to lie in the folder."""
    if isinstance(image, bytes):
        image = {"bytes": image}
    if image is None or image.get("bytes") is not None or not image.get("path"):
        return {"bytes": image["bytes"], "path": None} if image and image.get("bytes") is not None else None
    found = tree.find(image["path"], folder_of(name), str(tree.paths[name]))
    return found and {"bytes": None, "path": str(tree.paths[found].absolute())}
