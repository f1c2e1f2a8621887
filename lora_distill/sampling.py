"""Sampling in latent space with a diffusers scheduler: two UNet passes a step with guidance, one without."""

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor
from tqdm import trange

from lora_distill import diffusion
from lora_distill.adapters import role


@dataclass(frozen=True)
class Sampler:
    """How images are sampled; `adapter` names the adapter that is on, None is W0 alone, the teacher.

    guidance_scale = 1 is one UNet pass a step; above 1 it is two, batched in one forward. `guided_fraction` < 1 drops
    the unconditional pass in the last steps, a saving without training (Golnari et al. 2023, "selective guidance").
    `scheduler` is the pipeline's own, DPM-Solver++ (2M) or LCM's. `embedded_guidance` is the w that a full LCM takes
    as an input.
    """

    steps: int = 25
    guidance_scale: float = 1.0
    guided_fraction: float = 1.0
    adapter: str | None = None
    scheduler: Literal["own", "dpm++", "lcm"] = "own"
    embedded_guidance: float | None = None

    def guided_steps(self, count: int) -> int:
        """How many of `count` timesteps take two passes: the first ones."""
        return round(count * self.guided_fraction) if self.guidance_scale != 1 else 0


def build_scheduler(pipe: StableDiffusionPipeline, name: str) -> SchedulerMixin:
    """A new scheduler, "own", "dpm++" or "lcm", with the noise schedule of the pipeline's own."""
    kinds = {"own": type(pipe.scheduler), "dpm++": DPMSolverMultistepScheduler, "lcm": LCMScheduler}
    return kinds[name].from_config(pipe.scheduler.config)


def step_generators(count: int, seed: int) -> list[torch.Generator]:
    """One generator per image for the noise in LCM's steps, so that it does not depend on the batch size."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + index + 1) for index in range(count)]


def initial_noise(pipe: StableDiffusionPipeline, count: int, seed: int, resolution: int | None = None) -> Tensor:
    """The starting noise of `count` images (n, 4, h, w), the same on every device and for every batch size.

    `resolution` is the side of the images in pixels, by default that of the UNet's training. Raises ValueError when it
    is not a multiple of the VAE's scale factor, 8 for Stable Diffusion.
    """
    side, rest = divmod(resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.vae_scale_factor)
    if rest or side < 1:
        raise ValueError(f"resolution: expected a multiple of {pipe.vae_scale_factor} for this VAE, got {resolution}")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, pipe.unet.config.in_channels, side, side, generator=generator)
    return noise.to(pipe.unet.device, pipe.unet.dtype)


def unet_passes(pipe: StableDiffusionPipeline, sampler: Sampler) -> int:
    """UNet evaluations per image (NFE). PNDM and Heun have more timesteps than steps."""
    scheduler = build_scheduler(pipe, sampler.scheduler)
    scheduler.set_timesteps(sampler.steps)
    count = len(scheduler.timesteps)
    return count + sampler.guided_steps(count)


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    sampler: Sampler,
    noise: Tensor,
    prompt_embeds: Tensor,
    empty_embeds: Tensor | None,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Latents (n, 4, h, w) from noise (n, 4, h, w) and prompt_embeds (n, tokens, dim).

    empty_embeds (1, tokens, dim), the embedding of "", is needed for guidance alone. Equal to the stock pipeline called
    with the same `latents` and, for the noise in LCM's steps, the same list as `generator`. Raises ValueError for LCM
    without generators, and when `embedded_guidance` is missing or the UNet does not take it.
    """
    if sampler.scheduler == "lcm" and generators is None:
        raise ValueError("the lcm scheduler draws noise at its steps: give one generator an image")
    scheduler = build_scheduler(pipe, sampler.scheduler)
    scheduler.set_timesteps(sampler.steps, device=noise.device)
    noisy_step = {"generator": generators} if sampler.scheduler == "lcm" else {}
    guided_steps = sampler.guided_steps(len(scheduler.timesteps))
    latents = noise * scheduler.init_noise_sigma
    if guided_steps:
        both_embeds = torch.cat([empty_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2n, tokens, dim)
    timestep_cond = _embedded_guidance(pipe, sampler, len(noise))
    with role(pipe.unet, sampler.adapter):
        for index, t in enumerate(scheduler.timesteps):
            if index < guided_steps:
                doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)  # (2n, 4, h, w)
                uncond, cond = pipe.unet(doubled, t, both_embeds).sample.chunk(2)
                output = diffusion.guide(uncond, cond, sampler.guidance_scale)
            else:
                x_t = scheduler.scale_model_input(latents, t)
                output = pipe.unet(x_t, t, prompt_embeds, timestep_cond=timestep_cond).sample
            latents = scheduler.step(output, t, latents, **noisy_step).prev_sample
    return latents


def _embedded_guidance(pipe: StableDiffusionPipeline, sampler: Sampler, count: int) -> Tensor | None:
    dim = pipe.unet.config.time_cond_proj_dim
    if (dim is None) != (sampler.embedded_guidance is None):
        raise ValueError("embedded_guidance is for a UNet with time_cond_proj_dim, and such a UNet needs it")
    if dim is None:
        return None
    scales = torch.full((count,), sampler.embedded_guidance, device=pipe.unet.device)
    return diffusion.guidance_embedding(scales, dim).to(pipe.unet.dtype)


def sample_in_batches(
    pipe: StableDiffusionPipeline,
    sampler: Sampler,
    noise: Tensor,
    prompt_embeds: Tensor,
    empty_embeds: Tensor,
    seed: int,
    batch_size: int = 50,
    title: str = "sampling",
) -> Tensor:
    """`sample` in batches, with a progress bar; `seed` is for the noise that LCM adds in its steps."""
    generators = step_generators(len(noise), seed)
    parts = [
        sample(pipe, sampler, noise[rows], prompt_embeds[rows], empty_embeds, generators[rows])
        for rows in (
            slice(i, i + batch_size) for i in trange(0, len(noise), batch_size, desc=title, mininterval=2, leave=False)
        )
    ]
    return torch.cat(parts)
