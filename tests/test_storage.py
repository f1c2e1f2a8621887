"""Files of tensors: whole, or refused; written, or the old one untouched."""

import re
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_distill.storage import (
    DamagedFileError,
    atomic_write,
    digest,
    load_tensors,
    mapped_rows,
    read_table,
    resident_peak_mb,
    save_table,
    save_tensors,
)

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


def test_an_array_goes_on_at_the_part_where_it_was_cut(tmp_path):
    path, asked = tmp_path / "rows.npy", []

    def make(parts, stop=None):
        for part in parts:
            if part.start == stop:
                raise KeyboardInterrupt
            asked.append(part.start)
            yield torch.arange(20.0).view(10, 2)[part]

    with pytest.raises(KeyboardInterrupt):
        mapped_rows(path, (10, 2), 3, lambda parts: make(parts, stop=6))
    assert asked == [0, 3] and not path.exists()
    array = mapped_rows(path, (10, 2), 3, make)
    assert asked == [0, 3, 6, 9] and (array == torch.arange(20.0).view(10, 2).numpy()).all()
    assert list(tmp_path.iterdir()) == [path]
    assert (mapped_rows(path, (10, 2), 3, lambda parts: 1 / 0) == array).all()


def test_a_full_disk_leaves_the_array_to_be_gone_on_with(tmp_path):
    path = tmp_path / "rows.npy"
    with pytest.raises(OSError, match=f"{path} could not be written"), small_disk():
        mapped_rows(path, (5000,), 5000, lambda parts: [torch.zeros(5000)])
    assert not path.exists()
    assert len(mapped_rows(path, (5000,), 5000, lambda parts: [torch.zeros(5000)])) == 5000


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rows.npy: values that float16 cannot hold"):
        mapped_rows(tmp_path / "rows.npy", (2,), 2, lambda parts: [torch.tensor([1.0, 1e6])])
    assert not (tmp_path / "rows.npy").exists()


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
