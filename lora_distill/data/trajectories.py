"""The teacher's guided trajectories, kept on disk with what it said at every point: distillation then needs no teacher.

The paper's student learns at noised images of the teacher, and is used at points that sampling passes through. Here it
learns at these (AGD, arXiv 2503.07274). Both outputs of guidance are kept, so that the same file serves every guidance
scale that a student is to match.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill import processes
from lora_distill.arrays import mapped_rows
from lora_distill.data.teacher import AT_ONCE, teacher_captions
from lora_distill.errors import InputError
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import encode_prompts, with_unet
from lora_distill.sampling import Sampler, build_scheduler, initial_noise, multi_step, sample, step_generators
from lora_distill.settings import Settings
from lora_distill.storage import cache_key

TRAJECTORIES = 1  # version of the file, part of its key: raise it when its contents change
KEPT = 3  # tensors a point: x_t, the output without and with the prompt


@dataclass(frozen=True)
class Trajectories:
    """n trajectories of k points each, memory-mapped; (c, h, w) is the shape of a latent."""

    points: np.ndarray  # (n, k, 3, c, h, w) float16: x_t as the UNet takes it, uncond, cond
    prompt_embeds: np.ndarray  # (n, tokens, dim) float16
    timesteps: Tensor  # (k,)
    key: str  # a digest of all that they depend on

    def __len__(self) -> int:
        return len(self.points)


def trajectories(
    pipe: StableDiffusionPipeline,
    captions: list[str],
    sampler: Sampler,
    seed: int,
    cache_dir: Path,
    batch_size: int = AT_ONCE,
) -> Trajectories:
    """Sample the teacher with guidance for `captions` and keep every point, or read the file from `cache_dir`.

    In 16 bits, written `batch_size` trajectories at a time: a cut run goes on, and several processes share the work.
    The noise is that of `teacher.teacher_set`. Raises InputError for a sampler without guidance in all its steps.
    """
    if sampler.guidance_scale == 1 or sampler.guided_fraction != 1 or sampler.w0 is not None:
        raise InputError("guidance_scale: trajectories are of a teacher that is guided in all steps, with w above 1")
    scheduler = build_scheduler(pipe, sampler.scheduler)
    scheduler.set_timesteps(sampler.steps)
    key = cache_key(
        version=TRAJECTORIES,
        pipeline=fingerprint(pipe),
        captions=captions,
        sampler=repr(sampler),
        seed=seed,
        dtype=[str(pipe.unet.dtype), str(pipe.text_encoder.dtype)],
    )
    embeds = mapped_rows(
        cache_dir / f"trajectory-captions-{key}.npy",
        (len(captions), pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size),
        AT_ONCE,
        lambda parts: (encode_prompts(pipe, captions[part]) for part in parts),
    )
    side = pipe.unet.config.sample_size
    shape = (len(captions), len(scheduler.timesteps), KEPT, pipe.unet.config.in_channels, side, side)
    points = mapped_rows(
        cache_dir / f"trajectories-{key}.npy",
        shape,
        min(batch_size, AT_ONCE),
        partial(_sampled, pipe, captions, sampler, seed),
    )
    return Trajectories(points, embeds, scheduler.timesteps.cpu(), key)


def trajectories_for(pipe: StableDiffusionPipeline, settings: Settings, cache_dir: Path) -> Trajectories:
    """The trajectories of a run: those of its teacher images, as the settings say."""
    captions = teacher_captions(settings, cache_dir)
    sampler = multi_step(settings, settings.guidance_scale)
    return trajectories(pipe, captions, sampler, settings.seed, cache_dir, settings.eval_batch)


def _sampled(
    pipe: StableDiffusionPipeline, captions: list[str], sampler: Sampler, seed: int, parts: list[slice]
) -> Iterator[Tensor]:
    """All points of each part's trajectories, (b, k, 3, c, h, w)."""
    noise, generators = initial_noise(pipe, len(captions), seed), step_generators(len(captions), seed)
    empty_embeds = encode_prompts(pipe, [""])
    bar = {"desc": "trajectories", "mininterval": 2, "leave": False, "disable": not processes.is_main()}
    for part in tqdm(parts, **bar):
        recorder = _Recorder(pipe.unet)
        embeds = encode_prompts(pipe, captions[part])
        sample(with_unet(pipe, recorder), sampler, noise[part], embeds, empty_embeds, generators[part])
        yield torch.stack(recorder.points, dim=1)


class _Recorder(nn.Module):
    """A UNet that is called with both halves of guidance, and remembers what it was given and what it said."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.points: list[Tensor] = []  # of each call, (b, 3, c, h, w)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x_t: Tensor, *inputs: Tensor, **options: Tensor):
        output = self.unet(x_t, *inputs, **options)
        uncond, cond = output.sample.chunk(2)
        self.points.append(torch.stack([x_t.chunk(2)[0], uncond, cond], dim=1).cpu())
        return output


def trajectory_batches(kept: Trajectories) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that samples batches for `TrajectoryDistillation` and `GuidanceDial`: points of any trajectories.

    A batch, on the CPU and in float32, has `x_t`, `uncond` and `cond` (b, c, h, w), `timesteps` (b,) and
    `prompt_embeds` (b, tokens, dim). Only the rows that it holds are read from the disk.
    """

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(kept), (batch_size,), generator=generator)
        steps = torch.randint(len(kept.timesteps), (batch_size,), generator=generator)
        x_t, uncond, cond = torch.from_numpy(kept.points[rows.numpy(), steps.numpy()]).float().unbind(1)
        embeds = torch.from_numpy(kept.prompt_embeds[rows.numpy()]).float()
        timesteps = kept.timesteps[steps]
        return {"x_t": x_t, "uncond": uncond, "cond": cond, "timesteps": timesteps, "prompt_embeds": embeds}

    return draw_batch


def dial_batches(
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]], w_min: float, w_max: float
) -> Callable[[int, int, torch.Generator], dict[str, Tensor]]:
    """A function that adds to the batches of `draw_batch` one `guidance_scale` (b,) for all rows, uniform in a range.

    Raises InputError unless 1 <= w_min < w_max.
    """
    if not 1 <= w_min < w_max:
        raise InputError(f"w: expected a range from 1 or more upwards, got {w_min:g} to {w_max:g}")

    def draw(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = draw_batch(step, batch_size, generator)
        w = w_min + (w_max - w_min) * torch.rand((), generator=generator)
        return {**batch, "guidance_scale": w.expand(batch_size).clone()}

    return draw
