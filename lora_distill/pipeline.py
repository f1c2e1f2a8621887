"""Stable Diffusion pipelines: load one, encode prompts, decode latents."""

import io
import warnings
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from lora_distill.devices import choose_device, compiled, warn_of_emulation
from lora_distill.errors import InputError, MissingError, RunError, one_line
from lora_distill.pipeline_files import (
    LARGEST_SIDE,
    WEIGHTS,
    blame,
    check_bundle,
    check_folder,
    check_kind,
    check_loaded,
    check_names,
    loaded_files,
)
from lora_distill.settings import Settings
from lora_distill.shapes import BUNDLED, SD15_SHAPE, part_config, pipeline_source, stable_diffusion_15
from lora_distill.writing import atomic_write

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # loading is short, and the bars would stay in notebooks

PIXELS = 2**20  # decoded at a time
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}  # of pictures, by suffix
LARGEST_LATENT = 1e4  # guidance of 7.5 makes latents up to 5, guidance of 1000 up to 108
LARGEST_PIXEL = 1e3  # of a picture in [-1, 1]


def pipeline_for(settings: Settings) -> StableDiffusionPipeline:
    """The pipeline of a run: on its device, in its dtype, at its resolution and compiled where the settings say so."""
    device, dtype = choose_device(settings.device), getattr(torch, settings.dtype)
    if settings.mixed_precision == "bf16":
        warn_of_emulation(device)
    pipe = load_pipeline(settings.pipeline, device, dtype, settings.resolution)
    if settings.compile:
        compiled(pipe.unet)
    return pipe


def load_pipeline(
    name: str = "bundled", device: str = "cpu", dtype: torch.dtype = torch.float32, resolution: int | None = None
) -> StableDiffusionPipeline:
    """A pipeline in the Stable Diffusion layout, frozen: "bundled", a local folder, a hub id, or "sd15-shape".

    "sd15-shape" is the architecture of Stable Diffusion 1.5 with random weights, built without a download. With a
    `resolution` in pixels the UNet's `sample_size` is set to it: all that samples takes its size from there, stock
    diffusers too, and so do the keys of what is kept.

    Raises FileNotFoundError that names the missing folder, part or weights; ValueError for a pipeline of another kind
    or a resolution that the VAE cannot make; OSError for a hub id that cannot be loaded.
    """
    if name == SD15_SHAPE:
        pipe = stable_diffusion_15(CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"), device, dtype)
    else:
        source = pipeline_source(name)
        if name == "bundled":
            check_bundle()
        if isinstance(source, Path):
            check_folder(source)
        _check_kind(source)
        pipe = _from_pretrained(source, dtype)
        check_loaded(pipe, source)
    if resolution is not None:
        pipe.unet.register_to_config(sample_size=latent_side(pipe, resolution))
    return _prepared(pipe, device)


def latent_side(pipe: StableDiffusionPipeline, resolution: int) -> int:
    """The side of the latents for images of `resolution` pixels. Raises InputError when that is no whole number."""
    factor, most = pipe.vae_scale_factor, LARGEST_SIDE * pipe.vae_scale_factor
    if isinstance(resolution, bool) or not isinstance(resolution, int) or not factor <= resolution <= most:
        raise InputError(f"resolution: expected a multiple of {factor} up to {most}, got {resolution!r}")
    side, rest = divmod(resolution, factor)
    if rest:
        raise InputError(f"resolution: expected a multiple of {factor} for this VAE, got {resolution}")
    return side


def _check_kind(source: Path | str) -> None:
    unet = part_config(UNet2DConditionModel, source, "unet")
    vae = part_config(AutoencoderKL, source, "vae")
    check_kind(source, unet, vae, part_config(DDIMScheduler, source, "scheduler"))


def _from_pretrained(source: Path | str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a folder or hub id; of files in two precisions the full one, unless there is fp16 alone."""
    options = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    options |= {"requires_safety_checker": False, "use_safetensors": True, "dtype": dtype}
    reasons = []
    for variant in _variants(source):
        try:
            pipe = StableDiffusionPipeline.from_pretrained(source, variant=variant, trust_remote_code=False, **options)
        except Exception as error:  # of any kind: each loader below has its own
            if isinstance(source, Path):
                blame(source)
            reasons.append(one_line(error))
            continue
        folder = source if isinstance(source, Path) else Path(pipe.unet.config._name_or_path).parent  # downloaded
        if (folder / "unet").is_dir():
            check_names(pipe, folder, variant)
        return pipe
    raise (InputError if isinstance(source, Path) else MissingError)(f"{source}: cannot be loaded: {reasons[0]}")


def _variants(source: Path | str) -> tuple[str | None, ...]:
    """The variants to try: of a folder the one it has, of a hub id first the plain files, then fp16."""
    if not isinstance(source, Path):
        return None, "fp16"
    only_fp16 = any(not loaded_files(source / part, None) and loaded_files(source / part, "fp16") for part in WEIGHTS)
    return ("fp16",) if only_fp16 else (None,)


def _prepared(pipe: StableDiffusionPipeline, device: str) -> StableDiffusionPipeline:
    """The pipeline without progress bars, frozen, on its device, and there in the layout that is fastest."""
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    # a VAE that overflows in float16 says so in its config; where the key is missing, the default of True says nothing
    said = "force_upcast" not in pipe.vae.config.get("_use_default_values", ())
    if pipe.vae.dtype == torch.float16 and said and pipe.vae.config.force_upcast:
        pipe.vae.float()
    if pipe.unet.dtype == torch.bfloat16:
        warn_of_emulation(device)
    if torch.device(device).type == "cuda":
        _tune_for_gpu(pipe)
    return pipe.to(device)


def _tune_for_gpu(pipe: StableDiffusionPipeline) -> None:
    """TF32 for products of float32 matrices, and the layout in which cuDNN convolves fastest."""
    torch.set_float32_matmul_precision("high")
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)


def adapter_dtype(pipe: StableDiffusionPipeline, mixed_precision: str) -> torch.dtype:
    """The dtype of A and B: that of W0, or float32 under autocast, which casts them."""
    return pipe.unet.dtype if mixed_precision == "no" else torch.float32


# ---------------------------------------------------------------------------------------------- prompts and images


def with_unet(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline around another UNet; nothing else is copied."""
    other = copy(pipe)
    other.unet = unet
    return other


def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str], batch_size: int = 128) -> Tensor:
    """Prompt embeddings (n, tokens, dim). Prompts longer than the text encoder takes are cut, with one warning.

    Raises ValueError when there are no prompts.
    """
    return torch.cat(list(encoded_prompts(pipe, prompts, batch_size)))


