"""One training or sampling step of each scheme on zeros: the training loop's own step, and a sampler's UNet passes.

The same step runs on fake tensors, on a CPU and on a GPU; `lora_distill.memory.schemes` names the schemes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lora_distill import diffusion
from lora_distill.adapters import add_adapter
from lora_distill.errors import InputError
from lora_distill.memory import schemes
from lora_distill.memory.schemes import TOKENS, Inference, Scheme, Setup, Training
from lora_distill.shapes import SD15_SCHEDULER, materialise, meta_unet
from lora_distill.train.objectives import ConsistencyDistillation, Denoising, GuidanceDistillation
from lora_distill.train.step import Schedule, TrainingStep

Batch = dict[str, Tensor]


@dataclass
class Step:
    """A scheme made ready: call it with the number of images to run one step."""

    run: Callable[[Batch], Any]
    inputs: Callable[[int], Batch]
    unets: list[UNet2DConditionModel]
    training: TrainingStep | None = None  # what `run` is, where the scheme trains

    def __call__(self, batch: int) -> None:
        self.run(self.inputs(batch))


def prepare(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], device: str) -> Step:
    """Build a scheme's UNets with zeros for weights and, where it trains, the loop's step with AdamW's states.

    Raises ValueError for what no run can use, and for settings that only the account knows.
    """
    schemes.check(scheme, setup, unet_config)
    if setup.optimizer == "adamw-8bit" or setup.quantised_base != "none":
        raise InputError("an 8-bit optimizer and a quantised base are settings of the account alone")
    precision = schemes.precision_of(scheme, setup)
    zeros = partial(torch.zeros, dtype=torch.float32 if precision.autocast else precision.frozen, device=device)
    empty_embeds = zeros(1, TOKENS, unet_config["cross_attention_dim"])
    inputs = partial(_inputs, zeros, unet_config["in_channels"], schemes.latent_size(setup), empty_embeds)
    if isinstance(scheme, Inference):
        unet = _unet(unet_config, precision.frozen, device, scheme.rank, scheme.targets, precision.frozen).eval()
        return Step(partial(sampling_step, unet, scheme.passes, scheme.copies), inputs, [unet])
    full = scheme.trains == "unet"
    dtype, rank = (precision.trained, 0) if full else (precision.frozen, scheme.rank)
    student = teacher = _unet(unet_config, dtype, device, rank, scheme.targets, precision.trained).train()
    if setup.checkpointing:
        student.enable_gradient_checkpointing()
    if scheme.teacher == "separate":
        teacher = _unet(unet_config, precision.frozen, device).requires_grad_(False)
    objective = _objective(scheme, student, teacher, empty_embeds)
    schedule = Schedule(1, setup.batch, 1e-4, mixed_precision="bf16" if precision.autocast else "no")
    step = TrainingStep(objective, schedule, device)
    _ready_adamw(step, fused=setup.optimizer == "adamw-fused")
    return Step(step, inputs, [student] if teacher is student else [student, teacher], step)


def _inputs(zeros: Callable[..., Tensor], channels: int, side: int, empty_embeds: Tensor, batch: int) -> Batch:
    """Zeros for everything that a step is given; `zeros` has 16 bits where nothing casts them on the way."""
    return {
        "latents": zeros(batch, channels, side, side),
        "eps": zeros(batch, channels, side, side),
        "timesteps": torch.zeros(batch, dtype=torch.long, device=empty_embeds.device),
        "guidance_scale": zeros(batch),
        "prompt_embeds": zeros(batch, *empty_embeds.shape[1:]),
        "empty_embeds": empty_embeds,
    }


def _unet(config, dtype, device, rank=0, targets="attention", lora_dtype=torch.float32) -> UNet2DConditionModel:
    """A UNet with or without an adapter, cast on the meta device: modules cannot cast fake tensors in place."""
    with _disable_current_modes():
        unet = meta_unet(config, dtype)
        if rank:
            add_adapter(unet, "student", rank=rank, alpha=rank, targets=targets, dtype=lora_dtype)
    materialise(unet, device)
    return unet


def _objective(scheme: Training, student, teacher, empty_embeds: Tensor) -> nn.Module:
    if scheme.objective == "consistency" and scheme.teacher == "separate":
        return ConsistencyOfTheScript(student, teacher)
    scheduler = DDIMScheduler(**SD15_SCHEDULER)
    # fake indices cannot read a real table
    scheduler.alphas_cumprod = torch.full((len(scheduler.alphas_cumprod),), 0.5, device=empty_embeds.device)
    if scheme.objective == "denoising":
        return Denoising(student, scheduler)
    if scheme.objective == "guidance":
        return GuidanceDistillation(student, teacher, scheduler, 7.5, empty_embeds)
    return ConsistencyDistillation(student, teacher, scheduler, empty_embeds)


def _ready_adamw(step: TrainingStep, fused: bool) -> None:
    """AdamW in one kernel, or foreach; and its states, which the first step would make after the peak."""
    step.adamw.param_groups[0] |= {"fused": fused, "foreach": not fused}
    for master in step.masters.values():
        moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
        count = torch.zeros((), device=master.device if fused else "cpu")
        step.adamw.state[master] = {"step": count, **moments}


# ---------------------------------------------------------------------------------------------- forward passes


class ConsistencyOfTheScript(nn.Module):
    """The passes of diffusers' train_lcm_distill_lora_sd_wds.py in its order: student, teacher twice, target.

    The project's own `ConsistencyDistillation` puts the student last, so that no graph is alive while the others run.
    """

    def __init__(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel):
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, embeds = batch["latents"], batch["prompt_embeds"]
        output = self._evaluate(self.student, batch, x_t, embeds)
        with torch.no_grad():
            cond = self._evaluate(self.teacher, batch, x_t, embeds)
            uncond = self._evaluate(self.teacher, batch, x_t, batch["empty_embeds"].expand_as(embeds))
            x_prev = diffusion.guide(uncond, cond, 7.5).to(x_t.dtype)  # the DDIM step keeps this shape
            target = self._evaluate(self.student, batch, x_prev, embeds)
        return diffusion.mean_squared_error(output, target), {}

    def _evaluate(self, unet: UNet2DConditionModel, batch: Batch, x_t: Tensor, embeds: Tensor) -> Tensor:
        output = unet(x_t, batch["timesteps"], embeds).sample
        torch.clear_autocast_cache()  # the script enters autocast anew for every pass
        return output


@torch.no_grad()
def sampling_step(unet: UNet2DConditionModel, passes: int, copies: int, batch: Batch) -> Tensor:
    """The UNet's part of a sampler's step: one evaluation, two of them, or one of a doubled batch."""
    latents = torch.cat([batch["latents"]] * copies) if copies > 1 else batch["latents"]
    embeds = torch.cat([batch["prompt_embeds"]] * copies) if copies > 1 else batch["prompt_embeds"]
    outputs = [unet(latents, batch["timesteps"][0], embeds).sample for _ in range(passes)]
    parts = outputs[0].chunk(2) if copies > 1 else outputs
    return diffusion.guide(*parts, 7.5) if len(parts) > 1 else parts[0]
