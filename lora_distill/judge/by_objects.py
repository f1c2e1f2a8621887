"""Judgements by the number of objects that a prompt asks for, and by whether training showed all of them there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_distill.data.scenes import COUNTS, KINDS
from lora_distill.data.teacher import Prompts
from lora_distill.errors import reading
from lora_distill.judge.judge import Method, Quality
from lora_distill.judge.metrics import Proportion, decibels, mean_score
from lora_distill.judge.pictures import squared_errors
from lora_distill.sampling import unet_passes
from lora_distill.shapes import BUNDLED

ALL = "all"


def strata(prompts: Prompts) -> dict[tuple[str, str], np.ndarray]:
    """Which prompts are of each number of objects, and of each composition: masks (n,), none of them empty.

    The numbers are "all" and "1" to "4", compositions "all", "seen" and "held out"; the prompts of photographs are all.
    """
    everything = np.ones(len(prompts), dtype=bool)
    if prompts.scenes is None:
        return {(ALL, ALL): everything}
    count, unseen = (np.array([getattr(scene, name) for scene in prompts.scenes]) for name in ("count", "unseen"))
    objects = {ALL: everything, **{str(n): count == n for n in COUNTS}}
    compositions = {ALL: everything, "seen": ~unseen, "held out": unseen}
    masks = {(n, name): of_n & of_name for n, of_n in objects.items() for name, of_name in compositions.items()}
    return {group: mask for group, mask in masks.items() if mask.any()}


def objects_of(prompts: Prompts) -> np.ndarray | None:
    """The number of objects of each prompt, (n,); None of photographs."""
    return None if prompts.scenes is None else np.array([scene.count for scene in prompts.scenes])


def error_rows(
    judged: dict[str, list[Quality]], methods: dict[str, Method], prompts: Prompts, baseline: str = ""
) -> list[dict]:
    """The errors of each method of `judge_methods`, a row a number of objects and composition.

    `errors` is the share of images that are not right in what counts, with its interval over prompts and seeds;
    `object_errors` is the share of objects that are not in their place. PSNR is to the images of `baseline` of the same
    noise. Of photographs there are no rows.
    """
    rows = []
    for name, qualities in judged.items():
        if qualities[0].verdicts is None:
            continue
        start = {"method": name, "unet_passes": unet_passes(methods[name].pipe, methods[name].sampler)}
        near = None if name == baseline or not baseline else _squared_errors(qualities, judged[baseline])
        for (objects, composition), mask in strata(prompts).items():
            row = {"objects": objects, "compositions": composition, **_errors(qualities, mask)}
            row |= {"psnr_to_teacher_db": None if near is None else decibels(near[:, mask])} if baseline else {}
            rows.append({**start, **row, "seeds": len(qualities), "trainings": len(methods[name].trainings)})
    return rows


def _squared_errors(qualities: Sequence[Quality], teacher: Sequence[Quality]) -> np.ndarray:
    """(seeds, prompts)."""
    return np.stack([squared_errors(q.images, t.images) for q, t in zip(qualities, teacher, strict=True)])


def _errors(qualities: Sequence[Quality], mask: np.ndarray) -> dict[str, float]:
    """The columns of errors of some of the prompts, over seeds; n is the number of prompts."""
    wrong = Proportion.clustered(np.stack([~quality.right[mask] for quality in qualities]))
    low, high = wrong.interval
    misplaced = 1 - float(np.mean([quality.object_share[mask] for quality in qualities]))
    row = {"errors": wrong.value, "low": low, "high": high, "n": int(mask.sum()), "object_errors": misplaced}
    return row | _fit_error([quality.fit_error[mask] for quality in qualities])


def _fit_error(values: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Mean and interval of the fit errors of each seed, (n,): over prompts, as their means over seeds are one each."""
    clean = mean_score("fit_error", np.mean(values, axis=0))
    return {"fit_error": clean.value, "fit_error_low": clean.low, "fit_error_high": clean.high}


def right_rows(quality: Quality, prompts: Prompts) -> list[dict]:
    """What is right in one judgement, and how clean, with intervals: a row a number of objects, "all" first."""
    if quality.verdicts is None:
        return [{"objects": ALL}]
    rows = []
    for (objects, composition), mask in strata(prompts).items():
        if composition == ALL:
            share = Proportion(float(quality.right[mask].mean()), int(mask.sum()))
            row = {"objects": objects, quality.column: share.value, **share.columns}
            rows.append(row | _fit_error([quality.fit_error[mask]]))
    return rows


# ---------------------------------------------------------------------------------------------- the captions' errors


def caption_error(pipeline: str) -> float | None:
    """The share of objects that the training captions of a pipeline name at random; None where it does not say."""
    path = (BUNDLED if pipeline == "bundled" else Path(pipeline)) / "training.json"
    if not path.is_file():
        return None
    with reading(path, "the record that pretrain writes beside a pipeline"):
        return json.loads(path.read_text(encoding="utf-8")).get("caption_error")


def predicted_right(error: float, objects: int) -> float:
    """The share of pictures that are right where a model draws what captions with this error say, and does it well.

    (1 - 23 p / 24)^n: an object that is named at random, with probability p, is the right one of 24 once in 24.
    """
    return (1 - error * (len(KINDS) - 1) / len(KINDS)) ** objects


def predictions(error: float | None, prompts: Prompts) -> dict[str, float | None]:
    """`predicted_right` for each number of objects of the prompts, and for "all" of them; none without an error."""
    if error is None or prompts.scenes is None:
        return {}
    each = np.array([predicted_right(error, n) for n in objects_of(prompts)])
    return {
        objects: float(each[mask].mean()) for (objects, composition), mask in strata(prompts).items()
        if composition == ALL
    }  # fmt: skip
