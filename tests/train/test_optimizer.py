"""AdamW on float32 masters of 16-bit weights."""

import torch
from torch import nn

from lora_distill.train.optimizer import MasterAdamW


def test_float32_masters_keep_updates_that_16_bits_would_lose():
    weight = torch.nn.Parameter(torch.full((4,), 100.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-2, weight_decay=0.0)
    for _ in range(100):  # a hundred times 0.01 is 1; one bfloat16 step at 100 is 0.5
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(weight.float(), torch.full((4,), 99.0), atol=0.3)


def test_masters_of_float32_weights_are_the_weights():
    weight = torch.nn.Parameter(torch.ones(4))
    assert MasterAdamW([weight], lr=1e-2).masters[0] is weight


def test_a_state_from_a_file_gets_the_weights_memory_layout_again():
    """Files keep no layout, and the fused kernel takes the memory of weight and moments as it lies."""
    weight = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    expected = nn.Parameter(weight.detach().clone())  # keeps the layout
    gradients = torch.randn(2, 8, 4, 3, 3)
    resumed, uninterrupted = MasterAdamW([weight], lr=1e-2, fused=True), MasterAdamW([expected], lr=1e-2, fused=True)
    for optimizer, parameter in ((resumed, weight), (uninterrupted, expected)):
        parameter.grad = gradients[0].to(memory_format=torch.channels_last)
        optimizer.step()
    kept = {name: value.contiguous() for name, value in resumed.kept(weight).items()}
    resumed.take_up(weight, kept)
    assert resumed.state[weight]["exp_avg"].stride() == weight.stride()
    for optimizer, parameter in ((resumed, weight), (uninterrupted, expected)):
        parameter.grad = gradients[1].to(memory_format=torch.channels_last)
        optimizer.step()
    assert torch.equal(weight, expected)
