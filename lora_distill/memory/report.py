"""The three accounts side by side, scheme by scheme, and the command that writes them with their provenance."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lora_distill.memory.account import account
from lora_distill.memory.flops import step_flops
from lora_distill.memory.measure import measure_cuda, simulate, track
from lora_distill.memory.schemes import INFERENCE, TERMS, TRAINING, Inference, Setup, find_scheme
from lora_distill.settings import Settings, figures_dir
from lora_distill.shapes import meta_unet, unet_config
from lora_distill.storage import atomic_write, device_name, manifest, save_table

GB = 1e9
BATCHES = (1, 2, 4, 8, 16)
SMALL = 50e6  # parameters of a UNet that a CPU can train in passing


def compare(name: str, setup: Setup, config: Mapping[str, Any], device: str) -> dict[str, Any]:
    """One row: a scheme's peak in GB on paper, simulated and measured, with their ratios and the simulation's terms.

    Measured is torch.cuda.max_memory_allocated on a GPU; on a CPU the live tensors of a real step of a small UNet,
    and of a large one nothing. A step that does not fit the GPU has no measurement either.
    """
    scheme = find_scheme(name)
    paper, terms = account(scheme, setup, config), simulate(scheme, setup, config)
    on_paper, simulated = sum(paper.values()), sum(terms.values())
    measured, reserved = _measured(scheme, setup, config, device)
    return {
        "scheme": name,
        "precision": setup.precision or scheme.precision,
        "batch": setup.batch,
        "checkpointing": setup.checkpointing,
        "account_gb": _gb(on_paper),
        "simulation_gb": _gb(simulated),
        "measured_gb": _gb(measured),
        "reserved_gb": _gb(reserved),
        "account_to_simulation": round(on_paper / simulated, 4),
        "account_to_measured": measured and round(on_paper / measured, 4),
        **{f"{term}_gb": _gb(terms[term]) for term in TERMS},
    }


def _measured(scheme, setup: Setup, config: Mapping[str, Any], device: str) -> tuple[float | None, float | None]:
    if device.startswith("cuda"):
        try:
            peak = measure_cuda(scheme, setup, config, device)
        except torch.OutOfMemoryError:
            return None, None
        return peak.allocated, peak.reserved
    if sum(p.numel() for p in meta_unet(config).parameters()) > SMALL:
        return None, None
    return sum(track(scheme, setup, config).values()), None


def _gb(size: float | None) -> float | None:
    return None if size is None else float(f"{size / GB:.6g}")


def setups(name: str, resolution: int, batches: Iterable[int] = BATCHES) -> list[Setup]:
    """The setups in which a scheme is reported: every batch, training with and without checkpointing."""
    modes = (False,) if isinstance(find_scheme(name), Inference) else (False, True)
    return [Setup(batch, resolution, checkpointing) for checkpointing in modes for batch in batches]


def write(settings: Settings, device: str) -> list[str]:
    """Write figures/<profile>/01_memory_*.csv, 01_flops.csv and a manifest; return the paths.

    The first is named for what it holds: `measured` with a GPU or on a small UNet, `simulated` otherwise.
    """
    config, folder = unet_config(settings.pipeline), figures_dir(settings)
    resolution = 8 * config["sample_size"]
    rows = []
    for name in TRAINING | INFERENCE:
        for setup in setups(name, resolution):
            rows.append(compare(name, setup, config, device))
            print(_line(rows[-1]), flush=True)
    kind = "measured" if any(row["measured_gb"] is not None for row in rows) else "simulated"
    paths = [folder / f"01_memory_{kind}.csv", folder / "01_flops.csv", folder / "01_memory.json"]
    save_table(paths[0], [{**row, "device": device_name(device)} for row in rows])
    save_table(paths[1], flops_table(config, resolution))
    account_of_run = manifest(settings, kind=kind, unit="GB = 1e9 bytes, the UNet's part of one step")
    atomic_write(paths[2], json.dumps(account_of_run | {"device": device_name(device)}, indent=2) + "\n")
    return [str(path) for path in paths]


def flops_table(config: Mapping[str, Any], resolution: int) -> list[dict[str, Any]]:
    """TFLOP of one step on one image, for every scheme."""
    steps = {name: step_flops(find_scheme(name), Setup(1, resolution), config) for name in TRAINING | INFERENCE}
    return [{"scheme": name, "tflop_an_image_and_step": float(f"{flops / 1e12:.5g}")} for name, flops in steps.items()]


def _line(row: dict[str, Any]) -> str:
    checkpointing = ", checkpointing" if row["checkpointing"] else ""
    measured = "" if row["measured_gb"] is None else f", measured {row['measured_gb']:.3g}"
    return (
        f"{row['scheme']}, batch {row['batch']}{checkpointing}: "
        f"account {row['account_gb']:.3g} GB, simulation {row['simulation_gb']:.3g}{measured}"
    )
