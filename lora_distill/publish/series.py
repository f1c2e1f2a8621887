"""The notebooks as one series: run in order with papermill, each reused as long as nothing it depends on changed."""

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError, one_line
from lora_distill.publish import beside, claims, report, stamps
from lora_distill.publish.stamps import MANIFEST, deleting
from lora_distill.settings import Settings, check_paths, figures_dir, load_settings, repository_root, run_dir
from lora_distill.storage import git_commit, manifest, now, resident_peak_mb
from lora_distill.writing import atomic_write, locked, whole_file

RESULTS = 1  # version of the tables and figures that the module makes for the notebooks: raise it when they change
READS = {"04": ("01", "02", "03")}  # the notebooks whose files a notebook reads, itself or through the module
PRETRAINING = "00"  # makes the bundled pipeline: not part of a run, which reads the committed one
# of train.checkpoint, in the folder of each training
TRAINING_FILES = ("result.safetensors", "checkpoint.safetensors", "log.jsonl")
NOT_TRAININGS = ("cache", "inputs", "figures", "images", "report")  # folders of a run, in which no training lies
# Kernels announce their transport at the start, and as an error the interrupt that comes before their shutdown.
KERNEL = {"kernel_name": "python3", "extra_arguments": ["--log-level=CRITICAL"]}


class ThisPython(AsyncKernelManager):
    """Kernels of this interpreter, whatever a kernelspec on the machine calls python3."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


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
    folder, paths = run_dir(settings), select(all_notebooks(), names)
    with ended_in_order():
        if not processes.is_main():
            return follow(paths, settings, folder, force=force)
        with locked(folder):
            _reproduce(paths, settings, folder, force=force)


def _reproduce(paths: Sequence[Path], settings: Settings, folder: Path, *, force: bool) -> None:
    """`reproduce` of a run that is held."""
    if force:
        delete_trainings(folder)
    started = now()
    notebooks = {path.stem: run(path, settings, folder, force=force) for path in paths}
    account = manifest(settings, started=started, notebooks=notebooks)
    atomic_write(folder / MANIFEST, json.dumps(account, indent=2) + "\n")
    try:
        written = shown(report.write(folder))
    except InputError as error:  # of a notebook that was not asked for
        print(f"\nno verdicts and no report: {error}")
        return
    print(report.results_table(figures_dir(settings)))
    print(f"\n{claims.summary(claims.ledger(figures_dir(settings)))}")
    print(f"each with its numbers: python -m lora_distill claims --profile {settings.profile}")
    print(f"\nreport: {written}\nfigures: {shown(figures_dir(settings))}")


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM ends a block as an error does, so that a kernel ends with its process."""
    if threading.current_thread() is not threading.main_thread():  # there Python handles no signal
        yield
        return
    said = "ended by SIGTERM" if processes.count() == 1 else 1  # of several, the one that failed says why
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(said))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    """Delete trainings, finished and not, anywhere in a run's folder; of one behind a link the link alone.

    Nothing else that lies beside is deleted. Raises OSError that names what could not be deleted.
    """
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [name for name in folders if here != folder or name not in NOT_TRAININGS]
        for link in (here / name for name in folders if (here / name).is_symlink()):
            if any((link / name).exists() for name in TRAINING_FILES):
                with deleting(link):
                    link.unlink()
        if here == folder or not set(TRAINING_FILES[:2]) & set(names):
            continue
        for path in (here / name for name in TRAINING_FILES if name in names):
            with deleting(path):
                path.unlink()
        with suppress(OSError):  # something else lies there
            here.rmdir()


def prepare(profile: str | Path) -> Path:
    """Write every notebook with a profile's settings put in, not run, into build/notebooks; return that folder."""
    settings = load_settings(profile)
    folder = repository_root() / "build" / "notebooks"
    for left in folder.glob("*.ipynb"):
        with deleting(left):
            left.unlink()
    for path in all_notebooks():
        with whole_file(folder / path.name) as temporary:
            _papermill(path, temporary, settings, prepare_only=True)
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
    before = stamps.read(folder, path.stem)
    reason = why_stale(path, settings, folder)
    if not (force or reason):
        print(f"{path.stem}: up to date, made at {short(before['commit'])}")
        return before
    print(f"{path.stem}: " + (f"runs again: {reason}" if before and reason else "running"), flush=True)
    stamps.remove(folder, path.stem)  # what a failed run leaves behind is nobody's result
    stamp = {"key": run_key(path, settings, folder), "commit": git_commit()}
    clock, found = time.perf_counter(), stamps.files(folder)
    execute(path, folder / path.name, settings, made_by(path, folder))
    written = [name for name, state in stamps.files(folder).items() if found.get(name) != state]
    seconds = round(time.perf_counter() - clock, 1)
    print(f"{path.stem}: done in {seconds:.0f} s")
    stamp |= {"processes": processes.count()}
    stamp |= {"outputs": {name: stamps.sha256(folder / name) for name in sorted(written)}}
    stamp |= {"trees": {name: stamps.tree(folder / name) for name in _trees(path, folder)}, "finished": now()}
    stamp |= {"seconds": seconds, "peak_memory_mb_of_any_kernel_so_far": resident_peak_mb(of_children=True)}
    stamps.write(folder, path.stem, stamp)
    return stamp


