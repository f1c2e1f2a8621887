"""Tables of memory and operations: rows of notebook 01, and the command `memory` that writes them with provenance."""

import gc
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from lora_distill import storage
from lora_distill.errors import InputError
from lora_distill.memory.account import account, largest_batch
from lora_distill.memory.measure import Peak, measure_cuda, simulate, track
from lora_distill.memory.schemes import INFERENCE, TERMS, TRAINING, Scheme, Setup, find_scheme
from lora_distill.settings import Settings, figures_dir, run_dir
from lora_distill.shapes import SD15_VAE, unet_config

PEAKS = 1  # version of what is simulated and tracked, in the keys of the cache: raise it when the numbers change
PEAKS_DEPEND_ON = ("torch", "diffusers", "peft", "accelerate")
GB, TERA = 1e9, 1e12
RESERVE = 1.5 * GB  # of a card: the CUDA context, the kernels' workspaces and what the allocator cannot place
BATCHES = (1, 2, 4, 8, 16)
READINGS = {  # of "50 % less memory": before, after
    "before distillation": ("full_finetune", "lora_finetune"),
    "conventional": ("conventional_distillation", "lora_distillation_shared"),
    "sharing": ("lora_distillation_separate", "lora_distillation_shared"),
    "inference": ("guided_batched", "one_pass_merged"),
}
CHANGED = (  # schemes of `what_pays`
    TRAINING["full_finetune"],
    TRAINING["lora_distillation_shared"],
    replace(TRAINING["lcm_lora_shared"], label="LCM-LoRA, one W0", precision="mixed"),
)
CHANGES = {
    "gradient checkpointing": {"checkpointing": True},
    "16-bit base": {"precision": "mixed, 16-bit base"},
    "16-bit throughout": {"precision": "16-bit"},
    "8-bit optimizer": {"optimizer": "adamw-8bit"},
    "int8 base": {"quantised_base": "int8"},
    "nf4 base": {"quantised_base": "nf4"},
}
SAMPLERS = {  # steps, and what each of them runs
    "guided, 25 steps": (25, "guided_batched"),
    "one pass, 25 steps, unmerged": (25, "one_pass_unmerged"),
    "one pass, 25 steps, merged": (25, "one_pass_merged"),
    "LCM-LoRA, 4 steps, unmerged": (4, "few_step"),
}
Config = Mapping[str, Any]
Rows = list[dict[str, Any]]
Way = Callable[..., list[Peak]]  # simulate or track
Case = tuple[str, Setup, Sequence[int], Config]  # a scheme's name, its setup, batches and UNet

# ---------------------------------------------------------------------------------------------- on paper


def on_paper(scheme: Scheme, config: Config, **setup: Any) -> float:
    """Bytes at the peak of a step, by hand; `setup` as in `Setup`."""
    return sum(account(scheme, Setup(**setup), config).values())


def savings(config: Config, batches: Sequence[int] = (1, 4, 16)) -> Rows:
    """What each reading of "50 % less" saves on paper, in per cent by batch, a row a precision and checkpointing."""
    rows = []
    for reading, (before, after) in READINGS.items():
        trains = before in TRAINING
        modes = (
            product(("float32", "mixed", "16-bit"), (False, True))
            if trains
            else (("float32", False), ("16-bit", False))
        )
        for precision, checkpointing in modes:
            setup = {"precision": precision, "checkpointing": checkpointing}
            row = {"reading": reading, **setup}
            for batch in batches:
                peaks = [on_paper(find_scheme(name), config, batch=batch, **setup) for name in (before, after)]
                row[f"batch_{batch}"] = round(100 * (1 - peaks[1] / peaks[0]), 1)
            rows.append(row)
    return rows


def starred(rows: Rows) -> pandas.DataFrame:
    """The table of `savings` with a star at half or more."""
    table = pandas.DataFrame(rows)
    batches = table.filter(like="batch_").map(lambda saved: f"{saved:.1f}" + "*" * (saved >= 50))
    return table.assign(**batches)


