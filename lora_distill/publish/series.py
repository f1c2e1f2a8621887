"""The notebooks as one series: run in order with papermill, reuse what is up to date, commit their outputs."""

import hashlib
import json
import logging
import os
import re
import resource
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from unittest.mock import patch

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from lora_distill.publish import claims, report
from lora_distill.publish.outputs import clean_outputs
from lora_distill.settings import (
    PACKAGE,
    READ_KEYS_FILE,
    Settings,
    figures_dir,
    load_settings,
    repository_root,
    run_dir,
)
from lora_distill.storage import atomic_write, manifest, now

# Progress is plain text in a committed notebook: widgets leave megabytes that code hosts do not show.
KERNEL_ENVIRONMENT = {"PYTHONWARNINGS": "ignore:IProgress not found", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Kernels announce their transport at the start, and as an error the interrupt that comes before their shutdown.
KERNEL = {"kernel_name": "python3", "extra_arguments": ["--log-level=CRITICAL"]}
PRETRAINING = "00"  # makes the bundled pipeline: not part of a run, which reads the committed one


class SeriesError(RuntimeError):
    """A notebook failed; the message is one line that says which, in which cell, and why."""


def reproduce(profile: str | Path, *, force: bool = False, names: Sequence[str] = ()) -> None:
    """Run the series, or the notebooks named, with the settings of a profile; print the results; write the report.

    With `force` nothing is reused: neither finished notebooks nor the trainings and caches of the run folder. Raises
    `SettingsError` before anything runs, `SeriesError` at the first notebook that fails.
    """
    settings = load_settings(profile)
    folder = run_dir(settings)
    if force:
        for kept in [path for path in folder.glob("*") if path.is_dir()]:
            shutil.rmtree(kept)
    started = now()
    notebooks = {path.stem: run(path, settings, folder, force=force) for path in select(all_notebooks(), names)}
    account = manifest(settings, started=started, notebooks=notebooks)
    atomic_write(folder / "manifest.json", json.dumps(account, indent=2) + "\n")
    results = results_table(figures_dir(settings))
    print(results)
    print(f"\n{claims.summary(claims.ledger(figures_dir(settings)))}")
    print(f"each with its numbers: python -m lora_distill claims --profile {profile}")
    index = report.write(folder, results)
    print(f"\nreport: {_shown(index)}\nfigures: {_shown(figures_dir(settings))}")


def prepare(profile: str | Path) -> Path:
    """Write every notebook with a profile's settings put in, not run, into build/notebooks; return that folder."""
    settings = load_settings(profile)
    folder = repository_root() / "build" / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in all_notebooks():
        _papermill(path, folder / path.name, settings, prepare_only=True)
    return folder


def commit_outputs(profile: str | Path = "cpu") -> None:
    """Run all notebooks and put their outputs into the committed ones."""
    paths = all_notebooks()
    reproduce(profile, names=[path.stem for path in paths])
    for path in paths:
        write_outputs(path, run_dir(load_settings(profile)) / path.name)


def write_readme(profile: str | Path = "full") -> Path:
    """Put the results and verdicts of a profile into the README, from its saved tables; return its path."""
    readme = repository_root() / "README.md"
    atomic_write(readme, with_results(readme.read_text(), figures_dir(load_settings(profile))))
    return readme


def all_notebooks() -> list[Path]:
    """Every notebook of the checkout in the order of their names. Raises FileNotFoundError when there is none."""
    folder = repository_root() / "notebooks"
    if not (paths := sorted(folder.glob("[0-9]*.ipynb"))):
        raise FileNotFoundError(f"no notebooks in {folder}; this command needs a checkout of the repository")
    return paths


def select(paths: Sequence[Path], names: Iterable[str]) -> list[Path]:
    """The notebooks named, in order; without names the series from 01 on. Raises ValueError for an unknown name."""
    wanted = {name.removesuffix(".ipynb") for name in names}
    if unknown := wanted - {path.stem for path in paths}:
        raise ValueError(f"no notebook {min(unknown)!r}; there are: {', '.join(path.stem for path in paths)}")
    return [path for path in paths if path.stem in wanted or not (wanted or path.name.startswith(PRETRAINING))]


def run(path: Path, settings: Settings, folder: Path, *, force: bool = False) -> dict:
    """Execute one notebook into `folder` unless its stamp says that this was done; return the stamp.

    Raises `SeriesError` when a cell fails, the kernel dies or the notebook stops before its end.
    """
    stamp_path = folder / f"{path.stem}.stamp.json"
    stamp = read_stamp(stamp_path)
    key = run_key(path, settings, folder, stamp.get("settings_read"))
    tables = tables_digest(path.name[:2], figures_dir(settings))
    if not force and (stamp.get("key"), stamp.get("tables")) == (key, tables) and (folder / path.name).exists():
        print(f"{path.stem}: up to date")
        return stamp
    stamp_path.unlink(missing_ok=True)  # what a failed run leaves behind is nobody's result
    print(f"{path.stem}: running", flush=True)
    clock = time.perf_counter()
    settings_read = execute(path, folder / path.name, settings)
    seconds = round(time.perf_counter() - clock, 1)
    print(f"{path.stem}: done in {seconds:.0f} s")
    stamp = {"key": run_key(path, settings, folder, settings_read), "settings_read": settings_read}
    stamp |= {"tables": tables_digest(path.name[:2], figures_dir(settings))}
    stamp |= {"finished": now(), "seconds": seconds, "peak_memory_mb_so_far": _peak_memory_mb()}
    atomic_write(stamp_path, json.dumps(stamp, indent=2) + "\n")
    return stamp


def execute(path: Path, output: Path, settings: Settings) -> list[str] | None:
    """Run a notebook in a fresh kernel, in its own folder; the settings that it read, or None where that is not known.

    Raises `SeriesError` as `run` does.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    read_keys = output.with_suffix(".settings_read.json")
    try:
        with patch.dict(os.environ, {READ_KEYS_FILE: str(read_keys.resolve())}):
            notebook = _papermill(path, output, settings)
    except PapermillExecutionError as error:
        reason = f"failed in cell {error.exec_count}: {error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        reason = "failed: its kernel died, most often for want of memory"
    else:
        # SystemExit(0) in a cell ends a notebook early and yet is success to papermill
        if all(cell.execution_count for cell in code_cells(notebook) if cell.source.strip()):
            return _taken(read_keys)
        reason = "failed: it stopped before its last cell"
    raise SeriesError(f"{path.stem}: {reason}; see {_shown(output)}")


def run_key(path: Path, settings: Settings, folder: Path, settings_read: Sequence[str] | None) -> str:
    """SHA-256 over all that a notebook's results depend on: its code, settings, the package, the notebooks it reads.

    Of the settings those count that it read the last time, all of them where that is not known.
    """
    notebook = nbformat.read(path, 4)
    sha = hashlib.sha256(code_digest(notebook).encode())
    sha.update(settings.model_dump_json(include=None if settings_read is None else set(settings_read)).encode())
    for file in sorted(PACKAGE.rglob("*")):  # the sources, and the pipeline and sprites among the assets
        if file.is_file() and "__pycache__" not in file.parts:
            sha.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    # Stamps carry the time of the run, so that a notebook is run again whenever one that it reads was.
    for number in sorted(numbers_named(notebook) - {path.name[:2], PRETRAINING}):
        for stamp in sorted(folder.glob(f"{number}_*.stamp.json")):
            sha.update(stamp.read_bytes())
    return sha.hexdigest()


def tables_digest(number: str, folder: Path) -> str:
    """SHA-256 over the tables and results that the notebook of a number left beside its figures."""
    sha = hashlib.sha256()
    for file in sorted([*folder.glob(f"{number}_*.csv"), *folder.glob(f"{number}_*.json")]):
        sha.update(file.name.encode() + file.read_bytes())
    return sha.hexdigest()


def numbers_named(notebook: NotebookNode) -> set[str]:
    """The numbers of the notebooks whose files this one names in its code, as in "02_quality.csv"."""
    return {number for cell in code_cells(notebook) for number in re.findall(r"[\"'/](\d\d)_", cell.source)}


def read_stamp(path: Path) -> dict:
    """The stamp of a finished notebook; empty when there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells of a notebook that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_digest(notebook: NotebookNode) -> str:
    """SHA-256 of a notebook's code, indifferent to prose, outputs and metadata."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_cells(notebook)]).encode()).hexdigest()


def write_outputs(path: Path, executed: Path) -> None:
    """Put the outputs of an executed copy into a notebook, cell by cell, and note which code they belong to.

    Raises ValueError when the copy was made from other code.
    """
    notebook = nbformat.read(path, 4)
    ran = {cell.id: cell for cell in nbformat.read(executed, 4).cells}
    for count, cell in enumerate(code_cells(notebook), start=1):
        if cell.id not in ran or ran[cell.id].source != cell.source:
            raise ValueError(f"{_shown(path)} changed after {_shown(executed)} was made; run it again")
        cell.execution_count = count
        cell.outputs = clean_outputs(ran[cell.id].outputs, count)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "lora_distill": {"code": code_digest(notebook)},
        }
    )
    atomic_write(path, nbformat.writes(notebook) + "\n")


def stale_outputs(path: Path) -> bool:
    """Whether a committed notebook's outputs were made by other code than it now holds."""
    notebook = nbformat.read(path, 4)
    return notebook.metadata.get("lora_distill", {}).get("code") != code_digest(notebook)


def results_table(folder: Path) -> str:
    """What the notebooks found, from the files <notebook>_results.json, {title: {label: value}}, beside the figures."""
    lines = []
    for path in sorted(folder.glob("*_results.json")):
        for title, rows in json.loads(path.read_text()).items():
            width = max((len(label) for label in rows), default=0)
            lines += ["", title, *(f"  {label:<{width}}  {value}" for label, value in rows.items())]
    return "\n".join(lines[1:])


def with_results(readme: str, folder: Path) -> str:
    """The README with what a folder of results says: the notebooks' numbers, and the ledger of claims."""
    readme = with_block(readme, "results", f"```\n{results_table(folder)}\n```")
    return with_block(readme, "ledger", claims.as_table(claims.ledger(folder)))


def with_block(text: str, name: str, content: str) -> str:
    """A text with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"no block from {start} to {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def _papermill(path: Path, output: Path, settings: Settings, **options) -> NotebookNode:
    """papermill with our ways: quiet, in the notebook's folder, every key given whether its cell declares it or not."""
    os.environ.update({name: os.environ.get(name, value) for name, value in KERNEL_ENVIRONMENT.items()})
    # papermill would warn of each key that a parameters cell leaves at its default
    logging.getLogger("papermill").setLevel(logging.ERROR)
    parameters = settings.model_dump()
    return papermill.execute_notebook(path, output, parameters, cwd=path.parent, **(KERNEL | options))


def _taken(path: Path) -> list[str] | None:
    """The list in a JSON file, which is removed; None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    finally:
        path.unlink(missing_ok=True)


def _peak_memory_mb() -> float:
    """Peak resident memory of the hungriest kernel so far."""
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3, 1)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)
