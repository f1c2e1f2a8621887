"""A notebook's code as plain Python, in the processes beside the main one, whose kernel runs the notebook itself.

Several processes that `accelerate launch` or `torchrun` started form one process group a notebook: the main one's
kernel and, in each other process, a fresh Python that runs the same cells with the same parameters and shows nothing.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

from lora_distill import processes
from lora_distill.settings import Settings

# Progress is plain text in a committed notebook: widgets leave megabytes that code hosts do not show.
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
CODE = Path(__file__).parents[2]  # the folder of this package, which the processes of a notebook are to import
OF_OTHERS = {"MPLBACKEND", "PYTHONSTARTUP"}  # variables that would change what a kernel runs or shows
# What makes a process a member of a group.
MEMBERSHIP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
              "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"}  # fmt: skip
# Errors of a process whose partner has ended, and the seconds to wait so that the partner's own error comes first.
GONE = {"gloo|nccl|connection (closed|reset)|broken pipe|remote (worker|process)|SIGABRT": 15, "kernel died": 5}
ALONE = ("01", "04")  # notebooks that measure memory and seconds, and train nothing: the main process runs them alone


def is_alone(path: Path) -> bool:
    """Whether the main process runs a notebook alone."""
    return path.name.startswith(ALONE)


def environment(path: Path, made_by: int) -> dict[str, str]:
    """The environment of a notebook's processes: of a group of their own, or of none where it runs alone.

    `made_by` so many processes are the trainings that it reads. A group needs a port that no earlier notebook's group
    has, and a store that is not the launcher's.
    """
    known = QUIET | os.environ | {processes.IN_SERIES: str(made_by)}
    if CODE.name != "site-packages":  # an installed package is found; another checkout's could be, too
        known["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CODE), known.get("PYTHONPATH")]))
    if processes.count() == 1:
        return known
    if is_alone(path):
        return {name: value for name, value in known.items() if name not in MEMBERSHIP and "TORCHELASTIC" not in name}
    port = 1024 + (int(known.get("MASTER_PORT", "29500")) + 1 + int(path.name[:2]) - 1024) % (2**16 - 1024)
    return known | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


@contextmanager
def in_environment(path: Path, made_by: int) -> Iterator[None]:
    """`environment` as this process's own for the time of a block: a kernel inherits it.

    What a user has set for other sessions is left out: startup files would run first in each kernel, and another
    backend than the kernel's own would leave a notebook without its figures.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ipython-", ignore_cleanup_errors=True) as profile:
        try:
            known = {name: value for name, value in environment(path, made_by).items() if name not in OF_OTHERS}
            _replace_environment(known | {"IPYTHONDIR": profile})
            yield
        finally:
            _replace_environment(before)


def _replace_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def wait_for_the_cause(reason: str) -> None:
    """Wait before an error that may only mean that another process ended: that one reports why, and ends this one."""
    if processes.count() > 1:
        time.sleep(
            max((seconds for words, seconds in GONE.items() if re.search(words, reason, re.IGNORECASE)), default=0)
        )


def run(path: Path, settings: Settings) -> str:
    """Run a notebook's code in a fresh process, in the notebook's folder; return why it failed, empty if it did not."""
    command = [sys.executable, "-m", "lora_distill.publish.beside", str(path)]
    surroundings = environment(path, processes.count()) | {"MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    pipes |= {"encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(command, cwd=path.parent, env=surroundings, **pipes) as child:
        try:
            _, errors = child.communicate(settings.model_dump_json())
        except BaseException:
            child.kill()
            raise
    if child.returncode < 0:
        return f"ended by {signal.Signals(-child.returncode).name}"
    return (errors.strip().splitlines() or ["failed"])[-1] if child.returncode else ""


def run_code(path: Path, parameters: dict) -> None:
    """Run a notebook's cells in this process, `parameters` after its own. Exits with one line where a cell fails."""
    namespace = {"__name__": "__main__", "display": lambda *_, **__: None}
    number = 0
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        number += 1
        try:
            exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), namespace)
        except Exception as error:
            sys.exit(f"failed in cell {number}: {type(error).__name__}: {' '.join(str(error).split())}")
        if "parameters" in cell.metadata.get("tags", []):
            namespace.update(parameters)
            number += 1  # papermill puts them into a cell of their own


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, even by SIGKILL: a member that waits for others would stay."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    run_code(Path(sys.argv[1]), json.load(sys.stdin))
    # the main process's kernel may be gone by now: closing the connection to it, as at a usual end, could abort
    os._exit(0)
