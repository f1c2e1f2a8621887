"""The processes of a run: one, or several that `accelerate launch` or `torchrun` started, each on a device of its own.

Several processes run the same code side by side: each takes its share of the rows, the main one writes the files.
Their folders must be the same, on one machine or on a shared disk.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # imported where it is needed: the command line's --help does not wait for torch
    from accelerate import PartialState

T = TypeVar("T")


def count() -> int:
    """How many processes run side by side."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def index() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files, draws bars and prints."""
    return index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: every n-th of n processes."""
    return items[index() :: count()]


def agree(value: T) -> T:
    """The main process's value, on every process: whoever decides by a file asks here, for files appear meanwhile."""
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

    # without a GPU accelerate connects processes only if told that they run on the CPU; else each believes to be alone
    return PartialState(cpu=cpu or not torch.cuda.is_available())
