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


def time_samplers(
    contestants: dict[str, tuple[StableDiffusionPipeline, Sampler]], prompts: list[str], repeats: int
) -> dict[str, Timing]:
    """Time one batch from prompts to uint8 images for each contestant, `repeats` times after one warm-up.

    They take turns, so that a machine that slows down for a while slows all of them; a GPU is synchronised.
    """
    parts = {name: Timing([], [], []) for name in contestants}
    for repeat in range(repeats + 1):
        for name, (pipe, sampler) in contestants.items():
            noise, generators = initial_noise(pipe, len(prompts), seed=0), step_generators(len(prompts), seed=0)
            embeds, text_encoder = _timed(pipe, lambda: (encode_prompts(pipe, prompts), encode_prompts(pipe, [""])))  # noqa: B023
            latents, unet = _timed(pipe, lambda: sample(pipe, sampler, noise, *embeds, generators))  # noqa: B023
            _, vae = _timed(pipe, lambda: decode_latents(pipe, latents))  # noqa: B023
            if repeat:
                parts[name].text_encoder.append(text_encoder / len(prompts))
                parts[name].unet.append(unet / len(prompts))
                parts[name].vae.append(vae / len(prompts))
    return parts


@torch.no_grad()
def time_unet(pipe: StableDiffusionPipeline, batch_sizes: list[int], repeats: int) -> dict[int, float]:
    """Median seconds of one UNet forward at each batch size, in turns, after two rounds that warm up."""
    seconds = {size: [] for size in batch_sizes}
    timestep = torch.tensor(500, device=pipe.unet.device)
    embeds = encode_prompts(pipe, [""])
    for _ in range(repeats + 2):
        for size in batch_sizes:
            noise = initial_noise(pipe, size, seed=0)
            prompt_embeds = embeds.expand(size, -1, -1).contiguous()
            seconds[size].append(_timed(pipe, lambda: pipe.unet(noise, timestep, prompt_embeds))[1])  # noqa: B023
    return {size: median(values[2:]) for size, values in seconds.items()}


def _timed(pipe: StableDiffusionPipeline, call: Callable):
    _synchronise(pipe)
    start = time.perf_counter()
    result = call()
    _synchronise(pipe)
    return result, time.perf_counter() - start


def _synchronise(pipe: StableDiffusionPipeline) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
