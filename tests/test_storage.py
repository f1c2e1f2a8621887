"""Files of tensors: what comes back is what went in, or the file is refused by its name."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_distill.adapters import add_adapter, save_adapter
from lora_distill.storage import DamagedFileError, digest, load_tensors, save_tensors

TENSORS = {
    "float": torch.linspace(-1, 1, 6).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "whole": torch.tensor([[1], [2]]),
    "flags": torch.tensor([True, False]),
    "step": torch.tensor(3.0),
}
METADATA = {"step": "12", "log": '[{"loss": 0.5}]'}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, TENSORS, METADATA)
    return path


def data_start(path: Path) -> int:
    """Where the tensors begin: after the header, whose length is the first eight bytes."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def undetected_flips(path: Path, places: range) -> list[int]:
    """The places where a flipped bit passes unnoticed."""
    whole, passed = path.read_bytes(), []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            load_tensors(path)
        except DamagedFileError as error:
            assert str(path) in str(error)
        else:
            passed.append(place)
    return passed


def test_tensors_and_metadata_come_back_as_they_were(path):
    tensors, metadata = load_tensors(path)
    assert metadata == METADATA and tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_views_and_parameters_are_saved_by_their_values(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_tensors(tmp_path / "x", {"turned": parameter.T, "slice": parameter[:, 1]})
    tensors, metadata = load_tensors(tmp_path / "x")
    assert torch.equal(tensors["turned"], parameter.T) and torch.equal(tensors["slice"], parameter[:, 1])
    assert metadata == {}


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_file_cut_short_is_refused_by_name(path, left):
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DamagedFileError, match=path.name):
        load_tensors(path)


def test_one_flipped_bit_in_any_tensor_is_refused_by_name(path):
    assert not undetected_flips(path, range(data_start(path), path.stat().st_size))


def test_one_flipped_bit_in_the_header_is_refused_by_name(path):
    assert not undetected_flips(path, range(data_start(path)))


def test_a_file_without_a_digest_is_refused_by_name(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(DamagedFileError, match=r"foreign.safetensors: contents do not match their digest"):
        load_tensors(path)


def test_a_text_file_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.safetensors"
    path.write_text("not tensors at all, but a note of some length")
    with pytest.raises(DamagedFileError, match=r"notes.safetensors"):
        load_tensors(path)


@pytest.fixture(params=["writing", "renaming"])
def full_disk(request, monkeypatch):
    """A disk that is full while the file is written, or when it is renamed."""

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_part(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        no_space()

    if request.param == "writing":
        monkeypatch.setattr(Path, "write_bytes", write_part)
    else:
        monkeypatch.setattr(os, "replace", no_space)


def test_a_full_disk_leaves_the_old_tensors_and_nothing_else(path, full_disk):
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"other": torch.zeros(100)})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_adapter_and_nothing_else(unet, tmp_path, full_disk):
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.write(b"old")
    add_adapter(unet, "student", rank=2, alpha=2)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(unet, "student", path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_digest_does_not_depend_on_the_order_of_tensors():
    assert digest(dict(reversed(TENSORS.items()))) == digest(TENSORS)


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.tensor([[0, 0, 0], [0, 0, 1e-30]])},
        {},
    ],
    ids=["name", "shape", "dtype", "value", "absence"],
)
def test_the_digest_depends_on(other):
    assert digest(other) != digest({"a": torch.zeros(2, 3)})
