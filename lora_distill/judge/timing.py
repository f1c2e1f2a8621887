"""Seconds per image, with what the timer holds: text encoder, UNet and VAE apart.

One protocol for all: every method of every runtime takes its turn in each repeat, batch 1 first, and two methods are
compared turn by turn (`paired.seconds_ratio`), so that a machine that slows down for a while slows both.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lora_distill.errors import InputError
from lora_distill.judge.paired import Contrast, seconds_ratio
from lora_distill.pipeline import decode_latents, encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators, unet_passes


@dataclass(frozen=True)
class Timing:
    """Seconds per image of each part, one entry a repeat."""

    text_encoder: list[float]
    unet: list[float]
    vae: list[float]

    @property
    def total(self) -> list[float]:
        return [sum(parts) for parts in zip(self.text_encoder, self.unet, self.vae, strict=True)]

    @property
    def median(self) -> float:
        return median(self.total)

    @property
    def unet_share(self) -> float:
        """The part of the whole that is the UNet's, by medians."""
        return median(self.unet) / self.median


Contestants = dict[Hashable, tuple[StableDiffusionPipeline, Sampler]]
Timings = dict[tuple[str, int, int], dict[str, Timing]]  # by runtime, threads and batch; then by method


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the CPU work with `count` threads. One thread is the cleaner clock: two also measure how work is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_samplers(
    contestants: Contestants, prompts: list[str], repeats: int, resolution: int | None = None, warm_ups: int = 1
) -> dict[Hashable, Timing]:
    """Time one batch from prompts to uint8 images for each contestant, `repeats` times after those that warm up.

    They take turns, so that a machine that slows down for a while slows all of them; a GPU is synchronised. A compiled
    UNet compiles in the warm-up, and with CUDA graphs needs three.
    """
    parts = {name: Timing([], [], []) for name in contestants}
    for repeat in range(warm_ups + repeats):
        for name, (pipe, sampler) in contestants.items():
            noise = initial_noise(pipe, len(prompts), seed=0, resolution=resolution)
            generators = step_generators(len(prompts), seed=0)
            embeds, text_encoder = _timed(pipe, lambda: _embeds(pipe, sampler, prompts))  # noqa: B023
            latents, unet = _timed(pipe, lambda: sample(pipe, sampler, noise, *embeds, generators))  # noqa: B023
            _, vae = _timed(pipe, lambda: decode_latents(pipe, latents))  # noqa: B023
            if repeat >= warm_ups:
                parts[name].text_encoder.append(text_encoder / len(prompts))
                parts[name].unet.append(unet / len(prompts))
                parts[name].vae.append(vae / len(prompts))
    return parts


