"""The tables of notebooks 02 to 04: rows as they stand in the CSV files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lora_distill.data.teacher import Prompts
from lora_distill.judge.by_objects import ALL, predictions, right_rows
from lora_distill.judge.features import LAYERS, Features
from lora_distill.judge.judge import (
    COLUMNS,
    EXTRACTOR,
    FD,
    Judge,
    Method,
    Quality,
    deviation,
    distance_floor,
    held_out,
    load_images,
)
from lora_distill.judge.metrics import (
    Aligner,
    FrechetDistance,
    Proportion,
    Score,
    aligner,
    compare,
    fidelity,
    inception_score,
    psnr,
)
from lora_distill.judge.pictures import Pictures
from lora_distill.sampling import unet_passes
from lora_distill.settings import Settings, figures_dir, run_dir
from lora_distill.storage import read_table

IS_SPLITS = 2  # of the inception score: few, for the sets are small
TEACHER, BASE = "teacher, two passes", "base, guided"  # what the students of notebooks 02 and 03 are measured against


# ---------------------------------------------------------------------------------------------- curves


def guidance_rows(
    judged: dict[float, Quality],
    judge: Judge,
    teacher_scale: float,
    caption_error: float | None = None,
    calibration: dict[str, float] | None = None,
) -> list[dict]:
    """What counts, fit error and distance, with intervals, at each guidance scale: a row a number of objects.

    Distances are of all prompts together, and `calibration` says beside them what they mean. `predicted` is, at w = 1,
    what the errors of the training captions alone would leave right, where the pipeline says how many there are.
    """
    predicted, rows = predictions(caption_error, judge.prompts), []
    for w, quality in judged.items():
        distance = _distance(quality, judge)
        for row in right_rows(quality, judge.prompts):
            beside = {**distance, **(calibration or {})}
            beside = beside if row["objects"] == ALL else dict.fromkeys(beside)
            row = {"guidance_scale": w, **row} | ({} if quality.verdicts else _counted(quality)) | beside
            if predicted:
                row["predicted"] = predicted[row["objects"]] if w == 1 else None
            rows.append(row | {"teacher_guidance_scale": teacher_scale})
    return rows


def milestone_rows(logs: dict[str, list[dict]], teacher: Quality, judge: Judge) -> list[dict]:
    """What counts, fit error and distance at the milestones of each training; the teacher has no step."""
    reference, counted = _distance(teacher, judge), _counted(teacher)
    clean = {"fit_error": teacher.alignment["fit_error"].value} if teacher.verdicts else {}
    rows = [
        {"method": method, "step": entry["step"], **_counted_in(entry, counted, len(judge.prompts)),
         **({"fit_error": entry["fit_error"]} if clean else {}), **dict.fromkeys(reference), FD: entry[FD]}
        for method, log in logs.items() for entry in log if FD in entry
    ]  # fmt: skip
    return [*rows, {"method": TEACHER, "step": None, **counted, **clean, **reference}]


def _counted(quality: Quality) -> dict[str, float | int | None]:
    """The columns of what counts of one judgement: the value, its interval and N; of a distance alone only N."""
    if not quality.key:
        return {"n": len(quality.images)}
    return {quality.column: quality.counted.value, **quality.counted.columns}


def _counted_in(entry: dict, counted: dict, count: int) -> dict[str, float | int | None]:
    """The same columns of a measurement in a log, which holds values alone: of a share the interval follows from N."""
    column = next(iter(counted))
    if column == "n":
        return {"n": count}
    share = column in (COLUMNS["all"], COLUMNS["content"])
    value = Proportion(entry[column], count) if share else Score(column, entry[column], count)
    return {column: value.value, **value.columns}


def loss_rows(logs: dict[str, list[dict]]) -> list[dict]:
    """The loss of each training against its steps."""
    return [
        {"method": method, "step": entry["step"], "loss": entry["loss"]}
        for method, log in logs.items()
        for entry in log
        if "loss" in entry
    ]


def _distance(quality: Quality, judge: Judge) -> dict[str, float]:
    low, high = judge.distance_interval(quality)
    return {FD: quality.frechet_distance, f"{FD}_low": low, f"{FD}_high": high}


# ---------------------------------------------------------------------------------------------- quality


def quality_rows(
    judged: dict[str, list[Quality]],
    methods: dict[str, Method],
    judge: Judge,
    calibration: dict[str, float],
    baseline: str = "",
) -> list[dict]:
    """A row a method of `judge_methods`: means over its seeds, and trainings where it has several; spread as deviation.

    The alignment is the judge's, with its interval over prompts and seeds; where it is the content of scenes, their
    style stands apart. `calibration` says what distances mean. Fidelity is to the images of `baseline` of the same
    noise, where one is named.
    """
    rows = []
    for name, qualities in judged.items():
        method = methods[name]
        distance = [quality.frechet_distance for quality in qualities]
        passes = {"unet_passes": unet_passes(method.pipe, method.sampler)}
        row = {"method": name} | ({} if baseline else passes)
        row |= {"n": len(judge.prompts), "seeds": len(qualities), "trainings": len(method.trainings)}
        row |= {"reference_n": len(judge.reference)}
        row |= {**_aligned([quality.alignment for quality in qualities], judge.key), **_per_image(qualities)}
        if judge.key == "content":
            row |= {"flickr_style_percent": np.mean([100 * quality.alignment["style"].value for quality in qualities])}
        row |= {FD: np.mean(distance), f"{FD}_sd": deviation(distance), **calibration}
        row |= {"psnr_to_teacher_db": _mean_psnr(qualities, judged[baseline]), **passes} if baseline else {}
        rows.append(_rounded(row))
    return rows


def _aligned(alignments: list[dict[str, Proportion | Score]], key: str, name: str = "") -> dict[str, float | None]:
    """Mean and deviation of the alignment that counts over seeds, shares in per cent; nothing where there is none.

    Shares are in the columns `name`_percent and `name`_sd, by default those of the attribute that counts.
    """
    if not key:
        return {}
    values = [alignment[key].value for alignment in alignments]
    if key == "clip":
        return {COLUMNS[key]: np.mean(values), f"{COLUMNS[key]}_sd": deviation(values)}
    name, shares = name or COLUMNS[key], [100 * value for value in values]
    return {f"{name}_percent": np.mean(shares), f"{name}_sd": deviation(shares)}


def _per_image(qualities: list[Quality]) -> dict[str, float]:
    """Of scenes, from images: the interval of the share that is right, the share of objects, and the fit error."""
    if qualities[0].verdicts is None:
        return {}
    low, high = Proportion.clustered(np.stack([quality.right for quality in qualities])).interval
    errors = [np.mean(quality.fit_error) for quality in qualities]
    return {
        "low_percent": 100 * low,
        "high_percent": 100 * high,
        "objects_percent": 100 * np.mean([quality.object_share for quality in qualities]),
        "fit_error": np.mean(errors),
        "fit_error_sd": deviation(errors),
    }


def _mean_psnr(qualities: list[Quality], teacher: list[Quality]) -> float | None:
    pairs = zip(qualities, teacher, strict=True)
    return None if qualities is teacher else np.mean([psnr(q.images, t.images) for q, t in pairs])


def _rounded(row: dict) -> dict:
    """A row with six decimals, far more than is ever shown, so that nothing is rounded twice; no negative zero."""
    return {name: round(float(v), 6) + 0.0 if isinstance(v, float) else v for name, v in row.items()}


# ---------------------------------------------------------------------------------------------- more measures


class ImageSet(NamedTuple):
    """What a notebook left to measure: images (n, h, w, 3) uint8 of each method and seed, and its table's rows."""

    images: dict[str, list[np.ndarray | Pictures]]
    rows: dict[str, dict]  # of the notebook's table of quality, by method
    prompts: Prompts
    reference: np.ndarray | Pictures  # real images (n, h, w, 3) uint8
    align: Aligner
    key: str  # the alignment that counts; "" where there is none
    baseline: str  # the method that fidelity is to


