"""Stable Diffusion pipelines: load one, encode prompts, decode latents."""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lora_distill.shapes import BUNDLED, SD15_SHAPE, stable_diffusion_15
from lora_distill.storage import atomic_write, cache_key, digest

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()  # loading is short, and the bars would stay in notebooks

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


def load_pipeline(
    name: str = "bundled", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline:
    """A pipeline in the Stable Diffusion layout, frozen: "bundled", a local folder, a hub id, or "sd15-shape".

    "sd15-shape" is the architecture of Stable Diffusion 1.5 with random weights, built without a download.

    Raises FileNotFoundError that names the missing folder or part.
    """
    if name == SD15_SHAPE:
        return _prepared(
            stable_diffusion_15(CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer"), device, dtype), device
        )
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    local = folder.is_dir()
    if not local and (name == "bundled" or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"no pipeline folder {folder}")
    if local:
        missing = [part for part in ("model_index.json", *PARTS) if not (folder / part).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: not a whole Stable Diffusion pipeline, {', '.join(missing)} missing")
    pipe = StableDiffusionPipeline.from_pretrained(
        folder if local else name,
        dtype=dtype,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        use_safetensors=True,
    )
    return _prepared(pipe, device)


def _prepared(pipe: StableDiffusionPipeline, device: str) -> StableDiffusionPipeline:
    """The pipeline without progress bars, frozen and on its device."""
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe.to(device)


def adapter_dtype(pipe: StableDiffusionPipeline, mixed_precision: str) -> torch.dtype:
    """The dtype of A and B: that of W0, or float32 under autocast, which casts them."""
    return pipe.unet.dtype if mixed_precision == "no" else torch.float32


def choose_device(device: str) -> str:
    """The device for "auto": "cuda" when there is a GPU, else "cpu". Any other name is returned as it is."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def fingerprint(pipe: StableDiffusionPipeline) -> str:
    """A digest of everything that decides what a pipeline makes: weights of W0, configurations and tokenizer."""
    modules = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    weights = {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
        if "lora_" not in key
    }
    configs = [pipe.scheduler.config, *(module.config for module in modules.values())]
    settings = repr((sorted(pipe.tokenizer.get_vocab().items()), [_plain(config) for config in configs]))
    text = torch.frombuffer(bytearray(settings.encode()), dtype=torch.uint8)
    return digest({key.replace(".base_layer", ""): value for key, value in weights.items()} | {"settings": text})


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that turns text into tokens: vocabulary, merges, added tokens, normalisation, length."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}  # of the last call
    return cache_key(rules=rules, length=tokenizer.model_max_length, pad=tokenizer.pad_token_id)


def _plain(config: Mapping[str, Any] | PretrainedConfig) -> list[tuple[str, str]]:
    """The entries of a configuration that describe the model, not its origin or the version that loaded it."""
    values = config.to_dict() if isinstance(config, PretrainedConfig) else config
    passing = {"transformers_version", "dtype"}  # the dtype is in the digest of the weights
    return sorted((name, str(value)) for name, value in values.items() if name[0] != "_" and name not in passing)


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
        raise ValueError("no prompts to encode")
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
    """Images (n, h, w, 3) uint8 of latents (n, 4, h/8, w/8), which are scaled by the VAE's `scaling_factor`."""
    parts = []
    for batch in latents.split(batch_size):
        images = pipe.vae.decode(batch.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
        parts.append(to_uint8(images))
    return np.concatenate(parts)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (n, 3, h, w) in [-1, 1] as (n, h, w, 3) uint8."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_png(images: np.ndarray, path: Path) -> None:
    """Write images (n, h, w, 3) uint8 side by side as one PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(buffer, format="png")
    atomic_write(path, buffer.getvalue())
