"""The command `measure`: what to measure on a device, the most important first, each in its own process; two tables.

A part that was measured before, with the same key, is read from the run's cache. One that the machine cannot hold,
by the account of its memory, is refused in its row; so is one that fails for want of memory.
"""

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pandas
import psutil
import torch

from lora_distill import storage
from lora_distill.errors import InputError
from lora_distill.memory import parts as parts_module
from lora_distill.memory import report
from lora_distill.memory.account import account
from lora_distill.memory.measure import simulate
from lora_distill.memory.parts import SAMPLERS, Part
from lora_distill.memory.schemes import INFERENCE, TRAINING, find_scheme
from lora_distill.settings import Settings, figures_dir, results_folders, run_dir
from lora_distill.shapes import SD15_SHAPE, unet_config

MEASURED = 1  # version of what the parts measure, in the keys of their files: raise it when the numbers change
MEMORY, SECONDS = "01_measured_memory", "01_measured_seconds"
PROCESS = 0.9e9  # bytes of a process that has imported torch and diffusers
MARGIN = 0.06  # of the account: what allocators keep and kernels take
DECODER = 2.5e9  # bytes at 512 px in float32, an image: tensors and the workspaces of kernels
OTHERS = 0.9e9  # bytes of VAE and text encoder in float32, as SD 1.5 has them
WANTED = ("conventional_distillation", "lora_distillation_shared")
LORA_ON_ONE_W0 = [name for name, scheme in TRAINING.items() if scheme.trains == "lora" and scheme.teacher != "separate"]
Result = dict[str, Any]
Rows = list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------- which parts


