"""Guided distillation: the target by hand, and what learns from it."""

import pytest
import torch
from diffusers import DDIMScheduler

from lora_distill import diffusion
from lora_distill.adapters import add_adapter, plain_copy, role
from lora_distill.train.objectives import GuidanceDistillation

W = 7.5


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def batch(inputs):
    eps, timesteps, prompt_embeds = inputs
    latents = torch.randn(eps.shape, generator=torch.Generator().manual_seed(2))
    return {"latents": latents, "eps": eps, "timesteps": timesteps, "prompt_embeds": prompt_embeds}


def objective(student, teacher, scheduler, w=W):
    return GuidanceDistillation(student, teacher, scheduler, w, torch.full((1, 5, 8), 0.3))


def by_hand(unet, batch, scheduler, w=W):
    """x_t and the guided output, in two separate passes."""
    x_t = scheduler.add_noise(batch["latents"], batch["eps"], batch["timesteps"])
    with torch.no_grad():
        cond = unet(x_t, batch["timesteps"], batch["prompt_embeds"]).sample
        uncond = unet(x_t, batch["timesteps"], torch.full_like(batch["prompt_embeds"], 0.3)).sample
    return x_t, uncond + w * (cond - uncond), cond


def by_hand_teacher(unet, batch, scheduler, w):
    with role(unet, None):
        return by_hand(unet, batch, scheduler, w)


def test_the_loss_is_the_distance_from_one_pass_to_two(unet, batch, scheduler):
    _, target, cond = by_hand(unet, batch, scheduler)
    add_adapter(unet, "student", rank=2, alpha=2)  # B is zero: the student is still the conditional pass
    loss, _ = objective(unet, unet, scheduler)(batch)
    assert loss.item() == pytest.approx((cond - target).square().mean().item(), rel=1e-5)


def test_without_guidance_there_is_nothing_to_learn(unet, batch, scheduler):
    add_adapter(unet, "student", rank=2, alpha=2)
    assert objective(unet, unet, scheduler, w=1.0)(batch)[0] < 1e-10


def test_a_teacher_of_its_own_gives_the_same_loss_and_gradients(unet, batch, scheduler):
    teacher = plain_copy(unet)
    parameters = add_adapter(unet, "student", rank=2, alpha=2)
    torch.nn.init.constant_(parameters[1], 0.1)
    found = []
    for other in (unet, teacher):
        loss, _ = objective(unet, other, scheduler)(batch)
        loss.backward()
        found.append((loss.item(), parameters[1].grad.clone()))
        parameters[1].grad = None
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and torch.allclose(found[0][1], found[1][1], atol=1e-7)


def test_only_the_student_has_gradients(unet, batch, scheduler):
    parameters = add_adapter(unet, "student", rank=2, alpha=2)
    loss, _ = objective(unet, unet, scheduler)(batch)
    loss.backward()
    assert {id(p) for p in unet.parameters() if p.grad is not None} == {id(p) for p in parameters}


def test_the_teacher_is_asked_once_with_both_halves_and_before_the_student(unet, batch, scheduler):
    add_adapter(unet, "student", rank=2, alpha=2)
    passes = []
    unet.register_forward_hook(lambda module, inputs, output: passes.append((len(inputs[0]), torch.is_grad_enabled())))
    objective(unet, unet, scheduler)(batch)
    assert passes == [(4, False), (2, True)]


def test_the_student_can_learn_the_target(unet, batch, scheduler):
    parameters = add_adapter(unet, "student", rank=4, alpha=4, targets="all")
    distil = objective(unet, unet, scheduler, w=2.0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(60):
        loss, _ = distil(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    x_t, target, _ = by_hand_teacher(unet, batch, scheduler, w=2.0)
    with torch.no_grad():
        output = unet(x_t, batch["timesteps"], batch["prompt_embeds"]).sample
    assert diffusion.mean_squared_error(output, target) < 0.2 * losses[0]
