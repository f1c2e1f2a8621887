"""Training of the bundled pipeline's VAE on scenes of every style (notebook 00)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill import processes
from lora_distill.data import scenes
from lora_distill.pretrain.parts import PRETRAINED, build_vae
from lora_distill.storage import cache_key
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule

CROP_SIZE = 32


class Reconstruction(nn.Module):
    """L1 + L2 reconstruction with a KL term that keeps the latents near a unit Gaussian (Rombach et al. 2022, §3.1)."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 5e-4):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * batch["noise"]
        difference = self.vae.decode(latents).sample.float() - images
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        reconstruction = difference.abs().mean() + difference.square().mean()
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}


def train_vae(
    schedules: dict[str, Schedule], images: int, folder: Path, seed: int = 0, device: str = "cpu"
) -> tuple[AutoencoderKL, dict[str, list[dict]]]:
    """Train the VAE on crops around the objects, then on whole images; return it with the logs of both stages.

    `schedules` has one for each stage, `vae_crops` and `vae_images`. Half of an image is flat background: crops of a
    quarter of its area take a quarter of the time. The last steps take whole images, because the statistics of the
    group norms differ.
    """
    torch.manual_seed(seed)
    objective = Reconstruction(build_vae().to(device))
    data = [s for style in scenes.STYLES for s in scenes.sample_scenes(style, "train", images // 2, seed)]
    pixels = draw_all(data)
    centres = [[(one.left + one.size // 2, one.top + one.size // 2) for one in s.objects] for s in data]

    def draw_crops(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (batch_size,), generator=generator)
        which = torch.randint(12, (batch_size,), generator=generator)  # of one to four objects each equally often
        jitter = torch.randint(-8, 9, (batch_size, 2), generator=generator)
        around = torch.tensor(
            [centres[r][w % len(centres[r])] for r, w in zip(rows.tolist(), which.tolist(), strict=True)]
        )
        corners = (around + jitter - CROP_SIZE // 2).clamp(0, scenes.IMAGE_SIZE - CROP_SIZE)
        crops = [
            pixels[row, :, y : y + CROP_SIZE, x : x + CROP_SIZE]
            for row, (x, y) in zip(rows.tolist(), corners.tolist(), strict=True)
        ]
        return {"images": torch.stack(crops), "noise": _latent_noise(batch_size, CROP_SIZE // 8, generator)}

    def draw_images(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(pixels), (batch_size,), generator=generator)
        return {"images": pixels[rows], "noise": _latent_noise(batch_size, scenes.IMAGE_SIZE // 8, generator)}

    logs, parts = {}, {"version": PRETRAINED, "seed": seed, "images": images, "art": scenes.drawing_fingerprint()}
    for name, draw_batch in (("vae_crops", draw_crops), ("vae_images", draw_images)):
        schedule = replace(schedules[name], seed=seed)
        title = name.replace("_", " on ")
        parts |= {name: repr(schedule), "processes": processes.in_series()}  # the second stage goes on from the first
        place = folder / f"{name}-{cache_key(**parts)}"
        logs[name] = train(objective, draw_batch, schedule, place, device=device, title=title)
    return objective.vae.eval(), logs


def draw_all(data: list[scenes.Scene]) -> Tensor:
    """The images of scenes: (n, 3, 64, 64) uint8."""
    drawn = [scenes.draw(s) for s in tqdm(data, desc="drawing", mininterval=2, leave=False)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def _latent_noise(batch_size: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch_size, 4, side, side, generator=generator)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, device: str, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (n, 4, 8, 8) each and unscaled, of the latents of images (n, 3, 64, 64) uint8."""
    parts = []
    for batch in tqdm(images.split(batch_size), desc="encoding", mininterval=2, leave=False):
        posterior = vae.encode(batch.to(device).float() / 127.5 - 1).latent_dist
        parts.append((posterior.mean.cpu(), posterior.std.cpu()))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std
