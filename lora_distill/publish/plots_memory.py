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

MEASURED = ("account_gb", "simulation_gb", "measured_gb", "process_gb")
PARTS = {"text_encoder": "text encoder", "unet": "UNet", "vae": "decoder"}


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


def measured_peaks(rows: Rows) -> Figure:
    """Measured peaks of one image beside account and simulation, a panel a device, size and precision, the largest."""
    rows = [row for row in rows if row["batch"] == 1]
    largest = max(row["resolution"] for row in rows)
    panels = grouped([row | {"panel": _panel(row)} for row in rows if row["resolution"] == largest], "panel")
    height = 0.8 + sum(0.4 + 0.2 * len(panel) for panel in panels.values())
    ratios = {"height_ratios": [2 + len(panel) for panel in panels.values()]}
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, height), squeeze=False, gridspec_kw=ratios)
    for ax, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        _measured_bars(ax, panel)
        ax.set_title(title, loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    axes[-1, 0].set_xlabel("peak of a step, GB")
    return figure


def _panel(row: dict) -> str:
    return f"{row['machine']}: {row['resolution']} px, batch {row['batch']}, {row['precision']}"


def _measured_bars(ax: Axes, rows: Rows) -> None:
    """A bar a scheme of its live tensors, within that of the whole process; account and simulation as marks."""
    labels, places = [row["label"] for row in rows], np.arange(len(rows))
    known = {key: np.array([row[key] or np.nan for row in rows], dtype=float) for key in MEASURED}
    whole = "whole process" if rows[0]["device"] == "cpu" else "reserved by the allocator"
    ax.barh(places, known["process_gb"], color="0.85", height=0.7, label=whole)
    ax.barh(places, known["measured_gb"], color="C0", height=0.4, label="tensors, measured")
    ax.plot(known["account_gb"], places, "|", color="black", markersize=9, label="on paper")
    ax.plot(known["simulation_gb"], places, "x", color="C1", markersize=5, label="simulated")
    for y, row in enumerate(rows):
        if row["measured_gb"] is None:
            ax.annotate("not measured", (0, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set(xlim=(0, 1.05 * np.nanmax(list(known.values()))))
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def measured_seconds(rows: Rows) -> Figure:
    """Seconds of an image by part, a panel a device, dtype and way of measuring, and what each saves."""
    rows = [row for row in rows if row["seconds_an_image"] and row["batch"] == 1]
    panels = grouped([row | {"panel": _seconds_panel(row)} for row in rows], "panel")
    height = 0.8 + sum(0.4 + 0.2 * len(panel) for panel in panels.values())
    ratios = {"height_ratios": [2 + len(panel) for panel in panels.values()]}
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, height), squeeze=False, gridspec_kw=ratios)
    for ax, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        _seconds_bars(ax, panel)
        ax.set_title(title, loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[-1, 0].set_xlabel("seconds an image")
    return figure


def _seconds_panel(row: dict) -> str:
    return f"{row['machine']}: {row['resolution']} px, {row['dtype']}, {row['how']}"


def _seconds_bars(ax: Axes, rows: Rows) -> None:
    """A bar a sampler, of text encoder, UNet and decoder, with what it saves at its end."""
    labels, left = [row["method"] for row in rows], np.zeros(len(rows))
    for key, colour in (("text_encoder", "C2"), ("unet", "C0"), ("vae", "0.7")):
        seconds = column(rows, f"{key}_seconds")
        ax.barh(labels, seconds, left=left, color=colour, height=0.7, label=PARTS[key])
        left += seconds
    for y, (row, total) in enumerate(zip(rows, left, strict=True)):
        saved = f" (−{row['saving_percent']:.0f} %)" if row["saving_percent"] else ""
        text = f"{total:.3g}{saved}"
        ax.annotate(text, (total, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    ax.set(xlim=(0, 1.2 * max(left)))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


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
