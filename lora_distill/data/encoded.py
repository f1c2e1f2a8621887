"""Captioned images as latents and prompt embeddings, encoded once and kept on disk.

Of an image the VAE's posterior is kept, mean and log-variance, not one sample of it. So every training step still
samples an image, one of its captions, a crop, mirrored or not, and a latent from the posterior.

Files are float16. Its rounding, 2**-11 of a value, is far below the spread of the data (for the bundled VAE at most
0.002, where the standard deviation of the latents is 1.1 and that of the posterior 0.07). SD 1.5 at 512 x 512 takes
66 KB per view (a crop, mirrored or not) and 118 KB per caption: 3.9 GB for the 6,000 training images of Flickr8k,
19 GB for the 29,000 of Flickr30k, nine tenths of it captions.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from lora_distill import processes
from lora_distill.arrays import mapped_rows
from lora_distill.data.pictures import image_digests, picture_reader, upright_rgb
from lora_distill.errors import InputError, one_line
from lora_distill.fingerprint import tokenizer_digest
from lora_distill.pipeline import encoded_prompts
from lora_distill.storage import cache_key, digest

if TYPE_CHECKING:
    from datasets import Dataset

ENCODED = 2  # version of the encoded files, part of the keys of their caches: raise it when they change
CAPTIONS = 128  # embedded at a time
LONGEST = 32  # times the shorter side: of longer images the middle is used
# Whole words, so not "bright" or "leftover". Where "left" is a verb, the image is not mirrored either: no loss.
LEFT_OR_RIGHT = re.compile(r"\b(left|right)(most|wards?|hand|handed)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Framing:
    """How an image of any shape becomes a square of `resolution` pixels.

    The shorter side is resized to `resolution` (Lanczos); of an image longer than `LONGEST` times that, the middle. The
    square is the centre or, with `random_crops` = K, one of K crops whose places are random but the same in every run;
    each of them is encoded. `mirror` allows left-right mirroring when the caption has no word of `LEFT_OR_RIGHT`. It
    mirrors writing in photographs too. Do not use it for the bundled scenes: their reader does not recognise mirrored
    objects.
    """

    resolution: int
    random_crops: int = 0
    mirror: bool = False


@dataclass(frozen=True)
class EncodedImages:
    """A split of n images and m captions, memory-mapped; (c, h, w) is the shape of a latent."""

    posteriors: np.ndarray  # (n, crops, 1 or 2: as it is, mirrored; 2: mean, log-variance; c, h, w) float16
    prompt_embeds: np.ndarray  # (m, tokens, dim) float16
    first_caption: Tensor  # (n + 1,); image i has the captions first_caption[i] to first_caption[i + 1] - 1
    may_mirror: Tensor  # (m,) bool
    scaling_factor: float  # the VAE's; the UNet's input is a latent times this
    key: str  # a digest of all that the arrays depend on

    def __len__(self) -> int:
        return len(self.posteriors)


def encode_images(
    pipe: StableDiffusionPipeline, dataset: "Dataset", framing: Framing, cache_dir: Path, batch_size: int = 8
) -> EncodedImages:
    """Encode a split from `captioned.captioned_images`, or load it from `cache_dir`.

    The cache depends on the bytes of the images, Pillow's version, the captions, the framing, the tokenizer, and the
    weights and dtype of VAE and text encoder. Images are read, encoded and written `batch_size` at a time: a cut run
    goes on, and several processes share the work. Raises ValueError for a resolution that is not a multiple of the
    VAE's scale factor, for an image that cannot be read and for encoded values that are not finite.
    """
    shrink = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    if framing.resolution % shrink:
        raise InputError(f"resolution: expected a multiple of {shrink} for this VAE, got {framing.resolution}")
    captions = list(chain.from_iterable(dataset["captions"]))
    first_caption = torch.tensor([0, *accumulate(map(len, dataset["captions"]))])
    may_mirror = [framing.mirror and not LEFT_OR_RIGHT.search(caption) for caption in captions]
    vae, text_encoder = pipe.vae, pipe.text_encoder

    images_key = cache_key(
        version=ENCODED,
        images=list(image_digests(dataset)),
        pillow=PIL.__version__,
        framing=asdict(framing),
        vae=digest(vae.state_dict()),
        dtype=str(vae.dtype),
    )
    latent = (vae.config.latent_channels, framing.resolution // shrink, framing.resolution // shrink)
    shape = (len(dataset), framing.random_crops or 1, 1 + framing.mirror, 2, *latent)
    posteriors = mapped_rows(
        cache_dir / f"posteriors-{images_key}.npy", shape, batch_size, partial(_posteriors, pipe, dataset, framing)
    )
    captions_key = cache_key(
        version=ENCODED,
        captions=captions,
        text_encoder=digest(text_encoder.state_dict()),
        tokenizer=tokenizer_digest(pipe.tokenizer),
        dtype=str(text_encoder.dtype),
    )
    shape = (len(captions), pipe.tokenizer.model_max_length, text_encoder.config.hidden_size)
    prompt_embeds = mapped_rows(
        cache_dir / f"captions-{captions_key}.npy", shape, CAPTIONS, partial(_embeddings, pipe, captions)
    )
    key = f"{images_key}-{captions_key}"
    return EncodedImages(
        posteriors, prompt_embeds, first_caption, torch.tensor(may_mirror), vae.config.scaling_factor, key
    )


def _embeddings(pipe: StableDiffusionPipeline, captions: list[str], parts: list[slice]) -> Iterator[Tensor]:
    if parts:  # a process may have none
        yield from encoded_prompts(pipe, [caption for part in parts for caption in captions[part]], CAPTIONS)


@torch.no_grad()
def _posteriors(
    pipe: StableDiffusionPipeline, dataset: "Dataset", framing: Framing, parts: list[slice]
) -> Iterator[Tensor]:
    """Mean and log-variance of all views of each part's images: (b, crops, 1 or 2, 2, c, h, w)."""
    read = picture_reader(dataset)
    bar = {"desc": "encoding images", "mininterval": 2, "leave": False, "disable": not processes.is_main()}
    for part in tqdm(parts, **bar):
        pixels = torch.stack([_views_of(dataset, read, number, framing) for number in range(part.start, part.stop)])
        posterior = pipe.vae.encode(pixels.flatten(0, 2).to(pipe.vae.device, pipe.vae.dtype)).latent_dist
        yield torch.stack([posterior.mean, posterior.logvar], dim=1).unflatten(0, pixels.shape[:3])


