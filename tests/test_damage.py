"""Damage to files of tensors, bit by bit, and a disk that is full when the new file is to take the old one's place."""

import errno
import os

import pytest
import torch

from lora_distill.adapters import add_adapter, save_adapter
from lora_distill.storage import DamagedFileError, load_tensors, save_tensors


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"weight": torch.arange(6.0), "flag": torch.tensor(True)}, {"step": "12", "note": "kept"})
    return path


def undetected(path, places):
    """The places where one flipped bit passes unnoticed, with the text around them."""
    whole, passed = path.read_bytes(), []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            load_tensors(path)
        except DamagedFileError as error:
            assert str(path) in str(error)
        else:
            passed.append(whole[place - 10 : place + 10])
    return passed


def header_end(path):
    """safetensors begins with the length of its header in eight bytes."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_a_flipped_bit_in_the_tensors_is_noticed(path):
    assert not undetected(path, range(header_end(path), path.stat().st_size))


def test_a_flipped_bit_in_the_names_shapes_or_metadata_is_noticed(path):
    assert not undetected(path, range(header_end(path)))


@pytest.fixture
def full_disk(monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)


def test_the_old_tensors_stay_when_the_new_ones_cannot_take_their_place(path, full_disk):
    before = path.read_bytes()
    with pytest.raises(OSError, match=f"{path}.*No space left"):
        save_tensors(path, {"other": torch.zeros(100)})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_the_old_adapter_stays_when_the_new_one_cannot_take_its_place(unet, tmp_path, full_disk):
    path = tmp_path / "lora.safetensors"
    path.touch()
    add_adapter(unet, "student", rank=2, alpha=2)
    with pytest.raises(OSError, match=f"{path}.*No space left"):
        save_adapter(unet, "student", path)
    assert path.read_bytes() == b"" and list(tmp_path.iterdir()) == [path]
