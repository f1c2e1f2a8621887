"""Operations: the published cost of a UNet evaluation, and how schemes and samplers multiply it."""

import pytest

from lora_distill.memory.flops import decoder_flops, step_flops
from lora_distill.memory.schemes import INFERENCE, TRAINING, Setup
from lora_distill.shapes import SD15_VAE, unet_config

BUNDLE, SD15 = unet_config("bundled"), unet_config("sd15-shape")


def test_one_evaluation_of_the_unet_of_sd15():
    assert step_flops(INFERENCE["one_pass_merged"], Setup(), SD15) == pytest.approx(0.803e12, rel=0.01)


def test_decoding_costs_three_evaluations():
    assert decoder_flops(SD15_VAE, 512) == pytest.approx(2.515e12, rel=0.01)


def test_guidance_costs_two_passes_in_either_form():
    one, batched, sequential = (
        step_flops(INFERENCE[name], Setup(resolution=64), BUNDLE)
        for name in ("one_pass_merged", "guided_batched", "guided_sequential")
    )
    assert batched == sequential == 2 * one


def test_operations_grow_with_the_batch_alone():
    one, four = (step_flops(INFERENCE["few_step"], Setup(batch, 64), BUNDLE) for batch in (1, 4))
    assert four == 4 * one


def test_sharing_w0_costs_no_operations():
    shared, separate = (
        step_flops(TRAINING[f"lora_distillation_{kind}"], Setup(resolution=64), BUNDLE)
        for kind in ("shared", "separate")
    )
    assert shared == separate
