"""16-bit weights to compute with, float32 masters to update: what pure 16-bit training needs of an optimizer."""

from collections.abc import Iterable

import torch
from torch import nn


class MasterWeights:
    """AdamW on float32 copies of 16-bit parameters (Micikevicius et al. 2018, section 3.1).

    An update far smaller than a weight is lost when the weight has 16 bits; the copy keeps it. For float32 parameters
    there is no copy, and this is plain AdamW.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **adamw):
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, **adamw)

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters with the parameters' gradients, which are given up, and round the result to 16 bits."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad, parameter.grad = parameter.grad.float(), None
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        self.adamw.zero_grad(set_to_none=True)

    def tensors(self) -> list[torch.Tensor]:
        """All that lives between steps: moments, step counts and masters."""
        states = [t for state in self.adamw.state.values() for t in state.values()]
        own = {id(p) for p in self.parameters}
        return states + [master for master in self.masters if id(master) not in own]
