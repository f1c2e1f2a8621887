"""What the repository keeps of a finished run: outputs in the notebooks, a folder of figures, blocks of the README."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from pydantic import TypeAdapter

from lora_distill.errors import InputError, MissingError, reading
from lora_distill.publish import claims, report, series, stamps
from lora_distill.publish.figures import check, provenance_text, read_provenance
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.series import SeriesError
from lora_distill.publish.stamps import PROVENANCE
from lora_distill.settings import Settings, figures_dir, load_settings, repository_root, run_dir
from lora_distill.storage import read_table
from lora_distill.writing import atomic_write, locked, whole_file

IN_NOTEBOOKS = "cpu"  # the profile whose outputs the committed notebooks hold
README = "README.md"
IN_README = "full"  # the profile whose results the README states
KINDS = {".svg", ".png", ".csv", ".json"}
# What the commands `memory` and `measure` write, and no notebook.
OF_MEMORY = ("01_memory*", "01_flops.csv", "01_measured_*")
SWEEP, BENCH = "sweep", "bench"
# commands whose tables and figures have a folder of that name in figures/; the first table must be there
STUDIES = {SWEEP: [SWEEP], "dial": ["dial", "trajectories"], BENCH: [BENCH, "growth"]}


def publish(profile: str | Path) -> list[Path]:
    """Take the results of a finished run into the repository; return what was written.

    Those of `cpu` go into the notebooks, those of another profile to figures/<profile>/, also of a run that holds what
    `measure` wrote and no notebook; the README states the results of figures/full/. Notebook 00 is taken when the run
    has it. Raises `SeriesError`, in one line and before anything is written, for a run that is not finished, is stale,
    or was not made by one clean commit.
    """
    settings = load_settings(profile)
    with locked(folder) if (folder := run_dir(settings)).is_dir() else nullcontext():  # it is read whole
        return _publish(settings, folder)


def _publish(settings: Settings, folder: Path) -> list[Path]:
    """`publish` of a run that is held."""
    with_results(_readme(), figures_dir(settings))  # fails where the README has no place for them
    if tables := only_measured(folder):
        check_measured(tables)
        return [copy_figures(folder / "figures", set()), write_readme()]
    if not settings.is_result:
        raise InputError(
            f"profile {settings.profile} shows that the code runs; its numbers, of {settings.eval_prompts} prompts, "
            "are no results"
        )
    pretraining = series.PRETRAINING
    paths = [
        path
        for path in series.all_notebooks()
        if not path.name.startswith(pretraining) or stamps.read(folder, path.stem)
    ]
    check_finished(paths, settings, folder)
    if settings.profile == IN_NOTEBOOKS:
        for path in paths:
            write_outputs(path, folder / path.name)
        written = paths
    else:
        outputs = {name for path in paths for name in stamps.read(folder, path.stem)["outputs"]}
        written = [copy_figures(folder / "figures", {Path(n).name for n in outputs if n.startswith("figures/")})]
    return [*written, write_readme()]


def publish_study(profile: str | Path, study: str) -> list[Path]:
    """Take tables and figures of a profile's `sweep`, `dial` or `bench` into figures/<study>/; return that folder.

    Raises `MissingError` where there are none, `SeriesError` for one that is not finished or was not made by committed
    code.
    """
    settings = load_settings(profile)
    with locked(run_dir(settings)) if run_dir(settings).is_dir() else nullcontext():
        source = figures_dir(settings)
        source = figures_dir(settings) / BENCH if study == BENCH else figures_dir(settings)
        command = f"python -m lora_distill {study} --profile {settings.profile}"
        known = read_provenance(source) if source.is_dir() else {}
        if study not in known:
            raise MissingError(f"no {study} of profile {settings.profile}; {command} makes it")
        made = {name: known[name] for name in STUDIES[study] if name in known}
        for name in made:
            check(source, made[name]["sha256"])
            check_rows(read_table(source / f"{name}.csv"), made[name].get("commit"), command)
        if study == SWEEP:
            check_sweep(read_table(source / f"{SWEEP}.csv"), command)
        return [_taken(source, repository_root() / "figures" / study, made)]


def _taken(source: Path, target: Path, made: dict[str, dict]) -> Path:
    """Copy tables of a command, with their figures and what made them, into a folder; return it."""
    known = read_provenance(target) if (target / PROVENANCE).is_file() else {}
    for name in made:
        for path in (source / f"{name}.{kind}" for kind in ("csv", "svg", "png")):
            if path.exists() or name in FIGURES:
                _copy(path, target)
    atomic_write(target / PROVENANCE, provenance_text(known | made))
    stamps.write_sums(target)
    return target


def check_rows(rows: list[dict], commit: str | None, command: str) -> None:
    """Raise `SeriesError` unless committed code made all rows, and the table."""
    commits = [commit, *(row["commit"] for row in rows if "commit" in row)]
    if any(not each or each.endswith("-dirty") for each in commits):
        raise SeriesError(f"not made by committed code; delete what the run keeps of it, commit, then {command}")


def check_sweep(rows: list[dict], command: str) -> None:
    """Raise `SeriesError` unless every setting of a sweep has a chosen value."""
    settings = {(row["method"], row["setting"]) for row in rows}
    if open_ones := settings - {(row["method"], row["setting"]) for row in rows if row["chosen"]}:
        raise SeriesError(f"the sweep is not finished: {' of '.join(min(open_ones)[::-1])}; {command} goes on")


def check_finished(paths: list[Path], settings: Settings, folder: Path) -> None:
    """Raise `SeriesError` unless every notebook of a run is finished, unchanged since, and made by one clean commit."""
    again = f"python -m lora_distill reproduce --profile {settings.profile}"
    for path in paths:
        if reason := series.why_stale(path, settings, folder):
            raise SeriesError(f"{path.stem} of profile {settings.profile}: {reason}; {again}")
    commits = {path.stem: stamps.read(folder, path.stem)["commit"] for path in paths}
    made = ", ".join(f"{name} at {series.short(commit)}" for name, commit in commits.items())
    if not all(commit and not commit.endswith("-dirty") for commit in commits.values()):
        raise SeriesError(f"not made by committed code: {made}; commit, then {again} --force")
    if len(set(commits.values())) > 1:
        raise SeriesError(f"made by different commits: {made}; {again} --force")


def only_measured(folder: Path) -> list[Path]:
    """What `measure` left in a run's folder in which no notebook has run; a profile of an architecture has no more."""
    stamped = any(stamps.read(folder, path.stem) for path in series.all_notebooks())
    return [] if stamped else sorted((folder / "figures").glob("01_measured_*.json"))


