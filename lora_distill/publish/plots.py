"""The figures of the series: how each is drawn from its rows, what it shows, and the claims it bears on."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lora_distill.publish import plots_few_steps, plots_memory
from lora_distill.publish.style import (
    ALIGNMENTS,
    REFERENCE,
    STYLES,
    WIDTH,
    Rows,
    alignment_of,
    column,
    grouped,
    image_grid,
    loss_by_method,
    value_with_interval,
)

STAGES = {"vae_crops": "VAE, crops", "vae_images": "VAE, images", "text_encoder": "text encoder", "unet": "UNet"}
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
    """What the reader finds correct, attribute by attribute; without a guidance scale stand the reconstructions."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.4))
    sampled = [row for row in rows if row["guidance_scale"] is not None]
    for attribute, points in grouped(sampled, "attribute").items():
        value_with_interval(ax, points, "guidance_scale", "correct", label=attribute)
    for row in rows:
        if row["guidance_scale"] is None:
            ax.axhline(100 * row["correct"], label=row["attribute"], **REFERENCE)
    ax.set(xlabel="guidance scale w", ylabel=f"correct, % of {rows[0]['n']:,} pictures", ylim=(None, 102))
    ax.legend(loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------------- 02: guidance


def quality_against_guidance(rows: Rows) -> Figure:
    """Alignment and distance to real images against w; the teacher's w is dotted."""
    figure, ax, ax_fd = _quality_panels("guidance scale w", rows)
    distance, low, high = (column(rows, f"fd_efficientnet_lite0{end}") for end in ("", "_low", "_high"))
    spread = (distance - low, high - distance)
    ax_fd.errorbar(column(rows, "guidance_scale"), distance, spread, color="C1", marker="s")
    if ax:
        value_with_interval(ax, rows, "guidance_scale", alignment_of(rows))
        ax.set_ylim(top=ALIGNMENTS[alignment_of(rows)][2])
    for panel in figure.axes:
        panel.axvline(rows[0]["teacher_guidance_scale"], color="0.5", linestyle=":", linewidth=1, label="teacher's w")
    figure.axes[0].legend(loc="lower right")
    return figure


def guidance_against_timestep(rows: Rows) -> Figure:
    """The size of what guidance adds to the output of the conditional pass."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.2))
    ax.plot(column(rows, "timestep"), column(rows, "relative_difference"))
    ax.set(xlabel="timestep t (noise grows to the right)", ylim=(0, None))
    ax.set_ylabel("size of the difference\n/ size of the output")
    return figure


def distillation_loss(rows: Rows) -> Figure:
    """The loss of the students, a curve a method."""
    return loss_by_method(rows, "MSE to the guided teacher")


def quality_against_steps(rows: Rows) -> Figure:
    """Alignment and distance to real images against training steps; the row without a step is the teacher.

    The band is the 95 % interval of the teacher's distance over its images; that of each point is about as wide.
    """
    figure, ax, ax_fd = _quality_panels("training step", rows)
    aligned = alignment_of(rows)
    _, factor, top = ALIGNMENTS[aligned]
    for method, points in grouped(rows, "method").items():
        if points[0]["step"] is None:
            ax_fd.axhline(points[0]["fd_efficientnet_lite0"], **REFERENCE)
            band = (points[0]["fd_efficientnet_lite0_low"], points[0]["fd_efficientnet_lite0_high"])
            ax_fd.axhspan(*band, color="0.9", zorder=0, label="95 % interval of the teacher's")
        else:
            ax_fd.plot(column(points, "step"), column(points, "fd_efficientnet_lite0"), label=None if ax else method)
        if ax and points[0]["step"] is None:
            ax.axhline(factor * points[0][aligned], label=method, **REFERENCE)
        elif ax:
            value_with_interval(ax, points, "step", aligned, label=method)
    if ax:
        ax.set_ylim(top=top)
        ax.legend(loc="lower right")
    ax_fd.legend(loc="lower center", fontsize=7)
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
        ax.barh(names, [row["distance"] or 0 for row in methods], **spread)
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
    """Content against UNet evaluations of every method: trained ones solid, samplers of the base dotted.

    Points of one number of evaluations stand side by side. What is best at its number or fewer is the front, the
    grey steps.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 3.8))
    aligned = alignment_of(rows)
    name, factor, top = ALIGNMENTS[aligned]
    better = min if aligned.startswith("fd_") else max
    methods = grouped(rows, "method")
    for index, (method, points) in enumerate(methods.items()):
        aside = 2 ** (0.015 * (index - len(methods) / 2))  # points of one number of evaluations stand side by side
        shifted = [{**row, "unet_passes": aside * row["unet_passes"]} for row in points]
        style = {"linestyle": "-" if points[0]["trained"] else ":", "elinewidth": 0.9, **STYLES.get(method, {})}
        value_with_interval(ax, shifted, "unet_passes", aligned, label=method, **style)
    ordered = sorted(rows, key=lambda row: row["unet_passes"])
    best = [factor * better(r[aligned] for r in ordered if r["unet_passes"] <= row["unet_passes"]) for row in ordered]
    ax.step(column(ordered, "unet_passes"), best, where="post", color="0.8", linewidth=5, zorder=0, marker="")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="UNet evaluations an image", ylabel=name, ylim=(0, top + 1) if top else None)
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
    ax.legend()
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
    "00_loss": Plot(stage_losses, "Losses of the bundle's four training stages"),
    "00_vae": Plot(image_grid, "Drawn scenes and their VAE reconstructions"),
    "00_guidance": Plot(alignment_against_guidance, "Alignment of the bundle against guidance"),
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
    "02_guidance_curve": Plot(quality_against_guidance, "Quality against guidance"),
    "02_guidance_grid": Plot(image_grid, "The same noise at several guidance scales"),
    "02_difference": Plot(guidance_against_timestep, "What guidance adds, against the timestep"),
    "02_loss": Plot(distillation_loss, "Distillation loss, LoRA against a full copy"),
    "02_quality_against_steps": Plot(quality_against_steps, "Quality against training steps", KEPT),
    "02_same_noise": Plot(image_grid, "Teacher and students on the same noise", KEPT),
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
    "04_pareto": Plot(pareto_front, "Content against UNet evaluations, every method", FEW_STEPS),
    "04_saving": Plot(saving_against_batch, "Saved seconds against the batch", OVER_BATCHES),
}
