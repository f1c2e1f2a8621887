"""Files that are written whole or not at all, keys of caches, and the provenance of a result."""

import hashlib
import io
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError, WriteError
from lora_distill.settings import Settings, repository_root

PACKAGES = (
    "lora_distill", "torch", "diffusers", "transformers", "peft", "accelerate", "onnxruntime", "numpy", "papermill"
)  # fmt: skip
TEMPORARY = ".tmp"  # the end of the names of files that are being written
LOCK = ".lock"  # held by the run that writes in a folder


class DamagedFileError(InputError):
    """A file of tensors that is cut short, altered or not in the expected format."""


# ---------------------------------------------------------------------------------------------- files, written whole


@contextmanager
def whole_file(path: Path, *, by_any: bool = False) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` at the end of the block; on any error `path` is left unchanged.

    Of several processes the main one alone leaves a file, unless it is written `by_any`. Raises OSError that names the
    file, for instance when the disk is full.
    """
    temporary = path.with_name(
        f".{path.name}.{secrets.token_hex(8)}{TEMPORARY}"
    )  # process numbers repeat in containers
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if by_any or processes.is_main():
                os.replace(temporary, path)
    finally:
        with suppress(OSError):  # there is none, or its folder cannot be written to
            temporary.unlink()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as one line that names it."""
    try:
        yield
    except (InputError, RunError):
        raise
    except OSError as error:
        raise WriteError(error.errno, f"{path} could not be written: {error.strerror or error}") from None
    except SafetensorError as error:  # safetensors raises this when the disk is full
        raise WriteError(f"{path} could not be written: {error}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: of several processes that write there, one works and the others are refused in one line.

    Temporary files that killed runs left in it are swept. Of the processes of one launch the main one holds it for all.
    """
    if not processes.is_main():
        yield
        return
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            sweep(folder)
            yield
    except Timeout:
        raise RunError(f"{folder}: another run writes there; wait for its end or take another profile") from None


def sweep(folder: Path) -> None:
    """Delete the temporary files that killed runs left in a folder and below."""
    for left in folder.rglob(f".*{TEMPORARY}"):
        with suppress(OSError):
            left.unlink()


def check_writable(path: Path) -> None:
    """Raise OSError, in one line, where a file could not be written, before the work that would make it."""
    with _writing(path):
        if path.is_dir():
            raise InputError(f"{path}: a folder; expected the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file whole. Raises OSError as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, *, by_any: bool = False
) -> None:
    """Write tensors and text metadata whole, as one safetensors file with a digest of both; see `whole_file`."""
    if not (by_any or processes.is_main()):
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    with whole_file(path, by_any=by_any) as temporary:
        write_safetensors(temporary, tensors, {**metadata, "digest": seal(tensors, metadata)})


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its contents alone: the metadata stand in the order of names.

    safetensors itself writes them in random order.
    """
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > size:
            raise RunError(f"{path}: safetensors writes another header than it did")
        file.seek(8)
        file.write(text.ljust(size))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file from `save_tensors`.

    Raises `DamagedFileError` when the file is cut short, altered or lacks its digest.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error})") from None
    if metadata.pop("digest", None) != seal(tensors, metadata):
        raise DamagedFileError(f"{path}: contents do not match their digest")
    return tensors, metadata


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors; their order does not count."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def seal(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """The digest of a file: of its tensors and its metadata."""
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def mapped_rows(
    path: Path, shape: tuple[int, ...], size: int, make: Callable[[list[slice]], Iterable[torch.Tensor]]
) -> np.ndarray:
    """The float16 array of `shape` in a .npy file, memory-mapped; it is made and written if there is no such file.

    `make(parts)` gives the rows of each of the slices, at most `size` rows each, one after the other. They are written
    to a file beside, in `path`.parts, with a mark for each part, so that a cut run goes on; several processes each make
    some of them. A file that is cut short is made again, with a warning. Raises ValueError for values that are not
    finite in float16, OSError that names the file when the disk is full.
    """
    array = _mapped(path, shape) if processes.is_main() else None
    if processes.agree(array is None):
        _make_rows(path, shape, size, make)
    elif array is not None:
        return array
    if (array := _mapped(path, shape)) is None:
        raise MissingError(f"{path}: the main process reads it and this one does not; they must share runs/")
    return array


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of a file; None if it does not exist or, with a warning, is cut short.

    Altered bytes are not noticed: that would need reading all.
    """
    if not path.exists():
        return None
    try:
        array = np.load(path, mmap_mode="r")
        if array.shape == shape:
            return array
        problem = f"shape {array.shape} instead of {shape}"
    except (ValueError, EOFError) as error:
        problem = str(error)
    warnings.warn(f"{path}: not a whole array ({problem}); made again", stacklevel=4)
    return None


def _make_rows(path: Path, shape: tuple[int, ...], size: int, make: Callable) -> None:
    """Make the missing parts in a file beside, then rename it."""
    folder = path.with_name(f"{path.name}.parts")
    parts = {folder / f"{start:08}": slice(start, min(start + size, shape[0])) for start in range(0, shape[0], size)}
    try:
        if processes.is_main():
            _preallocate(folder / "rows.npy", shape)
        unmade = [mark for mark in parts if processes.is_main() and not mark.exists()]
        missing = processes.share(processes.agree(unmade))
        with (folder / "rows.npy").open("r+b") as file:
            for mark, values in zip(missing, make([parts[mark] for mark in missing]), strict=True):
                _write_rows(file, parts[mark], shape, values, path.name)
                mark.touch()
        processes.wait()
        if lost := unseen(parts):
            raise MissingError(f"{lost[0]}: made by another process, not seen by this one; they must share runs/")
        processes.wait()
        if processes.is_main():
            os.replace(folder / "rows.npy", path)
            shutil.rmtree(folder)
        processes.wait()
    except ValueError:  # values that no new start would mend
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        if not error.errno:  # a message of its own
            raise
        raise WriteError(error.errno, f"{path} could not be written: {error.strerror}") from None


def _preallocate(path: Path, shape: tuple[int, ...]) -> None:
    """Make the file of a float16 array, without values, if it is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size == _row_place(shape, shape[0]):
        return
    for left in path.parent.iterdir():
        left.unlink()
    with path.open("wb") as file:
        file.write(_header(shape))
        file.truncate(_row_place(shape, shape[0]))


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _row_place(shape: tuple[int, ...], row: int) -> int:
    """Where a row of a float16 array begins in its file."""
    return len(_header(shape)) + 2 * row * math.prod(shape[1:])


def _write_rows(file: BinaryIO, rows: slice, shape: tuple[int, ...], values: torch.Tensor, name: str) -> None:
    values = values.half()
    if not values.isfinite().all():
        raise InputError(f"{name}: values that float16 cannot hold")
    file.seek(_row_place(shape, rows.start))
    file.write(values.cpu().contiguous().numpy())
    file.flush()
    os.fsync(file.fileno())  # before the mark: a part that is marked is on the disk


def save_table(path: Path, rows: list[dict]) -> None:
    """Write rows, all with the same columns, whole, as a CSV file."""
    atomic_write(path, table_text(rows))


def table_text(rows: list[dict]) -> str:
    """Rows, all with the same columns, as the text of a CSV file."""
    return pandas.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")  # object: 3 stays 3, not 3.0


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file: numbers and booleans as such, an empty cell as None."""
    empty = {"keep_default_na": False, "na_values": [""]}
    table = pandas.read_csv(path, dtype_backend="numpy_nullable", **empty)
    return [
        {name: None if value is pandas.NA else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


# ---------------------------------------------------------------------------------------------- caches


def cache_key(**parts: Any) -> str:
    """A digest, 16 hex digits, of all that a cached file depends on: the inputs and the version of the code.

    The version is a constant beside that code. It is raised by hand when an edit changes results, and only then;
    tests/test_versions.py compares small runs with recorded numbers.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors from `folder`/`kind`-`key`.safetensors, made and written if there is no such file or it is damaged."""
    path = folder / f"{kind}-{key}.safetensors"
    tensors = _kept(path)
    if processes.agree(tensors is None):
        tensors = make()
        save_tensors(path, tensors)
    return make() if tensors is None else tensors


def cached_parts(
    folder: Path, kind: str, key: str, rows: int, size: int, make: Callable[[slice], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """`make(slice)` of `rows` rows, `size` at a time, joined; each part is a file, so that a cut run goes on.

    The parts lie in `folder`/`kind`-`key`/. Several processes each make some of them; no result depends on how many.
    Raises FileNotFoundError where the processes do not see each other's files.
    """
    slices = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    # named with both ends: parts of another size are not taken for these
    parts = {folder / f"{kind}-{key}" / f"{part.start:06}-{part.stop:06}.safetensors": part for part in slices}
    missing = processes.agree([path.name for path in parts if processes.is_main() and _kept(path) is None])
    for name in tqdm(processes.share(missing), desc=kind, mininterval=2, leave=False, disable=not processes.is_main()):
        path = folder / f"{kind}-{key}" / name
        save_tensors(path, make(parts[path]), by_any=True)
    processes.wait()
    if lost := unseen(parts):
        raise MissingError(f"{lost[0]}: written by another process and not seen by this one; they must share runs/")
    joined = [load_tensors(path)[0] for path in parts]
    return {name: torch.cat([part[name] for part in joined]) for name in joined[0]}


def unseen(paths: Iterable[Path], patience: float = 90.0) -> list[Path]:
    """Those of the files that this process does not see; a shared disk may show another machine's files late."""
    paths, deadline = list(paths), time.monotonic() + patience * (processes.count() > 1)

    def absent() -> list[Path]:
        names = {folder: set(os.listdir(folder)) for folder in {path.parent for path in paths} if folder.is_dir()}
        return [path for path in paths if path.name not in names.get(path.parent, ())]

    while (lost := absent()) and time.monotonic() < deadline:
        time.sleep(1)
    return lost


def _kept(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a cache's file; None if it does not exist or, with a warning, is damaged."""
    if not path.exists():
        return None
    try:
        return load_tensors(path)[0]
    except DamagedFileError as error:
        warnings.warn(f"{error}; made again", stacklevel=3)
        return None


# ---------------------------------------------------------------------------------------------- provenance


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout, with -dirty at its end when tracked files differ from it; None outside of git."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except FileNotFoundError:  # no git on this machine
        return None
    return f"{commit}-dirty" if changes else commit or None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=False).stdout.strip()


def device_name(device: str) -> str:
    """The model name of the GPU or the CPU that `device` means; of a CPU also its cores and PyTorch's threads."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The CPU's model name; on Linux it is in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def resident_peak_mb(of_children: bool = False) -> float | None:
    """Peak resident memory so far in MB, of this process or of the largest child that ended; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    who = resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return round(unit * resource.getrusage(who).ru_maxrss / 1e6, 1)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(settings: Settings, **more: Any) -> dict[str, Any]:
    """What is needed to reproduce a result: settings, versions, device, commit, command, time, and `more`."""
    return {
        "settings": settings.model_dump(),
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_name(settings.device),
        "commit": git_commit(),
        "command": " ".join(["lora_distill", *sys.argv[1:]]),
        "written": now(),
        **more,
    }
