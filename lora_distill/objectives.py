"""Training objectives: small modules, `objective(batch) -> (loss, scalars)`.

A batch holds `latents` (b, 4, h, w), `eps` (the noise, same shape), `timesteps` (b,) and `prompt_embeds`
(b, tokens, dim); the objective adds no randomness of its own.
"""

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import Tensor, nn

from lora_distill import diffusion
from lora_distill.adapters import role


class GuidanceDistillation(nn.Module):
    """student(x_t, t, c) <- uncond + w (cond - uncond), MSE (arXiv 2312.06899; stage one of Meng et al. 2022, eq. 6).

    `student` and `teacher` may be the same UNet: then the teacher is that UNet with its adapters off, and there is
    one W0. With a second UNet as teacher and a trainable copy as student it is conventional distillation.
    The target is matched in the network's own output, eps or v; for eps this is the paper's loss.
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
        self.teacher = teacher
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.guidance_scale = guidance_scale
        self.register_buffer("empty_embeds", empty_embeds, persistent=False)  # (1, tokens, dim)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, batch["timesteps"])
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma).to(batch["latents"].dtype)
        # teacher first: no student graph is alive while its two passes run
        target = self.guided_teacher(x_t, batch["timesteps"], batch["prompt_embeds"])
        output = self.student(x_t, batch["timesteps"], batch["prompt_embeds"]).sample
        return diffusion.mean_squared_error(output, target), {}

    @torch.no_grad()
    def guided_teacher(self, x_t: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Both halves of guidance in one batched forward of W0."""
        both_embeds = torch.cat([self.empty_embeds.expand_as(prompt_embeds), prompt_embeds])
        with role(self.teacher, None):
            outputs = self.teacher(torch.cat([x_t] * 2), torch.cat([timesteps] * 2), both_embeds).sample
        uncond, cond = outputs.chunk(2)
        return diffusion.guide(uncond, cond, self.guidance_scale)
