"""Judging images: prompt alignment by the reader, distances by their extractor's name, fidelity to the teacher."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from lora_distill.data.scenes import Scene
from lora_distill.data.teacher import Prompts
from lora_distill.errors import InputError, MissingError, one_line
from lora_distill.judge import distances
from lora_distill.judge.features import LAYERS, Features, cached_features, extract, load_extractor, pretrained_clip
from lora_distill.judge.pictures import Pictures, batches, squared_errors
from lora_distill.judge.reader import Reader, Verdicts, judge_images


@dataclass(frozen=True)
class Proportion:
    """A share of `count` images with its 95 % Wilson interval (Wilson 1927).

    Images of one prompt are alike: `effective` is the number of independent ones that they are worth, see `clustered`.
    """

    value: float
    count: int
    effective: float | None = None

    @classmethod
    def clustered(cls, flags: np.ndarray) -> "Proportion":
        """The share of flags (seeds, prompts). Their number is divided by the design effect (Kish 1965).

        That is how much more the prompts' means vary than those of independent flags would.
        """
        seeds, prompts = flags.shape
        share = float(flags.mean())
        independent, found = share * (1 - share) / flags.size, 0.0
        if prompts > 1:
            found = float(flags.mean(axis=0).var(ddof=1)) / prompts
        effect = min(max(found / independent, 1.0), seeds) if independent else 1.0
        return cls(share, flags.size, flags.size / effect)

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.effective or self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    @property
    def columns(self) -> dict[str, float]:
        """The interval and N as a table has them beside the share: low, high and n."""
        low, high = self.interval
        return {"low": low, "high": high, "n": self.count}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}, N = {self.count})"


@dataclass(frozen=True)
class Score:
    """One number about `count` images, against `reference_count` others where it compares.

    `low` and `high` bound the 95 % bootstrap interval over the images, where one was asked for. `dataclasses.asdict`
    makes a row of a table of it.
    """

    name: str
    value: float
    count: int
    reference_count: int | None = None
    low: float | None = None
    high: float | None = None

    @property
    def columns(self) -> dict[str, float | None]:
        """The interval and N as a table has them beside the value: low, high and n."""
        return {"low": self.low, "high": self.high, "n": self.count}

    @property
    def interval(self) -> tuple[float, float]:
        """`low` and `high`; the value itself where no interval was asked for."""
        return (self.value, self.value) if self.low is None else (self.low, self.high)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return f"{self.name} {self.value:.4g}{interval}, N = {self.count}"


def mean_score(name: str, values: np.ndarray) -> Score:
    """The mean of a number an image, (n,), with its normal 95 % interval where there are two or more."""
    values = np.asarray(values, dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    half = 1.959964 * float(values.std(ddof=1)) / count**0.5 if count > 1 else None
    return Score(name, mean, count, None, *((None, None) if half is None else (mean - half, mean + half)))


def alignment(verdicts: Verdicts) -> dict[str, Proportion | Score]:
    """The reader's verdicts on n images as scores: the share that is right, by attribute, and two means.

    Those are `object_share`, of the asked objects that are in their place, and `fit_error`, lower where they are clean.
    """
    scores: dict[str, Proportion | Score] = {
        name: Proportion(float(values.mean()), len(values)) for name, values in verdicts.right.items()
    }
    means = {"object_share": verdicts.object_share, "fit_error": verdicts.fit_error}
    return scores | {name: mean_score(name, values) for name, values in means.items()}


def prompt_alignment(
    images: np.ndarray, scenes: list[Scene], reader: Reader | None = None
) -> dict[str, Proportion | Score]:
    """The `alignment` of images (n, 64, 64, 3) uint8 with their scenes."""
    return alignment(judge_images(images, scenes, reader))


# ---------------------------------------------------------------------------------------------- distances


def metric_name(short: str, extractor: str) -> str:
    """A metric's name on an extractor's features: FID, KID and IS without a surname are Inception's alone."""
    if extractor == "Inception" and short in ("FD", "KID", "IS"):
        return {"FD": "FID"}.get(short, short)
    return f"{short}-{extractor}"