def parts_of(device: str, config: report.Config) -> list[Part]:
    """The parts for a device, most wanted first; the side of images is that of the UNet's training, and smaller."""
    full = report.own_resolution(config)
    least = 8 * 2 ** (len(config["down_block_types"]) - 1)
    sides = [side for side in (full, full // 2, full // 8) if side >= least and side % least == 0]
    return _on_a_cpu(sides) if device == "cpu" else _on_a_gpu(full)


def _on_a_cpu(sides: list[int]) -> list[Part]:
    full, *smaller = sides
    first = [*WANTED, "guided_batched", "one_pass_merged", "full_finetune", "lora_finetune"]
    rest = [name for name in TRAINING | INFERENCE if name not in first]
    chosen = [Part("step", name, resolution=full) for name in WANTED]
    chosen += [Part("passes", resolution=full, repeats=5)]
    chosen += [Part("step", name, resolution=full) for name in first[2:]]
    chosen += [Part("passes", resolution=full, precision="bfloat16", repeats=5)]
    chosen += [Part("step", name, resolution=full) for name in rest]
    chosen += [Part("images", "LCM-LoRA, 4 steps", resolution=full)]
    chosen += [Part("step", name, resolution=side) for side in smaller for name in (*first, *rest)]
    return chosen + [Part("step", name, batch, full) for batch in (2, 4) for name in LORA_ON_ONE_W0]


def _on_a_gpu(side: int) -> list[Part]:
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    steps = [
        Part("step", name, batch, side, precision)
        for batch, precision in ((1, "float32"), (1, "mixed"), (4, "mixed"), (16, "mixed"))
        for name in (*WANTED, *(name for name in TRAINING if name not in WANTED))
    ]
    sampling = [Part("step", name, batch, side, "16-bit") for batch in (1, 4, 16) for name in INFERENCE]
    images = [Part("images", "", batch, side, dtype, 5) for batch in (1, 4, 16)]
    larger = [Part("images", "", batch, side * 3 // 2, dtype, 3) for batch in (1, 4, 16)]
    training = [Part("training", "", batch, side, "16-bit", 5) for batch in (4, 16)]
    wanted = [part for part in steps if part.name in WANTED and part.batch != 4]
    chosen = [*wanted, images[0], training[0], images[1], larger[0], *steps, *sampling]
    chosen += [images[2], training[1], larger[1], larger[2]]
    return list(dict.fromkeys(chosen))


# ---------------------------------------------------------------------------------------------- running them


def run(settings: Settings, device: str, minutes: float | None = None, parts: list[Part] | None = None) -> list[Path]:
    """Measure the parts of a device, those whose files exist excepted, and write the tables after each of them.

    After `minutes` no further part is started. Returns the paths of the tables.
    """
    config, folder = unet_config(settings.pipeline), run_dir(settings) / "cache"
    parts = parts_of(device, config) if parts is None else parts
    clock = time.monotonic()
    results: dict[Part, Result] = {}
    print(f"{len(parts)} parts on {storage.device_name(device)}", flush=True)
    for number, part in enumerate(parts, start=1):
        late = minutes is not None and time.monotonic() - clock > 60 * minutes
        started = time.monotonic()
        results[part], how = _result(part, settings.pipeline, device, folder, late=late)
        took = "" if how else f" ({time.monotonic() - started:.0f} s)"
        print(f"[{number:>2}/{len(parts)}] {part}: {how or _in_words(results[part])}{took}", flush=True)
        if not how:
            write(settings, device, config, results, folder)
    cases = [(part.name, part.setup, [part.batch], config) for part in parts if part.kind == "step"]
    at_once = len(cases) if minutes is None else 8
    for start in range(0, len(cases), at_once or 1):
        if minutes is None or time.monotonic() - clock < 60 * minutes:
            report.fill_cache(cases[start : start + at_once], None, folder)
    return write(settings, device, config, results, folder)


def _result(part: Part, pipeline: str, device: str, folder: Path, *, late: bool = False) -> tuple[Result, str]:
    """What a part measured, and how one came by it; empty where it was measured now."""
    config = unet_config(pipeline)
    path = folder / f"measured-{_key(part, pipeline, device, config)}.json"
    if (found := storage.kept_value(path)) is not None:
        return found, f"{_in_words(found)} (measured before)"
    if late:
        return {"note": "not measured: no time was left"}, "left out, no time is left"
    if reason := _refusal(part, config, device):
        return {"note": reason}, reason
    found = alone(part, pipeline, device) | {"written": storage.now(), "commit": storage.git_commit()}
    if "killed" not in found.get("note", ""):
        storage.keep_value(path, found)
    return found, ""


def _key(part: Part, pipeline: str, device: str, config: report.Config) -> str:
    unet = {key: value for key, value in config.items() if not key.startswith("_")}
    packages = [storage.versions()[package] for package in report.PEAKS_DEPEND_ON]
    machine = storage.device_name(device)
    return storage.cache_key(
        version=MEASURED, part=asdict(part), unet=unet, pipeline=pipeline, packages=packages, machine=machine
    )


def live(names: Sequence[str], device: str, cache_dir: Path, resolution: int = 64) -> Rows:
    """Rows of the table of memory for a step of SD 1.5's UNet by these schemes, measured now or read from the cache."""
    chosen = [Part("step", name, resolution=resolution) for name in names]
    results = {part: _result(part, SD15_SHAPE, device, cache_dir)[0] for part in chosen}
    return memory_rows(results, device, unet_config(SD15_SHAPE), cache_dir)


def alone(part: Part, pipeline: str, device: str) -> Result:
    """Run a part in a process of its own."""
    return in_own_process(parts_module, "measure", device, part, pipeline, device)


def in_own_process(module: ModuleType, function: str, device: str, *arguments: Any) -> Result:
    """What a module's function returns, in a process of its own, whose peak of memory is clean.

    A `note` where the process was killed.
    """
    kind = "forkserver" if sys.platform == "linux" and device == "cpu" else "spawn"  # CUDA cannot be forked
    context = get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload([module.__name__])  # imports once: seconds for every part
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(getattr(module, function), *arguments).result()
        except BrokenProcessPool:
            return {"note": "its process was killed, most often for want of memory"}


def _refusal(part: Part, config: report.Config, device: str) -> str:
    """Why a machine cannot hold a part, in one line; empty where it can."""
    needed, free = need(part, config, device), available(device)
    if needed <= free:
        return ""
    return f"refused: needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def need(part: Part, config: report.Config, device: str) -> float:
    """Bytes that a part takes, from the account and what is beside the UNet."""
    process = PROCESS if device == "cpu" else report.RESERVE
    if part.kind == "step":
        return process + (1 + MARGIN) * sum(account(find_scheme(part.name), part.setup, config).values())
    shape = {"batch": part.batch, "resolution": part.resolution}
    if part.kind == "training":  # the conventional step in float32 and the two LoRA steps lie side by side
        setups = {
            "conventional_distillation": "float32",
            "lora_distillation_shared": "16-bit",
            "lcm_lora_shared": "16-bit",
        }
        peaks = [report.on_paper(TRAINING[n], config, precision=p, **shape) for n, p in setups.items()]
        return process + OTHERS + (1 + MARGIN) * sum(peaks)
    width = 4 if part.precision == "float32" or device == "cpu" else 2
    precision = "float32" if width == 4 else "16-bit"
    unet = report.on_paper(INFERENCE["guided_batched"], config, precision=precision, **shape)
    return process + (1 + MARGIN) * unet + width / 4 * (OTHERS + DECODER * part.batch * (part.resolution / 512) ** 2)


def available(device: str) -> int:
    """Bytes that are free on a GPU or in this machine's memory."""
    if device == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0]


def _in_words(found: Result) -> str:
    """A result in a few words for the line of progress."""
    if "note" in found:
        return found["note"]
    if "live" in found:
        peak = found.get("resident") or found.get("reserved")
        seconds = f", {median(found['seconds']):.3g} s a step" if found["seconds"] else ""
        return f"{found['live'] / 1e9:.2f} GB in tensors, {(peak or 0) / 1e9:.2f} GB in all{seconds}"
    if "images" in found:
        totals = {name: median(_totals(timing)) for name, timing in found["images"].items()}
        return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in totals.items())
    seconds = found.get("steps") or found["seconds"]
    return ", ".join(f"{name} {median(each):.3g} s" for name, each in seconds.items())


# ---------------------------------------------------------------------------------------------- tables


def write(
    settings: Settings, device: str, config: report.Config, results: dict[Part, Result], cache_dir: Path
) -> list[Path]:
    """Write both tables and what made them. Rows of another device that were there before stay."""
    folder = figures_dir(settings)
    tables = {MEMORY: memory_rows(results, device, config, cache_dir), SECONDS: seconds_rows(results, device)}
    tables = {folder / f"{name}.csv": rows for name, rows in tables.items() if rows}
    for path, rows in tables.items():
        storage.save_table(path, rows + of_other_devices(settings, path.stem, rows, device))
    made_by = storage.manifest(settings, unit="GB = 1e9 bytes; seconds", machine=storage.device_name(device))
    # a command that was cut goes on later, perhaps with other code
    made_by["commits"] = sorted({found["commit"] for found in results.values() if found.get("commit")})
    storage.atomic_write(folder / f"01_measured_{_kind(device)}.json", json.dumps(made_by, indent=2) + "\n")
    return list(tables)


def read(profile: str, name: str) -> Rows:
    """The rows of a table of this command, of a profile's run or else as committed; none where there is neither."""
    for folder in results_folders(profile):
        if (path := folder / f"{name}.csv").exists():
            try:
                rows = storage.read_table(path)
            except ValueError:
                raise InputError(f"{path} is no table; delete it, and measure writes it again") from None
            if lost := [column for column in ("device", "resolution") if rows and column not in rows[0]]:
                raise InputError(f"{path} has no column {lost[0]!r}; delete it, and measure writes it again")
            return rows
    return []


def shown(rows: Rows, columns: Sequence[str]) -> pandas.DataFrame:
    """Some columns of a table as one reads it; one line that says so where nothing was measured yet."""
    if not rows:
        return pandas.DataFrame({"not measured yet": ["python -m lora_distill measure --profile sd15-shape"]})
    return pandas.DataFrame(rows, dtype=object)[list(columns)].fillna("")


def of_other_devices(settings: Settings, name: str, rows: Rows, device: str) -> Rows:
    """The rows of the table so far that another kind of device measured, if their columns are the same."""
    before = [row for row in read(settings.profile, name) if row["device"] != _kind(device)]
    return [row for row in before if set(row) == set(rows[0])]


def _kind(device: str) -> str:
    return device.partition(":")[0]


def memory_rows(results: dict[Part, Result], device: str, config: report.Config, cache_dir: Path) -> Rows:
    """A row a scheme, size and batch: its peak on paper, simulated and measured, and seconds of a step."""
    rows = []
    for part, found in results.items():
        if part.kind != "step":
            continue
        paper = sum(account(find_scheme(part.name), part.setup, config).values())
        simulated = _simulated(part, config, cache_dir)
        live, all_ = found.get("live"), found.get("resident") or found.get("reserved")
        seconds = found.get("seconds") or []
        rows.append(
            {"scheme": part.name, "label": _label(part),
             "resolution": part.resolution, "batch": part.batch, "precision": part.precision,
             "optimizer": part.setup.optimizer if part.name in TRAINING else None,
             "account_gb": _gb(paper), "simulation_gb": _gb(simulated), "measured_gb": _gb(live),
             "process_gb": _gb(all_), "process_before_gb": _gb(found.get("resident_before")),
             "account_to_measured": live and paper / live,
             "seconds_a_step": median(seconds) if seconds else None, "steps_timed": len(seconds),
             "images_per_s": part.batch / median(seconds) if seconds else None, **_made(part, found, device)}
        )  # fmt: skip
    return [_rounded(row) for row in rows]


def _label(part: Part) -> str:
    """A scheme's label, without the precision that it names where another is in force."""
    label = find_scheme(part.name).label
    return label if part.precision == "16-bit" else label.replace(" 16-bit", "")


def _simulated(part: Part, config: report.Config, cache_dir: Path) -> int | None:
    """The simulated peak, where it lies in the cache."""
    case = (part.name, part.setup, [part.batch], config)
    return report.peaks(simulate, *case, cache_dir)[0].total if report.is_cached(simulate, *case, cache_dir) else None


def _made(part: Part, found: Result, device: str) -> dict[str, Any]:
    """How a row was measured."""
    return {
        "device": _kind(device), "machine": storage.device_name(device), "runtime": "PyTorch",
        "torch": storage.versions()["torch"], "threads": found.get("threads"),
        "note": found.get("note") or found.get("remark") or None,
    }  # fmt: skip


def seconds_rows(results: dict[Part, Result], device: str) -> Rows:
    """Seconds an image, a row a sampler: computed from its passes, or of images run whole; and images/s in training."""
    rows = []
    for part, found in results.items():
        if part.kind != "step":
            rows += [row | _made(part, found, device) for row in _rows_of(part, found)]
    return [_rounded(row) for row in _with_savings(rows)]


def _rows_of(part: Part, found: Result) -> Rows:
    if part.kind == "passes" and "seconds" in found:
        timings = {name: _from_passes(found["seconds"], name, part.batch) for name in SAMPLERS}
        return [_image_row(part, name, timing, "computed from passes") for name, timing in timings.items()]
    if "images" in found:
        return [_image_row(part, name, timing, "run whole") for name, timing in found["images"].items()]
    if "steps" in found:
        return [_training_row(part, name, seconds) for name, seconds in found["steps"].items()]
    return [_image_row(part, part.name or part.kind, None, "not measured")]


def _from_passes(seconds: dict[str, list[float]], sampler: str, batch: int) -> dict[str, list[float]]:
    """Seconds an image of its parts, an entry a repeat, from those of the passes of a batch."""
    steps, pass_ = SAMPLERS[sampler]
    text = seconds["text_guided" if pass_ == "guided_pass" else "text"]
    unet = [steps * each for each in seconds[pass_]]
    of_batch = {"text_encoder": text, "unet": unet, "vae": seconds["decoder"]}
    return {name: [each / batch for each in times] for name, times in of_batch.items()}


def _totals(timing: dict[str, list[float]]) -> list[float]:
    return [sum(each) for each in zip(timing["text_encoder"], timing["unet"], timing["vae"], strict=True)]


def _image_row(part: Part, name: str, timing: dict[str, list[float]] | None, how: str) -> dict[str, Any]:
    row = {"method": name, "steps": SAMPLERS.get(name, (None,))[0], "how": how, "resolution": part.resolution}
    row |= {"batch": part.batch, "dtype": part.precision}
    keys = ("seconds_an_image", "lowest", "highest", "unet_seconds", "text_encoder_seconds", "vae_seconds")
    if timing is None:
        return row | dict.fromkeys(keys) | {"images_per_s": None, "repeats": 0}
    totals, parts = _totals(timing), [median(timing[key]) for key in ("unet", "text_encoder", "vae")]
    values = (median(totals), min(totals), max(totals), *parts)
    return row | dict(zip(keys, values, strict=True)) | {"images_per_s": 1 / median(totals), "repeats": len(totals)}


def _training_row(part: Part, name: str, seconds: list[float]) -> dict[str, Any]:
    row = _image_row(part, name, None, "training steps")
    return row | {"images_per_s": part.batch / median(seconds), "repeats": len(seconds)}


def _with_savings(rows: Rows) -> Rows:
    """Rows with what each image saves of the guided teacher's of as many steps, LCM-LoRA's of 25, under its conditions.

    `unet_saving_percent` leaves out text encoder and decoder.
    """
    same = ("resolution", "batch", "dtype", "how", "device", "machine")
    guided = {
        (row["steps"], *(row[key] for key in same)): row
        for row in rows
        if row["method"].startswith("guided") and row["seconds_an_image"]
    }
    saved = []
    for row in rows:
        steps = 25 if row["steps"] == 4 else row["steps"]
        base = guided.get((steps, *(row[key] for key in same))) if row["seconds_an_image"] else None
        extra = {"saving_percent": None, "unet_saving_percent": None}
        if base:
            extra = {
                "saving_percent": 100 * (1 - row["seconds_an_image"] / base["seconds_an_image"]),
                "unet_saving_percent": 100 * (1 - row["unet_seconds"] / base["unet_seconds"]),
            }
        saved.append(row | extra)
    return saved


def _gb(size: float | None) -> float | None:
    return None if size is None else size / report.GB


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
