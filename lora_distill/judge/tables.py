"""The tables of notebooks 02 to 04: rows as they stand in the CSV files."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.judge.features import LAYERS, Features
from lora_distill.judge.judge import Judge, Method, Quality, distance_floor, drawn, held_out, load_images
from lora_distill.judge.metrics import (
    FrechetDistance,
    Proportion,
    compare,
    fidelity,
    inception_score,
    prompt_alignment,
    psnr,
)
from lora_distill.sampling import unet_passes
from lora_distill.settings import Settings, figures_dir, run_dir
from lora_distill.storage import read_table

EXTRACTOR, FD = "EfficientNet-Lite0", "fd_efficientnet_lite0"
IS_SPLITS = 2  # of the inception score: few, for the sets are small
TEACHER, BASE = "teacher, two passes", "base, guided"  # what the students of notebooks 02 and 03 are measured against


# ---------------------------------------------------------------------------------------------- curves


def guidance_rows(judged: dict[float, Quality], judge: Judge, teacher_scale: float) -> list[dict]:
    """Alignment and distance, with their intervals, at each guidance scale."""
    return [
        {"guidance_scale": w, "all_correct": quality.all_correct.value, **quality.all_correct.columns,
         **_distance(quality, judge), "teacher_guidance_scale": teacher_scale}
        for w, quality in judged.items()
    ]  # fmt: skip


def milestone_rows(logs: dict[str, list[dict]], teacher: Quality, judge: Judge) -> list[dict]:
    """Alignment and distance at the milestones of each training, and of the teacher, which has no step."""
    reference = _distance(teacher, judge)
    rows = [
        {"method": method, "step": entry["step"], "all_correct": entry["all_correct"],
         **Proportion(entry["all_correct"], len(judge.prompts)).columns,
         **dict.fromkeys(reference), FD: entry[FD]}
        for method, log in logs.items() for entry in log if "all_correct" in entry
    ]  # fmt: skip
    correct = teacher.all_correct
    last = {"method": TEACHER, "step": None, "all_correct": correct.value, **correct.columns, **reference}
    return [*rows, last]


def loss_rows(logs: dict[str, list[dict]]) -> list[dict]:
    """The loss of each training against its steps."""
    return [
        {"method": method, "step": entry["step"], "loss": entry["loss"]}
        for method, log in logs.items()
        for entry in log
        if "loss" in entry
    ]


def passes_rows(content: dict[str, dict[int, Proportion]], trained: Iterable[str]) -> list[dict]:
    """Content correct of each method at each number of UNet passes; `trained` names those that training made."""
    return [
        {"method": method, "unet_passes": passes, "content": share.value, **share.columns, "trained": method in trained}
        for method, points in content.items()
        for passes, share in points.items()
    ]


def mixture_rows(mixtures: dict[float, Quality]) -> list[dict]:
    """Every alignment of two adapters added up, by the weight of the second."""
    return [
        {"weight": weight} | {name: share.value for name, share in quality.alignment.items()}
        for weight, quality in mixtures.items()
    ]


def _distance(quality: Quality, judge: Judge) -> dict[str, float]:
    low, high = judge.distance_interval(quality)
    return {FD: quality.frechet_distance, f"{FD}_low": low, f"{FD}_high": high}


# ---------------------------------------------------------------------------------------------- quality


QUALITY = {
    "all": ("method", "n", "seeds", "trainings", "reference_n", "all_correct_percent", "all_correct_sd",
            FD, f"{FD}_sd", f"{FD}_floor", "psnr_to_teacher_db", "unet_passes"),
    "content": ("method", "unet_passes", "n", "seeds", "trainings", "reference_n", "content_percent", "content_sd",
                "flickr_style_percent", FD, f"{FD}_sd", f"{FD}_floor"),
}  # fmt: skip


def quality_rows(
    judged: dict[str, list[Quality]], methods: dict[str, Method], judge: Judge, floor: float | None, key: str
) -> list[dict]:
    """A row a method of `judge_methods`: means over its seeds, and trainings where it has several; spread as deviation.

    `key` is the alignment that counts: "all" of notebook 02, where fidelity is to the teacher's images of the same
    noise, or "content" of notebook 03, where the style stands apart.
    """
    rows = []
    for name, qualities in judged.items():
        sampler, pipe, adapters = methods[name]
        share = [100 * quality.alignment[key].value for quality in qualities]
        style = [100 * quality.alignment["style"].value for quality in qualities if "style" in quality.alignment]
        distance = [quality.frechet_distance for quality in qualities]
        short = {"all": "all_correct", "content": "content"}[key]
        row = {"method": name, "unet_passes": unet_passes(pipe, sampler), "n": len(judge.prompts)}
        row |= {"seeds": len(qualities), "trainings": len(adapters), "reference_n": len(judge.reference)}
        row |= {f"{short}_percent": np.mean(share), f"{short}_sd": np.std(share)}
        row |= {"flickr_style_percent": np.mean(style) if style else None}
        row |= {FD: np.mean(distance), f"{FD}_sd": np.std(distance), f"{FD}_floor": floor}
        row |= {"psnr_to_teacher_db": _mean_psnr(qualities, judged[TEACHER]) if key == "all" else None}
        rows.append(_rounded({column: row[column] for column in QUALITY[key]}, digits=2))
    return rows


def _mean_psnr(qualities: list[Quality], teacher: list[Quality]) -> float | None:
    pairs = zip(qualities, teacher, strict=True)
    return None if qualities is teacher else np.mean([psnr(q.images, t.images) for q, t in pairs])


def _rounded(row: dict, digits: int) -> dict:
    """A row with its floats rounded, and no negative zero among them."""
    return {name: round(float(v), digits) + 0.0 if isinstance(v, float) else v for name, v in row.items()}


# ---------------------------------------------------------------------------------------------- more measures


class ImageSet(NamedTuple):
    """What a notebook left to measure: images (n, h, w, 3) uint8 of each method and seed, and its table's rows."""

    images: dict[str, list[np.ndarray]]
    rows: dict[str, dict]  # of the notebook's table of quality, by method
    prompts: Prompts
    reference: np.ndarray  # real images (n, h, w, 3) uint8
    key: str  # the alignment that counts
    baseline: str  # the method that fidelity is to


