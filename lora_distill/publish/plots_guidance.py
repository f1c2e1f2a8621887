"""The curves of notebook 02: what guidance does, what a student makes of it, and what it saves."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_distill.publish.style import REFERENCE, WIDTH, Rows, column, grouped, loss_by_method, share_with_interval

PARTS = (("text_encoder", "text encoder", "C4"), ("unet", "UNet", "C0"), ("vae", "VAE", "C2"))


def quality_against_guidance(rows: Rows) -> Figure:
    """Alignment and distance to real images against w; the teacher's w is dotted."""
    figure, (ax, ax_fd) = _quality_panels("guidance scale w")
    share_with_interval(ax, rows, "guidance_scale", "all_correct")
    distance, low, high = (column(rows, f"fd_efficientnet_lite0{end}") for end in ("", "_low", "_high"))
    spread = (distance - low, high - distance)
    ax_fd.errorbar(column(rows, "guidance_scale"), distance, spread, color="C1", marker="s")
    for panel in (ax, ax_fd):
        panel.axvline(rows[0]["teacher_guidance_scale"], color="0.5", linestyle=":", linewidth=1, label="teacher's w")
    ax.set_ylim(top=101)
    ax.legend(loc="lower right")
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
    figure, (ax, ax_fd) = _quality_panels("training step")
    for method, points in grouped(rows, "method").items():
        if points[0]["step"] is None:
            ax.axhline(100 * points[0]["all_correct"], label=method, **REFERENCE)
            ax_fd.axhline(points[0]["fd_efficientnet_lite0"], **REFERENCE)
            band = (points[0]["fd_efficientnet_lite0_low"], points[0]["fd_efficientnet_lite0_high"])
            ax_fd.axhspan(*band, color="0.9", zorder=0, label="95 % interval of the teacher's")
        else:
            share_with_interval(ax, points, "step", "all_correct", label=method)
            ax_fd.plot(column(points, "step"), column(points, "fd_efficientnet_lite0"))
    ax.set_ylim(top=101)
    ax.legend(loc="lower right")
    ax_fd.legend(loc="lower center", fontsize=7)
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

    Savings are against the first bar of the same panel. Whiskers reach from the fastest to the slowest repeat.
    """
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
        for y, row in list(enumerate(methods))[1:]:
            change = f"{-row['saving_percent']:+.0f} %".replace("-", "−")
            ax.annotate(change, (high[y], y), xytext=(4, 0), textcoords="offset points", va="center")
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_title(conditions, loc="left")
    batch, repeats = rows[0]["batch"], rows[0]["repeats"]
    axes[-1, 0].set_xlabel(f"milliseconds an image at batch {batch}, median and range of {repeats}")
    axes[0, 0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def _quality_panels(xlabel: str) -> tuple[Figure, tuple[Axes, Axes]]:
    figure, (ax, ax_fd) = plt.subplots(1, 2, figsize=(WIDTH, 2.5))
    ax.set(xlabel=xlabel, ylabel="all correct, %", title="alignment")
    ax_fd.set(xlabel=xlabel, ylabel="FD-EfficientNet-Lite0", title="distance to real images")
    return figure, (ax, ax_fd)


def _by_conditions(rows: Rows) -> dict[str, Rows]:
    """Timings of one runtime and number of threads each, by what to call these."""
    return {
        f"{runtime}, {threads} thread" + "s" * (threads > 1): points
        for runtime, of_runtime in grouped(rows, "runtime").items()
        for threads, points in grouped(of_runtime, "threads").items()
    }
