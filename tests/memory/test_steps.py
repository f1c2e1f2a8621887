"""What is simulated and measured is the training loop's step; its bytes and operations are those of real tensors."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_distill.memory.account import account
from lora_distill.memory.measure import Tracker, simulate, track
from lora_distill.memory.schemes import INFERENCE, TRAINING, Setup, find_scheme
from lora_distill.memory.steps import prepare
from lora_distill.shapes import unet_config
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule

BUNDLE, SD15 = unet_config("bundled"), unet_config("sd15-shape")
TRAINED = ["full_finetune", "lora_finetune", "lora_distillation_shared", "lcm_lora_shared"]  # each objective
SMALL = Setup(2, 64, precision="float32", optimizer="adamw-fused")  # the optimizer of the loop
PLAN = Schedule(steps=1, batch_size=2, learning_rate=1e-4)


def ready(scheme):
    """A scheme's step at the small setup and a batch, with random numbers for weights, A and B, latents and noise."""
    step = prepare(scheme, SMALL, BUNDLE, "cpu")
    batch = step.inputs(SMALL.batch) | {"timesteps": torch.tensor([100, 900])}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*(p for unet in step.unets for p in unet.parameters()), batch["latents"], batch["eps"]]:
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return step, batch


# ---------------------------------------------------------------------------------------------- the loop's step


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_changes_the_weights_as_the_training_loop_does(name, tmp_path):
    (step, batch), (looped, same_batch) = ready(TRAINING[name]), ready(TRAINING[name])
    before = [p.detach().clone() for p in step.training.parameters.values()]
    step.run(batch)
    train(looped.training.model, lambda *_: same_batch, PLAN, tmp_path)
    after, expected = step.training.parameters.values(), looped.training.parameters.values()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(after, expected, strict=True))
    assert any(not torch.equal(ours, old) for ours, old in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["lora_finetune", "lora_distillation_shared"])
def test_a_step_takes_the_memory_that_the_training_loop_takes(name, tmp_path):
    """Two updates by the loop: the first one makes AdamW's states."""
    with Tracker() as tracker:
        step = prepare(TRAINING[name], SMALL, BUNDLE, "cpu")
        objective, inputs = step.training.model, step.inputs
        del step
        gc.collect()  # its optimizer, for the loop makes its own
        tracker.reset()
        train(objective, lambda *_: inputs(SMALL.batch), replace(PLAN, steps=2), tmp_path)
    [ours] = track(TRAINING[name], SMALL, BUNDLE)
    assert ours.total == pytest.approx(sum(tracker.peak.values()), rel=1e-3)


# ---------------------------------------------------------------------------------------------- real tensors


@pytest.mark.parametrize("name", ["conventional_distillation", "lora_distillation_shared", "one_pass_unmerged"])
def test_simulation_is_what_real_tensors_take(name):
    """In float32, where the CPU runs the same kernels as are simulated."""
    [fake], [real] = (way(find_scheme(name), SMALL, BUNDLE) for way in (simulate, track))
    assert fake.total == pytest.approx(real.total, rel=0.01)
    assert fake.terms == pytest.approx(real.terms, rel=0.02, abs=1e5)
    assert fake.flops == real.flops


@pytest.mark.parametrize("name", ["full_finetune", "lora_distillation_shared"])
def test_fused_adamw_takes_no_temporaries_on_paper_simulated_and_in_real_tensors(name):
    """The foreach form holds square roots of all second moments while it updates."""
    fused, foreach = (Setup(1, 64, precision="float32", optimizer=kind) for kind in ("adamw-fused", "adamw"))
    [fake], [real] = (way(TRAINING[name], fused, BUNDLE) for way in (simulate, track))
    assert fake.total == pytest.approx(real.total, rel=0.01)
    assert sum(account(TRAINING[name], fused, BUNDLE).values()) == pytest.approx(fake.total, rel=0.05)
    assert fake.total <= simulate(TRAINING[name], foreach, BUNDLE)[0].total


def test_a_second_batch_is_simulated_as_if_it_were_the_first():
    _, second = simulate(TRAINING["lora_distillation_shared"], Setup(1, 64), BUNDLE, 1, 4)
    assert [second] == simulate(TRAINING["lora_distillation_shared"], Setup(4, 64), BUNDLE)


@pytest.mark.parametrize("setup", [Setup(1, 64, optimizer="adamw-8bit"), Setup(1, 64, quantised_base="nf4")])
def test_what_only_the_account_knows_is_not_simulated(setup):
    with pytest.raises(ValueError, match="settings of the account alone"):
        prepare(TRAINING["lcm_lora_shared"], setup, BUNDLE, "cpu")


# ---------------------------------------------------------------------------------------------- operations


def flops(name, setup, config=BUNDLE):
    return simulate(find_scheme(name), setup, config)[0].flops


def test_one_evaluation_of_the_unet_of_sd15_costs_as_published():
    assert flops("one_pass_merged", Setup(), SD15) == pytest.approx(0.803e12, rel=0.01)


def test_guidance_costs_two_passes_in_either_form():
    one, batched, sequential = (
        flops(name, Setup(resolution=64)) for name in ("one_pass_merged", "guided_batched", "guided_sequential")
    )
    assert batched == sequential == 2 * one


def test_operations_grow_with_the_batch_alone():
    one, four = simulate(INFERENCE["few_step"], Setup(resolution=64), BUNDLE, 1, 4)
    assert four.flops == 4 * one.flops


def test_sharing_w0_costs_no_operations():
    shared, separate = (flops(f"lora_distillation_{kind}", Setup(resolution=64)) for kind in ("shared", "separate"))
    assert shared == separate


def test_operations_are_those_that_torchs_counter_finds_in_plain_attention():
    step = prepare(TRAINING["full_finetune"], SMALL, BUNDLE, "cpu")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(SMALL.batch)
    assert flops("full_finetune", SMALL) == counter.get_total_flops()
