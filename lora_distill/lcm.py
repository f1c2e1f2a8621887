"""The slides' phases as experiments: a full LCM, a LoRA that mimics it, the direct LCM-LoRA, a plain fine-tune.

One W0 is teacher and base of every adapter; only the full LCM is a second UNet.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from lora_distill.adapters import adapter_names, add_adapter, plain_copy, save_adapter
from lora_distill.distillation import Milestones, fit, lora_file, schedule, with_unet
from lora_distill.latents import EncodedImages, consistency_batches, image_batches
from lora_distill.objectives import ConsistencyDistillation, ConsistencyMimicry, Denoising
from lora_distill.pipeline import adapter_dtype, encode_prompts, fingerprint
from lora_distill.settings import Settings
from lora_distill.storage import digest, source_digest
from lora_distill.training import Schedule

W_EMBEDDING = 256  # features of w, as in the public LCM


def train_lcm(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    each: Milestones | None = None,
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """Phase 2: all weights of a copy become a consistency function of w ~ U[w_min, w_max]; its pipeline and the log."""
    pipe.unet.requires_grad_(False)  # adapters that were trained on it before included
    student = plain_copy(pipe.unet, time_cond_proj_dim=W_EMBEDDING)
    objective = _consistency(pipe, student, settings)
    draw_batch = _batches(pipe, images, settings, settings.w_min, settings.w_max)
    plan = _plan(settings, settings.lcm_learning_rate)
    lcm_pipe = with_unet(pipe, student)
    log = fit("lcm", objective, draw_batch, lcm_pipe, plan, folder, each, **_key(pipe, images, settings))
    student.requires_grad_(False)
    return lcm_pipe, log


def train_lcm_lora(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    name: str = "lcm_lora",
    each: Milestones | None = None,
) -> list[dict]:
    """LCM-LoRA (Luo et al. 2023b): the adapter alone becomes the consistency function, at one fixed w."""
    _new_adapter(pipe, name, settings.lcm_rank, settings.lcm_targets, settings)
    objective = _consistency(pipe, pipe.unet, settings)
    draw_batch = _batches(pipe, images, settings, settings.guidance_scale, settings.guidance_scale)
    plan = _plan(settings, settings.lcm_lora_learning_rate)
    return _fit_adapter(name, objective, draw_batch, pipe, plan, folder, each, **_key(pipe, images, settings))


def mimic_lcm(
    pipe: StableDiffusionPipeline,
    lcm_pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    name: str = "mimic",
    each: Milestones | None = None,
) -> list[dict]:
    """Phase 3: the adapter learns the latents that a trained LCM predicts, by MSE + KL."""
    _new_adapter(pipe, name, settings.lcm_rank, settings.lcm_targets, settings)
    weights = {"mse_weight": settings.mse_weight, "kl_weight": settings.kl_weight}
    objective = ConsistencyMimicry(pipe.unet, lcm_pipe.unet, pipe.scheduler, **weights)
    draw_batch = _batches(pipe, images, settings, settings.guidance_scale, settings.guidance_scale)
    plan = replace(_plan(settings, settings.lcm_lora_learning_rate), ema_decay=0.0)
    key = {**_key(pipe, images, settings), **weights, "lcm": digest(lcm_pipe.unet.state_dict())}
    return _fit_adapter(name, objective, draw_batch, pipe, plan, folder, each, **key)


def finetune_lora(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    rank: int,
    targets: str,
    name: str = "finetune",
    each: Milestones | None = None,
) -> list[dict]:
    """The slides' baseline: an adapter of the denoising loss on the images."""
    _new_adapter(pipe, name, rank, targets, settings)
    objective = Denoising(pipe.unet, pipe.scheduler)
    draw_batch = image_batches(images, pipe.scheduler.config.num_train_timesteps)
    plan = replace(_plan(settings, settings.finetune_learning_rate), steps=settings.finetune_steps, ema_decay=0.0)
    key = {"pipeline": fingerprint(pipe), "images": images.key, "rank": rank, "targets": targets, "code": _code()}
    return _fit_adapter(name, objective, draw_batch, pipe, plan, folder, each, **key)


def _fit_adapter(
    name: str,
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, torch.Tensor]],
    pipe: StableDiffusionPipeline,
    plan: Schedule,
    folder: Path,
    each: Milestones | None,
    **depends_on,
) -> list[dict]:
    log = fit(name, objective, draw_batch, pipe, plan, folder, each, **depends_on)
    save_adapter(pipe.unet, name, lora_file(folder, name))
    return log


def _new_adapter(pipe: StableDiffusionPipeline, name: str, rank: int, targets: str, settings: Settings) -> None:
    if name in adapter_names(pipe.unet):
        pipe.unet.delete_adapters(name)
    dtype = adapter_dtype(pipe, settings.mixed_precision)
    add_adapter(pipe.unet, name, rank=rank, alpha=rank, targets=targets, seed=settings.seed, dtype=dtype)


def _consistency(pipe: StableDiffusionPipeline, student, settings: Settings) -> ConsistencyDistillation:
    empty_embeds = encode_prompts(pipe, [""])
    return ConsistencyDistillation(
        student, pipe.unet, pipe.scheduler, empty_embeds, settings.ddim_skip, settings.huber_c
    )


def _batches(pipe: StableDiffusionPipeline, images: EncodedImages, settings: Settings, w_min: float, w_max: float):
    timesteps = pipe.scheduler.config.num_train_timesteps
    return consistency_batches(image_batches(images, timesteps), timesteps, settings.ddim_skip, w_min, w_max)


def _plan(settings: Settings, learning_rate: float) -> Schedule:
    plan = schedule(settings, learning_rate)
    size = settings.lcm_batch_size
    return replace(plan, steps=settings.lcm_steps, batch_size=size, ema_decay=settings.lcm_ema_decay)


def _key(pipe: StableDiffusionPipeline, images: EncodedImages, settings: Settings) -> dict:
    """What decides the result of consistency training beside its plan."""
    names = ("guidance_scale", "w_min", "w_max", "ddim_skip", "huber_c", "lcm_rank", "lcm_targets")
    values = {name: getattr(settings, name) for name in names}
    return {"pipeline": fingerprint(pipe), "images": images.key, "code": _code(), **values}


def _code() -> str:
    return source_digest(sys.modules[__name__])