def _views_of(dataset: "Dataset", read: Callable[[int], PIL.Image.Image], number: int, framing: Framing) -> Tensor:
    """`views` of an image of a split. Raises ValueError that names an image that cannot be used."""
    try:
        return views(read(number), framing, number)
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything
        name = dataset.select_columns("id")[number]["id"]
        raise InputError(f"image {name} cannot be read: {one_line(error)}") from None


def views(image: PIL.Image.Image, framing: Framing, number: int) -> Tensor:
    """All crops of an image, as they are and mirrored: (crops, 1 or 2, 3, resolution, resolution) in [-1, 1].

    `number` is the image's number in the split, the seed of its random crops.
    """
    image, resolution = _middle(upright_rgb(image)), framing.resolution
    scale = resolution / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1  # (3, height, width)
    slack = np.array([height - resolution, width - resolution])
    rng = np.random.default_rng(number)
    corners = rng.integers(slack + 1, size=(framing.random_crops, 2)) if framing.random_crops else [slack // 2]
    crops = torch.stack([pixels[:, y : y + resolution, x : x + resolution] for y, x in corners])
    return torch.stack([crops, crops.flip(-1)] if framing.mirror else [crops], dim=1)


def _middle(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image without the ends beyond `LONGEST` times its shorter side: resized, 20,000 x 1 would take gigabytes."""
    width, height = image.size
    longest = LONGEST * min(width, height)
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def image_batches(
    encoded: EncodedImages, train_timesteps: int
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that samples batches for the objectives; keys and shapes as in `teacher.noised_batches`.

    For every row it samples an image, one of its captions, a view, a latent from the posterior, noise and a timestep.
    If the caption allows mirroring, half of the time the view is mirrored.
    """

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        def choose(counts: int | Tensor) -> Tensor:
            return (torch.rand(batch_size, generator=generator, dtype=torch.float64) * counts).long()

        images = choose(len(encoded))
        first, end = encoded.first_caption[images], encoded.first_caption[images + 1]
        captions = first + choose(end - first)
        crops = choose(encoded.posteriors.shape[1])
        mirrored = choose(2) * encoded.may_mirror[captions]
        posteriors = encoded.posteriors[images.numpy(), crops.numpy(), mirrored.numpy()]
        mean, logvar = torch.from_numpy(posteriors).float().unbind(1)  # (b, c, h, w)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        return {
            "latents": latents * encoded.scaling_factor,
            "prompt_embeds": torch.from_numpy(encoded.prompt_embeds[captions.numpy()]).float(),
            "eps": torch.randn(latents.shape, generator=generator),
            "timesteps": torch.randint(train_timesteps, (batch_size,), generator=generator),
        }

    return draw_batch


def first_images(encoded: EncodedImages, count: int) -> EncodedImages:
    """The first `count` images of a split, with their captions. Raises InputError for a count that it does not have."""
    if not 0 < count <= len(encoded):
        raise InputError(f"few_images: expected 1 to {len(encoded)}, the images of the set, got {count}")
    captions = int(encoded.first_caption[count])
    return replace(
        encoded,
        posteriors=encoded.posteriors[:count],
        prompt_embeds=encoded.prompt_embeds[:captions],
        first_caption=encoded.first_caption[: count + 1],
        may_mirror=encoded.may_mirror[:captions],
        key=f"{encoded.key}-first-{count}",
    )


def caption_dropout(
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]], empty_embeds: Tensor, share: float
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that samples the batches of `draw_batch`, a share of their captions replaced by the empty prompt.

    So the pass without a prompt, which guidance needs, is trained too. `empty_embeds` (1, tokens, dim) is the embedding
    of "". All else in a batch is as without it.
    """
    empty_embeds = empty_embeds.cpu()

    def draw(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = draw_batch(step, batch_size, generator)
        dropped = torch.rand(batch_size, generator=generator) < share
        return {**batch, "prompt_embeds": torch.where(dropped[:, None, None], empty_embeds, batch["prompt_embeds"])}

    return draw


def consistency_batches(
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    train_timesteps: int,
    skip: int,
    w_min: float,
    w_max: float,
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that samples batches for `ConsistencyDistillation` from those of `draw_batch`.

    Timesteps are moved up to the DDIM grid, that of `LCMScheduler`: 19, 39, ..., 999 for skip = 20 of 1000 timesteps.
    Added is `guidance_scale` (b,), uniform in [w_min, w_max]. Raises ValueError for a skip that does not divide the
    timesteps and unless 1 <= w_min <= w_max.
    """
    if skip < 1 or train_timesteps % skip:
        raise InputError(f"ddim_skip: expected a divisor of the {train_timesteps} timesteps, got {skip}")
    if not 1 <= w_min <= w_max:
        raise InputError(f"w_min, w_max: expected 1 <= w_min <= w_max, got {w_min:g} and {w_max:g}")

    def draw(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = draw_batch(step, batch_size, generator)
        timesteps = (batch["timesteps"] // skip + 1) * skip - 1
        guidance_scale = w_min + (w_max - w_min) * torch.rand(batch_size, generator=generator)
        return {**batch, "timesteps": timesteps, "guidance_scale": guidance_scale}

    return draw
