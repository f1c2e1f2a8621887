"""The training loop: one for every objective; a resumed training equals an uninterrupted one, bit for bit.

All random numbers of batch i come from a generator seeded with (seed, i). So a resumed training samples the same
batches and noise, and a checkpoint needs no state of a generator. Several processes sample the same batch and each
takes its rows: together they train what one process trains, up to rounding.
"""

import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, RunError
from lora_distill.finite import check_finite, not_finite
from lora_distill.storage import DamagedFileError, load_tensors, resident_peak_mb, save_tensors
from lora_distill.train.optimizer import build_optimizer, like
from lora_distill.writing import atomic_write, locked

CHECKPOINT = "checkpoint.safetensors"  # of an unfinished training
RESULT = "result.safetensors"  # of a finished one
LOG = "log.jsonl"
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
BEYOND_UPDATES = 1e36  # the first update of AdamW is ten times its learning rate, and float32 ends at 3e38
LEAST_SCALE = 2.0**-14  # of a loss in float16; a smaller one makes all gradients zero
SCALING = 20  # updates that float16 may take to find its scale
BEYOND_HALF = "bfloat16 or float32 has the range that float16 lacks"
# What accelerate reads, and what launchers leave.
VARIABLES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "MEGATRON_LM_", "FP8_", "TE_")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
Milestones = tuple[int, Callable[..., dict], str]  # every so many updates, what is measured, and a key of it