def image_sets(settings: Settings, device: str = "cpu") -> dict[str, ImageSet]:
    """The images of notebooks 02 and 03 by the name of their set. Raises FileNotFoundError where one was not run."""
    folder, results = run_dir(settings), figures_dir(settings)
    sets = {}
    for name, notebook, source, key, baseline in (
        ("guided distillation", "02_guided_distillation", settings.data, "all", TEACHER),
        ("few steps", "03_lcm_lora_flickr", settings.flickr_8k, "content", BASE),
    ):
        images = load_images(folder, notebook)
        rows = {row["method"]: row for row in read_table(results / f"{notebook[:2]}_quality.csv")}
        prompts, reference = held_out(source, "test", settings.eval_prompts, settings)
        align = aligner(prompts, settings.clip, device, settings.eval_batch)
        key = key if prompts.scenes else "clip" if settings.clip else ""
        sets[name] = ImageSet(images, rows, prompts, reference, align, key, baseline)
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
        measured = _means([_measures(one, judge, seed) for one in features[method]])
        alignment = _aligned([found.align(images).scores for images in seeds], found.key, "alignment")
        row = {"set": name, "method": method, "n": len(seeds[0]), "seeds": len(seeds)}
        row |= {"trainings": found.rows[method]["trainings"], "reference_n": len(judge.reference)}
        row |= {"unet_passes": found.rows[method]["unet_passes"]}
        row |= {**alignment, **{column: measured.pop(column) for column in (FD, f"{FD}_sd")}}
        row |= {f"{FD}_floor": floor, **measured, **_likeness(method, found, features)}
        rows.append(_rounded(row))
    return rows