def image_sets(settings: Settings) -> dict[str, ImageSet]:
    """The images of notebooks 02 and 03 by the name of their set. Raises FileNotFoundError where one was not run."""
    folder, results = run_dir(settings), figures_dir(settings)
    scenes = (
        scene_prompts(settings.style, "test", settings.eval_prompts, settings.seed),
        drawn(settings.style, "test", 1000, settings.seed + 1),
    )
    captioned = held_out(settings.flickr_8k, "test", settings.eval_prompts, settings)
    sets = {}
    for name, notebook, held, key, baseline in (
        ("guided distillation", "02_guided_distillation", scenes, "all", TEACHER),
        ("few steps", "03_lcm_lora_flickr", captioned, "content", BASE),
    ):
        images = load_images(folder, notebook)
        rows = {row["method"]: row for row in read_table(results / f"{notebook[:2]}_quality.csv")}
        sets[name] = ImageSet(images, rows, *held, key, baseline)
    return sets


def measure_rows(
    name: str, found: ImageSet, seed: int, device: str = "cpu", cache_dir: Path | None = None
) -> list[dict]:
    """Every measure on the bundled extractor, a row a method of the set `name`: means and deviations over seeds."""
    judge = FrechetDistance(found.reference, device, layers=LAYERS[EXTRACTOR], cache_dir=cache_dir)
    floor = distance_floor(judge, found.prompts, seed + 2)
    features = {method: [judge.features(images) for images in seeds] for method, seeds in found.images.items()}
    rows = []
    for method, seeds in found.images.items():
        pairs = zip(seeds, features[method], strict=True)
        measured = _means([_measures(*pair, found, judge, seed) for pair in pairs])
        row = {"set": name, "method": method, "n": len(seeds[0]), "seeds": len(seeds)}
        row |= {"trainings": found.rows[method]["trainings"], "reference_n": len(judge.reference)}
        row |= {"unet_passes": found.rows[method]["unet_passes"]}
        row |= {column: measured.pop(column) for column in ("alignment_percent", "alignment_sd", FD, f"{FD}_sd")}
        row |= {f"{FD}_floor": floor, **measured, **_likeness(method, found, features)}
        rows.append(_rounded(row, digits=4))
    return rows


def _measures(
    images: np.ndarray, features: Features, found: ImageSet, judge: FrechetDistance, seed: int
) -> dict[str, float | None]:
    """All measures of the images of one seed, by column; no alignment for photographs."""
    scores = compare(features, judge.reference, seed=seed)
    scores[f"IS-{EXTRACTOR}"] = inception_score(features, splits=IS_SPLITS)
    scenes = found.prompts.scenes
    alignment = 100 * prompt_alignment(images, scenes)[found.key].value if scenes else None
    named = (("fd", "FD"), ("kid", "KID"), ("is", "IS"), ("precision", "precision"), ("recall", "recall"))
    columns = {f"{column}_efficientnet_lite0": scores[f"{measure}-{EXTRACTOR}"].value for column, measure in named}
    return {"alignment_percent": alignment, **columns}