def compare(
    features: Features, reference: Features, neighbours: int = 3, subsets: int = 100, resamples: int = 0, seed: int = 0
) -> dict[str, Score]:
    """What features say of images against a reference, by name: FD and KID, or on CLIP CMMD; precision and recall.

    `neighbours` is the k of precision and recall, `subsets` are KID's; `resamples` > 0 adds bootstrap intervals to
    the distances. Raises ValueError for features of two extractors and for too few images.
    """
    if features.extractor != reference.extractor:
        raise InputError(f"features of {features.extractor} cannot be compared with those of {reference.extractor}")
    counts, scores = (len(features), len(reference)), {}
    for short, layer, measure, resample in _distances(features.extractor, subsets, seed):
        rows, others = getattr(features, layer), getattr(reference, layer)
        value = measure(rows, others)
        bounds = distances.interval(value, resample(rows, others, resamples, seed)) if resamples else (None, None)
        scores[short] = Score(short, value, *counts, *bounds)
    manifolds = distances.precision_recall(features.kernel, reference.kernel, neighbours)
    for short, value in zip(("precision", "recall"), manifolds, strict=True):
        name = metric_name(short, features.extractor)
        scores[name] = Score(name, value, *counts)
    return scores


def _distances(extractor: str, subsets: int, seed: int) -> list[tuple[str, str, Callable, Callable]]:
    """Name, layer, measure and its bootstrap of the distances that are usual on an extractor."""
    if extractor == "CLIP":
        return [("CMMD", "kernel", distances.clip_mmd, partial(distances.resampled_mmd, distances.clip_kernel))]
    frechet, kernel = distances.frechet_distance, partial(distances.kernel_distance, subsets=subsets, seed=seed)
    resampled_kernel = partial(distances.resampled_mmd, distances.polynomial_kernel)
    return [
        (metric_name("FD", extractor), "frechet", frechet, partial(distances.resampled, frechet)),
        (metric_name("KID", extractor), "kernel", kernel, resampled_kernel),
    ]


def real_floor(real: Features, reference: Features, count: int, seed: int = 0, **options) -> dict[str, Score]:
    """`compare` for `count` real images drawn from `real`, which are others than the reference's.

    What a perfect sampler would get at N = count; `options` are those of `compare`. Raises ValueError where there
    are fewer real images.
    """
    if count > len(real):
        raise InputError(f"a floor at N = {count} needs as many real images beside the reference, got {len(real)}")
    drawn = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:count]
    return compare(real[drawn], reference, seed=seed, **options)


def inception_score(features: Features, splits: int = 10, seed: int = 0) -> Score:
    """The inception score on the extractor's class scores, IS-EfficientNet-Lite0 for instance.

    Raises ValueError for an extractor without classes and for fewer images than splits.
    """
    value = distances.inception_score(features.logits, splits, seed)
    return Score(metric_name("IS", features.extractor), value, len(features))


class FrechetDistance:
    """The Frechet distance, by default FD-EfficientNet-Lite0, to reference images whose features are taken once.

    `reference` is an array (n, h, w, 3) uint8 or a list of such; with `cache_dir` all features are kept there. Further
    measures on the same features need `layers`, by default the distance's own alone.
    """

    def __init__(
        self,
        reference: np.ndarray | Pictures | Iterable[np.ndarray],
        device: str = "cpu",
        extractor: str = "EfficientNet-Lite0",
        source: str | Path | None = None,
        cache_dir: Path | None = None,
        layers: Iterable[str] | None = None,
    ):
        self.extractor = load_extractor(extractor, source, device)
        self.layers = tuple(layers or [LAYERS[extractor].frechet])
        self.name = metric_name("FD", extractor)
        self.cache_dir = cache_dir
        self.reference = self.features(reference)

    def __call__(self, images: np.ndarray | Pictures | Iterable[np.ndarray]) -> float:
        """The distance of images (n, h, w, 3) uint8 to the reference."""
        return distances.frechet_distance(self.features(images).frechet, self.reference.frechet)

    def features(self, images: np.ndarray | Pictures | Iterable[np.ndarray]) -> Features:
        """The layers of images (n, h, w, 3) uint8, in one pass over them; from the cache where they are in it."""
        if self.cache_dir:
            return cached_features(self.extractor, images, self.cache_dir, self.layers)
        return extract(self.extractor, images, self.layers)


class Aligned(NamedTuple):
    """How well images fit their prompts: scores by name, and of scenes the reader's verdicts, image by image."""

    scores: dict[str, Proportion | Score]
    verdicts: Verdicts | None = None


Aligner = Callable[[np.ndarray | Pictures], Aligned]


