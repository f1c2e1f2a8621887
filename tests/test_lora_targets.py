"""What the two sets of LoRA targets cover, on Stable Diffusion 1.5 without its weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_distill.adapters import add_adapter


@pytest.fixture
def sd15():
    """The UNet of Stable Diffusion 1.5 as shapes alone."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def trained(unet, rank, targets):
    with torch.device("meta"):
        return sum(p.numel() for p in add_adapter(unet, "student", rank=rank, alpha=rank, targets=targets))


def test_the_unet_is_that_of_stable_diffusion(sd15):
    assert sum(p.numel() for p in sd15.parameters()) == 859_520_964


def test_rank_4_on_attention_trains_797_184_parameters(sd15):
    """The count of the LoRA training script of diffusers, 0.1 % of the UNet."""
    assert trained(sd15, 4, "attention") == 797_184


def test_attention_means_q_k_v_and_out_of_every_attention_layer(sd15):
    layers = sum(name.endswith(("attn1", "attn2")) for name, _ in sd15.named_modules())
    trained(sd15, 4, "attention")
    assert sum(isinstance(m, BaseTunerLayer) for m in sd15.modules()) == 4 * layers == 128


def test_a_covered_layer_has_rank_times_its_inputs_and_outputs_and_a_kernel_counts_as_inputs(sd15):
    count = trained(sd15, 64, "all")
    weights = [m.base_layer.weight for m in sd15.modules() if isinstance(m, BaseTunerLayer)]
    assert count == sum(64 * (w[0].numel() + len(w)) for w in weights) == 67_252_224


def test_all_leaves_out_the_outermost_layers_and_no_others(sd15):
    weighted = {name for name, m in sd15.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    trained(sd15, 1, "all")
    covered = {name for name, m in sd15.named_modules() if isinstance(m, BaseTunerLayer)}
    assert weighted - covered == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
