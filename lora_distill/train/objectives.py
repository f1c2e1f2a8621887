"""Training objectives: small modules, `objective(batch) -> (loss, scalars)`.

A batch has `latents` (b, 4, h, w), `eps` (the noise, same shape), `timesteps` (b,) and `prompt_embeds`
(b, tokens, dim); for the consistency objectives also `guidance_scale` (b,). All randomness is in the batch. No shape
and no branch depends on a value, so that nothing waits for a GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from lora_distill import diffusion
from lora_distill.adapters import folded, role, set_weight
from lora_distill.processes import all_rows

LEAST_GUIDANCE = 1e-3  # w - 1 that the dial's loss is divided by, at least


def unet_output(
    unet: UNet2DConditionModel,
    x_t: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
    timestep_cond: Tensor | None = None,
) -> Tensor:
    """The UNet's output for x_t, (b, 4, h, w) float32; inputs are cast to the dtype of its weights."""
    inputs = (x_t.to(unet.dtype), timesteps, prompt_embeds.to(unet.dtype))
    timestep_cond = None if timestep_cond is None else timestep_cond.to(unet.dtype)
    return unet(*inputs, timestep_cond=timestep_cond).sample.float()


@contextmanager
def _in_place(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block these parameters of the module have these values; nothing is copied."""
    parameters = [module.get_parameter(name) for name in values]
    found = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values.values(), strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, found, strict=True):
            parameter.data = value


class TeacherOutputs(nn.Module):
    """x_t of a batch's noised latents, and what W0 says of it without and with the prompt; adapters are off.

    The unconditional and the conditional pass are one forward on a batch of 2b.
    """

    def __init__(self, teacher: UNet2DConditionModel, scheduler: SchedulerMixin, empty_embeds: Tensor):
        super().__init__()
        self.teacher = teacher
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)
        self.register_buffer("empty_embeds", empty_embeds, persistent=False)  # (1, tokens, dim)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, uncond and cond, (b, 4, h, w) each."""
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, batch["timesteps"])
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma).to(batch["latents"].dtype)
        return x_t, *both_outputs(self.teacher, x_t, batch["timesteps"], batch["prompt_embeds"], self.empty_embeds)


class RecordedOutputs(nn.Module):
    """The same of a point of the teacher's own guided trajectories, which `data.trajectories` keeps on disk."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, uncond and cond, (b, 4, h, w) each."""
        return batch["x_t"], batch["uncond"], batch["cond"]


