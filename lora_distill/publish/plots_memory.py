"""The figures of notebook 01: where the memory goes."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_distill.publish.style import REFERENCE, WIDTH, Rows, column, grouped

# The terms of memory.TERMS, which cannot be imported without torch; a test holds them together.
COLOURS = {
    "weights": "C0",
    "lora": "C1",
    "gradients": "C2",
    "optimizer": "C3",
    "casts": "C4",
    "activations": "0.78",
}


def training_peaks(rows: Rows) -> Figure:
    """The peak of a training step by scheme and term, a panel a batch."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True)
    for ax, (batch, schemes) in zip(axes, grouped(rows, "batch").items(), strict=True):
        _stacked_bars(ax, schemes)
        checkpointing = ", gradient checkpointing" if schemes[0]["checkpointing"] else ""
        ax.set_title(f"batch {batch}{checkpointing}", loc="left")
    axes[1].set_xlabel("peak of a training step of SD 1.5 at 512 px in mixed precision, GB")
    axes[0].legend(loc="lower right")
    return figure


def inference_peaks(rows: Rows) -> Figure:
    """The peak of a sampling step by scheme and term, a panel a number of images."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 3.2), sharex=True)
    for ax, (images, schemes) in zip(axes, grouped(rows, "images").items(), strict=True):
        _stacked_bars(ax, schemes)
        ax.set_title(f"{images} image" + "s" * (images > 1), loc="left")
    axes[1].set_xlabel("peak of a sampling step of SD 1.5 at 512 px in 16 bits, GB")
    axes[0].legend(loc="lower right")
    return figure


def saved_by_sharing(rows: Rows) -> Figure:
    """The saving of one W0 over two in per cent against the batch, with and without gradient checkpointing."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), sharey=True)
    for ax, (checkpointing, panel) in zip(axes, grouped(rows, "checkpointing").items(), strict=True):
        for precision, points in grouped(panel, "precision").items():
            saving = 100 * (1 - column(points, "shared_gb") / column(points, "separate_gb"))
            # float32 and 16-bit coincide: dashes let the lower one be seen
            style = "--" if precision == "16-bit" else "-"
            ax.plot(column(points, "batch"), saving, linestyle=style, label=precision)
        batches = list(grouped(panel, "batch"))
        ax.axhline(50, **REFERENCE)
        ax.set(xscale="log", xticks=batches, xticklabels=batches, xlabel="batch", ylim=(0, 55))
        ax.minorticks_off()
        ax.set_title("gradient checkpointing" if checkpointing else "activations kept", loc="left")
    axes[0].set_ylabel("saved by sharing W0, %")
    axes[0].legend(title="precision")
    axes[1].annotate("the paper's 50 %", (0.97, 50), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    return figure


def account_against_measurement(rows: Rows) -> Figure:
    """How far the account is off in per cent, against the simulation and, where there is one, the measurement."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    largest = 0.0
    for (unet, schemes), marker in zip(grouped(rows, "unet").items(), ("o", "^"), strict=False):
        for kind, fill, size in (("simulation", "full", 4), ("measured", "none", 7)):
            known = [row for row in schemes if row[f"{kind}_gb"]]
            off = 100 * (column(known, f"account_to_{kind}") - 1)
            if known:
                label = f"{unet}, {'measurement' if kind == 'measured' else kind}"
                ax.plot(column(known, f"{kind}_gb"), off, marker, markersize=size, fillstyle=fill, label=label)
                largest = max(largest, *abs(off))
    ax.axhspan(-5, 5, color="0.93", zorder=0, label="± 5 %")
    ax.set(xscale="log", ylim=np.array((-1, 1)) * max(11, 1.1 * largest))
    ax.set(xlabel="peak simulated or measured, GB", ylabel="account is off by, %")
    ax.legend(loc="upper center", ncols=2)
    return figure


def _stacked_bars(ax: Axes, schemes: Rows) -> None:
    """A horizontal bar a scheme, of the terms that are not nothing everywhere, the total at its end."""
    labels, left = [row["label"] for row in schemes], np.zeros(len(schemes))
    for term, colour in COLOURS.items():
        sizes = column(schemes, f"{term}_gb")
        if sizes.any():
            ax.barh(labels, sizes, left=left, color=colour, label=term, height=0.7)
        left += sizes
    for y, total in enumerate(left):
        ax.annotate(f"{total:.3g}", (total, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set(xlim=(0, 1.12 * max(left)))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
