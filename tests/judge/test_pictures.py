"""Pictures on disk: each carries a seal, and what is derived heals."""

import json

import numpy as np
import PIL.Image
import pytest

from lora_distill.errors import InputError, MissingError
from lora_distill.judge.judge import load_images
from lora_distill.judge.pictures import KEY, kept_pictures, stored_pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    kept_pictures(tmp_path / "0", "key", 5, 2, IMAGES.__getitem__)
    return tmp_path / "0"


def healed(folder, first):
    calls = []
    with pytest.warns(UserWarning, match=rf"{folder / first}: \d of 5 pictures there are altered; made again"):
        pictures = kept_pictures(folder, "key", 5, 2, lambda rows: calls.append(rows.start) or IMAGES[rows])
    assert (pictures[:] == IMAGES).all()
    return calls


def test_no_flipped_bit_changes_a_picture(folder):
    path = folder / "00003.png"
    whole, silent = path.read_bytes(), []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            if (stored_pictures(folder, 5, "key")[3] != IMAGES[3]).any():
                silent.append(place)
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert not silent


@pytest.mark.parametrize("length", [0, 7, 40, -30])
def test_a_cut_picture_is_made_again(folder, length):
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:length])
    assert healed(folder, "00003.png") == [2]


@pytest.mark.parametrize("kind", ["exchanged", "of another set", "of another program", "text", "jpeg"])
def test_a_picture_that_is_not_the_one_that_was_made_is_made_again(folder, tmp_path, kind):
    path, other = folder / "00001.png", folder / "00002.png"
    if kind == "exchanged":
        path.rename(tmp_path / "x"), other.rename(path), (tmp_path / "x").rename(other)
    elif kind == "of another set":
        kept_pictures(tmp_path / "1", "other key", 5, 2, IMAGES.__getitem__)
        path.write_bytes((tmp_path / "1" / "00001.png").read_bytes())
    elif kind == "text":
        path.write_text("no picture", encoding="utf-8")
    else:
        PIL.Image.fromarray(IMAGES[1]).save(path, "jpeg" if kind == "jpeg" else "png")
    assert healed(folder, "00001.png") == ([0, 2] if kind == "exchanged" else [0])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"another"])
def test_pictures_whose_key_is_spoilt_are_all_made_again(folder, content):
    (folder / KEY).write_bytes(content)
    calls = []
    kept_pictures(folder, "key", 5, 2, lambda rows: calls.append(rows.start) or IMAGES[rows])
    assert calls == [0, 2, 4]


def test_a_later_reader_names_the_picture_and_what_would_do(folder):
    (folder / "00004.png").write_bytes((folder / "00003.png").read_bytes())
    with pytest.raises(InputError, match=r"00004\.png: not the picture that was made; delete it and run its notebook"):
        stored_pictures(folder, 5, "key")[:]
    (folder / "00004.png").unlink()
    with pytest.raises(MissingError, match=r"00004\.png: not found"):
        stored_pictures(folder, 5, "key")[:]


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "null", '{"a": 3}', '{"a": [3]}', '{"a": [{}]}',
     '{"a": [{"folder": "0", "count": "x", "key": ""}]}',
     '{"a": [{"folder": 3, "count": 1, "key": ""}]}', "\udcff"],
)  # fmt: skip
def test_a_spoilt_index_is_one_line_that_says_what_makes_it_again(tmp_path, index):
    (tmp_path / "02_x_images.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"^[^\n]*02_x_images\.json: [^\n]*reproduce --profile [^\n]*$"):
        load_images(tmp_path, "02_x")


def test_an_index_is_read_back(folder, tmp_path):
    index = {"base": [{"folder": "0", "count": 5, "key": "key"}]}
    (tmp_path / "02_x_images.json").write_text(json.dumps(index), encoding="utf-8")
    assert (load_images(tmp_path, "02_x")["base"][0][:] == IMAGES).all()
