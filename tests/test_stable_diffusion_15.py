"""Every recipe, deployment and the judge on a tiny Stable Diffusion 1.5 and 2.1, on photographs, in 16 and 32 bits.

What the bundled pipeline hides is here: config files without the keys of later years, PNDM, eps and v, 77 tokens, four
UNet levels, linear projections. Each result is compared with stock diffusers, or with the same in float32.
"""

from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline

from lora_distill import rehearsal
from lora_distill.adapters import adapter_parameters, role
from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import Framing, encode_images
from lora_distill.data.teacher import teacher_set, training_captions
from lora_distill.deployment import deployed
from lora_distill.judge.judge import Judge, held_out
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches, step_generators
from lora_distill.settings import Settings
from lora_distill.train.recipes import (
    distil_full_copy,
    distil_lora,
    finetune_lora,
    lora_file,
    mimic_lcm,
    train_lcm,
    train_lcm_lora,
)

SIDE = 64  # pixels
PROMPTS = ["Two children runs on the grass .", "A white bird sits in snow ."]
W = 7.5
# Learning rates are high, so that few updates move something.
SETTINGS = Settings(
    resolution=SIDE, guidance_scale=W, train_steps=6, lcm_steps=3, finetune_steps=6, batch_size=2, lcm_batch_size=2,
    warmup_steps=0, log_every=1, checkpoint_every=100, lcm_rank=4, learning_rate=1.0e-2, full_learning_rate=1.0e-3,
    lcm_lora_learning_rate=1.0e-3, lcm_learning_rate=1.0e-4, finetune_learning_rate=1.0e-2, mirror=True,
    eval_prompts=4, skip_unusable=True,
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A kind of pipeline, its dtype and the precision of training.
CASES = {
    "sd15 float32": ("sd15", "float32", "no"),
    "sd15 bfloat16": ("sd15", "bfloat16", "no"),
    "sd15 bfloat16 autocast": ("sd15", "bfloat16", "bf16"),
    "sd21 float32": ("sd21", "float32", "no"),
    "sd21 bfloat16": ("sd21", "bfloat16", "no"),
}


class Walk:
    """One kind of pipeline in one dtype, with what the recipes need and a folder for what they leave."""

    def __init__(self, inputs: Path, folder: Path, kind: str, dtype: str, mixed_precision: str):
        self.source, self.dtype, self.folder = inputs / kind, DTYPES[dtype], folder
        self.settings = SETTINGS.model_copy(update={"dtype": dtype, "mixed_precision": mixed_precision})
        self.photographs = inputs / "flickr8k"
        self.pipe = self.load()

    def load(self) -> StableDiffusionPipeline:
        return load_pipeline(str(self.source), "cpu", self.dtype, SIDE)

    @cached_property
    def teacher(self) -> dict[str, torch.Tensor]:
        captions = training_captions(str(self.photographs), "noto", 8, 0)
        return teacher_set(self.pipe, captions, Sampler(3, W), 0, self.folder / "cache")

    @cached_property
    def images(self):
        photographs = captioned_images(self.photographs, "train").select(range(8))
        return encode_images(self.pipe, photographs, Framing(SIDE, mirror=True), self.folder / "cache")

    @cached_property
    def lcm(self):
        return train_lcm(self.pipe, self.images, self.settings, self.folder)

    def draw(self, sampler: Sampler, pipe: StableDiffusionPipeline | None = None) -> torch.Tensor:
        """Latents of both prompts from noise of one seed."""
        pipe = pipe or self.pipe
        embeds, empty = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
        return sample_in_batches(pipe, sampler, initial_noise(pipe, 2, 0), embeds, empty, seed=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("sd15", "sd21"):
        rehearsal.write_pipeline(folder / kind, kind)
    rehearsal.write_photographs(folder / "flickr8k", "flickr8k", train=10, val=2, test=6)
    rehearsal.write_photographs(folder / "flickr30k", "flickr30k", train=8, val=2, test=2)
    rehearsal.write_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def walks(inputs, tmp_path_factory):
    """A `Walk` of each case, made when it is first asked for."""
    return cache(lambda case: Walk(inputs, tmp_path_factory.mktemp("walk"), *CASES[case]))


@pytest.fixture(params=CASES)
def walk(walks, request) -> Walk:
    return walks(request.param)


def w0(pipe) -> dict[str, torch.Tensor]:
    state = pipe.unet.state_dict()
    return {name.replace(".base_layer", ""): v.clone() for name, v in state.items() if "lora_" not in name}


@torch.no_grad()
def guided_error(walk: Walk, unet, adapter: str | None = None) -> float:
    """The mean squared error of a student's one pass against the guided teacher, on one batch, by the formula."""
    latents, embeds, empty = walk.teacher["latents"], walk.teacher["prompt_embeds"], walk.teacher["empty_embeds"]
    timesteps = torch.tensor([19, 150, 300, 450, 600, 750, 850, 999])
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    x_t = walk.pipe.scheduler.add_noise(latents.float(), eps, timesteps).to(walk.dtype)
    embeds, empty = embeds.to(walk.dtype), empty.to(walk.dtype)
    with role(walk.pipe.unet, None):
        cond = walk.pipe.unet(x_t, timesteps, embeds).sample.float()
        uncond = walk.pipe.unet(x_t, timesteps, empty.expand_as(embeds)).sample.float()
    with role(unet, adapter):
        made = unet(x_t, timesteps, embeds).sample.float()
    return float((made - uncond - W * (cond - uncond)).square().mean())


@torch.no_grad()
def denoising_error(walk: Walk, adapter: str | None) -> float:
    """The mean squared error of the predicted noise (or v) on photographs, on one batch, by the scheduler's formula."""
    images, scheduler = walk.images, walk.pipe.scheduler
    latents = torch.from_numpy(images.posteriors[:, 0, 0, 0].astype(np.float32)) * images.scaling_factor
    embeds = torch.from_numpy(images.prompt_embeds[images.first_caption[:-1].numpy()]).to(walk.dtype)
    timesteps = torch.tensor([19, 150, 300, 450, 600, 750, 850, 999])
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    is_v = walk.source.name == "sd21"
    target = DDIMScheduler.from_config(scheduler.config).get_velocity(latents, eps, timesteps) if is_v else eps
    with role(walk.pipe.unet, adapter):
        made = walk.pipe.unet(scheduler.add_noise(latents, eps, timesteps).to(walk.dtype), timesteps, embeds).sample
    return float((made.float() - target).square().mean())


def losses(log: list[dict]) -> np.ndarray:
    return np.array([row["loss"] for row in log if "loss" in row])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, as a share of b's."""
    return float((a.float() - b.float()).norm() / b.float().norm())


# How far 16 bits may be from float32, or from another order of the same sums: three digits, over a few steps.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.01}


def stock(walk: Walk, *adapters: str) -> StableDiffusionPipeline:
    """Stock diffusers on the same folder, with LoRA files of the walk."""
    pipe = StableDiffusionPipeline.from_pretrained(walk.source, dtype=walk.dtype)
    pipe.set_progress_bar_config(disable=True)
    for name in adapters:
        pipe.load_lora_weights(str(walk.folder), weight_name=lora_file(walk.folder, name).name, adapter_name=name)
    return pipe


def stock_images(pipe: StableDiffusionPipeline, walk: Walk, steps: int, w: float = 1.0) -> torch.Tensor:
    noise, generators = initial_noise(walk.pipe, 2, 0), step_generators(2, 0)
    options = {"num_inference_steps": steps, "guidance_scale": w, "output_type": "latent"}
    return pipe(PROMPTS, latents=noise.to(walk.dtype), generator=generators, **options).images


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("w", [1.0, W])
def test_the_teacher_draws_what_stock_diffusers_draws(walk, w):
    ours = walk.draw(Sampler(4, w))
    assert distance(ours, stock_images(stock(walk), walk, 4, w)) < TOLERANCE[walk.dtype]


def test_ddim_with_trailing_timesteps_draws_what_stock_diffusers_draws(walk):
    pipe = stock(walk)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    ours = walk.draw(Sampler(4, W, scheduler="ddim"))
    assert distance(ours, stock_images(pipe, walk, 4, W)) < TOLERANCE[walk.dtype]


def test_dpm_solver_draws_what_stock_diffusers_draws(walk):
    pipe = stock(walk)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    ours = walk.draw(Sampler(4, W, scheduler="dpm++"))
    assert distance(ours, stock_images(pipe, walk, 4, W)) < TOLERANCE[walk.dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_16_bits_draw_nearly_what_float32_draws(walks, inputs, tmp_path, kind, dtype):
    other = Walk(inputs, tmp_path, kind, dtype, "no")
    for sampler in (Sampler(4, W), Sampler(4, scheduler="lcm")):
        made, reference = other.draw(sampler), walks(f"{kind} float32").draw(sampler)
        assert distance(made, reference) < TOLERANCE[other.dtype]


# ---------------------------------------------------------------------------------------------- guided distillation


def test_guided_distillation_trains_a_lora_that_stock_diffusers_draws_with(walk):
    before = w0(walk.pipe)
    log = distil_lora(walk.pipe, walk.teacher, walk.settings, walk.folder)
    assert np.isfinite(losses(log)).all()
    assert guided_error(walk, walk.pipe.unet, "student") < 0.95 * guided_error(walk, walk.pipe.unet)
    assert all(torch.equal(before[name], value) for name, value in w0(walk.pipe).items()), "the teacher stays"
    expected = {"no": walk.dtype, "bf16": torch.float32}[walk.settings.mixed_precision]
    assert {p.dtype for p in adapter_parameters(walk.pipe.unet, "student")} == {expected}
    ours = walk.draw(Sampler(4, adapter="student"))
    assert distance(ours, stock_images(stock(walk, "student"), walk, 4)) < TOLERANCE[walk.dtype]
    assert distance(ours, walk.draw(Sampler(4))) > 1e-3, "and it draws something else than the teacher"


def test_the_conventional_copy_learns_the_same_target(walk):
    before = w0(walk.pipe)
    copy_pipe, log = distil_full_copy(walk.pipe, walk.teacher, walk.settings, walk.folder)
    assert guided_error(walk, copy_pipe.unet) < 0.9 * guided_error(walk, walk.pipe.unet)
    assert all(torch.equal(before[name], value) for name, value in w0(walk.pipe).items())
    assert copy_pipe.unet.dtype == walk.dtype
    lora_log = distil_lora(walk.pipe, walk.teacher, walk.settings, walk.folder)
    assert losses(log)[0] == pytest.approx(losses(lora_log)[0], rel=TOLERANCE[walk.dtype]), "both start from W0"


def test_a_deployed_student_draws_what_the_adapter_draws(walk):
    distil_lora(walk.pipe, walk.teacher, walk.settings, walk.folder)
    ready = deployed(walk.pipe, "student")
    # Folding in rounds W0 + BA once; the adapter rounds W0 x and BA x.
    made, reference = walk.draw(Sampler(3), ready), walk.draw(Sampler(3, adapter="student"))
    assert distance(made, reference) < TOLERANCE[walk.dtype]
    images = decode_latents(ready, made)
    assert images.shape == (2, SIDE, SIDE, 3)


# ---------------------------------------------------------------------------------------------- the slides' phases


def test_a_full_lcm_takes_w_though_the_config_has_no_word_of_it(walk):
    before = w0(walk.pipe)
    lcm_pipe, log = walk.lcm
    assert np.isfinite(losses(log)).all() and len(losses(log)) == 3
    assert lcm_pipe.unet.config.time_cond_proj_dim and lcm_pipe.unet.dtype == walk.dtype
    assert lcm_pipe.unet.time_embedding.cond_proj.weight.abs().max() > 0, "it learns"
    assert all(torch.equal(before[name], value) for name, value in w0(walk.pipe).items())
    made = walk.draw(Sampler(2, scheduler="lcm", embedded_guidance=W), lcm_pipe)
    assert made.isfinite().all()


def test_a_lora_mimics_the_lcm(walk):
    lcm_pipe, _ = walk.lcm
    before = w0(lcm_pipe)
    log = mimic_lcm(walk.pipe, lcm_pipe, walk.images, walk.settings, walk.folder)
    assert np.isfinite(losses(log)).all()
    assert max(float(p.abs().max()) for p in adapter_parameters(walk.pipe.unet, "mimic")[1::2]) > 0
    assert all(torch.equal(before[name], value) for name, value in w0(lcm_pipe).items())


def test_lcm_lora_draws_in_stock_diffusers_in_few_steps(walk):
    before = w0(walk.pipe)
    log = train_lcm_lora(walk.pipe, walk.images, walk.settings, walk.folder)
    assert np.isfinite(losses(log)).all()
    assert all(torch.equal(before[name], value) for name, value in w0(walk.pipe).items())
    pipe = stock(walk, "lcm_lora")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    ours = walk.draw(Sampler(4, scheduler="lcm", adapter="lcm_lora"))
    assert distance(ours, stock_images(pipe, walk, 4)) < TOLERANCE[walk.dtype]


def test_a_fine_tune_on_photographs_lowers_their_loss(walk):
    finetune_lora(walk.pipe, walk.images, walk.settings, walk.folder, 4, "all")
    assert denoising_error(walk, "finetune") < 0.99 * denoising_error(walk, None)


# ---------------------------------------------------------------------------------------------- the judge


def test_the_judge_scores_photographs_at_the_resolution_of_the_settings(walk, inputs):
    prompts, reference = held_out(str(walk.photographs), "test", 4, walk.settings)
    assert reference[:].shape == (6, SIDE, SIDE, 3)
    judge = Judge(walk.pipe, prompts, reference, clip=str(inputs / "clip"), cache_dir=walk.folder / "cache")
    quality = judge(Sampler(3, W), 0)
    images = quality.images[:]
    assert images.shape == (4, SIDE, SIDE, 3) and images.std() > 1
    again = Judge(walk.load(), prompts, reference, clip=str(inputs / "clip"))(Sampler(3, W), 0)
    assert np.array_equal(images, again.images[:]), "kept latents are those that are sampled"
    assert quality.frechet_distance > 0
