"""What a finished notebook leaves: a stamp with digests of all that it made, so that a later change is noticed.

Files by their content: the executed notebook, LoRA files, tables, figures. Sets of pictures and trainings, which may be
large, by a digest of their content too, which is only computed again when a name, a size or a time changed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from lora_distill.errors import InputError, MissingError, WriteError, reading
from lora_distill.writing import atomic_write

STAMP = ".stamp.json"
MANIFEST = "manifest.json"  # of a run: what made it
PROVENANCE = "provenance.json"  # of its figures: what made each; shared by notebooks, as the manifest, and in no stamp
PICTURES = "images/{}/*/*"  # the pictures of a notebook: a folder for each method and seed
PICTURE = re.compile(r"\d+\.png|key\.txt")
TRAINING = "result.safetensors"  # of train.checkpoint, in the folder of each training
SUMS = "SHA256SUMS"  # of committed tables; `sha256sum -c` reads it too
TABLES = ("*.csv", "*.json", "*_images.png")  # what figures are drawn from and verdicts rest on

# ---------------------------------------------------------------------------------------------- stamps


def read(folder: Path, name: str) -> dict[str, Any]:
    """The stamp of a finished notebook in a run's folder; empty when there is none or it is damaged."""
    try:
        content = path.read_bytes() if (path := folder / f"{name}{STAMP}").is_file() else b""  # a pipe would wait
        _Stamp.model_validate_json(content)
        return json.loads(content)
    except (OSError, ValueError, RecursionError):
        return {}


class _Tree(BaseModel, strict=True):
    files: int
    state: str
    sha256: str


class _Stamp(BaseModel, strict=True):
    """What stands in a stamp, as far as it is read."""

    key: str
    commit: str | None
    outputs: dict[str, str]
    trees: dict[str, _Tree] = {}
    processes: int = 1

    @model_validator(mode="after")
    def _inside_the_run(self) -> "_Stamp":
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in (*self.outputs, *self.trees)):
            raise InputError("a place outside the run's folder")
        return self


def names(folder: Path) -> list[str]:
    """The notebooks that ran to their end in a run's folder, in their order."""
    found = (path.name.removesuffix(STAMP) for path in folder.glob(f"[!.]*{STAMP}"))
    return sorted(name for name in found if read(folder, name))


def write(folder: Path, name: str, stamp: dict[str, Any]) -> None:
    """Write the stamp of a notebook."""
    atomic_write(folder / f"{name}{STAMP}", json.dumps(stamp, indent=2) + "\n")


def renew(folder: Path, paths: Iterable[Path]) -> None:
    """Take over files of a run that were made again from the same results, such as figures that were drawn again."""
    fresh = {path.relative_to(folder).as_posix(): sha256(path) for path in paths if path.is_file()}
    for name in names(folder):
        stamp = read(folder, name)
        changed = {file: fresh[file] for file, digest in stamp["outputs"].items() if fresh.get(file, digest) != digest}
        if changed:
            write(folder, name, stamp | {"outputs": stamp["outputs"] | changed})


def remove(folder: Path, name: str) -> None:
    """Remove the stamp of a notebook, if it has one."""
    with deleting(path := folder / f"{name}{STAMP}"):
        path.unlink(missing_ok=True)


@contextmanager
def deleting(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is deleted, as one line that names it."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, f"{error.filename or path} could not be deleted: {error.strerror}") from None


def why_changed(folder: Path, stamp: dict[str, Any]) -> str:
    """What of a stamp's outputs is missing or was changed since, in words; empty when nothing is."""
    for name, digest in stamp["outputs"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} was changed since it ran"
    return next(
        (why for name, tree in stamp.get("trees", {}).items() if (why := _why_tree(folder / name, name, tree))), ""
    )


def manifest(folder: Path) -> dict[str, Any]:
    """What a run's manifest says; empty where there is none or it is damaged, as the next run writes it anew."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def other_settings(folder: Path, settings: dict[str, Any]) -> str:
    """What a run's manifest says that it was made with where it differs from these settings, in words; else empty.

    A key that either lacks does not count: settings are added with time.
    """
    made = manifest(folder).get("settings")
    if not isinstance(made, dict):
        return ""
    if not (others := [key for key, value in settings.items() if key in made and made[key] != value]):
        return ""
    more = f" and {len(others) - 1} more" * (len(others) > 1)
    return f"made with {others[0]}: {str(made[others[0]])[:60]}{more}, not as the profile says now"


# ---------------------------------------------------------------------------------------------- digests


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of the files of a run and of its figures, but for those that several notebooks share."""
    found = [path for path in (*folder.glob("*"), *folder.glob("figures/*")) if path.is_file()]
    own = [
        path
        for path in found
        if path.name not in (PROVENANCE, MANIFEST) and path.name[0] != "." and not path.name.endswith(STAMP)
    ]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size) for path in own}


