"""One training or sampling step of each scheme, built from what the project and the public scripts really run.

The same step runs on fake tensors, on a CPU and on a GPU; `lora_distill.memory` names the schemes.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lora_distill import diffusion
from lora_distill.adapters import add_adapter
from lora_distill.memory.layers import TOKENS
from lora_distill.memory.schemes import Inference, Precision, Scheme, Setup, Training, check, latent_size, precision_of
from lora_distill.shapes import SD15_SCHEDULER, materialise, meta_unet
from lora_distill.train.objectives import ConsistencyDistillation, Denoising, GuidanceDistillation
from lora_distill.train.optimizer import MasterAdamW

ADAPTER = "student"
Batch = dict[str, Tensor]


@dataclass
class Step:
    """A scheme made ready: call it to run one step."""

    run: Callable[[], None]
    weights: list[Tensor]
    lora: list[Tensor]
    trained: list[nn.Parameter]
    optimizer: MasterAdamW | None = None

    def __call__(self) -> None:
        self.run()


def prepare(scheme: Scheme, setup: Setup, config: Mapping[str, Any], device: str) -> Step:
    """Build a scheme's UNets for a UNet config, with zeros for weights, and its optimizer with its states.

    Raises ValueError for what no run can use, and for settings that only the account knows.
    """
    check(scheme, setup, config)
    if setup.optimizer != "adamw" or setup.quantised_base != "none":
        raise ValueError("an 8-bit optimizer and a quantised base are settings of the account alone")
    precision = precision_of(scheme, setup)
    inputs = make_inputs(scheme, setup, config, device)
    if isinstance(scheme, Inference):
        return _prepare_inference(scheme, precision, config, inputs, device)
    return _prepare_training(scheme, precision, setup.checkpointing, config, inputs, device)


def make_inputs(scheme: Scheme, setup: Setup, config: Mapping[str, Any], device: str) -> Batch:
    """Zeros for everything that a step is given; 16-bit where nothing casts it on the way."""
    precision, side = precision_of(scheme, setup), latent_size(setup)
    zeros = partial(torch.zeros, dtype=torch.float32 if precision.autocast else precision.frozen, device=device)
    return {
        "latents": zeros(setup.batch, config["in_channels"], side, side),
        "eps": zeros(setup.batch, config["in_channels"], side, side),
        "timesteps": torch.zeros(setup.batch, dtype=torch.long, device=device),
        "guidance_scale": zeros(setup.batch),
        "inside": torch.arange(setup.batch, device=device),
        "prompt_embeds": zeros(setup.batch, TOKENS, config["cross_attention_dim"]),
        "empty_embeds": zeros(1, TOKENS, config["cross_attention_dim"]),
    }


def _prepare_inference(scheme: Inference, precision: Precision, config, inputs: Batch, device: str) -> Step:
    unet = _unet(config, precision.frozen, device, scheme.rank, scheme.targets, precision.frozen)
    run = partial(sampling_step, unet.eval(), inputs, scheme.passes, scheme.copies)
    return Step(run, *_weights_and_lora([unet]), trained=[])


def _prepare_training(scheme: Training, precision: Precision, checkpointing, config, inputs: Batch, device) -> Step:
    full = scheme.trains == "unet"
    dtype = precision.trained if full else precision.frozen
    student = _unet(config, dtype, device, 0 if full else scheme.rank, scheme.targets, precision.trained).train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    teacher = None if scheme.teacher == "none" else student
    if scheme.teacher == "separate":
        teacher = _unet(config, precision.frozen, device).requires_grad_(False)
    trained = [p for p in student.parameters() if p.requires_grad]
    # foreach is what AdamW takes on a GPU by itself; elsewhere it has to be asked
    optimizer = MasterAdamW(trained, foreach=True)
    loss = _loss(scheme, precision, student, teacher, inputs, device)
    run = partial(_train, loss, trained, optimizer)
    _make_states(trained, optimizer)
    unets = [student] if teacher is None or teacher is student else [student, teacher]
    return Step(run, *_weights_and_lora(unets), trained, optimizer)


def _unet(config, dtype, device, rank=0, targets="attention", lora_dtype=torch.float32) -> UNet2DConditionModel:
    """A UNet with or without an adapter, cast on the meta device: modules cannot cast fake tensors in place."""
    with _disable_current_modes():
        unet = meta_unet(config, dtype)
        if rank:
            add_adapter(unet, ADAPTER, rank=rank, alpha=rank, targets=targets, dtype=lora_dtype)
    materialise(unet, device)
    return unet


def _weights_and_lora(unets: list[UNet2DConditionModel]) -> tuple[list[Tensor], list[Tensor]]:
    named = [pair for unet in unets for pair in unet.named_parameters()]
    return [p for name, p in named if "lora_" not in name], [p for name, p in named if "lora_" in name]


def _make_states(trained: list[nn.Parameter], optimizer: MasterAdamW) -> None:
    """AdamW makes its states in its first step; without this they would be missing when the first step peaks."""
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None


def _train(loss: Callable[[], Tensor], trained: list[nn.Parameter], optimizer: MasterAdamW) -> None:
    """An update as the training loop makes it: forward, backward, clip, step."""
    loss().backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    for parameter in trained:
        parameter.grad = None


# ---------------------------------------------------------------------------------------------- forward passes


def _loss(scheme: Training, precision: Precision, student, teacher, inputs: Batch, device: str) -> Callable[[], Tensor]:
    """The forward passes of a scheme up to its loss, under autocast where its precision says so."""
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16) if precision.autocast else nullcontext
    if scheme.objective == "consistency" and scheme.teacher == "separate":
        return partial(consistency_of_the_script, student, teacher, inputs, autocast)
    scheduler, empty_embeds = _scheduler(device), inputs["empty_embeds"]
    if scheme.objective == "denoising":
        objective = Denoising(student, scheduler)
    elif scheme.objective == "guidance":
        objective = GuidanceDistillation(student, teacher, scheduler, 7.5, empty_embeds)
    else:
        objective = ConsistencyDistillation(student, teacher, scheduler, empty_embeds)
    return partial(_under, autocast, lambda: objective(inputs)[0])


def _under(context: Callable, call: Callable[[], Tensor]) -> Tensor:
    with context():
        return call()


def _scheduler(device: str) -> DDIMScheduler:
    """SD 1.5's, with a table that fake tensors can index."""
    scheduler = DDIMScheduler(**SD15_SCHEDULER)
    scheduler.alphas_cumprod = torch.zeros(len(scheduler.alphas_cumprod), device=device)
    return scheduler


