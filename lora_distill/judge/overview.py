"""The tables of notebooks 02 to 04 as one reads them: what was found in words, and rows as short tables."""

import json
from pathlib import Path

import pandas

from lora_distill.data.captioned import bundled_scenes, set_names
from lora_distill.judge.judge import COLUMNS, EXTRACTOR, FD, Method, Quality
from lora_distill.judge.tables import BASE, SLIDES_SECONDS, TEACHER, sd_column
from lora_distill.sampling import sampler_name
from lora_distill.writing import atomic_write

pandas.set_option("display.max_colwidth", None)  # results are sentences: a notebook shows them whole

# ---------------------------------------------------------------------------------------------- results


def guided_results(rows: list[dict], errors: list[dict], trained: int, frozen: int) -> dict[str, str]:
    """What notebook 02 found, in words: of `quality_rows` and `error_rows`, and of how many parameters A, B have."""
    by_name = {row["method"]: row for row in rows}
    measure, values = _aligned(rows)
    passes = " and ".join(str(by_name[name]["unet_passes"]) for name in (TEACHER, "LoRA student"))
    words = {TEACHER: "teacher with two passes", "LoRA student": "LoRA student with one pass",
             "no guidance": "one pass without guidance", "full copy": "full copy with one pass"}  # fmt: skip
    found = {f"{measure}, {said}": values[name] for name, said in words.items() if name in by_name}
    for name in (TEACHER, "LoRA student"):
        wrong = [row for row in errors if row["method"] == name and _of_numbers(row)]
        if wrong:
            shares = ", ".join(f"{100 * row['errors']:.1f}" for row in wrong)
            found[f"errors of {words[name]}, {wrong[0]['objects']} to {wrong[-1]['objects']} objects"] = f"{shares} %"
    return found | {
        "UNet passes an image, teacher and student": passes,
        "trained parameters": f"{100 * trained / frozen:.2f} % of the UNet",
    }


def _of_numbers(row: dict) -> bool:
    """Whether a row is of one number of objects and of all compositions."""
    return row["objects"] != "all" and row.get("compositions", "all") == "all"


# ---------------------------------------------------------------------------------------------- sentences


def guidance_found(rows: list[dict]) -> str:
    """What the `guidance_rows` say, in sentences: the best w, the gap to w = 1, and what the captions alone predict."""
    column = next((name for name in COLUMNS.values() if name in rows[0]), FD)
    if column not in (COLUMNS["all"], COLUMNS["content"]):
        best = (min if column == FD else max)(rows, key=lambda row: row[column])
        return f"The best {ALIGNED[column][0]} is {best[column]:.3g}, at w = {best['guidance_scale']:g}."
    lines = []
    for objects in dict.fromkeys(row["objects"] for row in rows):
        curve = [row for row in rows if row["objects"] == objects]
        first, best = curve[0], max(curve, key=lambda row: row[column])
        said = "All prompts" if objects == "all" else f"{objects} object{'s' if objects != '1' else ''}"
        line = f"{said}: {100 * first[column]:.1f} % right at w = {first['guidance_scale']:g}"
        if first.get("predicted") is not None:
            line += f" (the captions' errors alone predict {100 * first['predicted']:.1f} %)"
        line += f", {100 * best[column]:.1f} % at w = {best['guidance_scale']:g}"
        lines.append(f"{line}, {100 * curve[-1][column]:.1f} % at w = {curve[-1]['guidance_scale']:g}.")
    return "\n".join(lines)


def untrained_rival(rows: list[dict]) -> str:
    """Whether the student beats what needs no training, in sentences, from the `error_rows` of all prompts."""
    found = {row["method"]: row for row in rows if (row["objects"], row["compositions"]) == ("all", "all")}
    lines = []
    for method in ("LoRA student", "LoRA student, 8 steps", "base, guided, 8 steps", "base, guided, 4 steps"):
        if method in found:
            row = found[method]
            low, high = 100 * row["low"], 100 * row["high"]
            errors = f"{100 * row['errors']:.1f} % wrong ({low:.1f} to {high:.1f})"
            lines.append(f"{method}: {errors} in {row['unet_passes']} UNet evaluations.")
    return "\n".join(lines)


