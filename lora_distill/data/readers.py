"""Readers of caption files: each turns one file into `Row`s, or refuses it in one line with the place.

No reader looks at images; `data.layouts` finds the files, joins them with the images and chooses among them.
"""

import ast
import csv
import io
import json
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lora_distill.errors import NOT_FETCHED, POINTER, InputError, reading

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: Karpathy's name for more of COCO's training
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLIT_COLUMNS = ("split", "subset", "partition")  # of the last two, values that are no splits are something else
IMAGE_COLUMNS = ("file_name", "filename", "image", "image_name", "image_path", "image_file", "path", "file", "img")
CAPTION_COLUMNS = ("captions", "caption", "text", "comment", "sentence", "description", "raw")
NUMBERED_CAPTION = re.compile(r"caption_?\d+")
IMAGE_SUFFIX = r"\.(jpe?g?|jfif|a?png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|jxl|p[bgnp]m|tga)"
IMAGE_NAME = re.compile(rf".*{IMAGE_SUFFIX}(\.\d+)?", re.IGNORECASE | re.DOTALL)  # .jpg.1 is in Flickr8k
NUMBERED_IMAGE = re.compile(rf"(.*{IMAGE_SUFFIX}(?:\.\d+)?)#\d+", re.IGNORECASE | re.DOTALL)
LINE_END = re.compile(r"\r\n|\r|\n")  # no others: U+2028, a form feed and the like are text
INVISIBLE = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060"  # a text of these and blanks alone is blank
LONGEST_FIELD = 100  # lines that a quoted field may have


@dataclass(frozen=True)
class Row:
    """One record of a source: an image, some of its captions and its split, None if the source has none."""

    place: str  # file and line, for error messages
    image: str  # the image's name, as it is in the source until `layouts` has found the image
    captions: list[str]
    split: str | None = None
    file: str | None = None  # the image's path below the folder; None of an image that is not there


def checked_split(name: object, place: str) -> str:
    """A split's name as train, val or test. Raises ValueError for a name that is not in `SPLIT_NAMES`."""
    known = SPLIT_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if known is None:
        raise InputError(f"{place}: no split is called {name!r}; expected one of {', '.join(SPLIT_NAMES)}")
    return known


def own_split(record: Mapping[str, object], place: str) -> str | None:
    """The split that a record says, in a column that may be written in capitals; None if it says none."""
    named = {key.strip().lower(): value for key, value in record.items() if isinstance(key, str)}
    for column in SPLIT_COLUMNS:
        value = named.get(column)
        if value is not None and (column == "split" or str(value).strip().lower() in SPLIT_NAMES):
            return checked_split(value, place)
    return None


def is_split_column(name: object) -> bool:
    return isinstance(name, str) and name.strip().lower() in SPLIT_COLUMNS


def checked_captions(captions: object, place: str) -> list[str]:
    """Captions, a text or a list of them, without blanks around them; blank ones stay, as "".

    Raises ValueError for anything else.
    """
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) and is_text(text) for text in texts):
        raise InputError(f"{place}: expected captions, none of them empty, got {_short(captions)}")
    return [trimmed(text) for text in texts]


def trimmed(text: str) -> str:
    """A text without blanks around it; "" where nothing of it can be seen."""
    text = text.strip()
    return text if text.strip(INVISIBLE + " \t\r\n") else ""


def text_of(path: Path) -> str:
    """The text of a file: UTF-8, or UTF-16 with a byte order mark. Raises ValueError with the line for another.

    Marks in the text are those of files that were put together; they are left out.
    """
    with reading(path, "a text file"):
        content = path.read_bytes()
    if content.startswith(POINTER):
        raise InputError(f"{path}: {NOT_FETCHED}")
    coding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(coding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}"
        raise InputError(f"{path}, line {line}: expected text in UTF-8 ({byte}, {error.reason})") from None
    if (end := text.find("\0")) >= 0:
        line = text.count("\n", 0, end) + 1
        raise InputError(f"{path}, line {line}: expected text in UTF-8 (a NUL byte)")
    return text.replace("\ufeff", "")


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of every line of a file that is not blank."""
    for number, line in enumerate(LINE_END.split(text_of(path)), 1):
        if line.strip():
            yield f"{path}, line {number}", line


def is_text(text: str) -> bool:
    """Whether a text has no half of a character, which JSON can say and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_image_name(name: str) -> bool:
    return IMAGE_NAME.fullmatch(name.strip()) is not None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---------------------------------------------------------------------------------------------- records


