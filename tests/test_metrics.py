"""The numbers that judge images, against independent plain computations."""

import numpy as np
import pytest
import torch

from lora_distill import scenes
from lora_distill.evaluation import drawn
from lora_distill.metrics import EfficientNetLite0, FrechetDistance, Proportion, prompt_alignment, psnr


def test_wilsons_interval_has_the_bounds_that_solve_its_equation():
    """|p - bound| = z sqrt(bound (1 - bound) / n), by definition."""
    proportion = Proportion(0.93, 200)
    for bound in proportion.interval:
        assert abs(0.93 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 200) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_all_or_nothing_is_not_a_point(value):
    low, high = Proportion(value, 50).interval
    assert 0 <= low < high <= 1 and high - low == pytest.approx(3.84146 / (50 + 3.84146), rel=1e-3)


def test_a_proportion_reads_as_one_line():
    assert str(Proportion(0.5, 100)) == "50.0 % (40.4 to 59.6, N = 100)"


def test_alignment_is_1_for_the_scenes_that_were_drawn_and_0_for_others():
    shown = scenes.sample_scenes("noto", "val", 20, seed=0)
    images = np.stack([scenes.draw(s) for s in shown])
    assert all(p.value == 1 and p.count == 20 for p in prompt_alignment(images, shown).values())
    others = [s for s in scenes.sample_scenes("noto", "val", 200, seed=1)][-20:]
    assert prompt_alignment(images, others)["all"].value == 0


def frechet(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), the trace by the eigenvalues of A B."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def features(images):
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        return torch.cat([EfficientNetLite0()(batch) for batch in pixels.split(50)]).double().numpy()


def test_the_distance_is_frechets_on_the_features():
    reference, images = drawn("noto", "val", 150, seed=0), drawn("fluent", "val", 150, seed=0)
    distance = FrechetDistance(reference)
    expected = frechet(features(reference), features(images))
    assert distance(images) == pytest.approx(expected, rel=2e-3)
    assert distance(reference) == pytest.approx(0, abs=1e-2 * expected), "asked again, with the same reference"


def test_another_style_is_farther_than_another_draw():
    distance = FrechetDistance(drawn("noto", "val", 300, seed=0))
    assert distance(drawn("noto", "val", 150, seed=1)) < 0.5 * distance(drawn("fluent", "val", 150, seed=0))


def test_psnr_is_ten_log_of_the_squared_peak_over_the_error():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(images, images + 5) == pytest.approx(20 * np.log10(255 / 5)) and psnr(images, images) == float("inf")
