"""Captioned images and the on-disk cache of what is frozen: teacher latents and prompt embeddings."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_distill import scenes
from lora_distill.pipeline import encode_prompts, fingerprint
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches
from lora_distill.storage import DamagedFileError, load_tensors, save_tensors

FEATURES = Features({"image": Image(), "captions": List(Value("string")), "scene": Value("string")})


@dataclass(frozen=True)
class Prompts:
    """Scenes of a split with one caption each, drawn from their five."""

    scenes: list[scenes.Scene]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def scene_prompts(style: str, split: str, count: int, seed: int) -> Prompts:
    """`count` prompts of a split of the bundled world."""
    sampled = scenes.sample_scenes(style, split, count, seed)
    rng = np.random.default_rng([seed, 1])
    return Prompts(sampled, [scenes.captions(scene, rng)[int(rng.integers(5))] for scene in sampled])


def scene_dataset(style: str, size: str, split: str, seed: int, cache_dir: Path | None = None) -> Dataset:
    """A split of the bundled world as a `datasets.Dataset` with columns image, captions (five) and scene (JSON).

    Raises ValueError for a size or split that does not exist.
    """
    if size not in scenes.SPLIT_SIZES or split not in scenes.SPLIT_SIZES[size]:
        choices = {name: list(splits) for name, splits in scenes.SPLIT_SIZES.items()}
        raise ValueError(f"no split {split!r} of size {size!r}; there are {choices}")

    def rows() -> Iterator[dict]:
        rng = np.random.default_rng([seed, 2])
        for scene in scenes.sample_scenes(style, split, scenes.SPLIT_SIZES[size][split], seed):
            yield {
                "image": scenes.draw(scene),
                "captions": scenes.captions(scene, rng),
                "scene": json.dumps(scene.as_dict()),
            }

    key = cache_key(world=[style, size, split, seed], drawing=scenes.drawing_fingerprint())
    return Dataset.from_generator(rows, features=FEATURES, cache_dir=cache_dir, fingerprint=key)


def image_folder(folder: Path) -> Dataset:
    """Captioned images of one's own: a folder with metadata.jsonl, {"file_name": ..., "captions": [...]} a line.

    Raises FileNotFoundError without that file, and ValueError naming the line or image that cannot be used.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise FileNotFoundError(f"{metadata} is missing: one line an image, {{'file_name': ..., 'captions': [...]}}")
    rows = [_checked_row(folder, number, line) for number, line in enumerate(metadata.read_text().splitlines(), 1)]
    if not rows:
        raise ValueError(f"{metadata} is empty")
    return Dataset.from_list(rows, features=Features({name: FEATURES[name] for name in ("image", "captions")}))


def _checked_row(folder: Path, number: int, line: str) -> dict:
    place = f"{folder / 'metadata.jsonl'}, line {number}"
    try:
        row = json.loads(line)
        path, captions = folder / row["file_name"], row["captions"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{place}: expected {{'file_name': ..., 'captions': [...]}}") from None
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise ValueError(f"{place}: expected a list of captions, none of them empty")
    try:
        with PIL.Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None
    return {"image": str(path), "captions": captions}


def training_captions(source: str, style: str, count: int, seed: int) -> list[str]:
    """`count` captions to make teacher images of: of the bundled scenes, or one a picture from an image folder."""
    if source == "scenes":
        return scene_prompts(style, "train", count, seed).captions
    rng = np.random.default_rng([seed, 3])
    captions = image_folder(Path(source)).select_columns("captions")["captions"]
    return [five[int(rng.integers(len(five)))] for five in (captions[i % len(captions)] for i in range(count))]


# ---------------------------------------------------------------------------------------------- the cache


def cache_key(**parts) -> str:
    """A digest of everything a cached file depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cached(folder: Path, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from `folder`/`kind`-`key`.safetensors, made on first use; a damaged file is made again."""
    path = folder / f"{kind}-{key}.safetensors"
    if path.exists():
        try:
            return load_tensors(path)[0]
        except DamagedFileError as error:
            warnings.warn(f"{error}; made again", stacklevel=2)
    tensors = make()
    save_tensors(path, tensors)
    return tensors


def teacher_set(
    pipe: StableDiffusionPipeline, captions: list[str], sampler: Sampler, seed: int, cache_dir: Path
) -> dict[str, Tensor]:
    """Teacher-made `latents` (n, 4, h, w) with their `prompt_embeds`, and `empty_embeds` (1, tokens, dim), cached.

    A latent is where the guided sampler ended; decoding it to an image and encoding that again would change it only
    by the VAE's error.
    """
    key = cache_key(
        pipeline=fingerprint(pipe),
        captions=captions,
        sampler=repr(sampler),
        seed=seed,
        dtype=str(pipe.unet.dtype),
    )

    def make() -> dict[str, Tensor]:
        prompt_embeds, empty_embeds = encode_prompts(pipe, captions), encode_prompts(pipe, [""])
        noise = initial_noise(pipe, len(captions), seed)
        latents = sample_in_batches(pipe, sampler, noise, prompt_embeds, empty_embeds, seed, title="teacher images")
        return {"latents": latents, "prompt_embeds": prompt_embeds, "empty_embeds": empty_embeds}

    tensors = cached(cache_dir, "teacher", key, make)
    return {name: tensor.to(pipe.unet.device) for name, tensor in tensors.items()}


def noised_batches(
    teacher: dict[str, Tensor], train_timesteps: int
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """Batches for the objectives: a teacher latent, fresh noise and a uniform timestep each."""

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(teacher["latents"]), (batch_size,), generator=generator)
        latents = teacher["latents"][rows.to(teacher["latents"].device)]
        return {
            "latents": latents,
            "prompt_embeds": teacher["prompt_embeds"][rows.to(latents.device)],
            "eps": torch.randn(latents.shape, generator=generator).to(latents),
            "timesteps": torch.randint(train_timesteps, (batch_size,), generator=generator).to(latents.device),
        }

    return draw_batch
