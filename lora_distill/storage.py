"""Tensors, tables and caches on disk, with digests of what they hold, and the provenance of a result."""

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError, one_line, reading
from lora_distill.settings import Settings, repository_root
from lora_distill.writing import LOCK, _writing, atomic_write, whole_file, whole_folder

if TYPE_CHECKING:  # imported where tables are read and written: a training has none, and pandas takes 60 MB
    import pandas

PACKAGES = (
    "lora_distill", "torch", "diffusers", "transformers", "peft", "accelerate", "openvino", "numpy", "papermill"
)  # fmt: skip
SEAL = "seal.json"  # digests of the files of a folder


class DamagedFileError(InputError):
    """A file of tensors that is cut short, altered or not in the expected format."""


# ---------------------------------------------------------------------------------------------- tensors and tables


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

    Raises `DamagedFileError` when the file is cut short, altered or lacks its digest, InputError when the system does
    not let it be read.
    """
    with reading(path, "a safetensors file"):
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


def save_table(path: Path, rows: list[dict]) -> None:
    """Write rows, all with the same columns, whole, as a CSV file."""
    atomic_write(path, table_text(rows))


def table_text(rows: list[dict]) -> str:
    """Rows, all with the same columns, as the text of a CSV file."""
    import pandas

    return pandas.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")  # object: 3 stays 3, not 3.0


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file: numbers and booleans as such, an empty cell as None. Raises as `read_frame`."""
    import pandas

    table = read_frame(path, dtype_backend="numpy_nullable", keep_default_na=False, na_values=[""])
    return [
        {name: None if value is pandas.NA else value for name, value in row.items()}
        for row in table.astype(object).to_dict("records")
    ]


def read_frame(path: Path, **options: Any) -> "pandas.DataFrame":
    """A CSV file as a table; `options` are those of pandas.read_csv.

    Raises `MissingError`, or in one line with the file and the line `InputError`, when it is not CSV in UTF-8, is cut
    or names a column twice.
    """
    import pandas

    with reading(path, "a table, CSV in UTF-8"):
        if "\0" in (text := path.read_text(encoding="utf-8-sig")):
            raise ValueError("it holds binary zeros")
        lines = csv.reader(io.StringIO(text), strict=True)
        columns = next(lines, [])
        if not any(columns) or len(set(columns)) < len(columns):
            raise InputError(f"{path}, line 1: expected the names of columns, each once")
        for values in lines:
            if values and len(values) != len(columns):
                raise InputError(f"{path}, line {lines.line_num}: {len(values)} values for {len(columns)} columns")
        return pandas.read_csv(io.StringIO(text), **options)


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


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of files that `make(folder)` writes, made again, with a warning, when a file is altered or missing.

    The digests of its files are in it, in seal.json. Of several processes the first makes it and the others wait.
    """
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_after_another(folder):
        if (problem := _problem_of(folder)) is not None:
            if problem:
                warnings.warn(f"{folder}: {problem}; made again", stacklevel=3)
            with whole_folder(folder, by_any=True) as temporary:
                make(temporary)
                (temporary / SEAL).write_text(json.dumps(_digests_of(temporary)), encoding="utf-8")
    return folder


@contextmanager
def _one_after_another(folder: Path) -> Iterator[None]:
    """Inside the block no other process makes the same cached folder; where a disk has no locks, both do."""
    lock = FileLock(folder.with_name(f".{folder.name[:100]}{LOCK}"))
    with suppress(OSError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _problem_of(folder: Path) -> str | None:
    """What is wrong with a cached folder: None when it is whole, empty when there is none."""
    if not folder.exists():
        return ""
    with reading(folder, "a folder that can be read"):
        found = _digests_of(folder)
        try:
            sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return "its seal is missing or damaged"
    if not isinstance(sealed, dict):
        return "its seal is damaged"
    altered = sorted(name for name in {*found, *sealed} if found.get(name) != sealed.get(name))
    return f"{altered[0]} is not as it was written" if altered else None


def _digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder, without its seal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_value(path: Path, value: Any) -> None:
    """Write what JSON can hold, but None, with its digest."""
    atomic_write(path, json.dumps({"value": value, "digest": cache_key(value=value)}))


def kept_value(path: Path) -> Any:
    """What `keep_value` wrote; None if there is no such file or, with a warning, it is damaged."""
    if not path.exists():
        return None
    with reading(path, "a file of this cache"):
        content = path.read_bytes()
    try:
        found = json.loads(content)
        if cache_key(value=found["value"]) == found["digest"]:
            return found["value"]
        problem = "contents do not match their digest"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"not as it was written, {one_line(error)}"
    warnings.warn(f"{path}: {problem}; made again", stacklevel=3)
    return None


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
    """The commit of the checkout, with -dirty at its end when tracked files differ from it.

    None where git is not here or the code is not in a repository; one around it, of other files, does not count.
    """
    try:
        known = _git("ls-files", "--", str(Path(__file__).resolve()))
        commit = _git("rev-parse", "HEAD") if known else ""
        changes = _git("status", "--porcelain", "--untracked-files=no") if commit else ""
    except OSError:  # no git on this machine, or one that does not start
        return None
    return f"{commit}-dirty" if changes else commit or None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(
        command, cwd=repository_root(), capture_output=True, check=False, encoding="utf-8", errors="replace"
    )
    return done.stdout.strip()


def device_name(device: str) -> str:
    """The model name of the GPU or the CPU that `device` means; of a CPU also its cores and PyTorch's threads."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(None if device == "auto" else device)
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The CPU's model name; on Linux it is in /proc/cpuinfo only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
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
