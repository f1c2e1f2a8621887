"""The tables of notebook 02: what guidance adds, errors against passes, and the methods that are compared."""

import re
from collections.abc import Iterable

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_distill import diffusion
from lora_distill.judge.by_objects import ALL
from lora_distill.judge.tables import TEACHER, UNTRAINED

PAPER_W = 7.5  # the guidance scale of the paper's code
STUDENT, COPY, PLAIN = "LoRA student", "full copy", "no guidance"
QUANTITIES = {"epsilon": "ε, the network's output", "v_prediction": "v, the network's output"}


@torch.no_grad()
def difference_rows(
    pipe: StableDiffusionPipeline, teacher: dict[str, Tensor], guidance_scale: float, seed: int, count: int = 64
) -> list[dict]:
    """How much guidance changes the conditional pass, by timestep: of the network's output, of its x0 and its eps.

    `relative_difference` is the size of the change over the size of the quantity, on the first `count` latents of a
    teacher set. `loss` is the mean square of the change of the output: what a student has to lose that has not learnt.
    """
    latents, embeds = teacher["latents"][:count], teacher["prompt_embeds"][:count]
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    kind, dtype, rows = pipe.scheduler.config.prediction_type, pipe.unet.dtype, []
    for t in range(19, pipe.scheduler.config.num_train_timesteps, 70):
        timesteps = torch.full((len(latents),), t, device=latents.device)
        noise = diffusion.alpha_sigma(pipe.scheduler.alphas_cumprod, timesteps)
        x_t = diffusion.add_noise(latents, eps, *noise)
        cond, uncond = (
            pipe.unet(x_t.to(dtype), timesteps, prompts.to(dtype)).sample.float()
            for prompts in (embeds, teacher["empty_embeds"].expand_as(embeds))
        )
        guided = diffusion.guide(uncond, cond, guidance_scale)
        found = {QUANTITIES[kind]: (cond, guided)}
        for name, convert in (("x0, the clean latent", diffusion.to_x0), ("ε, the noise", diffusion.to_eps)):
            found[name] = tuple(convert(output, x_t.float(), *noise, kind) for output in (cond, guided))
        loss = float((guided - cond).square().mean())
        rows += [
            {"timestep": t, "quantity": name, "relative_difference": float((b - a).norm() / a.norm()), "loss": loss}
            for name, (a, b) in found.items()
            if kind != "epsilon" or name != "ε, the noise"  # the output itself
        ]
    return rows


def untrained_loss(differences: list[dict]) -> dict:
    """A row for the losses of trainings: that of a student that has learnt nothing, the mean over timesteps."""
    losses = {row["timestep"]: row["loss"] for row in differences}
    return {"method": "untrained", "step": None, "loss": sum(losses.values()) / len(losses)}


def passes_rows(errors: list[dict], solver: str) -> list[dict]:
    """The `error_rows` as curves against UNet passes: the teacher's sampler with fewer steps, the student with fewer.

    `solver` is the name of the multi-step sampler. What is guided by another w is left out.
    """
    rows = []
    for row in errors:
        method = re.sub(r", \d+ steps$", "", row["method"])
        if row["compositions"] == ALL and " w = " not in method:
            trained = method in (STUDENT, COPY)
            method = f"{solver}, guided" if method in (TEACHER, "base, guided") else method
            rows.append({**row, "method": method, "trained": trained})
    return rows


def whole_runs(errors: list[dict]) -> list[dict]:
    """The `error_rows` without those of samplers with fewer steps."""
    return [row for row in errors if not row["method"].endswith(" steps")]


def contrasts(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The pairs of methods that are compared on the same prompts and noise, by the name of the contrast."""
    names = list(methods)
    pairs = [(name, TEACHER) for name in (STUDENT, COPY, *UNTRAINED, f"teacher, w = {PAPER_W:g}")]
    pairs += [(STUDENT, other) for other in (COPY, PLAIN, "base, guided, 4 steps", "base, guided, 8 steps")]
    pairs += [(f"{STUDENT}, {n} steps", f"base, guided, {n} steps") for n in (4, 8)]
    pairs += [(f"{STUDENT}, 8 steps", "base, guided, 4 steps")]  # the same number of passes
    pairs += [(f"student, w = {PAPER_W:g}", f"teacher, w = {PAPER_W:g}")]
    return {f"{one} against {other}": (one, other) for one, other in pairs if one in names and other in names}
