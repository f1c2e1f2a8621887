"""The series runner on tiny notebooks: what it reuses, what it runs again, and what it says when one fails."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_distill import __main__ as cli
from lora_distill import settings, storage
from lora_distill.publish import claims, series
from lora_distill.publish.outputs import clean_outputs
from lora_distill.publish.series import SeriesError
from lora_distill.settings import Settings, SettingsError

README = "# A title\n<!-- results --><!-- /results -->\n<!-- ledger --><!-- /ledger -->\n"
PARAMETERS = "profile: str = 'cpu'\nseed: int = 0"


def write_notebook(path: Path, *sources: str) -> None:
    """A notebook with a title, the parameters cell and the given code cells."""
    parameters = new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]})
    code = [new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    cells = [new_markdown_cell("# Title", id="title"), parameters, *code]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with two notebooks and notebook 00, whose package is one file."""
    for folder in ("notebooks", "params", "lora_distill"):
        (tmp_path / folder).mkdir()
    for profile in ("cpu", "full", "other"):
        (tmp_path / "params" / f"{profile}.yaml").write_text(f"profile: {profile}\n")
    (tmp_path / "lora_distill" / "module.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text(README)
    for name in ("00_make", "01_first", "02_second"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "seed + 1")
    for module in (settings, series):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / "lora_distill")
    monkeypatch.setattr(series, "manifest", lambda settings, **more: more)  # the true one waits for torch
    monkeypatch.setattr(series.report, "write", lambda folder, results: folder / "report" / "index.html")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def executed(checkout, monkeypatch):
    """The names of the notebooks executed since this was last cleared; nothing really runs."""
    names = []

    def execute(path, output, settings):
        names.append(path.stem)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(path.read_bytes())

    monkeypatch.setattr(series, "execute", execute)
    return names


def rerun(executed: list[str], **options) -> list[str]:
    """Run the series again; the names of the notebooks that were executed."""
    executed.clear()
    series.reproduce("cpu", **options)
    return list(executed)


class TestReuse:
    def test_runs_in_order_once_and_without_pretraining(self, executed):
        assert rerun(executed) == ["01_first", "02_second"]
        assert rerun(executed) == []

    def test_force(self, executed):
        rerun(executed)
        assert rerun(executed, force=True) == ["01_first", "02_second"]

    def test_force_reuses_no_training_and_no_cache(self, executed, checkout):
        folder = checkout / "runs" / "cpu"
        for kept in ("cache/teacher-1.safetensors", "lora-1/checkpoint.safetensors", "student.safetensors"):
            storage.atomic_write(folder / kept, "")
        rerun(executed)
        assert (folder / "cache").is_dir() and (folder / "lora-1").is_dir()
        rerun(executed, force=True, names=["02_second"])
        assert sorted(path.name for path in folder.glob("*.safetensors")) == ["student.safetensors"]
        assert not (folder / "cache").exists() and not (folder / "lora-1").exists()

    def test_tables_that_are_no_longer_what_it_left(self, executed, checkout):
        rerun(executed)
        storage.atomic_write(checkout / "figures" / "cpu" / "02_table.csv", "a\n1\n")
        assert rerun(executed) == ["02_second"]
        (checkout / "figures" / "cpu" / "02_table.csv").unlink()
        assert rerun(executed) == ["02_second"]

    def test_changed_setting(self, executed, checkout):
        rerun(executed)
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nseed: 1\n")
        assert rerun(executed) == ["01_first", "02_second"]

    def test_a_setting_that_it_did_not_read(self, executed, checkout, monkeypatch):
        execute = series.execute
        monkeypatch.setattr(series, "execute", lambda *arguments: execute(*arguments) or ["profile", "seed"])
        rerun(executed)
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nbatch_size: 7\n")
        assert rerun(executed) == []
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nseed: 1\n")
        assert rerun(executed) == ["01_first", "02_second"]

    def test_changed_package(self, executed, checkout):
        rerun(executed)
        (checkout / "lora_distill" / "module.py").write_text("x = 2\n")
        assert rerun(executed) == ["01_first", "02_second"]

    def test_changed_code_of_the_last(self, executed, checkout):
        rerun(executed)
        write_notebook(checkout / "notebooks" / "02_second.ipynb", "seed + 2")
        assert rerun(executed) == ["02_second"]

    def test_changed_prose(self, executed, checkout):
        rerun(executed)
        path = checkout / "notebooks" / "01_first.ipynb"
        path.write_text(path.read_text().replace("# Title", "# Another title"))
        assert rerun(executed) == []

    def test_an_earlier_notebook_that_ran_again_counts_where_its_files_are_named(self, executed, checkout, monkeypatch):
        write_notebook(checkout / "notebooks" / "02_second.ipynb", "path = folder / '01_table.csv'")
        write_notebook(checkout / "notebooks" / "03_third.ipynb", "path = folder / '03_table.csv'")
        rerun(executed)
        monkeypatch.setattr(series, "now", lambda: "later")
        assert rerun(executed, force=True, names=["01_first"]) == ["01_first"]
        assert rerun(executed) == ["02_second"]

    def test_damaged_stamp(self, executed, checkout):
        rerun(executed)
        (checkout / "runs" / "cpu" / "02_second.stamp.json").write_text('{"key": ')
        assert rerun(executed) == ["02_second"]

    def test_profiles_keep_apart(self, executed, checkout):
        rerun(executed)
        series.reproduce("other")
        assert rerun(executed) == []
        assert (checkout / "runs" / "other" / "manifest.json").is_file()


