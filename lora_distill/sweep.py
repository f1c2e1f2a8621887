"""Defaults chosen on the val split: every method trained and judged with several values of each of its settings.

One setting at a time is changed, the others stay as the profile has them: no product of grids, so what two settings do
together is not seen. Each training has one seed and the profile's length, and a longer one can want a smaller learning
rate; all values of a setting are judged on the
same val prompts, in equal shares of one to four objects, and on the same noise. The test split is never looked at.

The rule: the value with the fewest errors, and all whose errors are at most one standard error of the difference above
(paired over prompts), count as equal; of these the one with the smallest fit error, and all within one standard error
of it; of these the smallest value, which is the gentler training or the cheaper one. Errors are of all that the
training is for: of guided students and fine-tunes the style too, of consistency models, which keep it, content alone.
"""

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from diffusers import StableDiffusionPipeline
from torch import Tensor

from lora_distill.data.captioned import bundled_scenes, captioned_images
from lora_distill.data.encoded import EncodedImages, Framing, encode_images
from lora_distill.data.teacher import teacher_for
from lora_distill.errors import InputError, RunError
from lora_distill.fingerprint import fingerprint
from lora_distill.judge.judge import FD, JUDGED, Judge, Quality, judge_for
from lora_distill.judge.metrics import psnr
from lora_distill.judge.reader import Reader
from lora_distill.pipeline import pipeline_for
from lora_distill.sampling import Sampler, multi_step
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, device_name, git_commit, keep_value, kept_value
from lora_distill.train import recipes

SWEPT = 2  # version of what is kept of a value, the reader's verdicts too, in its key: raise it when this changes
SPLIT, PROMPTS, NOISE = "val", 96, 0  # what values are judged on; prompts a multiple of 4
FEW = 4  # steps of the samplers of consistency models
LAST = 5  # lines of the log whose mean is the loss at the end
# Settings that no value here depends on; a row is kept when they change.
ASIDE = {"profile", "more_train_seeds", "pretrain", "device", "clip", "extractors", "few_images", "log_every"}
ASIDE |= {"checkpoint_every", "eval_every", "eval_seeds", "eval_prompts", "curve_prompts", "guidance_scales"}
ASIDE |= {"finetune_guidance_scales", "timing_batch", "timing_repeats", "flickr_30k", "full_copies"}


class Swept(NamedTuple):
    """A setting of a method and the values it is given; those of `LENGTHS` are multiples of the profile's."""

    method: str
    setting: str
    values: tuple[float, ...]

    def grid(self, settings: Settings) -> list[float]:
        """The values in order, that of the profile among them."""
        default = getattr(settings, self.setting)
        values = [round(value * default) for value in self.values] if self.setting in LENGTHS else self.values
        return sorted({*values, default})


