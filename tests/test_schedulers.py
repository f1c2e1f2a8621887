"""Sampling with the schedulers of diffusers, one by one: the latents of the stock pipeline, and the passes stated."""

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from lora_distill.errors import InputError
from lora_distill.pipeline import encode_prompts
from lora_distill.pipeline_files import check_loaded
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators, unet_passes

PROMPTS = ["a lion at the upper left, a bus at the lower right, on a blue background"]
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


# Of all schedulers of diffusers those that can be made from Stable Diffusion's config and need no further package.
EVERY = [
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
    *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM"),
    *("PNDM", "SASolver", "TCD", "UniPCMultistep"),
]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_a_seed_gives_one_picture_and_it_is_the_stock_pipeline_s(bundle, name):
    """Or, without generators, a refusal: nothing is drawn from PyTorch's own generator."""
    config = {**bundle.scheduler.config, "skip_prk_steps": True}
    bundle.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    noise, embeds = initial_noise(bundle, 2, seed=1), encode_prompts(bundle, ["a lion", "an owl"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    once, again = (sample(bundle, Sampler(3), noise, embeds, None, step_generators(2, seed=4)) for _ in range(2))
    assert torch.equal(once, again) and torch.equal(torch.get_rng_state(), state)
    options = {"latents": noise, "guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    theirs = bundle(["a lion", "an owl"], generator=step_generators(2, seed=4), **options).images
    assert (once - theirs).abs().max() <= 1e-4
    torch.set_rng_state(state)
    try:
        without = sample(bundle, Sampler(3), noise, embeds, None)
    except InputError as error:
        assert "draws noise at its steps" in str(error)
    else:
        assert torch.equal(without, once) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["CogVideoXDPM", "RePaint", "FlowMatchEulerDiscrete", "EDMEuler"])
def test_a_scheduler_of_another_kind_is_refused(bundle, name, tmp_path):
    bundle.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(dict(bundle.scheduler.config))
    with pytest.raises(InputError, match=rf"scheduler: {name}Scheduler (needs more than|has no alphas_cumprod)"):
        check_loaded(bundle, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_steps_are_taken_or_refused(bundle):
    config = {**bundle.scheduler.config, "skip_prk_steps": True}
    for name in EVERY:
        bundle.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
        for steps in (0, 1, 2, 1000, 1001):
            try:
                assert unet_passes(bundle, Sampler(steps)) >= steps and 1 <= steps <= 1000
            except InputError as error:
                assert str(error).startswith(f"steps: {steps}") and "\n" not in str(error)


@pytest.mark.parametrize("w", [float("nan"), float("inf")])
def test_guidance_that_is_no_number_is_refused(bundle, w):
    with pytest.raises(InputError, match="guidance_scale: expected a number, got"):
        sample(bundle, Sampler(1, w), initial_noise(bundle, 1, 0), *2 * [encode_prompts(bundle, [""])])
