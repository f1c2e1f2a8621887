"""AdamW on float32 masters of 16-bit weights."""

import torch

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
