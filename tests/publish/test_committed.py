"""What the repository takes from a run, and from which runs it takes nothing."""

import json
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_distill import settings, storage, writing
from lora_distill.publish import claims, committed, figures, report, series, stamps
from lora_distill.publish.series import SeriesError

README = "# A title\n<!-- results --><!-- /results -->\n<!-- ledger --><!-- /ledger -->\n"
PARAMETERS = "profile: str = 'cpu'\nseed: int = 0"
CHATTER = "import sys\nfor i in range(3):\n    print(f'\\r{i}', end='', flush=True)\nprint('noise', file=sys.stderr)"
NAMES = ("00_make", "01_first", "02_second")


def write_notebook(path: Path, source: str = "seed + 1") -> None:
    cells = [
        new_markdown_cell("# Title", id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(source, id="sum"),
        new_code_cell(CHATTER, id="chatter"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with three notebooks, whose clean commit is `commit[0]`."""
    for folder in ("notebooks", "params", "figures/full"):
        (tmp_path / folder).mkdir(parents=True)
    for profile in ("cpu", "full", "other"):
        (tmp_path / "params" / f"{profile}.yaml").write_text(f"profile: {profile}\n", encoding="utf-8")
    (tmp_path / "params" / "smoke.yaml").write_text("profile: smoke\neval_prompts: 4\n", encoding="utf-8")
    for name in NAMES:
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "lora_distill")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def commit(monkeypatch) -> list[str]:
    """The commit of the checkout, in a list, so that a test can change it."""
    current = ["1a2b3c4d5e"]
    monkeypatch.setattr(series, "git_commit", lambda: current[0])
    return current


@pytest.fixture
def run(checkout, commit, monkeypatch):
    """Run notebooks of a profile; nothing really runs, but each leaves a figure and a table."""

    def execute(path, output, settings, made_by=1):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(path.read_bytes())
        figures, number = output.parent / "figures", path.stem[:2]
        for kind in ("svg", "png", "csv", "pdf"):
            storage.atomic_write(figures / f"{number}_x.{kind}", f"{number} {settings.profile}")
        storage.atomic_write(figures / f"{number}_results.json", json.dumps({"Found": {number: "1 MB"}}))
        storage.atomic_write(figures / "provenance.json", json.dumps({"01_x": {}, "02_x": {}, "02_old": {}}))

    def run(profile: str, *names: str) -> None:
        checked = settings.load_settings(profile)
        for name in names or NAMES[1:]:
            series.run(checkout / "notebooks" / f"{name}.ipynb", checked, settings.run_dir(checked))

    monkeypatch.setattr(series, "execute", execute)
    return run


def test_outputs_go_to_their_cells_without_a_trace_of_the_runner(checkout, commit):
    """A change of code makes them stale. The notebooks really run."""
    first = checkout / "notebooks" / "01_first.ipynb"
    assert committed.stale_outputs(first)
    checked = settings.load_settings("cpu")
    for name in NAMES[1:]:
        series.run(checkout / "notebooks" / f"{name}.ipynb", checked, settings.run_dir(checked))
    assert committed.publish("cpu") == [
        *(checkout / "notebooks" / f"{n}.ipynb" for n in NAMES[1:]),
        checkout / "README.md",
    ]
    notebook = nbformat.read(first, 4)
    title, parameters, sum_, progress = notebook.cells
    assert [cell.execution_count for cell in notebook.cells[1:]] == [1, 2, 3]
    assert (parameters.source, parameters.metadata) == (PARAMETERS, {"tags": ["parameters"]})
    assert sum_.outputs == [new_output("execute_result", {"text/plain": "1"}, execution_count=2)]
    assert progress.outputs == [new_output("stream", name="stdout", text="2")]
    assert notebook.metadata.keys() == {"kernelspec", "language_info", "lora_distill"} and not title.metadata
    assert not committed.stale_outputs(first)

    write_notebook(first, "seed + 2")
    assert committed.stale_outputs(first)
    with pytest.raises(ValueError, match="changed after"):
        committed.write_outputs(first, checkout / "runs" / "cpu" / "01_first.ipynb")


def test_notebook_00_is_taken_when_the_run_has_it(checkout, run):
    run("cpu")
    make = checkout / "notebooks" / "00_make.ipynb"
    before = make.read_bytes()
    committed.publish("cpu")
    assert make.read_bytes() == before
    run("cpu", "00_make")
    assert make in committed.publish("cpu")


def test_figures_of_another_profile_take_the_place_of_the_committed_ones(checkout, run):
    target = checkout / "figures" / "other"
    for old in ("02_old.svg", "03_old.csv", "01_memory_simulated.csv"):
        storage.atomic_write(target / old, "old")
    run("other")
    storage.atomic_write(checkout / "runs" / "other" / "figures" / "02_left_behind.csv", "by older code")
    assert committed.publish("other") == [target, checkout / "README.md"]
    kept = {f"{number}_x.{kind}" for number in ("01", "02") for kind in ("svg", "png", "csv")}
    kept |= {"01_results.json", "02_results.json", "provenance.json", "01_memory_simulated.csv", "SHA256SUMS"}
    assert {path.name for path in target.iterdir()} == kept
    assert (target / "01_x.svg").read_text(encoding="utf-8") == "01 other"
    sums = {"01_memory_simulated.csv", "01_results.json", "01_x.csv", "02_results.json", "02_x.csv", "provenance.json"}
    assert stamps.read_sums(target).keys() == sums
    assert json.loads((target / "provenance.json").read_text(encoding="utf-8")).keys() == {"01_x", "02_x"}


def test_the_readme_states_results_and_verdicts_of_full(checkout, run):
    run("full")
    committed.publish("full")
    once = (checkout / "README.md").read_text(encoding="utf-8")
    assert once.startswith(
        "# A title\n<!-- results -->\n```\nFound\n  01  1 MB\n\nFound\n  02  1 MB\n```\n<!-- /results -->"
    )
    assert once.count("| not testable here |") + once.count("| cannot tell |") == len(claims.load())
    committed.publish("full")
    assert (checkout / "README.md").read_text(encoding="utf-8") == once


class TestRefusal:
    @pytest.fixture
    def refusal(self, checkout):
        """Why a run of cpu is refused; nothing is written."""

        def refusal() -> str:
            before = {path: path.read_bytes() for path in (checkout / "notebooks").iterdir()}
            with pytest.raises(SeriesError) as error:
                committed.publish("cpu")
            assert {path: path.read_bytes() for path in (checkout / "notebooks").iterdir()} == before
            assert "\n" not in str(error.value)
            return str(error.value)

        return refusal

    def test_not_finished(self, run, refusal):
        run("cpu", "01_first")
        assert refusal() == (
            "02_second of profile cpu: it has not run to its end; python -m lora_distill reproduce --profile cpu"
        )

    def test_outputs_changed(self, run, refusal, checkout):
        run("cpu")
        (checkout / "runs" / "cpu" / "figures" / "02_x.csv").write_text("by hand", encoding="utf-8")
        assert refusal().startswith("02_second of profile cpu: figures/02_x.csv was changed since it ran; ")
        (checkout / "runs" / "cpu" / "figures" / "02_x.csv").unlink()
        assert refusal().startswith("02_second of profile cpu: figures/02_x.csv is missing; ")

    def test_code_changed(self, run, refusal, checkout):
        run("cpu")
        write_notebook(checkout / "notebooks" / "01_first.ipynb", "seed + 2")
        assert refusal().startswith("01_first of profile cpu: its code, the settings, ")

    def test_different_commits(self, run, refusal, commit):
        run("cpu", "01_first")
        commit[0] = "9f8e7d6c5b"
        run("cpu", "02_second")
        assert refusal().startswith("made by different commits: 01_first at 1a2b3c4, 02_second at 9f8e7d6; ")

    @pytest.mark.parametrize(("found", "shown"), [("1a2b3c4d5e-dirty", "1a2b3c4-dirty"), (None, "no commit")])
    def test_code_that_is_not_committed(self, run, refusal, commit, found, shown):
        commit[0] = found
        run("cpu")
        assert refusal().startswith(f"not made by committed code: 01_first at {shown}, 02_second at {shown}; commit, ")

    def test_a_run_of_a_few_prompts_is_no_result(self, run):
        run("smoke")
        with pytest.raises(ValueError, match="its numbers, of 4 prompts, are no results"):
            committed.publish("smoke")


def test_a_block_that_is_not_there():
    with pytest.raises(ValueError, match="no block from <!-- results --> to <!-- /results -->"):
        committed.with_block("<!-- results -->", "results", "")


def test_widgets_are_left_out():
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    assert report.clean_outputs([widget], 1) == []


class TestMeasured:
    """What the command `measure` wrote, in a run without notebooks."""

    @pytest.fixture
    def measured(self, checkout) -> Path:
        folder = checkout / "runs" / "other" / "figures"
        storage.save_table(folder / "01_measured_memory.csv", [{"scheme": "a", "measured_gb": 1.5}])
        (folder / "01_measured_cpu.json").write_text(json.dumps({"commits": ["1a2b3c4d5e"]}), encoding="utf-8")
        return folder

    def test_its_tables_are_taken_and_nothing_there_is_lost(self, checkout, measured):
        (checkout / "figures" / "other").mkdir()
        for name in ("01_flops.csv", "01_memory.json"):
            (checkout / "figures" / "other" / name).write_text("{}", encoding="utf-8")
        committed.publish("other")
        there = {path.name for path in (checkout / "figures" / "other").iterdir()}
        assert there == {
            "01_flops.csv", "01_memory.json", "01_measured_memory.csv", "01_measured_cpu.json", "SHA256SUMS"
        }  # fmt: skip

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"{}", b'{"commits": 3}', b'{"commits": [1]}', b"\xff\xfe{\x00}\x00", b"null"]
    )
    def test_a_file_that_does_not_say_what_measured_is_one_line(self, measured, content):
        (measured / "01_measured_cpu.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"01_measured_cpu.json: expected what measured the tables") as error:
            committed.publish("other")
        assert "\n" not in str(error.value)

    def test_what_uncommitted_code_measured_is_refused(self, checkout, measured):
        (measured / "01_measured_cpu.json").write_text(json.dumps({"commits": ["1a2b3c4d5e-dirty"]}), encoding="utf-8")
        with pytest.raises(SeriesError, match="not measured by committed code"):
            committed.publish("other")
        assert not (checkout / "figures" / "other").exists()


SWEPT = {"method": "a", "setting": "learning_rate", "value": 1e-3, "default": True, "chosen": True, "n": 96,
         "errors": 0.2, "errors_se": 0.0, "fit_error": 0.1, "fit_error_se": 0.0, "commit": "1a2b3c4d5e"}  # fmt: skip


class TestSweep:
    """What the command `sweep` wrote, taken into figures/sweep/ whatever the notebooks of the run are."""

    @pytest.fixture
    def swept(self, checkout, monkeypatch):
        """Save a sweep of profile cpu whose row has some other values."""

        def save(**other):
            monkeypatch.setattr(figures, "git_commit", lambda: "1a2b3c4d5e")
            figures.save("sweep", settings.load_settings("cpu"), [{**SWEPT, **other}])
            return checkout / "figures" / "sweep"

        return save

    def test_table_and_figure_are_taken_with_what_made_them(self, swept):
        folder = swept()
        assert committed.publish_study("cpu", "sweep") == [folder]
        assert {path.name for path in folder.iterdir()} == {
            "sweep.csv", "sweep.svg", "sweep.png", "provenance.json", "SHA256SUMS"
        }  # fmt: skip
        assert figures.read_provenance(folder)["sweep"]["profile"] == "cpu"
        assert stamps.read_sums(folder).keys() == {"sweep.csv", "provenance.json"}
        assert figures.redraw(folder) == [folder / "sweep.svg"]

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"chosen": False}, "the sweep is not finished: learning_rate of a; python -m lora_distill sweep"),
            (
                {"commit": "1a2b3c4d5e-dirty"},
                "not made by committed code; delete what the run keeps of it",
            ),
            (
                {"commit": None},
                "not made by committed code; delete what the run keeps of it",
            ),
        ],
    )
    def test_one_that_is_not_finished_or_not_of_a_commit_is_refused(self, swept, other, message):
        folder = swept(**other)
        with pytest.raises(SeriesError, match=message):
            committed.publish_study("cpu", "sweep")
        assert not folder.exists()

    def test_one_that_was_edited_is_refused(self, swept, checkout):
        swept()
        table = checkout / "runs" / "cpu" / "figures" / "sweep.csv"
        table.write_text(table.read_text(encoding="utf-8").replace("0.2", "0.1"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"sweep\.csv is damaged or was changed by hand"):
            committed.publish_study("cpu", "sweep")

    def test_where_there_is_none_the_command_is_named(self, checkout):
        with pytest.raises(FileNotFoundError, match="no sweep of profile cpu; python -m lora_distill sweep --profile"):
            committed.publish_study("cpu", "sweep")


class TestBench:
    """What `bench` and `bench --growth` wrote, taken into figures/bench/."""

    @pytest.fixture
    def measured(self, checkout, monkeypatch):
        """Save the table of bench, and that of growth where it has rows, as made by a commit."""

        def save(commit: str | None = "1a2b3c4d5e", growth: bool = False) -> Path:
            monkeypatch.setattr(figures, "git_commit", lambda: commit)
            folder, chosen = checkout / "runs" / "cpu" / "figures" / "bench", settings.load_settings("cpu")
            figures.save_rows("bench", chosen, [{"subject": "a", "times_as_fast": 1.5}], folder)
            if growth:
                row = {"panel": "batch", "value": 1, "method": "LCM-LoRA", "images_per_s": 3.0, "peak_mb": 500.0}
                figures.save("growth", chosen, [row], folder=folder)
            return checkout / "figures" / "bench"

        return save

    @pytest.mark.parametrize("growth", [False, True])
    def test_tables_and_figure_are_taken_with_what_made_them(self, measured, growth):
        folder = measured(growth=growth)
        assert committed.publish_study("cpu", "bench") == [folder]
        names = {"bench.csv", "provenance.json"} | ({"growth.csv"} if growth else set())
        pictures = {"growth.svg", "growth.png"} if growth else set()
        assert {path.name for path in folder.iterdir()} == names | pictures | {"SHA256SUMS"}
        assert stamps.read_sums(folder).keys() == names
        assert figures.read_provenance(folder)["bench"]["commit"] == "1a2b3c4d5e"

    @pytest.mark.parametrize("commit", ["1a2b3c4d5e-dirty", None])
    def test_what_no_commit_made_is_refused(self, measured, commit):
        folder = measured(commit)
        with pytest.raises(SeriesError, match="not made by committed code; delete what the run keeps"):
            committed.publish_study("cpu", "bench")
        assert not folder.exists()

    def test_one_that_was_edited_is_refused(self, measured, checkout):
        measured()
        (checkout / "runs" / "cpu" / "figures" / "bench" / "bench.csv").write_text("subject\nb\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"bench\.csv is damaged or was changed by hand"):
            committed.publish_study("cpu", "bench")

    def test_where_there_is_none_the_command_is_named(self, checkout):
        with pytest.raises(FileNotFoundError, match="no bench of profile cpu; python -m lora_distill bench --profile"):
            committed.publish_study("cpu", "bench")


def test_the_readme_is_utf_8_whatever_the_locale(checkout, monkeypatch):
    (checkout / "README.md").write_text(README.replace("A title", "Fréchet → 東京"), encoding="utf-8")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="latin-1": read(path, encoding))
    committed.write_readme()
    assert (checkout / "README.md").read_bytes().startswith("# Fréchet → 東京\n".encode())


def test_a_readme_without_a_place_for_results_stops_before_anything_is_written(checkout, run):
    run("other")
    (checkout / "README.md").write_text("# A title\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no block from <!-- results -->"):
        committed.publish("other")
    assert not (checkout / "figures" / "other").exists()


def test_a_folder_among_the_committed_figures_stays(checkout, run):
    run("other")
    storage.atomic_write(checkout / "figures" / "other" / "mine" / "notes.txt", "kept")
    committed.publish("other")
    assert (checkout / "figures" / "other" / "mine" / "notes.txt").exists()


def test_a_readme_in_another_encoding_is_one_line(checkout):
    (checkout / "README.md").write_bytes(README.replace("A title", "Fréchet").encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md: expected the README in UTF-8"):
        committed.write_readme()


def test_a_run_that_is_being_written_is_not_published(checkout, run):
    run("cpu")
    with (
        writing.locked(checkout / "runs" / "cpu"),
        pytest.raises(RuntimeError, match="writes there"),
    ):
        committed.publish("cpu")
    committed.publish("cpu")
