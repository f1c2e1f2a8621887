"""What several figures have in common: groups of rows, intervals, loss curves, grids of images.

Rows are dicts as they stand in a figure's CSV; shares are fractions there and per cent on an axis.
"""

import textwrap
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lora_distill.errors import InputError

Rows = list[dict[str, Any]]
WIDTH = 5.5  # inches of a text column
GAP = 0.03  # inches between the images of a grid
# The colours of methods that several figures show: samplers of the base, what has learnt few steps, and one pass.
STYLES = {
    "teacher, two passes": {"color": "C4", "marker": "v"},
    "teacher, w = 7.5": {"color": "C4", "marker": "v", "markerfacecolor": "white"},
    "student, w = 7.5": {"color": "0.45", "marker": "*", "markersize": 8},
    "no guidance": {"color": "C1", "marker": "s"},
    "DDIM, one pass": {"color": "C0", "marker": "o"},
    "LCM scheduler, one pass": {"color": "C1", "marker": "s"},
    "DDIM, guided": {"color": "C4", "marker": "v"},
    "DPM-Solver++, guided": {"color": "C5", "marker": "P"},
    "LCM scheduler, guided": {"color": "C1", "marker": "s", "markerfacecolor": "white"},
    "half guided": {"color": "C0", "marker": "D", "markerfacecolor": "white"},
    "LCM-LoRA 8k": {"color": "C2", "marker": "^"},
    "LCM-LoRA 30k": {"color": "C2", "marker": "^", "markerfacecolor": "white"},
    "LoRA mimics LCM": {"color": "C3", "marker": "D"},
    "LCM, all weights": {"color": "C3", "marker": "s", "markerfacecolor": "white"},
    "fine-tune + LCM-LoRA 8k": {"color": "0.45", "marker": "P"},
    "teacher": {"color": "black", "marker": "h"},
    "LoRA student": {"color": "black", "marker": "*", "markersize": 8},
    "full copy": {"color": "black", "marker": "*", "markersize": 8, "markerfacecolor": "white"},
    "fine-tuned, rank 16": {"color": "0.45", "marker": "X"},
}
OBJECTS = {  # a colour and marker for each number of objects, light to dark
    "1": {"color": "#8fc93a", "marker": "o"},
    "2": {"color": "#21a585", "marker": "s"},
    "3": {"color": "#2f6d8e", "marker": "^"},
    "4": {"color": "#440154", "marker": "D"},
}
CALIBRATION = {  # what the Frechet distance of some images means: the column's end, and in words
    "_other_style": ("the other drawing style", "-."),
    "_vae": ("real images after the VAE", "--"),
    "_floor": ("other real images", ":"),
}
REFERENCE = {"color": "0.5", "linestyle": "--", "linewidth": 1}  # of lines that nothing was trained for


def grouped(rows: Rows, key: str) -> dict[Any, Rows]:
    """Rows by their value of a column, in the order in which the values first appear."""
    return {value: [row for row in rows if row[key] == value] for value in dict.fromkeys(row[key] for row in rows)}


def column(rows: Rows, key: str) -> np.ndarray:
    """The values of a column, (n,)."""
    return np.array([row[key] for row in rows])


ALIGNMENTS = {  # columns of what counts: what stands at the axis, the factor to its unit and the axis' end
    "all_correct": ("all correct, %", 100, 101),
    "content": ("content correct, %", 100, 102),
    "clip_cosine": ("CLIP cosine", 1, None),
    "fd_efficientnet_lite0": ("FD-EfficientNet-Lite0", 1, None),
}


def alignment_of(rows: Rows) -> str:
    """The column of what counts in rows: a share of scenes, of photographs the cosine or else the distance."""
    return next(name for name in ALIGNMENTS if name in rows[0])


