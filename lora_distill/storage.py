"""Tensors on disk, written whole or not at all: safetensors with a digest, and arrays too large for memory."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_distill.provenance import atomic_write, versions


class DamagedFileError(ValueError):
    """A file of tensors that is cut short, altered or not one of ours."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, independent of their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def source_digest(*modules: ModuleType) -> str:
    """SHA-256 over the source of modules."""
    return hashlib.sha256(b"".join(Path(module.__file__).read_bytes() for module in modules)).hexdigest()


def cache_key(*modules: ModuleType, **parts: Any) -> str:
    """A digest of all that a cached file depends on: `parts`, the code of the modules that make it, all versions."""
    depends_on = {"parts": parts, "source": source_digest(*modules), "versions": versions()}
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata as one safetensors file; on any failure the old file stays as it was."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    atomic_write(path, save(tensors, {**metadata, "digest": _seal(tensors, metadata)}))


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


def _seal(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """The digest of a whole file, its text as well as its tensors."""
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def save_array(path: Path, shape: tuple[int, ...], parts: Iterable[torch.Tensor]) -> None:
    """Write parts, one after another along their first axis, as one float16 .npy file; no two are held in memory.

    Raises ValueError for values that are not finite in float16; on any failure there is no new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                if not part.half().isfinite().all():
                    raise ValueError(f"{path.name}: values that float16 cannot hold")
                file.write(part.half().cpu().numpy().tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def map_array(path: Path) -> np.ndarray:
    """The array of a file from `save_array`, read from disk where it is indexed.

    Raises `DamagedFileError` when the file is cut short; bytes altered in place are not noticed, for that would mean
    to read all of it.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DamagedFileError(f"{path}: not a whole array ({error})") from None
