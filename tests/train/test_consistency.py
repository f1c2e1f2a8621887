"""Consistency: the parameterisation of `LCMScheduler`, the distillation step by hand, few-step sampling as stock."""

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from lora_distill import diffusion
from lora_distill.adapters import add_adapter, plain_copy, role
from lora_distill.data.encoded import consistency_batches
from lora_distill.pipeline import BUNDLED, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators, unet_passes
from lora_distill.train.objectives import ConsistencyDistillation, ConsistencyFunction, ConsistencyMimicry, Denoising

PROMPTS = [
    "a lion at the upper left, a bus at the lower right, blue",
    "a crown at the top right, green",
]
TIMESTEPS = torch.tensor([0, 19, 259, 999])


@pytest.fixture
def bundle():
    return load_pipeline("bundled")


@pytest.fixture
def batch(bundle):
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(4, 4, 8, 8, generator=generator),
        "eps": torch.randn(4, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([19, 39, 499, 999]),
        "prompt_embeds": encode_prompts(bundle, PROMPTS * 2),
        "guidance_scale": torch.tensor([1.0, 2.0, 3.0, 5.0]),
    }


def with_w_embedding(unet, std=0.02):
    full = plain_copy(unet, time_cond_proj_dim=32)
    torch.nn.init.normal_(full.time_embedding.cond_proj.weight, std=std, generator=torch.Generator().manual_seed(1))
    return full


# ---------------------------------------------------------------------------------------------- formulas


def test_boundary_scalings_are_those_of_the_lcm_scheduler():
    scheduler = LCMScheduler()
    c_skip, c_out = diffusion.boundary_scalings(TIMESTEPS)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in TIMESTEPS]
    assert torch.allclose(torch.stack([c_skip.flatten(), c_out.flatten()], 1), torch.tensor(theirs), atol=1e-7)


def test_the_boundary_condition_holds_exactly(bundle):
    f = ConsistencyFunction(bundle.unet, bundle.scheduler)
    x = torch.randn(2, 4, 8, 8)
    embeds = encode_prompts(bundle, PROMPTS)
    with torch.no_grad():
        assert torch.equal(f(x, torch.tensor([0, 0]), embeds, torch.ones(2)), x)


def test_the_guidance_embedding_is_the_stock_pipelines(bundle):
    w = torch.tensor([1.0, 3.0, 7.5])
    theirs = bundle.get_guidance_scale_embedding(w - 1, embedding_dim=32)
    assert torch.allclose(diffusion.guidance_embedding(w, 32), theirs, atol=2e-4)


def test_the_kl_is_that_of_the_fitted_gaussians():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(64, 3, 8, 8, generator=generator) * s + m for s, m in ((0.5, 1.0), (2.0, -1.0)))
    per_channel = [
        torch.distributions.kl_divergence(*(torch.distributions.Normal(z[:, c].mean(), z[:, c].std()) for z in (p, q)))
        for c in range(3)
    ]
    assert diffusion.gaussian_kl(q, p) == pytest.approx(float(sum(per_channel) / 3), rel=1e-5)
    assert diffusion.gaussian_kl(p, p) == 0


def test_pseudo_huber_is_quadratic_below_c_and_linear_above():
    zero = torch.zeros(1)
    assert diffusion.pseudo_huber(torch.tensor([0.01]), zero, c=1.0) == pytest.approx(0.5e-4, rel=1e-2)
    assert diffusion.pseudo_huber(torch.tensor([100.0]), zero, c=1e-3) == pytest.approx(100, rel=1e-4)


# ---------------------------------------------------------------------------------------------- batches


def drawn(timesteps, w_min=2.0, w_max=5.0, skip=20):
    """One batch whose timesteps were drawn as given."""
    draw = consistency_batches(lambda *_: {"timesteps": timesteps}, 1000, skip, w_min, w_max)
    return draw(0, len(timesteps), torch.Generator().manual_seed(0))


def test_every_timestep_moves_up_to_the_grid_of_the_lcm_scheduler():
    scheduler = LCMScheduler()
    scheduler.set_timesteps(50)
    batch = drawn(torch.arange(1000))
    assert batch["timesteps"].unique().tolist() == sorted(scheduler.timesteps.tolist())
    assert torch.equal(batch["timesteps"].bincount()[19::20], torch.full((50,), 20)), "each as often"


