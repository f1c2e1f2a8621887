"""The series runner on tiny notebooks: what it reuses, what it runs again, and what it says when one fails."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.iorw import LocalHandler

import lora_distill
from lora_distill import __main__ as cli
from lora_distill import settings, storage, writing
from lora_distill.errors import InputError, RunError
from lora_distill.publish import report, series, stamps
from lora_distill.publish.series import SeriesError
from lora_distill.settings import Settings, SettingsError

WRITE_REPORT = report.write  # `checkout` puts something else in its place
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
    """A repository with two notebooks and notebook 00."""
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    for profile in ("cpu", "other"):
        (tmp_path / "params" / f"{profile}.yaml").write_text(f"profile: {profile}\n", encoding="utf-8")
    for name in ("00_make", "01_first", "02_second"):
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", "seed + 1")
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "lora_distill")
    monkeypatch.setattr(series.report, "write", lambda folder: folder / "report" / "index.html")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def executed(checkout, monkeypatch):
    """The names of the notebooks executed since this was last cleared; nothing really runs."""
    names = []

    def execute(path, output, settings, made_by=1):
        names.append(path.stem)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(path.read_bytes())
        for file in (
            f"{path.stem}_images.safetensors",
            f"figures/{path.stem[:2]}_table.csv",
            "figures/provenance.json",
        ):
            storage.atomic_write(output.parent / file, path.stem)

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

    def test_force_deletes_trainings_and_nothing_else(self, executed, checkout):
        folder = checkout / "runs" / "cpu"
        trainings = ("lora-1/checkpoint.safetensors", "pretraining/short/unet/result.safetensors")
        others = (
            "cache/teacher-1.safetensors",
            "cache/unet-graph-1.safetensors",
            "inputs/sd15/model_index.json",
            "student.safetensors",
        )
        for kept in (*trainings, *others):
            storage.atomic_write(folder / kept, "")
        rerun(executed)
        assert all((folder / path).exists() for path in trainings)
        assert rerun(executed, force=True, names=["02_second"]) == ["02_second"]
        assert not any((folder / path).exists() for path in trainings)
        assert all((folder / path).exists() for path in others)

    @pytest.mark.parametrize("file", ["02_second.ipynb", "02_second_images.safetensors", "figures/02_table.csv"])
    @pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("changed", encoding="utf-8")])
    def test_outputs_that_are_no_longer_what_it_left(self, executed, checkout, file, change):
        rerun(executed)
        change(checkout / "runs" / "cpu" / file)
        assert rerun(executed) == ["02_second"]
        assert rerun(executed) == []

    def test_the_provenance_of_figures_is_shared(self, executed, checkout):
        rerun(executed)
        (checkout / "runs" / "cpu" / "figures" / "provenance.json").unlink()
        assert rerun(executed) == []

    def test_the_stamp_names_the_files_that_the_notebook_wrote(self, executed, checkout):
        storage.atomic_write(checkout / "runs" / "cpu" / "student.safetensors", "of another")
        storage.atomic_write(checkout / "runs" / "cpu" / "lora-1" / "result.safetensors", "")
        rerun(executed)
        stamp = stamps.read(checkout / "runs" / "cpu", "01_first")
        assert list(stamp["outputs"]) == ["01_first.ipynb", "01_first_images.safetensors", "figures/01_table.csv"]

    def test_it_says_which_commit_made_what_is_up_to_date(self, executed, monkeypatch, capsys):
        monkeypatch.setattr(series, "git_commit", lambda: "1a2b3c4d5e6f-dirty")
        rerun(executed)
        monkeypatch.setattr(series, "git_commit", lambda: "another")
        rerun(executed)
        assert "01_first: up to date, made at 1a2b3c4-dirty\n" in capsys.readouterr().out

    def test_changed_setting(self, executed, checkout):
        rerun(executed)
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nseed: 1\n", encoding="utf-8")
        assert rerun(executed) == ["01_first", "02_second"]

    def test_a_new_version_of_the_results(self, executed, monkeypatch):
        rerun(executed)
        monkeypatch.setattr(series, "RESULTS", series.RESULTS + 1)
        assert rerun(executed) == ["01_first", "02_second"]

    def test_changed_code_of_the_last(self, executed, checkout):
        rerun(executed)
        write_notebook(checkout / "notebooks" / "02_second.ipynb", "seed + 2")
        assert rerun(executed) == ["02_second"]

    def test_changed_prose(self, executed, checkout):
        rerun(executed)
        path = checkout / "notebooks" / "01_first.ipynb"
        path.write_text(path.read_text(encoding="utf-8").replace("# Title", "# Another title"))
        assert rerun(executed) == []

    def test_an_earlier_notebook_that_ran_again_counts_where_its_files_are_read(self, executed, checkout, monkeypatch):
        write_notebook(checkout / "notebooks" / "03_third.ipynb", "seed")
        monkeypatch.setattr(series, "READS", {"02": ("01",)})
        rerun(executed)
        monkeypatch.setattr(series, "now", lambda: "later")
        assert rerun(executed, force=True, names=["01_first"]) == ["01_first"]
        assert rerun(executed) == ["02_second"]

    def test_damaged_stamp(self, executed, checkout):
        rerun(executed)
        for damaged in ('{"key": ', "{}"):
            (checkout / "runs" / "cpu" / "02_second.stamp.json").write_text(damaged, encoding="utf-8")
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
    (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nsede: 1\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="did you mean 'seed'"):
        rerun(executed)
    assert not executed


def test_a_path_that_is_not_there_stops_before_anything_runs(executed, checkout):
    (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nflickr_8k: ./Flickr8k\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"^flickr_8k: no file or folder .*/Flickr8k; relative paths start at .*$"):
        rerun(executed)
    assert not executed


def test_no_notebooks(checkout):
    for path in (checkout / "notebooks").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no notebooks in"):
        series.reproduce("cpu")


def test_results_are_printed(executed, checkout, capsys):
    figures = checkout / "runs" / "cpu" / "figures"
    figures.mkdir(parents=True)
    found = {"Memory": {"LoRA": "1.2 MB", "full copy": "10 MB"}}
    (figures / "01_results.json").write_text(json.dumps(found), encoding="utf-8")
    rerun(executed)
    assert "Memory\n  LoRA       1.2 MB\n  full copy  10 MB\n" in capsys.readouterr().out


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
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_manifest_says_what_made_a_result(monkeypatch):
    account = storage.manifest(Settings(), notebooks={})
    assert account["settings"]["profile"] == "cpu" and {"python", "torch"} <= account["versions"].keys()
    assert "cores" in account["device"] or "NVIDIA" in account["device"]
    json.dumps(account)


class TestGitCommit:
    """Another repository's commit would stand under results that it did not make."""

    def in_repository(self, root: Path, monkeypatch) -> Path:
        """A repository with a commit of some file, and the code in it, not committed."""
        (root / "lora_distill").mkdir()
        (root / "lora_distill" / "storage.py").touch()
        (root / "mine.txt").touch()
        commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "mine"]
        for command in (["init", "-q"], ["add", "mine.txt"], commit):
            subprocess.run(["git", *command], cwd=root, check=True)
        monkeypatch.setattr(storage, "__file__", str(root / "lora_distill" / "storage.py"))
        monkeypatch.setattr(storage, "repository_root", lambda: root)
        return root

    def test_of_a_repository_around_the_code(self, tmp_path, monkeypatch):
        root = self.in_repository(tmp_path, monkeypatch)
        assert storage.git_commit() is None  # an unpacked archive in a folder that is somebody's repository
        subprocess.run(["git", "add", "lora_distill"], cwd=root, check=True)
        assert storage.git_commit().endswith("-dirty")

    def test_without_git(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert storage.git_commit() is None
        (tmp_path / "git").write_text("not a program", encoding="utf-8")
        (tmp_path / "git").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert storage.git_commit() is None


DRIVER = """
import sys
from pathlib import Path
from lora_distill import __main__, settings
from lora_distill.publish import report, series, stamps
settings.PACKAGE = Path.cwd() / "lora_distill"
series.report.write = lambda folder: folder / "report" / "index.html"
sys.argv = ["lora_distill", "reproduce"]
__main__.main()
"""
TOGETHER = """
import os, torch
from pathlib import Path
from accelerate import PartialState
from lora_distill import processes, storage
from lora_distill.settings import from_notebook
settings, folder = from_notebook(globals()), Path("../runs/cpu")
state = PartialState(cpu=True)
total = torch.ones(1) * (1 + state.process_index)
torch.distributed.all_reduce(total)
(folder / f"{_number}-{state.process_index}").write_text(f"{total.item()} {settings.seed}", encoding="utf-8")
storage.atomic_write(folder / f"{_number}-written", os.environ["RANK"])
"""
ALONE = """
import os
from lora_distill import processes
assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"} & os.environ.keys()
assert (processes.count(), processes.in_series()) == (1, 2)
"""


def ended_late(pid: int, seconds: float = 5) -> bool:
    """Whether a process is still there after some seconds."""
    for _ in range(int(10 * seconds)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


class TestSeveralProcesses:
    """`torchrun --nproc-per-node 2 -m lora_distill reproduce`: one process group a notebook."""

    @pytest.fixture
    def launch(self, checkout):
        """Run the series in two processes on notebooks with the given code."""
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nseed: 7\n", encoding="utf-8")
        (checkout / "driver.py").write_text(DRIVER, encoding="utf-8")

        def run(*sources: str) -> subprocess.CompletedProcess:
            for path in (checkout / "notebooks").iterdir():
                path.unlink()
            for number, source in ((number, source) for number, source in enumerate(sources, 1) if source):
                write_notebook(checkout / "notebooks" / f"{number:02}_x.ipynb", f"_number = {number}", source)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            command = [*torchrun, "driver.py"]
            return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)

        return run

    def test_each_notebook_is_one_group_and_measurements_run_alone(self, launch, checkout):
        done = launch(ALONE, TOGETHER, TOGETHER)
        assert done.returncode == 0, done.stderr
        folder = checkout / "runs" / "cpu"
        assert {path.name: path.read_text(encoding="utf-8") for path in folder.glob("[0-9]-*")} == {
            "2-0": "3.0 7", "2-1": "3.0 7", "2-written": "0", "3-0": "3.0 7", "3-1": "3.0 7", "3-written": "0",
        }  # fmt: skip
        assert [line.split(" in ")[0] for line in done.stdout.splitlines() if line[2:5] == "_x:"] == [
            f"0{n}_x: {state}" for n in (1, 2, 3) for state in ("running", "done")
        ]

    @pytest.mark.parametrize(
        ("rank", "fault", "message"),
        [
            (0, "os.kill(os.getpid(), 9)", "02_x: failed: its kernel died, most often for want of memory; see "),
            (1, "raise ValueError('no\\nluck')", "02_x: process 1 failed in cell 4: ValueError: no luck"),
        ],
    )
    def test_when_one_fails_or_is_killed_all_end_and_one_line_says_why(self, launch, checkout, rank, fault, message):
        pids = checkout / "runs" / "cpu"
        code = "(folder / f'pid-{state.process_index}').write_text(str(os.getpid()), encoding='utf-8')\n"
        code += f"if processes.index() == {rank}:\n    {fault}\ntorch.distributed.barrier()"
        done = launch("", TOGETHER + code)
        assert done.returncode == 1
        said = re.findall(r"02_x: .*", done.stderr)  # it may stand behind papermill's bar
        assert len(said) == 1 and said[0].startswith(message), done.stderr
        assert "Traceback" not in done.stderr.split("02_x: ")[0]
        members = [int((pids / f"pid-{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
        assert not any(ended_late(pid) for pid in members), "the other one too"


def test_what_reads_trainings_of_several_processes_looks_for_theirs(tmp_path):
    for name, count in (("01_a", 1), ("02_b", 4), ("03_c", 4)):
        (tmp_path / f"{name}.ipynb").touch()
        stamp = {"key": "", "commit": None, "outputs": {}, "processes": count}
        (tmp_path / f"{name}{stamps.STAMP}").write_text(json.dumps(stamp), encoding="utf-8")
    assert series.made_by(Path("04_evaluation.ipynb"), tmp_path) == 4
    assert series.made_by(Path("02_b.ipynb"), tmp_path) == 1


class TestWhatIsLost:
    """Anything of a finished notebook that is lost or altered is made again, and the reason is printed."""

    def test_the_reason_is_printed(self, executed, checkout, capsys):
        rerun(executed)
        (checkout / "runs" / "cpu" / "02_second_images.safetensors").unlink()
        rerun(executed)
        assert "02_second: runs again: 02_second_images.safetensors is missing\n" in capsys.readouterr().out

    @pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"flipped")])
    def test_pictures_and_trainings(self, executed, checkout, monkeypatch, damage):
        folder, make = checkout / "runs" / "cpu", series.execute
        pictures = [folder / "images" / "02_second" / "teacher" / "0" / f"{number}.png" for number in (0, 1)]
        training = folder / "lora-1" / "result.safetensors"

        def execute(path, output, settings, made_by=1):
            make(path, output, settings, made_by)
            for file in (*pictures, training):
                if path.stem == "02_second" and not file.exists():
                    storage.atomic_write(file, "whole")

        monkeypatch.setattr(series, "execute", execute)
        rerun(executed)
        assert rerun(executed) == []
        damage(pictures[1])
        assert rerun(executed) == ["02_second"]
        damage(training)
        assert rerun(executed) == ["02_second"]
        assert rerun(executed) == []

    def test_a_training_of_a_cut_run_is_that_of_the_notebook_that_goes_on(self, executed, checkout):
        training = checkout / "runs" / "cpu" / "lora-1" / "result.safetensors"
        rerun(executed, names=["01_first"])
        storage.atomic_write(training, "by a run of 02 that was killed")
        rerun(executed)
        training.unlink()
        assert rerun(executed) == ["02_second"]

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"\x00" * 99, b'{"key": 1, "commit": 2, "outputs": 3}']
    )
    def test_a_stamp_that_cannot_be_read_is_written_anew(self, executed, checkout, content):
        rerun(executed)
        (checkout / "runs" / "cpu" / "02_second.stamp.json").write_bytes(content)
        assert rerun(executed) == ["02_second"]
        assert rerun(executed) == []

    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{\x00}\x00"])
    def test_a_damaged_manifest_is_written_anew(self, executed, checkout, content):
        rerun(executed)
        (checkout / "runs" / "cpu" / "manifest.json").write_bytes(content)
        assert rerun(executed) == []
        assert json.loads((checkout / "runs" / "cpu" / "manifest.json").read_text(encoding="utf-8"))["notebooks"].keys()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe{\x00}\x00", b'{"cells": 3}'])
