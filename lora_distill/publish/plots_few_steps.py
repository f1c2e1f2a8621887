"""The figures of notebook 03: what few steps cost in errors, in cleanness and in distance, and by number of objects."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lora_distill.publish.style import ALIGNMENTS, CALIBRATION, STYLES, WIDTH, Rows, alignment_of, column, grouped

FD = "fd_efficientnet_lite0"
PLAIN = ("DDIM, one pass",)  # methods that the panels by number of objects leave out


def quality_against_passes(rows: Rows) -> Figure:
    """Errors, fit error and distance against UNet evaluations, and below them the errors by number of objects.

    Trained methods are solid, samplers of the base dotted; a method of a single point is a marker. Errors are on a
    logarithmic axis, where none at all is drawn as half an error. Of photographs there is what counts and the distance.
    """
    whole = [row for row in rows if row["objects"] == "all"]
    numbers = {name: part for name, part in grouped(rows, "objects").items() if name != "all"}
    aligned = alignment_of(rows)
    panels = [aligned] if aligned != FD else []
    panels += ["fit_error"] * bool(numbers) + [FD]
    figure = plt.figure(figsize=(WIDTH, 5.0 if numbers else 2.9))
    above, *below = figure.subfigures(2, 1, height_ratios=(1, 0.8)) if numbers else [figure]
    for ax, name in zip(above.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _panel(ax, whole, name)
        ax.set_xlabel("UNet evaluations")
    if numbers:
        _by_objects(below[0], numbers, aligned)
    handles = _handles(figure)
    figure.legend(handles.values(), handles, fontsize=6.5, loc="outside lower center", ncols=3)
    return figure


def _by_objects(figure: Any, numbers: dict[str, Rows], aligned: str) -> None:
    axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for ax, (count, points) in zip(axes, numbers.items(), strict=True):
        _panel(ax, [row for row in points if row["method"] not in PLAIN], aligned)
        ax.set_title(f"{count} object" + "s" * (count != "1"), fontsize=8)
        ax.set(xlabel="evaluations", ylabel="")
    axes[0].set_ylabel("errors, %")


def _panel(ax: Axes, rows: Rows, name: str) -> None:
    """One measure of every method against its UNet evaluations."""
    share = name in ALIGNMENTS and ALIGNMENTS[name][1] == 100
    for method, points in grouped(rows, "method").items():
        style = {"linestyle": "-" if points[0]["trained"] else ":", "elinewidth": 0.8, "linewidth": 1.1}
        style |= STYLES.get(method, {}) | {"markersize": 4, "label": method}
        x = column(points, "unet_passes")
        if share:
            ax.errorbar(x, *_errors(points, name), **style)
        else:
            ax.errorbar(x, column(points, name).astype(float), **style)
    if name == FD:
        _calibrate(ax, rows[0])
    label = "errors, %" if share else {"fit_error": "fit error of the objects"}.get(name) or ALIGNMENTS[name][0]
    ax.set(xscale="log", ylabel=label)
    if share:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    passes = sorted({row["unet_passes"] for row in rows})
    ax.set_xticks([n for n in passes if n in (1, 2, 4, 8, 16) or n == passes[-1]])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def _errors(points: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Per cent that is wrong with its interval, (n,) and (2, n); none at all as half an error."""
    least = 50 / column(points, "n").astype(float)
    wrong, low, high = (100 * (1 - column(points, key).astype(float)) for key in (name, "high", "low"))
    wrong, low = np.maximum(wrong, least), np.maximum(low, least)
    return wrong, np.abs([low - wrong, np.maximum(high, wrong) - wrong])


def _calibrate(ax: Axes, row: dict[str, Any]) -> None:
    """Distances of real images, as lines with their names."""
    for end, (text, line) in CALIBRATION.items():
        if (distance := row.get(f"{FD}{end}")) is not None:
            ax.axhline(distance, color="0.5", linestyle=line, linewidth=0.8)
            ax.annotate(text, (0.98, distance), xycoords=("axes fraction", "data"), xytext=(0, 1.5),
                        textcoords="offset points", ha="right", fontsize=5.5, color="0.3",
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})  # fmt: skip
    ax.set_ylim(0, 1.05 * ax.get_ylim()[1])


def _handles(figure: Figure) -> dict[str, Any]:
    """The entries of a common legend: each method once."""
    pairs = [zip(*ax.get_legend_handles_labels(), strict=True) for ax in figure.get_axes()]
    return {label: handle for pair in pairs for handle, label in pair}
