"""One judge for every sampler: the same prompts, the same noise, the same reader and reference images."""

from dataclasses import dataclass

import numpy as np
from diffusers import StableDiffusionPipeline

from lora_distill import scenes
from lora_distill.data import Prompts
from lora_distill.metrics import FrechetDistance, Proportion, prompt_alignment
from lora_distill.pipeline import decode_latents, encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches


@dataclass(frozen=True)
class Quality:
    """What the judge found in the images of one sampler and one seed."""

    images: np.ndarray  # (n, h, w, 3) uint8
    alignment: dict[str, Proportion]
    frechet_distance: float  # FD-EfficientNet-Lite0 to the reference images

    @property
    def all_correct(self) -> Proportion:
        return self.alignment["all"]


class Judge:
    """Judges samplers on a fixed set of prompts against drawn reference images of the same split.

    `reference` images are other scenes than the prompts' own, so that the floor is real against real.
    """

    def __init__(self, pipe: StableDiffusionPipeline, prompts: Prompts, reference: np.ndarray):
        self.pipe = pipe
        self.prompts = prompts
        self.prompt_embeds = encode_prompts(pipe, prompts.captions)
        self.empty_embeds = encode_prompts(pipe, [""])
        self.reader = scenes.Reader()
        self.frechet_distance = FrechetDistance(reference)

    def __call__(self, sampler: Sampler, seed: int, pipe: StableDiffusionPipeline | None = None) -> Quality:
        """Sample the prompts from noise that depends on the seed alone, and judge the images."""
        pipe = pipe or self.pipe
        noise = initial_noise(pipe, len(self.prompts), seed)
        latents = sample_in_batches(pipe, sampler, noise, self.prompt_embeds, self.empty_embeds, seed)
        return self.judge_images(decode_latents(pipe, latents))

    def judge_images(self, images: np.ndarray) -> Quality:
        """The judgement of images that are at hand, one a prompt."""
        alignment = prompt_alignment(images, self.prompts.scenes, self.reader)
        return Quality(images, alignment, self.frechet_distance(images))


def drawn(style: str, split: str, count: int, seed: int) -> np.ndarray:
    """Reference images of a split, (n, 64, 64, 3) uint8."""
    return np.stack([scenes.draw(scene) for scene in scenes.sample_scenes(style, split, count, seed)])
