"""Precisions of a training: each gives what float32 gives, resumes to the bit and leaves nothing behind."""

import weakref
from dataclasses import replace

import pytest
import torch
from conftest import small_unet
from diffusers import DDIMScheduler
from torch import nn

from lora_distill.adapters import add_adapter
from lora_distill.data.encoded import consistency_batches
from lora_distill.errors import RunError
from lora_distill.storage import load_tensors
from lora_distill.train.checkpoint import CHECKPOINT, RESULT
from lora_distill.train.loop import train
from lora_distill.train.objectives import ConsistencyDistillation, GuidanceDistillation
from lora_distill.train.step import Schedule

PLAN = Schedule(steps=6, batch_size=2, learning_rate=1e-3, log_every=1, checkpoint_every=4)
# dtype of W0, of what is trained, autocast
PRECISIONS = {
    "bf16": (torch.bfloat16, torch.bfloat16, "no"),
    "fp16": (torch.float16, torch.float16, "no"),
    "bf16 autocast": (torch.float32, torch.float32, "bf16"),
    "fp16 autocast": (torch.float32, torch.float32, "fp16"),
    "fp16 autocast on fp16": (torch.float16, torch.float32, "fp16"),
}
FULL = list(PRECISIONS)  # W0 is trained, in its own dtype


def draw(step, batch_size, generator):
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "eps": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator),
        "prompt_embeds": torch.randn(batch_size, 5, 8, generator=generator),
    }


def student(w0, trained, full):
    """A UNet in the dtype of W0 and what is trained of it: all weights, or an adapter."""
    unet = small_unet().to(w0)
    return unet, (list(unet.requires_grad_(True).parameters()) if full else add_adapter(
        unet, "student", rank=2, alpha=2, targets="all", dtype=trained))  # fmt: skip


def distilled(w0, trained, autocast, folder, full=False, plan=PLAN, draw_batch=draw):
    unet, parameters = student(w0, trained, full)
    teacher = small_unet().to(w0) if full else unet
    objective = GuidanceDistillation(unet, teacher, DDIMScheduler(), 3.0, torch.zeros(1, 5, 8))
    before = [p.detach().float().clone() for p in parameters]
    log = train(objective, draw_batch, replace(plan, mixed_precision=autocast), folder)
    if not full:  # B starts at zero: 16 bits hold its way from there
        parameters, before = parameters[1::2], before[1::2]
    return log, [p.detach().float() for p in parameters], before


def is_near(found, expected, before, share):
    """Whether weights moved as those of float32 did, within a share of the way that those went."""
    away = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    way = torch.stack([(a - b).norm() for a, b in zip(expected, before, strict=True)]).norm()
    return away < share * way


@pytest.mark.parametrize(("full", "precision"), [(False, name) for name in PRECISIONS] + [(True, n) for n in FULL])
def test_a_training_in_16_bits_is_near_that_in_float32(tmp_path, full, precision):
    log, weights, _ = distilled(*PRECISIONS[precision], tmp_path / "16", full)
    expected_log, expected, before = distilled(torch.float32, torch.float32, "no", tmp_path / "32", full)
    coarse = "bf16" in precision  # 8 bits of a number, where fp16 has 11
    expected_losses = pytest.approx([row["loss"] for row in expected_log], rel=0.1 if coarse else 0.02)
    assert [row["loss"] for row in log] == expected_losses
    assert is_near(weights, expected, before, share=0.5 if coarse else 0.25)


class Small(nn.Module):
    """A gradient of 2e-8: in fp16 it is zero unless the loss is scaled."""

    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, batch):
        return (2e-8 * self.weight.float()).sum() * batch["x"].mean(), {}


def ones(step, batch_size, generator):
    return {"x": torch.ones(batch_size)}


def test_a_gradient_that_fp16_cannot_hold_is_learned_from(tmp_path):
    objective = Small()
    train(objective, ones, replace(PLAN, learning_rate=1e-2), tmp_path)
    assert objective.weight.max() < 0.99


