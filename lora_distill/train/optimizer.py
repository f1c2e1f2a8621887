"""The optimizer of pure 16-bit training: the model computes with 16-bit weights, AdamW updates float32 masters."""

from collections.abc import Iterable

import torch
from torch import nn


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of 16-bit parameters (Micikevicius et al. 2018, section 3.1).

    In 16 bits an update far smaller than the weight is rounded away; the copy, the master, keeps it. A float32
    parameter is its own master, and this is plain AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **adamw):
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        super().__init__(self.masters, **adamw)

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

    def tensors(self) -> list[torch.Tensor]:
        """What the optimizer keeps between steps: moments, step counts and copies in float32."""
        states = [t for state in self.state.values() for t in state.values()]
        return states + [master for _, master in self._copied()]

    def _copied(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [pair for pair in zip(self.parameters, self.masters, strict=True) if pair[0] is not pair[1]]
