"""The formulas, against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler

from lora_distill import diffusion

TIMESTEPS = torch.tensor([0, 19, 500, 999])


@pytest.fixture(params=["epsilon", "v_prediction"])
def scheduler(request):
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=request.param,
    )  # fmt: skip


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, 8, 8, generator=generator) for _ in range(3)]  # x0, eps, output


def test_noised_latents_are_those_of_the_scheduler(scheduler, drawn):
    x0, eps, _ = drawn
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, TIMESTEPS)
    assert torch.allclose(diffusion.add_noise(x0, eps, alpha, sigma), scheduler.add_noise(x0, eps, TIMESTEPS))


def test_the_target_is_the_noise_or_the_schedulers_velocity(scheduler, drawn):
    x0, eps, _ = drawn
    kind = scheduler.config.prediction_type
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, TIMESTEPS)
    expected = eps if kind == "epsilon" else scheduler.get_velocity(x0, eps, TIMESTEPS)
    assert torch.allclose(diffusion.target_output(x0, eps, alpha, sigma, kind), expected)


def test_the_target_leads_back_to_latent_and_noise(scheduler, drawn):
    x0, eps, _ = drawn
    kind = scheduler.config.prediction_type
    alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, TIMESTEPS)
    x_t = diffusion.add_noise(x0, eps, alpha, sigma)
    target = diffusion.target_output(x0, eps, alpha, sigma, kind)
    assert torch.allclose(diffusion.to_x0(target, x_t, alpha, sigma, kind), x0, atol=1e-4)
    assert torch.allclose(diffusion.to_eps(target, x_t, alpha, sigma, kind), eps, atol=1e-4)


def test_the_ddim_step_is_the_schedulers(scheduler, drawn):
    x_t, _, output = (tensor[:1] for tensor in drawn)
    scheduler.set_timesteps(25)
    t, earlier = scheduler.timesteps[3:5]
    theirs = scheduler.step(output, t, x_t)
    kind, alphas = scheduler.config.prediction_type, scheduler.alphas_cumprod
    alpha, sigma = diffusion.alpha_sigma(alphas, t[None])
    x0, eps = (f(output, x_t, alpha, sigma, kind) for f in (diffusion.to_x0, diffusion.to_eps))
    assert torch.allclose(x0, theirs.pred_original_sample, atol=1e-5)
    ours = diffusion.ddim_step(x0, eps, *diffusion.alpha_sigma(alphas, earlier[None]))
    assert torch.allclose(ours, theirs.prev_sample, atol=1e-5)


def test_w_1_is_the_conditional_and_w_0_the_unconditional_output(drawn):
    uncond, cond, _ = drawn
    assert torch.allclose(diffusion.guide(uncond, cond, 1.0), cond, atol=1e-6)
    assert torch.equal(diffusion.guide(uncond, cond, 0.0), uncond)


def test_guiding_v_is_guiding_eps(drawn):
    uncond, cond, x_t = drawn
    alpha, sigma = diffusion.alpha_sigma(DDIMScheduler().alphas_cumprod, TIMESTEPS)

    def eps(v):
        return diffusion.to_eps(v, x_t, alpha, sigma, "v_prediction")

    guided = eps(diffusion.guide(uncond, cond, 7.5))
    assert torch.allclose(guided, diffusion.guide(eps(uncond), eps(cond), 7.5), atol=1e-4)


def test_the_loss_of_half_precision_is_computed_in_full():
    prediction = torch.full((4,), 300.0, dtype=torch.float16)
    assert (
        diffusion.mean_squared_error(prediction, torch.zeros(4, dtype=torch.float16)) == 90_000
    )  # above fp16's 65,504