LENGTHS = {"lcm_steps"}
GRIDS = (
    Swept("teacher", "guidance_scale", (1.5, 2.0, 3.0, 5.0, 7.5)),
    Swept("LoRA student", "learning_rate", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    Swept("full copy", "full_learning_rate", (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
    Swept("LCM-LoRA", "lcm_lora_learning_rate", (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)),
    Swept("LCM-LoRA", "lcm_batch_size", (8, 16, 32)),
    Swept("LCM-LoRA", "lcm_ema_decay", (0.0, 0.9, 0.95, 0.98)),
    Swept("LCM-LoRA", "lcm_steps", (0.5, 1, 2)),
    Swept("LCM", "lcm_learning_rate", (5e-5, 1e-4, 2e-4, 4e-4)),
    Swept("LCM", "lcm_batch_size", (8, 16, 32)),
    Swept("LCM", "lcm_ema_decay", (0.0, 0.9, 0.95, 0.98)),
    Swept("fine-tune, attention", "finetune_attention_learning_rate", (1e-4, 3e-4, 1e-3, 3e-3)),
    Swept("fine-tune, all layers", "finetune_learning_rate", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
)
COPIES = {"full copy", "LCM"}  # methods that train a whole UNet


# ---------------------------------------------------------------------------------------------- training and judging


@dataclass
class Bench:
    """What all trainings of a sweep share: pipeline, teacher images, encoded images and judges, made when needed.

    Caches are those of the run; `prompts` is the number of val prompts.
    """

    settings: Settings
    cache: Path
    prompts: int

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        return pipeline_for(self.settings)

    @cached_property
    def made_on(self) -> tuple[str, str]:
        """A digest of the pipeline, and the kind of device that it is on."""
        return fingerprint(self.pipe), self.pipe.unet.device.type

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        return teacher_for(self.pipe, self.settings, self.cache)

    @cached_property
    def images(self) -> EncodedImages:
        settings = self.settings
        options = {"share": settings.image_share, "skip_unusable": settings.skip_unusable, "cache_dir": self.cache}
        images = captioned_images(settings.flickr_8k, "train", without=settings.flickr_8k, **options)
        return encode_images(self.pipe, images, Framing(settings.resolution, mirror=settings.mirror), self.cache)

    @cached_property
    def guided(self) -> Judge:
        return self._judge(self.settings.data, "all")

    @cached_property
    def consistent(self) -> Judge:
        return self._judge(self.settings.flickr_8k, "content")

    @cached_property
    def in_style(self) -> Judge:
        return self._judge(self.settings.flickr_8k, "all")

    def _judge(self, source: str, key: str) -> Judge:
        return judge_for(self.pipe, self.settings, source, SPLIT, self.prompts, key, self.cache)

    @cached_property
    def teacher_images(self) -> np.ndarray:
        return self.guided.images(multi_step(self.settings, self.settings.guidance_scale), NOISE)[:]


Log = list[dict[str, Any]]


def _teacher(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    return [], bench.guided(multi_step(settings, settings.guidance_scale), NOISE)


def _student(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    log = recipes.distil_lora(bench.pipe, bench.teacher, settings, folder)
    return log, bench.guided(multi_step(settings, adapter="student"), NOISE)


def _full_copy(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    copy, log = recipes.distil_full_copy(bench.pipe, bench.teacher, settings, folder)
    return log, bench.guided(multi_step(settings), NOISE, copy)


def _lcm(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    lcm, log = recipes.train_lcm(bench.pipe, bench.images, settings, folder)
    return log, bench.consistent(Sampler(FEW, scheduler="lcm", embedded_guidance=settings.guidance_scale), NOISE, lcm)


def _lcm_lora(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    log = recipes.train_lcm_lora(bench.pipe, bench.images, settings, folder)
    return log, bench.consistent(Sampler(FEW, scheduler="lcm", adapter="lcm_lora"), NOISE)


def _narrow(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    rate = settings.finetune_attention_learning_rate
    return _fine_tune(bench, settings, folder, settings.lora_rank, "attention", rate)


def _wide(bench: Bench, settings: Settings, folder: Path) -> tuple[Log, Quality]:
    rate = settings.finetune_learning_rate
    return _fine_tune(bench, settings, folder, settings.lcm_rank, settings.lcm_targets, rate)


def _fine_tune(
    bench: Bench, settings: Settings, folder: Path, rank: int, targets: str, rate: float
) -> tuple[Log, Quality]:
    log = recipes.finetune_lora(bench.pipe, bench.images, settings, folder, rank, targets, learning_rate=rate)
    return log, bench.in_style(multi_step(settings, settings.guidance_scale, adapter="finetune"), NOISE)


METHODS: dict[str, Callable[[Bench, Settings, Path], tuple[Log, Quality]]] = {
    "teacher": _teacher,
    "LoRA student": _student,
    "full copy": _full_copy,
    "LCM": _lcm,
    "LCM-LoRA": _lcm_lora,
    "fine-tune, attention": _narrow,
    "fine-tune, all layers": _wide,
}
STUDENTS = {"LoRA student", "full copy"}  # of the teacher's own sampler: their images can be like its images


# ---------------------------------------------------------------------------------------------- the sweep


def run(
    settings: Settings,
    folder: Path,
    only: Sequence[str] = (),
    minutes: float | None = None,
    *,
    grids: Sequence[Swept] = GRIDS,
    prompts: int = PROMPTS,
) -> list[dict[str, Any]]:
    """Train and judge all values that are not kept yet; return a row a setting and value that is (see `table`).

    `folder` is that of the profile's run; what is found of a value is kept in its `sweep`, at once. `only` names the
    methods or settings to work on, `minutes` after how many no further value is begun. Raises InputError for an unknown
    name and for photographs.
    """
    grids = _grids_of(settings, only, grids)
    bench, deadline = Bench(settings, folder / "cache", prompts), time.monotonic() + 60 * (minutes or 0)
    found: dict[Swept, dict[float, dict]] = {swept: {} for swept in grids}
    todo = [(swept, value) for swept in grids for value in swept.grid(settings)]
    for number, (swept, value) in enumerate(todo, 1):
        changed = settings.model_copy(update={swept.setting: value})
        place = folder / "sweep" / _key(bench, swept.method, changed)
        kept = kept_value(path := place.with_suffix(".json"))
        if kept is None:
            late = minutes is not None and time.monotonic() >= deadline
            if late or (only and not {swept.method, swept.setting} & set(only)):
                continue
            keep_value(path, kept := _judged(bench, swept.method, changed, place))
        shutil.rmtree(place, ignore_errors=True)  # the training: what is asked of it is kept
        found[swept][value] = kept
        print(f"{number} of {len(todo)}: {swept.method}, {swept.setting} {value:g}: {_in_words(kept)}", flush=True)
    return table(settings, found)


def _grids_of(settings: Settings, only: Sequence[str], grids: Sequence[Swept]) -> list[Swept]:
    """The settings of the profile's methods. Raises InputError as `run` does."""
    if not (bundled_scenes(settings.data) or settings.data == "scenes") or not bundled_scenes(settings.flickr_8k):
        raise InputError(f"profile {settings.profile}: only scenes are swept, for their errors can be counted")
    grids = [swept for swept in grids if settings.full_copies or swept.method not in COPIES]
    names = {swept.setting for swept in grids} | {swept.method for swept in grids}
    if unknown := set(only) - names:
        raise InputError(f"--only: no method or setting {min(unknown)!r}; there are {', '.join(sorted(names))}")
    return grids


def _key(bench: Bench, method: str, settings: Settings) -> str:
    """Of all that decides what is found of a method; learning rates of other methods do not."""
    rates = {swept.setting for swept in GRIDS if swept.setting.endswith("learning_rate") and swept.method != method}
    values = settings.model_dump(exclude=ASIDE | rates)
    versions = (SWEPT, recipes.RECIPE, JUDGED, Reader.tolerance)
    return cache_key(versions=versions, method=method, prompts=bench.prompts, settings=values, pipeline=bench.made_on)


def _judged(bench: Bench, method: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """What is kept of a value: verdicts image by image, distances, loss. A training that diverged has all wrong."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            for peft in ("Adapter .* was active which is now deleted", "Already found a `peft_config`"):
                warnings.filterwarnings("ignore", peft)  # one adapter makes room for the next
            log, quality = METHODS[method](bench, settings, folder)
        found = {
            "counted": quality.column,
            "wrong": [int(not right) for right in quality.right],
            "fit_error": [round(float(error), 6) for error in quality.fit_error],
            FD: quality.frechet_distance,
            "psnr_to_teacher_db": psnr(quality.images, bench.teacher_images) if method in STUDENTS else None,
            "loss": float(np.mean(losses)) if (losses := _last_losses(log)) else None,
            "problem": "",
        }
    except RunError as error:
        if isinstance(error, OSError):  # of the machine, and not of the value
            raise
        worst = [1] * bench.prompts
        found = {"counted": "", "wrong": worst, "fit_error": worst, FD: None, "psnr_to_teacher_db": None}
        found |= {"loss": None, "problem": str(error)}
    seconds = round(time.perf_counter() - start, 1)
    return {**found, "seconds": seconds, "device": device_name(settings.device), "commit": git_commit()}


def _last_losses(log: Log) -> list[float]:
    return [row["loss"] for row in log if "loss" in row][-LAST:]


def _in_words(found: dict[str, Any]) -> str:
    if found["problem"]:
        return found["problem"]
    wrong, clean = 100 * np.mean(found["wrong"]), np.mean(found["fit_error"])
    return f"errors {wrong:.1f} %, fit error {clean:.3f}, {found['seconds']:.0f} s"


# ---------------------------------------------------------------------------------------------- the choice


def choose(wrong: dict[float, np.ndarray], fit_error: dict[float, np.ndarray]) -> float:
    """The value that the rule of this module takes, of what each has image by image, (n,)."""
    few_errors = _as_good_as_the_best(wrong)
    return min(_as_good_as_the_best({value: fit_error[value] for value in few_errors}))


def _as_good_as_the_best(losses: dict[float, np.ndarray]) -> list[float]:
    best = _best(losses)
    return [value for value, loss in losses.items() if loss.mean() - best.mean() <= _standard_error(loss - best)]


def _best(losses: dict[float, np.ndarray]) -> np.ndarray:
    return losses[min(losses, key=lambda value: (losses[value].mean(), value))]


def _standard_error(difference: np.ndarray) -> float:
    return float(difference.std(ddof=1) / len(difference) ** 0.5)


def table(settings: Settings, found: dict[Swept, dict[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a setting and value: `errors` (a share) and `fit_error`, each with the standard error of its difference
    from the best value's, 0 for the best itself; distance, PSNR, loss. A setting whose values are not all there has
    none chosen.
    """
    rows = []
    for swept, results in found.items():
        wrong, fit_error = (
            {value: np.array(kept[name], float) for value, kept in results.items()} for name in ("wrong", "fit_error")
        )
        complete = sorted(results) == swept.grid(settings)
        chosen = choose(wrong, fit_error) if complete else None
        for value, kept in sorted(results.items()):
            row = {"method": swept.method, "setting": swept.setting, "value": value}
            row |= {"default": value == getattr(settings, swept.setting), "chosen": value == chosen}
            row |= {"split": SPLIT, "n": len(wrong[value]), "counted": kept["counted"]}
            for name, losses in (("errors", wrong), ("fit_error", fit_error)):
                error = _standard_error(losses[value] - _best(losses))
                row |= {name: round(float(losses[value].mean()), 6), f"{name}_se": round(error, 6)}
            rows.append(row | {name: kept[name] for name in (FD, "psnr_to_teacher_db", "loss", "problem")}
                        | {name: kept[name] for name in ("seconds", "device", "commit")})  # fmt: skip
    return rows


def overview(rows: list[dict[str, Any]]) -> str:
    """Each setting in a line: what its values have, which one is chosen and whether that is the profile's."""
    lines = []
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        own = [row for row in rows if (row["method"], row["setting"]) == (method, setting)]
        shown = ", ".join(f"{row['value']:g}: {100 * row['errors']:.1f} % ({row['fit_error']:.3f})" for row in own)
        taken = [f"chosen {row['value']:g}{', the default' * row['default']}" for row in own if row["chosen"]]
        lines.append(f"{setting} of {method}: {shown}; {taken[0] if taken else 'not finished'}")
    return "\n".join(["errors on val (fit error) by value", *lines])