def trees(folder: Path, name: str) -> list[str]:
    """The sets of pictures of a notebook, and every training in a run's folder, as paths from there."""
    found = [path for path in folder.glob(PICTURES.format(name)) if path.is_dir()]
    found += folder.glob(f"*/{TRAINING}")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def tree(path: Path) -> dict[str, Any]:
    """The entry of a set of pictures or of a training: how many files, a digest of their names, sizes and times, and
    one of their content."""
    return {"files": len(_members(path)), "state": _state(path), "sha256": _content(path)}


def _why_tree(path: Path, name: str, known: dict[str, Any]) -> str:
    if not _members(path):
        return f"{name} is missing"
    if lost := _lost(path, known):
        return f"{lost} of {known['files']} files of {name} are missing"
    unchanged = _state(path) == known["state"] or _content(path) == known["sha256"]
    return "" if unchanged else f"{name} was changed since it ran"


def _lost(path: Path, known: dict[str, Any]) -> int:
    """How many files a tree has fewer than it had."""
    return max(0, known["files"] - len(_members(path)))


def _members(path: Path) -> list[Path]:
    """The files of a tree: of a folder its pictures and their key, not what a file browser leaves there."""
    if path.is_dir():
        return sorted(each for each in path.iterdir() if each.is_file() and PICTURE.fullmatch(each.name))
    return [path] if path.is_file() else []


def _state(path: Path) -> str:
    facts = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in _members(path)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _content(path: Path) -> str:
    return hashlib.sha256(json.dumps([(each.name, sha256(each)) for each in _members(path)]).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- tables


def check_tables(figures: Path) -> None:
    """Raise `InputError` or `MissingError` for the first table of a folder of results that is not as it was left.

    In a run its stamps know, in the repository the file SHA256SUMS. What neither names is not checked. Raises
    `MissingError` too where there is no table at all.
    """
    in_run = figures.name == "figures"  # settings.figures_dir
    again = f"python -m lora_distill reproduce --profile {(figures.parent if in_run else figures).name}"
    if not any(figures.glob("*.csv")):
        raise MissingError(f"no tables in {figures}; {again} makes them")
    if in_run:
        for notebook in names(figures.parent):
            digests = read(figures.parent, notebook).get("outputs", {})
            known = {file.removeprefix("figures/"): sha for file, sha in digests.items() if file.startswith("figures/")}
            _check(figures, known, f"since {notebook} ran; {again}")
    else:
        _check(figures, read_sums(figures), "since it was committed; git checkout restores it")


def _check(folder: Path, digests: dict[str, str], since: str) -> None:
    for name, digest in digests.items():
        if not any(Path(name).match(pattern) for pattern in TABLES):
            continue
        if not (folder / name).is_file():
            raise MissingError(f"{folder / name} was removed {since}")
        if sha256(folder / name) != digest:
            raise InputError(f"{folder / name} was changed {since}")


def read_sums(folder: Path) -> dict[str, str]:
    """The digests of a committed folder's tables; none where there is no file of them."""
    path = folder / SUMS
    if not path.exists():
        return {}
    with reading(path, "lines of a SHA-256 and a file's name"):
        lines = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
        if bad := [
            number for number, line in enumerate(lines, 1) if not re.fullmatch("[0-9a-f]{64}", line[0]) or not line[1]
        ]:
            raise ValueError(f"not so in line {bad[0]}")
        return {name: digest for digest, name in lines}


def write_sums(folder: Path) -> None:
    """Write the digests of a folder's tables."""
    paths = sorted({path for pattern in TABLES for path in folder.glob(pattern) if path.is_file()})
    atomic_write(folder / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in paths))
