"""Distances between two sets of feature rows, and the spread of such a number over the images."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from lora_distill.errors import InputError

BLOCK = 1000  # rows compared with all others at a time: memory stays linear in their number


class _Rows(nn.Identity):
    """Stands where torchmetrics expects a network: the rows are features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width


def frechet_distance(rows: Tensor, reference: Tensor) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2) of rows (n, d) and (m, d), in float64 (Heusel et al. 2017, eq. 6).

    Biased upwards at finite n and m. Raises ValueError for fewer than two rows.
    """
    _check(rows, reference, least=2)
    metric = FrechetInceptionDistance(_Rows(rows.shape[1]))
    metric.update(rows.double(), real=False)
    metric.update(reference.double(), real=True)
    return float(metric.compute())


def kernel_distance(
    rows: Tensor, reference: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Unbiased MMD^2 of rows (n, d) and (m, d) with `polynomial_kernel` (Binkowski et al. 2018, section 4).

    The mean over `subsets`, drawn from `seed`, of at most `subset_size`, n and m rows; where that is the whole of both
    sets, there is one. Raises ValueError for fewer than two rows.
    """
    _check(rows, reference, least=2)
    size = min(subset_size, len(rows), len(reference))
    if size == len(rows) == len(reference):
        subsets = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics tells that it keeps features; here they exist
        metric = KernelInceptionDistance(_Rows(rows.shape[1]), subsets=subsets, subset_size=size)
    metric.update(rows, real=False)
    metric.update(reference, real=True)
    return _seeded_mean(metric.compute, seed)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> float:
    """exp of the mean KL of p(y|x) from p(y) (Salimans et al. 2016), the mean over `splits` of logits (n, c).

    Raises ValueError for fewer rows than splits, or fewer than two splits.
    """
    if not 2 <= splits <= len(logits):
        raise InputError(f"splits: expected 2 to {len(logits)}, the number of images, got {splits}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as above
        metric = InceptionScore(_Rows(logits.shape[1]), splits=splits)
    metric.update(logits)
    return _seeded_mean(metric.compute, seed)


def _seeded_mean(compute: Callable[[], tuple[Tensor, Tensor]], seed: int) -> float:
    """torchmetrics draws from torch's global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return float(compute()[0])


def precision_recall(rows: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall of rows (n, d) against (m, d) (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Precision is the share of rows inside the reference's manifold, recall that of the reference inside the rows'. A
    manifold is the union of balls around its points, each as wide as to the point's k-th nearest neighbour. Raises
    ValueError for sets that have no such neighbour.
    """
    _check(rows, reference, least=neighbours + 1)
    precision = _inside(rows, reference, _neighbour_distances(reference, neighbours))
    return precision, _inside(reference, rows, _neighbour_distances(rows, neighbours))


def _neighbour_distances(rows: Tensor, neighbours: int) -> Tensor:
    """From each row to its k-th nearest other row, (n,)."""
    radii = []
    for start in range(0, len(rows), BLOCK):
        distances = torch.cdist(rows[start : start + BLOCK], rows)  # (block, n)
        distances.diagonal(start).fill_(torch.inf)
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _inside(rows: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = sum(int((torch.cdist(block, centres) <= radii).any(dim=1).sum()) for block in rows.split(BLOCK))
    return inside / len(rows)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of rows (n, d) and (m, d), KID's kernel: (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def clip_kernel(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """1000 exp(-|x - y|^2 / 2 sigma^2) of rows (n, d) and (m, d) scaled to length 1, CMMD's kernel: (n, m)."""
    cosine = nn.functional.normalize(x, dim=1) @ nn.functional.normalize(y, dim=1).T
    return 1000 * torch.exp((cosine - 1) / sigma**2)


def clip_mmd(embeds: Tensor, reference: Tensor) -> float:
    """CMMD: MMD^2 of CLIP embeddings (n, d) and (m, d) with `clip_kernel` (Jayasumana et al. 2024, eq. 5).

    The estimator is that of the authors' code, means over all pairs with a row and itself among them. It lies above
    the unbiased one by (1000 - mean kernel)(1/n + 1/m), nearly.
    """
    _check(embeds, reference, least=1)

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        return sum(float(clip_kernel(block, y).sum()) for block in x.split(BLOCK)) / (len(x) * len(y))

    x, y = embeds.double(), reference.double()
    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


# ---------------------------------------------------------------------------------------------- spread


def resampled(
    measure: Callable[[Tensor, Tensor], float], rows: Tensor, reference: Tensor, resamples: int, seed: int
) -> Tensor:
    """measure(rows, reference) with n rows drawn again with replacement (Efron 1979): (resamples,) float64.

    The reference stays as it is, being common to all that are compared with it.
    """
    drawn = [measure(rows[index], reference) for index in _draws(len(rows), resamples, seed)]
    return torch.tensor(drawn, dtype=torch.float64)


def resampled_mmd(
    kernel: Callable[[Tensor, Tensor], Tensor], rows: Tensor, reference: Tensor, resamples: int, seed: int
) -> Tensor:
    """The unbiased MMD^2 of the draws of `resampled`, up to the reference's own term: (resamples,) float64.

    Each kernel value is computed once and counted as often as its pair was drawn; an image and its copy are no pair.
    """
    n = len(rows)
    counts = torch.stack([torch.bincount(index, minlength=n) for index in _draws(n, resamples, seed)]).to(rows.dtype)
    own, cross = torch.zeros(2, resamples, dtype=torch.float64)
    for start in range(0, n, BLOCK):
        block, weights = rows[start : start + BLOCK], counts[:, start : start + BLOCK]
        pairs = kernel(block, rows)  # (block, n)
        pairs.diagonal(start).zero_()
        own += (weights @ pairs * counts).sum(1)
        cross += weights @ kernel(block, reference).mean(1)
    return own / (n**2 - counts.double().square().sum(1)) - 2 * cross / n


def _draws(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(count, (count,), generator=generator)


def interval(value: float, drawn: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap percentiles of `drawn` about its mean, laid around `value`.

    Not the bare percentiles: a draw holds some images twice, which moves a Frechet distance up as fewer images would,
    often so far that the bare interval does not hold the value it is for.
    """
    low, high = torch.quantile(drawn - drawn.mean(), torch.tensor([1 - level, 1 + level], dtype=drawn.dtype) / 2)
    return value + float(low), value + float(high)


def _check(rows: Tensor, reference: Tensor, least: int) -> None:
    if min(len(rows), len(reference)) < least:
        raise InputError(f"expected {least} images or more in both sets, got {len(rows)} and {len(reference)}")
