"""Pictures of prompts, with or without a LoRA, as the command `sample` draws them.

What is not said is taken from the LoRA's own header, where this package wrote the file, else from the pipeline.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

from lora_distill.adapters import load_adapter
from lora_distill.data import scenes
from lora_distill.devices import choose_device
from lora_distill.errors import InputError, RunError, reading
from lora_distill.lora_files import MADE_BY, read_lora
from lora_distill.pipeline import check_suffix, decode_latents, encode_prompts, load_pipeline, save_picture
from lora_distill.sampling import NAMED, Sampler, initial_noise, sample_in_batches, sampler_name
from lora_distill.settings import PACKAGE
from lora_distill.writing import check_writable

FEW_STEPS = 8  # up to so many are for a LoRA that was distilled for few steps
STUDENT = "student"  # the adapter's name


@dataclass(frozen=True)
class Wishes:
    """How to draw; what is None is not said."""

    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    resolution: int | None = None
    seed: int = 0

    def or_else(self, defaults: "Wishes") -> "Wishes":
        """These, and where they say nothing the `defaults`."""
        unsaid = {name: value for name, value in vars(defaults).items() if getattr(self, name) is None}
        return replace(self, **unsaid)


def draw(prompts: list[str], out: Path, pipeline: str, lora: Path | None, wishes: Wishes) -> None:
    """Write the pictures of prompts side by side into one file, and print in one line how they are drawn.

    Raises InputError, before a model is loaded, for what cannot be: the file's name, a value, a LoRA file.
    """
    header = read_lora(lora).metadata if lora else {}
    said = wishes.or_else(header_wishes(header, str(lora))).or_else(Wishes(25, _usual_guidance(pipeline, lora), "own"))
    _check(out, said)
    _warn(prompts, pipeline, lora, header, said)
    pipe = load_pipeline(pipeline, choose_device("auto"), resolution=said.resolution)
    if lora:
        load_adapter(pipe.unet, STUDENT, lora)
    options = {"adapter": STUDENT if lora else None, "scheduler": said.scheduler, "w0": dial_of(header, str(lora))}
    sampler = Sampler(said.steps, said.guidance_scale, **options)
    print(_line(pipe, sampler, said, bool(header.get(MADE_BY))), flush=True)
    save_picture(_pictures(pipe, prompts, sampler, said.seed), out)


def _check(out: Path, said: Wishes) -> None:
    check_suffix(out)
    check_writable(out)
    w = said.guidance_scale
    if not (math.isfinite(w) and w >= 1):
        raise InputError(f"guidance_scale: expected a number of 1 or more, got {w}")
    if said.scheduler not in ("own", *NAMED):
        raise InputError(f"scheduler: expected own, {', '.join(NAMED)}, got {said.scheduler!r}")


def header_wishes(header: Mapping[str, str], place: str) -> Wishes:
    """How a LoRA file of this package says that it is sampled; nothing for files of others.

    Raises InputError for a header whose values are none.
    """
    if header.get(MADE_BY) != PACKAGE.name:
        return Wishes()
    kinds: dict[str, Any] = {"steps": int, "guidance_scale": float, "scheduler": str, "resolution": int}
    found = {}
    for key, kind in kinds.items():
        try:
            found[key] = kind(header[key]) if key in header else None
        except ValueError:
            raise InputError(f"{place}: {key}: expected a number in the header, got {header[key]!r}") from None
    return Wishes(**found)


def dial_of(header: Mapping[str, str], place: str) -> float | None:
    """w0 of a guidance dial of this package, by its header; None for other files. Raises InputError for no number."""
    if header.get(MADE_BY) != PACKAGE.name or "w0" not in header:
        return None
    with reading(f"{place}: w0", "a number above 1 in the header"):
        if (w0 := float(header["w0"])) > 1 and math.isfinite(w0):
            return w0
    raise InputError(f"{place}: w0: expected a number above 1 in the header, got {header['w0']!r}")


def _usual_guidance(pipeline: str, lora: Path | None) -> float:
    """One pass for a student, else the w at which pictures are good: 3 for the bundle, 7.5 as diffusers takes it."""
    if lora:
        return 1.0
    return 3.0 if pipeline == "bundled" else 7.5


def _warn(prompts: list[str], pipeline: str, lora: Path | None, header: Mapping[str, str], said: Wishes) -> None:
    """Say what would draw something else than is meant."""
    ours, problems = header.get(MADE_BY) == PACKAGE.name, []
    if lora and not ours and said.scheduler == "own" and said.steps <= FEW_STEPS:
        problems += [f"{lora}: {said.steps} steps of the pipeline's own scheduler; an LCM-LoRA needs scheduler lcm"]
    if ours and Path(header.get("base", pipeline)).name != Path(pipeline).name:
        problems += [f"{lora}: made for the pipeline {header['base']}, drawn with {pipeline}"]
    if ours and "w0" in header and not _in_range(header, said.guidance_scale):
        trained = f"for guidance from {header.get('w_min')} to {header.get('w_max')}"
        problems += [f"{lora}: trained {trained}, drawn with {said.guidance_scale:g}"]
    if any(not prompt.strip() for prompt in prompts):
        problems += ["an empty prompt is drawn as it is, without a text"]
    if pipeline == "bundled" and (unknown := scenes.unknown_words(prompts)):
        known = f"up to four of {', '.join(scenes.KINDS)} on {', '.join(scenes.BACKGROUNDS)}"
        words = ", ".join(word[:30] for word in unknown[:10])
        problems += [f"the bundled pipeline does not know {words}; it draws {known}"]
    for problem in problems:
        warnings.warn(problem, stacklevel=3)


def _in_range(header: Mapping[str, str], w: float) -> bool:
    """Whether a dial was trained for w; a header that does not say so excludes none."""
    try:
        return float(header["w_min"]) <= w <= float(header["w_max"])
    except (KeyError, ValueError):
        return True


def _line(pipe: StableDiffusionPipeline, sampler: Sampler, said: Wishes, from_header: bool) -> str:
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    count = f"{sampler.steps} step{'s' * (sampler.steps != 1)}"
    source = ", what was not said from the LoRA's header" if from_header else ""
    name = sampler_name(pipe, sampler)
    weight = sampler.adapter_weight
    dial = "" if weight is None else f" in one pass, the LoRA's weight {weight:g}"
    return (
        f"{name}, {count}, guidance {sampler.guidance_scale:g}{dial}, {side} x {side} pixels, seed {said.seed}{source}"
    )


def _pictures(pipe: StableDiffusionPipeline, prompts: list[str], sampler: Sampler, seed: int) -> np.ndarray:
    """Pictures (n, h, w, 3) uint8. Raises RunError where memory runs out or one is of a single colour: no result."""
    try:
        noise = initial_noise(pipe, len(prompts), seed)
        embeds, empty = encode_prompts(pipe, prompts), encode_prompts(pipe, [""])
        images = decode_latents(pipe, sample_in_batches(pipe, sampler, noise, embeds, empty, seed))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise RunError("not enough memory: fewer prompts or a smaller resolution would do") from error
        raise
    if flat := sum((image == image[0, 0]).all() for image in images):
        raise RunError(f"{flat} of {len(images)} pictures are of one colour: numbers overflowed, nothing is written")
    return images
