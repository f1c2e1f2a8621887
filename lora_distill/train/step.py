"""One training step, which also whatever measures a step runs: forward, backward, update, and the schedule of steps."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from lora_distill import processes
from lora_distill.errors import InputError
from lora_distill.train.optimizer import build_optimizer

PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast
BEYOND_UPDATES = 1e36  # the first update of AdamW is ten times its learning rate, and float32 ends at 3e38
# What accelerate reads, and what launchers leave.
VARIABLES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_", "MEGATRON_LM_", "FP8_", "TE_")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")


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


class Average:
    """The moving average of the masters, and the objective's view of it in the parameters' dtype.

    Consistency distillation takes its target from it. Cast once an update, it runs in 16 bits where the student does.
    """

    def __init__(self, step: TrainingStep, objective: nn.Module, decay: float):
        self.masters, self.publish = list(step.masters.values()), step.adamw.publish
        self.ema = EMAModel(self.masters, decay=decay, use_ema_warmup=True, power=0.75, foreach=True)
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
