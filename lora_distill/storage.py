"""Tensors on disk: safetensors written atomically, with a digest that tells a damaged file from a whole one."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_distill.provenance import atomic_write


class DamagedFileError(ValueError):
    """A file of tensors that is cut short, altered or not one of ours."""


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, independent of their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def cache_key(**parts) -> str:
    """A digest of everything a cached file depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors and text metadata as one safetensors file; on any failure the old file stays as it was."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(tensors, {**(metadata or {}), "digest": digest(tensors)}))


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
    if metadata.pop("digest", None) != digest(tensors):
        raise DamagedFileError(f"{path}: contents do not match their digest")
    return tensors, metadata
