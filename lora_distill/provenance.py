"""What made a result: settings, versions, commit, machine. And files that are written whole or not at all."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_distill.settings import Settings, repository_root

PACKAGES = (
    "lora_distill", "torch", "diffusers", "transformers", "peft", "accelerate", "onnxruntime", "numpy", "papermill"
)  # fmt: skip


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file by a temporary one beside it and a rename; on any failure the old file stays as it was.

    Raises OSError that names the file, when the disk is full for instance.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


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
    """The commit of the checkout, ending in -dirty where tracked files differ from it; None outside of git.

    Figures do not count: a run draws them one after the other, and each is to name the code that made it.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)figures")
    except FileNotFoundError:  # no git on this machine
        return None
    return f"{commit}-dirty" if changes else commit or None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=repository_root(), capture_output=True, text=True, check=False).stdout.strip()


def device_name(device: str) -> str:
    """The processor or the GPU that `device` stands for, by its model name."""
    import torch  # here, because whoever only reads settings need not wait for it

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
