"""Two methods compared on the same prompts and the same noise: contrasts with 95 % intervals by paired bootstrap.

Both methods are judged on the same prompts with the same seeds, each seed with one of a method's trainings. A resample
draws prompts and seeds anew, apart from each other, and the same ones for both methods (Owen 2007, "The pigeonhole
bootstrap"): what a hard prompt does to both cancels. Prompts are drawn within their strata. A seed carries its training
with it, so that the spread of training is in the interval where a method was trained as often as there are seeds; where
it was trained once, it is not. With one seed the interval is over prompts alone.
In simulations of 1,664 prompts and three trainings an interval of a ratio of errors holds the truth in 95 of 100 cases
where the trainings' errors differ by a tenth, in 88 where by a fifth, and in more where they do not.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lora_distill.errors import InputError
from lora_distill.judge.pictures import squared_errors

RESAMPLES, DISTANCE_RESAMPLES = 1000, 300  # of shares and means; of distances, each of which costs a decomposition
LEVEL = 0.95
ERRORS, ERRORS_OF_ALL = "errors ratio", "errors ratio, style too"  # of what counts; where that is content, of style too
FIT_ERROR, PSNR = "fit error difference", "PSNR difference"
FD_DIFFERENCE, FD_RATIO, KID_DIFFERENCE = "FD difference", "FD ratio", "KID difference"
FD_TO_TEACHER = "FD to teacher difference"


class Contrast(NamedTuple):
    """What a method has more of than another, and the 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Judged:
    """What is compared of a method: a row a seed, a column a prompt; None for what was not judged.

    `right` is whether an image shows what counts, `all_right` whether it is also in the right style where content alone
    counts, `fit_error` the error with which the reader's objects fit, `features` (seeds, prompts, width) are those of
    the Frechet distance, `squared_error` is the mean over pixels of (image - teacher's image)^2. `trainings` is how
    many trainings the seeds went through.
    """

    features: np.ndarray
    right: np.ndarray | None = None
    all_right: np.ndarray | None = None
    fit_error: np.ndarray | None = None
    squared_error: np.ndarray | None = None
    trainings: int = 1


@dataclass(frozen=True)
class Draws:
    """How often a resample holds each prompt, (resamples, prompts), and each seed, (resamples, seeds)."""

    prompts: np.ndarray
    seeds: np.ndarray

    def of(self, chosen: np.ndarray) -> "Draws":
        """The draws of some of the prompts, chosen by a mask (prompts,) that cuts through no stratum."""
        return Draws(self.prompts[:, chosen], self.seeds)


def draws(strata: Sequence[Any] | np.ndarray, seeds: int, resamples: int, seed: int = 0) -> Draws:
    """Draw prompts within strata, one label (prompts,) each, and one seed fewer than there are, from a seed of its own.

    Of three seeds, three drawn would spread by a third too little, as a deviation with ddof 0 does; two spread right
    (Rao and Wu 1988).
    """
    rng, strata = np.random.default_rng(seed), np.unique(strata, return_inverse=True)[1].ravel()
    prompts = np.zeros((resamples, len(strata)), int)
    for stratum in range(strata.max() + 1):
        members = np.flatnonzero(strata == stratum)
        prompts[:, members] = _multinomial(rng, len(members), resamples)
    return Draws(prompts, _multinomial(rng, seeds, resamples, drawn=seeds - 1))


def _multinomial(rng: np.random.Generator, count: int, resamples: int, drawn: int | None = None) -> np.ndarray:
    return rng.multinomial(drawn or count, np.full(count, 1 / count), size=resamples)


# ---------------------------------------------------------------------------------------------- shares and means


def drawn_means(values: np.ndarray, drawn: Draws) -> np.ndarray:
    """The mean of values (seeds, prompts) over each resample: (resamples,)."""
    sums = ((drawn.seeds @ values.astype(float)) * drawn.prompts).sum(1)
    return sums / (drawn.seeds.sum(1) * drawn.prompts.sum(1))


def mean_difference(ours: np.ndarray, theirs: np.ndarray, drawn: Draws) -> Contrast:
    """Mean of `ours` less that of `theirs`, both (seeds, prompts)."""
    _check(ours, theirs)
    difference = ours.astype(float) - theirs
    return _percentiles(float(difference.mean()), drawn_means(difference, drawn))