def value_with_interval(ax: Axes, rows: Rows, x: str, value: str, **style: Any) -> None:
    """A curve of what counts in its unit, with the interval of the columns `low` and `high`, if any, as error bars."""
    factor = ALIGNMENTS[value][1] if value in ALIGNMENTS else 100
    values, low, high = (factor * column(rows, key).astype(float) for key in (value, "low", "high"))
    ax.errorbar(column(rows, x), values, np.abs([low - values, high - values]), **style)


def numbered(objects: int | str) -> str:
    """A number of objects in words."""
    return f"{objects} object{'s' if str(objects) != '1' else ''}"


def errors_with_interval(ax: Axes, rows: Rows, x: str, **style: Any) -> None:
    """A curve of errors in per cent on a log axis, with their intervals; no error at all stands at half a one."""
    least = np.array([50 / (row["n"] * row.get("seeds", 1)) for row in rows])
    values, low, high = (np.maximum(100 * column(rows, key).astype(float), least) for key in ("errors", "low", "high"))
    ax.errorbar(column(rows, x), values, np.abs([low - values, high - values]), **style)
    log_axis(ax)


def log_axis(ax: Axes) -> None:
    """A log axis that says 0.5, 1, 2, 5, 10."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def calibration_lines(ax: Axes, rows: Rows) -> None:
    """Lines at the Frechet distances that say what others mean, where rows have them; the axis is in powers of ten."""
    for end, (label, line) in CALIBRATION.items():
        known = {row.get(f"fd_efficientnet_lite0{end}") for row in rows} - {None}
        if known:
            ax.axhline(known.pop(), **REFERENCE | {"linestyle": line, "marker": "", "label": label})
            log_axis(ax)


def loss_by_method(rows: Rows, ylabel: str) -> Figure:
    """Training losses, a curve a method; a method without steps is a line."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.4))
    for method, points in grouped(rows, "method").items():
        if points[0]["step"] is None:
            ax.axhline(points[0]["loss"], label=method, **REFERENCE)
        else:
            ax.plot(column(points, "step"), column(points, "loss"), label=method, marker="", linewidth=1.2)
    ax.set(xlabel="training step", ylabel=ylabel, ylim=(0, None))
    ax.legend()
    return figure


def image_grid(rows: Rows, images: np.ndarray) -> Figure:
    """Images (n, h, w, 3) uint8, one a row of the table, under their captions and beside the labels of their lines.

    A caption that the image above has too is not written again. Raises ValueError when a line of the grid is not full.
    """
    lines = grouped([{**row, "image": image} for row, image in zip(rows, images, strict=True)], "row")
    columns = len(rows) // len(lines)
    if {len(line) for line in lines.values()} != {columns}:
        raise InputError(f"{len(rows)} images do not fill {len(lines)} lines of a grid")
    label = 0.85 if any(lines) else 0.0  # inches, as all that follows
    cell = min(1.0, (WIDTH - label) / columns)
    captions = [[_wrapped(row["caption"]) for row in line] for line in lines.values()]
    captions = captions[:1] + [[""] * columns if line == above else line for above, line in pairwise(captions)]
    figure, ax = plt.subplots()
    y = 0.0
    for (name, line), titles in zip(lines.items(), captions, strict=True):
        y += max((0.04 + 0.115 * len(title.splitlines()) for title in titles if title), default=0)
        for x, row, title in zip(np.arange(columns) * cell, line, titles, strict=True):
            extent = (x, x + cell - GAP, y + cell - GAP, y)
            ax.imshow(row["image"], interpolation="nearest", extent=extent)
            ax.text(x + cell / 2, y - 0.03, title, fontsize=6, ha="center", va="bottom", parse_math=False)
        ax.text(-0.06, y + cell / 2, name or "", ha="right", va="center", parse_math=False)
        y += cell
    ax.set(xlim=(-label, columns * cell), ylim=(y, 0))
    ax.set_axis_off()
    figure.set_size_inches(label + columns * cell, y)
    figure.get_layout_engine().set(w_pad=0, h_pad=0)
    return figure


def _wrapped(caption: str | None) -> str:
    return textwrap.fill(str(caption or ""), 16, max_lines=10, placeholder=" …")
