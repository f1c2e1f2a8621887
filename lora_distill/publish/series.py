"""The notebooks as one series: run in order with papermill, each reused as long as nothing it depends on changed."""

import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError
from lora_distill.publish import beside, claims, report
from lora_distill.publish.figures import PROVENANCE
from lora_distill.settings import Settings, check_paths, figures_dir, load_settings, repository_root, run_dir
from lora_distill.storage import atomic_write, git_commit, manifest, now, resident_peak_mb

RESULTS = 1  # version of the tables and figures that the module makes for the notebooks: raise it when they change
READS = {"04": ("01", "02", "03")}  # the notebooks whose files a notebook reads, itself or through the module
PRETRAINING = "00"  # makes the bundled pipeline: not part of a run, which reads the committed one
TRAINING_FILES = ("result.safetensors", "checkpoint.safetensors")  # of train.loop, in the folder of each training
MANIFEST, STAMP = "manifest.json", ".stamp.json"
# Progress is plain text in a committed notebook: widgets leave megabytes that code hosts do not show.
KERNEL_ENVIRONMENT = {"PYTHONWARNINGS": "ignore:IProgress not found", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
# Kernels announce their transport at the start, and as an error the interrupt that comes before their shutdown.
KERNEL = {"kernel_name": "python3", "extra_arguments": ["--log-level=CRITICAL"]}


class SeriesError(RunError):
    """A notebook failed or is not finished; the message is one line that says which and why."""


def reproduce(profile: str | Path | Settings, *, force: bool = False, names: Sequence[str] = ()) -> None:
    """Run the series, or the notebooks named, with the settings of a profile; print the results; write the report.

    With `force` neither finished notebooks nor trainings are reused: these are deleted. What is in cache/ is no
    training's result and stays. Of several processes, the main one does all this and the others run the code of the
    notebooks beside it, see `follow`. Raises `SettingsError` before anything runs, `SeriesError` at the first notebook
    that fails.
    """
    settings = profile if isinstance(profile, Settings) else load_settings(profile)
    check_paths(settings)
    folder = run_dir(settings)
    if processes.count() > 1:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a kernel ends with its process
    if not processes.is_main():
        return follow(select(all_notebooks(), names), settings, folder, force=force)
    if force:
        delete_trainings(folder)
    started = now()
    notebooks = {path.stem: run(path, settings, folder, force=force) for path in select(all_notebooks(), names)}
    account = manifest(settings, started=started, notebooks=notebooks)
    atomic_write(folder / MANIFEST, json.dumps(account, indent=2) + "\n")
    print(report.results_table(figures_dir(settings)))
    print(f"\n{claims.summary(claims.ledger(figures_dir(settings)))}")
    print(f"each with its numbers: python -m lora_distill claims --profile {settings.profile}")
    print(f"\nreport: {shown(report.write(folder))}\nfigures: {shown(figures_dir(settings))}")


def follow(paths: Iterable[Path], settings: Settings, folder: Path, *, force: bool) -> None:
    """What a process beside the main one does: it runs the code of the notebooks that the main one runs, quietly.

    Whether a notebook is up to date depends on what the run left before, which both see. Raises `SeriesError`, which
    ends the others too: who started them stops all when one fails.
    """
    for path in paths:
        if beside.is_alone(path) or not (force or why_stale(path, settings, folder)):
            continue
        if reason := beside.run(path, settings):
            beside.wait_for_the_cause(reason)
            raise SeriesError(f"{path.stem}: process {processes.index()} {reason}")


def delete_trainings(folder: Path) -> None:
    """Delete the folders of trainings, finished and not, anywhere in a run's folder."""
    for name in TRAINING_FILES:
        for path in list(folder.rglob(name)):
            shutil.rmtree(path.parent)


def prepare(profile: str | Path) -> Path:
    """Write every notebook with a profile's settings put in, not run, into build/notebooks; return that folder."""
    settings = load_settings(profile)
    folder = repository_root() / "build" / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in all_notebooks():
        _papermill(path, folder / path.name, settings, prepare_only=True)
    return folder


def all_notebooks() -> list[Path]:
    """Every notebook of the checkout in the order of their names. Raises FileNotFoundError when there is none."""
    folder = repository_root() / "notebooks"
    if not (paths := sorted(folder.glob("[0-9]*.ipynb"))):
        raise MissingError(f"no notebooks in {folder}; this command needs a checkout of the repository")
    return paths


def select(paths: Sequence[Path], names: Iterable[str]) -> list[Path]:
    """The notebooks named, in order; without names the series from 01 on. Raises ValueError for an unknown name."""
    wanted = {name.removesuffix(".ipynb") for name in names}
    if unknown := wanted - {path.stem for path in paths}:
        raise InputError(f"no notebook {min(unknown)!r}; there are: {', '.join(path.stem for path in paths)}")
    return [path for path in paths if path.stem in wanted or not (wanted or path.name.startswith(PRETRAINING))]


def run(path: Path, settings: Settings, folder: Path, *, force: bool = False) -> dict:
    """Execute one notebook into `folder` unless its stamp says that this was done; return the stamp.

    Raises `SeriesError` when a cell fails, the kernel dies or the notebook stops before its end.
    """
    if not force and not why_stale(path, settings, folder):
        stamp = read_stamp(folder, path.stem)
        print(f"{path.stem}: up to date, made at {short(stamp['commit'])}")
        return stamp
    stamp_path = folder / f"{path.stem}{STAMP}"
    stamp_path.unlink(missing_ok=True)  # what a failed run leaves behind is nobody's result
    print(f"{path.stem}: running", flush=True)
    stamp = {"key": run_key(path, settings, folder), "commit": git_commit()}
    clock, before = time.perf_counter(), _files(folder)
    execute(path, folder / path.name, settings, made_by(path, folder))
    written = [name for name, state in _files(folder).items() if before.get(name) != state]
    seconds = round(time.perf_counter() - clock, 1)
    print(f"{path.stem}: done in {seconds:.0f} s")
    stamp |= {"processes": processes.count()}
    stamp |= {"outputs": {name: _sha256(folder / name) for name in sorted(written)}, "finished": now()}
    stamp |= {"seconds": seconds, "peak_memory_mb_of_any_kernel_so_far": resident_peak_mb(of_children=True)}
    atomic_write(stamp_path, json.dumps(stamp, indent=2) + "\n")
    return stamp


def made_by(path: Path, folder: Path) -> int:
    """How many processes made the trainings that a notebook reads: those of the notebooks before it, or as many as now.

    Trainings of several processes have keys of their own, and a notebook that reads them may be run by one.
    """
    before = [found for number in READS.get(path.name[:2], ()) for found in folder.glob(f"{number}_*.ipynb")]
    read = [read_stamp(folder, found.stem) for found in before]
    return max((stamp.get("processes", 1) for stamp in read), default=processes.count())


def execute(path: Path, output: Path, settings: Settings, made_by: int = 1) -> None:
    """Run a notebook in a fresh kernel, in its own folder. Raises `SeriesError` as `run` does."""
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.in_environment(path, made_by):
            notebook = _papermill(path, output, settings)
    except PapermillExecutionError as error:
        reason = f"failed in cell {error.exec_count}: {error.ename}: {' '.join(error.evalue.split())}"
    except DeadKernelError:
        reason = "failed: its kernel died, most often for want of memory"
    else:
        # SystemExit(0) in a cell ends a notebook early and yet is success to papermill
        if all(cell.execution_count for cell in code_cells(notebook) if cell.source.strip()):
            return
        reason = "failed: it stopped before its last cell"
    beside.wait_for_the_cause(reason)
    raise SeriesError(f"{path.stem}: {reason}; see {shown(output)}")


def why_stale(path: Path, settings: Settings, folder: Path) -> str:
    """Why what a notebook left in a run's folder cannot be used, in words; empty when it can."""
    stamp = read_stamp(folder, path.stem)
    if not stamp:
        return "it has not run to its end"
    if stamp["key"] != run_key(path, settings, folder):
        return "its code, the settings, the module's results or a notebook that it reads changed since it ran"
    for name, digest in stamp["outputs"].items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} was changed since it ran"
    return ""


