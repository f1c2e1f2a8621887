"""The files below a folder of pictures, and which file a caption means by a name."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

from lora_distill.data.readers import IMAGE_SUFFIX, is_image_name
from lora_distill.errors import InputError

NO_DATA = {"__macosx", "__pycache__", "lost+found", "node_modules", "system volume information"}
NO_DATA |= {"@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler"}
IMAGE_FILE = re.compile(rf".+{IMAGE_SUFFIX}\s*", re.IGNORECASE | re.DOTALL)
BESIDE = ("", ".txt", ".caption", ".json", ".npz", ".npy", ".xmp", ".xml", ".html", ".md", ".safetensors", ".toml")


class Tree:
    """The files below a folder, links followed, each real folder once; hidden files and caches are not there."""

    def __init__(self, root: Path, only: str | None = None) -> None:
        self.root = root
        self.paths: dict[str, Path] = {}  # by their path below the folder, in NFC, with slashes
        self.images: set[str] = set()
        if only is not None:  # this file alone, in a folder that may hold anything
            self.paths[only] = root / only
            return
        self._seen: set[tuple[int, int]] = set()
        now, later = [(root, "")], []
        while now or later:  # real folders first: a link to one that was read adds nothing
            self._walk(*(now.pop() if now else later.pop(0)), now, later)
        self.images = {name for name in self.paths if IMAGE_FILE.fullmatch(posixpath.basename(name))}

    def _walk(self, folder: Path, below: str, now: list[tuple[Path, str]], later: list[tuple[Path, str]]) -> None:
        """Note the files of a folder, and in `now` its folders, in `later` the linked ones."""
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
        spellings = Counter(normalize("NFC", entry.name) for entry in entries)  # two may differ in this alone
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in NO_DATA:
                continue
            composed = normalize("NFC", entry.name)
            name = below + (composed if spellings[composed] == 1 else entry.name)
            try:
                kind = "folder" if entry.is_dir() else "file" if entry.is_file() or _is_lost(entry) else ""
            except OSError:  # a link to itself
                continue
            if kind == "file":
                self.paths.setdefault(name, Path(entry.path))
            elif kind == "folder" and not entry.is_symlink():
                now.append((Path(entry.path), f"{name}/"))
            elif kind == "folder" and not self.root.resolve().is_relative_to(os.path.realpath(entry.path)):
                later.append((Path(entry.path), f"{name}/"))

    def beside(self, text: str) -> str | None:
        """The file that a text lies beside as beside an image, though it is none by its name: 1.psd and 1.txt."""
        stem = posixpath.splitext(text)[0]
        same = [name for name in self._stems.get(stem, []) if posixpath.splitext(name)[1].lower() not in BESIDE]
        return same[0] if same and stem not in self.stems and stem not in self.images else None

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        return _grouped(self.paths, lambda name: posixpath.splitext(name)[0])

    @cached_property
    def stems(self) -> set[str]:
        """The paths of all images without their suffixes."""
        return {posixpath.splitext(name)[0] for name in self.images}

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _grouped(self.paths, posixpath.basename)

    @cached_property
    def _by_fold(self) -> dict[str, list[str]]:
        return _grouped(self.paths, lambda name: posixpath.basename(name).casefold())

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Images by their names without suffix, as some lists have them."""
        return _grouped(self.images, lambda name: posixpath.splitext(posixpath.basename(name))[0])

    @cached_property
    def _by_real_path(self) -> dict[str, str]:
        return {os.path.realpath(path): name for name, path in self.paths.items()}

    def find(self, name: str, near: str, place: str) -> str | None:
        """The path below the folder of what a file in the folder `near` calls `name`; None if it is not there.

        Raises ValueError for a name that leads out of the folder, and for one that two different files have.
        """
        composed = normalize("NFC", name)
        for spelled in dict.fromkeys((name, composed, composed.strip(), composed.strip().replace("\\", "/"))):
            if spelled and (found := self._find(spelled, near, place)):
                return found
        return None

    def _find(self, name: str, near: str, place: str) -> str | None:
        if posixpath.isabs(name) or re.match(r"[A-Za-z]:[\\/]", name):
            name, near = self._relative(name, place), ""
        parents = [near[: -len(rest)] if rest else near for rest in _ends(near)]
        joined = [posixpath.normpath(posixpath.join(parent, name)) for parent in parents]
        inside = [path for path in joined if path.partition("/")[0] != ".."]
        if not inside:
            raise InputError(f"{place}: image {name} leads out of the folder {self.root}; move it into the folder")
        if found := next((path for path in inside if path in self.paths), None):
            return found
        tail = inside[0] if near == "" else posixpath.normpath(name)
        for groups, fold in ((self._by_name, str), (self._by_fold, str.casefold)):
            same = [
                path
                for path in groups.get(fold(posixpath.basename(tail)), [])
                if f"/{fold(path)}".endswith(f"/{fold(tail)}")
            ]
            if same:
                return self._one_of(same, near, name, place)
        if not is_image_name(tail) and (same := self._by_stem.get(tail)):
            return self._one_of(same, near, name, place)
        return next(filter(None, map(self._elsewhere, inside)), None)

    def _relative(self, name: str, place: str) -> str:
        for root in (self.root, self.root.resolve()):
            path = Path(os.path.normpath(name))
            if path.is_absolute() and path.is_relative_to(root):
                return path.relative_to(root).as_posix()
        raise InputError(f"{place}: image {name} leads out of the folder {self.root}; move it into the folder")

    def _one_of(self, paths: list[str], near: str, name: str, place: str) -> str:
        """The one of several files of a name that is meant: the only one below `near`, or any if all are the same."""
        below = [path for path in paths if path.startswith(near)] or paths
        first, *others = below
        if any(not _same_content(self.paths[first], self.paths[other]) for other in others):
            raise InputError(f"{place}: image {name} could be {first} or {others[0]}; give its path")
        return first

    def _elsewhere(self, name: str) -> str | None:
        """A file that was not listed: its name is hidden, or it is reached by a second link to its folder."""
        path = self.root / name
        try:
            if not path.is_file():
                return None
        except (OSError, ValueError):  # too long, a NUL byte
            return None
        known = self._by_real_path.get(os.path.realpath(path))
        if known is None:
            self.paths[known := name] = path
        return known

    def copies(self, names: set[str]) -> set[str]:
        """The names, and those of files of the same name and content in other folders."""
        also = set()
        for name in names:
            for other in self._by_name.get(posixpath.basename(name), []):
                if other not in names and _same_content(self.paths[name], self.paths[other]):
                    also.add(other)
        return names | also


def _is_lost(entry: os.DirEntry) -> bool:
    """Whether an entry is a picture by its name, but a link that leads nowhere."""
    return entry.is_symlink() and IMAGE_FILE.fullmatch(entry.name) is not None and not os.path.exists(entry.path)


def _ends(folder: str) -> list[str]:
    """What to cut off a folder's path "a/b/" to have itself and each that it lies in: "", "b/", "a/b/"."""
    parts = folder.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[len(parts) - count :]) for count in range(len(parts) + 1)]


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        groups.setdefault(key(name), []).append(name)
    return groups


def _same_content(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def folder_of(name: str) -> str:
    """ "a/b/" of "a/b/c.jpg", "" of "c.jpg"."""
    return name[: len(name) - len(posixpath.basename(name))]
