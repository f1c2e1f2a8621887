"""What notebook 03 found, in sentences: every number in them comes from its tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas

from lora_distill.judge.by_objects import ALL
from lora_distill.judge.judge import COLUMNS, FD
from lora_distill.judge.paired import ERRORS, ERRORS_OF_ALL, FD_DIFFERENCE, FIT_ERROR, KID_DIFFERENCE

Rows = Sequence[Mapping[str, Any]]
COUNTED = {COLUMNS["content"]: "{:.0%} right", COLUMNS["clip"]: "CLIP cosine {:.3f}", FD: "FD {:.1f}"}
MEASURES = {  # of contrasts: heading, how a value is written, and what no difference is
    ERRORS: ("times the errors", "{:.2f}", 1),
    ERRORS_OF_ALL: ("style counted too", "{:.2f}", 1),
    FIT_ERROR: ("fit error", "{:+.3f}", 0),
    FD_DIFFERENCE: ("FD", "{:+.1f}", 0),
    KID_DIFFERENCE: ("KID", "{:+.3f}", 0),
}
STYLELESS = 5  # per cent: with fewer pictures in a style a method does not draw in it


def rivals(rows: Rows, trained: str) -> str:
    """What the base does without training at most 8 UNet evaluations, beside the teacher and one trained method."""
    whole = [row for row in rows if row["objects"] == ALL]
    column = next(name for name in COUNTED if name in whole[0])
    better = min if column == FD else max
    few = [row for row in whole if row["unet_passes"] <= 8]
    best = better((row for row in few if not row["trained"]), key=lambda row: row[column])
    ours = better((row for row in few if row["method"] == trained), key=lambda row: row[column])
    teacher = next(row for row in whole if row["method"] == "teacher")
    said = [f"{row['method']} with {_passes(row)}: {_value(rows, row, column)}" for row in (best, ours, teacher)]
    return f"The best sampler of the base with at most 8 evaluations is {said[0]}. " + ". ".join(said[1:]) + "."


def _passes(row: Mapping[str, Any]) -> str:
    return f"{row['unet_passes']} evaluation" + "s" * (row["unet_passes"] > 1)


def _value(rows: Rows, row: Mapping[str, Any], column: str) -> str:
    """What counts at a point, and at the most objects where rows tell them apart."""
    parts = [r for r in rows if (r["method"], r["unet_passes"]) == (row["method"], row["unet_passes"])]
    said = COUNTED[column].format(row[column])
    most = max(parts, key=lambda part: str(part["objects"]).replace(ALL, ""))
    more = f" ({most['objects']} objects: {COUNTED[column].format(most[column])})"
    return said + more * (most["objects"] != ALL)


def sampler_or_training(rows: Rows, trained: str) -> str:
    """Whether the noisy steps of LCM's scheduler alone do what a trained method does: by number of objects."""
    methods = {"DDIM, guided": "guided DDIM", "LCM scheduler, guided": "the base with LCM's scheduler, guided"}
    column = next(name for name in COUNTED if name in rows[0])
    lines = [
        (said, [row for row in rows if row["method"] == method and row["unet_passes"] == 8])
        for method, said in (methods | {trained: trained}).items()
    ]
    said = "; ".join(f"{name} {', '.join(_by_objects(points, column))}" for name, points in lines if points)
    return f"With 8 evaluations each: {said}."


def _by_objects(points: Rows, column: str) -> list[str]:
    return [
        f"{COUNTED[column].format(row[column])}" + ("" if row["objects"] == ALL else f" (n = {row['objects']})")
        for row in points
        if len(points) == 1 or row["objects"] != ALL
    ]


def divergence(logs: Mapping[str, Rows]) -> str:
    """How far the mimics end from the LCM: the MSE of each, and how many times that of the least."""
    if not logs:
        return ""
    last = {name: log[-1]["mse"] for name, log in logs.items()}
    least = min(last.values())
    said = ", ".join(f"{name} {mse:.4f} ({mse / least:.1f} times the least)" for name, mse in last.items())
    return f"MSE to the LCM's latents at the end of the training with {said}."


