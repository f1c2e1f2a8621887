"""Distances between rows of features, against plain formulas and constructed sets with known answers."""

import numpy as np
import pytest
import torch

from lora_distill.judge import distances


def rows(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), the trace of the root by way of the symmetric A^1/2 B A^1/2."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    trace = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace


def test_frechets_distance_is_its_formula_in_double_precision():
    a, b = rows(50), 2 * rows(70, seed=1, shift=0.3)
    assert distances.frechet_distance(a, b) == pytest.approx(plain_frechet(a.double().numpy(), b.double().numpy()))


def test_frechets_distance_of_moved_points_is_the_square_of_the_way():
    a = rows(50)
    assert distances.frechet_distance(a, a + torch.tensor([3.0, 4.0, 0, 0, 0, 0])) == pytest.approx(25, rel=1e-6)


def plain_kid(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased MMD^2, pair by pair: Binkowski et al. 2018, equation 4."""
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    m, n = len(x), len(y)
    own_x = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    own_y = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return own_x + own_y - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_the_kernel_distance_is_the_unbiased_mmd():
    x, y = rows(30), rows(30, seed=1, shift=0.5)
    expected = plain_kid(x.double().numpy(), y.double().numpy())
    assert distances.kernel_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_subsets_average_to_the_whole_and_depend_on_their_seed_alone():
    x, y = rows(40), rows(60, seed=1, shift=0.5)
    state = torch.get_rng_state()
    first = distances.kernel_distance(x, y, subsets=400, subset_size=30, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert distances.kernel_distance(x, y, subsets=400, subset_size=30, seed=1) == first
    assert distances.kernel_distance(x, y, subsets=400, subset_size=30, seed=2) != first
    assert first == pytest.approx(plain_kid(x.double().numpy(), y.double().numpy()), rel=0.05)


def test_the_inception_score_of_known_probabilities_is_its_closed_form():
    """p(y|x) is (0.9, 0.1) or (0.1, 0.9), a share s of the first: exp(H(p(y)) - H(p(y|x))), a split at a time."""
    first = torch.arange(60) < 25
    logits = torch.where(first[:, None], torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])).log()
    torch.manual_seed(3)
    shares = [float(part.float().mean()) for part in first[torch.randperm(60)].chunk(4)]
    entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
    expected = np.mean([np.exp(entropy(0.1 + 0.8 * s) - entropy(0.1)) for s in shares])
    assert distances.inception_score(logits, splits=4, seed=3) == pytest.approx(expected, rel=1e-5)


def test_images_that_are_all_alike_have_an_inception_score_of_1():
    assert distances.inception_score(torch.tensor([[3.0, 1.0, 0.0]]).repeat(20, 1)) == pytest.approx(1)


def test_precision_and_recall_of_points_on_a_line():
    """With k = 1 the reference's balls are [-1, 1], [0, 2], [1, 3], [2, 4]; the rows' have radii 3.4, 0.3, 0.3, 5.8."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    points = torch.tensor([[0.5], [3.9], [4.2], [10.0]])
    assert distances.precision_recall(points, reference, neighbours=1) == (0.5, 1.0)
    assert distances.precision_recall(reference, points, neighbours=1) == (1.0, 0.5)


def test_a_part_of_the_truth_is_precise_and_does_not_recall():
    """Two clusters of four, the rows only in one of them."""
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    both = torch.cat([square, square + 100])
    assert distances.precision_recall(square, both) == (1.0, 0.5)
    assert distances.precision_recall(both, both) == (1.0, 1.0)
    assert distances.precision_recall(square + 50, both) == (0.0, 0.0)


def test_manifolds_are_those_of_plain_loops_whatever_the_block(monkeypatch):
    x, y = rows(23, 2), rows(31, 2, seed=1, shift=1.0)

    def share(points, centres):
        radius = [sorted(np.linalg.norm(c - o) for o in centres)[3] for c in centres]  # the 0th is the point itself
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        return sum(inside) / len(points)

    expected = share(x.numpy(), y.numpy()), share(y.numpy(), x.numpy())
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    for block in (5, 1000):
        monkeypatch.setattr(distances, "BLOCK", block)
        assert distances.precision_recall(x, y) == pytest.approx(expected)


def test_cmmd_is_its_authors_formula(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    x, y = rows(20), rows(30, seed=1, shift=1.0)
    a, b = (z.double().numpy() / np.linalg.norm(z.double().numpy(), axis=1, keepdims=True) for z in (x, y))
    mean = lambda p, q: np.mean([[np.exp(-((i - j) ** 2).sum() / 200) for j in q] for i in p])  # noqa: E731
    assert distances.clip_mmd(x, y) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), rel=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused_in_one_line(count):
    for measure in (distances.frechet_distance, distances.kernel_distance, distances.precision_recall):
        with pytest.raises(ValueError, match=rf"images or more in both sets, got {count} and 9"):
            measure(rows(9)[:count], rows(9))
    with pytest.raises(ValueError, match="splits: expected 2 to 9"):
        distances.inception_score(rows(9))


def test_the_bootstrap_of_a_mean_has_the_width_that_theory_gives():
    x = rows(200, 1)
    drawn = distances.resampled(lambda a, b: float(a.mean() - b.mean()), x, x - 5, resamples=2000, seed=0)
    assert float(drawn.mean()) == pytest.approx(5, abs=0.01)
    low, high = distances.interval(7.0, drawn)
    assert (low + high) / 2 == pytest.approx(7, abs=0.02), "around the value, wherever the draws are"
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 200**0.5, rel=0.08)


def test_the_bootstrap_depends_on_its_seed():
    measure = lambda a, b: float(a.mean())  # noqa: E731
    first, again, other = (distances.resampled(measure, rows(9), rows(9), 5, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_resampled_kernels_are_those_of_pairs_of_two_images(monkeypatch):
    """Against plain sums over the drawn pairs, an image with its own copy left out."""
    monkeypatch.setattr(distances, "BLOCK", 4)
    x, y = rows(9), rows(12, seed=1, shift=0.5)
    drawn = distances.resampled_mmd(distances.polynomial_kernel, x, y, resamples=3, seed=5)
    kernel = lambda a, b: float((a @ b / 6 + 1) ** 3)  # noqa: E731
    generator = torch.Generator().manual_seed(5)
    for value in drawn:
        index = torch.randint(9, (9,), generator=generator).tolist()
        own = [kernel(x[i], x[j]) for i in index for j in index if i != j]
        cross = [kernel(x[i], other) for i in index for other in y]
        assert float(value) == pytest.approx(np.mean(own) - 2 * np.mean(cross), rel=1e-5)
