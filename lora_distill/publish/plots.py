"""The figures of the series: how each is drawn from its rows, what it shows, and the claims it bears on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lora_distill.publish import plots_dial, plots_few_steps, plots_growth, plots_memory, plots_sweep
from lora_distill.publish.style import (
    ALIGNMENTS,
    OBJECTS,
    REFERENCE,
    STYLES,
    WIDTH,
    Rows,
    alignment_of,
    calibration_lines,
    column,
    errors_with_interval,
    grouped,
    image_grid,
    loss_by_method,
    numbered,
    value_with_interval,
)

STAGES = {"vae_crops": "VAE, crops", "vae_images": "VAE, images", "text_encoder": "text encoder", "unet": "UNet"}
FD = "fd_efficientnet_lite0"
SHARES = ("all_correct", "content")  # columns that are shares of images
MEASURES = {"clip_cosine": "CLIP cosine", "fit_error": "fit error", FD: "FD-EfficientNet-Lite0"}
PARTS = (("text_encoder", "text encoder", "C4"), ("unet", "UNet", "C0"), ("vae", "VAE", "C2"))


# ------------------------------------------------------------------------------------------------------ 00: pretraining


def stage_losses(rows: Rows) -> Figure:
    """The loss of each training stage, a panel a stage."""
    stages = grouped(rows, "stage")
    figure, axes = plt.subplots(1, len(stages), figsize=(6.5, 1.9))
    for ax, (stage, points) in zip(axes, stages.items(), strict=True):
        losses = column(points, "loss")
        ax.plot(column(points, "step"), losses, marker="", linewidth=1)
        ax.set(title=STAGES.get(stage, stage), xlabel="step", yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if losses.max() > 100 * losses.min() else (1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0].set_ylabel("loss")
    return figure


def alignment_against_guidance(rows: Rows) -> Figure:
    """What is all right by number of objects, and of prompts with a held-out object; dashed after the VAE alone.

    Short lines at w = 1 are what the errors of the captions alone would leave right.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 2.8))
    sampled = [row for row in rows if row["guidance_scale"] is not None]
    for group, points in grouped(sampled, "objects").items():
        style = OBJECTS.get(group, {"color": "0.5", "marker": "x", "linestyle": ":"})
        label = numbered(group) if group in OBJECTS else group
        value_with_interval(ax, points, "guidance_scale", "all_correct", label=label, **style)
        _predicted(ax, points, style["color"])
    for row in rows:
        if row["guidance_scale"] is None:
            ax.axhline(100 * row["all_correct"], label=row["objects"], **REFERENCE)
    ax.set(xlabel="guidance scale w", ylabel="all right, %", ylim=(0, 104))
    ax.set_xticks((1, 3, 5, 7.5, 10), ("1", "3", "5", "7.5", "10"))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def reader_against_eye(rows: Rows) -> Figure:
    """How often the reader and each eye agree on an object, and how many are right for whom, against the tolerance."""
    figure, (ax, ax_right) = plt.subplots(1, 2, figsize=(6.5, 2.3))
    for number, (eye, points) in enumerate(grouped(rows, "eye").items()):
        style = {"color": f"C{number}", "marker": "os"[number]}
        ax.plot(column(points, "tolerance"), 100 * column(points, "alike"), label=f"{eye} eye", **style)
        right = 100 * points[0]["labelled"]
        ax_right.axhline(right, color=f"C{number}", linestyle="--", marker="", label=f"{eye} eye")
    ax_right.plot(column(points, "tolerance"), 100 * column(points, "reader"), color="black", label="reader")
    for panel, title in ((ax, "reader and eye agree"), (ax_right, "right")):
        panel.axvline(rows[0]["chosen"], color="0.2", linestyle=":", linewidth=1.2, marker="", zorder=1)
        panel.set(xlabel="tolerance of the reader", ylabel=f"% of {rows[0]['n']} objects", title=title)
        panel.legend(loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------------- 02: guidance


def quality_against_guidance(rows: Rows) -> Figure:
    """What is right, how clean, and the distance to real images, against w; the teacher's w is dotted.

    Colours are numbers of objects. Short lines at w = 1 are what the errors of the captions alone would leave right.
    """
    by_objects = {name: points for name, points in grouped(rows, "objects").items() if name != "all"}
    if not by_objects:
        return _of_photographs(rows)
    figure, (ax, ax_fit, ax_fd) = plt.subplots(1, 3, figsize=(6.5, 2.6))
    aligned = alignment_of(rows)
    for objects, points in by_objects.items():
        value_with_interval(ax, points, "guidance_scale", aligned, label=numbered(objects), **OBJECTS[objects])
        _predicted(ax, points, OBJECTS[objects]["color"])
        _mean_with_interval(ax_fit, points, "guidance_scale", "fit_error", **OBJECTS[objects])
    everything = [row for row in rows if row["objects"] == "all"]
    _mean_with_interval(ax_fd, everything, "guidance_scale", FD, color="black")
    calibration_lines(ax_fd, rows)
    for panel, title, ylabel in zip(
        figure.axes,
        ("right", "clean (lower is cleaner)", "distance to real images"),
        (ALIGNMENTS[aligned][0], "fit error", "FD-EfficientNet-Lite0"),
        strict=True,
    ):
        panel.axvline(rows[0]["teacher_guidance_scale"], color="0.2", linestyle=":", linewidth=1.2, marker="", zorder=1)
        panel.set(xlabel="guidance scale w", ylabel=ylabel, title=title)
        panel.set_xticks((1, 3, 5, 7.5, 10), ("1", "3", "5", "7.5", "10"))
    ax.set_ylim(0, 104)
    ax_fit.set_ylim(bottom=0)
    handles, labels = (a + b for a, b in zip(*(p.get_legend_handles_labels() for p in (ax, ax_fd)), strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _predicted(ax: Axes, rows: Rows, colour: str) -> None:
    """A short line at w = 1 where the errors of the captions alone say how much is right."""
    for row in rows:
        if row.get("predicted") is not None:
            w = row["guidance_scale"]
            ax.plot(
                [w - 0.75, w + 0.75], [100 * row["predicted"]] * 2, color=colour, marker="", linewidth=1.2, alpha=0.7
            )


def _mean_with_interval(ax: Axes, rows: Rows, x: str, name: str, **style: Any) -> None:
    """A curve in its own unit, with the intervals of its columns `name`_low and `name`_high."""
    means, low, high = (column(rows, f"{name}{end}").astype(float) for end in ("", "_low", "_high"))
    ax.errorbar(column(rows, x), means, np.abs([low - means, high - means]), **style)


def _of_photographs(rows: Rows) -> Figure:
    """Alignment and distance against w, for prompts without a number of objects."""
    figure, ax, ax_fd = _quality_panels("guidance scale w", rows)
    _mean_with_interval(ax_fd, rows, "guidance_scale", FD, color="C1", marker="s")
    if ax:
        value_with_interval(ax, rows, "guidance_scale", alignment_of(rows))
    for panel in figure.axes:
        panel.axvline(rows[0]["teacher_guidance_scale"], color="0.5", linestyle=":", linewidth=1, label="teacher's w")
    figure.axes[0].legend(loc="lower right")
    return figure


def guidance_against_timestep(rows: Rows) -> Figure:
    """The size of what guidance adds to the conditional pass: to the network's output, and to its x0 and eps."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.4))
    for quantity, points in grouped(rows, "quantity").items():
        ax.plot(column(points, "timestep"), column(points, "relative_difference"), label=quantity)
    ax.set(xlabel="timestep t (noise grows to the right)", yscale="log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_ylabel("size of the difference\n/ size of the quantity")
    ax.legend()
    return figure


def distillation_loss(rows: Rows) -> Figure:
    """The loss of the students, a curve a method."""
    return loss_by_method(rows, "MSE to the guided teacher")


def quality_against_steps(rows: Rows) -> Figure:
    """Errors, fit error and distance to real images against training steps; the row without a step is the teacher.

    The bands are the 95 % intervals of the teacher's; those of each point are about as wide. Photographs have the
    cosine and the distance, or the distance alone.
    """
    measured = [name for name in ("all_correct", "content", "clip_cosine", "fit_error", FD) if name in rows[0]]
    figure, axes = plt.subplots(1, len(measured), figsize=(6.5, 2.5), squeeze=False)
    for ax, name in zip(axes[0], measured, strict=True):
        for method, points in grouped(rows, "method").items():
            if points[0]["step"] is None:
                _reference_of(ax, points[0], name, method)
            elif name in SHARES:
                errors = [{**_as_errors(row, name), "step": row["step"]} for row in points]
                errors_with_interval(ax, errors, "step", label=method)
            else:
                ax.plot(column(points, "step"), column(points, name), label=method)
        ax.set(xlabel="training step", ylabel="errors, %" if name in SHARES else MEASURES[name])
        ax.set_xscale("symlog", linthresh=5, linscale=0.4)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xticks(sorted({row["step"] for row in rows if row["step"] in (0, 5, 20, 100, 500)}))
        ax.set_xlim(left=-1)
        ax.minorticks_off()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _as_errors(row: dict[str, Any], share: str) -> dict[str, float]:
    """The columns of errors of one with a share that is right."""
    return {"errors": 1 - row[share], "low": 1 - row["high"], "high": 1 - row["low"], "n": row["n"]}


def _reference_of(ax: Axes, row: dict[str, Any], name: str, label: str) -> None:
    """The teacher's value as a line, and its interval as a band where there is one."""
    value, low, high = row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    if name in SHARES:
        errors = _as_errors(row, name)
        value, low, high = (max(100 * errors[key], 50 / row["n"]) for key in ("errors", "low", "high"))
    ax.axhline(value, label=label, **REFERENCE)
    if low is not None:
        ax.axhspan(low, high, color="0.9", zorder=0)


def errors_by_objects(rows: Rows) -> Figure:
    """Errors against the number of objects, of seen and held-out compositions, and PSNR to the teacher; by method."""
    figure, axes = plt.subplots(1, 3, figsize=(6.5, 2.7))
    each = [row for row in rows if row["objects"] != "all"]
    methods = list(grouped(each, "method"))
    for ax, composition in zip(axes, ("seen", "held out"), strict=False):
        for index, method in enumerate(methods):
            points = [row for row in each if (row["method"], row["compositions"]) == (method, composition)]
            errors_with_interval(
                ax, _beside(points, index, len(methods)), "x", label=method, elinewidth=0.8, **_style(method, index)
            )
        ax.set(title=f"compositions {composition}", xlabel="objects", xticks=(1, 2, 3, 4))
    axes[0].set_ylabel("errors, %")
    low, high = (pick(ax.get_ylim()[i] for ax in axes[:2]) for i, pick in ((0, min), (1, max)))
    for ax in axes[:2]:
        ax.set_ylim(low, high)
    for index, method in enumerate(methods):
        points = [row for row in each if (row["method"], row["compositions"]) == (method, "all")]
        if points[0]["psnr_to_teacher_db"] is not None:
            near = column(points, "psnr_to_teacher_db")
            axes[2].plot([int(row["objects"]) for row in points], near, **_style(method, index))
    axes[2].set(title="likeness to the teacher", xlabel="objects", xticks=(1, 2, 3, 4), ylabel="PSNR, dB")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _beside(rows: Rows, index: int, count: int) -> Rows:
    """Rows with an `x` at their number of objects, a little aside of the other methods'."""
    return [{**row, "x": int(row["objects"]) + 0.08 * (index - (count - 1) / 2)} for row in rows]


def _style(method: str, index: int) -> dict[str, Any]:
    return STYLES.get(method, {"color": f"C{index % 7}", "marker": "osvDP^X"[index % 7]})


def errors_against_passes(rows: Rows) -> Figure:
    """Errors against UNet evaluations, a panel a number of objects; a method of several points is a curve."""
    panels = {name: points for name, points in grouped(rows, "objects").items() if name != "all"}
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5, 2.7), sharey=True)
    for ax, (objects, found) in zip(axes, panels.items(), strict=True):
        for index, (method, points) in enumerate(grouped(found, "method").items()):
            ordered = sorted(points, key=lambda row: row["unet_passes"])
            line = "-" if points[0]["trained"] else ":"
            errors_with_interval(
                ax, ordered, "unet_passes", label=method, **{"linestyle": line, **_style(method, index)}
            )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=numbered(objects), xlabel="UNet evaluations")
    axes[0].set_ylabel("errors, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _quality_panels(xlabel: str, rows: Rows) -> tuple[Figure, Axes | None, Axes]:
    """A panel of alignment, where there is one, and a panel of distance."""
    aligned = alignment_of(rows)
    figure, axes = plt.subplots(1, 2 - aligned.startswith("fd_"), figsize=(WIDTH, 2.5), squeeze=False)
    *first, last = axes[0]
    last.set(xlabel=xlabel, ylabel="FD-EfficientNet-Lite0", title="distance to real images")
    for ax in first:
        ax.set(xlabel=xlabel, ylabel=ALIGNMENTS[aligned][0], title="alignment")
    return figure, first[0] if first else None, last


# ------------------------------------------------------------------------------------------- 04: evaluation and seconds


def distance_bars(rows: Rows) -> Figure:
    """Frechet distances by method, a panel a source; whiskers are the standard deviation over seeds.

    A method without a value is one whose number is lost. The dashed line is real against real.
    """
    panels = grouped(rows, "source")
    heights = [len(methods) for methods in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 0.9 + 0.2 * sum(heights)), gridspec_kw={"height_ratios": heights}
    )
    for ax, (source, methods) in zip(axes, panels.items(), strict=True):
        names = [row["method"] for row in methods]
        spread = {"xerr": [row["sd"] for row in methods]} if methods[0]["sd"] is not None else {}
        colours = [STYLES.get(name, {"color": "0.6"})["color"] for name in names]
        ax.barh(names, [row["distance"] or 0 for row in methods], color=colours, **spread)
        for y, row in enumerate(methods):
            if row["distance"] is None:
                ax.annotate("value lost", (0, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
        if floor := methods[0]["floor"]:
            ax.axvline(floor, label="real against real", **REFERENCE)
            ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=7)
        ax.set_title(source, loc="left")
        counted = f" (mean ± sd of {methods[0]['seeds']} seeds, N = {methods[0]['n']} each)" if methods[0]["n"] else ""
        ax.set_xlabel(methods[0]["metric"] + counted)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
    return figure


def speed_bars(rows: Rows) -> Figure:
    """Seconds an image relative to the slowest method of each source; the seconds stand at the bars."""
    panels = grouped(rows, "source")
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 1.7), sharey=True)
    for ax, (source, methods) in zip(axes, panels.items(), strict=True):
        slowest = max(row["seconds"] for row in methods)
        for x, row in enumerate(methods):
            ax.bar(x, row["seconds"] / slowest, color=f"C{x}")
            ax.annotate(f"{row['seconds']:.3g} s", (x, row["seconds"] / slowest), ha="center", va="bottom", fontsize=7)
        ax.set_xticks(range(len(methods)), [row["method"] for row in methods])
        ax.set_xlabel(source)
        ax.grid(axis="x", visible=False)
    axes[0].set(ylabel="seconds an image,\nrelative", ylim=(0, 1.2))
    return figure


