"""Stamps: what of a notebook's outputs is noticed when it is lost or altered, and which stamps count."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_distill import storage
from lora_distill.publish import stamps
from lora_distill.settings import repository_root

PICTURES, TRAINING = "images/02_b/teacher/0", "lora-1/result.safetensors"
STAMP = {"key": "k", "commit": None, "outputs": {}}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with a file of each kind that a notebook leaves."""
    for name in ("02_b.ipynb", "student.safetensors", "figures/02_x.csv", TRAINING, f"{PICTURES}/key.txt"):
        storage.atomic_write(tmp_path / name, name)
    for number in range(3):
        storage.atomic_write(tmp_path / PICTURES / f"{number:05}.png", f"picture {number}")
    return tmp_path


@pytest.fixture
def stamp(run) -> dict:
    outputs = {name: stamps.sha256(run / name) for name in stamps.files(run)}
    return STAMP | {"outputs": outputs, "trees": {name: stamps.tree(run / name) for name in stamps.trees(run, "02_b")}}


def test_a_stamp_knows_every_file_that_a_user_or_a_later_notebook_reads(run, stamp):
    assert sorted(stamp["outputs"]) == ["02_b.ipynb", "figures/02_x.csv", "student.safetensors"]
    assert sorted(stamp["trees"]) == [PICTURES, TRAINING]
    assert stamps.why_changed(run, stamp) == ""


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("student.safetensors", Path.unlink, "student.safetensors is missing"),
        (
            "student.safetensors",
            lambda path: path.write_text("x", encoding="utf-8"),
            "student.safetensors was changed since it ran",
        ),
        ("02_b.ipynb", lambda path: path.write_text("0", encoding="utf-8"), "02_b.ipynb was changed since it ran"),
        (f"{PICTURES}/00001.png", Path.unlink, f"1 of 4 files of {PICTURES} are missing"),
        (
            f"{PICTURES}/00001.png",
            lambda path: path.write_text("picture 7", encoding="utf-8"),
            f"{PICTURES} was changed since it ran",
        ),
        (
            f"{PICTURES}/key.txt",
            lambda path: path.write_text("other", encoding="utf-8"),
            f"{PICTURES} was changed since it ran",
        ),
        (PICTURES, shutil.rmtree, f"{PICTURES} is missing"),
        ("images", shutil.rmtree, f"{PICTURES} is missing"),
        ("lora-1", shutil.rmtree, f"{TRAINING} is missing"),
        (TRAINING, lambda path: path.write_text("cut", encoding="utf-8"), f"{TRAINING} was changed since it ran"),
        ("figures", shutil.rmtree, "figures/02_x.csv is missing"),
        ("figures/02_x.csv", lambda path: (path.unlink(), path.mkdir()), "figures/02_x.csv is missing"),
    ],
)
def test_what_is_lost_or_altered_is_named(run, stamp, name, damage, why):
    damage(run / name)
    assert stamps.why_changed(run, stamp) == why


def test_figures_that_were_drawn_again_are_taken_over_and_nothing_else(run, stamp):
    stamps.write(run, "02_b", stamp)
    for name in ("02_b.ipynb", "figures/02_x.csv"):
        (run / name).write_text("drawn by another version", encoding="utf-8")
    stamps.renew(run, [run / "figures/02_x.csv", run / "figures/02_lost.svg"])
    renewed = stamps.read(run, "02_b")
    assert stamps.why_changed(run, renewed) == "02_b.ipynb was changed since it ran"
    assert renewed["outputs"]["figures/02_x.csv"] == stamps.sha256(run / "figures/02_x.csv")
    assert renewed | {"outputs": stamp["outputs"]} == stamp


def test_a_copy_of_a_run_is_as_good_as_the_run(run, stamp):
    """Other times, same content."""
    for path in (path for path in run.rglob("*") if path.is_file()):
        os.utime(path, (1, 1))
    assert stamps.why_changed(run, stamp) == ""


