"""The training loop: one for every objective; a resumed training equals an uninterrupted one, bit for bit.

All random numbers of batch i come from a generator seeded with (seed, i). So a resumed training samples the same
batches and noise, and a checkpoint needs no state of a generator. Several processes sample the same batch and each
takes its rows: together they train what one process trains, up to rounding.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill import processes
from lora_distill.errors import RunError
from lora_distill.finite import not_finite
from lora_distill.storage import device_name, resident_peak_mb
from lora_distill.train.checkpoint import Checkpoint, Result, check_state
from lora_distill.train.step import Average, Schedule, TrainingStep, own_rows, step_generator
from lora_distill.writing import locked

LEAST_SCALE = 2.0**-14  # of a loss in float16; a smaller one makes all gradients zero
SCALING = 20  # updates that float16 may take to find its scale
BEYOND_HALF = "bfloat16 or float32 has the range that float16 lacks"
# every so many updates or after which of them, what is measured, and a key of it
Milestones = tuple[int | Sequence[int], Callable[..., dict], str]


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

    `draw_batch(step, batch_size, generator)` samples a batch: tensors with a row an image. With `milestones = (n,
    measure, key)` the dict `measure(step)` is added to the log before the first step, after every n-th and after the
    last; where n is a sequence, after its steps and the last. `key` names all that it depends on. Several processes
    each take their rows of the same batch; each calls `measure`, which may share work among them, and the main one's
    numbers and files are kept.

    The trained parameters and the log are written to `folder`/result.safetensors. If that file exists, it is loaded and
    nothing is trained; else training goes on from the checkpoint in `folder`, if any. A damaged file is ignored with a
    warning, one with other milestones than those asked for silently. Raises InputError for one of another schedule and
    for a batch that the processes cannot share evenly, RunError for a number that is not finite, when no update could
    be made, and while another process trains in `folder`; nothing is saved then.
    """
    step = TrainingStep(objective, schedule, device)
    result = Result(step.parameters, schedule, milestones[2] if milestones else None, folder)
    if (log := result.restore()) is None:
        with locked(folder):
            if (log := result.restore()) is None:  # another process may have trained meanwhile
                log = _trained(step, objective, draw_batch, schedule, folder, milestones, title)
                result.save(log)
    step.free()
    return log


def _trained(
    step: TrainingStep,
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    milestones: Milestones | None,
    title: str,
) -> list[dict]:
    """Train from the checkpoint, or from the start, to the end; the rows of the log."""
    looked_at, measure, measured = milestones or ((), None, None)
    if isinstance(looked_at, int):
        looked_at = range(0, schedule.steps, looked_at)
    average = Average(step, objective, schedule.ema_decay) if schedule.ema_decay else None
    state = Checkpoint(step, average, schedule, measured, folder)
    first_step, log = state.restore()
    step.adamw.publish()
    if average:
        average.hand_over()

    rows, main, watch = own_rows(schedule.batch_size), processes.is_main(), _Watch(step)
    options = {"desc": title, "mininterval": 2, "file": sys.stdout, "ncols": 100, "disable": not main}
    progress = tqdm(total=schedule.steps, initial=first_step, **options)
    if milestones and first_step == 0:
        log.append({"step": 0, **_measured(measure, 0, None)})
    clock, images, machine = time.perf_counter(), 0, device_name(str(step.device))
    for update in range(first_step, schedule.steps):
        step.adamw.param_groups[0]["lr"] = schedule.learning_rate_at(update)
        for part in range(schedule.gradient_accumulation):
            generator = step_generator(schedule.seed, update * schedule.gradient_accumulation + part)
            batch = draw_batch(update, schedule.batch_size, generator)
            batch = {name: tensor[rows] for name, tensor in batch.items()}
            loss, scalars = step(batch)
            watch.see(loss, update + 1)
            images += schedule.batch_size
        if average:
            average.step()
        progress.update()

        done = update + 1
        if done % schedule.log_every == 0 or done == schedule.steps:
            row = {"step": done, **step.over_processes({"loss": loss, **scalars})}
            watch.check_row(row, batch)
            seconds = time.perf_counter() - clock
            row |= {"learning_rate": schedule.learning_rate_at(update), "images_per_s": round(images / seconds, 2)}
            row |= {"peak_memory_mb": peak_memory_mb(step.device), "device": machine}
            clock, images = time.perf_counter(), 0
            log.append(processes.agree(row))
            progress.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s", refresh=False)
        if milestones and (done in looked_at or done == schedule.steps):
            watch.check()
            log.append({"step": done, **_measured(measure, done, average)})
            clock, images = time.perf_counter(), 0
        if done % schedule.checkpoint_every == 0 and done < schedule.steps:
            watch.check()
            state.save(done, log)
    progress.close()
    if average:
        average.take_over()
    watch.check_end(schedule.steps)
    return log


