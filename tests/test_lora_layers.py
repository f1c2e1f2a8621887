"""Our LoRA layers give what PEFT's give: outputs, gradients, and every switch."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear
from torch import nn

from lora_distill.adapters import adapter_parameters, add_adapter, folded, lora_layers, merged_copy, role
from lora_distill.lora_layers import LeanConv2d, LeanLinear
from lora_distill.pipeline import load_pipeline


@pytest.fixture(scope="module")
def bundled():
    return load_pipeline("bundled").unet


@pytest.fixture
def unet(bundled):
    """A UNet with a trained-like adapter on all layers."""
    unet = copy.deepcopy(bundled)
    add_adapter(unet, "one", rank=3, alpha=6, targets="all")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapter_parameters(unet, "one"):
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return unet


def inputs(unet, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    side, dim = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.randn(2, 4, side, side, generator=generator).to(memory_format=layout)
    return x, torch.tensor([10, 700]), torch.randn(2, 5, dim, generator=generator)


def as_pefts(unet):
    """The same UNet with PEFT's own layers."""
    other = copy.deepcopy(unet)
    for layer in lora_layers(other):
        layer.__class__ = Linear if isinstance(layer, LeanLinear) else Conv2d
    return other


def gradients(unet, layout=torch.contiguous_format):
    output = unet(*inputs(unet, layout)).sample
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in adapter_parameters(unet, "one"))]


def test_every_layer_of_an_adapter_is_ours(unet):
    assert {type(layer) for layer in lora_layers(unet)} == {LeanLinear, LeanConv2d}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows first", "channels last"])
def test_outputs_and_gradients_are_those_of_pefts_layers(unet, layout):
    unet.to(memory_format=layout)
    for ours, theirs in zip(gradients(unet, layout), gradients(as_pefts(unet), layout), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_output_is_pefts_to_the_bit(unet):
    with torch.no_grad():
        assert torch.equal(unet(*inputs(unet)).sample, as_pefts(unet)(*inputs(unet)).sample)


def test_folded_layers_give_the_output_of_the_merged_unet(unet):
    merged = merged_copy(unet, "one")
    with torch.no_grad(), folded(unet):
        ours = unet(*inputs(unet)).sample
    with torch.no_grad():
        torch.testing.assert_close(ours, merged(*inputs(unet)).sample, rtol=0, atol=1e-5)
    assert not any(layer.folded for layer in lora_layers(unet))


def test_folded_layers_in_the_teachers_role_are_w0(unet, bundled):
    with torch.no_grad(), role(unet, None), folded(unet):
        assert torch.equal(unet(*inputs(unet)).sample, bundled(*inputs(unet)).sample)


def test_under_autocast_nothing_is_folded_for_the_sum_would_have_16_bits(unet):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = unet(*inputs(unet)).sample
        with folded(unet):
            assert torch.equal(unet(*inputs(unet)).sample, expected)


def test_in_16_bits_nothing_is_folded(unet):
    unet.to(torch.bfloat16)
    x, t, embeds = inputs(unet)
    with torch.no_grad():
        expected = unet(x.bfloat16(), t, embeds.bfloat16()).sample
        with folded(unet):
            assert torch.equal(unet(x.bfloat16(), t, embeds.bfloat16()).sample, expected)


@pytest.mark.parametrize("switch", ["two adapters", "disabled", "merged", "dropout"])
def test_whatever_else_pefts_layers_do_is_theirs(switch):
    torch.manual_seed(0)
    ours = LeanLinear(nn.Linear(6, 4), "one", config=LoraConfig(r=2, init_lora_weights=False), r=2)
    if switch == "two adapters":
        ours.update_layer("two", 2, lora_alpha=4, config=LoraConfig(r=2, init_lora_weights=False))
        ours.set_adapter(["one", "two"])
    elif switch == "disabled":
        ours.enable_adapters(False)
    elif switch == "merged":
        ours.merge()
    else:
        ours.lora_dropout["one"] = nn.Dropout(0.5)
    theirs = copy.deepcopy(ours)
    theirs.__class__ = Linear
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    expected = theirs(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), expected)