def largest_batches(config: Config, cards: Sequence[int] = (8, 12, 16, 24), most: int = 256) -> Rows:
    """The largest batch on paper that leaves `RESERVE` free on cards of so many times 2^30 bytes, a row a scheme."""
    rows = []
    for (name, scheme), checkpointing in product(TRAINING.items(), (False, True)):
        setup = Setup(checkpointing=checkpointing)
        fits = {f"{c}_gb_card": largest_batch(scheme, setup, config, c * 2**30 - RESERVE, most) for c in cards}
        rows.append({"scheme": name, "checkpointing": checkpointing, **fits})
    return rows


def what_pays(config: Config, batches: Sequence[int] = (1, 16)) -> Rows:
    """What each change of settings does to a peak on paper, in GB, a row a change and batch, a column a scheme."""
    rows = []
    for batch, (change, setup) in product(batches, CHANGES.items()):
        row = {"change": change, "batch": batch}
        for scheme in CHANGED:
            changed = on_paper(scheme, config, batch=batch, **setup) - on_paper(scheme, config, batch=batch)
            row[scheme.label] = round(changed / GB, 2)
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------- three ways


def peaks(way: Way, name: str, setup: Setup, batches: Sequence[int], config: Config, cache_dir: Path) -> list[Peak]:
    """`simulate` or `track` of a scheme for every batch, kept in `cache_dir`."""
    paths = _paths(way, name, setup, batches, config, cache_dir)
    kept = {batch: storage.kept_value(path) for batch, path in paths.items()}
    if missing := [batch for batch, value in kept.items() if value is None]:
        for batch, peak in zip(missing, way(find_scheme(name), setup, config, *missing), strict=True):
            kept[batch] = asdict(peak)
            storage.keep_value(paths[batch], kept[batch])
    return [Peak(**value) for value in kept.values()]


def _paths(
    way: Way, name: str, setup: Setup, batches: Sequence[int], config: Config, cache_dir: Path
) -> dict[int, Path]:
    """The cache's file of every batch."""
    versions = storage.versions()
    parts = {"version": PEAKS, "packages": [versions[package] for package in PEAKS_DEPEND_ON]}
    parts |= {"scheme": repr(find_scheme(name)), "unet": {k: v for k, v in config.items() if not k.startswith("_")}}
    keys = {batch: storage.cache_key(setup=repr(replace(setup, batch=batch)), **parts) for batch in batches}
    return {batch: cache_dir / f"{way.__name__}-{key}.json" for batch, key in keys.items()}


def is_cached(way: Way, name: str, setup: Setup, batches: Sequence[int], config: Config, cache_dir: Path) -> bool:
    """Whether `peaks` of the same would only read."""
    return all(path.exists() for path in _paths(way, name, setup, batches, config, cache_dir).values())


def fill_cache(cases: Iterable[Case], device: str | None, cache_dir: Path) -> None:
    """Run what `compare` will read, in two processes: a simulation is plain Python and takes one core."""
    jobs = [(way, *case) for case in cases for way in ((simulate, track) if _tracks(device, case[-1]) else (simulate,))]
    jobs = [job for job in jobs if not is_cached(*job, cache_dir)]
    if jobs:
        with ProcessPoolExecutor(2, get_context("spawn"), initializer=_start) as pool:
            done = as_completed([pool.submit(peaks, *job, cache_dir) for job in jobs])
            for job in tqdm(done, "simulating", len(jobs), mininterval=2, ncols=100, file=sys.stdout):
                job.result()


def _start() -> None:
    """Let the garbage collector pass over all that a process has imported: a fifth of its time."""
    gc.freeze()


def _tracks(device: str | None, config: Config) -> bool:
    """Whether steps are measured on the CPU: where the UNet is small, below 50 million parameters."""
    return device == "cpu" and account(INFERENCE["one_pass_merged"], Setup(), config)["weights"] < 2 * 50e6


