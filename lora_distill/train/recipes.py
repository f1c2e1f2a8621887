"""The experiments of both works: guided distillation, a full LCM, LCM-LoRA, a LoRA that mimics the LCM, a fine-tune.

One frozen W0 is teacher and base of every adapter; only the conventional full copy and the full LCM are second UNets.
Each recipe trains in a folder named by a key of all that decides its result: no training continues a different one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from lora_distill import processes
from lora_distill.adapters import adapter_names, add_adapter, plain_copy, role, save_adapter, set_weight
from lora_distill.data.encoded import EncodedImages, caption_dropout, consistency_batches, image_batches
from lora_distill.data.teacher import noised_batches
from lora_distill.data.trajectories import Trajectories, dial_batches, trajectory_batches
from lora_distill.devices import compiled, is_compiled
from lora_distill.errors import InputError
from lora_distill.fingerprint import fingerprint
from lora_distill.lora_files import MADE_BY
from lora_distill.pipeline import adapter_dtype, encode_prompts, with_unet
from lora_distill.settings import PACKAGE, Settings
from lora_distill.storage import cache_key, digest
from lora_distill.train.loop import Milestones, train
from lora_distill.train.objectives import (
    ConsistencyDistillation,
    ConsistencyMimicry,
    Denoising,
    GuidanceDial,
    GuidanceDistillation,
    RecordedOutputs,
    TeacherOutputs,
    TrajectoryDistillation,
)
from lora_distill.train.step import Schedule

RECIPE = 2  # version of recipes, loop and objectives, part of the keys of trainings: raise it when a result changes
LCM_SAMPLING_STEPS = 4  # of the few that it is trained for, what its LoRA file proposes
DIAL_RANGE = 1.0, 7.5  # of w that a guidance dial is trained for: from no guidance to the papers' value
DIAL = "guidance dial"  # the method in the header of its LoRA file
W_EMBEDDING = 256  # features of w that a full LCM takes, as in the published LCM


# ---------------------------------------------------------------------------------------------- guided distillation


def distil_lora(
    pipe: StableDiffusionPipeline,
    teacher: dict[str, Tensor],
    settings: Settings,
    folder: Path,
    name: str = "student",
    milestones: Milestones | None = None,
) -> list[dict]:
    """The paper's method: the teacher is W0 alone, the student W0 with the adapter `name`; return the log.

    An adapter of this name is replaced; the trained one is also written to `lora_file(folder, name)`. `teacher` is from
    `data.teacher.teacher_set`. With `milestones = (n, measure, key)`,
    `measure(step, pipe)` is added to the log every n steps.
    """
    w, empty_embeds = settings.guidance_scale, teacher["empty_embeds"]
    _new_adapter(pipe, name, settings.lora_rank, settings.lora_targets, settings, alpha=settings.lora_alpha)
    plan = schedule(settings, settings.learning_rate)
    objective = GuidanceDistillation(pipe.unet, pipe.unet, pipe.scheduler, w, empty_embeds)
    draw_batch = noised_batches(teacher, pipe.scheduler.config.num_train_timesteps)
    key = {"teacher": digest(teacher), "guidance_scale": w, **_adapter_key(settings)}
    log = fit("lora", objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    _save(pipe, name, folder, settings, "guided distillation", plan, {"data": _public(settings.data)})
    return log


def distil_on_trajectories(
    pipe: StableDiffusionPipeline,
    kept: Trajectories,
    settings: Settings,
    folder: Path,
    name: str = "trajectories",
    milestones: Milestones | None = None,
) -> list[dict]:
    """The student `name` learns at points of the teacher's guided trajectories; return the log.

    No teacher runs: a step is one forward and one backward. `kept` is from `data.trajectories`.
    """
    _new_adapter(pipe, name, settings.lora_rank, settings.lora_targets, settings, alpha=settings.lora_alpha)
    plan, w = schedule(settings, settings.learning_rate), settings.guidance_scale
    key = {"trajectories": kept.key, "guidance_scale": w, **_adapter_key(settings)}
    objective, draw_batch = TrajectoryDistillation(pipe.unet, w), trajectory_batches(kept)
    log = fit("trajectories", objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    method = "guided distillation on trajectories"
    _save(pipe, name, folder, settings, method, plan, {"data": _public(settings.data)})
    return log


def distil_dial(
    pipe: StableDiffusionPipeline,
    teacher: dict[str, Tensor] | Trajectories,
    settings: Settings,
    folder: Path,
    name: str = "dial",
    milestones: Milestones | None = None,
    w_range: tuple[float, float] = DIAL_RANGE,
) -> list[dict]:
    """A LoRA whose weight is the guidance scale: 1 is `guidance_scale`, w0, and 0 is no guidance; return the log.

    At each step w is drawn anew from `w_range`. `teacher` is a teacher set, whose images are noised, or trajectories.
    A w0 above the range extends it. The file's header holds w0 and the range. Milestones are measured at weight 1, or
    at that of a sampler's own. Raises InputError for a w0 of 1: no weight would change it.
    """
    w0, low, high = settings.guidance_scale, w_range[0], max(w_range[1], settings.guidance_scale)
    if w0 == 1:
        raise InputError("guidance_scale: a dial's w0 must be above 1, which is no guidance")
    _new_adapter(pipe, name, settings.lora_rank, settings.lora_targets, settings, alpha=settings.lora_alpha)
    if isinstance(teacher, Trajectories):
        outputs, draw_batch, depends_on = RecordedOutputs(), trajectory_batches(teacher), {"trajectories": teacher.key}
    else:
        outputs = TeacherOutputs(pipe.unet, pipe.scheduler, teacher["empty_embeds"])
        draw_batch = noised_batches(teacher, pipe.scheduler.config.num_train_timesteps)
        depends_on = {"teacher": digest(teacher)}
    objective, plan = GuidanceDial(pipe.unet, name, outputs, w0), schedule(settings, settings.learning_rate)
    draw_batch = dial_batches(draw_batch, low, high)
    if milestones:
        every, measure, measured = milestones
        milestones = every, partial(_at_weight_1, measure, name), measured
    key = {**depends_on, "w0": w0, "range": [low, high], **_adapter_key(settings)}
    try:
        log = fit("dial", objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    finally:
        set_weight(pipe.unet, name, 1.0)
    said = {"w0": f"{w0:g}", "w_min": f"{low:g}", "w_max": f"{high:g}", "data": _public(settings.data)}
    _save(pipe, name, folder, settings, DIAL, plan, said)
    return log


def _at_weight_1(measure: Callable, name: str, step: int, pipe: StableDiffusionPipeline) -> dict:
    """`measure(step, pipe)` with an adapter at weight 1, whatever weight the last step of its training had."""
    with role(pipe.unet, name, 1.0):
        return measure(step, pipe)


def distil_full_copy(
    pipe: StableDiffusionPipeline,
    teacher: dict[str, Tensor],
    settings: Settings,
    folder: Path,
    milestones: Milestones | None = None,
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """The conventional method: the student is a full copy of the UNet; return its pipeline and the log."""
    pipe.unet.requires_grad_(False)  # adapters that were trained on it before included
    student = _like(pipe.unet, plain_copy(pipe.unet))
    plan = replace(schedule(settings, settings.full_learning_rate), optimizer=settings.optimizer)
    w, empty_embeds = settings.guidance_scale, teacher["empty_embeds"]
    objective = GuidanceDistillation(student, pipe.unet, pipe.scheduler, w, empty_embeds)
    draw_batch = noised_batches(teacher, pipe.scheduler.config.num_train_timesteps)
    copy_pipe, key = with_unet(pipe, student), {"teacher": digest(teacher), "guidance_scale": w}
    log = fit("full copy", objective, draw_batch, copy_pipe, plan, settings, folder, milestones, **key)
    student.requires_grad_(False)
    return copy_pipe, log


# ---------------------------------------------------------------------------------------------- the slides' phases


def train_lcm(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    milestones: Milestones | None = None,
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """Phase 2: train a copy, all weights, as a full LCM for w ~ U[w_min, w_max]; return its pipeline and the log."""
    pipe.unet.requires_grad_(False)  # adapters that were trained on it before included
    student = _like(pipe.unet, plain_copy(pipe.unet, time_cond_proj_dim=W_EMBEDDING))
    objective = _consistency(pipe, student, settings)
    draw_batch = _batches(pipe, images, settings, settings.w_min, settings.w_max)
    plan = replace(_plan(settings, settings.lcm_learning_rate), optimizer=settings.optimizer)
    lcm_pipe, key = with_unet(pipe, student), _key(pipe, images, settings)
    log = fit("lcm", objective, draw_batch, lcm_pipe, plan, settings, folder, milestones, **key)
    student.requires_grad_(False)
    return lcm_pipe, log


def train_lcm_lora(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    name: str = "lcm_lora",
    milestones: Milestones | None = None,
) -> list[dict]:
    """LCM-LoRA (Luo et al. 2023b): consistency distillation of the adapter `name`, at one fixed w; return the log."""
    _new_adapter(pipe, name, settings.lcm_rank, settings.lcm_targets, settings)
    objective = _consistency(pipe, pipe.unet, settings)
    draw_batch = _batches(pipe, images, settings, settings.guidance_scale, settings.guidance_scale)
    plan = _plan(settings, settings.lcm_lora_learning_rate)
    key = _key(pipe, images, settings)
    log = fit(name, objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    _save(pipe, name, folder, settings, "LCM-LoRA", plan, {"images": images.key})
    return log


def mimic_lcm(
    pipe: StableDiffusionPipeline,
    lcm_pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    name: str = "mimic",
    milestones: Milestones | None = None,
) -> list[dict]:
    """Phase 3: the adapter `name` learns the clean latents that a trained LCM predicts, by MSE + KL; return the log."""
    _new_adapter(pipe, name, settings.lcm_rank, settings.lcm_targets, settings)
    weights = {"mse_weight": settings.mse_weight, "kl_weight": settings.kl_weight}
    objective = ConsistencyMimicry(pipe.unet, lcm_pipe.unet, pipe.scheduler, **weights)
    draw_batch = _batches(pipe, images, settings, settings.guidance_scale, settings.guidance_scale)
    plan = replace(_plan(settings, settings.lcm_lora_learning_rate), ema_decay=0.0)
    key = {**_key(pipe, images, settings), **weights, "lcm": digest(lcm_pipe.unet.state_dict())}
    log = fit(name, objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    _save(pipe, name, folder, settings, "LCM mimicry", plan, {"images": images.key})
    return log


def finetune_lora(
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    settings: Settings,
    folder: Path,
    rank: int,
    targets: str,
    name: str = "finetune",
    milestones: Milestones | None = None,
    learning_rate: float | None = None,
) -> list[dict]:
    """The slides' baseline: the adapter `name` is trained with the denoising loss on the images; return the log.

    A share of the captions is dropped, as the settings say. The learning rate is by default `finetune_learning_rate`.
    """
    _new_adapter(pipe, name, rank, targets, settings)
    objective = Denoising(pipe.unet, pipe.scheduler)
    dropout, empty_embeds = settings.finetune_caption_dropout, encode_prompts(pipe, [""])
    draw_batch = image_batches(images, pipe.scheduler.config.num_train_timesteps)
    draw_batch = caption_dropout(draw_batch, empty_embeds.float(), dropout)
    plan = _plan(settings, learning_rate or settings.finetune_learning_rate)
    plan = replace(plan, steps=settings.finetune_steps, ema_decay=0.0)
    key = {"pipeline": fingerprint(pipe), "images": images.key, "rank": rank, "targets": targets}
    key |= {"caption_dropout": dropout}
    log = fit(name, objective, draw_batch, pipe, plan, settings, folder, milestones, **key)
    _save(pipe, name, folder, settings, "fine-tune", plan, {"images": images.key})
    return log


# ---------------------------------------------------------------------------------------------- what they share


def lora_file(folder: Path, name: str) -> Path:
    """The LoRA file of a trained adapter, which stock diffusers loads."""
    return folder / f"{name}.safetensors"


def fit(
    title: str,
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    student_pipe: StableDiffusionPipeline,
    plan: Schedule,
    settings: Settings,
    folder: Path,
    milestones: Milestones | None = None,
    **depends_on,
) -> list[dict]:
    """Train in a folder named by `title` and a key; return the log.

    The key is a digest of the plan, the number of processes and `depends_on`, all else that decides the result. Of the
    settings only those are read here that say how the UNets are computed.
    """
    key = cache_key(version=RECIPE, plan=repr(plan), processes=processes.in_series(), **depends_on)
    if milestones:
        every, measure, measured = milestones
        milestones = every, lambda step: measure(step, student_pipe), measured
    run = folder / f"{title.replace(' ', '_')}-{key}"
    options = {"device": student_pipe.device, "milestones": milestones, "title": title}
    with _checkpointed(objective) if settings.gradient_checkpointing else nullcontext():
        return train(objective, draw_batch, plan, run, **options)


@contextmanager
def _checkpointed(objective: nn.Module) -> Iterator[None]:
    """Inside the block the trained UNet computes its activations again in backward; afterwards it is as found."""
    found = [module for module in objective.modules() if isinstance(module, UNet2DConditionModel)]
    changed = [
        unet for unet in found if any(p.requires_grad for p in unet.parameters()) and not unet.is_gradient_checkpointing
    ]
    for unet in changed:
        unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for unet in changed:
            unet.disable_gradient_checkpointing()


def schedule(settings: Settings, learning_rate: float) -> Schedule:
    """The `Schedule` of the settings for guided distillation."""
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


def _save(
    pipe: StableDiffusionPipeline,
    name: str,
    folder: Path,
    settings: Settings,
    method: str,
    plan: Schedule,
    data: dict[str, str],
) -> None:
    """Write the LoRA file of an adapter; when this returns, every process can read it."""
    header = _header(pipe, name, settings, method, plan) | data
    save_adapter(pipe.unet, name, lora_file(folder, name), header)
    processes.wait()


def _header(
    pipe: StableDiffusionPipeline, name: str, settings: Settings, method: str, plan: Schedule
) -> dict[str, str]:
    """What a LoRA file says of itself: its base, how it was trained, and how it is sampled; nothing of this machine."""
    config = pipe.unet.peft_config[name]
    w = {} if method == "fine-tune" else {"w": settings.guidance_scale}  # distilled: in the weights, one pass a step
    outside = settings.guidance_scale if method in ("fine-tune", DIAL) else 1.0  # of the sampler, or of a dial's weight
    few = method.startswith("LCM")
    said = {
        MADE_BY: PACKAGE.name,
        "base": _public(settings.pipeline),
        "method": method,
        "trained_steps": plan.steps,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "prediction_type": pipe.scheduler.config.prediction_type,
        "guidance_scale": outside,
        "scheduler": "lcm" if few else settings.scheduler,
        "steps": LCM_SAMPLING_STEPS if few else settings.sampling_steps,
        "resolution": pipe.unet.config.sample_size * pipe.vae_scale_factor,
        **w,
    }
    return {key: str(value) for key, value in said.items()}


def _public(source: str) -> str:
    """A source without the place that it has on this machine."""
    return Path(source).name if Path(source).is_absolute() else source


def _like(unet: UNet2DConditionModel, copy: UNet2DConditionModel) -> UNet2DConditionModel:
    """The copy, compiled if the UNet is."""
    if is_compiled(unet):
        compiled(copy)
    return copy


def _new_adapter(
    pipe: StableDiffusionPipeline, name: str, rank: int, targets: str, settings: Settings, alpha: float | None = None
) -> None:
    """Add the adapter `name` in the place of one of that name; alpha is the rank where it is not given."""
    if name in adapter_names(pipe.unet):
        pipe.unet.delete_adapters(name)
    dtype = adapter_dtype(pipe, settings.mixed_precision)
    add_adapter(pipe.unet, name, rank=rank, alpha=alpha or rank, targets=targets, seed=settings.seed, dtype=dtype)


def _adapter_key(settings: Settings) -> dict:
    """What the adapter of guided distillation is, for the key of its training."""
    return {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "targets": settings.lora_targets}


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
    """What decides the result of a consistency training besides its plan."""
    names = ("guidance_scale", "w_min", "w_max", "ddim_skip", "huber_c", "lcm_rank", "lcm_targets")
    values = {name: getattr(settings, name) for name in names}
    return {"pipeline": fingerprint(pipe), "images": images.key, **values}