@dataclass(frozen=True)
class Schedule:
    """The hyperparameters of a training; one step is one optimiser update.

    Raises InputError for a number that is not finite.
    """

    steps: int
    batch_size: int  # images a forward pass, over all processes
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
    optimizer: str = "adamw"
    log_every: int = 10
    checkpoint_every: int = 500

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, float) and not abs(value) < BEYOND_UPDATES:
                raise InputError(f"{name}: expected a number below {BEYOND_UPDATES:g}, got {value}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine down to `final_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The generator, on the CPU, of all random numbers of one batch; `step` is the number of the batch."""
    mixed = np.random.SeedSequence([seed, step, 0]).generate_state(1, np.uint64)[0]
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

    `draw_batch(step, batch_size, generator)` samples a batch: tensors with a row an image. With `milestones = (n,
    measure, key)` the dict `measure(step)` is added to the log before the first step, after every n-th and after the
    last; `key` names all that it depends on. Several processes each take their rows of the same batch; each calls
    `measure`, which may share work among them, and the main one's numbers and files are kept.

    The trained parameters and the log are written to `folder`/result.safetensors. If that file exists, it is loaded and
    nothing is trained; else training goes on from the checkpoint in `folder`, if any. A damaged file is ignored with a
    warning, one with other milestones than those asked for silently. Raises InputError for one of another schedule and
    for a batch that the processes cannot share evenly, RunError for a number that is not finite, when no update could
    be made, and while another process trains in `folder`; nothing is saved then.
    """
    step = TrainingStep(objective, schedule, device)
    result = _Result(step.parameters, schedule, milestones[2] if milestones else None, folder)
    if (log := result.restore()) is None:
        with locked(folder):
            if (log := result.restore()) is None:  # another process may have trained meanwhile
                log = _trained(step, objective, draw_batch, schedule, folder, milestones, title)
                result.save(log)
    step.free()
    return log


def _trained(
    step: "TrainingStep",
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    milestones: Milestones | None,
    title: str,
) -> list[dict]:
    """Train from the checkpoint, or from the start, to the end; the rows of the log."""
    every, measure, measured = milestones or (0, None, None)
    average = _Average(step, objective, schedule.ema_decay) if schedule.ema_decay else None
    state = _State(step, average, schedule, measured, folder)
    first_step, log = state.restore()
    step.adamw.publish()
    if average:
        average.hand_over()

    rows, main, watch = own_rows(schedule.batch_size), processes.is_main(), _Watch(step)
    options = {"desc": title, "mininterval": 2, "file": sys.stdout, "ncols": 100, "disable": not main}
    progress = tqdm(total=schedule.steps, initial=first_step, **options)
    if every and first_step == 0:
        log.append({"step": 0, **_measured(measure, 0, None)})
    clock, images = time.perf_counter(), 0
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
            row |= {"peak_memory_mb": peak_memory_mb(step.device)}
            clock, images = time.perf_counter(), 0
            log.append(processes.agree(row))
            progress.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s", refresh=False)
        if every and (done % every == 0 or done == schedule.steps):
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


class TrainingStep:
    """The training step of one batch: forward, backward and, for the last batch of an update, clipping and AdamW.

    The objective is moved to this process's device first, so that masters and moving average lie there too. Gradients
    are averaged over the processes.
    """

    def __init__(self, objective: nn.Module, schedule: Schedule, device: str | torch.device = "cpu"):
        self.accelerator = _accelerator(schedule, device)
        self.device = self.accelerator.device
        # what lies on the device is not moved: tensors without values, as memory/ has them, cannot be
        if any(t.device != self.device for t in (*objective.parameters(), *objective.buffers())):
            objective.to(self.device)
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        betas = (0.9, schedule.beta2)
        options = {"lr": schedule.learning_rate, "betas": betas, "weight_decay": schedule.weight_decay}
        self.adamw = build_optimizer(schedule.optimizer, self.parameters.values(), **options)
        # float32 parameters are their own masters
        self.masters = dict(zip(self.parameters, self.adamw.masters, strict=True))
        self.autocast = PRECISIONS[schedule.mixed_precision]
        # in fp16 small gradients vanish: the loss is scaled, and an update whose gradients overflow is left out
        half = torch.float16 in {self.autocast, *(p.dtype for p in self.parameters.values())}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.max_grad_norm = schedule.max_grad_norm
        self.objective = objective
        self.model = self.accelerator.prepare_model(objective, device_placement=False)

    def __call__(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Do the step; return the loss of this process's batch and its scalars."""
        batch = {name: _on(self.device, tensor) for name, tensor in batch.items()}
        with self.accelerator.accumulate(self.model):
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                loss, scalars = self.model(batch)
            self.accelerator.backward(self.scaler.scale(loss))
            if self.accelerator.sync_gradients:
                self._update()
        return loss.detach(), scalars

    def _update(self) -> None:
        self.adamw.take_gradients()
        self.scaler.unscale_(self.adamw)
        nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)
        self.scaler.step(self.adamw)
        self.scaler.update()
        self.adamw.zero_grad()  # an update that the scaler left out has not dropped them

    def over_processes(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each scalar over the processes. It waits for the device: the loop asks at logged steps only."""
        values = torch.stack([value.detach().float() for value in scalars.values()])
        return dict(zip(scalars, self.accelerator.reduce(values, "mean").tolist(), strict=True))

    def free(self) -> None:
        """Let go of the objective."""
        self.model = self.objective = None
        self.accelerator.free_memory()


def _accelerator(schedule: Schedule, device: str | torch.device) -> Accelerator:
    """Accelerate's part: the device, gradients over processes and over parts of an update; no variable changes it.

    Precision is ours: accelerate scales no loss of 16-bit weights, and none on a CPU.
    """
    # an earlier step of this process may have had another device
    AcceleratorState._reset_state(reset_partial_state=processes.count() == 1)
    on_cpu = torch.device(device).type == "cpu"
    if processes.count() > 1:
        processes.connect(on_cpu)
    with _without_variables():
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=schedule.gradient_accumulation),
            dynamo_plugin=TorchDynamoPlugin(backend="NO"),
            cpu=on_cpu,
        )


@contextmanager
def _without_variables() -> Iterator[None]:
    """Inside the block accelerate finds none of its variables, whoever left them in the shell.

    One process alone finds no launcher's either: a single rank of eight would wait for the seven others.
    """
    prefixes = VARIABLES + (LAUNCHED if processes.count() == 1 else ())
    left = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(prefixes)}
    try:
        yield
    finally:
        os.environ.update(left)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor on the device; a GPU does not wait for it, which takes memory that the system does not move."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def own_rows(batch_size: int) -> slice:
    """This process's rows of a batch. Raises ValueError when the processes cannot share it evenly."""
    size, rest = divmod(batch_size, processes.count())
    if rest:
        raise InputError(f"batch_size: expected a multiple of the {processes.count()} processes, got {batch_size}")
    return slice(processes.index() * size, (processes.index() + 1) * size)


class _Average:
    """The moving average of the masters, and the objective's view of it in the parameters' dtype.

    Consistency distillation takes its target from it. Cast once an update, it runs in 16 bits where the student does.
    """

    def __init__(self, step: TrainingStep, objective: nn.Module, decay: float):
        self.masters, self.publish = list(step.masters.values()), step.adamw.publish
        on_gpu = step.device.type == "cuda"
        self.ema = EMAModel(self.masters, decay=decay, use_ema_warmup=True, power=0.75, foreach=on_gpu)
        self.parameters, self.objective = step.parameters, objective

    def step(self) -> None:
        """Update the average and hand it to the objective."""
        self.ema.step(self.masters)
        self.hand_over()

    def hand_over(self) -> None:
        """Give the objective the average of now."""
        pairs = zip(self.parameters.items(), self.ema.shadow_params, strict=True)
        self.objective.moving_average = {name: shadow.to(p.dtype) for (name, p), shadow in pairs}

    def take_over(self) -> None:
        """Put the average in place of the trained weights."""
        self.ema.copy_to(self.masters)
        self.publish()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the weights are those that training would return now."""
        self.ema.store(self.masters)
        self.take_over()
        try:
            yield
        finally:
            self.ema.restore(self.masters)
            self.publish()


def _measured(measure: Callable[[int], dict], step: int, average: _Average | None) -> dict:
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
            if not math.isfinite(value):
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
        _check_state({**training.masters, **training.parameters}, steps)
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


def _check_state(tensors: dict[str, Tensor], step: int) -> None:
    check_finite(tensors, f"training stopped at step {step}", "a lower learning rate or weight decay may help")


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory of the process so far, in MB: allocated by PyTorch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return resident_peak_mb()


# ---------------------------------------------------------------------------------------------- files of a training


def _restored(path: Path, schedule: Schedule, measured: str | None) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and metadata of a file; None if it does not exist, lacks the milestones or, with a warning, is damaged.

    Of several processes the main one decides. Raises ValueError for a file of another schedule, FileNotFoundError where
    the main process has a file that this one does not see.
    """
    found = _read(path, schedule, measured) if processes.is_main() else None
    if not processes.agree(found is not None):
        return None
    found = found or _read(path, schedule, measured)
    if found is None:
        raise MissingError(f"{path}: the main process reads it and this one does not; they must share runs/")
    return found


def _read(path: Path, schedule: Schedule, measured: str | None) -> tuple[dict[str, Tensor], dict] | None:
    if not path.exists():
        return None
    try:
        tensors, texts = load_tensors(path)
    except DamagedFileError as error:
        warnings.warn(f"{error}; training starts anew", stacklevel=5)
        return None
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
        made_with, made_for = metadata["schedule"], metadata["measured"]
    except (ValueError, KeyError):
        raise InputError(f"{path}: not of a training; delete it, or train into another folder") from None
    if made_with != repr(schedule):
        differs = _differences(made_with, repr(schedule))
        raise InputError(f"{path} was made with other settings ({differs}); delete it, or train into another folder")
    return (tensors, metadata) if measured in (None, made_for) else None


def _differences(made_with: str, asked: str) -> str:
    """The values in which two schedules differ, both of each."""
    there, now = (dict(re.findall(r"(\w+)=('[^']*'|[^,()]+)", text)) for text in (made_with, asked))
    names = [name for name in now if there.get(name) != now[name]]
    return ", ".join(f"{name} {there.get(name, 'missing')}, asked {now[name]}" for name in names) or "another form"


def _check_fit(path: Path, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """Raise InputError for a file that lacks a tensor or has one of another shape."""
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            there = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
            said = f"{path} was made for another model: {name} {there}, expected {tuple(shape)}"
            raise InputError(f"{said}; delete it, or train into another folder")


@dataclass
class _Result:
    """The file of a finished training: parameters and log."""

    parameters: dict[str, nn.Parameter]
    schedule: Schedule
    measured: str | None  # the key of the milestones in the log
    folder: Path

    def save(self, log: list[dict]) -> None:
        """Write the result, then remove the checkpoint; only the main process does, and the others wait for it."""
        if processes.is_main():
            metadata = {"schedule": repr(self.schedule), "measured": self.measured, "log": log}
            texts = {key: json.dumps(value) for key, value in metadata.items()}
            save_tensors(self.folder / RESULT, self.parameters, texts)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
            _write_log(self.folder, log)
        processes.wait()

    @torch.no_grad()
    def restore(self) -> list[dict] | None:
        """Load the result into the parameters and return its log; None if there is no result."""
        if (found := _restored(self.folder / RESULT, self.schedule, self.measured)) is None:
            return None
        tensors, metadata = found
        _check_fit(self.folder / RESULT, tensors, {name: p.shape for name, p in self.parameters.items()})
        for name, p in self.parameters.items():
            p.copy_(tensors[name])
        checkpoint = self.folder / CHECKPOINT
        if processes.is_main() and checkpoint.exists():  # left if the process was killed between the two
            with suppress(OSError):  # a finished run may lie on a disk that is read only
                checkpoint.unlink()
        return metadata["log"]


@dataclass
class _State:
    """The checkpoint: all that a resumed training needs, in one safetensors file."""

    training: TrainingStep
    average: _Average | None
    schedule: Schedule
    measured: str | None
    folder: Path

    def save(self, step: int, log: list[dict]) -> None:
        """Write the checkpoint, in the main process alone. Raises ValueError for weights that are not finite."""
        tensors = self._state()
        _check_state(tensors, step)
        if not processes.is_main():
            return
        metadata = {"step": step, "schedule": repr(self.schedule), "measured": self.measured, "log": log}
        metadata |= {"scaler": self.training.scaler.state_dict()}
        save_tensors(self.folder / CHECKPOINT, tensors, {key: json.dumps(value) for key, value in metadata.items()})
        _write_log(self.folder, log)

    def _state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, by name."""
        masters, adamw = self.training.masters, self.training.adamw
        tensors = {f"parameter.{name}": p for name, p in masters.items()}
        for name, p in masters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in adamw.kept(p).items()}
        if self.average:
            shadows = zip(masters, self.average.ema.shadow_params, strict=True)
            tensors |= {f"ema.{name}": shadow for name, shadow in shadows}
        return tensors

    def restore(self) -> tuple[int, list[dict]]:
        """The number of steps done and the log so far: (0, []) without a checkpoint."""
        if (found := _restored(self.folder / CHECKPOINT, self.schedule, self.measured)) is None:
            return 0, []
        tensors, metadata = found
        self._load(tensors, metadata)
        return metadata["step"], metadata["log"]

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor], metadata: dict) -> None:
        masters, adamw = self.training.masters, self.training.adamw
        shapes = {f"parameter.{name}": p.shape for name, p in masters.items()}
        shapes |= {f"ema.{name}": p.shape for name, p in masters.items()} if self.average else {}
        _check_fit(self.folder / CHECKPOINT, tensors, shapes)
        for name, p in masters.items():
            p.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            adamw.take_up(p, state)
        if self.average:
            ema = self.average.ema
            ema.shadow_params = [like(p, tensors[f"ema.{name}"]) for name, p in masters.items()]
            ema.optimization_step = metadata["step"]
        self.training.scaler.load_state_dict(metadata["scaler"])


def _write_log(folder: Path, log: list[dict]) -> None:
    atomic_write(folder / LOG, "".join(json.dumps(row) + "\n" for row in log))
