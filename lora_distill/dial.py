"""The command `dial`: guidance without its second pass, three ways to distil it, at many guidance scales.

The paper's student is trained for one w. Here its weight is scaled to serve others, and beside it stand guidance dials,
whose weight was trained to be w, students on the teacher's own trajectories, and guidance itself. All are judged on the
val split alone, on the same prompts and noise, each seed of the noise with a training of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from lora_distill import processes
from lora_distill.adapters import role
from lora_distill.data.captioned import bundled_scenes
from lora_distill.data.teacher import teacher_for
from lora_distill.data.trajectories import Trajectories, trajectories_for
from lora_distill.deployment import deployed
from lora_distill.errors import InputError
from lora_distill.judge import paired
from lora_distill.judge.judge import FD, Judge, Quality, judge_for
from lora_distill.judge.metrics import decibels
from lora_distill.judge.paired import Contrast, Draws, Judged
from lora_distill.memory.bench import Data, Method, in_turns, lora_guidance, lora_on_trajectories
from lora_distill.pipeline import pipeline_for
from lora_distill.sampling import multi_step
from lora_distill.settings import Settings
from lora_distill.storage import device_name, git_commit
from lora_distill.train import recipes

Rows = list[dict[str, Any]]
SPLIT, PROMPTS = "val", 64  # what all is judged on; prompts a multiple of 4
SEEDS = (0, 1, 2)  # of noise and of training
SCALES = (1.5, 3.0, 5.0, 7.5)
RANKS = (1, 16)  # of further dials, beside the settings' own; of each one training, for the first seed
LONGER = 1.8  # times the paper's updates that a student on trajectories makes in about the same seconds
ROUNDS, MINUTES = 20, 2.0  # of timing two steps of each training
GUIDANCE = "guidance, two passes"
SCALED, DIAL, RECORDED_DIAL = "paper's student, scaled", "dial", "dial on trajectories"
PAPER, RECORDED = "paper's student", "on trajectories"
EQUAL_SECONDS = f"on trajectories, {LONGER:g} times the updates"


@dataclass
class Study:
    """What all trainings share: pipeline, teacher and judge, made when needed, with the run's caches."""

    settings: Settings
    folder: Path
    prompts: int = PROMPTS
    seeds: tuple[int, ...] = SEEDS
    trained: dict[str, list[dict]] = field(default_factory=dict)  # log of each adapter's training

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @cached_property
    def pipe(self) -> StableDiffusionPipeline:
        return pipeline_for(self.settings)

    @cached_property
    def noised(self) -> dict[str, Tensor]:
        return teacher_for(self.pipe, self.settings, self.cache)

    @cached_property
    def recorded(self) -> Trajectories:
        return trajectories_for(self.pipe, self.settings, self.cache)

    @cached_property
    def judge(self) -> Judge:
        return judge_for(self.pipe, self.settings, self.settings.data, SPLIT, self.prompts, "all", self.cache)

    @cached_property
    def strata(self) -> np.ndarray:
        """The number of objects of each prompt, which prompts are drawn within."""
        return np.array([len(scene.objects) for scene in self.judge.prompts.scenes])

    def draws(self, seeds: int, resamples: int = paired.RESAMPLES) -> Draws:
        return paired.draws(self.strata, seeds, resamples)

    # ------------------------------------------------------------------------------------------ training

    def train(
        self, name: str, recipe: Callable[..., list[dict]], teacher: Any, trainings: int | None = None, **changes: Any
    ) -> list[str]:
        """Train an adapter for each seed, or for the first ones; return their names."""
        names = []
        for seed in self.seeds[:trainings]:
            adapter = f"{name}_{seed}"
            settings = self.settings.model_copy(update={**changes, "seed": seed})
            self.trained[adapter] = recipe(self.pipe, teacher, settings, self.folder / "dial", adapter)
            names.append(adapter)
        return names

    # ------------------------------------------------------------------------------------------ judging

    def guided(self, w: float) -> list[Quality]:
        """Guidance itself, a judgement for every seed of the noise."""
        ready = deployed(self.pipe, None, self.cache)
        return [self.judge(multi_step(self.settings, w), seed, ready) for seed in self.seeds]

    def one_pass(self, adapters: list[str], w: float) -> list[Quality]:
        """One pass a step, with the weight that stands for w: for every adapter, on the noise of its own seed."""
        weight, found = (w - 1) / (self.settings.guidance_scale - 1), []
        for seed, adapter in zip(self.seeds, adapters, strict=False):
            with role(self.pipe.unet, adapter, weight):
                ready = deployed(self.pipe, adapter, self.cache)
                found.append(self.judge(multi_step(self.settings), seed, ready))
        return found


