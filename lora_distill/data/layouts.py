"""A folder of captioned images: which files have the captions, where the images are, and which split each is in.

| layout | captions | splits |
|---|---|---|
| `metadata.jsonl`, `metadata.csv` | `file_name`, and `text`, `caption` or `captions` | `split`, or the folder |
| a `.txt` or `.caption` beside each image (kohya) | each line of it that is not blank | the folder |
| Kaggle: `captions.txt`, `results.csv`, any table with a header that names its columns | a row a caption | `split` |
| `Flickr8k.token.txt`, `results_20130124.token`, any file called token | image.jpg#0, a tab, the caption | none |
| Karpathy & Fei-Fei (2015): `dataset.json`, `dataset_flickr8k.json`, ... and other json | sentences | their own |

The images decide, not the names of files: of several layouts the one counts that has captions for the most images.
Splits are, in this order: the source's own; the folders (or names) of its caption files; files like
`Flickr_8k.trainImages.txt`; the images' folders, train/, validation/ and test/; those of another layout in the folder.

Everything is read here and not by `datasets`' imagefolder, which reads the first layout alone, leaves images without
captions out in silence, knows no line numbers and copies all images into a cache.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

from lora_distill.data.readers import (
    SPLIT_NAMES,
    Reader,
    Row,
    captions_beside,
    headed_table,
    json_file,
    json_lines,
    lines_of,
    parquet_records,
    table_file,
    token_file,
)
from lora_distill.data.tree import Tree, folder_of
from lora_distill.errors import InputError, MissingError, one_line

SPLITS = "|".join(SPLIT_NAMES)
YEAR = r"(?:20\d\d)?"  # of COCO
SPLIT_WORD = re.compile(rf"(?:^|[._\- ])({SPLITS}){YEAR}(?=[._\- ]|$)", re.IGNORECASE)
OF_WHAT = r"(?:[._\- ]?(?:images?|imgs?|set|data|split|list|files|names|ids))?"
SPLIT_FOLDER = re.compile(
    rf"(?:partial-|split=|(?:images?|imgs?|data)[._\- ]?)?({SPLITS}){YEAR}{OF_WHAT}", re.IGNORECASE
)
SPLIT_FILE = re.compile(rf"(?:^|[._\-])({SPLITS}){OF_WHAT}\.(?:txt|lst)$", re.IGNORECASE)
UNREAD_SPLITS = re.compile(r"(?:.*[._\- ])?splits?(?:[._\- ].*)?\.(?:json|ya?ml|csv|tsv|txt)", re.IGNORECASE)
PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
BESIDE_RANK = 6  # of texts beside images
LEMMAS = 8  # rank of Flickr8k's captions in their dictionary forms
KNOWN = "metadata.jsonl, metadata.csv, dataset.json, *.token, captions.txt, results.csv, a .txt beside each image"


@dataclass(frozen=True)
class Found:
    """What a folder holds: rows with their files, and sentences about what was left out or chosen."""

    rows: list[Row]
    notes: list[str]


def read_folder(
    tree: Tree, *, skip_unusable: bool = False, splits: bool = True, only: str | None = None, parquet: int = 0
) -> Found | None:
    """The rows of the layout that fits the images of a folder; None if its `parquet` images are more than it has.

    `only` is the path, below the folder, of the one caption file that counts. Without `splits`, images of no split and
    in doubtful folders are kept. Raises `MissingError` when there are no captions; ValueError, with file and line, for
    what cannot be read, for images without captions (with `skip_unusable` they are left out and noted), for names that
    lead out of the folder and for images in two split files.
    """
    candidates = [c for c in _candidates(tree) if only is None or only in c.files]
    best = _best(candidates, tree, parquet)
    if best is None:
        return None
    notes, rows = _rivals(best, candidates, tree), best.rows
    if parquet:
        notes.append(f"{tree.root}: {best.name} is read, {parquet} rows of pictures in parquet are not")
    if splits:
        rows = _with_splits(best, candidates, tree, skip_unusable, notes)
    _no_text_beside_another_file(best, tree, skip_unusable, notes)
    missing = sorted(tree.images - tree.copies(best.covered))
    if missing:
        count = f"{len(missing)} of {len(tree.images)} images have no caption in {best.name}"
        said = f"{tree.root}: {count}: {named(missing)}"
        if absent := list(dict.fromkeys(row.image for row in best.rows if not row.file)):
            said += f"; {len(absent)} that it names are not there: {named(absent)}"
        if not skip_unusable:
            raise InputError(f"{said}; give them one, take them away, or set skip_unusable to leave them out")
        notes.append(f"{said}; left out")
    return Found(rows, notes)


def named(names: Iterable[str]) -> str:
    """The first five of some names."""
    names = list(names)
    return ", ".join(map(_printable, names[:5])) + (", ..." if len(names) > 5 else "")


def _printable(name: str) -> str:
    """A name on one line, without the middle where it is no name but, say, a picture in base64."""
    name = CONTROL.sub(lambda sign: f"\\x{ord(sign[0]):02x}", name.encode("utf-8", "backslashreplace").decode())
    return name if len(name) <= 300 else f"{name[:100]}...{name[-100:]}"


def _no_text_beside_another_file(best: "Candidate", tree: Tree, skip_unusable: bool, notes: list[str]) -> None:
    """Where texts lie beside the images, one beside a file that is none by its name is an error or a note."""
    if best.rank < BESIDE_RANK:
        return
    texts = [name for name in sorted(tree.paths) if posixpath.splitext(name)[1].lower() in (".txt", ".caption")]
    others = [other for text in texts if (other := tree.beside(text))]
    if others:
        said = (
            f"{tree.root}: {len(others)} files with a text beside them are no pictures by their names: {named(others)}"
        )
        if not skip_unusable:
            raise InputError(f"{said}; convert them, take them away, or set skip_unusable to leave them out")
        notes.append(f"{said}; left out")


# ---------------------------------------------------------------------------------------------- which layout


@dataclass
class Candidate:
    """Caption files of one kind that belong together; `error` is why they cannot be read."""

    files: list[str]
    rank: int  # of candidates that fit equally the lowest counts
    known: bool  # by its name; of another name, what cannot be read is no caption file
    rows: list[Row] = field(default_factory=list)
    error: InputError | None = None

    @cached_property
    def covered(self) -> set[str]:
        return {row.file for row in self.rows if row.file and any(row.captions)}

    @property
    def name(self) -> str:
        return self.files[0] if len(self.files) == 1 else f"{self.files[0]} and {len(self.files) - 1} more"


def has_captions(name: str) -> bool:
    """Whether a file of this name may have captions."""
    return _kind(name) is not None or name.lower().endswith(".parquet")


def _kind(name: str) -> tuple[int, Reader, bool] | None:
    """Rank, reader and whether the name is known, of a file that may have captions."""
    base = posixpath.basename(name).lower()
    suffix = posixpath.splitext(base)[1]
    if suffix in (".jsonl", ".ndjson"):
        return 0, json_lines, base == "metadata.jsonl"
    if base in ("metadata.csv", "metadata.tsv"):
        return 1, table_file, True
    if suffix == ".parquet":
        return 1, parquet_records, base == "metadata.parquet"
    if suffix == ".json":
        return 2, json_file, re.fullmatch(r"dataset(_flickr\w+|_coco)?\.json", base) is not None
    if suffix == ".token" or (suffix == ".txt" and "token" in base):
        return (LEMMAS, token_file, False) if "lemma" in base else (3, token_file, True)
    if base == "captions.txt" or base == "results.csv":
        return 4, table_file, True
    if "caption" in base and suffix in (".csv", ".tsv", ".txt"):
        return 5, table_file, False
    if suffix in (".csv", ".tsv"):
        return 5, headed_table, False
    return None


def _candidates(tree: Tree) -> list[Candidate]:
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for name in sorted(tree.paths, key=lambda name: (name.count("/"), name)):
        kind = _kind(name)
        if kind and not _is_beside(name, tree):
            rank, reader, known = kind
            one = Candidate([name], rank, known)
            _read(one, lambda name=name, reader=reader: _rows_of(name, reader, tree))
            groups.setdefault((rank, _without_split(name)), []).append(one)
    found = [candidate for group in groups.values() for candidate in _merged(group)]
    found += [
        beside
        for suffix, rank in ((".txt", BESIDE_RANK), (".caption", BESIDE_RANK + 1))
        if (beside := _beside(tree, suffix, rank))
    ]
    return sorted(found, key=lambda candidate: candidate.rank)


def _read(candidate: Candidate, rows: Callable[[], list[Row]]) -> None:
    try:
        candidate.rows = rows()
        if not candidate.rows:
            raise InputError(f"{candidate.files[0]}: holds no captions")
    except InputError as error:
        candidate.error = error


def _rows_of(name: str, reader: Reader, tree: Tree) -> list[Row]:
    path = tree.paths[name]
    if reader is table_file and _is_token_file(path):
        reader = token_file
    rows = list(reader(path))
    if not rows:
        raise InputError(f"{path}: holds no captions")
    found: dict[str, str | None] = {}
    for row in rows:
        if row.image not in found:
            if not row.image.strip():
                raise InputError(f"{row.place}: expected an image's name, got {row.image!r}")
            found[row.image] = tree.find(row.image, folder_of(name), row.place)
    return [replace(row, image=_id(row.image), file=found[row.image]) for row in rows]


def _id(name: str) -> str:
    """An image's name in one spelling: NFC, slashes, without "./"."""
    return posixpath.normpath(normalize("NFC", name.strip()).replace("\\", "/"))