def epochs(sizes: Mapping[str, int], drawn: int) -> str:
    """How often a training sees each image of its set; `drawn` is how many it draws."""
    said = ", ".join(f"{drawn / size:.2g} times each of {size:,} ({name})" for name, size in sizes.items())
    return f"A training draws {drawn:,} images: {said}."


def compared(rows: Rows, against: str, methods: Iterable[str] = ()) -> pandas.DataFrame:
    """The contrasts with one method as a table to read, of `paired.contrast_rows`: a row a method, or one of `methods`.

    A value stands with its 95 % interval; one with "=" includes no difference. n = 1 and so on are the errors by
    number of objects.
    """
    table: dict[str, dict[str, str]] = {}
    chosen = set(methods)
    for row in rows:
        if row["against"] == against and row["measure"] in MEASURES and (not chosen or row["method"] in chosen):
            heading, form, none = MEASURES[row["measure"]]
            if row["objects"] == ALL or row["measure"] == ERRORS:
                heading = heading if row["objects"] == ALL else f"n = {row['objects']}"
                table.setdefault(row["method"], {})[heading] = _interval(row, form, none)
    there = {name for cells in table.values() for name in cells}
    whole = [heading for heading, _, _ in MEASURES.values() if heading in there]
    columns = whole + sorted(there - set(whole))
    return pandas.DataFrame(table).T.reindex(columns=columns).fillna("").rename_axis(f"against {against}")


def _interval(row: Mapping[str, Any], form: str, none: float) -> str:
    value, low, high = (form.format(row[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" + " =" * (row["low"] <= none <= row["high"])


def more_data(rows: Rows, loras: Sequence[str]) -> pandas.DataFrame | str:
    """The larger set against the smaller one, and against its own first images where that was trained."""
    if len(loras) < 2:
        return "There is one set alone: whether more data is better is not testable."
    small, large, *few = loras
    return pandas.concat([compared(rows, one, [large]).T.add_suffix(f" against {one}").T for one in (small, *few)])


def styles(rows: Rows, base: str, methods: Iterable[str]) -> str:
    """How many pictures are in the set's style, of `tables.quality_rows`; nothing of photographs."""
    column = "flickr_style_percent"
    share = {row["method"]: row[column] for row in rows if row.get(column) is not None}
    if base not in share:
        return ""
    there = [name for name in (base, *methods) if name in share]
    said = ", ".join(f"{name} {share[name]:.0f} %" for name in there)
    alike = all(share[name] < STYLELESS for name in there)
    more = " None of them draws in it: their distances compare pictures in a third style." * alike
    return f"Pictures in Flickr's style: {said}.{more}"


def composition(rows: Rows) -> str:
    """What the weight of the fine-tune does to content, style and both; nothing of photographs."""
    if "style" not in rows[0]:
        return ""
    said = [
        f"λ = {row['weight']:g}: content {row['content']:.0%}, Flickr's style {row['style']:.0%}, "
        f"both at once {row[COLUMNS['all']]:.0%}, fit error {row['fit_error']:.3f}, FD {row[FD]:.1f}"
        for row in rows
    ]
    return "\n".join(said)


def at_once(rows: Rows, methods: Iterable[str]) -> dict[str, str]:
    """Content in Flickr's style, a line for a run's summary: of `few_steps.style_rows`; empty of photographs."""
    whole = {row["method"]: row for row in rows if row["objects"] == row["compositions"] == ALL}
    there = [name for name in methods if name in whole]
    if not there:
        return {}
    said = [
        f"{100 * whole[name][COLUMNS['all']]:.1f} % (content {100 - 100 * whole[name]['errors']:.1f} %)"
        for name in there
    ]
    return {f"content in Flickr's style: {', '.join(there)}": ", ".join(said)}
