"""What goes wrong in a training: numbers that are not finite, variables of the shell, files of something else."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_distill.errors import InputError, RunError
from lora_distill.storage import load_tensors, save_tensors
from lora_distill.train.checkpoint import CHECKPOINT, LOG, RESULT
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule
from lora_distill.writing import locked

PLAN = Schedule(steps=6, batch_size=2, learning_rate=0.1, log_every=100, checkpoint_every=100)
OFTEN = replace(PLAN, checkpoint_every=2)


class Distance(nn.Module):
    """Squared distance of a weight from a batch, times a frozen factor."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -3.0]))
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, batch):
        return self.factor * (self.weight - batch["target"]).square().mean(), {"bias": self.weight[1].detach()}


def draw(step, batch_size, generator):
    return {"target": torch.randn(batch_size, 2, generator=generator)}


def saved(folder):
    return sorted(path.name for path in folder.glob("*") if path.name != ".lock")


# ---------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 1e30},
        {"learning_rate": 9e35, "steps": 2},
        {"learning_rate": 1e30, "ema_decay": 0.9},
        {"learning_rate": 1e30, "gradient_accumulation": 3},
        {"weight_decay": 1e10, "steps": 40},
        {"weight_decay": 9e35},
    ],
    ids=str,
)
def test_a_training_that_diverges_stops_and_saves_nothing(tmp_path, changes):
    with pytest.raises(RunError, match=r"^training stopped at step \d+: [^\n]*lower learning rate[^\n]*$"):
        train(Distance(), draw, replace(PLAN, **changes), tmp_path)
    assert saved(tmp_path) == []


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "max_grad_norm", "ema_decay", "beta2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37])
def test_a_schedule_of_numbers_that_are_not_finite_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name}: expected a number below 1e.36, got "):
        replace(PLAN, **{name: value})


def test_no_checkpoint_is_kept_of_weights_that_are_not_finite(tmp_path):
    with pytest.raises(RunError, match="stopped at step 2"):
        train(Distance(), draw, replace(PLAN, learning_rate=1e30, checkpoint_every=1), tmp_path)
    assert saved(tmp_path) == [CHECKPOINT, LOG], "that of the first update, whose weights are large and finite"
    assert all(tensor.isfinite().all() for tensor in load_tensors(tmp_path / CHECKPOINT)[0].values())


def test_data_that_is_not_finite_is_named(tmp_path):
    def spoilt(step, batch_size, generator):
        batch = draw(step, batch_size, generator)
        return batch if step < 3 else {"target": batch["target"] * float("nan")}

    with pytest.raises(RunError, match=r"step 4: the loss is not finite; the data's target are not finite"):
        train(Distance(), spoilt, replace(PLAN, log_every=1), tmp_path)
    assert saved(tmp_path) == []


def test_a_batch_that_was_spoilt_between_two_lines_of_the_log_stops_the_training_too(tmp_path):
    def spoilt(step, batch_size, generator):
        return {"target": draw(step, batch_size, generator)["target"] + (float("inf") if step == 1 else 0)}

    with pytest.raises(RunError, match="stopped at step 2: the loss is not finite"):
        train(Distance(), spoilt, PLAN, tmp_path)
    assert saved(tmp_path) == []


def test_frozen_weights_that_are_not_finite_are_named(tmp_path):
    with pytest.raises(RunError, match=r"step 1: the loss is not finite; the frozen weights.*the first is factor"):
        train(Distance(float("nan")), draw, PLAN, tmp_path)
    assert saved(tmp_path) == []


def test_a_number_beside_the_loss_is_not_logged_when_it_is_not_finite(tmp_path):
    class Beside(Distance):
        def forward(self, batch):
            return super().forward(batch)[0], {"beside": torch.tensor(float("nan"))}

    with pytest.raises(RunError, match="stopped at step 1: beside is nan"):
        train(Beside(), draw, replace(PLAN, log_every=1), tmp_path)
    assert saved(tmp_path) == []


def test_a_measurement_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(RunError, match="stopped at step 0: the measured distance is nan"):
        train(Distance(), draw, PLAN, tmp_path, milestones=(2, lambda step: {"distance": float("nan")}, "key"))


def test_gradients_that_are_not_finite_where_the_loss_is_stop_the_training(tmp_path):
    class Root(Distance):
        def forward(self, batch):
            return (self.weight * 0).square().sum().sqrt() + self.weight.mean() * 0, {}  # sqrt has no slope at 0

    with pytest.raises(RunError, match=r"stopped at step \d"):
        train(Root(), draw, PLAN, tmp_path)
    assert saved(tmp_path) == []


class Overflow(nn.Module):
    """A loss that is finite and whose gradient in float16 is not."""

    def __init__(self, slope: float):
        super().__init__()
        self.weight, self.slope = nn.Parameter(torch.full((2,), 0.1, dtype=torch.float16)), slope

    def forward(self, batch):
        return self.weight.float().mean() + self.slope * (self.weight - self.weight.detach()).float().mean(), {}


@pytest.mark.parametrize("steps", [21, 40, 200])
def test_float16_that_overflows_at_every_step_is_no_training(tmp_path, steps):
    with pytest.raises(RunError, match="overflow float16"):
        train(Overflow(1e30), draw, replace(PLAN, steps=steps, checkpoint_every=30), tmp_path)
    assert RESULT not in saved(tmp_path)