def columns_of(names: Iterable[str], place: str) -> tuple[str | None, list[str]]:
    """Of a record's columns, the one with the image's name, None if there is none, and those with captions.

    Raises ValueError where two columns could be the captions.
    """
    names = [name for name in names if isinstance(name, str)]
    image = next((column for column in IMAGE_COLUMNS if column in names), None)
    numbered = [name for name in names if NUMBERED_CAPTION.fullmatch(name)]
    if numbered:
        return image, sorted(numbered, key=lambda name: int(re.sub(r"\D", "", name)))
    found = [column for column in CAPTION_COLUMNS if column in names and column != image]
    if len(found) > 1:
        raise InputError(f"{place}: captions in two columns, {found[0]} and {found[1]}; leave one, or rename the other")
    return image, found


RECORD = '{"file_name": ..., "captions": [...]} or {"file_name": ..., "text": ...}'


def record_row(record: object, place: str) -> Row:
    """The row of one record: a name of an image, captions, and a split or none."""
    image, columns = columns_of(record, place) if isinstance(record, dict) else (None, [])
    if image is None or not columns or not isinstance(record[image], str) or not is_text(record[image]):
        raise InputError(f"{place}: expected {RECORD}")
    values = [record[column] for column in columns if record[column] is not None]
    captions = [text for value in values for text in checked_captions(value, place)]
    return Row(place, record[image], captions, own_split(record, place))


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return record


