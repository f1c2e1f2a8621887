"""Arrays on disk: made part by part, sealed, and what is altered is made again."""

import os

import numpy as np
import pytest
import torch
from test_storage import small_disk

from lora_distill.arrays import mapped_rows
from lora_distill.errors import InputError, RunError

VALUES = torch.arange(40.0).view(10, 4)


def maker(calls, values=VALUES):
    def make(parts):
        for part in parts:
            calls.append((part.start, part.stop))
            yield values[part]

    return make


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


# ---------------------------------------------------------------------------------------------- damage


@pytest.fixture
def path(tmp_path):
    mapped_rows(tmp_path / "rows.npy", (10, 4), 3, maker([]))
    return tmp_path / "rows.npy"


def healed(path, size=3):
    """The parts that were made again, with a warning that names the file; the array is as it was, and alone."""
    calls = []
    with pytest.warns(UserWarning, match=rf"{path}: not a whole array .*made again"):
        array = mapped_rows(path, (10, 4), size, maker(calls))
    assert (array == VALUES.numpy()).all() and list(path.parent.iterdir()) == [path]
    mapped_rows(path, (10, 4), size, lambda parts: 1 / 0)
    return calls


def test_no_flipped_bit_passes(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert healed(path), place
        assert path.read_bytes() == whole


def test_of_an_array_with_an_altered_row_that_part_alone_is_made_again(path):
    content = bytearray(path.read_bytes())
    content[128 + 8 * 4] ^= 1  # in row 4
    path.write_bytes(content)
    assert healed(path) == [(3, 6)]


def test_with_parts_of_another_size_all_of_a_damaged_array_is_made_again(path):
    content = bytearray(path.read_bytes())
    content[128 + 8 * 4] ^= 1
    path.write_bytes(content)
    assert healed(path, size=5) == [(0, 5), (5, 10)]


@pytest.mark.parametrize("length", [0, 5, 100, 128, 150, 208, 215, -1])
def test_an_array_that_was_cut_is_made_again(path, length):
    path.write_bytes(path.read_bytes()[:length])
    assert healed(path)


@pytest.mark.parametrize(
    "other",
    [
        np.zeros((10, 4), np.float32), np.zeros((10, 4), ">f2"), np.zeros((4, 10), np.float16), np.zeros(40, "<f2"),
        np.zeros((11, 4), np.float16), np.asfortranarray(np.ones((10, 4), np.float16)), np.zeros((10, 4), np.int16),
        np.zeros((10, 4), np.float16), np.array({"a": 1}, dtype=object),
    ],
    ids=lambda array: f"{array.dtype.str}{array.shape}",
)  # fmt: skip
def test_an_array_of_something_else_is_not_taken(path, other):
    np.save(path, other, allow_pickle=True)
    assert healed(path) == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_something_appended_is_noticed(path):
    path.write_bytes(path.read_bytes() + b"x")
    assert healed(path)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (4, 8), (8, 4), (1, 10), (10, 1)])
def test_a_cut_run_that_goes_on_with_parts_of_another_size_leaves_no_row_out(tmp_path, sizes):
    first, second = sizes

    def cut(parts):
        yield VALUES[parts[0]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mapped_rows(tmp_path / "rows.npy", (10, 4), first, cut)
    assert (mapped_rows(tmp_path / "rows.npy", (10, 4), second, maker([])) == VALUES.numpy()).all()


def stopped(path, after):
    def cut(parts):
        for number, part in enumerate(parts):
            if number == after:
                raise KeyboardInterrupt
            yield VALUES[part]

    with pytest.raises(KeyboardInterrupt):
        mapped_rows(path, (10, 4), 3, cut)
    return path.with_name("rows.npy.parts")


def test_what_was_altered_in_a_cut_run_is_made_again_when_it_goes_on(tmp_path):
    path = tmp_path / "rows.npy"
    rows = stopped(path, 3) / "rows.npy"
    content = bytearray(rows.read_bytes())
    content[128 + 8 * 7] ^= 4  # in row 7
    rows.write_bytes(content)
    calls = []
    assert (mapped_rows(path, (10, 4), 3, maker(calls)) == VALUES.numpy()).all() and calls == [(6, 9), (9, 10)]


@pytest.mark.parametrize("spoil", ["header", "cut", "gone", "mark", "folder", "more"])
def test_a_folder_of_parts_in_any_state_is_gone_on_with(tmp_path, spoil):
    path = tmp_path / "rows.npy"
    folder = stopped(path, 2)
    rows, mark = folder / "rows.npy", folder / "00000000-00000003"
    content = rows.read_bytes()
    if spoil == "header":
        rows.write_bytes(b"x" + content[1:])
    elif spoil == "cut":
        rows.write_bytes(content[:130])
    elif spoil == "gone":
        rows.unlink()
    elif spoil == "mark":
        mark.write_bytes(b"\xff\x00")
    elif spoil == "folder":
        mark.unlink()
        mark.mkdir()
    else:
        (folder / "00000000").touch()
    assert (mapped_rows(path, (10, 4), 3, maker([])) == VALUES.numpy()).all() and list(tmp_path.iterdir()) == [path]


def test_parts_left_beside_a_whole_array_are_cleared_away(path):
    """As a kill leaves them between the renaming and the clearing."""
    (path.parent / "rows.npy.parts").mkdir()
    (path.parent / "rows.npy.parts" / "00000000-00000003").touch()
    mapped_rows(path, (10, 4), 3, lambda parts: 1 / 0)
    assert list(path.parent.iterdir()) == [path]


def test_too_few_rows_are_no_part(tmp_path):
    with pytest.raises(RunError, match=r"rows\.npy: rows 0 to 3 were made as \(2, 4\)"):
        mapped_rows(tmp_path / "rows.npy", (10, 4), 3, lambda parts: (VALUES[part][:2] for part in parts))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_rows_that_are_not_finite_are_refused_by_name(tmp_path, value):
    with pytest.raises(InputError, match=r"rows\.npy: values that float16 cannot hold"):
        mapped_rows(tmp_path / "rows.npy", (10, 4), 3, maker([], VALUES.masked_fill(VALUES == 21, value)))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_its_place_is_one_line(tmp_path):
    (tmp_path / "rows.npy").mkdir()
    with pytest.raises(InputError, match=rf"^{tmp_path}/rows\.npy: [^\n]*$"):
        mapped_rows(tmp_path / "rows.npy", (10, 4), 3, maker([]))


def test_a_link_to_an_array_on_another_disk_is_read(path, tmp_path):
    os.rename(path, tmp_path / "there.npy")
    path.symlink_to(tmp_path / "there.npy")
    assert (mapped_rows(path, (10, 4), 3, lambda parts: 1 / 0) == VALUES.numpy()).all()


def test_two_runs_do_not_make_one_array_at_once(tmp_path):
    def make(parts):
        with pytest.raises(RunError, match=r"rows\.npy\.parts: another process writes there"):
            mapped_rows(tmp_path / "rows.npy", (10, 4), 3, maker([]))
        return maker([])(parts)

    assert (mapped_rows(tmp_path / "rows.npy", (10, 4), 3, make) == VALUES.numpy()).all()
