"""Sampling in latent space with any diffusers scheduler: guided (two passes), one pass, and guided in part."""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import trange

from lora_distill import diffusion
from lora_distill.adapters import role


@dataclass(frozen=True)
class Sampler:
    """How images are made: `adapter` plays (None is the teacher), guided for the first part of the steps.

    guidance_scale = 1 is one UNet pass a step; above it, two, in one batched forward. `guided_fraction` < 1 drops
    the unconditional pass on the last steps: the training-free saving (Golnari et al. 2023, "selective guidance").
    """

    steps: int = 25
    guidance_scale: float = 1.0
    guided_fraction: float = 1.0
    adapter: str | None = None

    def guided_steps(self, count: int) -> int:
        """How many of `count` timesteps take both passes."""
        return round(count * self.guided_fraction) if self.guidance_scale != 1 else 0


def initial_noise(pipe: StableDiffusionPipeline, count: int, seed: int) -> Tensor:
    """The starting noise of `count` images (n, 4, h, w), the same on every device and for every batch size."""
    config = pipe.unet.config
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    return noise.to(pipe.unet.device, pipe.unet.dtype)


def unet_passes(pipe: StableDiffusionPipeline, sampler: Sampler) -> int:
    """UNet evaluations an image (NFE). Some schedulers, PNDM and Heun, evaluate more timesteps than steps."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sampler.steps)
    count = len(scheduler.timesteps)
    return count + sampler.guided_steps(count)


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, sampler: Sampler, noise: Tensor, prompt_embeds: Tensor, empty_embeds: Tensor
) -> Tensor:
    """Latents (n, 4, h, w) from noise (n, 4, h, w), prompt_embeds (n, tokens, dim) and "" embedded (1, tokens, dim).

    Equal to the stock pipeline called with the same `latents`.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sampler.steps, device=noise.device)
    guided_steps = sampler.guided_steps(len(scheduler.timesteps))
    latents = noise * scheduler.init_noise_sigma
    both_embeds = torch.cat([empty_embeds.expand_as(prompt_embeds), prompt_embeds])
    with role(pipe.unet, sampler.adapter):
        for index, t in enumerate(scheduler.timesteps):
            if index < guided_steps:
                doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
                uncond, cond = pipe.unet(doubled, t, both_embeds).sample.chunk(2)
                output = diffusion.guide(uncond, cond, sampler.guidance_scale)
            else:
                output = pipe.unet(scheduler.scale_model_input(latents, t), t, prompt_embeds).sample
            latents = scheduler.step(output, t, latents).prev_sample
    return latents


def sample_in_batches(
    pipe: StableDiffusionPipeline,
    sampler: Sampler,
    noise: Tensor,
    prompt_embeds: Tensor,
    empty_embeds: Tensor,
    batch_size: int = 50,
    title: str = "sampling",
) -> Tensor:
    """`sample` in batches, with a progress bar."""
    starts = trange(0, len(noise), batch_size, desc=title, mininterval=2, leave=False)
    parts = [
        sample(pipe, sampler, noise[i : i + batch_size], prompt_embeds[i : i + batch_size], empty_embeds)
        for i in starts
    ]
    return torch.cat(parts)