def _trees(path: Path, folder: Path) -> list[str]:
    """The pictures of a notebook, and the trainings that no other notebook made; a measuring notebook trains nothing.

    A training need not be of this run of the notebook: it may have been made by one that was cut.
    """
    own = stamps.trees(folder, path.stem)
    if beside.is_alone(path):
        return [name for name in own if not name.endswith(stamps.TRAINING)]
    others = (stamps.read(folder, name) for name in stamps.names(folder) if name != path.stem)
    taken = {name for stamp in others for name in stamp.get("trees", {})}
    return [name for name in own if name not in taken]


def made_by(path: Path, folder: Path) -> int:
    """How many processes made the trainings that a notebook reads: those of the notebooks before it, or as many as now.

    Trainings of several processes have keys of their own, and a notebook that reads them may be run by one.
    """
    before = [found for number in READS.get(path.name[:2], ()) for found in folder.glob(f"{number}_*.ipynb")]
    read = [stamps.read(folder, found.stem) for found in before]
    return max((stamp.get("processes", 1) for stamp in read), default=processes.count())


def execute(path: Path, output: Path, settings: Settings, made_by: int = 1) -> None:
    """Run a notebook in a fresh kernel, in its own folder. Raises `SeriesError` as `run` does."""
    with whole_file(output) as temporary:  # also of a notebook that failed: it shows where
        temporary.write_bytes(path.read_bytes())  # what there is to see when not even a kernel starts
        reason = _run_cells(path, temporary, settings, made_by)
    if reason:
        beside.wait_for_the_cause(reason)
        raise SeriesError(f"{path.stem}: {reason}; see {shown(output)}")


def _run_cells(path: Path, output: Path, settings: Settings, made_by: int) -> str:
    """Run a notebook in a fresh kernel and write it with its outputs; return why it failed, empty if it did not."""
    try:
        with beside.in_environment(path, made_by):
            notebook = _papermill(path, output, settings)
    except PapermillExecutionError as error:
        return f"failed in cell {error.exec_count}: {error.ename}: {one_line(error.evalue)}"
    except DeadKernelError:
        return "failed: its kernel died, most often for want of memory"
    except (InputError, RunError, OSError):
        raise
    except RuntimeError as error:  # of nbclient, when a kernel does not start
        return f"failed: {one_line(error)}"
    # SystemExit(0) in a cell ends a notebook early and yet is success to papermill
    if all(cell.execution_count for cell in code_cells(notebook) if cell.source.strip()):
        return ""
    return "failed: it stopped before its last cell"


def why_stale(path: Path, settings: Settings, folder: Path) -> str:
    """Why what a notebook left in a run's folder cannot be used, in words; empty when it can."""
    stamp = stamps.read(folder, path.stem)
    if not stamp:
        return "it has not run to its end"
    if stamp["key"] != run_key(path, settings, folder):
        return "its code, the settings, the module's results or a notebook that it reads changed since it ran"
    return stamps.why_changed(folder, stamp)


def run_key(path: Path, settings: Settings, folder: Path) -> str:
    """SHA-256 over all that a notebook's results depend on: its code, the settings, `RESULTS`, the notebooks it reads.

    Of those their keys and the times of their ends count, so that a notebook is run again whenever one that it reads
    was, and not when its figures were drawn again.
    """
    read = [stamps.read(folder, name) for name in stamps.names(folder) if name[:2] in READS.get(path.name[:2], ())]
    parts = [code_digest(report.read_notebook(path)), settings.model_dump_json(), str(RESULTS)]
    runs = [[stamp["key"], stamp.get("finished")] for stamp in read]
    return hashlib.sha256(json.dumps([*parts, *runs]).encode()).hexdigest()


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
    report.read_notebook(path)  # says in one line what is wrong with it
    # papermill would warn of each key that a parameters cell leaves at its default
    logging.getLogger("papermill").setLevel(logging.ERROR)
    source, target = (str(each).replace("{", "{{").replace("}", "}}") for each in (path, output))  # it formats paths
    options = KERNEL | {"cwd": path.parent, "kernel_manager_class": ThisPython} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The specified file")  # a temporary one has another ending
        return papermill.execute_notebook(source, target, settings.model_dump(), **options)
