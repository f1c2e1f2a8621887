"""AdamW for weights of any dtype: float32 masters of 16-bit weights, in 32 or in 8 bits.

The model computes with 16-bit weights, AdamW updates float32 copies of them, the masters (Micikevicius et al. 2018,
section 3.1): in 16 bits an update far smaller than the weight is rounded away. A float32 parameter is its own master.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_distill.errors import InputError

EIGHT_BITS_ON = "cuda"  # the kind of device that bitsandbytes' kernels are for


def like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A tensor that was read from a file, on a parameter's device and in its memory layout, which files do not keep."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


class Masters:
    """The part of an optimizer on `masters` that takes gradients from `parameters` and writes new weights back."""

    def __init__(self, parameters: Iterable[nn.Parameter], **options):
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        super().__init__(self.masters, **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update the masters with the parameters' gradients, round them into the parameters and drop the gradients."""
        self.take_gradients()
        super().step()
        self.publish()
        self.zero_grad()

    def take_gradients(self) -> None:
        """Move the parameters' gradients to the masters, in float32."""
        for parameter, master in self._copied():
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters, rounded to 16 bits, into the parameters."""
        for parameter, master in self._copied():
            parameter.copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> list[Tensor]:
        """What the optimizer keeps between steps: moments, step counts and copies in float32."""
        states = [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return states + [master for _, master in self._copied()]

    def kept(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What a checkpoint keeps of one of the masters: its state, numbers as tensors."""
        return {name: torch.as_tensor(value) for name, value in self.state[parameter].items()}

    def take_up(self, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
        """Set the state of one of the masters to what `kept` gave."""
        self.state[parameter] = {name: self._state(name, value, parameter) for name, value in kept.items()}

    def _state(self, name: str, value: Tensor, parameter: nn.Parameter) -> Any:
        return like(parameter, value)

    def _copied(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [pair for pair in zip(self.parameters, self.masters, strict=True) if pair[0] is not pair[1]]


class MasterAdamW(Masters, torch.optim.AdamW):
    """AdamW on float32 masters; on float32 parameters it is plain AdamW."""


def adamw_8bit(parameters: Iterable[nn.Parameter], **options) -> Masters:
    """AdamW with its moments in 8 bits (Dettmers et al. 2022), from bitsandbytes, on float32 masters.

    Raises ValueError where it cannot run: without a GPU, or without bitsandbytes.
    """
    parameters = list(parameters)
    if any(p.device.type != EIGHT_BITS_ON for p in parameters):
        raise InputError("optimizer: adamw-8bit needs a CUDA GPU; adamw runs everywhere")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError("optimizer: adamw-8bit needs bitsandbytes: pip install bitsandbytes, or take adamw") from None

    class MasterAdamW8bit(Masters, AdamW8bit):
        def _state(self, name: str, value: Tensor, parameter: nn.Parameter) -> Any:
            return int(value) if name == "step" else like(parameter, value)  # it counts steps in Python

    return MasterAdamW8bit(parameters, **options)


def build_optimizer(kind: str, parameters: Iterable[nn.Parameter], **options) -> Masters:
    """The optimizer of a training, "adamw" (fused: one pass over each weight) or "adamw-8bit"."""
    parameters = list(parameters)
    if kind == "adamw-8bit":
        return adamw_8bit(parameters, **options)
    return MasterAdamW(parameters, fused=True, **options)
