"""Of the training loop: the weights of its moving average, its first update, and a precision of its own each run."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_distill.storage import load_tensors
from lora_distill.train.checkpoint import CHECKPOINT
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule

PLAN = Schedule(steps=6, batch_size=2, learning_rate=0.1, log_every=1)


class Distance(nn.Module):
    """Squared distance of a weight from a batch; notes the precision that a matrix product has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -3.0]))
        self.precisions = set()

    def forward(self, batch):
        self.precisions.add((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return (self.weight - batch["target"]).square().mean(), {}


def draw(step, batch_size, generator):
    return {"target": torch.randn(batch_size, 2, generator=generator)}


def weights_at_each_step(plan, folder):
    """The weights that a measurement sees before the first update and after every one, and those left behind."""
    objective, seen = Distance(), []
    look = lambda step: seen.append(objective.weight.detach().clone()) or {}  # noqa: E731
    train(objective, draw, plan, folder, milestones=(1, look, "weights"))
    return seen, objective.weight


def test_the_moving_average_is_that_of_its_closed_form(tmp_path):
    """EMA with the warm-up 1 - (1 + i)^(-3/4), from zero on, up to `ema_decay`; measurements see it too."""
    raw, _ = weights_at_each_step(PLAN, tmp_path / "raw")
    averaged, left = weights_at_each_step(replace(PLAN, ema_decay=0.6), tmp_path / "averaged")
    average = raw[0]
    for i, weight in enumerate(raw[1:]):
        decay = min(1 - (1 + i) ** -0.75, 0.6) if i else 0.0
        average = decay * average + (1 - decay) * weight
        assert torch.allclose(averaged[i + 1], average, atol=1e-6)
    assert torch.equal(left, averaged[-1]) and not torch.allclose(left, raw[-1], atol=1e-3)


def test_the_first_update_is_the_learning_rate_against_the_sign_of_the_gradient(tmp_path):
    objective = Distance()
    train(objective, draw, replace(PLAN, steps=1), tmp_path)
    assert torch.allclose(objective.weight, torch.tensor([1.9, -2.9]), atol=1e-5)


@pytest.mark.parametrize("first", ["no", "bf16"])
def test_a_run_has_its_own_precision_whatever_ran_before(tmp_path, first):
    found = []
    for precision in (first, "bf16" if first == "no" else "no"):
        objective = Distance()
        train(objective, draw, replace(PLAN, mixed_precision=precision), tmp_path / precision)
        assert objective.weight.dtype == torch.float32, "only forward passes are in half precision"
        found.append(objective.precisions)
    assert found == ([{torch.float32}, {torch.bfloat16}] if first == "no" else [{torch.bfloat16}, {torch.float32}])


class Sixteen(Distance):
    """The same with a weight of 16 bits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(self.weight.detach().bfloat16())


def test_16_bit_weights_follow_float32_masters(tmp_path):
    """With a learning rate so small that 16 bits alone would never move."""
    plan = replace(PLAN, steps=40, learning_rate=1e-3)
    objective, plain = Sixteen(), Distance()
    train(objective, draw, plan, tmp_path / "sixteen")
    train(plain, draw, plan, tmp_path / "plain")
    assert objective.weight.dtype == torch.bfloat16 and not torch.equal(objective.weight, Sixteen().weight)
    assert torch.allclose(objective.weight.float(), plain.weight, atol=0.02)


def test_masters_are_in_the_checkpoint(tmp_path):
    plan = replace(PLAN, learning_rate=1e-3, checkpoint_every=3)

    def draw_three(step, batch_size, generator):
        if step == 3:
            raise KeyboardInterrupt
        return draw(step, batch_size, generator)

    interrupted, whole = Sixteen(), Sixteen()
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, draw_three, plan, tmp_path)
    master = load_tensors(tmp_path / CHECKPOINT)[0]["parameter.weight"]
    assert master.dtype == torch.float32 and torch.equal(interrupted.weight, master.bfloat16())
    train(interrupted, draw, plan, tmp_path)
    train(whole, draw, plan, tmp_path / "whole")
    assert torch.equal(interrupted.weight, whole.weight)


def test_the_logged_learning_rates_are_those_of_the_schedule(tmp_path):
    plan = replace(PLAN, warmup_steps=3, final_learning_rate=0.5)
    log = train(Distance(), draw, plan, tmp_path)
    assert [row["learning_rate"] for row in log] == [plan.learning_rate_at(step) for step in range(6)]