def consistency_of_the_script(student, teacher, batch: Batch, autocast: Callable) -> Tensor:
    """The forward passes of diffusers' LCM-LoRA script for SD 1.5, in its order: student, teacher twice, target.

    The project's own `ConsistencyDistillation` puts the student last, so that no graph is alive while the others run.
    """
    x_t, timesteps, embeds = batch["latents"], batch["timesteps"], batch["prompt_embeds"]
    with autocast():
        output = student(x_t, timesteps, embeds).sample
    with torch.no_grad(), autocast():
        cond = teacher(x_t, timesteps, embeds).sample
        uncond = teacher(x_t, timesteps, batch["empty_embeds"].expand_as(embeds)).sample
        x_prev = diffusion.guide(uncond, cond, 7.5).to(x_t.dtype)  # the DDIM step keeps this shape
    with torch.no_grad(), autocast():
        target = student(x_prev, timesteps, embeds).sample
    return diffusion.mean_squared_error(output, target)


@torch.no_grad()
def sampling_step(unet: UNet2DConditionModel, batch: Batch, passes: int, copies: int) -> Tensor:
    """The UNet's part of a sampler's step: one evaluation, two of them, or one of a doubled batch."""
    latents = torch.cat([batch["latents"]] * copies) if copies > 1 else batch["latents"]
    embeds = torch.cat([batch["prompt_embeds"]] * copies) if copies > 1 else batch["prompt_embeds"]
    outputs = [unet(latents, batch["timesteps"][0], embeds).sample for _ in range(passes)]
    parts = outputs[0].chunk(2) if copies > 1 else outputs
    return diffusion.guide(*parts, 7.5) if len(parts) > 1 else parts[0]
