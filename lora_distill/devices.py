"""Where and how networks run: the device of this process, and torch.compile."""

import warnings
from functools import lru_cache

import torch
from torch import nn

from lora_distill import processes
from lora_distill.errors import InputError
from lora_distill.settings import checked_device


def choose_device(device: str) -> str:
    """The device of this process: of "auto" the GPU if there is one, else the CPU; each of several takes its own.

    A GPU that is chosen is also PyTorch's current one, so that libraries that ask for "cuda" get it. Raises InputError
    as `check_device` does.
    """
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if processes.count() > 1:
        own = processes.connect(cpu=kind == "cpu").device
        return str(own) if kind == "cuda" else kind
    if number:
        torch.cuda.set_device(int(number))
    return device


def check_device(device: str) -> None:
    """Raise InputError for a device that is not here, and for a GPU by number when there are several processes."""
    kind, _, number = checked_device(device).partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device}, but PyTorch finds no GPU here; auto or cpu would do")
    if kind == "cuda" and number and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device: {device}, but this machine has {count} GPU{'s' * (count != 1)}, numbered from 0")
    if number and processes.count() > 1:
        raise InputError(f"device: {device} is one GPU for {processes.count()} processes; auto or {kind} would do")


def warn_of_emulation(device: str) -> None:
    """Warn where bfloat16 is asked of a GPU that emulates it."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn("this GPU emulates bfloat16, which is slow: use float16 (mixed_precision: fp16)", stacklevel=3)


def compiled(module: nn.Module) -> None:
    """Let torch.compile run a module's forward passes from now on; with one warning, not where it cannot work."""
    device = next(module.parameters()).device
    if (reason := _cannot_compile(device.type)) is not None:
        warnings.warn(f"compile: torch.compile does not work here, running without it ({reason})", stacklevel=2)
        return
    # one graph for each role and batch size: with fewer, PyTorch would go back to eager mode without a word
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    module.compile()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs a module's forward passes."""
    return module._compiled_call_impl is not None


@lru_cache
def _cannot_compile(device: str) -> str | None:
    """Why a function of one line cannot be compiled for a device, for instance without a C compiler; None if it can."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(4, device=device))
    except Exception as error:  # each backend has its own kinds
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None
