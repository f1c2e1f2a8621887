"""Files that are written whole or not at all, the keys of caches, and what made a result."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_distill.settings import Settings, repository_root

PACKAGES = (
    "lora_distill", "torch", "diffusers", "transformers", "peft", "accelerate", "onnxruntime", "numpy", "papermill"
)  # fmt: skip


class DamagedFileError(ValueError):
    """A file of tensors that is cut short, altered or not one of ours."""


# ---------------------------------------------------------------------------------------------- files, written whole


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends well; otherwise `path` stays as it was.

    Raises OSError that names the file, when the disk is full for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from None
    except SafetensorError as error:  # its way to say that the disk is full
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file whole. Raises OSError as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata as one safetensors file, whole."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {**metadata, "digest": _seal(tensors, metadata)})


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
    if metadata.pop("digest", None) != _seal(tensors, metadata):
        raise DamagedFileError(f"{path}: contents do not match their digest")
    return tensors, metadata


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, independent of their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def _seal(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """The digest of a whole file, its text as well as its tensors."""
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def save_array(path: Path, shape: tuple[int, ...], parts: Iterable[torch.Tensor]) -> None:
    """Write parts, one after another along their first axis, as one float16 .npy file; no two are held in memory.

    Raises ValueError for values that are not finite in float16; on any failure there is no new file.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        for part in parts:
            if not part.half().isfinite().all():
                raise ValueError(f"{path.name}: values that float16 cannot hold")
            file.write(part.half().cpu().contiguous().numpy())


def map_array(path: Path) -> np.ndarray:
    """The array of a file from `save_array`, read from disk where it is indexed.

    Raises `DamagedFileError` when the file is cut short; bytes altered in place are not noticed, for that would mean
    to read all of it.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DamagedFileError(f"{path}: not a whole array ({error})") from None


def save_table(path: Path, rows: list[dict]) -> None:
    """Write rows that have the same columns as CSV, whole."""
    atomic_write(path, table_text(rows))


def table_text(rows: list[dict]) -> str:
    """Rows that have the same columns as the text of a CSV file."""
    return pandas.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")  # object: 3 stays 3, not 3.0


def read_table(path: Path) -> list[dict]:
    """Rows of a CSV file: numbers as numbers, True and False as such, None for what is empty."""
    empty = {"keep_default_na": False, "na_values": [""]}
    table = pandas.read_csv(path, dtype_backend="numpy_nullable", **empty)
    return [
        {name: None if value is pandas.NA else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


# ---------------------------------------------------------------------------------------------- caches


def cache_key(**parts: Any) -> str:
    """A digest of all that a cached file depends on: what went in, and the version number of the code that made it.

    The version is a constant beside that code. It is raised by hand when the code comes to make something else, and
    never for an edit that changes no result; tests/test_versions.py holds small runs to their recorded numbers.
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, kind: str, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors from `folder`/`kind`-`key`.safetensors, made on first use; a damaged file is made again."""
    path = folder / f"{kind}-{key}.safetensors"
    if path.exists():
        try:
            return load_tensors(path)[0]
        except DamagedFileError as error:
            warnings.warn(f"{error}; made again", stacklevel=2)
    tensors = make()
    save_tensors(path, tensors)
    return tensors


# ---------------------------------------------------------------------------------------------- what made a result


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout, ending in -dirty where tracked files differ from it; None outside of git."""
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
    """The processor or the GPU that `device` stands for, by its model name."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The CPU's model name; Linux tells it in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def manifest(settings: Settings, **more: Any) -> dict[str, Any]:
    """All that one needs to know to make a result again."""
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
