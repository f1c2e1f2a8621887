"""A disk that fills up at any moment: one line that names the file, the old file whole, and the next run goes well."""

import json
import os
import re
import resource
import signal
import sys
import traceback

import numpy as np
import pytest
import torch
from conftest import moved, small_unet
from train.test_unhappy import OFTEN, Distance, draw

from lora_distill.adapters import save_adapter
from lora_distill.arrays import mapped_rows
from lora_distill.data import captioned, scenes
from lora_distill.errors import RunError
from lora_distill.judge.pictures import kept_pictures
from lora_distill.pipeline import save_picture
from lora_distill.storage import SEAL, cached, cached_parts, keep_value, save_table
from lora_distill.train.loop import train
from lora_distill.writing import atomic_write, locked, whole_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
ROWS = torch.arange(4000.0).view(100, 40)


def adapter(folder):
    unet = small_unet()
    moved(unet, "student")
    save_adapter(unet, "student", folder / "student.safetensors")


def pipeline(folder):
    with whole_folder(folder / "pipeline") as made:
        (made / "model_index.json").write_text("{}", encoding="utf-8")
        (made / "weights").write_bytes(bytes(9000))


WORK = {
    "training": lambda folder: train(Distance(), draw, OFTEN, folder / "run"),
    "adapter": adapter,
    "array": lambda folder: mapped_rows(folder / "rows.npy", (100, 40), 30, lambda parts: [ROWS[p] for p in parts]),
    "cache": lambda folder: cached(folder, "features", "key", lambda: {"a": torch.ones(2000)}),
    "parts": lambda folder: cached_parts(folder, "teacher", "key", 100, 30, lambda part: {"a": ROWS[part]}),
    "pictures": lambda folder: kept_pictures(folder / "images", "key", 4, 2, IMAGES.__getitem__),
    "scenes": lambda folder: captioned.scene_dataset("noto", "8k", "test", 0, cache_dir=folder),
    "value": lambda folder: keep_value(folder / "simulate.json", {"total": "x" * 3000}),
    "table": lambda folder: save_table(folder / "table.csv", [{"a": "x" * 3000}]),
    "picture": lambda folder: save_picture(IMAGES, folder / "sample.png"),
    "text": lambda folder: atomic_write(folder / "index.json", json.dumps(["x" * 3000])),
    "pipeline": pipeline,
}


def on_a_disk_with(size, work, folder):
    """Do some work where no file can grow beyond `size` bytes, in a process of its own; the error, if any."""
    there, here = os.pipe()
    if not (child := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            work(folder)
            said = ""
        except RunError as error:
            said = getattr(error, "strerror", None) or str(error)
        except BaseException:
            said = f"not foreseen\n{traceback.format_exc()}"
        os.write(here, said.encode()[:4000])
        os._exit(0)
    os.close(here)
    with os.fdopen(there, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "SPLIT_SIZES", {"8k": {"train": 6, "val": 6, "test": 6}})


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_full_disk_is_one_line_and_the_next_run_goes_well(tmp_path, work, size):
    said = on_a_disk_with(size, WORK[work], tmp_path)
    assert re.fullmatch(f"{tmp_path}.* could not be written: .*File too large.*", said), said
    whole = names(tmp_path)
    assert not any(name.endswith(".tmp") for name in whole)
    assert on_a_disk_with(10**9, WORK[work], tmp_path) == ""
    (tmp_path / "other").mkdir()
    assert on_a_disk_with(10**9, WORK[work], tmp_path / "other") == ""
    found = names(tmp_path)
    expected = names(tmp_path / "other")
    assert {name for name in found if not name.startswith("other")} == expected


@pytest.mark.parametrize("work", ["adapter", "cache", "value", "table", "picture", "text", "pipeline"])
def test_what_was_there_stays_on_a_full_disk(tmp_path, work):
    WORK[work](tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if (tmp_path / name).is_file()}
    if work == "cache":  # a whole one is not written again
        next(tmp_path.glob("*.safetensors")).write_bytes(b"altered")
        before = {name: b"altered" for name in before}
    assert "could not be written" in on_a_disk_with(100, WORK[work], tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before and names(tmp_path) >= before.keys()


def test_a_lock_can_be_had_on_a_full_disk(tmp_path):
    def hold(folder):
        with locked(folder):
            pass

    assert on_a_disk_with(0, hold, tmp_path) == ""


def test_a_seal_is_written_last(tmp_path):
    """A folder whose seal did not fit is not taken for a whole one."""
    said = on_a_disk_with(100, WORK["scenes"], tmp_path)
    assert "could not be written" in said and not list(tmp_path.rglob(SEAL))