def test_guidance_scales_fill_their_range():
    w = drawn(torch.zeros(1000, dtype=torch.long))["guidance_scale"]
    assert w.min() >= 2 and w.max() <= 5 and w.min() < 2.1 and w.max() > 4.9
    assert (drawn(torch.zeros(9, dtype=torch.long), 3.0, 3.0)["guidance_scale"] == 3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 30}, "ddim_skip: expected a divisor of the 1000 timesteps, got 30"),
        ({"w_min": 6.0}, "expected 1 <= w_min <= w_max, got 6 and 5"),
    ],
)
def test_what_cannot_be_drawn_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        drawn(torch.arange(4), **options)


# ---------------------------------------------------------------------------------------------- objectives


def test_the_solver_takes_the_ddim_step_of_diffusers(bundle, batch):
    objective = ConsistencyDistillation(bundle.unet, bundle.unet, bundle.scheduler, encode_prompts(bundle, [""]))
    x_t, w = batch["eps"][2:3], torch.tensor([3.0])
    t, s, embeds = torch.tensor([499]), torch.tensor([479]), batch["prompt_embeds"][2:3]
    ours = objective.ddim_solver(x_t, t, s, embeds, w)
    scheduler = DDIMScheduler.from_config(bundle.scheduler.config)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        uncond = bundle.unet(x_t, t, encode_prompts(bundle, [""])).sample
        cond = bundle.unet(x_t, t, embeds).sample
    theirs = scheduler.step(uncond + 3.0 * (cond - uncond), 499, x_t).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_loss_is_the_distance_to_the_target_at_the_earlier_timestep(bundle, batch):
    objective = ConsistencyDistillation(bundle.unet, bundle.unet, bundle.scheduler, encode_prompts(bundle, [""]))
    add_adapter(bundle.unet, "lcm_lora", rank=2, alpha=2)
    f = objective.student
    t, s, embeds, w = batch["timesteps"], batch["timesteps"] - 20, batch["prompt_embeds"], batch["guidance_scale"]
    s = s.clamp(min=0)
    alpha, sigma = diffusion.alpha_sigma(bundle.scheduler.alphas_cumprod, t)
    x_t = alpha * batch["latents"] + sigma * batch["eps"]
    x_s = objective.ddim_solver(x_t, t, s, embeds, w)
    with torch.no_grad():
        whole_target = f(x_s, s, embeds, w)  # the row at s = 0 is evaluated here, and must come out as x_s
        prediction = f(x_t, t, embeds, w)
    expected = diffusion.pseudo_huber(prediction, whole_target, 1e-3)
    assert float(objective(batch)[0].detach()) == pytest.approx(float(expected), abs=1e-6)


def test_the_target_is_the_moving_average_where_there_is_one(bundle, batch):
    objective = ConsistencyDistillation(bundle.unet, bundle.unet, bundle.scheduler, encode_prompts(bundle, [""]))
    add_adapter(bundle.unet, "lcm_lora", rank=2, alpha=2)
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(2)
    weights = dict(objective.named_parameters())
    objective.moving_average = {n: torch.randn(weights[n].shape, generator=generator) * 0.1 for n in names}
    inputs = (batch["eps"], batch["timesteps"], batch["prompt_embeds"], batch["guidance_scale"])
    averaged = objective.target(*inputs)
    with torch.no_grad():
        own = objective.student(*inputs)
        for name in names:
            weights[name].copy_(objective.moving_average[name])
        moved = objective.student(*inputs)
    assert torch.allclose(averaged, moved, atol=1e-5) and not torch.allclose(averaged, own, atol=1e-3)


def test_only_the_student_is_trained(bundle, batch):
    parameters = add_adapter(bundle.unet, "lcm_lora", rank=2, alpha=2)
    objective = ConsistencyDistillation(bundle.unet, bundle.unet, bundle.scheduler, encode_prompts(bundle, [""]))
    objective(batch)[0].backward()
    assert {id(p) for p in objective.parameters() if p.grad is not None} == {id(p) for p in parameters}


