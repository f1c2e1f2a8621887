"""One judge for every sampler: the same prompts, the same noise, the same reader and reference images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline

from lora_distill import scenes
from lora_distill.data import Prompts
from lora_distill.distances import frechet_distance
from lora_distill.extractors import Features
from lora_distill.metrics import FrechetDistance, Proportion, prompt_alignment
from lora_distill.pipeline import decode_latents, encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches


@dataclass(frozen=True)
class Quality:
    """What the judge found in the images of one sampler and one seed."""

    images: np.ndarray  # (n, h, w, 3) uint8
    alignment: dict[str, Proportion]
    frechet_distance: float  # FD-EfficientNet-Lite0 to the reference images
    features: Features  # of the images, for `metrics.compare` with the judge's `reference` and for `metrics.fidelity`

    @property
    def all_correct(self) -> Proportion:
        return self.alignment["all"]


class Judge:
    """Judges samplers on a fixed set of prompts against drawn reference images of the same split.

    `reference` images are other scenes than the prompts' own, so that the floor is real against real; with
    `cache_dir` their features are kept there.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, prompts: Prompts, reference: np.ndarray, cache_dir: Path | None = None
    ):
        self.pipe = pipe
        self.prompts = prompts
        self.prompt_embeds = encode_prompts(pipe, prompts.captions)
        self.empty_embeds = encode_prompts(pipe, [""])
        self.reader = scenes.Reader()
        self.frechet_distance = FrechetDistance(reference, cache_dir=cache_dir)

    def __call__(self, sampler: Sampler, seed: int, pipe: StableDiffusionPipeline | None = None) -> Quality:
        """Sample the prompts from noise that depends on the seed alone, and judge the images."""
        pipe = pipe or self.pipe
        noise = initial_noise(pipe, len(self.prompts), seed)
        latents = sample_in_batches(pipe, sampler, noise, self.prompt_embeds, self.empty_embeds, seed)
        return self.judge_images(decode_latents(pipe, latents))

    def judge_images(self, images: np.ndarray) -> Quality:
        """The judgement of images that are at hand, one a prompt."""
        alignment = prompt_alignment(images, self.prompts.scenes, self.reader)
        features = self.frechet_distance.features(images)
        return Quality(images, alignment, frechet_distance(features.frechet, self.reference.frechet), features)

    @property
    def reference(self) -> Features:
        """The features of the reference images."""
        return self.frechet_distance.reference


def drawn(style: str, split: str, count: int, seed: int) -> np.ndarray:
    """Reference images of a split, (n, 64, 64, 3) uint8."""
    return np.stack([scenes.draw(scene) for scene in scenes.sample_scenes(style, split, count, seed)])
