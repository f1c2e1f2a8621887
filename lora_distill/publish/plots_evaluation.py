"""The figures of notebook 04: the slides' bars with ours beside them, the Pareto front, saving against batch."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lora_distill.publish.style import REFERENCE, STYLES, WIDTH, Rows, column, grouped, share_with_interval


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
    methods = grouped(rows, "method")
    for index, (method, points) in enumerate(methods.items()):
        aside = 2 ** (0.015 * (index - len(methods) / 2))  # points of one number of evaluations stand side by side
        shifted = [{**row, "unet_passes": aside * row["unet_passes"]} for row in points]
        style = {"linestyle": "-" if points[0]["trained"] else ":", "elinewidth": 0.9, **STYLES.get(method, {})}
        share_with_interval(ax, shifted, "unet_passes", "content", label=method, **style)
    ordered = sorted(rows, key=lambda row: row["unet_passes"])
    best = [100 * max(r["content"] for r in ordered if r["unet_passes"] <= row["unet_passes"]) for row in ordered]
    ax.step(column(ordered, "unet_passes"), best, where="post", color="0.8", linewidth=5, zorder=0, marker="")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="UNet evaluations an image", ylabel="content correct, %", ylim=(0, 103))
    figure.legend(*ax.get_legend_handles_labels(), fontsize=6.5, loc="outside lower center", ncols=4)
    return figure


def saving_against_batch(rows: Rows) -> Figure:
    """What each method saves of the teacher's seconds, and f (1 - rho) for one pass; a panel a resolution.

    Whiskers reach from the method's slowest to its fastest repeat, against the teacher's median.
    """
    panels = grouped(rows, "resolution")
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.5), sharey=True)
    for ax, (resolution, points) in zip(axes, panels.items(), strict=True):
        batches = list(grouped(points, "batch"))
        for method, line in grouped(points, "method").items():
            saving = column(line, "saving_percent")
            teacher = column(line, "seconds_an_image") / (1 - saving / 100)
            ends = [100 * (1 - column(line, key) / teacher) for key in ("highest", "lowest")]
            spread = np.abs(np.array(ends) - saving)  # up to rounding, the median lies between the ends
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
