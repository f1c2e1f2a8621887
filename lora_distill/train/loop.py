"""The training loop: one for every objective; a resumed training equals an uninterrupted one, bit for bit.

All random numbers of batch i come from a generator seeded with (seed, i, process). So a resumed training samples the
same batches and noise, and a checkpoint needs no state of a generator.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill.storage import DamagedFileError, atomic_write, load_tensors, resident_peak_mb, save_tensors
from lora_distill.train.optimizer import MasterAdamW

CHECKPOINT = "checkpoint.safetensors"  # of an unfinished training
RESULT = "result.safetensors"  # of a finished one
LOG = "log.jsonl"
Milestones = tuple[int, Callable[..., dict], str]  # every so many updates, what is measured, and a key of it


@dataclass(frozen=True)
class Schedule:
    """The hyperparameters of a training; one step is one optimiser update."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 0
    final_learning_rate: float = 0.0  # a fraction of learning_rate, reached by the cosine after the last step
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema_decay: float = 0.0  # 0 is off
    mixed_precision: str = "no"
    log_every: int = 10
    checkpoint_every: int = 500

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to `final_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """The generator, on the CPU, of all random numbers of one batch; `step` is the number of the batch."""
    mixed = np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def train(
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    milestones: Milestones | None = None,
    title: str = "training",
) -> list[dict]:
    """Minimise `objective(batch) -> (loss, scalars)` over its trainable parameters; return the rows of the log.

    `draw_batch(step, batch_size, generator)` samples a batch. With `milestones = (n, measure, key)` the dict
    `measure(step)` is added to the log before the first step, after every n-th and after the last; `key` names all that
    it depends on.

    The trained parameters and the log are written to `folder`/result.safetensors. If that file exists, it is loaded and
    nothing is trained; else training goes on from the checkpoint in `folder`, if any. A damaged file is ignored with a
    warning, one with other milestones than those asked for silently. Raises ValueError for one of another schedule.
    """
    step = TrainingStep(objective, schedule, device)
    every, measure, measured = milestones or (0, None, None)
    result = _Result(step.parameters, schedule, measured, folder)
    if (log := result.restore()) is not None:
        return log
    masters, adamw, main = step.masters, step.adamw, step.accelerator.is_main_process
    decay = schedule.ema_decay
    ema = EMAModel(masters.values(), decay=decay, use_ema_warmup=True, power=0.75) if decay else None
    state = _State(masters, adamw, ema, step.accelerator.scaler, schedule, measured, folder)
    first_step, log = state.restore()
    adamw.publish()
    if ema:  # consistency distillation takes its target from the moving average
        objective.moving_average = dict(zip(step.parameters, ema.shadow_params, strict=True))

    progress = tqdm(total=schedule.steps, initial=first_step, desc=title, mininterval=2, file=sys.stdout, ncols=100)
    if every and first_step == 0:
        log.append({"step": 0, **measure(0)})
    clock, images = time.perf_counter(), 0
    for update in range(first_step, schedule.steps):
        adamw.param_groups[0]["lr"] = schedule.learning_rate_at(update)
        for part in range(schedule.gradient_accumulation):
            number = update * schedule.gradient_accumulation + part
            generator = step_generator(schedule.seed, number, step.accelerator.process_index)
            loss, scalars = step(draw_batch(update, schedule.batch_size, generator))
            images += schedule.batch_size * step.accelerator.num_processes
        if ema:
            ema.step(masters.values())
        progress.update()

        done = update + 1
        if done % schedule.log_every == 0 or done == schedule.steps:
            row = {"step": done, "loss": loss.item(), **{name: value.item() for name, value in scalars.items()}}
            seconds = time.perf_counter() - clock
            row |= {"learning_rate": schedule.learning_rate_at(update), "images_per_s": round(images / seconds, 2)}
            row |= {"peak_memory_mb": peak_memory_mb(step.accelerator.device)}
            clock, images = time.perf_counter(), 0
            log.append(row)
            progress.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s", refresh=False)
        if every and (done % every == 0 or done == schedule.steps):
            log.append({"step": done, **_at_average(measure, done, ema, adamw)})
            clock, images = time.perf_counter(), 0
        if main and done % schedule.checkpoint_every == 0 and done < schedule.steps:
            state.save(done, log)
    progress.close()
    if ema:
        ema.copy_to(adamw.masters)
        adamw.publish()
    if main:
        result.save(log)
    return log


class TrainingStep:
    """The training step of one batch: forward, backward and, for the last batch of an update, clipping and AdamW."""

    def __init__(self, objective: nn.Module, schedule: Schedule, device: str | torch.device = "cpu"):
        AcceleratorState._reset_state()  # else accelerate keeps the precision of the process's first training
        self.accelerator = Accelerator(
            mixed_precision=schedule.mixed_precision,
            gradient_accumulation_steps=schedule.gradient_accumulation,
            cpu=torch.device(device).type == "cpu",
        )
        self.max_grad_norm = schedule.max_grad_norm
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.adamw = MasterAdamW(
            self.parameters.values(),
            lr=schedule.learning_rate,
            betas=(0.9, schedule.beta2),
            weight_decay=schedule.weight_decay,
        )
        # float32 parameters are their own masters
        self.masters = dict(zip(self.parameters, self.adamw.masters, strict=True))
        # what lies on the device is not moved: tensors without values, as memory/ has them, cannot be
        away = any(t.device != self.accelerator.device for t in (*objective.parameters(), *objective.buffers()))
        self.model, self.optimizer = self.accelerator.prepare(objective, self.adamw, device_placement=[away, True])

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Do the step; return the loss of the batch and its scalars."""
        batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast():
                loss, scalars = self.model(batch)
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss, scalars


def _at_average(call: Callable[[int], dict], step: int, ema: EMAModel | None, adamw: MasterAdamW) -> dict:
    """`call(step)` with the weights that training would return now: those of the moving average, if there is one."""
    if ema is None:
        return call(step)
    ema.store(adamw.masters)
    ema.copy_to(adamw.masters)
    adamw.publish()
    try:
        return call(step)
    finally:
        ema.restore(adamw.masters)
        adamw.publish()


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of the process so far, in MB: allocated by PyTorch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return resident_peak_mb()


# ---------------------------------------------------------------------------------------------- files of a training


def _restored(path: Path, schedule: Schedule, measured: str | None) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and metadata of a file; None if it does not exist, lacks the milestones or, with a warning, is damaged.

    Raises ValueError for a file of another schedule.
    """
    if not path.exists():
        return None
    try:
        tensors, texts = load_tensors(path)
    except DamagedFileError as error:
        warnings.warn(f"{error}; training starts anew", stacklevel=4)
        return None
    metadata = {key: json.loads(text) for key, text in texts.items()}
    if metadata["schedule"] != repr(schedule):
        raise ValueError(f"{path} was made with other settings; delete it, or train into another folder")
    return (tensors, metadata) if measured in (None, metadata["measured"]) else None


@dataclass
class _Result:
    """The file of a finished training: parameters and log."""

    parameters: dict[str, nn.Parameter]
    schedule: Schedule
    measured: str | None  # the key of the milestones in the log
    folder: Path

    def save(self, log: list[dict]) -> None:
        """Write the result, then remove the checkpoint."""
        metadata = {"schedule": repr(self.schedule), "measured": self.measured, "log": log}
        texts = {key: json.dumps(value) for key, value in metadata.items()}
        save_tensors(self.folder / RESULT, self.parameters, texts)
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        _write_log(self.folder, log)

    @torch.no_grad()
    def restore(self) -> list[dict] | None:
        """Load the result into the parameters and return its log; None if there is no result."""
        if (found := _restored(self.folder / RESULT, self.schedule, self.measured)) is None:
            return None
        tensors, metadata = found
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
        (self.folder / CHECKPOINT).unlink(missing_ok=True)  # left if the process was killed between the two
        return metadata["log"]


@dataclass
class _State:
    """The checkpoint: all that a resumed training needs, in one safetensors file."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: EMAModel | None
    scaler: torch.amp.GradScaler | None  # of fp16 training
    schedule: Schedule
    measured: str | None
    folder: Path

    def save(self, step: int, log: list[dict]) -> None:
        tensors = {f"parameter.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        if self.ema:
            shadows = zip(self.parameters, self.ema.shadow_params, strict=True)
            tensors |= {f"ema.{name}": shadow for name, shadow in shadows}
        scaler = self.scaler.state_dict() if self.scaler else None
        metadata = {"step": step, "schedule": repr(self.schedule), "measured": self.measured, "log": log}
        texts = {key: json.dumps(value) for key, value in (metadata | {"scaler": scaler}).items()}
        save_tensors(self.folder / CHECKPOINT, tensors, texts)
        _write_log(self.folder, log)

    def restore(self) -> tuple[int, list[dict]]:
        """The number of steps done and the log so far: (0, []) without a checkpoint."""
        if (found := _restored(self.folder / CHECKPOINT, self.schedule, self.measured)) is None:
            return 0, []
        tensors, metadata = found
        self._load(tensors, metadata)
        return metadata["step"], metadata["log"]

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor], metadata: dict) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        if self.ema:
            self.ema.shadow_params = [tensors[f"ema.{name}"].to(p.device) for name, p in self.parameters.items()]
            self.ema.optimization_step = metadata["step"]
        if self.scaler:
            self.scaler.load_state_dict(metadata["scaler"])


def _write_log(folder: Path, log: list[dict]) -> None:
    atomic_write(folder / LOG, "".join(json.dumps(row) + "\n" for row in log))