def _measures(features: Features, judge: FrechetDistance, seed: int) -> dict[str, float]:
    """All measures of the features of one seed's images, by column."""
    scores = compare(features, judge.reference, seed=seed)
    scores[f"IS-{EXTRACTOR}"] = inception_score(features, splits=IS_SPLITS)
    named = (("fd", "FD"), ("kid", "KID"), ("is", "IS"), ("precision", "precision"), ("recall", "recall"))
    return {f"{column}_efficientnet_lite0": scores[f"{measure}-{EXTRACTOR}"].value for column, measure in named}


def _means(measured: list[dict[str, float]]) -> dict[str, float]:
    """Means and deviations over seeds, in the columns `name` and `name_sd`."""
    row = {}
    for column in measured[0]:
        values = [one[column] for one in measured]
        row |= {column: np.mean(values), sd_column(column): deviation(values)}
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
    """The slides' Figure 2 and ours beside it: the guided teacher and LCM-LoRA as deployed, one image, one thread."""
    one = min(row["batch"] for row in times)
    here = {row["method"]: row for row in times if row["deployed"] and (row["threads"], row["batch"]) == (1, one)}
    fast = next(row["seconds_an_image"] for method, row in here.items() if method.startswith("LCM-LoRA "))
    base = here[TEACHER]["seconds_an_image"]
    return [
        {"source": f"{source}, {seconds['base'] / seconds['LCM-LoRA']:.1f} times", "method": method, "seconds": value}
        for source, seconds in (("slides", SLIDES_SECONDS), ("here", {"base": base, "LCM-LoRA": fast}))
        for method, value in seconds.items()
    ]


UNTRAINED = ("half guided", "no guidance")


def front_rows(curves: list[dict], sets: dict[str, ImageSet], solver: str) -> list[dict]:
    """Content against UNet passes of every method: `few_steps.passes_rows` of all prompts, and points of one seed.

    The points are of methods that the curves lack, of sets whose alignment is the curves'. `solver` is the name of the
    multi-step sampler: the teacher is the last point of its guided curve.
    """
    guided, single = f"{solver}, guided", f"{solver}, one pass"
    counted = next(name for name in COLUMNS.values() if name in curves[0])
    kept = ("method", "unet_passes", counted, "low", "high", "n", "trained")
    rows = [{name: row[name] for name in kept} for row in curves if row["objects"] == ALL]
    for row in rows:
        row["method"] = guided if row["method"] == "teacher" else row["method"]
    there = {row["method"] for row in rows}
    for found in sets.values():
        names = _front_names(found)
        for method in (name for name, label in names.items() if name in found.images and label not in there):
            score = found.align(found.images[method][0]).scores.get("clip" if found.key == "clip" else "content")
            column = COLUMNS["clip" if found.key == "clip" else "content"]
            if score is not None and column == counted:
                label = single if method == "no guidance" else names[method]
                rows.append(
                    {"method": label, "unet_passes": found.rows[method]["unet_passes"], column: score.value,
                     **score.columns, "trained": method not in UNTRAINED}
                )  # fmt: skip
    return sorted(rows, key=lambda row: row["unet_passes"])


def _front_names(found: ImageSet) -> dict[str, str]:
    """The methods of a set that are points of the front, and their names there."""
    if found.baseline == TEACHER:
        return {name: name for name in ("LoRA student", "full copy", *UNTRAINED)}
    loras = [name for name in found.images if name.startswith("LCM-LoRA ")]
    tuned = [name for name in found.images if name.startswith("fine-tuned, rank ") and ", w = " not in name][-1:]
    return {"LCM": "LCM, all weights", **{name: name for name in (*loras[1:], *tuned)}}
