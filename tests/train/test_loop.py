"""The loop: what a step is, and that a killed run goes on to the bit."""

import math
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from lora_distill.storage import load_tensors
from lora_distill.train.checkpoint import CHECKPOINT, LOG, RESULT
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule, step_generator

PLAN = Schedule(
    steps=6, batch_size=4, learning_rate=0.05, warmup_steps=2, log_every=2, checkpoint_every=2, weight_decay=0.1
)


class Line(nn.Module):
    """y = a x + b by least squares."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.5]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, batch):
        error = self.weight[0] * batch["x"] + self.weight[1] - (3 * batch["x"] + 1)
        return error.square().mean(), {"bias": self.weight[1].detach()}


def draw(step, batch_size, generator):
    return {"x": torch.randn(batch_size, generator=generator)}


def trained(folder, plan=PLAN, **options):
    line = Line()
    return line, train(line, draw, plan, folder, **options)


def interrupted(folder, plan=PLAN):
    """A training that is stopped in its fifth update: the checkpoint of the fourth is there."""

    def draw_four(step, batch_size, generator):
        if step == 4:
            raise KeyboardInterrupt
        return draw(step, batch_size, generator)

    with pytest.raises(KeyboardInterrupt):
        train(Line(), draw_four, plan, folder)


# ---------------------------------------------------------------------------------------------- steps


def test_the_weights_are_those_of_a_plain_loop(tmp_path):
    line, _ = trained(tmp_path)
    plain = Line()
    optimizer = torch.optim.AdamW([plain.weight], lr=1.0, weight_decay=0.1)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = PLAN.learning_rate_at(step)
        loss, _ = plain(draw(step, 4, step_generator(0, step)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([plain.weight], 1.0)
        optimizer.step()
    assert torch.equal(line.weight, plain.weight) and line.frozen == 1


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    plan = Schedule(steps=110, batch_size=1, learning_rate=2.0, warmup_steps=10, final_learning_rate=0.1)
    assert [plan.learning_rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    halfway = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert [plan.learning_rate_at(step) for step in (10, 60, 110)] == pytest.approx([2.0, halfway, 0.2])


def test_accumulated_parts_are_one_update(tmp_path):
    """Two parts of four are the update of their eight rows, as the loss is a mean over equal parts."""
    plan = Schedule(steps=1, batch_size=4, learning_rate=0.05, gradient_accumulation=2, log_every=1)
    line, _ = trained(tmp_path, plan)
    plain = Line()
    rows = torch.cat([draw(0, 4, step_generator(0, part))["x"] for part in range(2)])
    plain({"x": rows})[0].backward()
    nn.utils.clip_grad_norm_([plain.weight], 1.0)
    torch.optim.AdamW([plain.weight], lr=0.05, weight_decay=0).step()
    assert torch.allclose(line.weight, plain.weight, atol=1e-6)


def test_the_moving_average_is_what_remains(tmp_path):
    plain, _ = trained(tmp_path / "plain")
    averaged, _ = trained(tmp_path / "ema", Schedule(**{**vars(PLAN), "ema_decay": 0.9}))
    start = Line().weight
    assert (averaged.weight[0] - start[0]).abs() < (plain.weight[0] - start[0]).abs()
    kept = load_tensors(tmp_path / "ema" / RESULT)[0]
    assert kept.keys() == {"weight"} and torch.equal(kept["weight"], averaged.weight)


def test_a_checkpoint_has_a_moving_average_only_where_one_is_kept(tmp_path):
    for decay, names in ((0.0, set()), (0.9, {"ema.weight"})):
        interrupted(tmp_path / str(decay), Schedule(**{**vars(PLAN), "ema_decay": decay}))
        tensors = load_tensors(tmp_path / str(decay) / CHECKPOINT)[0]
        assert {name for name in tensors if name.startswith("ema.")} == names


def test_batches_depend_on_seed_and_step_alone():
    assert torch.equal(draw(0, 4, step_generator(1, 7))["x"], draw(0, 4, step_generator(1, 7))["x"])
    first = [draw(0, 4, step_generator(*key))["x"][0].item() for key in ((1, 7), (1, 8), (2, 7))]
    assert len(set(first)) == 3


def test_the_log_says_what_happened(tmp_path):
    _, log = trained(tmp_path, milestones=(3, lambda step: {"seen": step}, "steps"))
    rows = [row for row in log if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row.keys() >= {"loss", "bias", "learning_rate", "images_per_s", "peak_memory_mb"} for row in rows)
    assert [row["seen"] for row in log if "seen" in row] == [0, 3, 6]
    assert len((tmp_path / LOG).read_text().splitlines()) == len(log)


# ---------------------------------------------------------------------------------------------- resuming

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from lora_distill.adapters import add_adapter
from lora_distill.train.objectives import GuidanceDistillation
from lora_distill.storage import save_tensors
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule
from conftest import small_unet
from diffusers import DDIMScheduler

torch.set_num_threads(1)
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
unet = small_unet()
parameters = add_adapter(unet, "student", rank=2, alpha=2)
objective = GuidanceDistillation(unet, unet, DDIMScheduler(), 3.0, torch.zeros(1, 5, 8))

def draw(step, batch_size, generator):
    time.sleep(pause)
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "eps": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator),
        "prompt_embeds": torch.randn(batch_size, 5, 8, generator=generator),
    }

plan = Schedule(8, 2, 1e-2, warmup_steps=2, gradient_accumulation=2, ema_decay=0.9, checkpoint_every=3, log_every=1)
train(objective, draw, plan, folder)
save_tensors(folder / "trained.safetensors", {str(i): p for i, p in enumerate(parameters)})
"""


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def start(folder, pause):
        command = [sys.executable, script, folder, str(pause)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = start(whole, 0), start(killed, 0.25)  # beside each other, as most of their time is that of imports
    deadline = time.monotonic() + 120
    while not (killed / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # somewhere behind the checkpoint
    runs[1].send_signal(signal.SIGKILL)
    assert runs[1].wait() == -signal.SIGKILL and not (killed / RESULT).exists()
    assert load_tensors(killed / CHECKPOINT)[1]["step"] in {"3", "6"}
    _, errors = start(killed, 0).communicate(timeout=120)
    assert (killed / "trained.safetensors").exists(), errors.decode()
    runs[0].communicate(timeout=120)
    one, two = (load_tensors(folder / "trained.safetensors")[0] for folder in (whole, killed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_read_back(tmp_path):
    line, log = trained(tmp_path)
    again, read = trained(tmp_path)
    assert torch.equal(again.weight, line.weight) and read == log


def test_a_finished_run_is_read_back_with_its_milestones_and_trained_again_for_others(tmp_path):
    line, log = trained(tmp_path, milestones=(3, lambda step: {"seen": step}, "steps"))
    _, read = trained(tmp_path, milestones=(3, lambda step: 1 / 0, "steps"))
    assert read == log == trained(tmp_path)[1], "whoever asks for no milestones takes those that are there"
    again, other = trained(tmp_path, milestones=(3, lambda step: {"other": step}, "others"))
    assert [row["other"] for row in other if "other" in row] == [0, 3, 6] and torch.equal(again.weight, line.weight)


def test_the_checkpoint_is_gone_when_the_result_is_there(tmp_path):
    interrupted(tmp_path)
    assert (tmp_path / CHECKPOINT).exists() and not (tmp_path / RESULT).exists()
    line, _ = trained(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists() and torch.equal(
        load_tensors(tmp_path / RESULT)[0]["weight"], line.weight
    )


def test_a_checkpoint_left_beside_a_result_is_removed(tmp_path):
    """As a kill leaves it between the writing of the one and the removal of the other."""
    interrupted(tmp_path)
    left = (tmp_path / CHECKPOINT).read_bytes()
    trained(tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(left)
    trained(tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
def test_a_damaged_file_is_refused_and_training_starts_anew(tmp_path, file):
    line, _ = trained(tmp_path / "whole")
    (interrupted if file == CHECKPOINT else trained)(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=f"{path}.*training starts anew"):
        again, log = trained(tmp_path)
    assert torch.equal(again.weight, line.weight) and log[0]["step"] == 2


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
def test_a_file_of_another_schedule_is_refused(tmp_path, file):
    (interrupted if file == CHECKPOINT else trained)(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path / file} was made with other settings"):
        trained(tmp_path, Schedule(**{**vars(PLAN), "learning_rate": 0.1}))
