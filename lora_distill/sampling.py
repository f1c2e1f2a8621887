"""Sampling in latent space with a diffusers scheduler: two UNet passes a step with guidance, one without."""

import math
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from torch import Tensor
from tqdm import trange

from lora_distill import diffusion
from lora_distill.adapters import role
from lora_distill.errors import InputError, reading
from lora_distill.pipeline import latent_side
from lora_distill.settings import Settings

# The samplers with a name. SD 1.5's own, PNDM, starts far from noise when steps are few; trailing timesteps start at
# the last one (Lin et al. 2023). Latents are not clipped, which is meant for pixels.
NAMED: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"timestep_spacing": "trailing", "algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
    ),
    "lcm": (LCMScheduler, {"clip_sample": False, "thresholding": False}),
}


@dataclass(frozen=True)
class Sampler:
    """How images are sampled; `adapter` names the adapter that is on, None is W0 alone, the teacher.

    guidance_scale = 1 is one UNet pass a step; above 1 it is two, batched in one forward. `guided_fraction` < 1 drops
    the unconditional pass in the last steps, a saving without training (Golnari et al. 2023, "selective guidance").
    With `w0` the adapter is a guidance dial: its weight, (guidance_scale - 1) / (w0 - 1), takes the place of the second
    pass. `scheduler` is the pipeline's own, DDIM with trailing timesteps, DPM-Solver++ (2M) or LCM's.
    `embedded_guidance` is the w that a full LCM takes as an input.
    """

    steps: int = 25
    guidance_scale: float = 1.0
    guided_fraction: float = 1.0
    adapter: str | None = None
    scheduler: Literal["own", "ddim", "dpm++", "lcm"] = "own"
    embedded_guidance: float | None = None
    w0: float | None = None

    @property
    def adapter_weight(self) -> float | None:
        """What the adapter's update is multiplied by; None leaves it as it is."""
        return None if self.w0 is None else (self.guidance_scale - 1) / (self.w0 - 1)

    def guided_steps(self, count: int) -> int:
        """How many of `count` timesteps take two passes: the first ones."""
        return round(count * self.guided_fraction) if self.guidance_scale != 1 and self.w0 is None else 0


def multi_step(settings: Settings, guidance_scale: float = 1.0, **options: Any) -> Sampler:
    """The multi-step sampler of the settings: their steps and scheduler; `options` are those of `Sampler`."""
    return Sampler(settings.sampling_steps, guidance_scale, scheduler=settings.scheduler, **options)


def build_scheduler(pipe: StableDiffusionPipeline, name: str) -> SchedulerMixin:
    """A new scheduler, "own", "ddim", "dpm++" or "lcm", with the noise schedule of the pipeline's own."""
    kind, options = NAMED.get(name, (type(pipe.scheduler), {}))
    if name not in ("own", *NAMED):
        raise InputError(f"scheduler: expected own, {', '.join(NAMED)}, got {name!r}")
    return kind.from_config(pipe.scheduler.config, **options)


def _with_timesteps(pipe: StableDiffusionPipeline, sampler: Sampler, device: torch.device | None) -> SchedulerMixin:
    """The sampler's scheduler, set to its steps. Raises InputError for more or fewer steps than it can take."""
    scheduler = build_scheduler(pipe, sampler.scheduler)
    most, name = scheduler.config.num_train_timesteps, _scheduler_name(scheduler)
    if not 1 <= sampler.steps <= most:
        few = "few" if sampler.steps < 1 else "many"
        raise InputError(f"steps: {sampler.steps} is too {few} for {name}: the schedule has {most}")
    with reading(f"steps: {sampler.steps}", f"a number that {name} can take"):
        scheduler.set_timesteps(sampler.steps, device=device)
    return scheduler


def sampler_name(pipe: StableDiffusionPipeline, sampler: Sampler) -> str:
    """What a sampler is called, after the scheduler that it really builds: DDIM, PNDM, DPM-Solver++ 2M, LCM, ..."""
    return _scheduler_name(build_scheduler(pipe, sampler.scheduler))


def _scheduler_name(scheduler: SchedulerMixin) -> str:
    if isinstance(scheduler, DDIMScheduler) and (spacing := scheduler.config.timestep_spacing) != "trailing":
        return f"DDIM ({spacing})"  # beside the named one, whose timesteps are trailing
    if not isinstance(scheduler, DPMSolverMultistepScheduler):
        return type(scheduler).__name__.removesuffix("Scheduler").removesuffix("Discrete")
    kind, order = scheduler.config.algorithm_type, scheduler.config.solver_order
    return f"DPM-Solver{'++' * kind.endswith('++')} {order}M{' SDE' * kind.startswith('sde')}"


def step_generators(count: int, seed: int) -> list[torch.Generator]:
    """One generator per image for the noise that a scheduler adds in its steps: it does not depend on the batch."""
    _check_seed(seed)
    return [torch.Generator().manual_seed(seed * 1_000_003 + index + 1) for index in range(count)]


