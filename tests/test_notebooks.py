"""The committed notebooks: parameters that agree with the default profile, and outputs that belong to the code."""

import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest

from lora_distill.publish.committed import stale_outputs
from lora_distill.settings import Settings

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
WIDTH = 50  # of a cell's first line in a message


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_form(path):
    notebook = nbformat.read(path, 4)
    assert notebook.nbformat_minor >= 5, "cells need ids"
    assert (notebook.metadata.kernelspec.name, notebook.metadata.kernelspec.language) == ("python3", "python")
    assert not notebook.metadata.keys() & {"widgets", "papermill"}
    assert all(cell.metadata.keys() <= {"tags"} for cell in notebook.cells)
    assert sum("parameters" in tags(cell) for cell in notebook.cells) == 1
    assert not any("injected-parameters" in tags(cell) for cell in notebook.cells)
    assert not [cell.source[:WIDTH] for cell in notebook.cells if not cell.source.strip()], "empty cells"
    assert path.stat().st_size < 1.5e6
    assert str(ROOT) not in path.read_text(), "a path of one machine"


def test_parameters_are_the_default_profile(path):
    namespace: dict = {}
    cell = next(cell for cell in nbformat.read(path, 4).cells if "parameters" in tags(cell))
    exec(cell.source, namespace)
    declared = {name: value for name, value in namespace.items() if not name.startswith("_")}
    defaults = Settings().model_dump()
    assert declared == {name: defaults.get(name) for name in declared}


class TestColab:
    """The first code cell, where `google.colab` is there."""

    @pytest.fixture
    def first_cell(self, path, tmp_path, monkeypatch):
        """Run it in the notebooks folder of `tmp_path`; returns the arguments of its pip."""
        monkeypatch.setitem(sys.modules, "google.colab", object())
        (tmp_path / "notebooks").mkdir()
        monkeypatch.chdir(tmp_path / "notebooks")
        source = next(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")

        def run() -> str:
            calls = []
            shell = SimpleNamespace(run_line_magic=lambda magic, line: calls.append((magic, line)))
            exec(source, {"get_ipython": lambda: shell})
            return calls

        return run

    def test_opened_alone_it_says_what_to_do(self, first_cell, path):
        with pytest.raises(SystemExit, match="git clone the repository"):
            first_cell()

    def test_in_a_checkout_it_installs_and_keeps_the_torch_that_is_there(self, first_cell, tmp_path, path):
        (tmp_path / "pyproject.toml").write_text("")
        assert first_cell() == [("pip", "install -q -c /tmp/torch.txt ..[series,cpu]")]
        assert Path("/tmp/torch.txt").read_text() == f"torch=={version('torch')}"


def test_parameters_are_typed_and_explained(path):
    for name, parameter in papermill.inspect_notebook(path).items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name


def test_outputs_belong_to_the_code(path):
    assert not stale_outputs(path), "make reproduce and make publish"
