"""Tables of the library `datasets` on disk: sealed, and made again when they are altered."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, DatasetDict, Features, concatenate_datasets
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError

from lora_distill import processes
from lora_distill.errors import InputError, one_line
from lora_distill.storage import cached_folder, file_digest, keep_value, kept_value

ANEW = {"download_mode": "reuse_cache_if_exists"}  # what was downloaded is kept, the table is made again


def kept_table(
    name: str, key: str, rows: Callable[[], Iterator[dict]], features: Features, cache_dir: Path | None
) -> Dataset:
    """The table of what `rows()` gives, in `cache_dir`/<name>-<key>, memory-mapped; `key` names all that it depends on.

    An altered one is made again, with a warning. Raises WriteError where nothing can be written, and what `rows` does.
    """

    def make(folder: Path) -> None:
        with TemporaryDirectory(dir=folder) as temporary:
            try:
                made = Dataset.from_generator(rows, features=features, cache_dir=temporary, fingerprint=key)
            except DatasetGenerationError as error:
                raise error.__cause__ if isinstance(error.__cause__, InputError | OSError) else error from None
            for number, file in enumerate(made.cache_files):
                shutil.move(file["filename"], folder / f"{number:05}.arrow")

    folder = cached_folder((cache_dir or Path(HF_DATASETS_CACHE)) / f"{name}-{key}", make)
    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(folder.glob("*.arrow"))])


def loaded_tables(load: Callable[..., DatasetDict], cache_dir: Path | None) -> DatasetDict:
    """The tables of `load(cache_dir=..., **options)`, a `load_dataset`.

    Where its cache is altered it is made again, with a warning. The library itself looks neither at altered rows nor
    at damaged descriptions of them.
    """
    try:
        tables = load(cache_dir=cache_dir and str(cache_dir))
        if not (altered := _altered(tables)):
            return tables
        problem = f"{altered[0]} is not as it was written"
    except (FileNotFoundError, ConnectionError, RuntimeError, InputError):
        raise
    except Exception as error:  # a library may raise anything
        problem = one_line(error)
    if processes.is_main():
        warnings.warn(f"a cached table could not be used: {problem}; made again", stacklevel=3)
        _clear_damaged(cache_dir or Path(HF_DATASETS_CACHE))
    tables = load(cache_dir=cache_dir and str(cache_dir), **ANEW)
    _altered(tables, new=True)
    return tables


def _clear_damaged(cache_dir: Path) -> None:
    """Delete the descriptions of tables that are no JSON objects: the library fails on them before it makes anew."""
    for path in cache_dir.rglob("dataset_info.json"):
        try:
            whole = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        except (OSError, ValueError, RecursionError):
            whole = False
        if not whole:
            path.unlink()


def _altered(tables: DatasetDict, *, new: bool = False) -> list[Path]:
    """The files of tables that are not as their seals say; one without a seal is sealed, and so is a `new` one."""
    altered = []
    for file in (Path(file["filename"]) for table in tables.values() for file in table.cache_files):
        seal, found = file.with_name(f"{file.name}.seal"), file_digest(file)
        if new or kept_value(seal) is None:
            keep_value(seal, found)
        elif kept_value(seal) != found:
            altered.append(file)
    return altered