def _means(measured: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means and deviations over seeds, in the columns `name` and `name_sd`."""
    row = {}
    for column, first in measured[0].items():
        values = None if first is None else [one[column] for one in measured]
        row |= {column: values and np.mean(values), sd_column(column): values and np.std(values)}
    return row


def sd_column(column: str) -> str:
    """The column of a mean's standard deviation."""
    return f"{column.removesuffix('_percent')}_sd"


def _likeness(method: str, found: ImageSet, features: dict[str, list[Features]]) -> dict[str, float | None]:
    """How near a method's images are to the baseline's of the same noise: means over seeds; nothing of itself."""
    measures = {"psnr_to_teacher_db": "PSNR to teacher", f"{FD}_to_teacher": f"FD-{EXTRACTOR} to teacher"}
    if method == found.baseline:
        return dict.fromkeys(measures)
    seeds = zip(
        found.images[method], found.images[found.baseline], features[method], features[found.baseline], strict=True
    )
    near = [fidelity(*seed) for seed in seeds]
    return {column: np.mean([one[measure].value for one in near]) for column, measure in measures.items()}


# ---------------------------------------------------------------------------------------------- figures of notebook 04


SLIDES_FID = {"base": None, "LoRA fine-tune (8k)": None, "LCM-LoRA 8k": 26.95, "LCM-LoRA 30k": 24.85}  # None: lost
SLIDES_SECONDS = {"base": 2.07, "LCM-LoRA": 0.86}


def distance_rows(measured: list[dict]) -> list[dict]:
    """The slides' Figure 1 and ours beside it: the distance of each method, of the `measure_rows` of few steps."""
    unknown = {"sd": None, "floor": None, "metric": "FID", "n": None, "seeds": None}
    slides = [{"source": "slides", "method": name, "distance": fid, **unknown} for name, fid in SLIDES_FID.items()]
    here = [
        {"source": "here", "method": row["method"], "distance": row[FD], "sd": row[f"{FD}_sd"],
         "floor": row[f"{FD}_floor"], "metric": f"FD-{EXTRACTOR}", "n": row["n"], "seeds": row["seeds"]}
        for row in measured
    ]  # fmt: skip
    return slides + here


def speed_rows(times: list[dict]) -> list[dict]:
    """The slides' Figure 2 and ours beside it: the guided teacher and LCM-LoRA as deployed, on one thread."""
    here = {row["method"]: row for row in times if row["deployed"] and row["threads"] == 1}
    base, fast = here[TEACHER]["seconds_an_image"], here["LCM-LoRA 8k"]["seconds_an_image"]
    return [
        {"source": f"{source}, {seconds['base'] / seconds['LCM-LoRA']:.1f} times", "method": method, "seconds": value}
        for source, seconds in (("slides", SLIDES_SECONDS), ("here", {"base": base, "LCM-LoRA": fast}))
        for method, value in seconds.items()
    ]


FRONT = {
    "guided distillation": {"LoRA student": "LoRA student", "full copy": "full copy", "half guided": "half guided",
                            "no guidance": "DDIM, one pass"},
    "few steps": {"LCM": "LCM, all weights", "LCM-LoRA 30k": "LCM-LoRA 30k",
                  "fine-tuned, rank 16": "fine-tuned, rank 16"},
}  # fmt: skip


def front_rows(curves: list[dict], sets: dict[str, ImageSet]) -> list[dict]:
    """Content against UNet passes of every method: the `passes_rows` of notebook 03, and points of one seed.

    The points are of methods that the curves lack, by the name of their curve in FRONT; photographs have none.
    """
    rows = [{**row, "method": "DDIM, guided" if row["method"] == "teacher" else row["method"]} for row in curves]
    for name, methods in FRONT.items():
        found = sets[name]
        for method, label in methods.items():
            if found.prompts.scenes and method in found.images:
                share = prompt_alignment(found.images[method][0], found.prompts.scenes)["content"]
                passes = found.rows[method]["unet_passes"]
                trained = label not in ("half guided", "DDIM, one pass")
                rows += passes_rows({label: {passes: share}}, [label] if trained else [])
    return sorted(rows, key=lambda row: row["unet_passes"])