def run_key(path: Path, settings: Settings, folder: Path) -> str:
    """SHA-256 over all that a notebook's results depend on: its code, the settings, `RESULTS`, the notebooks it reads.

    Stamps carry the time of the run, so that a notebook is run again whenever one that it reads was.
    """
    read = [stamp for number in READS.get(path.name[:2], ()) for stamp in sorted(folder.glob(f"{number}_*{STAMP}"))]
    parts = [code_digest(nbformat.read(path, 4)), settings.model_dump_json(), str(RESULTS)]
    stamps = [stamp.read_text(encoding="utf-8") for stamp in read]
    return hashlib.sha256(json.dumps([*parts, *stamps]).encode()).hexdigest()


def read_stamp(folder: Path, name: str) -> dict:
    """The stamp of a finished notebook in a run's folder; empty when there is none or it is damaged."""
    try:
        stamp = json.loads((folder / f"{name}{STAMP}").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if {"key", "commit", "outputs"} <= stamp.keys() else {}


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells of a notebook that hold code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_digest(notebook: NotebookNode) -> str:
    """SHA-256 of a notebook's code, indifferent to prose, outputs and metadata."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_cells(notebook)]).encode()).hexdigest()


def short(commit: str | None) -> str:
    """A commit as one reads it: its first seven digits, and -dirty where files differed from it."""
    return f"{commit[:7]}{'-dirty' * commit.endswith('-dirty')}" if commit else "no commit"


def shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)


def _papermill(path: Path, output: Path, settings: Settings, **options) -> NotebookNode:
    """papermill with our ways: quiet, in the notebook's folder, every key given whether its cell declares it or not."""
    os.environ.update({name: os.environ.get(name, value) for name, value in KERNEL_ENVIRONMENT.items()})
    # papermill would warn of each key that a parameters cell leaves at its default
    logging.getLogger("papermill").setLevel(logging.ERROR)
    parameters = settings.model_dump()
    return papermill.execute_notebook(path, output, parameters, cwd=path.parent, **(KERNEL | options))


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of the files of a run and of its figures, but for those that several notebooks share.

    Folders of trainings and caches are left out: what they hold is checked where it is read.
    """
    files = [path for path in (*folder.glob("*"), *folder.glob("figures/*")) if path.is_file()]
    own = [path for path in files if path.name not in (PROVENANCE, MANIFEST) and not path.name.endswith(STAMP)]
    return {path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size) for path in own}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