def _json(text: str, place: str, expected: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{place}: expected {expected}") from None


def json_lines(path: Path) -> Iterator[Row]:
    """A record a line: the image's name as `file_name`, `text`, `caption` or `captions`, and perhaps `split`."""
    for place, line in lines_of(path):
        yield record_row(_json(line, place, RECORD), place)


KARPATHY = '{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}'


def json_file(path: Path) -> Iterator[Row]:
    """Karpathy's json, the captions of COCO, a list of records, or a dictionary of names and captions."""
    content = _json(text_of(path), str(path), KARPATHY)
    if isinstance(content, list) and content:
        yield from (record_row(record, f"{path}, record {number}") for number, record in enumerate(content, 1))
    elif isinstance(content, dict) and "images" in content and "annotations" in content:
        yield from _coco(content, path)
    elif isinstance(content, dict) and "images" in content:
        yield from _karpathy(content, path)
    elif isinstance(content, dict) and content and all(map(is_image_name, content)):
        for image, said in content.items():
            captions = (
                said.get("caption", said.get("text")) if isinstance(said, dict) else said
            )  # kohya's meta_cap.json
            yield Row(place := f"{path}, image {image}", image, checked_captions(captions, place))
    else:
        raise InputError(f"{path}: expected {KARPATHY}")


def _karpathy(content: dict, path: Path) -> Iterator[Row]:
    try:
        fields = [
            (f"{r['filepath']}/{r['filename']}" if r.get("filepath") else r["filename"], r["split"], r["sentences"])
            for r in content["images"]
        ]
        texts = [[sentence["raw"] for sentence in sentences] for _, _, sentences in fields]
        assert all(isinstance(image, str) and is_text(image) for image, _, _ in fields)
    except (KeyError, TypeError, AttributeError, AssertionError):
        raise InputError(f"{path}: expected {KARPATHY}") from None
    for (image, split, _), captions in zip(fields, texts, strict=True):
        place = f"{path}, image {image}"
        yield Row(place, image, checked_captions(captions, place), checked_split(split, place))


def _coco(content: dict, path: Path) -> Iterator[Row]:
    expected = '{"images": [{"id": ..., "file_name": ...}], "annotations": [{"image_id": ..., "caption": ...}]}'
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        fields = [(names[one["image_id"]], one["caption"]) for one in content["annotations"]]
        assert all(isinstance(image, str) and is_text(image) for image in names.values()) and len(names) == len(
            content["images"]
        )
    except (KeyError, TypeError, AssertionError):
        raise InputError(f"{path}: expected {expected}") from None
    for image, caption in fields:
        yield Row(place := f"{path}, image {image}", image, checked_captions(caption, place))


def parquet_records(path: Path) -> Iterator[Row]:
    """The records of a table in parquet that names its images and does not hold them."""
    expected = f"a parquet file with {RECORD}"
    with reading(path, expected):
        schema = pq.read_schema(path)
        image, captions = columns_of(schema.names, str(path))
        if image is None or not _is_string(schema.field(image).type):
            raise InputError(f"{path}: expected {expected}")
        columns = [name for name in schema.names if name in (image, *captions) or is_split_column(name)]
        records = pq.read_table(path, columns=columns).to_pylist()
    yield from (record_row(record, f"{path}, row {number}") for number, record in enumerate(records))


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# ---------------------------------------------------------------------------------------------- lines


def token_file(path: Path) -> Iterator[Row]:
    """image.jpg#0, a tab and a caption on each line, as the original Flickr8k and Flickr30k."""
    for place, line in lines_of(path):
        name, tab, caption = line.partition("\t")
        image, hash_sign, number = name.rpartition("#")
        if not (tab and hash_sign and image and number.strip().isdecimal()):
            raise InputError(f"{place}: expected image.jpg#0, a tab and a caption, got {_short(line.strip())}")
        yield Row(place, image, checked_captions(caption, place))


BOXES = re.compile(r"\s*\d+(\s+[\d.]+){4,}\s*")
MARKUP = re.compile(r"\{\\rtf|<\?xml|<!doctype|<(html|svg|x:xmpmeta|annotation)\b", re.IGNORECASE)
DRAWN = re.compile(r"Negative prompt:|Steps: \d+, Sampler:")  # what programs that draw write beside their pictures


def captions_beside(image: str, path: Path) -> Row:
    """The captions of one image from a file beside it: every line that is not blank is one."""
    lines = [line.strip() for _, line in lines_of(path)]
    if lines and (what := _no_captions(lines)):
        raise InputError(f"{path}, line 1: expected a caption, got {what}: {_short(lines[0])}")
    return Row(str(path), image, [line for line in lines if trimmed(line)])


def _no_captions(lines: list[str]) -> str | None:
    """What the lines of a text are if they are no captions."""
    if all(map(BOXES.fullmatch, lines)):
        return "numbers"
    if MARKUP.match(lines[0]):
        return "a document"
    if any(map(DRAWN.match, lines)):
        return "the settings of a program that draws; leave the caption alone"
    return "JSON" if lines[0][0] in "{[" and _is_json("\n".join(lines)) else None


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


# ---------------------------------------------------------------------------------------------- tables

BARS = "| "  # between columns there is then no quoting: quotation marks are text


@dataclass(frozen=True)
class _Columns:
    """Where a table has what, the splits with their names; `width` is the number of its columns."""

    image: int
    captions: list[int]
    splits: dict[str, int]
    width: int
    lists: bool = False  # the column is called captions or raw: a cell may be a list in JSON


def table_file(path: Path) -> Iterator[Row]:
    """Rows of a table between commas, semicolons, tabs, bars or "| ", with or without a header.

    Without a header, the columns are the image, perhaps a number, and the caption. A last column may contain the
    delimiter unquoted. One line of Flickr30k's results.csv (2199200615.jpg) has blanks between number and caption in
    place of the delimiter.
    """
    lines = LINE_END.split(text_of(path))
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return
    delimiter = _delimiter(lines[first])
    records = list(_records(path, lines, delimiter))
    columns, headed = _columns(records)
    for place, block, cells in records[headed:]:
        yield _table_row(place, _fitted(cells, block, columns, delimiter, place), columns)


def headed_table(path: Path) -> Iterator[Row]:
    """Rows of a table that has to have a header: of another name than captions, its last column could be anything."""
    first = next(lines_of(path), None)
    if first is not None and is_image_name(_unnumbered(_split(first[1], _delimiter(first[1]))[0])):
        raise InputError(f"{first[0]}: expected a header, such as image,caption, got {_short(first[1])}")
    yield from table_file(path)


def _delimiter(line: str) -> str:
    """What stands between the columns: what gives a name of an image, or of its column, in the first line."""
    for delimiter in (BARS, "|", "\t", ",", ";"):
        cells = _split(line, delimiter) if delimiter in line else []
        heads = [_head(cell) for cell in cells]
        if len(cells) > 1 and (is_image_name(_unnumbered(cells[0])) or set(heads) & set(IMAGE_COLUMNS)):
            return delimiter
    return next((delimiter for delimiter in (BARS, "|", "\t", ",", ";") if delimiter in line), ",")


def _head(cell: str) -> str:
    return re.sub(r"\W+", "_", cell.strip().lower()).strip("_")


def _split(line: str, delimiter: str) -> list[str]:
    return line.split("|") if delimiter == BARS else next(csv.reader([line], delimiter=delimiter), [])


def _records(path: Path, lines: list[str], delimiter: str) -> Iterator[tuple[str, str, list[str]]]:
    """(place, text, cells) of every record; a record in quotation marks may have more lines than one."""
    number = 0
    while number < len(lines):
        place, block, number = f"{path}, line {number + 1}", lines[number], number + 1
        if not block.strip(" \t,;|"):
            continue
        cells, end = _parsed(block, delimiter, place), number
        while cells is None:
            if end == len(lines) or end - number == LONGEST_FIELD or _begins_with_image(lines[end], delimiter):
                raise InputError(f"{place}: a quotation mark is not closed: {_short(lines[number - 1])}")
            block, end = f"{block}\n{lines[end]}", end + 1
            cells = _parsed(block, delimiter, place)
        number = end
        yield place, block, cells


def _parsed(block: str, delimiter: str, place: str) -> list[str] | None:
    """The cells of a record; None where a quoted cell has no end yet."""
    if delimiter == BARS:
        return block.split("|")
    try:
        return next(csv.reader([block], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "larger than field limit" in str(error):
            raise InputError(f"{place}: {error}") from None
        if "unexpected end" in str(error) or "\n" in block:
            return None
        return block.split(delimiter)  # text after a closing quotation mark: no writer of tables quoted this


def _begins_with_image(line: str, delimiter: str) -> bool:
    name, found, _ = line.partition(delimiter.strip(" "))
    return bool(found) and is_image_name(_unnumbered(name.strip(' "')))


def _unnumbered(name: str) -> str:
    """image.jpg of image.jpg#0."""
    numbered = NUMBERED_IMAGE.fullmatch(name.strip())
    return numbered[1] if numbered else name


def _columns(records: list[tuple[str, str, list[str]]]) -> tuple[_Columns, bool]:
    """The columns of a table, and whether its first record is the header."""
    place, _, cells = records[0]
    heads = [_head(cell) for cell in cells]
    image, captions = columns_of(heads, place)
    if image is not None and captions and not is_image_name(_unnumbered(cells[0])):
        twice = [head for head in (image, *captions, *SPLIT_COLUMNS) if heads.count(head) > 1]
        if twice:
            raise InputError(f"{place}: two columns are called {twice[0]}")
        splits = {head: heads.index(head) for head in SPLIT_COLUMNS if head in heads}
        where = [heads.index(caption) for caption in captions]
        return _Columns(heads.index(image), where, splits, len(cells), captions in (["captions"], ["raw"])), True
    if len(cells) > 1 and is_image_name(_unnumbered(cells[0])):
        numbered = all(len(cells) > 2 and cells[1].strip().isdecimal() for _, _, cells in records)
        width = 3 if numbered else 2
        return _Columns(0, [width - 1], {}, width), False
    raise InputError(
        f"{place}: expected a header with a column for the image ({', '.join(IMAGE_COLUMNS[:4])}, ...) and one for the "
        f"caption ({', '.join(CAPTION_COLUMNS[:4])}, ...), or an image and its caption, got {_short(cells)}"
    )


def _fitted(cells: list[str], block: str, columns: _Columns, delimiter: str, place: str) -> list[str]:
    """As many cells as there are columns; a caption in the last one may contain the delimiter, unquoted."""
    sign, last = delimiter.strip(" "), columns.width - 1
    if len(cells) == last and (merged := re.fullmatch(r"\s*(\d+)\s+(\S.*)", cells[-1])):
        cells = [*cells[:-1], *merged.groups()]
    if len(cells) > columns.width and columns.captions[-1] == last:
        plain = block.split(sign)
        if plain[:last] == cells[:last]:
            cells = [*cells[:last], sign.join(plain[last:])]
    while len(cells) > columns.width and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != columns.width:
        expected = {2: "image, caption", 3: "image, number, caption"}.get(columns.width, f"{columns.width} columns")
        raise InputError(f"{place}: expected {expected}, got {_short(cells)}")
    return cells


def _table_row(place: str, cells: list[str], columns: _Columns) -> Row:
    texts = [cells[column] for column in columns.captions]
    if len(texts) > 1:
        texts = [text for text in texts if text.strip()]  # an image may have fewer captions than there are columns
    elif texts:
        texts = _listed(texts[0], columns.lists, place)
    splits = {head: cells[column] for head, column in columns.splits.items() if cells[column].strip()}
    image = _unnumbered(cells[columns.image])
    return Row(place, image, checked_captions(texts, place), own_split(splits, place))


LISTED = re.compile(r"\s*\[\s*(['\"]).*['\"]\s*,?\s*\]\s*", re.DOTALL)


def _listed(cell: str, lists: bool, place: str) -> list[str]:
    """The captions of a cell: a list as JSON or Python writes it, or one text.

    Raises ValueError for a list without commas, as numpy writes it, and, where `lists` are expected, for broken JSON.
    """
    if not LISTED.fullmatch(cell):
        return [cell]
    for read in (json.loads, _python_list):
        try:
            found = read(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            if read is _python_list and _two_texts_meet(cell):
                raise InputError(f"{place}: expected commas between the captions of a list, got {_short(cell)}")
            return found
    if lists and cell.strip().lstrip("[ ")[0] == '"':
        raise InputError(f"{place}: expected a list of captions")
    return [cell]


def _python_list(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash in a caption
        return ast.literal_eval(text)


def _two_texts_meet(cell: str) -> bool:
    """Whether two texts stand side by side: Python reads them as one."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(cell.strip()).readline)]
    plain = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    return any(pair == (tokenize.STRING, tokenize.STRING) for pair in pairwise(plain))


Reader = Callable[[Path], Iterator[Row]]