def _check_seed(seed: int) -> None:
    """Raise InputError for a seed of more than 32 bits: PyTorch on a CPU would take the last 32."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: expected 0 to {2**32 - 1}, got {seed}")


def initial_noise(pipe: StableDiffusionPipeline, count: int, seed: int, resolution: int | None = None) -> Tensor:
    """The starting noise of `count` images (n, 4, h, w) in float32, the same on every device and for every batch size.

    `resolution` is the side of the images in pixels, by default the one that the pipeline was loaded for. Raises
    ValueError when it is not a multiple of the VAE's scale factor, 8 for Stable Diffusion.
    """
    side = latent_side(pipe, resolution) if resolution is not None else pipe.unet.config.sample_size
    _check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, pipe.unet.config.in_channels, side, side, generator=generator)
    return noise.to(pipe.unet.device)


def unet_passes(pipe: StableDiffusionPipeline, sampler: Sampler) -> int:
    """UNet evaluations per image (NFE). PNDM and Heun have more timesteps than steps."""
    count = len(_with_timesteps(pipe, sampler, device=None).timesteps)
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
    """Latents (n, 4, h, w) in float32 from noise (n, 4, h, w) and prompt_embeds (n, tokens, dim).

    empty_embeds (1, tokens, dim), the embedding of "", is needed for guidance alone. The UNet computes in its dtype;
    guidance and the scheduler's steps are in float32 whatever that is. In float32 equal to the stock pipeline called
    with the same `latents` and, where the scheduler draws noise, the same list as `generator`. Raises InputError for
    such a scheduler without generators, for a guidance scale that is no number, and when
    `embedded_guidance` is missing or the UNet does not take it.
    """
    if not math.isfinite(sampler.guidance_scale):
        raise InputError(f"guidance_scale: expected a number, got {sampler.guidance_scale}")
    scheduler = _with_timesteps(pipe, sampler, noise.device)
    if generators is None and _draws_noise(pipe, sampler):
        name = _scheduler_name(scheduler)
        raise InputError(f"the {name} scheduler draws noise at its steps: give one generator an image")
    options = _step_options(scheduler, generators)
    guided_steps = sampler.guided_steps(len(scheduler.timesteps))
    dtype = pipe.unet.dtype
    latents, prompt_embeds = noise.float() * scheduler.init_noise_sigma, prompt_embeds.to(dtype)
    if guided_steps:
        both_embeds = torch.cat([empty_embeds.to(dtype).expand_as(prompt_embeds), prompt_embeds])  # (2n, tokens, dim)
    timestep_cond = _embedded_guidance(pipe, sampler, len(noise))
    with role(pipe.unet, sampler.adapter, sampler.adapter_weight):
        for index, t in enumerate(scheduler.timesteps):
            if index < guided_steps:
                doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)  # (2n, 4, h, w)
                uncond, cond = pipe.unet(doubled.to(dtype), t, both_embeds).sample.float().chunk(2)
                output = diffusion.guide(uncond, cond, sampler.guidance_scale)
            else:
                x_t = scheduler.scale_model_input(latents, t)
                output = pipe.unet(x_t.to(dtype), t, prompt_embeds, timestep_cond=timestep_cond).sample.float()
            latents = scheduler.step(output, t, latents, **options).prev_sample
    return latents


def _step_options(scheduler: SchedulerMixin, generators: list[torch.Generator] | None) -> dict[str, Any]:
    """What stock diffusers hands to a scheduler's step: no noise beyond its own, and generators for that."""
    offered = {"eta": 0.0, "generator": generators}
    return {name: value for name, value in offered.items() if name in signature(scheduler.step).parameters}


def _draws_noise(pipe: StableDiffusionPipeline, sampler: Sampler) -> bool:
    """Whether a scheduler's steps draw from PyTorch's generator where they are given none: tried on one number."""
    scheduler, x = _with_timesteps(pipe, sampler, torch.device("cpu")), torch.ones(1, 1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x, **_step_options(scheduler, None)).prev_sample
        return not torch.equal(torch.get_rng_state(), before)


def _embedded_guidance(pipe: StableDiffusionPipeline, sampler: Sampler, count: int) -> Tensor | None:
    dim = pipe.unet.config.time_cond_proj_dim
    if (dim is None) != (sampler.embedded_guidance is None):
        raise InputError(
            "embedded_guidance is for a UNet with time_cond_proj_dim, a full LCM, and such a UNet needs it; "
            "LatentConsistencyModelPipeline of diffusers draws with one from a folder"
        )
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
    """`sample` in batches, with a progress bar; `seed` is for the noise that a scheduler adds in its steps."""
    generators = step_generators(len(noise), seed)
    parts = [
        sample(pipe, sampler, noise[rows], prompt_embeds[rows], empty_embeds, generators[rows])
        for rows in (
            slice(i, i + batch_size) for i in trange(0, len(noise), batch_size, desc=title, mininterval=2, leave=False)
        )
    ]
    return torch.cat(parts)