def run(settings: Settings, folder: Path, prompts: int = PROMPTS, seeds: tuple[int, ...] = SEEDS) -> tuple[Rows, Rows]:
    """Train and judge all; return the rows of the dial's table and those of the trajectories'.

    What was trained or drawn before is read again. Raises InputError for photographs, whose objects nobody counts, for
    a profile without guidance and for several processes, whose steps would be timed together.
    """
    if processes.count() > 1:
        raise InputError("dial: expected one process; distill trains a dial with several")
    if settings.guidance_scale == 1:
        raise InputError("guidance_scale: a dial's w0 must be above 1, which is no guidance")
    if not (bundled_scenes(settings.data) or settings.data == "scenes"):
        raise InputError(f"profile {settings.profile}: dials are judged on scenes, for their errors can be counted")
    study = Study(settings, folder, prompts, seeds)
    rank, updates = settings.lora_rank, settings.train_steps
    paper = study.train("paper", recipes.distil_lora, study.noised)
    recorded = study.train("recorded", recipes.distil_on_trajectories, study.recorded)
    longer = {"train_steps": round(LONGER * updates)}
    same_seconds = study.train("longer", recipes.distil_on_trajectories, study.recorded, **longer)
    methods = {
        SCALED: (rank, paper),
        DIAL: (rank, study.train("dial", recipes.distil_dial, study.noised)),
        RECORDED_DIAL: (rank, study.train("recorded_dial", recipes.distil_dial, study.recorded)),
    }
    for other in sorted(set(RANKS) - {rank}):
        changes = {"lora_rank": other, "lora_alpha": other}
        adapters = study.train(f"rank_{other}", recipes.distil_dial, study.recorded, trainings=1, **changes)
        methods[f"{RECORDED_DIAL}, rank {other}"] = other, adapters
    dial_rows = list(_dial_rows(study, methods))
    students = {PAPER: paper, RECORDED: recorded, EQUAL_SECONDS: same_seconds}
    return dial_rows, _trajectory_rows(study, students)


# ---------------------------------------------------------------------------------------------- tables


def _dial_rows(study: Study, methods: dict[str, tuple[int, list[str]]]) -> Iterator[dict[str, Any]]:
    """A row a method and w: what it draws, and how near it is to guidance itself on the same noise."""
    cells = tqdm(total=len(SCALES) * (1 + len(methods)), desc="judging", mininterval=2)
    for w in SCALES:
        teacher = study.guided(w)
        guidance = paired.judged(teacher)
        yield _row(study, GUIDANCE, w, guidance, guidance, None)
        cells.update()
        for name, (rank, adapters) in methods.items():
            same_noise = teacher[: len(adapters)]
            ours = paired.judged(study.one_pass(adapters, w), len(adapters), same_noise)
            yield _row(study, name, w, ours, paired.judged(same_noise), rank)
            cells.update()
    cells.close()


def _row(study: Study, name: str, w: float, ours: Judged, guidance: Judged, rank: int | None) -> dict[str, Any]:
    seeds, settings = len(ours.features), study.settings
    drawn, few = study.draws(seeds), study.draws(seeds, paired.DISTANCE_RESAMPLES)
    itself, reference = ours is guidance, np.asarray(study.judge.reference.frechet)
    weight = None if itself else (w - 1) / (settings.guidance_scale - 1)
    distances = paired.drawn_frechet(ours.features, reference, few)
    row = {"method": name, "w": w, "weight": weight, "rank": rank, "passes_a_step": 2 if itself else 1}
    row |= _interval("errors", _mean(~ours.right, drawn))
    row |= _interval("fit_error", _mean(ours.fit_error, drawn)) | {FD: float(distances[0])}
    if not itself:
        ratio = paired.errors_ratio(~ours.right, ~guidance.right, drawn)
        row |= _interval("errors_of_guidance_times", ratio) | _interval("psnr_db", _psnr(ours.squared_error, drawn))
        gap = paired.distance_ratio(distances, paired.drawn_frechet(guidance.features, reference, few))
        row |= _interval("fd_of_guidance_times", gap)
        row["fd_to_guidance"] = float(paired.drawn_frechet(ours.features, guidance.features, study.draws(seeds, 0))[0])
    return row | _made(study, ours)