def compare(
    name: str, setup: Setup, batches: Sequence[int], config: Config, device: str | None, cache_dir: Path
) -> Rows:
    """A row a batch: a scheme's peak in GB on paper, simulated and measured, their ratios, the simulation's terms.

    Measured is torch.cuda.max_memory_allocated on a GPU; on a CPU the live tensors of a real step of a small UNet,
    and of a large one nothing. A step that does not fit the GPU has no measurement either, nor has one without a
    `device`.
    """
    scheme, rows = find_scheme(name), []
    for batch, simulation in zip(batches, peaks(simulate, name, setup, batches, config, cache_dir), strict=True):
        setup = replace(setup, batch=batch)
        paper = sum(account(scheme, setup, config).values())
        measured, reserved = _measured(name, setup, config, device, cache_dir)
        row = {"scheme": name, "precision": setup.precision or scheme.precision}
        row |= {"batch": batch, "checkpointing": setup.checkpointing}
        row |= {"account_gb": _gb(paper), "simulation_gb": _gb(simulation.total)}
        row |= {"measured_gb": _gb(measured), "reserved_gb": _gb(reserved)}
        row |= {"account_to_simulation": round(paper / simulation.total, 4)}
        row |= {"account_to_measured": measured and round(paper / measured, 4)}
        rows.append(row | {f"{term}_gb": _gb(simulation.terms[term]) for term in TERMS})
    return rows


def _measured(
    name: str, setup: Setup, config: Config, device: str | None, cache_dir: Path
) -> tuple[int | None, int | None]:
    if _tracks(device, config):
        return peaks(track, name, setup, [setup.batch], config, cache_dir)[0].total, None
    if device in (None, "cpu"):
        return None, None
    try:
        return measure_cuda(find_scheme(name), setup, config, device)
    except torch.OutOfMemoryError:
        return None, None


def _gb(size: float | None) -> float | None:
    return None if size is None else float(f"{size / GB:.6g}")


def three_ways(pipeline: str, resolution: int, device: str, cache_dir: Path) -> Rows:
    """`compare` of all schemes: SD 1.5 at 512 px with batches 1 and 16, and a run's UNet at its resolution with 4."""
    sd15, local = unet_config("sd15-shape"), unet_config(pipeline)
    cases = [("SD 1.5", (name, Setup(), (1, 16), sd15)) for name in TRAINING | INFERENCE]
    cases += [(pipeline, (name, Setup(4, resolution), (4,), local)) for name in TRAINING | INFERENCE]
    fill_cache([case for _, case in cases], device, cache_dir)
    return [{"unet": unet} | row for unet, case in cases for row in compare(*case, device, cache_dir)]


# ---------------------------------------------------------------------------------------------- operations


def step_tflop(names: Iterable[str], config: Config, resolution: int, cache_dir: Path) -> dict[str, float]:
    """TFLOP of one step on one image by scheme, as the simulation counts them."""
    setup = Setup(1, resolution)
    return {name: peaks(simulate, name, setup, [1], config, cache_dir)[0].flops / TERA for name in names}