def milestones_found(rows: list[dict]) -> str:
    """When each student first comes to the teacher's 95 % interval, in sentences, from the `milestone_rows`."""
    *points, teacher = rows
    column = next((name for name in COLUMNS.values() if name in teacher), FD)
    low, high = (teacher.get("low"), teacher.get("high")) if column != FD else (None, teacher[f"{FD}_high"])
    lines = []
    for method in dict.fromkeys(row["method"] for row in points):
        near = [row["step"] for row in points if row["method"] == method and _within(row[column], column, low, high)]
        reached = f"first within the teacher's 95 % interval after {near[0]} updates" if near else "never that near"
        lines.append(f"{method}: {reached} ({ALIGNED_AS[column]}).")
    return "\n".join(lines)


def _within(value: float, column: str, low: float | None, high: float | None) -> bool:
    """Whether a value is as good as an interval, or better: a distance is better when it is smaller."""
    return value <= high if column == FD else low is None or value >= low


def differences_found(rows: list[dict]) -> str:
    """Where guidance changes each quantity most and least, in sentences, from `guided.difference_rows`."""
    lines = []
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        curve = sorted((row for row in rows if row["quantity"] == quantity), key=lambda row: row["relative_difference"])
        least, most = curve[0], curve[-1]
        lines.append(
            f"{quantity}: most at t = {most['timestep']} ({100 * most['relative_difference']:.1f} % of its size), "
            f"least at t = {least['timestep']} ({100 * least['relative_difference']:.1f} %)."
        )
    return "\n".join(lines)


def contrasts_found(rows: list[dict]) -> str:
    """What contrasts of all prompts say, a sentence each: value, 95 % interval, and whether no difference is in it."""
    lines = []
    for row in (row for row in rows if row["objects"] == "all"):
        value, low, high = (f"{row[name]:.3g}" for name in ("value", "low", "high"))
        nothing = 1 if row["measure"].endswith("ratio") else 0
        where = "inside" if row["low"] <= nothing <= row["high"] else "outside"
        said = f"{row['method']} against {row['against']}, {row['measure']}: {value} ({low} to {high})"
        lines.append(f"{said}; {nothing}, no difference, lies {where}.")
    return "\n".join(lines)


def few_step_results(rows: list[dict], finetune: str, source: str) -> dict[str, str]:
    """What notebook 03 found, in words: of its `quality_rows`, the name of a fine-tune, the source that is judged."""
    by_name = {row["method"]: row for row in rows}
    loras = [name for name in by_name if name.startswith("LCM-LoRA ")]
    sizes = [name.removeprefix("LCM-LoRA ") for name in loras]
    untrained = ("DDIM, 4 passes", "DPM++, 4 passes", "LCM scheduler")
    distance = ", ".join(f"{by_name[name][FD]:.1f}" for name in (BASE, finetune, *loras))
    measure, values = _aligned(rows)
    words = {"guided teacher": [BASE], f"LCM-LoRA {' and '.join(sizes)}, 4 passes": loras,
             "LoRA that mimics the LCM, 4 passes": ["LoRA mimics LCM"],
             "base with 4 guided steps, 8 passes": ["base, guided, 4 steps"]}  # fmt: skip
    found = {
        f"{measure}, {said}": " and ".join(values[name] for name in names)
        for said, names in words.items()
        if all(name in by_name for name in names)
    }
    rivals = ", ".join(values[f"base, {name}"] for name in untrained)
    solvers = ", ".join(name.removesuffix(", 4 passes") for name in untrained)
    found[f"{measure}, base with 4 passes: {solvers}"] = rivals
    to = "Flickr" if _flickr(source) else "real images"
    return found | {f"FD-{EXTRACTOR} to {to}: base, fine-tune, LCM-LoRA {', '.join(sizes)}": distance}


def few_step_title(source: str) -> str:
    """What notebook 03's results are of."""
    if bundled_scenes(source):
        return "LCM-LoRA on the Flickr stand-in (test captions)"
    return f"LCM-LoRA on {_flickr(source) or Path(source).name} (test captions)"


def _flickr(source: str) -> str:
    """Flickr8k or Flickr30k where a source is one of them or its stand-in; empty otherwise."""
    (name,) = set_names(source)
    return f"Flickr{name}" if name in ("8k", "30k") else ""


