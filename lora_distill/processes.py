"""The processes of a run: one, or several that `accelerate launch` or `torchrun` started, each on a device of its own.

Several processes run the same code side by side: each takes its share of the rows, the main one writes the files.
Their folders must be the same, on one machine or on a shared disk.
"""

import atexit
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from lora_distill.errors import InputError

if TYPE_CHECKING:  # imported where it is needed: the command line's --help does not wait for torch
    from accelerate import PartialState
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for a process that is slower than the others; a killed one ends them all at once
IN_SERIES = "LORA_DISTILL_PROCESSES"  # how many processes a series of notebooks has, in a notebook that one runs alone


def count() -> int:
    """How many processes run side by side."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def in_series() -> int:
    """`count`, also in a notebook that the main process of a series runs alone: it reads trainings of them all."""
    return _number(IN_SERIES, 1) if IN_SERIES in os.environ else count()


def index() -> int:
    """The number of this process, from 0."""
    return _number("RANK") if count() > 1 else 0


def _number(name: str, least: int = 0) -> int:
    """A number that the launcher sets. Raises InputError for anything else, for instance left over in the shell."""
    value = os.environ.get(name, str(least))
    if not (value.isascii() and value.isdigit() and int(value) >= least):
        raise InputError(f"{name}: expected a number as accelerate launch or torchrun sets it, got {value[:80]!r}")
    return int(value)


def is_main() -> bool:
    """Whether this process is the one that writes files, draws bars and prints."""
    return index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: every n-th of n processes."""
    return items[index() :: count()]


def agree(value: T) -> T:
    """The main process's value, on every process. For decisions by a file: another process may write it in between."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    connect()
    values: list[Any] = [value]
    broadcast_object_list(values)
    return values[0]


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        connect().wait_for_everyone()


def connect(cpu: bool = False) -> "PartialState":
    """Connect the processes, once, and return accelerate's state of them. On a GPU each takes its own, unless `cpu`."""
    import torch
    from accelerate import PartialState

    if count() > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise InputError(f"{', '.join(missing)}: not set, though RANK is; accelerate launch and torchrun set them")
    # without a GPU accelerate connects processes only if told that they run on the CPU; else each believes to be alone
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    if count() > 1:
        _leave_at_exit()
    return state


@cache
def _leave_at_exit() -> None:
    """Close the connections before Python ends: their threads could abort a process that has succeeded."""
    import torch

    def leave() -> None:
        with suppress(Exception):  # another process has ended before
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    atexit.register(leave)


def all_rows(rows: "Tensor") -> "Tensor":
    """The rows of a batch of which each process has its part, in their order; gradients reach the own ones.

    What follows is computed by every process. As gradients are averaged over the processes afterwards, those of the
    own rows are multiplied by their number here.
    """
    if count() == 1:
        return rows
    import torch

    parts = [torch.empty_like(rows) for _ in range(count())]
    torch.distributed.all_gather(parts, rows.detach().contiguous())
    parts[index()] = rows.detach() + count() * (rows - rows.detach())
    return torch.cat(parts)
