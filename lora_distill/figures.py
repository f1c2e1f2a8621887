"""Figures: one style, and each one saved as SVG, PDF and PNG with its numbers as CSV beside it."""

import csv
import hashlib
import io
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lora_distill.metrics import Proportion
from lora_distill.provenance import atomic_write, git_commit
from lora_distill.settings import Settings, figures_dir

STYLE = Path(__file__).parent / "assets" / "figures.mplstyle"
NO_DATES = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}}


def use_style() -> None:
    """Draw everything that follows in the project's style."""
    plt.style.use(STYLE)


def save_figure(figure: Figure, name: str, settings: Settings, rows: list[dict], caption: str) -> None:
    """Write figures/<profile>/<name>.svg, .pdf, .png and .csv; the files are the same for the same numbers.

    The caption and the provenance (settings, commit) go into the files' metadata. Anything drawn from `smoke` is
    marked as no result.
    """
    if settings.profile == "smoke":
        figure.text(0.5, 0.5, "smoke profile: not a result", color="#bbbbbb", fontsize=20, ha="center", rotation=20)
    folder = figures_dir(settings)
    params = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
    source = json.dumps({"params": params, "profile": settings.profile, "commit": git_commit()})
    metadata = {
        "svg": {"Title": caption, "Description": source, **NO_DATES["svg"]},
        "pdf": {"Title": caption, "Keywords": source, **NO_DATES["pdf"]},
        "png": {"Title": caption, "Comment": source, "Software": None},
    }
    for kind, fields in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=fields)
        atomic_write(folder / f"{name}.{kind}", buffer.getvalue())
    save_table(folder / f"{name}.csv", rows)


def save_table(path: Path, rows: list[dict]) -> None:
    """Rows of one shape as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, buffer.getvalue())


def errors(proportions: list[Proportion]) -> np.ndarray:
    """Error bars (2, n) of proportions, in percent, for `Axes.errorbar`."""
    bounds = np.array([p.interval for p in proportions]) * 100
    values = np.array([p.value for p in proportions]) * 100
    return np.abs(bounds.T - values)


def image_grid(rows: dict[str, np.ndarray], captions: list[str], width: float = 5.5) -> Figure:
    """Images in rows with a label each, (n, h, w, 3) uint8, under one caption a column."""
    label = 0.85 if any(rows) else 0.0  # inches for the row labels
    top = 0.4 if any(captions) else 0.0
    cell = (width - label) / len(captions)
    figure, axes = plt.subplots(len(rows), len(captions), figsize=(width, cell * len(rows) + top), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for ax, caption in zip(axes[0], captions, strict=True):
        ax.set_title(_wrapped(caption), fontsize=6)
    return figure


def _wrapped(caption: str, width: int = 18) -> str:
    lines = [""]
    for word in caption.split():
        lines = [*lines, word] if len(lines[-1]) + len(word) > width else [*lines[:-1], f"{lines[-1]} {word}".strip()]
    return "\n".join(lines)
