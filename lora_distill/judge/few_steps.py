"""The tables of notebook 03: few steps, the number of objects, style and speed. Rows as they stand in the CSV files."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_distill.data.teacher import Prompts
from lora_distill.judge.by_objects import ALL, error_rows, right_rows, strata
from lora_distill.judge.judge import COLUMNS, FD, Method, Quality
from lora_distill.judge.tables import BASE

MIXTURE = "fine-tune + LCM-LoRA "  # the name of two adapters added up, before the name of the set


def passes_rows(
    judged: Mapping[str, Mapping[int, Quality]],
    prompts: Prompts,
    trained: Iterable[str],
    calibration: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Each method at each number of UNet passes, of all prompts and by their number of objects.

    What counts and the fit error with their intervals, and of all prompts the distance. `trained` names the methods
    that training made; `calibration` has columns that say what a distance means.
    """
    trained = set(trained)
    return [
        {"method": method, "unet_passes": passes, **part, **calibration, "trained": method in trained}
        for method, points in judged.items()
        for passes, quality in points.items()
        for part in _parts(quality, prompts)
    ]


def _parts(quality: Quality, prompts: Prompts) -> list[dict[str, Any]]:
    """One judgement of all prompts, and by number of objects; of photographs no fit error."""
    if quality.right is None:
        whole = {quality.column: quality.counted.value, **quality.counted.columns}
        return [{"objects": ALL, **whole, "fit_error": None, FD: quality.frechet_distance}]
    distance = {ALL: quality.frechet_distance}
    return [{**row, FD: distance.get(row["objects"])} for row in right_rows(quality, prompts)]


def style_rows(
    judged: Mapping[str, Sequence[Quality]], methods: dict[str, Method], prompts: Prompts
) -> list[dict[str, Any]]:
    """The `error_rows` of a verdict and beside them the shares in the set's style, and right in content and style."""
    masks = strata(prompts)
    return [
        {**row, **_styles(judged[row["method"]], masks[row["objects"], row["compositions"]])}
        for row in error_rows(judged, methods, prompts)
    ]


def _styles(qualities: Sequence[Quality], mask: np.ndarray) -> dict[str, float]:
    shares = (np.mean([quality.verdicts.right[name][mask] for quality in qualities]) for name in ("style", "all"))
    return dict(zip(("style", COLUMNS["all"]), map(float, shares), strict=True))


def mixture_rows(mixtures: Mapping[float, Quality]) -> list[dict[str, Any]]:
    """Two adapters added up, by the weight of the second: content, style, both, fit error and distance.

    Of photographs what counts, and the distance.
    """
    rows = []
    for weight, quality in mixtures.items():
        row = {"weight": weight, quality.column: quality.counted.value, **quality.counted.columns}
        if quality.verdicts:
            row |= _styles([quality], np.ones(len(quality.right), bool))
            row |= {"fit_error": float(quality.fit_error.mean())}
        rows.append({**row, FD: quality.frechet_distance})
    return rows


def composition_labels(prompts: Prompts) -> list[str] | None:
    """Number of objects and whether one is held out, by prompt: within what a bootstrap draws; None of photographs."""
    return [f"{scene.count} {scene.unseen}" for scene in prompts.scenes] if prompts.scenes else None


def contrasts(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The pairs of methods that are compared on the same prompts and noise, by the name of the contrast."""
    names = list(methods)
    loras, tuned, mixed = (
        [name for name in names if name.startswith(start)] for start in ("LCM-LoRA ", "fine-tuned, rank ", MIXTURE)
    )
    fast = [*loras, *(name for name in ("LCM", "LoRA mimics LCM") if name in names), *mixed]
    rivals = [BASE, "base, guided, 4 steps", "base, LCM scheduler"]
    pairs = [(name, rival) for name in fast for rival in rivals]
    pairs += [(name, BASE) for name in (*rivals[1:], *tuned)]
    pairs += [(large, loras[0]) for large in loras[1:2]]
    pairs += [(loras[1], few) for few in loras[2:]]
    pairs += [("LoRA mimics LCM", "LCM"), *((name, "LCM") for name in loras[:1])]
    pairs += [(name, one) for name in mixed for one in tuned]
    return {f"{one} against {other}": (one, other) for one, other in pairs if one in names and other in names}