@pytest.mark.parametrize("command", [series.reproduce, series.prepare])
def test_a_notebook_of_the_checkout_that_is_damaged_is_one_line(checkout, content, command):
    (checkout / "notebooks" / "01_first.ipynb").write_bytes(content)
    with pytest.raises(InputError, match=r"01_first.ipynb: expected a notebook") as error:
        command("cpu")
    assert "\n" not in str(error.value)


def test_without_the_files_of_another_notebook_there_is_no_report(executed, checkout, monkeypatch, capsys):
    monkeypatch.setattr(series.report, "write", WRITE_REPORT)
    rerun(executed)
    (checkout / "runs" / "cpu" / "figures" / "02_table.csv").unlink()
    capsys.readouterr()
    assert rerun(executed, names=["01_first"]) == []
    said = capsys.readouterr().out
    assert re.search(r"no verdicts and no report: 02_second of .*: figures/02_table.csv is missing; python -m", said)
    assert "27 claims" not in said


class TestForce:
    def test_a_linked_cache_stays(self, executed, checkout, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("disk")
        storage.atomic_write(elsewhere / "vae" / "result.safetensors", "kept")
        (checkout / "runs" / "cpu").mkdir(parents=True)
        (checkout / "runs" / "cpu" / "cache").symlink_to(elsewhere)
        assert rerun(executed, force=True) == ["01_first", "02_second"]
        assert (checkout / "runs/cpu/cache/vae/result.safetensors").read_text(encoding="utf-8") == "kept"

    def test_of_a_linked_training_the_link_alone_goes(self, executed, checkout, tmp_path_factory):
        elsewhere = tmp_path_factory.mktemp("disk")
        storage.atomic_write(elsewhere / "result.safetensors", "kept")
        (checkout / "runs" / "cpu").mkdir(parents=True)
        (checkout / "runs" / "cpu" / "lora-1").symlink_to(elsewhere)
        rerun(executed, force=True)
        assert not (checkout / "runs" / "cpu" / "lora-1").exists()
        assert (elsewhere / "result.safetensors").read_text(encoding="utf-8") == "kept"

    def test_what_lies_beside_a_training_stays(self, executed, checkout):
        mine = [checkout / "runs" / "cpu" / name for name in ("lora-1/notes.txt", "mine.txt", "figures/mine.txt")]
        others = [path.with_name("result.safetensors") for path in mine]
        for path in (*mine, *others):
            storage.atomic_write(path, "")
        rerun(executed, force=True)
        assert all(path.exists() for path in mine) and not others[0].exists()

    def test_what_cannot_be_deleted_is_one_line(self, executed, checkout, monkeypatch):
        storage.atomic_write(checkout / "runs" / "cpu" / "lora-1" / "result.safetensors", "")

        def refuse(path, missing_ok=False):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.raises(RunError, match=r"lora-1/result.safetensors could not be deleted: Permission denied"):
            rerun(executed, force=True)

    def test_runs_may_lie_on_another_disk(self, executed, checkout, tmp_path_factory):
        (checkout / "runs").symlink_to(tmp_path_factory.mktemp("disk"))
        assert rerun(executed) == ["01_first", "02_second"]
        assert rerun(executed, force=True) == ["01_first", "02_second"]
        assert (checkout / "runs").is_symlink()


class TestLock:
    def test_a_run_that_is_held_is_refused_in_one_line(self, executed, checkout):
        with writing.locked(checkout / "runs" / "cpu"):
            with pytest.raises(RunError, match=r"runs/cpu: another (run|process) writes there; wait for its end"):
                series.reproduce("cpu")
            series.reproduce("other")
        assert executed == ["01_first", "02_second"]
        series.reproduce("cpu")

    def test_two_runs_with_other_seeds_do_not_mix(self, checkout):
        """The second, started while the first runs, is refused; the first is whole."""
        (checkout / "driver.py").write_text(DRIVER, encoding="utf-8")
        write_notebook(checkout / "notebooks" / "01_first.ipynb", "import time; time.sleep(3)", "seed")
        first = subprocess.Popen([sys.executable, "driver.py"], cwd=checkout, stderr=subprocess.DEVNULL)
        stamp = checkout / "runs" / "cpu" / ".lock"
        while not stamp.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        (checkout / "params" / "cpu.yaml").write_text("profile: cpu\nseed: 5\n", encoding="utf-8")
        with pytest.raises(RunError, match="writes there"):
            series.reproduce("cpu")
        assert first.wait() == 0
        executed = nbformat.read(checkout / "runs" / "cpu" / "01_first.ipynb", 4)
        assert executed.cells[-1].outputs[0].data["text/plain"] == "0"


class TestKernel:
    """Notebooks run in this interpreter, on this checkout's code, whatever the machine has."""

    @pytest.fixture
    def said(self, checkout):
        """What cells printed in a notebook that really ran."""

        def said(*sources: str) -> str:
            write_notebook(checkout / "notebooks" / "01_first.ipynb", *sources)
            checked = settings.load_settings("cpu")
            series.run(checkout / "notebooks" / "01_first.ipynb", checked, settings.run_dir(checked))
            ran = nbformat.read(settings.run_dir(checked) / "01_first.ipynb", 4)
            return "".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))

        return said

    @pytest.fixture
    def hostile(self, tmp_path_factory, monkeypatch):
        """A python3 kernelspec of another checkout, another lora_distill, and an IPython startup file."""
        folder = tmp_path_factory.mktemp("hostile")
        for name in ("python3", "Python3"):
            spec = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
            storage.atomic_write(folder / "kernels" / name / "kernel.json", json.dumps(spec))
        storage.atomic_write(folder / "lora_distill" / "__init__.py", "raise SystemExit('another checkout')")
        storage.atomic_write(folder / "profile_default" / "startup" / "00.py", "print('hello from the profile')")
        monkeypatch.setenv("JUPYTER_PATH", str(folder))
        monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder))
        monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("IPYTHONDIR", str(folder))
        monkeypatch.setenv("PYTHONSTARTUP", str(folder / "profile_default" / "startup" / "00.py"))
        monkeypatch.setenv("MPLBACKEND", "Agg")

    def test_it_is_this_python_with_this_code(self, said, hostile):
        text = said("import sys, lora_distill; print(sys.executable, lora_distill.__file__, sep='\\n')")
        assert text == f"{sys.executable}\n{lora_distill.__file__}\n"

    def test_figures_are_shown_whatever_the_backend_of_the_shell(self, said, hostile, checkout):
        said("from matplotlib import pyplot", "figure, _ = pyplot.subplots()\npyplot.close(figure)\nfigure")
        last = nbformat.read(checkout / "runs" / "cpu" / "01_first.ipynb", 4).cells[-1]
        assert "image/png" in last.outputs[0].data

    def test_the_notebook_keeps_the_name_of_the_kernel(self, said, checkout):
        assert said("print(seed)") == "0\n"
        ran = nbformat.read(checkout / "runs" / "cpu" / "01_first.ipynb", 4)
        assert ran.metadata.kernelspec.name == "python3"

    @pytest.mark.parametrize("name", ["a {b} c", "{", "per %s cent # 1", "Zoë 東京", "{seed}-{0}"])
    def test_any_name_of_a_checkout(self, tmp_path, monkeypatch, name):
        root = tmp_path / name
        for folder in ("notebooks", "params"):
            (root / folder).mkdir(parents=True)
        (root / "params" / "cpu.yaml").write_text("profile: cpu\n", encoding="utf-8")
        write_notebook(root / "notebooks" / "01_first.ipynb", "import os; os.getcwd()")
        monkeypatch.setattr(settings, "PACKAGE", root / "lora_distill")
        folder = series.prepare("cpu")
        assert folder == root / "build" / "notebooks" and [path.name for path in folder.iterdir()] == ["01_first.ipynb"]
        if name in ("a {b} c", "Zoë 東京"):
            series.execute(root / "notebooks" / "01_first.ipynb", root / "runs" / "x.ipynb", Settings())
            cells = nbformat.read(root / "runs" / "x.ipynb", 4).cells
            assert cells[-1].outputs[0].data["text/plain"] == repr(str(root / "notebooks"))


