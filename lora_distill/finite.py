"""Whether numbers are finite. It is asked wherever a result leaves: a loss, an adapter, latents, images, a file."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_distill.errors import RunError


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold nan or an infinity. The device is asked once, not once a tensor."""
    if not tensors:
        return []
    fine = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, is_fine in zip(tensors, fine, strict=True) if not is_fine]


def check_finite(tensors: Mapping[str, Tensor], what: str, hint: str = "", error: type[Exception] = RunError) -> None:
    """Raise `error` when a tensor holds nan or an infinity: "`what`: n of m tensors are not finite; `hint`"."""
    if bad := not_finite(tensors):
        named = _named(bad)
        raise error(f"{what}: {len(bad)} of {len(tensors)} tensors are not finite, {named}" + (hint and f"; {hint}"))


def _named(names: Iterable[str]) -> str:
    first, *others = names
    return f"the first is {first}" if others else first
