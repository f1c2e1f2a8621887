"""The committed notebooks: parameters that agree with the default profile, and outputs that belong to the code."""

from pathlib import Path

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


def test_parameters_are_typed_and_explained(path):
    for name, parameter in papermill.inspect_notebook(path).items():
        assert parameter["inferred_type_name"] != "None" and parameter["help"], name


def test_outputs_belong_to_the_code(path):
    assert not stale_outputs(path), "make reproduce and make publish"
