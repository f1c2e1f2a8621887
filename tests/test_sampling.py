"""Sampling: as stock diffusers does it, with as many UNet passes as is said."""

import pytest
import torch

from lora_distill.adapters import add_adapter
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, sample_in_batches, unet_passes

PROMPTS = [
    "a lion at the upper left, a bus at the lower right, on a blue background",
    "a crown at the top right, green",
    "on pink, at the lower left an owl",
]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("bundled")


@pytest.fixture(scope="module")
def embeds(pipe):
    return encode_prompts(pipe, PROMPTS), encode_prompts(pipe, [""])


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_stock_diffusers_ends_at_the_same_latents(pipe, embeds, guidance_scale):
    noise = initial_noise(pipe, 3, seed=1)
    options = {"latents": noise, "num_inference_steps": 5, "output_type": "latent"}
    theirs = pipe(PROMPTS, guidance_scale=guidance_scale, **options).images
    assert (sample(pipe, Sampler(5, guidance_scale), noise, *embeds) - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "sampler", [Sampler(6), Sampler(6, 3.0), Sampler(6, 3.0, guided_fraction=0.5), Sampler(6, guided_fraction=0.5)]
)
def test_the_unet_passes_are_those_that_are_stated(pipe, embeds, sampler):
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    sample(pipe, sampler, initial_noise(pipe, 3, seed=1), *embeds)
    hook.remove()
    assert sum(rows) == 3 * unet_passes(pipe, sampler)
    assert len(rows) == sampler.steps, "both halves of guidance in one forward"


def test_guidance_in_part_is_guidance_on_the_first_steps(pipe, embeds):
    noise = initial_noise(pipe, 3, seed=1)
    scales = []

    def guidance_ends(pipeline, step, timestep, arguments):
        scales.append(step)
        if step == 2:  # three steps are done
            pipeline._guidance_scale = 1.0
            return {"prompt_embeds": arguments["prompt_embeds"].chunk(2)[1]}
        return {}

    theirs = pipe(
        PROMPTS, latents=noise, num_inference_steps=6, guidance_scale=3.0, output_type="latent",
        callback_on_step_end=guidance_ends, callback_on_step_end_tensor_inputs=["prompt_embeds"],
    ).images  # fmt: skip
    ours = sample(pipe, Sampler(6, 3.0, guided_fraction=0.5), noise, *embeds)
    assert (ours - theirs).abs().max() <= 1e-4 and len(scales) == 6


def test_the_batch_changes_nothing(pipe, embeds):
    noise, sampler = initial_noise(pipe, 3, seed=1), Sampler(3, 3.0)
    together = sample(pipe, sampler, noise, *embeds)
    assert torch.allclose(sample_in_batches(pipe, sampler, noise, *embeds, seed=0, batch_size=2), together, atol=1e-4)


def test_noise_depends_on_the_seed_alone(pipe):
    assert torch.equal(initial_noise(pipe, 5, seed=1)[:3], initial_noise(pipe, 3, seed=1))
    assert not torch.equal(initial_noise(pipe, 3, seed=1), initial_noise(pipe, 3, seed=2))


def test_an_adapter_plays_while_it_samples_and_no_longer(pipe, embeds):
    noise = initial_noise(pipe, 3, seed=1)
    teacher = sample(pipe, Sampler(2), noise, *embeds)
    for p in add_adapter(pipe.unet, "student", rank=2, alpha=2):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(sample(pipe, Sampler(2, adapter="student"), noise, *embeds), teacher, atol=0.1)
    assert torch.equal(sample(pipe, Sampler(2), noise, *embeds), teacher)
    pipe.unet.delete_adapters("student")
