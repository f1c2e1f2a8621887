"""Seconds per image, with what the timer holds: text encoder, UNet and VAE apart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from diffusers import StableDiffusionPipeline

from lora_distill.pipeline import decode_latents, encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators


@dataclass(frozen=True)
class Timing:
    """Seconds per image of each part, one entry a repeat."""

    text_encoder: list[float]
    unet: list[float]
    vae: list[float]

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(self.text_encoder, self.unet, self.vae, strict=True)]

    @property
    def median(self) -> float:
        return median(self.total)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the CPU work with `count` threads. One thread is the cleaner clock: two also measure how work is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_sampler(pipe: StableDiffusionPipeline, sampler: Sampler, prompts: list[str], repeats: int) -> Timing:
    """Time one batch from prompts to uint8 images, after one warm-up, `repeats` times; the GPU is synchronised."""
    parts = {"text_encoder": [], "unet": [], "vae": []}
    noise, generators = initial_noise(pipe, len(prompts), seed=0), step_generators(len(prompts), seed=0)
    for repeat in range(repeats + 1):
        embeds, text_seconds = _timed(pipe, lambda: (encode_prompts(pipe, prompts), encode_prompts(pipe, [""])))
        latents, unet_seconds = _timed(pipe, lambda: sample(pipe, sampler, noise, *embeds, generators))  # noqa: B023
        _, vae_seconds = _timed(pipe, lambda: decode_latents(pipe, latents))  # noqa: B023
        if repeat:
            for name, seconds in zip(parts, (text_seconds, unet_seconds, vae_seconds), strict=True):
                parts[name].append(seconds / len(prompts))
    return Timing(**parts)


@torch.no_grad()
def time_unet(pipe: StableDiffusionPipeline, batch_size: int, repeats: int) -> float:
    """Median seconds of one UNet forward at a batch size, after two that warm up."""
    noise = initial_noise(pipe, batch_size, seed=0)
    embeds = encode_prompts(pipe, [""]).expand(batch_size, -1, -1).contiguous()
    timestep = torch.tensor(500, device=noise.device)
    seconds = [_timed(pipe, lambda: pipe.unet(noise, timestep, embeds))[1] for _ in range(repeats + 2)]
    return median(seconds[2:])


def _timed(pipe: StableDiffusionPipeline, call: Callable):
    _synchronise(pipe)
    start = time.perf_counter()
    result = call()
    _synchronise(pipe)
    return result, time.perf_counter() - start


def _synchronise(pipe: StableDiffusionPipeline) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