def mean_ratio(ours: np.ndarray, theirs: np.ndarray, drawn: Draws) -> Contrast:
    """Mean of `ours` over that of `theirs`, both (seeds, prompts) and positive."""
    _check(ours, theirs)
    resampled = drawn_means(ours, drawn) / drawn_means(theirs, drawn)
    return _percentiles(float(ours.mean() / theirs.mean()), resampled)


def errors_ratio(ours: np.ndarray, theirs: np.ndarray, drawn: Draws, seed: int = 0) -> Contrast:
    """How many times as many errors: those of `ours` over those of `theirs`, both bool (seeds, prompts).

    Half an error is added to both, so that no error is a number too. In a resample it is a draw of Gamma(1/2), apart
    for both: a bootstrap of no errors has no errors, and this gives them the width of Jeffreys' interval.
    """
    _check(ours, theirs)
    rng = np.random.default_rng(seed)
    more, less = (
        drawn_means(errors, drawn) * errors.size + rng.gamma(0.5, size=len(drawn.prompts)) for errors in (ours, theirs)
    )
    return _percentiles(float((ours.sum() + 0.5) / (theirs.sum() + 0.5)), more / np.maximum(less, 1e-9))


def psnr_difference(ours: np.ndarray, theirs: np.ndarray, drawn: Draws) -> Contrast:
    """PSNR to a third's images of one method less that of another, in dB, from squared errors (seeds, prompts).

    The PSNR is that of the mean squared error over all images.
    """
    value, low, high = mean_ratio(theirs, ours, drawn)
    return Contrast(*(float(10 * np.log10(each)) for each in (value, low, high)))


def _percentiles(value: float, resampled: np.ndarray) -> Contrast:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Contrast(value, float(low), float(high))


def _check(ours: np.ndarray, theirs: np.ndarray) -> None:
    if ours.shape != theirs.shape:
        raise InputError(f"expected the same seeds and prompts of both methods, got {ours.shape} and {theirs.shape}")


# ---------------------------------------------------------------------------------------------- distances