ALIGNED = {  # columns of tables of quality: what they hold, in words, and how a value is written
    "all_correct_percent": ("all correct", "{:.1f} %"),
    "content_percent": ("content correct", "{:.1f} %"),
    COLUMNS["clip"]: ("CLIP cosine", "{:.3f}"),
    FD: (f"FD-{EXTRACTOR}", "{:.1f}"),
}


ALIGNED_AS = {  # columns of curves, in words
    COLUMNS["all"]: "share of right pictures",
    COLUMNS["content"]: "share of right content",
    COLUMNS["clip"]: "CLIP cosine",
    FD: f"FD-{EXTRACTOR}",
}


def _aligned(rows: list[dict]) -> tuple[str, dict[str, str]]:
    """What the alignment of a table is, in words, and its value by method; the distance where there is none."""
    column = next(column for column in ALIGNED if column in rows[0])
    measure, form = ALIGNED[column]
    return measure, {row["method"]: form.format(row[column]) for row in rows}


def evaluation_results(measured: list[dict]) -> dict[str, str]:
    """What notebook 04's `measure_rows` say of teacher and LoRA student, in words."""
    pair = [next(row for row in measured if row["method"] == name) for name in (TEACHER, "LoRA student")]
    kid, recall = "kid_efficientnet_lite0", "recall_efficientnet_lite0"
    return {
        f"KID-{EXTRACTOR}: teacher, LoRA student": ", ".join(_spread(r[kid], r[f"{kid}_sd"], 3) for r in pair),
        f"recall-{EXTRACTOR}: teacher, LoRA student": ", ".join(f"{r[recall]:.2f}" for r in pair),
    }


def _threads(row: dict) -> str:
    return f"{row['threads']} thread{'s' * (row['threads'] != 1)}"


def seconds_results(times: list[dict], grid: list[dict]) -> dict[str, str]:
    """What notebook 04 timed, in words: `timing.method_rows` of one image, and `timing.compare_times` of the grid."""
    found, one = {}, _one_image(times)
    for runtime in dict.fromkeys(row["runtime"] for row in one):
        student = [row for row in one if (row["runtime"], row["method"]) == (runtime, "LoRA student, merged")]
        found[f"saved by the merged student of the teacher's seconds, one image, {runtime}"] = ", ".join(
            f"{_interval(row, 'saving_percent', 1)} % on {_threads(row)}" for row in student
        )
    name = next(row["method"] for row in times if row["method"].startswith("LCM-LoRA "))
    found[f"times faster, one image, {name}, merged, 4 steps"] = ", ".join(
        f"{row['times_faster']:.1f} on {_threads(row)}"
        for row in one if row["deployed"] and row["method"] == name
    )  # fmt: skip
    student = [row for row in grid if row["method"] == "LoRA student, merged"]
    sizes, pixels = ([row[key] for row in student] for key in ("batch", "resolution"))
    saved = [row["saving_percent"] for row in student]
    found[f"saved by one pass, batch {min(sizes)} to {max(sizes)}, {min(pixels)} and {max(pixels)} px"] = (
        f"{min(saved):.0f} to {max(saved):.0f} % on {_threads(student[0])}"
    )
    return found


def _one_image(times: list[dict]) -> list[dict]:
    """The rows of one image a call, which decide: those of the smallest batch."""
    least = min((row["batch"] for row in times), default=1)
    return [row for row in times if row["batch"] == least]


def _interval(row: dict, column: str, digits: int) -> str:
    numbers = (round(row[name], digits) + 0.0 for name in (column, f"{column}_low", f"{column}_high"))  # no minus zero
    value, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{value} ({low} to {high})"


def save_results(path: Path, title: str, results: dict[str, str]) -> pandas.DataFrame:
    """Write what a notebook found as JSON, under a title, for the summary of a run; the same as a table to read."""
    atomic_write(path, json.dumps({title: results}, indent=1))
    return pandas.DataFrame({title: results})


# ---------------------------------------------------------------------------------------------- tables to read