class GuidanceDistillation(nn.Module):
    """student(x_t, t, c) <- uncond + w (cond - uncond), MSE (arXiv 2312.06899; stage one of Meng et al. 2022, eq. 6).

    `student` and `teacher` may be the same UNet: the teacher is then that UNet with its adapters off. With a trainable
    copy as student it is conventional distillation. The loss is on the network's output, eps or v; for eps it is the
    paper's.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        guidance_scale: float,
        empty_embeds: Tensor,
    ):
        super().__init__()
        self.student = student
        self.outputs = TeacherOutputs(teacher, scheduler, empty_embeds)
        self.guidance_scale = guidance_scale

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # teacher first: no graph of the student is held in memory meanwhile
        x_t, uncond, cond = self.outputs(batch)
        target = diffusion.guide(uncond, cond, self.guidance_scale)
        output = unet_output(self.student, x_t, batch["timesteps"], batch["prompt_embeds"])
        return diffusion.mean_squared_error(output, target), {}


class TrajectoryDistillation(GuidanceDistillation):
    """The same loss at points of the teacher's guided trajectories, whose outputs are read and not computed.

    The x_t are those that sampling meets, and a step is one forward and one backward (AGD, arXiv 2503.07274).
    """

    def __init__(self, student: UNet2DConditionModel, guidance_scale: float):
        nn.Module.__init__(self)
        self.student = student
        self.outputs = RecordedOutputs()
        self.guidance_scale = guidance_scale


class GuidanceDial(nn.Module):
    """student with its adapter at weight (w - 1) / (w0 - 1) <- uncond + w (cond - uncond), MSE / (w - 1), for many w.

    So the weight of one LoRA, in any tool that has such weights, is the guidance scale: 0 is w = 1, no guidance, and 1
    is w0. A batch has one w, in `guidance_scale` (b,). Division by w - 1 lessens how much large w outweigh small ones:
    an untrained student's loss goes with its square. `outputs` are `TeacherOutputs` or `RecordedOutputs`.
    """

    def __init__(self, student: UNet2DConditionModel, adapter: str, outputs: nn.Module, w0: float):
        super().__init__()
        self.student = student
        self.adapter = adapter
        self.outputs = outputs
        self.w0 = w0

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, uncond, cond = self.outputs(batch)
        w = batch["guidance_scale"][0]
        # the weight stays on after the loss: gradient checkpointing computes the forward pass again in backward
        set_weight(self.student, self.adapter, (w - 1) / (self.w0 - 1))
        output = unet_output(self.student, x_t, batch["timesteps"], batch["prompt_embeds"])
        loss = diffusion.mean_squared_error(output, diffusion.guide(uncond, cond, w))
        return loss / (w - 1).clamp(min=LEAST_GUIDANCE), {}


def both_outputs(
    teacher: UNet2DConditionModel, x_t: Tensor, timesteps: Tensor, prompt_embeds: Tensor, empty_embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """W0's outputs without and with the prompt, (b, 4, h, w) each, adapters off: one forward on a batch of 2b."""
    both_embeds = torch.cat([empty_embeds.expand_as(prompt_embeds), prompt_embeds])  # (2b, tokens, dim)
    with torch.no_grad(), role(teacher, None):
        outputs = unet_output(teacher, torch.cat([x_t] * 2), torch.cat([timesteps] * 2), both_embeds)
    uncond, cond = outputs.chunk(2)  # (b, 4, h, w) each
    return uncond, cond


class ConsistencyFunction(nn.Module):
    """f(x_t, t) = c_skip x_t + c_out x0(x_t, t), an estimate of the trajectory's clean end (Luo et al. 2023, eq. 9).

    A UNet with `time_cond_proj_dim`, the full LCM, also takes the guidance scale as an input.
    """

    def __init__(self, unet: UNet2DConditionModel, scheduler: SchedulerMixin):
        super().__init__()
        self.unet = unet
        self.prediction_type = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)

    def forward(self, x_t: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: Tensor) -> Tensor:
        """Clean latents (b, 4, h, w) for x_t at timesteps (b,); only a full LCM uses guidance_scale (b,)."""
        dim = self.unet.config.time_cond_proj_dim
        timestep_cond = diffusion.guidance_embedding(guidance_scale, dim) if dim else None
        output = unet_output(self.unet, x_t, timesteps, prompt_embeds, timestep_cond)
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, timesteps)
        x0 = diffusion.to_x0(output, x_t, alpha, sigma, self.prediction_type)
        c_skip, c_out = diffusion.boundary_scalings(timesteps)
        return c_skip * x_t + c_out * x0


