"""Figures: the same bytes from the same numbers, provenance inside, and a mark on what is no result."""

import csv
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_distill import figures
from lora_distill.metrics import Proportion
from lora_distill.settings import Settings

ROWS = [{"x": 1, "y": 2.5}, {"x": 2, "y": 3.5}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "figures_dir", lambda settings: tmp_path / settings.profile)
    figures.use_style()
    return tmp_path


def save(profile="cpu"):
    fig, ax = plt.subplots()
    ax.plot([row["x"] for row in ROWS], [row["y"] for row in ROWS])
    figures.save_figure(fig, "line", Settings(profile=profile), ROWS, "A line")
    plt.close(fig)
    return fig


def test_a_figure_is_written_in_three_formats_with_its_numbers(folder):
    save()
    assert {path.name for path in (folder / "cpu").iterdir()} == {"line.svg", "line.pdf", "line.png", "line.csv"}
    with (folder / "cpu" / "line.csv").open() as file:
        assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == ROWS


def test_the_same_numbers_give_the_same_bytes(folder):
    save()
    first = {path.name: path.read_bytes() for path in (folder / "cpu").iterdir()}
    save()
    assert first == {path.name: path.read_bytes() for path in (folder / "cpu").iterdir()}


def test_the_provenance_is_in_the_file(folder):
    save()
    comment = json.loads(Image.open(folder / "cpu" / "line.png").text["Comment"])
    assert comment["profile"] == "cpu" and set(comment) == {"params", "profile", "commit"}


def test_what_smoke_draws_is_marked_as_no_result(folder):
    assert any("not a result" in text.get_text() for text in save("smoke").texts)
    assert not save("cpu").texts


def test_error_bars_are_the_wilson_interval_in_percent():
    proportion = Proportion(0.8, 10)
    low, high = proportion.interval
    assert np.allclose(figures.errors([proportion])[:, 0], [80 - 100 * low, 100 * high - 80])


def test_an_image_grid_shows_every_image():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    grid = figures.image_grid({"a": images, "b": images}, ["one", "two", "three"])
    assert sum(len(ax.images) for ax in grid.axes) == 6
    plt.close(grid)