CALIBRATION = {"floor": "other real images", "vae": "these after the VAE", "other_style": "the other drawing style"}
HEADINGS = {  # of the columns that are shown: the heading, and the digits of its numbers
    "method": ("", None),
    "weight": ("λ", 1),
    "content": ("content", 2),
    "style": ("Flickr's style", 2),
    "unet_passes": ("passes", None),
    "all_correct_percent": ("all correct, %", 1),
    "content_percent": ("content, %", 1),
    "objects_percent": ("objects in place, %", 1),
    "fit_error": ("fit error", 3),
    "flickr_style_percent": ("Flickr's style, %", 0),
    "alignment_percent": ("aligned, %", 1),
    COLUMNS["clip"]: ("CLIP cosine", 3),
    FD: ("FD", 1),
    "kid_efficientnet_lite0": ("KID", 3),
    "is_efficientnet_lite0": ("IS", 2),
    "precision_efficientnet_lite0": ("precision", 2),
    "recall_efficientnet_lite0": ("recall", 2),
    "psnr_to_teacher_db": ("PSNR to teacher, dB", 1),
    f"{FD}_to_teacher": ("FD to teacher", 1),
}


def passes(judged: dict[str, dict[int, Quality]]) -> pandas.DataFrame:
    """What counts, a row a method and a column a number of UNet passes."""
    table = pandas.DataFrame(
        {method: {n: _counted(quality)[1] for n, quality in points.items()} for method, points in judged.items()}
    )
    return table.sort_index().T.fillna("").rename_axis(columns="passes")


def _counted(quality: Quality) -> tuple[str, str]:
    """Heading and value of what counts of one judgement."""
    column = quality.column if quality.column in ALIGNED else f"{quality.column}_percent"
    heading, form = ALIGNED[column]
    return heading, form.format(quality.counted.value * (100 if column.endswith("_percent") else 1))


def ablation(judged: dict[str, Quality], logs: dict[str, list[dict]]) -> pandas.DataFrame:
    """What counts, distance, and the first and last value of each term of the loss, a row a mimic; the LCM has none."""
    table = {}
    for name, quality in judged.items():
        first, last = (logs[name][0], logs[name][-1]) if name in logs else ({}, {})
        row = dict([_counted(quality)]) | {"FD": f"{quality.frechet_distance:.1f}"}
        row |= {term.upper(): f"{first[term]:.4f} → {last[term]:.4f}" if first else "" for term in ("mse", "kl")}
        table[name] = row
    return pandas.DataFrame(table).T


def further(rows: list[dict]) -> pandas.DataFrame:
    """The rows of `judge.further_distances`, a column a metric; empty where no extractor was asked for."""
    table = {}
    for row in rows:
        table.setdefault((row["set"], row["method"]), {})[row["metric"]] = _spread(row["value"], row["sd"], 3)
    return pandas.DataFrame(table).T


def seconds(times: list[dict]) -> pandas.DataFrame:
    """The rows of `timing.method_rows` as one reads them, in milliseconds."""
    table = [
        {"runtime": row["runtime"], "threads": row["threads"], "method": row["method"],
         "ms an image": f"{1000 * row['seconds_an_image']:.1f}",
         "range": f"{1000 * row['lowest']:.1f} to {1000 * row['highest']:.1f}",
         "of it VAE": f"{1000 * row['vae_seconds']:.1f}", "saved, %": _interval(row, "saving_percent", 1),
         "times faster": f"{row['times_faster']:.1f}", "in the UNet": f"{row['times_faster_unet']:.1f}"}
        for row in _one_image(times)
    ]  # fmt: skip
    return pandas.DataFrame(table).set_index(["runtime", "threads", "method"])


def seconds_caption(times: list[dict]) -> str:
    """What a table of seconds rests on."""
    row = _one_image(times)[0]
    return (
        f"batch {row['batch']}, prompt to pixels, medians of {row['repeats']} in turns; saved turn by turn, with "
        f"its 95 % interval; {row['device']}"
    )


