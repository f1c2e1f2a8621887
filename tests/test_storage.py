"""Files of tensors: whole, or refused; written, or the old one untouched."""

import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_distill.storage import (
    DamagedFileError,
    cached_parts,
    digest,
    load_tensors,
    read_table,
    resident_peak_mb,
    save_table,
    save_tensors,
)
from lora_distill.writing import atomic_write, whole_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "c": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "deep" / "file.safetensors", TENSORS, {"step": "7"})
    return tmp_path / "deep" / "file.safetensors"


def test_what_was_saved_is_loaded(path):
    tensors, metadata = load_tensors(path)
    assert tensors.keys() == TENSORS.keys() and metadata == {"step": "7"}
    assert all(torch.equal(tensors[k], TENSORS[k]) and tensors[k].dtype == TENSORS[k].dtype for k in TENSORS)


@pytest.mark.parametrize("place", [-1, 200, 3])
def test_one_flipped_byte_is_noticed(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=str(path)):
        load_tensors(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_file_cut_short_is_noticed(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match=str(path)):
        load_tensors(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "foreign.safetensors")
    with pytest.raises(DamagedFileError, match="digest"):
        load_tensors(tmp_path / "foreign.safetensors")


def test_the_digest_knows_names_shapes_dtypes_and_values_but_no_order():
    reordered = dict(reversed(TENSORS.items()))
    assert digest(reordered) == digest(TENSORS)
    others = [
        {**TENSORS, "b": torch.tensor([2, 1])},
        {**TENSORS, "b": torch.tensor([1, 2], dtype=torch.int32)},
        {**TENSORS, "a": TENSORS["a"].view(3, 2)},
        {"a": TENSORS["a"], "b": TENSORS["b"], "d": TENSORS["c"]},
    ]
    assert len({digest(tensors) for tensors in [TENSORS, *others]}) == 5


@contextmanager
def small_disk():
    """No file of this process can grow beyond a kilobyte: for one write alone, as pytest's output may be a file."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_tensors(path, {"a": torch.zeros(5000)}),
        lambda path: atomic_write(path, "x" * 5000),
    ],
    ids=["tensors", "text"],
)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, write):
    with pytest.raises(OSError, match=f"{path} could not be written"), small_disk():
        write(path)
    assert load_tensors(path)[1] == {"step": "7"} and list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_have_temporary_files_of_their_own(path):
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first"), second.write_text("second")
    assert first != second and path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error_with_the_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=rf"{tmp_path}/file/deep/a\.txt could not be written: "):
        atomic_write(tmp_path / "file" / "deep" / "a.txt", "x")


def made(calls):
    """Makes rows of numbers, and notes the slices that it was asked for."""

    def make(rows):
        calls.append((rows.start, rows.stop))
        return {"a": torch.arange(rows.start, rows.stop), "b": torch.arange(rows.start, rows.stop)[:, None] * 2.0}

    return make


def test_parts_are_made_once_and_joined_in_order(tmp_path):
    calls = []
    for _ in range(2):
        tensors = cached_parts(tmp_path, "teacher", "key", 7, 3, made(calls))
        assert tensors["a"].tolist() == list(range(7)) and tensors["b"][:, 0].tolist() == [2.0 * i for i in range(7)]
    assert calls == [(0, 3), (3, 6), (6, 7)]


def test_a_run_that_was_cut_goes_on_with_the_part_it_was_at(tmp_path):
    def cut(rows):
        if rows.start == 3:
            raise KeyboardInterrupt
        return made([])(rows)

    calls = []
    with pytest.raises(KeyboardInterrupt):
        cached_parts(tmp_path, "teacher", "key", 7, 3, cut)
    cached_parts(tmp_path, "teacher", "key", 7, 3, made(calls))
    assert calls == [(3, 6), (6, 7)]


@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 8)])
def test_parts_of_another_size_are_not_taken_for_these(tmp_path, sizes):
    for size in sizes:
        assert cached_parts(tmp_path, "teacher", "key", 8, size, made([]))["a"].tolist() == list(range(8))


def test_a_damaged_part_is_made_again(tmp_path):
    cached_parts(tmp_path, "teacher", "key", 7, 3, made([]))
    part = sorted((tmp_path / "teacher-key").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-1])
    calls = []
    with pytest.warns(UserWarning, match="made again"):
        assert cached_parts(tmp_path, "teacher", "key", 7, 3, made(calls))["a"].tolist() == list(range(7))
    assert calls == [(3, 6)]


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from lora_distill import processes, storage
from lora_distill.devices import choose_device
folder = Path(sys.argv[1])
rank = processes.index()
assert processes.agree(rank) == 0, "before anyone chose a device"
assert choose_device("cpu") == choose_device("auto") == "cpu"
assert PartialState().num_processes == processes.count() == 2
assert processes.is_main() == PartialState().is_main_process == (rank == 0)
assert processes.share(range(5)) == range(5)[rank::2]
def make(rows):
    (folder / f"made-{rows.start}-by-{rank}").touch()
    return {"a": torch.arange(rows.start, rows.stop)}
for _ in range(2):
    assert storage.cached_parts(folder, "teacher", "key", 7, 2, make)["a"].tolist() == list(range(7))
storage.atomic_write(folder / "text", f"by {rank}")
assert storage.cached(folder, "one", "key", lambda: {"a": torch.ones(1)})["a"] == 1
processes.wait()
"""


def test_two_processes_share_the_work_and_leave_each_file_once(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TWO_PROCESSES), out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = {f"made-{start}-by-{(start // 2) % 2}" for start in (0, 2, 4, 6)}
    assert {path.name for path in out.iterdir()} == parts | {"text", "teacher-key", "one-key.safetensors"}
    assert (out / "text").read_text() == "by 0" and len(list((out / "teacher-key").iterdir())) == 4


def test_the_resident_peak_is_that_of_the_system():
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell")
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert resident_peak_mb() == pytest.approx(1024 * kilobytes / 1e6, rel=0.02)


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [
        {"method": "a, b", "n": 3, "value": 0.1 + 0.2, "done": True, "sd": None},
        {"method": "c", "n": None, "value": 2.0, "done": False, "sd": 1e-17},
    ]
    save_table(tmp_path / "table.csv", rows)
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == '"a, b",3,0.30000000000000004,True,'
    assert read_table(tmp_path / "table.csv") == rows


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\xff\xff", b'a,b\n"1,2\n', b"a,b\n1,2,3\n1,2,3,4\n"])
def test_what_is_no_table_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*{tmp_path}/table\.csv[:,] [^\n]*$"):
        read_table(tmp_path / "table.csv")