def _embeds(pipe: StableDiffusionPipeline, sampler: Sampler, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
    """Prompts, and "" where guidance asks for it: one pass saves that too."""
    return encode_prompts(pipe, prompts), encode_prompts(pipe, [""]) if sampler.guidance_scale != 1 else None


def thread_counts(device: str | torch.device = "cpu") -> list[int]:
    """The numbers of threads to time on: one, and as many as PyTorch has; on a GPU one, for they do not count there."""
    return sorted({1, torch.get_num_threads()}) if torch.device(device).type == "cpu" else [1]


def protocol(batch: int, repeats: int) -> dict[int, int]:
    """Repeats by batch: all of them for one image, which decides, then `few` for a larger batch."""
    return {1: repeats} | ({batch: few(repeats)} if batch > 1 else {})


def few(repeats: int) -> int:
    """Repeats where much is timed: a tenth, and three at least where there are as many."""
    return max(repeats // 10, min(repeats, 3))


def time_runtimes(contestants: dict[str, Contestants], prompts: list[str], repeats: dict[int, int]) -> Timings:
    """`time_samplers` of the contestants of all runtimes side by side, at each batch of `repeats` and `thread_counts`.

    Prompts are taken in turn until a batch is full.
    """
    side_by_side = {(name, method): each for name, entered in contestants.items() for method, each in entered.items()}
    device = next(iter(side_by_side.values()))[0].device
    timings: Timings = {}
    for batch, count in repeats.items():
        for number in thread_counts(device):
            with threads(number):
                timed = time_samplers(side_by_side, _filled(prompts, batch), count)
            for (name, method), timing in timed.items():
                timings.setdefault((name, number, batch), {})[method] = timing
    return timings


def _filled(prompts: list[str], batch: int) -> list[str]:
    return list(islice(cycle(prompts), batch))


def time_grid(
    contestants: Contestants,
    prompts: list[str],
    batch_sizes: list[int],
    resolutions: list[int],
    repeats: int,
    baseline: str,
    warm_ups: int = 1,
    measured: dict[tuple[int, int], dict[str, Timing]] | None = None,
) -> list[dict]:
    """`time_samplers` at each batch size and resolution, one row a contestant, with what it saves of the `baseline`'s.

    Prompts are taken in turn until a batch is full. Seconds are per image, medians over `repeats`; the spread of the
    whole is its lowest and highest. What was `measured` before, by resolution and batch size, is not timed again.
    """
    rows = []
    for resolution in resolutions:
        for batch_size in batch_sizes:
            timings = (measured or {}).get((resolution, batch_size)) or time_samplers(
                contestants, _filled(prompts, batch_size), repeats, resolution, warm_ups
            )
            rows += [
                {"method": name, **_spread(timings[name]), "resolution": resolution, "batch": batch_size,
                 **_conditions(*contestants[name]), **_parts(timings[name]),
                 **_saving(timings[name], timings[baseline]), "repeats": len(timings[name].unet), "warm_ups": warm_ups}
                for name in contestants
            ]  # fmt: skip
    return rows


def _conditions(pipe: StableDiffusionPipeline, sampler: Sampler) -> dict:
    return {
        "steps": sampler.steps,
        "unet_passes": unet_passes(pipe, sampler),
        "device": pipe.device.type,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "runtime": runtime(pipe.unet),
        "threads": torch.get_num_threads(),
    }


def _spread(timing: Timing) -> dict[str, float]:
    return {"seconds_an_image": timing.median, "lowest": min(timing.total), "highest": max(timing.total)}


def _parts(timing: Timing) -> dict[str, float]:
    return {name: median(getattr(timing, name)) for name in ("text_encoder", "unet", "vae")}


def runtime(module: nn.Module) -> str:
    """What a module runs on: PyTorch, torch.compile (as a wrapper or in place), or what the module itself names."""
    compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    return "torch.compile" if compiled else getattr(module, "runtime", "PyTorch")


@torch.no_grad()
def time_unet(
    pipe: StableDiffusionPipeline, batch_sizes: list[int], repeats: int, resolution: int | None = None
) -> dict[int, float]:
    """Median seconds of one UNet forward at each batch size, in turns, after two rounds that warm up."""
    seconds = {size: [] for size in batch_sizes}
    timestep = torch.tensor(500, device=pipe.unet.device)
    embeds = encode_prompts(pipe, [""])
    for _ in range(repeats + 2):
        for size in batch_sizes:
            noise = initial_noise(pipe, size, seed=0, resolution=resolution).to(pipe.unet.dtype)
            prompt_embeds = embeds.expand(size, -1, -1).contiguous()
            seconds[size].append(_timed(pipe, lambda: pipe.unet(noise, timestep, prompt_embeds))[1])  # noqa: B023
    return {size: median(values[2:]) for size, values in seconds.items()}


def unet_rows(
    pipes: dict[str, StableDiffusionPipeline], batch_sizes: list[int], repeats: int, device: str
) -> list[dict]:
    """`time_unet` of the pipeline of each runtime at each of `thread_counts`, a row a batch size; rho is their ratio.

    `device` is the machine's name for the table.
    """
    rows = []
    for name, pipe in pipes.items():
        for count in thread_counts(pipe.device):
            with threads(count):
                seconds = time_unet(pipe, batch_sizes, repeats)
            rows += [
                {"runtime": name, "threads": count, "batch": size, "unet_seconds": round(value, 6), "device": device}
                for size, value in seconds.items()
            ]
    return rows


def method_rows(timings: Timings, baseline: str, deployed: str, steps: dict[str, int], device: str) -> list[dict]:
    """The timings of `time_runtimes` as a table: seconds an image, and what is saved of the baseline's, turn by turn.

    The baseline is that of the same runtime, number of threads and batch; `deployed` names the runtime that one would
    use, `steps` has those of each method, `device` the machine.
    """
    rows = []
    for (runtime_name, count, batch), timed in timings.items():
        reference = timed[baseline]
        rows += [
            {"runtime": runtime_name, "threads": count, "batch": batch, "method": method, "steps": steps[method],
             "deployed": runtime_name == deployed,
             **{name: round(seconds, 5) for name, seconds in _spread(timing).items()},
             **_saving(timing, reference), "times_faster": round(1 / _ratio(timing, reference).value, 2),
             "times_faster_unet": round(median(reference.unet) / median(timing.unet), 2),
             **{f"{name}_seconds": round(seconds, 5) for name, seconds in _parts(timing).items()},
             "repeats": len(timing.unet), "device": device}
            for method, timing in timed.items()
        ]  # fmt: skip
    return rows


def pairs(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """What is compared of the methods of notebook 04: the student, and the LCM-LoRAs of each set."""
    names = list(methods)
    student, teacher, copy = "LoRA student, merged", "teacher, two passes", "full copy"
    loras = [name for name in names if name.startswith("LCM-LoRA ")]
    found = [(student, teacher), (student, copy), *((name, teacher) for name in loras)]
    found += [(name, loras[0]) for name in loras[1:]]
    return {f"{one} against {other}": (one, other) for one, other in found if {one, other} <= set(names)}


def contrast_rows(timings: Timings, contrasts: dict[str, tuple[str, str]], deployed: str, machine: str) -> list[dict]:
    """Contrasts {name: (method, against)} of the seconds of `time_runtimes`: a row each, runtime, threads and batch.

    The value is the seconds of one over those of the other, with its interval.
    """
    return [
        {"contrast": name, "method": ours, "against": theirs, "measure": "seconds ratio",
         "runtime": runtime_name, "deployed": runtime_name == deployed, "threads": count, "batch": batch,
         **_digits(_ratio(timed[ours], timed[theirs])), "repeats": len(timed[ours].unet), "machine": machine}
        for name, (ours, theirs) in contrasts.items()
        for (runtime_name, count, batch), timed in timings.items()
        if ours in timed and theirs in timed
    ]  # fmt: skip


def _ratio(timing: Timing, reference: Timing) -> Contrast:
    return seconds_ratio(timing.total, reference.total)


def _digits(contrast: Contrast) -> dict[str, float]:
    return {name: round(value, 4) for name, value in contrast._asdict().items()}


def _saving(timing: Timing, reference: Timing) -> dict[str, float]:
    """What is saved of the reference's seconds, per cent, and its interval."""
    saved = (100 * (1 - each) + 0.0 for each in _ratio(timing, reference))
    names = ("saving_percent", "saving_percent_high", "saving_percent_low")  # the least ratio saves most
    return dict(zip(names, (round(each, 2) for each in saved), strict=True))


def compare_times(rows: list[dict], baseline: str, unet_seconds: dict[int, dict[int, float]]) -> list[dict]:
    """Rows of `time_grid`, and how much one pass could save of the guided method `baseline`.

    `unet_seconds` are those of `time_unet` for each resolution, at the batch sizes of the grid and at twice these.
    The bound is for one pass instead of two and not for fewer steps.
    """
    guided = {(row["resolution"], row["batch"]): row for row in rows if row["method"] == baseline}
    compared = []
    for row in rows:
        reference, seconds = guided[row["resolution"], row["batch"]], unet_seconds[row["resolution"]]
        unet_share = reference["unet"] / reference["seconds_an_image"]
        rho = seconds[row["batch"]] / seconds[2 * row["batch"]]
        bound = 100 * saving_bound(unet_share, rho) if row["steps"] == reference["steps"] else None
        compared.append(row | {"unet_share": unet_share, "rho": rho, "bound_percent": bound})
    return [{name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()} for row in compared]


def saving_bound(unet_share: float, rho: float) -> float:
    """The part of the time per image that one UNet pass is expected to save against two: f (1 - rho).

    f = `unet_share` is the UNet's part of the teacher's time, rho = t(B) / t(2B) the seconds of a UNet forward on B
    images over those on 2B, which is what guidance runs. Amdahl's law (Amdahl 1967) with a part f that becomes
    1 / rho times as fast: 1 - ((1 - f) + f rho). Half of f where time grows with the batch, less where a small batch
    leaves the device idle. A measured saving can lie above it by what guidance costs beside the UNet.

    Raises ValueError for an f outside [0, 1] or a rho that is not positive.
    """
    if not 0 <= unet_share <= 1:
        raise InputError(f"unet_share: expected a part of the whole between 0 and 1, got {unet_share:g}")
    if not rho > 0:
        raise InputError(f"rho: expected a ratio of two times, got {rho:g}")
    return unet_share * (1 - rho)


def _timed(pipe: StableDiffusionPipeline, call: Callable):
    _synchronise(pipe)
    start = time.perf_counter()
    result = call()
    _synchronise(pipe)
    return result, time.perf_counter() - start


def _synchronise(pipe: StableDiffusionPipeline) -> None:
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
