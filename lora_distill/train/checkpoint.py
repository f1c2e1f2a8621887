"""The files of a training: the checkpoint of an unfinished one, the result of a finished one."""

import json
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_distill import processes
from lora_distill.errors import InputError, MissingError
from lora_distill.finite import check_finite
from lora_distill.storage import DamagedFileError, load_tensors, save_tensors
from lora_distill.train.optimizer import like
from lora_distill.train.step import Average, Schedule, TrainingStep
from lora_distill.writing import atomic_write

CHECKPOINT = "checkpoint.safetensors"  # of an unfinished training
RESULT = "result.safetensors"  # of a finished one
LOG = "log.jsonl"


def check_state(tensors: dict[str, Tensor], step: int) -> None:
    check_finite(tensors, f"training stopped at step {step}", "a lower learning rate or weight decay may help")


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
class Result:
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
class Checkpoint:
    """The checkpoint: all that a resumed training needs, in one safetensors file."""

    training: TrainingStep
    average: Average | None
    schedule: Schedule
    measured: str | None
    folder: Path

    def save(self, step: int, log: list[dict]) -> None:
        """Write the checkpoint, in the main process alone. Raises ValueError for weights that are not finite."""
        tensors = self._state()
        check_state(tensors, step)
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
