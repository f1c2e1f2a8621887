"""The formulas agree with the schedulers of diffusers."""

import pytest
import torch
from diffusers import DDIMScheduler

from lora_distill import diffusion

PREDICTION_TYPES = ["epsilon", "v_prediction"]
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def scheduler_of(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )


@pytest.fixture
def scheduler():
    return scheduler_of("epsilon")


@pytest.fixture
def pair():
    """x0 and eps, one row a timestep."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, len(TIMESTEPS), 4, 8, 8, generator=generator)


@pytest.fixture
def levels(scheduler):
    return diffusion.alpha_sigma(scheduler.alphas_cumprod, TIMESTEPS)


def test_alpha_and_sigma_are_one_number_a_row_and_their_squares_sum_to_one(levels):
    alpha, sigma = levels
    assert alpha.shape == sigma.shape == (len(TIMESTEPS), 1, 1, 1)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6)


def test_add_noise_is_that_of_ddim(scheduler, pair, levels):
    x0, eps = pair
    expected = scheduler.add_noise(x0, eps, TIMESTEPS)
    assert torch.allclose(diffusion.add_noise(x0, eps, *levels), expected, atol=1e-6)


def test_the_target_of_v_prediction_is_the_velocity_of_ddim(scheduler, pair, levels):
    x0, eps = pair
    expected = scheduler.get_velocity(x0, eps, TIMESTEPS)
    assert torch.allclose(diffusion.target_output(x0, eps, *levels, "v_prediction"), expected, atol=1e-6)


def test_the_target_of_epsilon_is_the_noise(pair, levels):
    x0, eps = pair
    assert torch.equal(diffusion.target_output(x0, eps, *levels, "epsilon"), eps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_right_output_leads_back_to_x0_and_eps(pair, levels, prediction_type):
    x0, eps = pair.double()
    levels = [level.double() for level in levels]
    levels[1] = (1 - levels[0] ** 2).sqrt()
    x_t = diffusion.add_noise(x0, eps, *levels)
    output = diffusion.target_output(x0, eps, *levels, prediction_type)
    assert torch.allclose(diffusion.to_x0(output, x_t, *levels, prediction_type), x0, atol=1e-9)
    assert torch.allclose(diffusion.to_eps(output, x_t, *levels, prediction_type), eps, atol=1e-9)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [4, 25])
def test_a_ddim_step_is_that_of_diffusers_at_every_timestep(pair, prediction_type, steps):
    scheduler = scheduler_of(prediction_type)
    scheduler.set_timesteps(steps)
    output, x_t = pair
    for t in scheduler.timesteps:
        before = int(t) - 1000 // steps
        alpha_bars = [scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[before]]
        if before < 0:
            alpha_bars[1] = scheduler.final_alpha_cumprod
        (alpha, sigma), (alpha_next, sigma_next) = [(a.sqrt(), (1 - a).sqrt()) for a in alpha_bars]
        x0 = diffusion.to_x0(output, x_t, alpha, sigma, prediction_type)
        eps = diffusion.to_eps(output, x_t, alpha, sigma, prediction_type)
        expected = scheduler.step(output, t, x_t)
        assert torch.allclose(x0, expected.pred_original_sample, atol=1e-5)
        assert torch.allclose(diffusion.ddim_step(x0, eps, alpha_next, sigma_next), expected.prev_sample, atol=1e-5)


def test_guidance_of_scale_one_is_none_and_of_scale_zero_is_unconditional(pair):
    uncond, cond = pair
    assert torch.allclose(diffusion.guide(uncond, cond, 1.0), cond, atol=1e-6)
    assert torch.equal(diffusion.guide(uncond, cond, 0.0), uncond)


def test_guidance_extrapolates_from_uncond_through_cond():
    assert diffusion.guide(torch.tensor(1.0), torch.tensor(3.0), 7.5) == 16.0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
def test_guiding_v_is_guiding_eps_and_guiding_x0(pair, levels, guidance_scale):
    x_t = torch.full_like(pair[0], 0.5)
    of_v = diffusion.guide(*pair, guidance_scale)
    for convert in (diffusion.to_eps, diffusion.to_x0):
        halves = [convert(v, x_t, *levels, "v_prediction") for v in pair]
        assert torch.allclose(
            convert(of_v, x_t, *levels, "v_prediction"), diffusion.guide(*halves, guidance_scale), atol=1e-4
        )


def test_the_squared_error_of_half_precision_is_taken_in_float32():
    prediction, target = torch.full((4,), 300.0, dtype=torch.float16), torch.zeros(4, dtype=torch.float16)
    error = diffusion.mean_squared_error(prediction, target)
    assert error.dtype == torch.float32 and error == 90_000.0, "more than float16 can hold"
