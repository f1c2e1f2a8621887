"""Sampling with the schedulers of diffusers, one by one: the latents of the stock pipeline, and the passes stated."""

import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from lora_distill.pipeline import encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample, unet_passes

PROMPTS = ["a lion left of a bus on a blue background"]
GUIDED = Sampler(4, 3.0)
SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,  # the default of Stable Diffusion 1.5
    HeunDiscreteScheduler,
]


@pytest.fixture(params=SCHEDULERS)
def pipe(bundle, request):
    config = {**bundle.scheduler.config, "skip_prk_steps": True}  # as Stable Diffusion 1.5 has it; PNDM alone asks
    bundle.scheduler = request.param.from_config(config)
    return bundle


def sampled(pipe):
    return sample(
        pipe, GUIDED, initial_noise(pipe, 1, seed=1), encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])
    )


def test_the_latents_are_those_of_the_stock_pipeline(pipe):
    noise = initial_noise(pipe, 1, seed=1)
    theirs = pipe(PROMPTS, latents=noise, guidance_scale=3.0, num_inference_steps=4, output_type="latent").images
    assert (sampled(pipe) - theirs).abs().max() <= 1e-4


def test_the_unet_passes_are_those_that_are_stated(pipe):
    rows = []
    with pipe.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0]))):
        sampled(pipe)
    assert sum(rows) == unet_passes(pipe, GUIDED)