# ---------------------------------------------------------------------------------------------- the shell

SHELL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_DEBUG_MODE": "1", "ACCELERATE_SPLIT_BATCHES": "true",
    "ACCELERATE_TORCH_DEVICE": "meta", "ACCELERATE_DOWNCAST_BF16": "1", "ACCELERATE_USE_SAGEMAKER": "true",
    "GRADIENT_ACCUMULATION_STEPS": "4", "MIXED_PRECISION": "bf16", "DYNAMO_BACKEND": "inductor", "USE_CPU": "1",
    "CUDA_VISIBLE_DEVICES": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "PMI_SIZE": "4",
    "OMPI_COMM_WORLD_SIZE": "4", "ACCELERATE_CONFIG_FILE": "/nowhere.yaml", "ACCELERATE_LOG_LEVEL": "debug",
}  # fmt: skip


def test_no_variable_of_the_shell_changes_a_training(tmp_path, monkeypatch):
    plain, shell = Distance(), Distance()
    train(plain, draw, PLAN, tmp_path / "plain")
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    train(shell, draw, PLAN, tmp_path / "shell")
    assert torch.equal(plain.weight, shell.weight)
    assert {name: os.environ[name] for name in SHELL} == SHELL, "and they are as they were found"


# ---------------------------------------------------------------------------------------------- files and locks


def stopped(folder, plan=OFTEN):
    def three(step, batch_size, generator):
        if step == 3:
            raise KeyboardInterrupt
        return draw(step, batch_size, generator)

    with pytest.raises(KeyboardInterrupt):
        train(Distance(), three, plan, folder)


def made(file, folder, plan=OFTEN):
    stopped(folder, plan) if file == CHECKPOINT else train(Distance(), draw, plan, folder)
    return folder / file


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
def test_the_message_of_another_schedule_names_both_values(tmp_path, file):
    made(file, tmp_path)
    plan = replace(PLAN, checkpoint_every=2, learning_rate=0.25, mixed_precision="bf16")
    both = "learning_rate 0.1, asked 0.25, mixed_precision 'no', asked 'bf16'"
    with pytest.raises(InputError, match=rf"{file} was made with other settings \({both}\); delete it"):
        train(Distance(), draw, plan, tmp_path)


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
@pytest.mark.parametrize("metadata", [{}, {"schedule": "no json"}, {"measured": "null"}, {"schedule": "1"}])
def test_a_sealed_file_of_something_else_is_refused_by_name(tmp_path, file, metadata):
    save_tensors(tmp_path / file, {"a": torch.ones(1)}, metadata)
    with pytest.raises(InputError, match=rf"{tmp_path / file}: not of a training; delete it"):
        train(Distance(), draw, PLAN, tmp_path)


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
@pytest.mark.parametrize("shape", [(1,), (3,), None])
def test_a_file_of_another_model_is_refused_and_nothing_is_spread_over_the_weights(tmp_path, file, shape):
    tensors, metadata = load_tensors(made(file, tmp_path))
    name = "parameter.weight" if file == CHECKPOINT else "weight"
    other = {key: value for key, value in tensors.items() if key != name}
    save_tensors(tmp_path / file, other if shape is None else other | {name: torch.zeros(shape)}, metadata)
    plan = replace(PLAN, checkpoint_every=2)
    with pytest.raises(InputError, match=rf"{tmp_path / file} was made for another model: {name} .*expected \(2,\)"):
        train(Distance(), draw, plan, tmp_path)


@pytest.mark.parametrize("file", [CHECKPOINT, RESULT])
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path, file):
    (tmp_path / file).mkdir()
    with pytest.raises(InputError, match=rf"^{tmp_path / file}: [^\n]*$"):
        train(Distance(), draw, PLAN, tmp_path)


def test_a_result_is_read_without_a_lock_and_where_nothing_can_be_written(tmp_path):
    line = Distance()
    log = train(line, draw, PLAN, tmp_path)
    again = Distance()
    with locked(tmp_path):
        assert train(again, draw, PLAN, tmp_path) == log and torch.equal(again.weight, line.weight)


def test_two_trainings_of_one_folder_do_not_mix(tmp_path):
    with locked(tmp_path), pytest.raises(RunError, match=f"{tmp_path}: another process writes there"):
        train(Distance(), draw, PLAN, tmp_path)
    train(Distance(), draw, PLAN, tmp_path)


def test_a_kill_frees_the_lock_and_what_it_left_is_swept(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom lora_distill.writing import locked, whole_file\n"
        "folder = Path(sys.argv[1])\n"
        "with locked(folder), whole_file(folder / 'checkpoint.safetensors') as path:\n"
        "    path.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == -9 and any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    train(Distance(), draw, PLAN, tmp_path)
    assert saved(tmp_path) == [LOG, RESULT]


def test_many_updates_that_were_left_out_are_said(tmp_path):
    """A slope of 2**26 needs a scale of 2**-10 or less, which is reached after 26 halvings from 2**16."""
    with pytest.warns(UserWarning, match=r"2\d of 30 updates were left out, for their gradients overflow float16"):
        train(Overflow(2.0**26), draw, replace(PLAN, steps=30), tmp_path)