def test_named_notebook(executed):
    assert rerun(executed, names=["00_make.ipynb"]) == ["00_make"]
    with pytest.raises(ValueError, match="no notebook '09'; there are: 00_make, 01_first, 02_second"):
        series.reproduce("cpu", names=["09"])


def test_bad_settings_stop_before_anything_runs(executed, checkout):
    (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nsede: 1\n")
    with pytest.raises(SettingsError, match="did you mean 'seed'"):
        rerun(executed)
    assert not executed


def test_no_notebooks(checkout):
    for path in (checkout / "notebooks").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no notebooks in"):
        series.reproduce("cpu")


def test_results_are_printed(executed, checkout, capsys):
    figures = checkout / "figures" / "cpu"
    figures.mkdir(parents=True)
    (figures / "01_results.json").write_text(json.dumps({"Memory": {"LoRA": "1.2 MB", "full copy": "10 MB"}}))
    rerun(executed)
    assert "Memory\n  LoRA       1.2 MB\n  full copy  10 MB\n" in capsys.readouterr().out


def test_results_and_verdicts_take_the_place_of_those_in_the_readme(checkout):
    figures = checkout / "figures" / "full"
    storage.atomic_write(figures / "01_results.json", json.dumps({"Memory": {"LoRA": "1 MB"}}))
    once = series.write_readme().read_text()
    assert once.startswith(
        "# A title\n<!-- results -->\n```\nMemory\n  LoRA  1 MB\n```\n<!-- /results -->\n<!-- ledger -->"
    )
    assert once.count("| not testable here |") == len(claims.load())
    assert series.with_results(once, figures) == once


def test_a_block_that_is_not_there():
    with pytest.raises(ValueError, match="no block from <!-- results --> to <!-- /results -->"):
        series.with_block("<!-- results -->", "results", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}['nope']", "01_first: failed in cell 3: KeyError: 'nope'; see runs/cpu/01_first.ipynb"),
        ("import os; os._exit(1)", "01_first: failed: its kernel died, most often for want of memory; see"),
        ("raise SystemExit(0)", "01_first: failed: it stopped before its last cell; see"),
    ],
)
def test_failure(checkout, source, message):
    write_notebook(checkout / "notebooks" / "01_first.ipynb", source, "1")
    stamp = checkout / "runs" / "cpu" / "01_first.stamp.json"
    storage.atomic_write(stamp, "{}")
    with pytest.raises(SeriesError) as failure:
        series.reproduce("cpu")
    assert str(failure.value).startswith(message) and "\n" not in str(failure.value)
    assert not stamp.exists() and not (checkout / "runs" / "cpu" / "02_second.ipynb").exists()


def test_failure_is_one_line_of_the_command(checkout, monkeypatch, capsys):
    def die(*_, **__):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(series, "_papermill", die)
    monkeypatch.setattr(sys, "argv", ["lora_distill", "reproduce"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.splitlines() == [
        "01_first: failed: its kernel died, most often for want of memory; see runs/cpu/01_first.ipynb"
    ]


def test_the_stamp_says_which_settings_a_notebook_read(checkout):
    code = "from lora_distill.settings import from_notebook\nsettings = from_notebook(globals())\nsettings.batch_size"
    write_notebook(checkout / "notebooks" / "01_first.ipynb", code)
    series.reproduce("cpu", names=["01_first"])
    stamp = json.loads((checkout / "runs" / "cpu" / "01_first.stamp.json").read_text())
    assert stamp["settings_read"] == ["batch_size"]


def test_commit_outputs(checkout):
    """Outputs go to their cells, without a trace of the runner; a change of code makes them stale."""
    chatter = (
        "import sys\nfor i in range(3):\n    print(f'\\r{i}', end='', flush=True)\nprint('noise', file=sys.stderr)"
    )
    first = checkout / "notebooks" / "01_first.ipynb"
    write_notebook(first, "seed + 1", chatter)
    assert series.stale_outputs(first)
    series.commit_outputs()
    notebook = nbformat.read(first, 4)
    title, parameters, sum_, progress = notebook.cells
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2, 3]
    assert (parameters.source, parameters.metadata) == (PARAMETERS, {"tags": ["parameters"]})
    assert sum_.outputs == [new_output("execute_result", {"text/plain": "1"}, execution_count=2)]
    assert progress.outputs == [new_output("stream", name="stdout", text="2")]
    assert notebook.metadata.keys() == {"kernelspec", "language_info", "lora_distill"} and not title.metadata
    assert not series.stale_outputs(first)

    write_notebook(first, "seed + 2", chatter)
    assert series.stale_outputs(first)
    with pytest.raises(ValueError, match="changed after"):
        series.write_outputs(first, checkout / "runs" / "cpu" / "01_first.ipynb")


def test_widgets_are_left_out():
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    assert clean_outputs([widget], 1) == []


def test_prepare(checkout):
    folder = series.prepare("other")
    notebook = nbformat.read(folder / "01_first.ipynb", 4)
    injected = next(cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert 'profile = "other"' in injected.source and "lora_rank = 4" in injected.source
    assert [path.stem for path in sorted(folder.iterdir())] == ["00_make", "01_first", "02_second"]


def test_atomic_write_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch):
    def full_disk(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    storage.atomic_write(path, "old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        storage.atomic_write(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_manifest_says_what_made_a_result(monkeypatch):
    account = storage.manifest(Settings(), notebooks={})
    assert account["settings"]["profile"] == "cpu" and {"python", "torch"} <= account["versions"].keys()
    assert "cores" in account["device"] or "NVIDIA" in account["device"]
    json.dumps(account)
    monkeypatch.setenv("PATH", "")
    assert storage.git_commit() is None
