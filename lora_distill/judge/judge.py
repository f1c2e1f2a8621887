"""One judge for every sampler: the same prompts, the same noise, the same measure of alignment and reference images."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_distill.data import scenes
from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import Framing, views
from lora_distill.data.teacher import Prompts, captioned_prompts, scene_prompts
from lora_distill.judge import distances
from lora_distill.judge.features import LAYERS, Features
from lora_distill.judge.metrics import FrechetDistance, Proportion, Score, clip_score, compare, prompt_alignment
from lora_distill.pipeline import decode_latents, encode_prompts, fingerprint, to_uint8
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, cached, digest, load_tensors, save_tensors

JUDGED = 1  # version of sampled latents, in the keys of their caches: raise it when they change


@dataclass(frozen=True)
class Quality:
    """What the judge found in the images of one sampler and one seed."""

    images: np.ndarray  # (n, h, w, 3) uint8
    alignment: dict[str, Proportion | Score]  # photographs have "content" alone, by CLIP
    distance: FrechetDistance  # to the reference images of the judge

    @cached_property
    def features(self) -> Features:
        """Of the images, for `metrics.compare` with the judge's `reference` and for `metrics.fidelity`."""
        return self.distance.features(self.images)

    @cached_property
    def frechet_distance(self) -> float:
        """FD-EfficientNet-Lite0 to the reference images."""
        return distances.frechet_distance(self.features.frechet, self.distance.reference.frechet)

    @property
    def all_correct(self) -> Proportion:
        return self.alignment["all"]