def decoder_flops(vae_config: Config, resolution: int) -> int:
    """Operations of decoding one latent to a picture of `resolution` pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(vae_config))
        latents = torch.empty(1, vae.config.latent_channels, resolution // 8, resolution // 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops()


def image_tflop(step: Mapping[str, float]) -> Rows:
    """TFLOP of a picture of SD 1.5 at 512 px, a row a sampler; `step` is from `step_tflop`."""
    decoder = round(decoder_flops(SD15_VAE, 512) / TERA, 3)
    return [
        {"sampler": name, "unet_tflop": round(steps * step[scheme], 3), "decoder_tflop": decoder}
        for name, (steps, scheme) in SAMPLERS.items()
    ]


# ---------------------------------------------------------------------------------------------- what is written


def results(config: Config, saved: Rows, compared: Rows) -> dict[str, dict[str, str]]:
    """The main numbers of notebook 01 as text, from its tables `savings` and `three_ways`."""
    by_reading = {(row["reading"], row["precision"]): row for row in saved if not row["checkpointing"]}
    simulation = {(row["scheme"], row["batch"]): row["simulation_gb"] for row in compared if row["unet"] == "SD 1.5"}
    lcm = ("lcm_lora_script", "lcm_lora_shared")
    checkpointed = {name: on_paper(TRAINING[name], config, batch=16, checkpointing=True) / GB for name in lcm}
    worst = max(abs(row["account_to_simulation"] - 1) for row in compared)

    def mixed(reading: str) -> str:
        return " and ".join(f"{by_reading[reading, 'mixed'][f'batch_{batch}']:.0f} %" for batch in (1, 16))

    at_inference = by_reading["inference", "16-bit"]["batch_1"]
    lines = {
        "saved by sharing W0, mixed precision, batch 1 and 16": mixed("sharing"),
        "saved against conventional distillation, mixed, batch 1 and 16": mixed("conventional"),
        "saved by LoRA before distillation, mixed, batch 1 and 16": mixed("before distillation"),
        "saved at inference by dropping guidance, 16-bit, batch 1": f"{at_inference:.0f} %",
        "LCM-LoRA, batch 1: public script, one 16-bit W0": " and ".join(
            f"{simulation[name, 1]:.2f} GB" for name in lcm
        ),
        "LCM-LoRA, batch 16 with checkpointing: the same": " and ".join(f"{checkpointed[name]:.2f} GB" for name in lcm),
        "account against simulation, largest difference": f"{100 * worst:.1f} %",
    }
    return {"memory of SD 1.5 at 512 px (UNet part)": lines}


def own_resolution(config: Config) -> int:
    """The side of the images that a UNet was made for. Raises `InputError` where its config says none that it takes."""
    side, least = config.get("sample_size"), 2 ** (len(config["down_block_types"]) - 1)
    if type(side) is not int or side < least or side % least:
        raise InputError(f"unet/config.json: sample_size: expected a multiple of {least}, got {side!r}")
    return 8 * side


def write(
    settings: Settings, names: Sequence[str] = tuple(TRAINING | INFERENCE), batches: Sequence[int] = BATCHES
) -> list[str]:
    """Write runs/<profile>/figures/01_memory_simulated.csv, 01_flops.csv and a manifest; return the paths.

    Peaks are on paper and simulated, of training with and without gradient checkpointing.
    """
    config, folder, cache_dir = unet_config(settings.pipeline), figures_dir(settings), run_dir(settings) / "cache"
    resolution = own_resolution(config)
    modes = [
        (name, Setup(resolution=resolution, checkpointing=checkpointing))
        for name in names
        for checkpointing in ((False, True) if name in TRAINING else (False,))
    ]
    cases = [(*mode, batches, config) for mode in modes]
    fill_cache(cases, None, cache_dir)
    rows = [row for case in cases for row in compare(*case, None, cache_dir)]
    tflop = step_tflop(names, config, resolution, cache_dir)
    flops = [{"scheme": name, "tflop_an_image_and_step": float(f"{size:.5g}")} for name, size in tflop.items()]
    paths = [folder / "01_memory_simulated.csv", folder / "01_flops.csv", folder / "01_memory.json"]
    without = ("measured_gb", "reserved_gb", "account_to_measured")
    storage.save_table(paths[0], [{name: value for name, value in row.items() if name not in without} for row in rows])
    storage.save_table(paths[1], flops)
    made_by = storage.manifest(settings, kind="simulated", unit="GB = 1e9 bytes, the UNet's part of one step")
    storage.atomic_write(paths[2], json.dumps(made_by, indent=2) + "\n")
    return [str(path) for path in paths]