def test_temporary_files_and_system_files_are_no_pictures(run, stamp):
    storage.atomic_write(run / PICTURES / ".00009.png.0123.tmp", "left")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "montage.png"):
        storage.atomic_write(run / PICTURES / name, "left")
    assert stamps.why_changed(run, stamp) == ""


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"3", b'"text"', b"{", b"\xff\xfe{\x00}\x00", b"\x00" * 40, b"[" * 100_000,
        json.dumps(STAMP | {"outputs": []}).encode(), json.dumps(STAMP | {"outputs": {"a": 1}}).encode(),
        json.dumps(STAMP | {"commit": 3}).encode(), json.dumps(STAMP | {"key": None}).encode(),
        json.dumps(STAMP | {"trees": {"images": "abc"}}).encode(), json.dumps(STAMP | {"processes": "2"}).encode(),
        json.dumps(STAMP | {"trees": {"i": {"files": "2", "state": "", "sha256": ""}}}).encode(),
    ],
)  # fmt: skip
def test_a_stamp_that_cannot_be_read_counts_as_none(tmp_path, content):
    (tmp_path / "02_b.stamp.json").write_bytes(content)
    assert stamps.read(tmp_path, "02_b") == {}
    stamps.write(tmp_path, "02_b", STAMP)
    assert stamps.read(tmp_path, "02_b") == STAMP


@pytest.mark.parametrize("place", ["/etc", "../../etc", "images/../.."])
def test_a_stamp_with_a_place_outside_the_run_counts_as_none(tmp_path, place):
    for kind in ({"outputs": {place: "0"}}, {"trees": {place: {"files": 1, "state": "", "sha256": ""}}}):
        stamps.write(tmp_path, "02_b", STAMP | kind)
        assert stamps.read(tmp_path, "02_b") == {}


class TestTables:
    def test_of_a_run_are_those_of_its_stamps(self, run, stamp):
        figures = run / "figures"
        stamps.write(run, "02_b", stamp)
        stamps.check_tables(figures)
        (figures / "02_x.csv").write_text("by hand", encoding="utf-8")
        with pytest.raises(ValueError, match=r"figures/02_x\.csv was changed since 02_b ran; python -m lora_"):
            stamps.check_tables(figures)
        (figures / "02_x.csv").rename(figures / "02_y.csv")
        with pytest.raises(FileNotFoundError, match=r"figures/02_x.csv was removed since 02_b ran; "):
            stamps.check_tables(figures)

    def test_that_a_notebook_of_the_lab_wrote_are_not_judged(self, run):
        stamps.check_tables(run / "figures")

    def test_there_are_none(self, run):
        (run / "figures" / "02_x.csv").unlink()
        with pytest.raises(FileNotFoundError, match=r"no tables in .*figures; python -m lora_distill reproduce --prof"):
            stamps.check_tables(run / "figures")

    def test_of_the_repository_are_those_of_its_sums(self, tmp_path):
        folder = tmp_path / "full"
        for name in ("02_x.csv", "02_x.svg", "02_results.json", "02_x_images.png"):
            storage.atomic_write(folder / name, name)
        stamps.check_tables(folder)
        stamps.write_sums(folder)
        assert stamps.read_sums(folder).keys() == {"02_results.json", "02_x.csv", "02_x_images.png"}
        stamps.check_tables(folder)
        (folder / "02_x.csv").write_text("by hand", encoding="utf-8")
        with pytest.raises(ValueError, match=r"full/02_x\.csv was changed since it was committed; git checkout"):
            stamps.check_tables(folder)

    @pytest.mark.parametrize("content", [b"x", b"\xff\xfe\x00", b"00  a.csv\n", b"\n\n"])
    def test_sums_that_are_none(self, tmp_path, content):
        (tmp_path / "02_x.csv").touch()
        (tmp_path / "SHA256SUMS").write_bytes(content)
        with pytest.raises(ValueError, match="SHA256SUMS: expected lines of a SHA-256 and a file's name"):
            stamps.check_tables(tmp_path)

    @pytest.mark.parametrize("profile", ["full", "sd15-shape"])
    def test_of_this_repository_are_as_they_were_left(self, profile):
        folder = repository_root() / "figures" / profile
        known = {path.name for pattern in stamps.TABLES for path in folder.glob(pattern)}
        assert stamps.read_sums(folder).keys() == known
        stamps.check_tables(folder)
