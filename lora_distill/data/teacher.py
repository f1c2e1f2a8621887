"""Prompts, and a cache on disk of latents that the teacher made for prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_distill.data import scenes
from lora_distill.errors import InputError
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import encode_prompts
from lora_distill.sampling import Sampler, initial_noise, multi_step, sample, step_generators
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, cached_parts

if TYPE_CHECKING:
    from datasets import Dataset

TEACHER_SET = 2  # version of teacher images, part of the key of their cache: raise it when they change
AT_ONCE, EMBEDDED = 50, 1024  # images sampled and prompts embedded at a time, and kept in one file


@dataclass(frozen=True)
class Prompts:
    """n captions of a split, and the n scenes that they describe; `scenes` is None for other data than the bundled."""

    scenes: list[scenes.Scene] | None
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def scene_prompts(style: str, split: str, count: int, seed: int) -> Prompts:
    """`count` prompts of a split of the bundled world, one caption per scene."""
    sampled = scenes.sample_scenes(style, split, count, seed)
    rng = np.random.default_rng([seed, 1])
    return Prompts(sampled, [scenes.captions(scene, rng)[int(rng.integers(5))] for scene in sampled])


def captioned_prompts(images: "Dataset", count: int, seed: int) -> Prompts:
    """`count` different captions of a split, at random. Raises ValueError when it has fewer."""
    captions = list(dict.fromkeys(chain.from_iterable(images["captions"])))
    if count > len(captions):
        raise InputError(f"eval_prompts, curve_prompts: the split has {len(captions)} captions, got {count}")
    chosen = np.random.default_rng([seed, 1]).choice(len(captions), count, replace=False)
    return Prompts(None, [captions[i] for i in chosen])


def training_captions(source: str, style: str, count: int, seed: int, **options: Any) -> list[str]:
    """`count` captions of the training split, one per image, to make teacher images of.

    With `source` "scenes" the images are scenes of `style`; with another source they repeat when there are fewer, and
    `options` are those of `captioned_images`.
    """
    if source == "scenes":
        return scene_prompts(style, "train", count, seed).captions
    from lora_distill.data.captioned import captioned_images  # here, for it brings in `datasets`

    rng = np.random.default_rng([seed, 3])
    captions = captioned_images(source, "train", **options)["captions"][:]
    return [five[int(rng.integers(len(five)))] for five in (captions[i % len(captions)] for i in range(count))]


# ---------------------------------------------------------------------------------------------- the cache


def teacher_set(
    pipe: StableDiffusionPipeline,
    captions: list[str],
    sampler: Sampler,
    seed: int,
    cache_dir: Path,
    batch_size: int = AT_ONCE,
) -> dict[str, Tensor]:
    """The teacher's `latents` (n, 4, h, w) for `captions`, cached on disk.

    With them `prompt_embeds` (n, tokens, dim) and `empty_embeds` (1, tokens, dim), the embedding of "". The latents are
    the sampler's output: decoding and encoding them again would change them only by the VAE's error. They are sampled
    and written `batch_size` at a time, at most 50: a cut run goes on, and several processes share the work.
    """
    depends_on = {"version": TEACHER_SET, "pipeline": fingerprint(pipe), "captions": captions}
    embeds_key = cache_key(**depends_on, dtype=str(pipe.text_encoder.dtype))

    def embed(rows: slice) -> dict[str, Tensor]:
        return {"prompt_embeds": encode_prompts(pipe, captions[rows])}

    embeds = cached_parts(cache_dir, "prompts", embeds_key, len(captions), EMBEDDED, embed)["prompt_embeds"]
    embeds, empty_embeds = embeds.to(pipe.unet.device), encode_prompts(pipe, [""])
    noise, generators = initial_noise(pipe, len(captions), seed), step_generators(len(captions), seed)

    def draw(rows: slice) -> dict[str, Tensor]:
        return {"latents": sample(pipe, sampler, noise[rows], embeds[rows], empty_embeds, generators[rows])}

    latents_key = cache_key(**depends_on, sampler=repr(sampler), seed=seed, dtype=str(pipe.unet.dtype))
    latents = cached_parts(cache_dir, "teacher", latents_key, len(captions), min(batch_size, AT_ONCE), draw)["latents"]
    return {"latents": latents.to(pipe.unet.device), "prompt_embeds": embeds, "empty_embeds": empty_embeds}


def teacher_for(pipe: StableDiffusionPipeline, settings: Settings, cache_dir: Path) -> dict[str, Tensor]:
    """The `teacher_set` of a run: guided images of its training captions, as the settings say."""
    captions, sampler = teacher_captions(settings, cache_dir), multi_step(settings, settings.guidance_scale)
    return teacher_set(pipe, captions, sampler, settings.seed, cache_dir, settings.eval_batch)


def teacher_captions(settings: Settings, cache_dir: Path) -> list[str]:
    """The training captions of a run that the teacher draws."""
    options = {"share": settings.image_share, "skip_unusable": settings.skip_unusable, "cache_dir": cache_dir}
    return training_captions(settings.data, settings.style, settings.teacher_images, settings.seed, **options)


def noised_batches(
    teacher: dict[str, Tensor], train_timesteps: int
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that samples batches for the objectives from a teacher set.

    It takes (step, batch_size, generator). A batch, on the CPU, has teacher `latents` and noise `eps` (b, 4, h, w),
    uniform `timesteps` (b,) and `prompt_embeds` (b, tokens, dim).
    """
    latents, embeds = teacher["latents"].cpu(), teacher["prompt_embeds"].cpu()  # rows of a GPU's would make it wait

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        return {
            "latents": latents[rows],
            "prompt_embeds": embeds[rows],
            "eps": torch.randn(latents[rows].shape, generator=generator).to(latents.dtype),
            "timesteps": torch.randint(train_timesteps, (batch_size,), generator=generator),
        }

    return draw_batch