def _is_token_file(path: Path) -> bool:
    place_and_line = next(lines_of(path), None)
    return place_and_line is not None and re.match(r"[^\t]+#\d+\t", place_and_line[1]) is not None


def _is_beside(name: str, tree: Tree) -> bool:
    """Whether a text lies beside an image of its name."""
    stem, suffix = posixpath.splitext(name)
    return suffix.lower() in (".txt", ".caption") and (stem in tree.stems or stem in tree.images)


def _beside(tree: Tree, suffix: str, rank: int) -> Candidate | None:
    texts = {stem: name for name in tree.paths for stem, end in [posixpath.splitext(name)] if end.lower() == suffix}
    stems = ((image, (posixpath.splitext(image)[0], image)) for image in sorted(tree.images))
    pairs = [(image, texts[stem]) for image, both in stems for stem in both if stem in texts]
    if not pairs:
        return None
    found = Candidate([text for _, text in pairs], rank, True)

    def rows() -> list[Row]:
        rows = [captions_beside(image, tree.paths[text]) for image, text in pairs]
        return [replace(row, file=row.image) for row in rows if row.captions]

    _read(found, rows)
    return found


def split_word(name: str) -> str | None:
    """The split that a file's name or else one of its folders names: train.csv, test/metadata.jsonl."""
    folders, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    words = {SPLIT_NAMES[word.lower()] for word in SPLIT_WORD.findall(stem)}
    if len(words) == 1:
        return words.pop()
    return _folder_word(folders)