def pareto_front(rows: Rows) -> Figure:
    """Errors against UNet evaluations of every method: trained ones solid, samplers of the base dotted.

    Of photographs there is the cosine or the distance instead. Points of one number of evaluations stand side by side.
    What is best at its number or fewer is the front, the grey steps.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 3.8))
    aligned = alignment_of(rows)
    shares = aligned in SHARES
    methods = grouped(rows, "method")
    for index, (method, points) in enumerate(methods.items()):
        aside = 2 ** (0.015 * (index - len(methods) / 2))  # points of one number of evaluations stand side by side
        shifted = [{**row, "unet_passes": aside * row["unet_passes"]} for row in points]
        style = {"linestyle": "-" if points[0]["trained"] else ":", "elinewidth": 0.9, **STYLES.get(method, {})}
        if shares:
            wrong = [{**_as_errors(row, aligned), "unet_passes": row["unet_passes"]} for row in shifted]
            errors_with_interval(ax, wrong, "unet_passes", label=method, **style)
        else:
            value_with_interval(ax, shifted, "unet_passes", aligned, label=method, **style)
    ordered = sorted(rows, key=lambda row: row["unet_passes"])
    values = [max(100 * (1 - row[aligned]), 50 / row["n"]) if shares else row[aligned] for row in ordered]
    best = np.maximum.accumulate(values) if aligned == "clip_cosine" else np.minimum.accumulate(values)
    ends = {row["unet_passes"]: value for row, value in zip(ordered, best, strict=True)}
    ax.step(list(ends), list(ends.values()), where="post", color="0.8", linewidth=5, zorder=0, marker="")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="UNet evaluations an image", ylabel="errors, %" if shares else ALIGNMENTS[aligned][0])
    figure.legend(*ax.get_legend_handles_labels(), fontsize=6.5, loc="outside lower center", ncols=4)
    return figure


def saving_against_batch(rows: Rows) -> Figure:
    """What each method saves of the teacher's seconds, and f (1 - rho) for one pass; a panel a resolution.

    Whiskers are the 95 % intervals of what is saved turn by turn.
    """
    panels = grouped(rows, "resolution")
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.5), sharey=True)
    for ax, (resolution, points) in zip(axes, panels.items(), strict=True):
        batches = list(grouped(points, "batch"))
        for method, line in grouped(points, "method").items():
            saving = column(line, "saving_percent")
            ends = [column(line, f"saving_percent_{end}") for end in ("low", "high")]
            spread = np.abs(np.array(ends) - saving)
            ax.errorbar(column(line, "batch"), saving, spread, elinewidth=0.9, label=method)
        ax.plot(batches, [grouped(points, "batch")[b][0]["bound_percent"] for b in batches],
                color="0.5", linestyle="--", marker="", label="one pass: f (1 − ρ)")  # fmt: skip
        ax.axhline(50, color="0.8", linewidth=1, marker="", label="one half")
        ax.set(xscale="log", xlabel="batch", title=f"{resolution} px")
        ax.set_xticks(batches, batches)
        ax.minorticks_off()
    axes[0].set(ylabel="saved of the\nteacher's seconds, %", ylim=(min(0, axes[0].get_ylim()[0]), 100))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def batch_cost(rows: Rows) -> Figure:
    """ρ, the time of a batch over that of one twice as large, a curve a runtime and number of threads."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    for conditions, points in _by_conditions(rows).items():
        seconds = {row["batch"]: row["unet_seconds"] for row in points}
        batches = [batch for batch in seconds if 2 * batch in seconds]
        ax.plot(batches, [seconds[b] / seconds[2 * b] for b in batches], label=conditions)
    ax.axhline(0.5, label="0.5: a batch fills the processor", **REFERENCE)
    ax.set(xscale="log", xticks=batches, xticklabels=batches, ylim=(0.4, None))
    ax.set(xlabel="batch B", ylabel="ρ = t(B) / t(2B)")
    ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def seconds_an_image(rows: Rows) -> Figure:
    """Milliseconds an image by part, a bar a method and a panel a runtime and number of threads; savings at the ends.

    Of several batches the smallest is drawn. Savings are against the guided teacher of the same panel. Whiskers reach
    from the fastest to the slowest repeat.
    """
    rows = [row for row in rows if row["batch"] == min(row["batch"] for row in rows)]
    panels = _by_conditions(rows)
    heights = [len(methods) for methods in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 0.35 * (sum(heights) + len(panels))), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for ax, (conditions, methods) in zip(axes[:, 0], panels.items(), strict=True):
        names, left = [row["method"] for row in methods], np.zeros(len(methods))
        for part, label, colour in PARTS:
            milliseconds = 1000 * column(methods, f"{part}_seconds")
            ax.barh(names, milliseconds, left=left, color=colour, label=label)
            left += milliseconds
        median, low, high = (1000 * column(methods, key) for key in ("seconds_an_image", "lowest", "highest"))
        ax.errorbar(median, names, xerr=(median - low, high - median), fmt="none", ecolor="black", elinewidth=0.8)
        for y, saved in enumerate(column(methods, "saving_percent")):
            if saved:  # not at the guided sampler that the others are compared with
                change = f"{-saved:+.0f} %".replace("-", "−")
                ax.annotate(change, (high[y], y), xytext=(4, 0), textcoords="offset points", va="center")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_title(conditions, loc="left")
    batch, repeats = rows[0]["batch"], rows[0]["repeats"]
    axes[-1, 0].set_xlabel(f"milliseconds an image at batch {batch}, median and range of {repeats}")
    axes[0, 0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _by_conditions(rows: Rows) -> dict[str, Rows]:
    """Timings of one runtime and number of threads each, by what to call these."""
    return {
        f"{runtime}, {threads} thread" + "s" * (threads > 1): points
        for runtime, of_runtime in grouped(rows, "runtime").items()
        for threads, points in grouped(of_runtime, "threads").items()
    }


# ---------------------------------------------------------------------------------------------------------- all figures


class Plot(NamedTuple):
    """How a figure is drawn: from the rows of its CSV, a grid of images from its images too."""

    draw: Callable[..., Figure]
    caption: str
    claims: tuple[str, ...] = ()


KEPT = ("quality-kept", "alignment-kept", "distance-against-standard-distillation")
MEMORY = ("memory-half-training", "memory-half-before-distillation", "conventional-raises-memory")
INFERENCE = ("memory-half-inference",)
SPEED = ("inference-time-40-percent", "inference-time-as-deployed")
FLICKR = ("finetune-fid-below-base", "lcm-lora-fid-above-base", "larger-data-better")
FEW_STEPS = ("lcm-lora-alignment", "lcm-lora-against-untrained")
OVER_BATCHES = ("time-over-batch-and-resolution",)

FIGURES = {
    "00_world": Plot(image_grid, "Scenes of the bundled world, two styles"),
    "00_reader": Plot(reader_against_eye, "The reader against the eye, on generated pictures"),
    "00_loss": Plot(stage_losses, "Losses of the bundle's four training stages"),
    "00_vae": Plot(image_grid, "Drawn scenes and their VAE reconstructions"),
    "00_guidance": Plot(alignment_against_guidance, "Pictures of the bundle that are all right, against guidance"),
    "00_samples": Plot(image_grid, "Four prompts, one sample each, not selected"),
    "01_schemes": Plot(plots_memory.training_peaks, "Peak memory of every training scheme, by term", MEMORY),
    "01_sharing": Plot(
        plots_memory.saved_by_sharing, "What sharing W0 saves, against the batch", ("memory-half-sharing",)
    ),
    "01_inference": Plot(plots_memory.inference_peaks, "Peak memory of a sampling step", INFERENCE),
    "01_three_ways": Plot(
        plots_memory.account_against_measurement,
        "The account against simulation and measurement",
        ("memory-account-is-true", "conventional-raises-memory"),
    ),
    "01_measured_memory": Plot(plots_memory.measured_peaks, "Measured peak memory of the architecture's steps", MEMORY),
    "01_measured_seconds": Plot(plots_memory.measured_seconds, "Measured seconds an image of the architecture", SPEED),
    "02_guidance_curve": Plot(
        quality_against_guidance,
        "Quality against guidance. Dotted: the teacher's w. Short lines at w = 1: what the wrong names in the training "
        "captions alone would leave right",
    ),
    "02_guidance_grid": Plot(image_grid, "The same noise at several guidance scales"),
    "02_difference": Plot(
        guidance_against_timestep, "What guidance adds to the conditional pass, against the timestep"
    ),
    "02_loss": Plot(distillation_loss, "Distillation loss, LoRA against a full copy"),
    "02_quality_against_steps": Plot(
        quality_against_steps, "Quality against training steps; grey: the teacher and its 95 % interval", KEPT
    ),
    "02_same_noise": Plot(image_grid, "Teacher and students on the same noise", KEPT),
    "02_errors": Plot(
        errors_by_objects,
        "Errors, and likeness to the teacher, by number of objects; no error at all stands at half a picture",
        KEPT,
    ),
    "02_errors_against_passes": Plot(
        errors_against_passes,
        "Errors against UNet evaluations; solid: trained, dotted: the base, untrained",
        KEPT,
    ),
    "03_images": Plot(image_grid, "Six training images, one caption each"),
    "03_same_noise": Plot(image_grid, "Teacher, fine-tune and LCM-LoRA on the same noise", FLICKR),
    "03_quality_against_passes": Plot(
        plots_few_steps.quality_against_passes,
        "Errors, cleanness and distance against UNet evaluations, and errors by number of objects",
        FEW_STEPS,
    ),
    "03_composition": Plot(image_grid, "LCM-LoRA and the fine-tune added up, four steps"),
    "04_distance": Plot(distance_bars, "The slides' Figure 1: Frechet distance by method", FLICKR),
    "04_speed": Plot(speed_bars, "The slides' Figure 2: seconds an image", ("lcm-lora-2-4-times-faster",)),
    "04_rho": Plot(batch_cost, "What a batch costs against one twice as large", SPEED),
    "04_seconds_per_image": Plot(
        seconds_an_image,
        "Seconds an image",
        (*SPEED, "time-against-standard-distillation", "lcm-lora-2-4-times-faster", "larger-data-faster"),
    ),
    "04_pareto": Plot(pareto_front, "Quality against UNet evaluations, every method", FEW_STEPS),
    "04_saving": Plot(saving_against_batch, "Saved seconds against the batch", OVER_BATCHES),
    "dial": Plot(
        plots_dial.quality_by_scale,
        "Guidance in one pass a step by the weight of a LoRA, on the val split, and guidance itself on the same noise; "
        "bands: 95 % intervals",
    ),
    "growth": Plot(
        plots_growth.growth,
        "Images a second and peak memory of a training step of two adapters, against one thing at a time; right: one "
        "thread a process, memory of one of them",
    ),
    "sweep": Plot(
        plots_sweep.errors_by_value,
        "Errors and fit error on the val split by the value of one setting; ring: chosen, grey line: the profile's; "
        "bars: one standard error of the difference from the best value",
    ),
    "trajectories": Plot(
        plots_dial.fidelity_by_seconds,
        "Students of one guidance scale on the val split, trained at noised images of the teacher or at points of its "
        "sampling; bars: 95 % intervals",
    ),
}
