"""The training loop: flat, one for every objective, resumable to the bit.

Every random draw of step i comes from a generator seeded with (seed, i, process), so a run that was killed and
resumed sees the same batches and noise as one that was not, and a checkpoint needs no generator state.
"""

import json
import math
import resource
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

from lora_distill.masters import MasterAdamW
from lora_distill.storage import DamagedFileError, load_tensors, save_tensors

CHECKPOINT = "checkpoint.safetensors"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; one step is one optimiser update."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    warmup_steps: int = 0
    final_learning_rate: float = 0.0  # as a fraction of learning_rate; the cosine ends there
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema_decay: float = 0.0  # 0 is off
    mixed_precision: str = "no"
    log_every: int = 10
    checkpoint_every: int = 500

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_learning_rate`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


def step_generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """The source of all randomness of one step, the same on every device."""
    mixed = np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def train(
    objective: nn.Module,
    draw_batch: Callable[[int, int, torch.Generator], dict[str, Tensor]],
    schedule: Schedule,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    each: tuple[int, Callable[[int], dict]] | None = None,
    title: str = "training",
) -> list[dict]:
    """Minimise `objective(batch) -> (loss, scalars)` over its trainable parameters; return the log.

    `draw_batch(step, batch_size, generator)` makes a batch. `each = (n, call)` puts the measurements `call(step)`
    into the log before the first step, after every n-th and after the last. A checkpoint in `folder` is continued;
    a damaged one is refused and training starts anew; one of another schedule is a ValueError.
    """
    AcceleratorState._reset_state()  # accelerate keeps the first run's precision for the whole process otherwise
    accelerator = Accelerator(
        mixed_precision=schedule.mixed_precision,
        gradient_accumulation_steps=schedule.gradient_accumulation,
        cpu=torch.device(device).type == "cpu",
    )
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    adamw = MasterAdamW(
        parameters.values(),
        lr=schedule.learning_rate,
        betas=(0.9, schedule.beta2),
        weight_decay=schedule.weight_decay,
    )
    masters = dict(zip(parameters, adamw.masters, strict=True))  # where they have 32 bits, the parameters themselves
    ema = EMAModel(masters.values(), decay=schedule.ema_decay, use_ema_warmup=True, power=0.75)
    state = _State(masters, adamw, ema, accelerator.scaler, schedule, folder)
    first_step, log = state.restore()
    adamw.publish()
    if schedule.ema_decay:  # an objective may learn from its own moving average, as consistency distillation does
        objective.moving_average = dict(zip(parameters, ema.shadow_params, strict=True))
    model, optimizer = accelerator.prepare(objective, adamw)

    progress = tqdm(total=schedule.steps, initial=first_step, desc=title, mininterval=2, file=sys.stdout, ncols=100)
    if each and first_step == 0:
        log.append({"step": 0, **each[1](0)})
    clock, images = time.perf_counter(), 0
    for step in range(first_step, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        for part in range(schedule.gradient_accumulation):
            generator = step_generator(
                schedule.seed, step * schedule.gradient_accumulation + part, accelerator.process_index
            )
            batch = draw_batch(step, schedule.batch_size, generator)
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss, scalars = model(batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters.values(), schedule.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            images += schedule.batch_size * accelerator.num_processes
        if schedule.ema_decay:
            ema.step(masters.values())
        progress.update()

        done = step + 1
        if done % schedule.log_every == 0 or done == schedule.steps:
            row = {"step": done, "loss": loss.item(), **{name: value.item() for name, value in scalars.items()}}
            seconds = time.perf_counter() - clock
            row |= {"learning_rate": schedule.learning_rate_at(step), "images_per_s": round(images / seconds, 2)}
            row |= {"peak_memory_mb": peak_memory_mb(accelerator.device)}
            clock, images = time.perf_counter(), 0
            log.append(row)
            progress.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s", refresh=False)
        if each and (done % each[0] == 0 or done == schedule.steps):
            log.append({"step": done, **_measured(each[1], done, ema, adamw)})
            clock, images = time.perf_counter(), 0
        if accelerator.is_main_process and (done % schedule.checkpoint_every == 0 or done == schedule.steps):
            state.save(done, log)
    progress.close()
    if schedule.ema_decay:
        ema.copy_to(adamw.masters)
        adamw.publish()
    return log


def _measured(call: Callable[[int], dict], step: int, ema: EMAModel, adamw: MasterAdamW) -> dict:
    """Measurements of what training would leave behind at this step: the moving average, where one is kept."""
    if not ema.decay:
        return call(step)
    ema.store(adamw.masters)
    ema.copy_to(adamw.masters)
    adamw.publish()
    try:
        return call(step)
    finally:
        ema.restore(adamw.masters)
        adamw.publish()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident set of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)


@dataclass
class _State:
    """Everything a resumed run needs, in one safetensors file and one log file."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: EMAModel
    scaler: torch.amp.GradScaler | None  # of fp16 training
    schedule: Schedule
    folder: Path

    def save(self, step: int, log: list[dict]) -> None:
        tensors = {f"parameter.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in self.optimizer.state[p].items()}
        if self.schedule.ema_decay:
            shadows = zip(self.parameters, self.ema.shadow_params, strict=True)
            tensors |= {f"ema.{name}": shadow for name, shadow in shadows}
        scaler = self.scaler.state_dict() if self.scaler else None
        metadata = {"step": step, "schedule": repr(self.schedule), "log": log, "scaler": scaler}
        save_tensors(self.folder / CHECKPOINT, tensors, {key: json.dumps(value) for key, value in metadata.items()})
        (self.folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in log))

    def restore(self) -> tuple[int, list[dict]]:
        """The step to go on from and the log so far: (0, []) when there is nothing to continue."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0, []
        try:
            tensors, texts = load_tensors(path)
        except DamagedFileError as error:
            warnings.warn(f"{error}; training starts anew", stacklevel=3)
            return 0, []
        metadata = {key: json.loads(text) for key, text in texts.items()}
        if metadata["schedule"] != repr(self.schedule):
            raise ValueError(f"{path} was made with other settings; delete it, or train into another folder")
        self._load(tensors, metadata)
        return metadata["step"], metadata["log"]

    @torch.no_grad()
    def _load(self, tensors: dict[str, Tensor], metadata: dict) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"parameter.{name}"])
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        if self.schedule.ema_decay:
            self.ema.shadow_params = [tensors[f"ema.{name}"].to(p.device) for name, p in self.parameters.items()]
            self.ema.optimization_step = metadata["step"]
        if self.scaler:
            self.scaler.load_state_dict(metadata["scaler"])