def split_words(names: Sequence[str]) -> list[str | None]:
    """`split_word` of each name; a folder in which all lie says nothing: dev/train/, dev/test/."""
    return [split_word(name) for name in _apart(names)]


def _apart(names: Sequence[str]) -> list[str]:
    """The names without the folders in which all lie."""
    parts = [name.split("/") for name in names]
    shared, most = 0, min((len(folders) for folders in parts), default=1) - 1
    while shared < most and len({folders[shared] for folders in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _folder_word(folders: str) -> str | None:
    found = filter(None, map(SPLIT_FOLDER.fullmatch, folders.split("/")))
    return next((SPLIT_NAMES[word[1].lower()] for word in found), None)


def _without_split(name: str) -> str:
    return SPLIT_WORD.sub("", posixpath.basename(name).lower())


def _merged(group: list[Candidate]) -> list[Candidate]:
    """Caption files of one name as one candidate if each is of a split, or has images of its own."""
    if len(group) == 1:
        return group
    words = split_words([one.files[0] for one in group])
    apart = sum(len(one.covered) for one in group) == len(set().union(*(one.covered for one in group)))
    of_splits = all(words) and len(set(words)) > 1
    if not (of_splits or (apart and all(one.covered for one in group))):
        return group
    merged = Candidate([one.files[0] for one in group], group[0].rank, any(one.known for one in group))
    merged.error = next((one.error for one in group if one.error), None)
    for one, word in zip(group, words, strict=True):
        try:
            rows = [_in_split(row, word) for row in one.rows] if of_splits else one.rows
        except InputError as error:
            merged.error = merged.error or error
            rows = []
        merged.rows += [replace(row, image=row.file or folder_of(one.files[0]) + row.image) for row in rows]
    return [merged]


def _in_split(row: Row, split: str) -> Row:
    if row.split not in (None, split):
        raise InputError(f"{row.place}: image {row.image} is in {row.split}, but its file is that of {split}")
    return replace(row, split=split)


def _best(candidates: list[Candidate], tree: Tree, parquet: int) -> Candidate | None:
    """The candidate with captions for the most images; of equals, one with splits, then the lowest rank."""
    readable = [one for one in candidates if not one.error]
    best = max(
        (one for one in readable if one.covered or one.known),
        key=lambda one: (len(one.covered), any(row.split for row in one.rows), -one.rank, one.known),
        default=None,
    )
    broken = [one for one in candidates if one.error and one.known]
    if parquet and (best is None or len(best.covered) < parquet):
        return None
    if best is not None and best.covered and (not broken or best.covered >= tree.images):
        return _one_id_a_file(best)
    if broken:
        raise broken[0].error
    if best is not None:
        return _one_id_a_file(best)
    tried = next((f"; {one_line(one.error)}" for one in candidates if one.error), "")
    tried = next((f"; {one.name} names none of them" for one in candidates if not one.error), tried)
    if packed := next((name for name in tree.paths if name.lower().endswith(PACKED)), None):
        tried += f"; unpack {packed}"
    raise MissingError(f"{tree.root}: no captions for {len(tree.images)} images; expected {KNOWN} or *.parquet{tried}")


def _one_id_a_file(best: Candidate) -> Candidate:
    """One id for each file, however it was spelled; the path below the folder where two files have the same name."""
    names: dict[str, set[str]] = {}
    first: dict[str, str] = {}
    for row in best.rows:
        names.setdefault(row.image, set()).add(row.file or "")
        first.setdefault(row.file or "", row.image)
    best.rows = [
        replace(row, image=first[row.file] if len(names[first[row.file]]) == 1 else row.file) if row.file else row
        for row in best.rows
    ]
    return best


def _rivals(best: Candidate, candidates: list[Candidate], tree: Tree) -> list[str]:
    """A sentence for each other layout that fits as well and says something else, or that cannot be read."""
    notes = []
    for other in candidates:
        if other is best or other.rank == LEMMAS:
            continue
        if other.error and other.known:
            notes.append(f"{one_line(other.error)}; {best.name} is read in its place")
        elif (
            not other.error and len(other.covered) == len(best.covered) and best.covered and _said(other) != _said(best)
        ):
            both = f"{best.name} and {other.name} have captions of the same images, and differ"
            notes.append(f"{tree.root}: {both}; {best.name} is read")
    return notes


def _said(candidate: Candidate) -> dict[str, Counter]:
    said: dict[str, Counter] = {}
    for row in candidate.rows:
        if row.file:
            said.setdefault(row.file, Counter()).update(" ".join(caption.split()) for caption in row.captions)
    return said


# ---------------------------------------------------------------------------------------------- splits


def _with_splits(
    best: Candidate, candidates: list[Candidate], tree: Tree, skip_unusable: bool, notes: list[str]
) -> list[Row]:
    """The rows with the splits that the folder has for them; unchanged if they have some, or there are none."""
    if any(row.split for row in best.rows):
        return best.rows
    home = _split_files(best, tree, skip_unusable, notes)
    if home:
        return _at_home(best.rows, home, "split file", tree, notes)
    rows = _by_folders(best.rows, tree)
    if rows is not None:
        return rows
    for other in candidates:
        home = {row.file: row.split for row in other.rows if row.split and row.file in best.covered}
        if other is not best and 2 * len(home) >= len(best.covered) > 0:
            return _at_home(best.rows, home, f"split of {other.name}", tree, notes)
    unread = [name for name in sorted(tree.paths) if UNREAD_SPLITS.fullmatch(posixpath.basename(name))]
    if unread := [name for name in unread if name not in best.files and not _is_beside(name, tree)]:
        notes.append(f"{tree.root}: {named(unread)} is not read; splits are made from a hash of each name")
    return best.rows


def _at_home(rows: list[Row], home: dict[str, str], what: str, tree: Tree, notes: list[str]) -> list[Row]:
    """The rows whose image has a split in `home`, by its file or its id."""
    split_of = {row.image: home.get(row.file) or home.get(row.image) for row in rows}
    homeless = [image for image, split in split_of.items() if split is None]
    if homeless:
        count = f"{len(homeless)} of {len(split_of)} images are in no {what}"
        notes.append(f"{tree.root}: {count}: {named(homeless)}; left out")
    return [replace(row, split=split_of[row.image]) for row in rows if split_of[row.image]]


def _split_files(best: Candidate, tree: Tree, skip_unusable: bool, notes: list[str]) -> dict[str, str]:
    """The split of each image, by its file or else its id, that files like Flickr_8k.trainImages.txt name."""
    ids = {row.image: row.file or row.image for row in best.rows}
    home: dict[str, tuple[str, str]] = {}
    strange: dict[str, list[str]] = {}
    for name in sorted(tree.paths):
        found = SPLIT_FILE.search(posixpath.basename(name))
        if not found or name in best.files or _is_beside(name, tree):
            continue
        for place, line in lines_of(tree.paths[name]):
            image = _id(line)
            key = ids.get(image) or tree.find(image, folder_of(name), place) or image
            if key not in best.covered and image not in ids:
                strange.setdefault(name, []).append(image)
                continue
            split = SPLIT_NAMES[found[1].lower()]
            first, other = home.setdefault(key, (split, name))
            if first != split:
                raise InputError(
                    f"{place}: image {image} is also in {posixpath.basename(other)}; splits must not share images"
                )
    if not home and not any("Images" in name for name in strange):
        return {}  # other texts with such a name
    for name, images in strange.items():
        count = f"image {images[0]} has" if len(images) == 1 else f"{len(images)} images ({named(images)}) have"
        said = f"{tree.paths[name]}: {count} no captions in {best.name}"
        if not skip_unusable:
            raise InputError(f"{said}; set skip_unusable to leave out what cannot be used")
        notes.append(f"{said}; left out")
    return {key: split for key, (split, _) in home.items()}


def _by_folders(rows: list[Row], tree: Tree) -> list[Row] | None:
    """The rows with the splits that the images' folders name; None if these name none, or one for all."""
    words = [_folder_word(folder_of(name)) for name in _apart([row.file or row.image for row in rows])]
    if None in words and any(words):
        inside = next(row.image for row, word in zip(rows, words, strict=True) if word)
        outside = next(row.image for row, word in zip(rows, words, strict=True) if not word)
        raise InputError(
            f"{tree.root}: image {inside} lies in a folder of a split, image {outside} does not; "
            "move all into train/, validation/ or test/, or rename the folder"
        )
    if len(set(words)) < 2:
        return None
    return [replace(row, split=word) for row, word in zip(rows, words, strict=True)]
