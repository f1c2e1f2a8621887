"""Cached tables of the library `datasets`: what is altered is made again."""

import io
from functools import partial

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Value, load_dataset

from lora_distill.data import scenes
from lora_distill.data.captioned import scene_dataset
from lora_distill.data.tables import kept_table, loaded_tables
from lora_distill.errors import InputError, WriteError

FEATURES = Features({"id": Value("string"), "number": Value("int64")})
ROWS = [{"id": f"image {number}", "number": number} for number in range(50)]


def table(folder, calls=None):
    def rows():
        if calls is not None:
            calls.append(len(ROWS))
        yield from ROWS

    return kept_table("scenes", "key", rows, FEATURES, folder)


def test_a_table_is_made_once_and_read_back(tmp_path):
    calls = []
    assert table(tmp_path, calls).to_list() == table(tmp_path, calls).to_list() == ROWS and calls == [50]
    assert table(tmp_path).features == FEATURES


@pytest.mark.parametrize("kind", ["flip", "cut", "empty"])
def test_an_altered_table_is_made_again(tmp_path, kind):
    table(tmp_path)
    [arrow] = (tmp_path / "scenes-key").glob("*.arrow")
    content = arrow.read_bytes()
    places = {"flip": range(0, len(content), len(content) // 20), "cut": [len(content) // 2], "empty": [0]}[kind]
    for place in places:
        flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        arrow.write_bytes(flipped if kind == "flip" else content[:place])
        with pytest.warns(UserWarning, match=r"scenes-key: 00000\.arrow is not as it was written; made again"):
            assert table(tmp_path).to_list() == ROWS


def test_a_table_that_could_not_be_made_is_not_there(tmp_path):
    def rows():
        yield ROWS[0]
        raise InputError("image 1 cannot be read")

    with pytest.raises(InputError, match="image 1 cannot be read"):
        kept_table("scenes", "key", rows, FEATURES, tmp_path)
    assert not (tmp_path / "scenes-key").exists()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("", encoding="utf-8")
    with pytest.raises(WriteError, match=rf"{tmp_path}/cache/scenes-key could not be written: [^\n]*$"):
        table(tmp_path / "cache")


def test_scenes_are_sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SPLIT_SIZES", {"8k": {"train": 4, "val": 4, "test": 4}})
    before = [np.asarray(image) for image in scene_dataset("noto", "8k", "test", 0, cache_dir=tmp_path)["image"]]
    [arrow] = tmp_path.rglob("*.arrow")
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    arrow.write_bytes(content)
    with pytest.warns(UserWarning, match="made again"):
        after = scene_dataset("noto", "8k", "test", 0, cache_dir=tmp_path)
    assert all((one == np.asarray(two)).all() for one, two in zip(before, after["image"], strict=True))


# ---------------------------------------------------------------------------------------------- load_dataset


def png(number):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def load(tmp_path):
    """A `load_dataset` of a folder with a parquet file."""
    rows = [{"image": {"bytes": png(number), "path": None}, "caption": f"number {number}"} for number in range(20)]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    return partial(load_dataset, str(tmp_path / "set"))


def test_a_loaded_table_is_read_back_without_a_word(load, tmp_path, recwarn):
    for _ in range(2):
        assert loaded_tables(load, tmp_path / "cache")["train"]["caption"][:3] == ["number 0", "number 1", "number 2"]
    assert not [one for one in recwarn if "made again" in str(one.message)]


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "info cut", "info []"])
def test_a_damaged_cache_of_a_loaded_table_is_made_again(load, tmp_path, kind):
    before = loaded_tables(load, tmp_path / "cache")["train"].to_list()
    [arrow], [info] = (list((tmp_path / "cache").rglob(name)) for name in ("*.arrow", "dataset_info.json"))
    content = arrow.read_bytes()
    {
        "flip": lambda: arrow.write_bytes(content[:700] + bytes([content[700] ^ 4]) + content[701:]),
        "cut": lambda: arrow.write_bytes(content[:700]),
        "empty": lambda: arrow.write_bytes(b""),
        "info cut": lambda: info.write_bytes(info.read_bytes()[:50]),
        "info []": lambda: info.write_text("[]", encoding="utf-8"),
    }[kind]()
    with pytest.warns(UserWarning, match=r"a cached table could not be used: .*; made again"):
        assert loaded_tables(load, tmp_path / "cache")["train"].to_list() == before
    assert loaded_tables(load, tmp_path / "cache")["train"].to_list() == before
