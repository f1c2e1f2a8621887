"""Arrays on disk that may be larger than memory: made part by part, sealed, and read as they are needed.

A file is a .npy file with its seal behind the rows: a SHA-256 of each part, as JSON. All of it is checked when a run
opens the file, on several threads. That reads it once, at the disk's speed or 1.5 GB/s a core; what trains on it reads
it many times. To check less would leave altered rows unnoticed.
"""

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError, WriteError, reading
from lora_distill.storage import unseen
from lora_distill.writing import LOCK, locked

LENGTH = 8  # bytes at the end of a file: how long its seal is
Make = Callable[[list[slice]], Iterable[torch.Tensor]]


def mapped_rows(path: Path, shape: tuple[int, ...], size: int, make: Make) -> np.ndarray:
    """The float16 array of `shape` in a .npy file, memory-mapped; it is made and written if there is no such file.

    `make(parts)` gives the rows of each of the slices, at most `size` rows each, one after the other. They are written
    to a file beside, in `path`.parts, with a mark for each part, so that a cut run goes on; several processes each make
    some of them. Of a damaged file the altered parts are made again, with a warning. Raises InputError for values that
    are not finite in float16, WriteError that names the file when the disk is full.
    """
    rows = _Rows(path, shape, size)
    if processes.agree(processes.is_main() and not rows.are_whole()):
        rows.fill(make)
    if not path.exists():
        raise MissingError(f"{path}: the main process reads it and this one does not; they must share runs/")
    with reading(path, f"an array of float16 {shape}"):
        return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class _Rows:
    """The file of an array, and the folder beside in which it is made."""

    path: Path
    shape: tuple[int, ...]
    size: int  # rows a part

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.parts")

    @property
    def unfinished(self) -> Path:
        return self.folder / "rows.npy"

    @property
    def header(self) -> bytes:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": self.shape})
        return header.getvalue()

    def place(self, row: int) -> int:
        """Where a row begins in the file."""
        return len(self.header) + 2 * row * math.prod(self.shape[1:])

    def parts(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.shape[0])) for start in range(0, self.shape[0], size)]

    def mark(self, part: slice) -> Path:
        """The file that says that a part is made, and its digest; with both ends, for a later run has other parts."""
        return self.folder / f"{part.start:08}-{part.stop:08}"

    # ------------------------------------------------------------------------------------------ reading

    def are_whole(self) -> bool:
        """Whether the file is there and as it was written; a damaged one is taken apart with a warning."""
        if not self.path.exists():
            return False
        with reading(self.path, f"an array of float16 {self.shape}"):
            seal, problem = self._seal()
            bad = [] if problem else self._altered(self.path, seal)
        if not problem and not bad:
            shutil.rmtree(self.folder, ignore_errors=True)  # left if the run was killed after the file was whole
            return True
        said = problem or f"{len(bad)} of {len(seal)} parts are altered"
        warnings.warn(f"{self.path}: not a whole array ({said}); made again", stacklevel=4)
        self._take_apart([] if problem else [(part, text) for part, text in seal if part not in bad])
        return False

    def _seal(self) -> tuple[list[tuple[slice, str]], str]:
        """The digest of each part as the file says, and what is wrong with the file itself."""
        header, end, there = self.header, self.place(self.shape[0]), self.path.stat().st_size
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                return [], f"its header is not that of float16 {self.shape}"
            if there <= end + LENGTH:
                return [], f"{there} bytes instead of more than {end}"
            file.seek(there - LENGTH)
            length = int.from_bytes(file.read(LENGTH), "little")
            file.seek(end)
            text = file.read(there - end - LENGTH)
        try:
            found = json.loads(text)
            seal = list(zip(self.parts(found["size"]), found["digests"], strict=True))
        except (ValueError, KeyError, TypeError, RecursionError):
            seal = []
        return seal, "" if seal and length == len(text) else "its seal is damaged"

    def _altered(self, path: Path, seal: list[tuple[slice, str]]) -> list[slice]:
        """The parts of a file that are not as their digests say."""
        if not seal:
            return []
        rows = np.memmap(path, "<f2", "r", len(self.header), self.shape)
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda sealed: _digest(rows[sealed[0]]), seal)
            return [part for (part, text), digest in zip(seal, found, strict=True) if text != digest]

    def _take_apart(self, whole: list[tuple[slice, str]]) -> None:
        """Make the file the unfinished one again, with marks of its whole parts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if not whole:
            self.path.unlink()
            return
        self.folder.mkdir()
        os.replace(self.path, self.unfinished)
        os.truncate(self.unfinished, self.place(self.shape[0]))
        for part, text in whole:
            self.mark(part).write_text(text, encoding="ascii")

    # ------------------------------------------------------------------------------------------ making

    def fill(self, make: Make) -> None:
        """Make the missing parts in the file beside, seal it and give it its name; one run alone does."""
        try:
            with locked(self.folder):
                self._make(make)
                if processes.is_main():
                    self._finish()
            processes.wait()
        except InputError:  # what no new start would mend
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        except OSError as error:
            if isinstance(error, RunError):
                raise
            raise WriteError(error.errno, f"{self.path} could not be written: {error.strerror}") from None

    def _make(self, make: Make) -> None:
        parts = {self.mark(part): part for part in self.parts(self.size)}
        unmade = self._unmade(parts) if processes.is_main() else []
        missing = processes.share(processes.agree(unmade))
        with self.unfinished.open("r+b") as file:
            for mark, values in zip(missing, make([parts[mark] for mark in missing]), strict=True):
                mark.write_text(self._write(file, parts[mark], values), encoding="ascii")
        processes.wait()
        if lost := unseen(parts):
            raise MissingError(f"{lost[0]}: made by another process, not seen by this one; they must share runs/")
        processes.wait()

    def _unmade(self, parts: dict[Path, slice]) -> list[Path]:
        """The marks of the parts that are still to be made; what a cut run made is checked, the rest cleared away."""
        self._preallocate()
        there = [
            (part, mark.read_text(encoding="ascii", errors="replace")) for mark, part in parts.items() if mark.is_file()
        ]
        for part in self._altered(self.unfinished, there):
            self.mark(part).unlink()
        self._clear({self.unfinished, *(mark for mark in parts if mark.is_file())})
        return [mark for mark in parts if not mark.exists()]

    def _clear(self, kept: set[Path]) -> None:
        for left in set(self.folder.iterdir()) - {*kept, self.folder / LOCK}:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def _preallocate(self) -> None:
        """Make the unfinished file, without values, if it is not there yet."""
        header, end = self.header, self.place(self.shape[0])
        if self.unfinished.is_file() and self.unfinished.stat().st_size >= end:
            with self.unfinished.open("r+b") as file:
                file.truncate(end)  # a seal, where it was killed before the file got its name
                if file.read(len(header)) == header:
                    return
        self._clear(set())
        with self.unfinished.open("wb") as file:
            file.write(header)
            file.truncate(end)

    def _write(self, file: BinaryIO, part: slice, values: torch.Tensor) -> str:
        """Write a part; its digest."""
        values = values.half().cpu().contiguous()
        if not values.isfinite().all():
            raise InputError(f"{self.path.name}: values that float16 cannot hold")
        if values.shape != (part.stop - part.start, *self.shape[1:]):
            raise RunError(f"{self.path.name}: rows {part.start} to {part.stop} were made as {tuple(values.shape)}")
        file.seek(self.place(part.start))
        file.write(values.numpy())
        file.flush()
        os.fsync(file.fileno())  # before the mark: a part that is marked is on the disk
        return _digest(values.numpy())

    def _finish(self) -> None:
        """Append the seal and give the file its name."""
        digests = [self.mark(part).read_text(encoding="ascii") for part in self.parts(self.size)]
        seal = json.dumps({"size": self.size, "digests": digests}).encode()
        with self.unfinished.open("r+b") as file:
            file.seek(self.place(self.shape[0]))
            file.write(seal + len(seal).to_bytes(LENGTH, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.unfinished, self.path)
        shutil.rmtree(self.folder, ignore_errors=True)


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()