class Judge:
    """Judges samplers on a fixed set of prompts against reference images of the same split.

    With `cache_dir` the features of the reference are kept there, and the latents that were sampled: a long evaluation
    that was cut off goes on where it was. `layers` names more features than the Frechet distance needs. What the
    bundled scenes show is read exactly; of other images a CLIP, `clip` is its folder or hub id, scores the content.
    Raises ValueError where such images have no CLIP.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        prompts: Prompts,
        reference: np.ndarray,
        *,
        cache_dir: Path | None = None,
        batch_size: int = 50,
        clip: str = "",
        layers: Iterable[str] | None = None,
    ):
        if prompts.scenes is None and not clip:
            raise ValueError("clip: photographs need a CLIP model to score their content, a folder or a hub id")
        self.clip = clip
        self.cache_dir = cache_dir
        self.pipe = pipe
        self.prompts = prompts
        self.batch_size = batch_size
        self.prompt_embeds = encode_prompts(pipe, prompts.captions)
        self.empty_embeds = encode_prompts(pipe, [""])
        self.reader = scenes.Reader() if prompts.scenes else None
        self.frechet_distance = FrechetDistance(reference, pipe.device.type, cache_dir=cache_dir, layers=layers)

    def __call__(self, sampler: Sampler, seed: int, pipe: StableDiffusionPipeline | None = None) -> Quality:
        """Sample the prompts from noise that depends on the seed alone, and judge the images."""
        return self.judge_images(self.images(sampler, seed, pipe))

    def images(
        self, sampler: Sampler, seed: int, pipe: StableDiffusionPipeline | None = None, count: int | None = None
    ) -> np.ndarray:
        """The images (n, h, w, 3) uint8 that are judged, or those of the first `count` prompts alone."""
        pipe = pipe or self.pipe
        return decode_latents(pipe, self._latents(pipe, sampler, seed, count), self.batch_size)

    def _latents(self, pipe: StableDiffusionPipeline, sampler: Sampler, seed: int, count: int | None) -> Tensor:
        captions = self.prompts.captions[:count]

        def make() -> dict[str, Tensor]:
            noise = initial_noise(pipe, len(captions), seed)
            embeds = self.prompt_embeds[:count], self.empty_embeds
            return {"latents": sample_in_batches(pipe, sampler, noise, *embeds, seed, self.batch_size)}

        if self.cache_dir is None or sampler.adapter:  # an adapter that plays may still be in training
            return make()["latents"]
        key = cache_key(
            version=JUDGED,
            pipeline=[fingerprint(pipe), type(pipe.unet).__name__, pipe.unet.device.type],
            captions=captions,
            sampler=repr(sampler),
            seed=seed,
        )
        return cached(self.cache_dir, "judged", key, make)["latents"].to(pipe.unet.device)

    def judge_images(self, images: np.ndarray) -> Quality:
        """The judgement of images that are at hand, one a prompt."""
        return Quality(images, self._alignment(images), self.frechet_distance)

    def _alignment(self, images: np.ndarray) -> dict[str, Proportion | Score]:
        if self.reader:
            return prompt_alignment(images, self.prompts.scenes, self.reader)
        score = clip_score(images, self.prompts.captions, self.clip, self.pipe.device.type)
        return {"content": replace(score, value=score.value / 100)}  # a cosine, as the reader's shares below 1

    def milestones(
        self, sampler: Sampler, every: int
    ) -> tuple[int, Callable[[int, StableDiffusionPipeline], dict], str]:
        """The `milestones` of a recipe: alignment and distance of the student every so many updates, on seed 0."""

        def measure(step: int, student: StableDiffusionPipeline) -> dict[str, float]:
            quality = self(sampler, seed=0, pipe=student)
            return {"all_correct": quality.all_correct.value, "fd_efficientnet_lite0": quality.frechet_distance}

        reference = digest(self.reference.rows)
        captions = self.prompts.captions
        return every, measure, cache_key(sampler=repr(sampler), every=every, captions=captions, reference=reference)

    def distance_interval(self, quality: Quality, resamples: int = 100) -> tuple[float, float]:
        """The 95 % bootstrap interval of the Frechet distance over the images; the reference stays as it is."""
        rows, reference = quality.features.frechet, self.reference.frechet
        drawn = distances.resampled(distances.frechet_distance, rows, reference, resamples, seed=0)
        return distances.interval(quality.frechet_distance, drawn)

    @property
    def reference(self) -> Features:
        """The features of the reference images."""
        return self.frechet_distance.reference


class Method(NamedTuple):
    """How a row of a table makes its images: a sampler on a pipeline, with one adapter a training folded into it."""

    sampler: Sampler
    pipe: StableDiffusionPipeline
    adapters: Sequence[str | None] = (None,)


def judge_methods(
    judge: Judge,
    methods: dict[str, Method],
    seeds: Iterable[int],
    deploy: Callable[[StableDiffusionPipeline, str | None], StableDiffusionPipeline],
) -> dict[str, list[Quality]]:
    """Every method judged with every seed of sampling, on what `deploy(pipe, adapter)` makes of its pipeline.

    Each seed takes the next of a method's trainings, and the first again after the last.
    """
    return {
        name: [
            judge(sampler, seed, deploy(pipe, adapter)) for seed, adapter in zip(seeds, cycle(adapters), strict=False)
        ]
        for name, (sampler, pipe, adapters) in methods.items()
    }


def distance_floor(distance: FrechetDistance, prompts: Prompts, seed: int) -> float | None:
    """The Frechet distance of as many scenes as there are prompts, drawn anew from the test split: real against real.

    None for photographs, whose reference holds all the real images there are.
    """
    return distance(drawn(prompts.scenes[0].style, "test", len(prompts), seed)) if prompts.scenes else None


def further_distances(
    methods: dict[str, list[np.ndarray]],
    reference: np.ndarray,
    sources: dict[str, str],
    *,
    device: str = "cpu",
    cache_dir: Path | None = None,
    seed: int = 0,
) -> list[dict]:
    """What `metrics.compare` finds on other extractors, a row a method and metric: mean and deviation over seeds.

    `methods` has the images (n, h, w, 3) uint8 of each seed, `sources` each extractor's weights, {"Inception": file}.
    Raises as `extractors.load_extractor` does.
    """
    rows = []
    for extractor, source in sources.items():
        layers = dict.fromkeys(layer for layer in LAYERS[extractor] if layer)
        judge = FrechetDistance(reference, device, extractor, source, cache_dir, layers)
        for method, seeds in methods.items():
            found = [compare(judge.features(images), judge.reference, seed=seed) for images in seeds]
            for metric, score in found[0].items():
                values = [scores[metric].value for scores in found]
                rows.append(
                    {"method": method, "metric": metric, "n": score.count, "seeds": len(seeds),
                     "reference_n": score.reference_count, "value": np.mean(values), "sd": np.std(values)}
                )  # fmt: skip
    return rows


def drawn(style: str, split: str, count: int, seed: int) -> np.ndarray:
    """Reference images of a split of the bundled world, (n, 64, 64, 3) uint8."""
    return np.stack([scenes.draw(scene) for scene in scenes.sample_scenes(style, split, count, seed)])


def held_out(source: str, split: str, count: int, settings: Settings) -> tuple[Prompts, np.ndarray]:
    """`count` prompts of a split, and reference images (n, h, w, 3) uint8 to compare with.

    Of the bundled scenes, 1,000 drawings of other scenes than the prompts'. Of photographs, as is usual, every image
    of the split, in the same framing as in training.
    """
    if bundled := re.fullmatch(r"scenes/(\w+)/\w+", source):
        style = bundled[1]
        prompts = scene_prompts(style, split, count, settings.seed)
        return prompts, drawn(style, split, 1000, settings.seed + 1)
    images = captioned_images(source, split, skip_unusable=settings.skip_unusable)
    framing = Framing(settings.resolution)
    pixels = [to_uint8(views(row["image"], framing, i)[0]) for i, row in enumerate(images)]
    return captioned_prompts(images, count, settings.seed), np.concatenate(pixels)


def save_images(folder: Path, notebook: str, qualities: dict[str, list[Quality]]) -> None:
    """Keep the images of each method and seed in folder/<notebook>_images.safetensors, for later notebooks."""
    images = {
        f"{name}/{i}": torch.from_numpy(q.images) for name, seeds in qualities.items() for i, q in enumerate(seeds)
    }
    save_tensors(folder / f"{notebook}_images.safetensors", images, {"methods": json.dumps(list(qualities))})


def load_images(folder: Path, notebook: str) -> dict[str, list[np.ndarray]]:
    """The images (n, h, w, 3) uint8 of each method, seed by seed, as `save_images` left them.

    Raises FileNotFoundError where the notebook was not run.
    """
    path = folder / f"{notebook}_images.safetensors"
    if not path.exists():
        command = f"python -m lora_distill reproduce --profile {folder.name} --notebook {notebook}"
        raise FileNotFoundError(f"no {path.name} in {folder}; {command} makes it")
    tensors, metadata = load_tensors(path)
    return {
        name: [tensors[f"{name}/{i}"].numpy() for i in range(sum(key.rpartition("/")[0] == name for key in tensors))]
        for name in json.loads(metadata["methods"])
    }