class Moments(NamedTuple):
    """Mean (width,) and unbiased covariance (width, width) of rows of features."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(rows: np.ndarray, weights: np.ndarray | None = None) -> Moments:
    """Moments of rows (n, width), each counted as often as its whole weight says."""
    weights = np.ones(len(rows)) if weights is None else weights
    n, mean = weights.sum(), weights @ rows / weights.sum()
    used = weights > 0
    centred = (rows[used] - mean) * np.sqrt(weights[used])[:, None]
    return Moments(mean, centred.T @ centred / (n - 1))


def frechet(ours: Moments, theirs: Moments, root: np.ndarray | None = None) -> float:
    """The Frechet distance of two sets by their moments (Heusel et al. 2017, eq. 6).

    tr (A B)^1/2 is taken of B^1/2 A B^1/2, which has the same eigenvalues and is symmetric; `root` is B^1/2.
    """
    root = _root(theirs.covariance) if root is None else root
    values = np.linalg.eigvalsh(root @ ours.covariance @ root)
    shift = np.sum((ours.mean - theirs.mean) ** 2)
    traces = np.trace(ours.covariance) + np.trace(theirs.covariance)
    return float(shift + traces - 2 * np.sqrt(values.clip(0)).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def drawn_frechet(features: np.ndarray, reference: np.ndarray, drawn: Draws) -> np.ndarray:
    """The Frechet distance of features (seeds, prompts, width), a mean over seeds: of all, then of each resample.

    `reference` is (m, width), common to all, or features of the same seeds and prompts, which are drawn alike.
    """
    features, reference = features.astype(float), reference.astype(float)
    if reference.ndim == 2:
        fixed = moments(reference)
        root = _root(fixed.covariance)
        return _mean_over_seeds(lambda s, w: frechet(moments(features[s], w), fixed, root), features, drawn)
    _check(features, reference)
    return _mean_over_seeds(lambda s, w: frechet(moments(features[s], w), moments(reference[s], w)), features, drawn)


def _mean_over_seeds(measure: Callable[[int, np.ndarray], float], features: np.ndarray, drawn: Draws) -> np.ndarray:
    """`measure(seed, weights of prompts)` over seeds: of all prompts, then of each resample."""
    seeds, everything = range(len(features)), np.ones(features.shape[1])
    means = [np.mean([measure(s, everything) for s in seeds])]
    for prompts, counts in zip(drawn.prompts, drawn.seeds, strict=True):
        means.append(sum(counts[s] * measure(s, prompts) for s in seeds if counts[s]) / counts.sum())
    return np.array(means)


def drawn_kernel(features: np.ndarray, reference: np.ndarray, drawn: Draws) -> np.ndarray:
    """KID of features (seeds, prompts, width) up to the reference's own term: of all, then of each resample.

    The unbiased MMD^2 with KID's kernel (x.y / width + 1)^3 (Binkowski et al. 2018), a mean over seeds. An image and
    its copy are no pair. The term that is left out is the same for all methods and leaves a difference as it is.
    """
    n, width = features.shape[1:]
    counts = np.vstack([np.ones(n), drawn.prompts]).astype(float)  # (1 + resamples, n)
    seeds = np.vstack([np.ones(len(features)), drawn.seeds])
    total = 0.0
    for s, rows in enumerate(features.astype(float)):
        pairs = (rows @ rows.T / width + 1) ** 3
        np.fill_diagonal(pairs, 0)
        cross = ((rows @ reference.T.astype(float) / width + 1) ** 3).mean(1)
        others = np.maximum(n**2 - (counts**2).sum(1), 1)  # of a resample of one image none
        own = ((counts @ pairs) * counts).sum(1) / others
        total = total + seeds[:, s] * (own - 2 * (counts @ cross) / n)
    return total / seeds.sum(1)


def distance_difference(ours: np.ndarray, theirs: np.ndarray) -> Contrast:
    """The difference of two `drawn_frechet` or `drawn_kernel`: its value of all, and the interval laid around it.

    Not the bare percentiles: a resample holds images twice, which moves a distance up as fewer images would.
    """
    value, *resampled = ours - theirs
    interval = _percentiles(0, resampled - np.mean(resampled))
    return Contrast(float(value), float(value + interval.low), float(value + interval.high))


def distance_ratio(ours: np.ndarray, theirs: np.ndarray) -> Contrast:
    """The ratio of two `drawn_frechet`, with the interval of `distance_difference` of their logarithms."""
    logs = (np.log(np.maximum(each, 1e-12)) for each in (ours, theirs))
    return Contrast(*map(float, np.exp(distance_difference(*logs))))


# ---------------------------------------------------------------------------------------------- seconds


def seconds_ratio(
    ours: Sequence[float], theirs: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Contrast:
    """Median over pairs of `ours` to `theirs`, seconds that were taken in turns, an entry a turn."""
    _check(np.asarray(ours), np.asarray(theirs))
    ratios = np.asarray(ours) / np.asarray(theirs)
    index = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    return _percentiles(float(np.median(ratios)), np.median(ratios[index], axis=1))


# ---------------------------------------------------------------------------------------------- tables


def judged(qualities: Sequence[Any], trainings: int = 1, teacher: Sequence[Any] | None = None) -> Judged:
    """What is compared of a method, of its `judge.Quality` of each seed, and those of the teacher of the same seeds."""
    found = {}
    if qualities[0].right is not None:
        found = {name: np.stack([getattr(quality, name) for quality in qualities]) for name in ("right", "fit_error")}
        if qualities[0].key != "all":
            found["all_right"] = np.stack([quality.verdicts.right["all"] for quality in qualities])
    if teacher is not None and teacher is not qualities:
        pairs = zip(qualities, teacher, strict=True)
        found["squared_error"] = np.stack([squared_errors(q.images, t.images) for q, t in pairs])
    return Judged(np.stack([np.asarray(q.features.frechet) for q in qualities]), **found, trainings=trainings)


def contrast_rows(
    methods: dict[str, Judged],
    contrasts: dict[str, tuple[str, str]],
    reference: np.ndarray,
    objects: np.ndarray | None = None,
    strata: Sequence[Any] | np.ndarray | None = None,
    *,
    teacher: str = "",
    resamples: int = RESAMPLES,
    distance_resamples: int = DISTANCE_RESAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A table of contrasts {name: (method, against)}: a row a contrast, measure and number of objects.

    `reference` (m, width) are features of real images, `objects` (prompts,) the number of objects of each prompt,
    `strata` what prompts are drawn within, by default that number. Distances are of all prompts. With the name of the
    `teacher` there is also FD to its images.
    """
    first = next(iter(methods.values()))
    prompts, seeds = first.features.shape[1], len(first.features)
    strata = strata if strata is not None else objects if objects is not None else np.zeros(prompts)
    many, few = (draws(strata, seeds, count, seed) for count in (resamples, distance_resamples))
    distances = _Distances(methods, reference, few, teacher)
    rows = []
    for name, (ours, theirs) in contrasts.items():
        pair = methods[ours], methods[theirs]
        start = {"contrast": name, "method": ours, "against": theirs}
        made = {"seeds": seeds, "trainings": pair[0].trainings, "against_trainings": pair[1].trainings}
        for measure, shown, n, contrast in _of_pixels(*pair, objects, many):
            found = {"measure": measure, "objects": shown, **_rounded(contrast), "n": n}
            rows.append({**start, **found, **made, "resamples": resamples})
        for measure, contrast in distances.contrasts(ours, theirs):
            found = {"measure": measure, "objects": "all", **_rounded(contrast), "n": prompts}
            rows.append({**start, **found, **made, "resamples": distance_resamples})
    return rows