def check_measured(manifests: list[Path]) -> None:
    """Raise `SeriesError` unless all that `measure` wrote was measured by committed code."""
    for path in manifests:
        with reading(path, "what measured the tables, with its commits"):
            commits = TypeAdapter(list[str]).validate_python(json.loads(path.read_bytes())["commits"], strict=True)
        if not commits or any(commit.endswith("-dirty") for commit in commits):
            raise SeriesError(f"{series.shown(path)}: not measured by committed code; delete the run's cache, commit")


def write_outputs(path: Path, executed: Path) -> None:
    """Put the outputs of an executed copy into a notebook, cell by cell, and note which code they belong to.

    Raises ValueError when the copy was made from other code.
    """
    notebook = report.read_notebook(path)
    ran = {cell.id: cell for cell in report.read_notebook(executed).cells}
    for count, cell in enumerate(series.code_cells(notebook), start=1):
        if cell.id not in ran or ran[cell.id].source != cell.source:
            raise InputError(f"{series.shown(path)} changed after {series.shown(executed)} was made; run it again")
        cell.execution_count = count
        cell.outputs = report.clean_outputs(ran[cell.id].outputs, count)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "lora_distill": {"code": series.code_digest(notebook)},
        }
    )
    atomic_write(path, nbformat.writes(notebook) + "\n")


def stale_outputs(path: Path) -> bool:
    """Whether a committed notebook's outputs were made by other code than it now holds."""
    notebook = report.read_notebook(path)
    return notebook.metadata.get("lora_distill", {}).get("code") != series.code_digest(notebook)


def copy_figures(source: Path, names: set[str]) -> Path:
    """Fill figures/<profile>/ with the named files of a run's figures and the tables of `memory`; return it."""
    target = repository_root() / "figures" / source.parent.name
    target.mkdir(parents=True, exist_ok=True)
    kept = {path.name for folder in (source, target) for pattern in OF_MEMORY for path in folder.glob(pattern)}
    for path in target.iterdir():
        if path.name not in names | kept and not path.is_dir():
            with stamps.deleting(path):
                path.unlink()
    for path in source.iterdir():
        if path.name in names | kept and path.suffix in KINDS:
            _copy(path, target)
    if (source / PROVENANCE).exists():
        provenance = read_provenance(source)
        made = {name: made for name, made in provenance.items() if f"{name}.svg" in names | kept}
        atomic_write(target / PROVENANCE, provenance_text(made))
    stamps.write_sums(target)
    return target


def _copy(path: Path, folder: Path) -> None:
    with whole_file(folder / path.name) as temporary:
        shutil.copyfile(path, temporary)


def write_readme() -> Path:
    """Put the results and verdicts of figures/full/ into the README; return its path."""
    path = repository_root() / README
    atomic_write(path, with_results(_readme(), repository_root() / "figures" / IN_README))
    return path


def _readme() -> str:
    with reading(path := repository_root() / README, "the README in UTF-8"):
        return path.read_text(encoding="utf-8")


def with_results(readme: str, folder: Path) -> str:
    """The README with what a folder of results says: the notebooks' numbers, and the ledger of claims."""
    readme = with_block(readme, "results", f"```\n{report.results_table(folder)}\n```")
    return with_block(readme, "ledger", claims.as_table(claims.ledger(folder)))


def with_block(text: str, name: str, content: str) -> str:
    """A text with what stands between `<!-- name -->` and `<!-- /name -->` replaced. Raises ValueError without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise InputError(f"no block from {start} to {end}")
    return f"{before}{start}\n{content}\n{end}{after}"
