"""`bench --growth`: images a second and peak memory of two trainings against what they grow with, one at a time.

Each case runs in a process of its own, with the steps of `memory.bench`; those of the panel "processes" with one thread
each, several of them as torchrun starts them. This module is what torchrun runs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from tqdm import tqdm

from lora_distill import processes, storage
from lora_distill.devices import choose_device
from lora_distill.errors import RunError
from lora_distill.memory.bench import (
    GUIDANCE,
    LCM_LORA,
    Data,
    Update,
    check_one_process,
    lcm_lora,
    load,
    lora_guidance,
    timed_steps,
)
from lora_distill.memory.benchmark import in_own_process
from lora_distill.memory.parts import does_not_fit
from lora_distill.settings import Settings
from lora_distill.train.loop import peak_memory_mb

TABLE = "growth"
MINUTES = 3.5
SECONDS, LEAST = 3.0, 3  # how long a case is timed, and how many steps of it at least
CAPTIONS, RANK = 1000, 4  # of a case, unless its panel says another
SHARES = (0.5, 1.0, 1.5, 2.0)  # of the profile's resolution
METHODS: dict[str, Callable[[Data], Update]] = {GUIDANCE: lora_guidance, LCM_LORA: lcm_lora}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One training step to measure; `threads` are those of each process."""

    method: str
    batch: int
    rank: int
    resolution: int
    captions: int
    processes: int
    threads: int

    def settings(self, settings: Settings) -> Settings:
        """A run's settings with those of this case."""
        changed = {"batch_size": self.batch, "lcm_batch_size": self.batch, "resolution": self.resolution}
        ranks = {"lora_rank": self.rank, "lora_alpha": self.rank, "lcm_rank": self.rank}
        return settings.model_copy(update=changed | ranks)


def cases(settings: Settings, threads: int) -> list[tuple[str, Case]]:
    """Panels and their cases, each panel's in order; one case may stand in several panels."""
    usual = {"batch": settings.batch_size, "rank": RANK, "resolution": settings.resolution, "captions": CAPTIONS}
    usual |= {"processes": 1, "threads": threads}
    panels = {
        "batch": [{"batch": size} for size in (1, 2, 4, 8, 16, 32)],
        "rank": [{"rank": rank} for rank in (1, 4, 16, 64)],
        "resolution": [{"resolution": int(share * settings.resolution)} for share in SHARES],
        "captions": [{"captions": number} for number in (100, 1000, 10_000)],
        "processes": [{"processes": number, "threads": 1} for number in (1, 2)],
    }
    return [(panel, Case(method, **{**usual, **changed}))
            for panel, values in panels.items() for changed in values for method in METHODS]  # fmt: skip


def run(settings: Settings, minutes: float = MINUTES) -> Rows:
    """Measure all cases with settings from `bench.settings_for`, with PyTorch's threads of now; a row each.

    After `minutes` no further one is begun. Raises RunError where none was measured.
    """
    check_one_process()
    deadline, found, written = time.monotonic() + 60 * minutes, {}, set()
    wanted = cases(settings, torch.get_num_threads())
    options = {"desc": "growth", "mininterval": 2, "file": sys.stdout, "ncols": 100}
    with TemporaryDirectory() as place:
        for case in tqdm(dict.fromkeys(case for _, case in wanted), **options):
            late = time.monotonic() >= deadline
            left_out = {"note": "not measured: no time was left"}
            found[case] = left_out if late else _found(case, settings, Path(place), written)
    if all("note" in each for each in found.values()):
        raise RunError(f"growth: nothing was measured; the first case: {found[wanted[0][1]]['note']}")
    return [_row(panel, case, found[case], settings) for panel, case in wanted]


def _found(case: Case, settings: Settings, folder: Path, written: set[tuple[int, int]]) -> dict[str, Any]:
    """What a case measured in a process of its own; a `note` where it could not. `written` are the data sets."""
    if reason := why_not(case, settings.device):
        return {"note": f"not measured: {reason}"}
    arguments = (case, case.settings(settings), folder)
    if (data := (case.captions, case.resolution)) not in written:
        in_own_process(sys.modules[__name__], "prepare", settings.device, *arguments)
        written.add(data)
    if case.processes > 1:
        return _by_torchrun(*arguments)
    return in_own_process(sys.modules[__name__], "measure", settings.device, *arguments)


def why_not(case: Case, device: str) -> str:
    """Why a case cannot be measured on this machine; empty where it can."""
    if case.batch % case.processes:
        return f"a batch of {case.batch} is not shared by {case.processes} processes"
    there = torch.cuda.device_count() if device != "cpu" else psutil.cpu_count()
    if case.processes > there:
        return f"{case.processes} processes for {there} device{'s' * (there != 1)}"
    return ""


def prepare(case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    """Write the data set of a case, in a process apart: the memory that this takes is not the training's."""
    return {"images": Data(load(settings), settings, folder, case.captions).prepare()}


def measure(case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds of a case's steps and the peak memory of this process in MB."""
    torch.set_num_threads(case.threads)
    device = choose_device(settings.device)
    try:
        settings = settings.model_copy(update={"device": device})
        update = METHODS[case.method](Data(load(settings), settings, folder, case.captions))
        update()
        steps = max(LEAST, int(SECONDS / timed_steps(update, 1, device)[0]))
        seconds = [timed_steps(update, 1, device)[0] for _ in range(processes.agree(steps))]
    except RuntimeError as error:
        return {"note": does_not_fit(error)}
    return {"seconds": seconds, "peak_mb": peak_memory_mb(torch.device(device))}


def _by_torchrun(case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    """`measure` by several processes: what the main one says."""
    arguments = json.dumps({"case": vars(case), "settings": settings.model_dump(), "folder": str(folder)})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.processes)]
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": path}
    command = [sys.executable, *launcher, "-m", __name__, arguments]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if "Error" in line] or ["torchrun failed"]
        return {"note": f"not measured: {said[0].strip()[:200]}"}
    return json.loads(lines[-1])


def _row(panel: str, case: Case, found: dict[str, Any], settings: Settings) -> dict[str, Any]:
    seconds = median(found["seconds"]) if found.get("seconds") else None
    machine = {"device": settings.device.partition(":")[0], "machine": storage.device_name(settings.device)}
    return {"panel": panel, "value": getattr(case, panel), **vars(case),
            "seconds_a_step": seconds and float(f"{seconds:.5g}"), "steps_timed": len(found.get("seconds", ())),
            "images_per_s": seconds and float(f"{case.batch / seconds:.5g}"), "peak_mb": found.get("peak_mb"),
            **machine, "torch": storage.versions()["torch"], "note": found.get("note")}  # fmt: skip


def _of_torchrun(arguments: str) -> None:
    """One of several processes; the main one prints what it measured as JSON."""
    given = json.loads(arguments)
    settings = Settings.model_validate(given["settings"])
    found = measure(Case(**given["case"]), settings, Path(given["folder"]))
    if processes.is_main():
        print(json.dumps(found))


if __name__ == "__main__":
    _of_torchrun(sys.argv[1])
