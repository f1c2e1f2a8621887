"""A notebook's parameters: what its cells assigned when they last ran, in a real IPython, not all that it remembers."""

from pathlib import Path

import nbformat
import pytest

from lora_distill.parameters import assigned, parameters
from lora_distill.settings import from_notebook, load_settings

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))
CELL_1 = 'profile: str = "cpu"  # name of the run\nlora_rank: int = 4'
CELL_2 = """
import math
from lora_distill.settings import from_notebook
settings = from_notebook(globals())
tables, GB = [], 1e9
"""
LATER = "lora = {'rank': 4}\nw0, rows = 1, [2]\ntrain_setps = 3\nseeds = [1]\nfor number in rows:\n    found = number"


@pytest.fixture
def run():
    """Run cells in one IPython, as a notebook does: the settings that the last one left, or its error as text."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.showtraceback = lambda *_, **__: None

    def cells(*sources: str):
        for source in sources:
            ran = shell.run_cell(source, store_history=True, silent=False)
        return shell.user_ns["settings"] if ran.success else str(ran.error_in_exec)

    return cells


MISSPELT = "the parameters cell: unknown key 'lora_rnak'; did you mean 'lora_rank'?"


def test_the_cells_again_after_later_ones_are_the_new_values(run):
    assert run(CELL_1, CELL_2).lora_rank == 4
    run(LATER)
    assert run(CELL_1.replace("4", "8"), CELL_2).lora_rank == 8
    assert run(CELL_2).lora_rank == 8


def test_a_misspelt_key_is_refused_each_time(run):
    misspelt = CELL_1.replace("rank", "rnak")
    for _ in range(3):
        assert run(misspelt, CELL_2) == MISSPELT
        assert run(CELL_2) == MISSPELT


def test_a_key_that_is_misspelt_later_is_refused(run):
    run(CELL_1, CELL_2, LATER)
    assert run(CELL_1.replace("rank", "rnak"), CELL_2) == MISSPELT


def test_a_misspelling_that_was_mended_is_forgotten(run):
    assert run(CELL_1.replace("rank", "rnak"), CELL_2) == MISSPELT
    assert run(CELL_1, CELL_2).lora_rank == 4
    assert run(LATER, CELL_2).lora_rank == 4


@pytest.mark.parametrize(
    "cell",
    [
        "lora_rnak = 8",
        "# mine\nlora_rnak: int = 8",
        "if True:\n    lora_rnak = 8",
        "a, lora_rnak = 8, 9",
        "lora_rnak = 4 + 4",
    ],
)
def test_a_cell_between_the_two_belongs_to_them(run, cell):
    assert "unknown key" in run(CELL_1, cell, CELL_2)
    assert run(CELL_1, cell.replace("lora_rnak", "lora_rank").replace("a, ", "batch_size, "), CELL_2).lora_rank != 4


def test_cells_of_papermill_add_to_the_parameters_cell(run):
    assert run(CELL_1, "# Parameters\nlora_rnak = 8", CELL_2) == MISSPELT
    assert run(CELL_1, "# Parameters\nprofile = 'cpu'\nlora_rnak = 8", CELL_2) == MISSPELT
    assert run(CELL_1, "# Parameters\nlora_rank = 8", CELL_2).lora_rank == 8
    run(LATER)
    assert run("# Parameters\nlora_rnak = 8", CELL_2) == MISSPELT


def test_what_is_no_assignment_and_what_ran_before_is_no_parameter(run):
    run("x = 3", "import os\ndef f():\n    a = 1", "!true", "this is no Python")
    assert run(CELL_1, "import os\nimport re as w0\nclass A:\n    b = 1", CELL_2).profile == "cpu"


def test_one_cell_of_both_works_again_and_again(run):
    for _ in range(3):
        assert run(f"{CELL_1}\n{CELL_2}").lora_rank == 4
    assert run(f"{CELL_1}\nlora_rnak = 8\n{CELL_2}") == MISSPELT


def test_a_name_that_was_deleted_is_no_parameter(run):
    assert run(CELL_1, "lora_rnak = 3\ndel lora_rnak", CELL_2).lora_rank == 4


def test_without_ipython_all_names_count_once_and_the_keys_always():
    namespace = {"lora_rank": 8, "setps": 3, "_private": 1, "math": pytest}
    assert parameters(namespace, {"lora_rank"}) == {"lora_rank": 8, "setps": 3}
    assert parameters(namespace, {"lora_rank"}) == {"lora_rank": 8}


@pytest.mark.parametrize(
    "cell",
    [
        "import os\ndevice = os.environ.get('X', 'cpu')",
        "for seed in [0, 1, 2]:\n    pass",
        "for lora_rank, batch_size in [(1, 2)]:\n    pass",
        "data, style = object(), object()",
        "if True:\n    train_steps = int(3)",
        "lora_rank = len([1])",
    ],
)
def test_what_later_cells_compute_under_a_key_s_name_changes_no_setting(run, cell):
    before = run(CELL_1, CELL_2)
    run(cell)
    assert run(CELL_2) == before
    assert run(CELL_1, CELL_2) == before


def test_a_key_that_is_written_out_counts_wherever_it_stands(run):
    assert run("train_steps = 100", CELL_1, CELL_2).train_steps == 100
    run(LATER, "learning_rate = 1.0e-4\nlora_rank: int = 2")
    assert (run(CELL_2).learning_rate, run(CELL_2).lora_rank) == (1e-4, 2)
    run("train_steps *= 2")
    assert "unknown" not in str(run(CELL_2))
    run("globals().update(batch_size=7)")
    assert run(CELL_2).batch_size == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_names_of_every_notebook_s_later_cells_are_no_parameters(path):
    sources = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    known = load_settings("cpu").model_dump().keys()
    names = [assigned(run, known)[0].keys() for run in (sources[:2], sources, sources + sources[:3])]
    assert "profile" in names[0] and names[0] == names[1] == names[2] <= known


# ---------------------------------------------------------------------------------------------- a name without values


def test_a_profile_s_name_with_other_values_is_said_with_what_takes_them_all(capsys):
    settings = from_notebook({"profile": "smoke"})
    said = capsys.readouterr().out
    assert said.startswith("profile smoke: not as in params/smoke.yaml, where ") and said.count("\n") == 1
    line = said.partition("all of it: ")[2]
    left = {}
    exec(line, left)
    assert left["settings"] == load_settings("smoke") != settings


@pytest.mark.parametrize("name", ["cpu", "smoke"])
def test_nothing_is_said_of_a_profile_with_its_values(capsys, name):
    assert from_notebook(load_settings(name).model_dump()) == load_settings(name)
    assert from_notebook({"profile": "mine", "lora_rank": 8}).lora_rank == 8
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("magic", ["%%time", "%%capture"])
def test_a_magic_above_the_parameters_hides_no_misspelt_key(run, magic):
    assert run(f"{magic}\n{CELL_1}", CELL_2).lora_rank == 4
    assert run(f"{magic}\n{CELL_1.replace('rank', 'rnak')}", CELL_2) == MISSPELT


@pytest.mark.parametrize(
    "source",
    ["%time lora_rank = 8", "(lora_rank := 8)", "globals()['lora_rank'] = 8", "exec('lora_rank = 8')"],
)
def test_the_value_counts_that_is_there_however_it_was_set(run, source):
    assert run(CELL_1, source, CELL_2).lora_rank == 8


def test_a_later_import_of_a_key_leaves_the_written_value(run):
    run(CELL_1 + "\nstyle = 'fluent'", CELL_2, "from lora_distill.publish import claims as style")
    assert run(CELL_2).style == "fluent"