class Huge(nn.Module):
    """A loss whose scaled gradient overflows fp16 for the first updates."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 100.0, dtype=torch.float16))

    def forward(self, batch):
        return self.weight.square().float().mean() * batch["x"].mean(), {}


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_scale_of_the_loss_is_in_the_checkpoint(tmp_path, decay):
    """The scale is halved at each overflow; a resumed training goes on with the halved one, to the same bits."""
    plan = replace(PLAN, steps=12, ema_decay=decay, checkpoint_every=5, learning_rate=1.0)

    def cut(step, batch_size, generator):
        if step == 7:
            raise KeyboardInterrupt
        return ones(step, batch_size, generator)

    whole, resumed = Huge(), Huge()
    train(whole, ones, plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Huge(), cut, plan, tmp_path / "cut")
    assert '"scale": ' in load_tensors(tmp_path / "cut" / CHECKPOINT)[1]["scaler"]
    train(resumed, ones, plan, tmp_path / "cut")
    assert torch.equal(whole.weight, resumed.weight) and whole.weight.max() < 100


# ---------------------------------------------------------------------------------------------- consistency


def consistency(w0, trained, full=False):
    unet, parameters = student(w0, trained, full)
    teacher = small_unet().to(w0) if full else unet
    return ConsistencyDistillation(unet, teacher, DDIMScheduler(), torch.zeros(1, 5, 8)), parameters


draw_consistency = consistency_batches(draw, 1000, 20, 2.0, 5.0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("w0", "trained", "autocast"), PRECISIONS.values(), ids=PRECISIONS)
def test_the_target_runs_in_the_dtype_of_the_student(tmp_path, w0, trained, autocast, full):
    objective, _ = consistency(w0, trained, full)
    seen = set()
    objective.student.unet.register_forward_hook(lambda module, inputs, output: seen.add(output.sample.dtype))
    objective.student.unet.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    objective.student.unet.mid_block.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].dtype))
    train(objective, draw_consistency, replace(PLAN, steps=2, ema_decay=0.9, mixed_precision=autocast), tmp_path)
    lowered = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(autocast, w0)
    assert lowered in seen and seen <= {w0, lowered}
    assert {value.dtype for value in objective.moving_average.values()} == {w0 if full else trained}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16", "bf16 autocast"])
def test_a_resumed_consistency_training_with_a_moving_average_equals_an_uninterrupted_one(tmp_path, precision):
    w0, trained, autocast = PRECISIONS.get(precision, (torch.float32, torch.float32, "no"))
    plan = replace(PLAN, steps=5, ema_decay=0.9, checkpoint_every=2, mixed_precision=autocast)

    def cut(step, batch_size, generator):
        if step == 3:
            raise KeyboardInterrupt
        return draw_consistency(step, batch_size, generator)

    objective, whole = consistency(w0, trained)
    log = train(objective, draw_consistency, plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(consistency(w0, trained)[0], cut, plan, tmp_path / "cut")
    objective, resumed = consistency(w0, trained)
    again = train(objective, draw_consistency, plan, tmp_path / "cut")
    assert all(torch.equal(one, two) for one, two in zip(whole, resumed, strict=True))
    assert [row["loss"] for row in log] == [row["loss"] for row in again]


@pytest.mark.parametrize("timestep", [19, 999])
def test_a_batch_of_one_is_trained_at_the_first_and_at_the_last_grid_point(tmp_path, timestep):
    objective, parameters = consistency(torch.float32, torch.float32)

    def one(step, batch_size, generator):
        return draw_consistency(step, batch_size, generator) | {"timesteps": torch.tensor([timestep])}

    [row] = train(objective, one, replace(PLAN, steps=1, batch_size=1, ema_decay=0.9), tmp_path)
    assert row["loss"] > 0 and any(p.abs().max() > 0 for p in parameters[1::2])


# ---------------------------------------------------------------------------------------------- what stays out


@pytest.mark.parametrize("autocast", ["no", "bf16", "fp16"])
def test_nothing_of_a_training_is_alive_afterwards(tmp_path, autocast):
    """Without a garbage collection: no reference goes in a circle."""
    alive = []

    def run():
        objective, _ = consistency(torch.float32, torch.float32)
        alive.append(weakref.ref(objective))
        plan = replace(PLAN, steps=2, ema_decay=0.9, mixed_precision=autocast)
        train(objective, draw_consistency, plan, tmp_path)
        alive.extend(weakref.ref(tensor) for tensor in objective.moving_average.values())

    run()
    assert len(alive) > 10 and not [reference for reference in alive if reference() is not None]


def test_variables_of_the_shell_change_nothing(tmp_path, monkeypatch):
    expected = distilled(torch.float32, torch.float32, "no", tmp_path / "plain")[1]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    found = distilled(torch.float32, torch.float32, "no", tmp_path / "shell")[1]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 100), (100, 3), (100, 100)])
def test_a_training_that_diverges_stops_in_one_line_and_saves_nothing(tmp_path, log_every, checkpoint_every):
    plan = replace(PLAN, learning_rate=1e30, log_every=log_every, checkpoint_every=checkpoint_every)
    with pytest.raises(RunError, match=r"^training stopped at step \d: .*(nan|inf|not finite).*learning rate.*$"):
        distilled(torch.float32, torch.float32, "no", tmp_path, plan=plan)
    assert not (tmp_path / RESULT).exists() and not (tmp_path / CHECKPOINT).exists()