def aligner(prompts: Prompts, clip: str = "", device: str = "cpu", batch_size: int = 50) -> Aligner:
    """How images of the prompts, one a prompt, are scored.

    Scenes are read once: the scores are those of `alignment`. Of photographs, CLIP's cosine is "clip"; without a CLIP
    there is no score.
    """
    if prompts.scenes is not None:
        reader = Reader()

        def read(images: np.ndarray | Pictures) -> Aligned:
            verdicts = judge_images(np.asarray(images), prompts.scenes, reader)
            return Aligned(alignment(verdicts), verdicts)

        return read
    if not clip:
        return lambda images: Aligned({})
    cosine = ClipCosine(prompts.captions, clip, device, batch_size)
    return lambda images: Aligned({"clip": cosine(images)})


class ClipCosine:
    """CLIP's cosine of images and their captions, one a caption: CLIPScore (Hessel et al. 2021) without its 2.5 or 100.

    `source` is a folder or hub id of a CLIP. The captions go through it once. Raises FileNotFoundError when there is
    none.
    """

    @torch.no_grad()
    def __init__(self, captions: list[str], source: str | Path, device: str = "cpu", batch_size: int = 50):
        self.source, self.batch_size = source, batch_size
        self.model, self.processor = _clip(str(source), device)
        self.captions = torch.cat([self._caption_rows(captions[i : i + 128]) for i in range(0, len(captions), 128)])

    @torch.no_grad()
    def __call__(self, images: np.ndarray | Pictures | Iterable[np.ndarray]) -> Score:
        """The mean over images (n, h, w, 3) uint8 with its normal 95 % interval.

        Raises ValueError when images and captions are not as many.
        """
        rows = torch.cat([self._image_rows(array) for array in batches(images, self.batch_size)])
        if len(rows) != len(self.captions):
            raise InputError(f"expected a caption an image, got {len(rows)} images and {len(self.captions)} captions")
        cosines = (rows * self.captions).sum(1).double().numpy()
        return mean_score(f"CLIP cosine, {Path(self.source).name}", cosines)

    def _caption_rows(self, captions: list[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(
            captions, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        return nn.functional.normalize(self.model.get_text_features(**tokens)).cpu()

    def _image_rows(self, array: np.ndarray) -> Tensor:
        pixels = self.processor.image_processor(images=list(array), return_tensors="pt")["pixel_values"]
        return nn.functional.normalize(self.model.get_image_features(pixels.to(self.model.device))).cpu()


@lru_cache(maxsize=1)
def _clip(source: str, device: str) -> tuple[CLIPModel, CLIPProcessor]:
    model = pretrained_clip(source).eval().requires_grad_(False).to(device)
    try:
        return model, CLIPProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of any kind: a tokenizer and an image processor have loaders of their own
        said = f"{source}: no whole tokenizer and image processor beside CLIP's weights ({one_line(error)})"
        raise MissingError(said) from None


# ---------------------------------------------------------------------------------------------- fidelity


def fidelity(
    images: np.ndarray | Pictures,
    teacher_images: np.ndarray | Pictures,
    features: Features,
    teacher_features: Features,
    latents: Tensor | None = None,
    teacher_latents: Tensor | None = None,
) -> dict[str, Score]:
    """How near images (n, h, w, 3) uint8 are to the teacher's of the same noise, one by one and as a set.

    PSNR in dB, the Frechet distance to the teacher's images and, where latents (n, c, h, w) are given, their mean
    squared error. Raises ValueError for sets of two sizes.
    """
    values = {
        "PSNR to teacher": psnr(images, teacher_images),
        f"{metric_name('FD', features.extractor)} to teacher": distances.frechet_distance(
            features.frechet, teacher_features.frechet
        ),
    }
    if latents is not None:
        values["latent MSE to teacher"] = latent_mse(latents, teacher_latents)
    return {name: Score(name, value, len(images), len(teacher_images)) for name, value in values.items()}


def latent_mse(latents: Tensor, reference: Tensor) -> float:
    """Mean squared error between latents (n, c, h, w) of the same noise; raises ValueError for two shapes."""
    if latents.shape != reference.shape:
        raise InputError(f"latents differ in shape, {tuple(latents.shape)} and {tuple(reference.shape)}")
    return float((latents.double() - reference.double()).square().mean())


def psnr(images: np.ndarray | Pictures, reference: np.ndarray | Pictures) -> float:
    """Peak signal-to-noise ratio in dB between images of the same noise, over all; raises ValueError for two shapes."""
    return decibels(squared_errors(images, reference))


def decibels(squared: np.ndarray) -> float:
    """PSNR in dB of `squared_errors`, over all of them."""
    mse = float(np.mean(squared))
    return float(10 * np.log10(255**2 / mse)) if mse else float("inf")
