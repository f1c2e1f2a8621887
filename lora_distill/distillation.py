"""Guided distillation as an experiment: the paper's method on one W0, and the conventional one on two UNets."""

import sys
from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from lora_distill import adapters, data, diffusion, latents, masters, objectives, training
from lora_distill.adapters import adapter_names, add_adapter, plain_copy, save_adapter
from lora_distill.data import noised_batches
from lora_distill.objectives import GuidanceDistillation
from lora_distill.pipeline import adapter_dtype
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, digest
from lora_distill.training import Schedule, train

CODE = (adapters, data, diffusion, latents, masters, objectives, training, sys.modules[__name__])
Milestones = tuple[int, Callable[[int, StableDiffusionPipeline], dict]]


def distil_lora(
    pipe: StableDiffusionPipeline,
    teacher: dict[str, Tensor],
    settings: Settings,
    folder: Path,
    name: str = "student",
    each: Milestones | None = None,
) -> list[dict]:
    """The paper's method: W0 alone is the teacher, W0 with the adapter `name` the student; return the log.

    `each = (n, measure)` puts `measure(step, pipe)` into the log every n steps.
    """
    if name in adapter_names(pipe.unet):
        pipe.unet.delete_adapters(name)
    add_adapter(
        pipe.unet,
        name,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        targets=settings.lora_targets,
        seed=settings.seed,
        dtype=adapter_dtype(pipe, settings.mixed_precision),
    )
    lora = {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "targets": settings.lora_targets}
    plan = schedule(settings, settings.learning_rate)
    log = _distil("lora", pipe, pipe.unet, teacher, settings, plan, folder, each, **lora)
    save_adapter(pipe.unet, name, lora_file(folder, name))
    return log


def distil_full_copy(
    pipe: StableDiffusionPipeline,
    teacher: dict[str, Tensor],
    settings: Settings,
    folder: Path,
    each: Milestones | None = None,
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """The conventional method: a second UNet, a full copy, learns from the first; return its pipeline and the log."""
    pipe.unet.requires_grad_(False)  # adapters that were trained on it before included
    student = plain_copy(pipe.unet)
    plan = schedule(settings, settings.full_learning_rate)
    log = _distil("full copy", pipe, student, teacher, settings, plan, folder, each)
    return with_unet(pipe, student.requires_grad_(False)), log


def lora_file(folder: Path, name: str) -> Path:
    """Where a trained adapter is kept, for stock diffusers to load."""
    return folder / f"{name}.safetensors"


def _distil(
    title: str,
    pipe: StableDiffusionPipeline,
    student: UNet2DConditionModel,
    teacher: dict[str, Tensor],
    settings: Settings,
    plan: Schedule,
    folder: Path,
    each: Milestones | None,
    **depends_on,
) -> list[dict]:
    w, empty_embeds = settings.guidance_scale, teacher["empty_embeds"]
    objective = GuidanceDistillation(student, pipe.unet, pipe.scheduler, w, empty_embeds)
    draw_batch = noised_batches(teacher, pipe.scheduler.config.num_train_timesteps)
    depends_on |= {"teacher": digest(teacher), "guidance_scale": w}
    return fit(title, objective, draw_batch, with_unet(pipe, student), plan, folder, each, **depends_on)


def fit(
    title: str,
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    student_pipe: StableDiffusionPipeline,
    plan: Schedule,
    folder: Path,
    each: Milestones | None = None,
    **depends_on,
) -> list[dict]:
    """Train in a folder of its own for all that decides the result, so that only like continues like; the log.

    `depends_on` is what, beside the plan and the code of the training, makes the result another one.
    """
    key = cache_key(*CODE, plan=repr(plan), **depends_on)
    milestones = each and (each[0], lambda step: each[1](step, student_pipe))
    run = folder / f"{title.replace(' ', '_')}-{key}"
    return train(objective, draw_batch, plan, run, device=student_pipe.device, each=milestones, title=title)


def schedule(settings: Settings, learning_rate: float) -> Schedule:
    """The plan that the settings describe."""
    return Schedule(
        steps=settings.train_steps,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        seed=settings.seed,
        warmup_steps=settings.warmup_steps,
        gradient_accumulation=settings.gradient_accumulation,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        ema_decay=settings.ema_decay,
        mixed_precision=settings.mixed_precision,
        log_every=settings.log_every,
        checkpoint_every=settings.checkpoint_every,
    )


def with_unet(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The same pipeline around another UNet; nothing else is copied."""
    other = copy(pipe)
    other.unet = unet
    return other


def parameter_counts(unet: UNet2DConditionModel) -> tuple[int, int]:
    """(parameters of W0, parameters of all A and B) of one UNet."""
    lora = sum(p.numel() for key, p in unet.named_parameters() if "lora_" in key)
    return sum(p.numel() for p in unet.parameters()) - lora, lora