def _measured(measure: Callable[[int], dict], step: int, average: Average | None) -> dict:
    """The main process's `measure(step)` with the weights that training would return now."""
    with average.in_place() if average else nullcontext():
        found = processes.agree(measure(step))
    for name, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"training stopped at step {step}: the measured {name} is {value}")
    return found


class _Watch:
    """Looks at the numbers of a training and stops it when they are no longer finite.

    Every loss is looked at, on its device, which is not waited for: it is asked where a row is logged or a file saved.
    """

    def __init__(self, step: TrainingStep):
        self.training = step
        self.first = torch.zeros((), device=step.device)  # the first update whose loss is not finite; 0 is none

    def see(self, loss: Tensor, update: int) -> None:
        """Note an update's loss. What overflows in float16 is left out by the scaler, and is no fault."""
        if not self.training.scaler.is_enabled():
            self.first = torch.where((self.first == 0) & ~loss.isfinite(), update, self.first)

    def check_row(self, row: dict[str, float], batch: dict[str, Tensor]) -> None:
        """Raise RunError for numbers of the log that are not finite."""
        self.check(batch)
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                named = "the loss" if name == "loss" else name
                raise RunError(f"training stopped at step {row['step']}: {named} is {value}; {self._hint(batch)}")

    def check(self, batch: dict[str, Tensor] | None = None) -> None:
        """Raise RunError when the loss of an update was not finite, or when float16 has no scale left."""
        if first := int(self.first):
            raise RunError(f"training stopped at step {first}: the loss is not finite; {self._hint(batch or {})}")
        scaler = self.training.scaler
        if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise RunError(f"training stopped: gradients overflow float16 at every step; {BEYOND_HALF}")

    def check_end(self, steps: int) -> None:
        """Raise RunError when weights are not finite or no update was made; say it when many were left out."""
        self.check()
        training = self.training
        check_state({**training.masters, **training.parameters}, steps)
        made = max((int(state["step"]) for state in training.adamw.state.values() if "step" in state), default=0)
        left_out = f"{steps - made} of {steps} updates were left out, for their gradients overflow float16"
        if made == 0 and steps > SCALING:
            raise RunError(f"training stopped at step {steps}: {left_out}; {BEYOND_HALF}")
        if steps - made > max(SCALING, steps / 2) and processes.is_main():
            warnings.warn(f"{left_out}; {BEYOND_HALF}", stacklevel=4)

    def _hint(self, batch: dict[str, Tensor]) -> str:
        """What may help: whose numbers are not finite."""
        if bad := not_finite({name: tensor for name, tensor in batch.items() if tensor.is_floating_point()}):
            return f"the data's {', '.join(bad)} are not finite"
        objective = self.training.objective
        frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
        if bad := not_finite(frozen):
            return f"the frozen weights are not finite, the first is {bad[0]}"
        return BEYOND_HALF if self.training.scaler.is_enabled() else "a lower learning rate or weight decay may help"


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of the process so far, in MB: allocated by PyTorch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return resident_peak_mb()