def _trajectory_rows(study: Study, students: dict[str, list[str]]) -> Rows:
    """A row a student at its own w: updates and seconds of training, fidelity to the teacher, and what the paper's has.

    Differences are against the paper's student, with paired intervals.
    """
    w, seeds = study.settings.guidance_scale, len(study.seeds)
    drawn, few = study.draws(seeds), study.draws(seeds, paired.DISTANCE_RESAMPLES)
    teacher = study.guided(w)
    features = paired.judged(teacher).features
    found = {name: paired.judged(study.one_pass(a, w), len(a), teacher) for name, a in students.items()}
    to_teacher = {name: paired.drawn_frechet(ours.features, features, few) for name, ours in found.items()}
    rows, theirs, rates = [], found[PAPER], _rates(study)
    for name, ours in found.items():
        row = {"method": name, "w": w, **_training(study, name, students[name], rates)}
        row |= _interval("errors", _mean(~ours.right, drawn)) | _interval("psnr_db", _psnr(ours.squared_error, drawn))
        row["fd_to_teacher"] = float(to_teacher[name][0])
        if name != PAPER:
            row |= _interval("errors_times", paired.errors_ratio(~ours.right, ~theirs.right, drawn))
            gain = paired.psnr_difference(ours.squared_error, theirs.squared_error, drawn)
            row |= _interval("psnr_gain_db", gain)
            row |= _interval("fd_to_teacher_gain", paired.distance_difference(to_teacher[name], to_teacher[PAPER]))
        rows.append(row | _made(study, ours))
    return rows


def _training(study: Study, name: str, adapters: list[str], rates: dict[str, float]) -> dict[str, Any]:
    """Updates of a training, its images a second and the seconds that follow."""
    updates, rate = max(row["step"] for row in study.trained[adapters[0]]), rates[name]
    seconds = updates * study.settings.gradient_accumulation * study.settings.batch_size / rate
    return {"updates": updates, "images_per_s": round(rate, 2), "training_seconds": round(seconds, 1)}


def _rates(study: Study) -> dict[str, float]:
    """Images a second of the students' training steps, timed in turns: the trainings themselves ran at other times."""
    settings = study.settings
    methods = {build: Method("", "", build) for build in (lora_guidance, lora_on_trajectories)}
    with TemporaryDirectory() as folder:
        timed, _ = in_turns(list(methods.values()), Data(study.pipe, settings, Path(folder)), ROUNDS, MINUTES)
    paper, recorded = (median(seconds for seconds, _ in timed[method]) for method in methods.values())
    size = settings.batch_size
    return {PAPER: size / paper, RECORDED: size / recorded, EQUAL_SECONDS: size / recorded}


def _made(study: Study, ours: Judged) -> dict[str, Any]:
    """How a row came about: N, seeds, sampler and machine."""
    settings = study.settings
    made = {"split": SPLIT, "n": study.prompts, "seeds": len(ours.features), "trainings": ours.trainings}
    made |= {"w0": settings.guidance_scale, "train_steps": settings.train_steps, "batch_size": settings.batch_size}
    made |= {"teacher_images": settings.teacher_images, "sampling_steps": settings.sampling_steps}
    made |= {"batch": settings.eval_batch, "dtype": settings.dtype, "device": device_name(settings.device)}
    return made | {"commit": git_commit()}


def _mean(values: np.ndarray, drawn: Draws) -> Contrast:
    """A mean over seeds and prompts, with its 95 % interval."""
    low, high = np.quantile(paired.drawn_means(values, drawn), [0.025, 0.975])
    return Contrast(float(values.mean()), float(low), float(high))


def _psnr(squared_error: np.ndarray, drawn: Draws) -> Contrast:
    mean = _mean(squared_error, drawn)
    return Contrast(*(decibels(np.array([each])) for each in (mean.value, mean.high, mean.low)))


def _interval(name: str, found: Contrast) -> dict[str, float]:
    rounded = [float(f"{each:.5g}") for each in found]
    return dict(zip((name, f"{name}_low", f"{name}_high"), rounded, strict=True))


def in_words(dial_rows: Rows, trajectory_rows: Rows) -> str:
    """Both tables in lines."""
    lines = ["errors and PSNR to guidance by w, on val"]
    for name in dict.fromkeys(row["method"] for row in dial_rows):
        cells = [
            f"{row['w']:g}: {100 * row['errors']:.1f} %" + (f", {row['psnr_db']:.1f} dB" if row["weight"] else "")
            for row in dial_rows
            if row["method"] == name
        ]
        lines.append(f"  {name}: " + "; ".join(cells))
    lines.append("students of one w")
    for row in trajectory_rows:
        rate = f"{row['updates']} updates at {row['images_per_s']:.0f} images/s, {row['training_seconds']:.0f} s"
        lines.append(f"  {row['method']}: {rate}; {row['psnr_db']:.2f} dB, errors {100 * row['errors']:.1f} %")
    return "\n".join(lines)
