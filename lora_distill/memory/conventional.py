"""Training steps as public scripts write them, for comparison: no part of them is the project's way to train.

Each encodes pictures with the VAE and captions with the text encoder in every step, has a teacher of its own where
there is one, and runs the teacher's two passes one after the other. A batch has `images` (b, 3, height, width) in
[-1, 1], `ids` (b, tokens) of the captions and `timesteps` (b,).
"""

from collections.abc import Iterable

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from lora_distill import diffusion
from lora_distill.adapters import TARGETS

Batch = dict[str, Tensor]


class Conventional(nn.Module):
    """What these steps have in common: the parts of a pipeline, and a batch encoded anew."""

    def __init__(self, pipe: StableDiffusionPipeline, student: UNet2DConditionModel):
        super().__init__()
        self.student, self.vae, self.text_encoder = student, pipe.vae, pipe.text_encoder
        self.prediction_type = pipe.scheduler.config.prediction_type
        self.register_buffer("alphas_cumprod", pipe.scheduler.alphas_cumprod, persistent=False)

    @torch.no_grad()
    def encoded(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise (b, 4, h, w), both drawn here, and prompt_embeds (b, tokens, dim)."""
        latents = self.vae.encode(batch["images"]).latent_dist.sample() * self.vae.config.scaling_factor
        return latents, torch.randn_like(latents), self.text_encoder(batch["ids"])[0]

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (b, 1, 1, 1) at timesteps (b,)."""
        return diffusion.alpha_sigma(self.alphas_cumprod, timesteps)


class ConventionalGuidance(Conventional):
    """Guided distillation as the author's script for DeepSpeed writes it; `empty_ids` of "" are in the batch too."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        guidance_scale: float,
    ):
        super().__init__(pipe, student)
        self.teacher, self.guidance_scale = teacher, guidance_scale

    def forward(self, batch: Batch) -> tuple[Tensor, Batch]:
        timesteps = batch["timesteps"]
        with torch.no_grad():
            latents, eps, embeds = self.encoded(batch)
            empty = self.text_encoder(batch["empty_ids"])[0]
            x_t = diffusion.add_noise(latents, eps, *self.alpha_sigma(timesteps))
            cond = self.teacher(x_t, timesteps, embeds).sample
            uncond = self.teacher(x_t, timesteps, empty).sample
        output = self.student(x_t, timesteps, embeds).sample
        return diffusion.mean_squared_error(output, diffusion.guide(uncond, cond, self.guidance_scale)), {}


class ConventionalConsistency(Conventional):
    """LCM-LoRA as diffusers' script writes it: student, teacher twice, then the student itself for the target.

    The batch has `guidance_scale` (b,) too. Without a moving average, as in the script.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        student: UNet2DConditionModel,
        teacher: UNet2DConditionModel,
        empty_embeds: Tensor,
        skip: int,
        huber_c: float,
    ):
        super().__init__(pipe, student)
        self.teacher, self.skip, self.huber_c = teacher, skip, huber_c
        self.register_buffer("empty_embeds", empty_embeds, persistent=False)  # (1, tokens, dim), encoded once

    def forward(self, batch: Batch) -> tuple[Tensor, Batch]:
        timesteps, (latents, eps, embeds) = batch["timesteps"], self.encoded(batch)
        alpha, sigma = self.alpha_sigma(timesteps)
        x_t = diffusion.add_noise(latents, eps, alpha, sigma)
        prediction = self.consistent(x_t, timesteps, embeds)
        with torch.no_grad():
            cond = self.teacher(x_t, timesteps, embeds).sample
            uncond = self.teacher(x_t, timesteps, self.empty_embeds.expand_as(embeds)).sample
            output = diffusion.guide(uncond, cond, batch["guidance_scale"][:, None, None, None])
            x0 = diffusion.to_x0(output, x_t, alpha, sigma, self.prediction_type)
            noise = diffusion.to_eps(output, x_t, alpha, sigma, self.prediction_type)
            earlier = (timesteps - self.skip).clamp(min=0)
            x_s = diffusion.ddim_step(x0, noise, *self.alpha_sigma(earlier))
            target = self.consistent(x_s, earlier, embeds)
        return diffusion.pseudo_huber(prediction, target, self.huber_c), {}

    def consistent(self, x_t: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        """The student's estimate of the trajectory's clean end, (b, 4, h, w)."""
        output = self.student(x_t, timesteps, embeds).sample
        x0 = diffusion.to_x0(output, x_t, *self.alpha_sigma(timesteps), self.prediction_type)
        c_skip, c_out = diffusion.boundary_scalings(timesteps)
        return c_skip * x_t + c_out * x0


class ConventionalDenoising(Conventional):
    """The plain LoRA fine-tune as diffusers' script writes it."""

    def forward(self, batch: Batch) -> tuple[Tensor, Batch]:
        latents, eps, embeds = self.encoded(batch)
        alpha, sigma = self.alpha_sigma(batch["timesteps"])
        x_t = diffusion.add_noise(latents, eps, alpha, sigma)
        output = self.student(x_t, batch["timesteps"], embeds).sample
        target = diffusion.target_output(latents, eps, alpha, sigma, self.prediction_type)
        return diffusion.mean_squared_error(output, target), {}


class PlainStep:
    """Forward, backward, clipping and PyTorch's AdamW in its default form; the loss is read in every step."""

    def __init__(self, objective: nn.Module, learning_rate: float, max_grad_norm: float = 1.0):
        self.objective, self.max_grad_norm = objective, max_grad_norm
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, lr=learning_rate)

    def __call__(self, batch: Batch) -> float:
        loss, _ = self.objective(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.adamw.step()
        self.adamw.zero_grad()
        return loss.item()


def with_lora(unet: UNet2DConditionModel, rank: int, targets: str) -> UNet2DConditionModel:
    """The UNet with a trainable adapter of PEFT's own, as scripts add it."""
    unet.requires_grad_(False)
    config = {"init_lora_weights": "gaussian", "target_modules": TARGETS[targets]}
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, **config))
    return unet.train()


def token_ids(pipe: StableDiffusionPipeline, prompts: Iterable[str]) -> Tensor:
    """The ids of prompts, (n, tokens), padded to the length of the text encoder."""
    options = {"padding": "max_length", "truncation": True, "max_length": pipe.tokenizer.model_max_length}
    return pipe.tokenizer(list(prompts), return_tensors="pt", **options).input_ids