def seconds_found(times: list[dict], contrasts: list[dict]) -> str:
    """What the seconds of one image say about the 40 %, about a full copy and about more data, in sentences."""
    one = [row for row in _one_image(times) if row["method"] == "LoRA student, merged"]
    ways = [f"{_interval(row, 'saving_percent', 0)} % on {_conditions(row)}" for row in one]
    sentences = [f"The merged student saves {'; '.join(ways)}."]
    for row in contrasts:
        if (
            row["deployed"]
            and row["batch"] == one[0]["batch"]
            and row["threads"] == 1
            and row["method"] != one[0]["method"]
        ):
            ratio = f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            sentences.append(f"{row['method']} takes {ratio} times the seconds of {row['against']}.")
    return " ".join(sentences)


def _conditions(row: dict) -> str:
    return f"{row['runtime']}, {row['threads']} thread" + "s" * (row["threads"] > 1)


def slides_found(times: list[dict]) -> str:
    """How many guided steps of the base would take as many times as long as LCM-LoRA as the slides' base, in words."""
    one = {row["method"]: row for row in _one_image(times) if row["deployed"] and row["threads"] == 1}
    base, fast = one[TEACHER], next(row for name, row in one.items() if name.startswith("LCM-LoRA "))
    slides, rest = SLIDES_SECONDS["base"] / SLIDES_SECONDS["LCM-LoRA"], base["seconds_an_image"] - base["unet_seconds"]
    steps = (slides * fast["seconds_an_image"] - rest) * base["steps"] / base["unet_seconds"]
    return (
        f"{fast['method']} in {fast['steps']} steps is {fast['times_faster']:.1f} times as fast as the base in "
        f"{base['steps']} guided steps, and {fast['times_faster_unet']:.1f} times in the UNet alone. The slides' "
        f"{slides:.1f} times is what {steps:.0f} guided steps would give."
    )


def errors(rows: list[dict], compositions: str = "all") -> pandas.DataFrame:
    """`error_rows` as a table to read: errors in per cent with their intervals, a column a number of objects."""
    table = {}
    for row in (row for row in rows if row["compositions"] == compositions):
        low, value, high = (100 * row[key] for key in ("low", "errors", "high"))
        table.setdefault(row["method"], {})[row["objects"]] = f"{value:.1f} ({low:.1f} to {high:.1f})"
    return pandas.DataFrame(table).T.rename_axis(columns=f"errors, %, compositions: {compositions}; objects")


def quality(rows: list[dict]) -> pandas.DataFrame:
    """Rows as a table to read: the columns of HEADINGS that they have, means as `mean ± sd`."""
    columns = [column for column in HEADINGS if any(row.get(column) is not None for row in rows)]
    table = {HEADINGS[column][0]: [_written(row, column) for row in rows] for column in columns}
    return pandas.DataFrame(table).set_index(HEADINGS[columns[0]][0]).rename_axis(None)


def _written(row: dict, column: str) -> str:
    """A cell as text; nothing where nothing was measured."""
    value, sd, digits = row[column], row.get(sd_column(column)), HEADINGS[column][1]
    if value is None or digits is None:
        return "" if value is None else str(value)
    return _spread(value, sd, digits)


def _spread(value: float, sd: float | None, digits: int) -> str:
    """A mean with its deviation over seeds; one seed has none."""
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd is not None else "")


def caption(rows: list[dict], teacher: Method | None = None) -> str:
    """What a table of quality rests on: N, seeds, trainings, real images, how the teacher samples, what FD means."""
    first, trainings = rows[0], max(row["trainings"] for row in rows)
    text = f"N = {first['n']} prompts x {first['seeds']} seeds"
    text += f" (students: {trainings} trainings)" if trainings > 1 else ""
    text += f", against {first['reference_n']} real images"
    text += f"; {sampling(teacher)}" if teacher else ""
    found = {said: first.get(f"{FD}_{kind}") for kind, said in CALIBRATION.items()}  # photographs have none
    known = [f"{said} {distance:.1f}" for said, distance in found.items() if distance is not None]
    return text + (f"; FD-{EXTRACTOR} at this N of {', '.join(known)}" if known else "")


def sampling(method: Method) -> str:
    """How a method samples, in words: scheduler, steps, w and dtype."""
    sampler, pipe = method.sampler, method.pipe
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    return f"{sampler_name(pipe, sampler)}, {sampler.steps} steps, w = {sampler.guidance_scale:g}, {dtype}"