class TestFullDisk:
    """A write that fails, at any of the writes of papermill and of the series: one line, and nothing half-written."""

    @pytest.mark.parametrize("after", range(7))
    def test_one_line_and_the_next_run_is_whole(self, checkout, monkeypatch, capsys, after):
        real, count = Path.write_bytes, iter(range(100))
        handler = LocalHandler.write

        def full(write):
            def fail(*arguments):
                if next(count) == after:
                    raise OSError(28, "No space left on device")
                return write(*arguments)

            return fail

        for name in ("01_first", "02_second"):
            write_notebook(checkout / "notebooks" / f"{name}.ipynb")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full(real))
            patch.setattr(LocalHandler, "write", full(handler))
            patch.setattr(sys, "argv", ["lora_distill", "reproduce", "--notebook", "01_first"])
            with pytest.raises(SystemExit) as end:
                cli.main()
        said = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 1 and said.endswith("could not be written: No space left on device"), said
        assert not list((checkout / "runs").rglob(".*.tmp"))
        monkeypatch.setattr(series, "execute", lambda path, output, *_: storage.atomic_write(output, path.read_bytes()))
        series.reproduce("cpu")


def test_a_run_may_be_started_in_any_thread(executed):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(series.reproduce, "cpu").result()
    assert executed == ["01_first", "02_second"]


def test_sigterm_ends_the_kernel_too_and_says_so_in_one_line(checkout):
    (checkout / "driver.py").write_text(DRIVER, encoding="utf-8")
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    write_notebook(checkout / "notebooks" / "01_first.ipynb", code)
    run = subprocess.Popen([sys.executable, "driver.py"], cwd=checkout, stderr=subprocess.PIPE, text=True)
    pid = checkout / "notebooks" / "pid"
    while not (pid.exists() and pid.read_text(encoding="utf-8")):
        time.sleep(0.05)
    run.terminate()
    _, said = run.communicate(timeout=30)
    assert run.returncode == 1 and "Traceback" not in said and said.splitlines()[-1].endswith("ended by SIGTERM")
    assert not ended_late(int(pid.read_text(encoding="utf-8")))
    assert not list((checkout / "runs").rglob("*.stamp.json")) and not list((checkout / "runs").rglob(".*.tmp"))