class ConsistencyDistillation(nn.Module):
    """f(x_t, t) <- f_target(x_s, s); x_s is one DDIM step of the guided teacher from x_t (Luo et al. 2023, alg. 1).

    `timesteps` lie on the DDIM grid; `guidance_scale` (b,) is the w of each row. s = t - `skip`; from the first grid
    point s = 0, where the boundary condition f(x, 0) = x makes x_s the target. f_target is the moving average of the
    student (`moving_average`) if training keeps one, else the student itself. The student runs last, so that its graph
    is not in memory during the other passes.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        empty_embeds: Tensor,
        skip: int = 20,
        huber_c: float = 1e-3,
    ):
        super().__init__()
        self.student = ConsistencyFunction(student, scheduler)
        self.teacher = teacher
        self.prediction_type = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)
        self.skip = skip
        self.huber_c = huber_c
        self.moving_average: dict[str, Tensor] = {}
        self.register_buffer("empty_embeds", empty_embeds, persistent=False)  # (1, tokens, dim)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        timesteps, prompt_embeds, guidance_scale = (
            batch[name] for name in ("timesteps", "prompt_embeds", "guidance_scale")
        )
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, timesteps)
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma)
        earlier = (timesteps - self.skip).clamp(min=0)
        x_s = self.ddim_solver(x_t, timesteps, earlier, prompt_embeds, guidance_scale)
        target = self.target(x_s, earlier, prompt_embeds, guidance_scale)
        prediction = self.student(x_t, timesteps, prompt_embeds, guidance_scale)
        return diffusion.pseudo_huber(prediction, target, self.huber_c), {}

    @torch.no_grad()
    def ddim_solver(
        self, x_t: Tensor, timesteps: Tensor, earlier: Tensor, prompt_embeds: Tensor, guidance_scale: Tensor
    ) -> Tensor:
        """x_s (b, 4, h, w): one DDIM step of the guided teacher to timesteps `earlier` (Luo et al. 2023, eq. 16)."""
        w = guidance_scale[:, None, None, None]
        output = diffusion.guide(*both_outputs(self.teacher, x_t, timesteps, prompt_embeds, self.empty_embeds), w)
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, timesteps)
        x0 = diffusion.to_x0(output, x_t, alpha, sigma, self.prediction_type)
        eps = diffusion.to_eps(output, x_t, alpha, sigma, self.prediction_type)
        return diffusion.ddim_step(x0, eps, *diffusion.alpha_sigma(self.alphas_cumprod, earlier))

    @torch.no_grad()
    def target(self, x_s: Tensor, timesteps: Tensor, prompt_embeds: Tensor, guidance_scale: Tensor) -> Tensor:
        """f_target(x_s, s), (b, 4, h, w); rows with s = 0 are x_s: the boundary condition, without rounding."""
        rows = (x_s, timesteps, prompt_embeds, guidance_scale)
        with _in_place(self, self.moving_average), folded(self.student.unet):
            target = self.student(*rows)
        return torch.where(timesteps[:, None, None, None] > 0, target, x_s.to(target.dtype))


class ConsistencyMimicry(nn.Module):
    """The student's clean latents <- those of a trained LCM for the same x_t, MSE + KL (the slides' phase 3).

    The slides do not say which KL. Ours is between Gaussians fitted to each latent channel over batch and space; the
    batch is that of all processes.
    """

    def __init__(
        self,
        student: UNet2DConditionModel,
        lcm: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        mse_weight: float = 1.0,
        kl_weight: float = 1.0,
    ):
        super().__init__()
        self.student = ConsistencyFunction(student, scheduler)
        self.lcm = ConsistencyFunction(lcm, scheduler)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)
        self.mse_weight = mse_weight
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, batch["timesteps"])
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma)
        inputs = (x_t, batch["timesteps"], batch["prompt_embeds"], batch["guidance_scale"])
        with torch.no_grad():
            reference = self.lcm(*inputs)
        prediction = self.student(*inputs)
        mse = diffusion.mean_squared_error(prediction, reference)
        kl = diffusion.gaussian_kl(all_rows(prediction), all_rows(reference))
        return self.mse_weight * mse + self.kl_weight * kl, {"mse": mse.detach(), "kl": kl.detach()}


class Denoising(nn.Module):
    """The plain diffusion loss, output <- eps or v, MSE (Rombach et al. 2022, eq. 3), for fine-tuning."""

    def __init__(self, student: UNet2DConditionModel, scheduler: SchedulerMixin):
        super().__init__()
        self.student = student
        self.prediction_type = scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod, persistent=False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, batch["timesteps"])
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma)
        output = unet_output(self.student, x_t, batch["timesteps"], batch["prompt_embeds"])
        target = diffusion.target_output(batch["latents"], batch["eps"], alpha, sigma, self.prediction_type)
        return diffusion.mean_squared_error(output, target), {}