@torch.no_grad()
def encoded_prompts(pipe: StableDiffusionPipeline, prompts: list[str], batch_size: int = 128) -> Iterator[Tensor]:
    """`encode_prompts` batch by batch, (b, tokens, dim) each, for more prompts than memory holds."""
    if not prompts:
        raise InputError("no prompts to encode")
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"prompt {prompt!r}: bytes that are no text in UTF-8")
    length = pipe.tokenizer.model_max_length
    cut = sum(len(ids) > length for ids in pipe.tokenizer(prompts).input_ids)
    if cut:
        warnings.warn(f"{cut} of {len(prompts)} prompts are longer than {length} tokens and were cut", stacklevel=4)
    for start in range(0, len(prompts), batch_size):
        tokens = pipe.tokenizer(
            prompts[start : start + batch_size],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        yield pipe.text_encoder(tokens.input_ids.to(pipe.text_encoder.device))[0]


@torch.no_grad()
def decode_latents(pipe: StableDiffusionPipeline, latents: Tensor, batch_size: int = 50) -> np.ndarray:
    """Images (n, h, w, 3) uint8 of latents (n, 4, h/8, w/8), which are scaled by the VAE's `scaling_factor`.

    At most `batch_size` at a time, and fewer of large ones: four of 512 x 512.

    Raises RunError for latents or images that are not finite or far from what a VAE knows: they would be black
    pictures, or of one colour.
    """
    _check_sane(latents, "latents", pipe.unet.dtype, LARGEST_LATENT)
    pixels = latents.shape[-2] * latents.shape[-1] * pipe.vae_scale_factor**2
    parts = []
    for batch in latents.split(max(1, min(batch_size, PIXELS // pixels))):
        images = pipe.vae.decode(batch.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        _check_sane(images, "images", pipe.vae.dtype, LARGEST_PIXEL)
        parts.append(to_uint8(images))
    return np.concatenate(parts)


def _check_sane(values: Tensor, name: str, dtype: torch.dtype, largest: float) -> None:
    """Raise RunError where one of `values` (n, ...) is not finite or above `largest`."""
    largest_each = values.detach().float().abs().flatten(1).amax(1)  # nan where one is nan
    if bad := int((~largest_each.isfinite()).sum()):
        hint = "; float16 overflowed, try bfloat16 or float32" if dtype == torch.float16 else ""
        raise RunError(f"the {name} of {bad} of {len(values)} prompts are not finite{hint}")
    if bad := int((largest_each > largest).sum()):
        reached = f"{largest_each.max().item():.1e}"
        raise RunError(f"the {name} of {bad} of {len(values)} prompts have left all bounds, they reach {reached}")


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_picture(images: np.ndarray, path: Path) -> None:
    """Write images (n, h, w, 3) uint8 side by side as one picture, in the format that the path's suffix says.

    Raises InputError for a suffix that is none of `FORMATS`.
    """
    check_suffix(path)
    buffer = io.BytesIO()
    picture = Image.fromarray(np.concatenate(list(images), axis=1))
    picture.save(buffer, format=FORMATS[path.suffix.lower()], quality=95, lossless=True)
    atomic_write(path, buffer.getvalue())


def check_suffix(path: Path) -> None:
    """Raise InputError for a picture's path whose suffix names no format that is written."""
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{path}: expected a name that ends in {', '.join(FORMATS)}, got {path.suffix!r}")