def test_everything_in_16_bits_is_near_what_it_is_in_32(bundle, batch):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        bundle.unet.to(dtype)
        objective = ConsistencyDistillation(bundle.unet, bundle.unet, bundle.scheduler, encode_prompts(bundle, [""]))
        parameters = add_adapter(bundle.unet, f"lora_{dtype.itemsize}", rank=2, alpha=2, dtype=dtype)
        loss, _ = objective(batch)
        loss.backward()
        assert all(p.grad.dtype == dtype for p in parameters)
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_student_that_is_the_lcm_has_nothing_to_mimic(bundle, batch):
    loss, scalars = ConsistencyMimicry(bundle.unet, bundle.unet, bundle.scheduler)(batch)
    assert loss == 0 and scalars["mse"] == 0 and scalars["kl"] == 0


def test_denoising_is_the_mse_to_the_noise_for_an_eps_network(bundle, batch):
    bundle.scheduler.register_to_config(prediction_type="epsilon")
    alpha, sigma = diffusion.alpha_sigma(bundle.scheduler.alphas_cumprod, batch["timesteps"])
    x_t = alpha * batch["latents"] + sigma * batch["eps"]
    with torch.no_grad():
        loss, _ = Denoising(bundle.unet, bundle.scheduler)(batch)
        output = bundle.unet(x_t, batch["timesteps"], batch["prompt_embeds"]).sample
    assert loss == pytest.approx(float((output - batch["eps"]).square().mean()), rel=1e-5)


# ---------------------------------------------------------------------------------------------- few-step sampling


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps_are_stock_lcm_image_for_image(bundle, steps):
    noise, generators = initial_noise(bundle, 2, seed=1), step_generators(2, seed=1)
    embeds, empty = encode_prompts(bundle, PROMPTS), encode_prompts(bundle, [""])
    ours = sample(bundle, Sampler(steps, scheduler="lcm"), noise, embeds, empty, generators)
    stock = StableDiffusionPipeline.from_pretrained(BUNDLED)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = stock(PROMPTS, latents=noise, generator=step_generators(2, seed=1), **options).images
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_full_lcm_takes_its_guidance_as_the_stock_pipeline_gives_it(bundle):
    noise = initial_noise(bundle, 2, seed=1)
    embeds, empty = encode_prompts(bundle, PROMPTS), encode_prompts(bundle, [""])
    bundle.unet = with_w_embedding(bundle.unet)
    sampler = Sampler(4, scheduler="lcm", embedded_guidance=3.0)
    ours = sample(bundle, sampler, noise, embeds, empty, step_generators(2, seed=1))
    bundle.scheduler = LCMScheduler.from_config(bundle.scheduler.config)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = bundle(PROMPTS, latents=noise, generator=step_generators(2, seed=1), **options).images
    assert (ours - theirs).abs().max() <= 1e-3 and unet_passes(bundle, sampler) == 4


def test_the_noise_of_the_steps_does_not_depend_on_the_batch(bundle):
    noise, embeds = initial_noise(bundle, 2, seed=1), encode_prompts(bundle, PROMPTS)
    empty, sampler = encode_prompts(bundle, [""]), Sampler(2, scheduler="lcm")
    both = sample(bundle, sampler, noise, embeds, empty, step_generators(2, seed=1))
    second = sample(bundle, sampler, noise[1:], embeds[1:], empty, step_generators(2, seed=1)[1:])
    assert torch.allclose(both[1:], second, atol=1e-5)


def test_noise_at_the_steps_without_generators_is_refused(bundle):
    with pytest.raises(ValueError, match="one generator an image"):
        sample(bundle, Sampler(2, scheduler="lcm"), *[torch.zeros(1)] * 3)


def test_w_embedding_and_plain_unets_are_not_confused(bundle):
    embeds, noise = encode_prompts(bundle, PROMPTS), initial_noise(bundle, 2, seed=1)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        sample(bundle, Sampler(2, embedded_guidance=3.0), noise, embeds, encode_prompts(bundle, [""]))


def test_a_zero_w_embedding_starts_at_the_teacher(bundle):
    full = plain_copy(bundle.unet, time_cond_proj_dim=32)
    x, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor([19, 999]), encode_prompts(bundle, PROMPTS)
    with torch.no_grad(), role(bundle.unet, None):
        theirs = bundle.unet(x, t, embeds).sample
        ours = full(x, t, embeds, timestep_cond=diffusion.guidance_embedding(torch.tensor([3.0, 5.0]), 32)).sample
    assert torch.equal(ours, theirs)