def _rounded(contrast: Contrast) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in contrast._asdict().items()}


def _groups(objects: np.ndarray | None, prompts: int) -> Iterator[tuple[str, np.ndarray]]:
    """All prompts, and those of each number of objects."""
    yield "all", np.ones(prompts, bool)
    for count in np.unique(objects) if objects is not None else ():
        yield str(count), np.asarray(objects) == count


def _of_pixels(
    ours: Judged, theirs: Judged, objects: np.ndarray | None, drawn: Draws
) -> Iterator[tuple[str, str, int, Contrast]]:
    """Measure, objects, number of prompts and contrast of what is known of each image."""
    for shown, chosen in _groups(objects, ours.features.shape[1]):
        part, n = drawn.of(chosen), int(chosen.sum())
        for measure, name, contrast in (
            (ERRORS, "right", _wrong_ratio), (ERRORS_OF_ALL, "all_right", _wrong_ratio),
            (FIT_ERROR, "fit_error", mean_difference), (PSNR, "squared_error", psnr_difference),
        ):  # fmt: skip
            one, other = getattr(ours, name), getattr(theirs, name)
            if one is not None and other is not None:
                yield measure, shown, n, contrast(one[:, chosen], other[:, chosen], part)


def _wrong_ratio(ours: np.ndarray, theirs: np.ndarray, drawn: Draws) -> Contrast:
    return errors_ratio(~ours, ~theirs, drawn)


class _Distances:
    """Distances of methods over the same resamples, each computed once."""

    def __init__(self, methods: dict[str, Judged], reference: np.ndarray, drawn: Draws, teacher: str):
        self.methods, self.reference, self.drawn, self.teacher = methods, np.asarray(reference), drawn, teacher
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def of(self, kind: str, method: str) -> np.ndarray:
        if (kind, method) not in self.known:
            features = self.methods[method].features
            if kind == "KID":
                found = drawn_kernel(features, self.reference, self.drawn)
            else:
                to = self.reference if kind == "FD" else self.methods[self.teacher].features
                found = drawn_frechet(features, to, self.drawn)
            self.known[kind, method] = found
        return self.known[kind, method]

    def contrasts(self, ours: str, theirs: str) -> Iterable[tuple[str, Contrast]]:
        fd = self.of("FD", ours), self.of("FD", theirs)
        yield FD_DIFFERENCE, distance_difference(*fd)
        yield FD_RATIO, distance_ratio(*fd)
        yield KID_DIFFERENCE, distance_difference(self.of("KID", ours), self.of("KID", theirs))
        if self.teacher and self.teacher not in (ours, theirs):
            yield FD_TO_TEACHER, distance_difference(self.of("to teacher", ours), self.of("to teacher", theirs))
