"""Figures on disk: saved with the numbers they show, and drawn again from these, to the same bytes, without a model."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lora_distill import processes
from lora_distill.errors import InputError, MissingError
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.style import grouped
from lora_distill.settings import ENOUGH_PROMPTS, PACKAGE, Settings, figures_dir
from lora_distill.storage import atomic_write, device_name, git_commit, read_table, table_text

STYLE = PACKAGE / "assets" / "figures.mplstyle"
THUMBNAIL = 128  # pixels, as a grid shows a picture at most an inch wide
PROVENANCE = "provenance.json"  # of a profile's figures: what made the results that they show
NO_DATES = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}}


def save(name: str, settings: Settings, rows: list[dict], images: np.ndarray | None = None) -> Figure | None:
    """Write runs/<profile>/figures/<name>.csv and, drawn from it, .svg and .png; return the figure.

    A grid's `images`, (n, h, w, 3) uint8, one a row, go to <name>_images.png. What made the results goes to
    provenance.json and into each file's metadata. The figure is closed for pyplot: a cell that ends in it shows it
    once. Of several processes the main one alone draws. Raises ValueError for a name that plots.FIGURES lacks, and for
    rows that it cannot draw.
    """
    if name not in FIGURES:
        raise InputError(f"no figure {name!r} in lora_distill/publish/plots.py")
    if not processes.is_main():
        return None
    folder = figures_dir(settings)
    data = {f"{name}.csv": table_text(rows).encode()}
    if images is not None:
        data[f"{name}_images.png"] = image_sheet(images, lines=len(grouped(rows, "row")))
    for file, content in data.items():
        atomic_write(folder / file, content)
    source = {
        "profile": settings.profile,
        "eval_prompts": settings.eval_prompts,
        "params": hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16],
        "commit": git_commit(),
        "device": device_name(settings.device),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in data.items()},
    }
    known = read_provenance(folder) if (folder / PROVENANCE).exists() else {}
    write_provenance(folder, known | {name: source})
    return draw(name, folder, source)


def redraw(folder: Path, *, pdf: bool = False) -> list[Path]:
    """Draw all figures of a folder anew from what `save` left, as PDF too where asked; return the paths of the SVGs.

    Raises ValueError or FileNotFoundError, in one line that names the file, when one is missing or has changed.
    """
    provenance = read_provenance(folder)
    names = [name for name in FIGURES if name in provenance]
    for name in names:
        check(folder, provenance[name]["sha256"])
    for name in names:
        draw(name, folder, provenance[name], pdf=pdf)
    return [folder / f"{name}.svg" for name in names]


def draw(name: str, folder: Path, source: dict[str, Any], *, pdf: bool = False) -> Figure:
    """Draw one figure from its saved rows and images and write it as SVG and PNG, `source` in their metadata."""
    plot = FIGURES[name]
    rows = read_table(folder / f"{name}.csv")
    sheet = folder / f"{name}_images.png"
    images = [read_images(sheet, rows)] if sheet.name in source["sha256"] else []
    with plt.style.context(STYLE, after_reset=True):  # neither a matplotlibrc nor a notebook changes the bytes
        try:
            figure = plot.draw(rows, *images)
        except KeyError as column:
            raise InputError(f"{folder / name}.csv has no column {column}; run its notebook again") from None
        if (prompts := source.get("eval_prompts", ENOUGH_PROMPTS)) < ENOUGH_PROMPTS:
            mark = f"{prompts} prompts: not a result"
            figure.text(0.5, 0.5, mark, color="#bbbbbb", fontsize=20, ha="center", rotation=20)
        comment = json.dumps({**{key: source[key] for key in source if key != "sha256"}, "claims": plot.claims})
        metadata = {
            "svg": {"Title": plot.caption, "Description": comment, **NO_DATES["svg"]},
            "png": {"Title": plot.caption, "Comment": comment, "Software": None},
        }
        if pdf:
            metadata["pdf"] = {"Title": plot.caption, "Keywords": comment, **NO_DATES["pdf"]}
        for kind, fields in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, metadata=fields)
            atomic_write(folder / f"{name}.{kind}", buffer.getvalue())
    plt.close(figure)
    return figure


def check(folder: Path, digests: dict[str, str]) -> None:
    """Raise FileNotFoundError or ValueError for the first file of a figure that is missing or was changed."""
    for file, digest in digests.items():
        if not (folder / file).exists():
            raise MissingError(f"{folder / file} is missing; run its notebook again")
        if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
            raise InputError(f"{folder / file} is damaged or was changed by hand; run its notebook again")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What made the results of each figure of a folder. Raises FileNotFoundError, or ValueError for a damaged file."""
    path = folder / PROVENANCE
    if not path.exists():
        raise MissingError(f"no figures in {folder}; python -m lora_distill reproduce makes them")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write what made the results of each figure of a folder, in the order of their names."""
    atomic_write(folder / PROVENANCE, json.dumps(dict(sorted(provenance.items())), indent=1) + "\n")


def grid_rows(labels: list[str], captions: list[str]) -> list[dict]:
    """The table of a grid of images, line by line: a label for every line, a caption for every column."""
    return [
        {"row": label, "column": column, "caption": caption}
        for label in labels
        for column, caption in enumerate(captions)
    ]


def image_sheet(images: np.ndarray, lines: int) -> bytes:
    """Images (n, h, w, 3) uint8 side by side in so many lines, as PNG; larger ones are shrunk to a side of 128 px."""
    if (longest := max(images.shape[1:3])) > THUMBNAIL:
        size = tuple(round(side * THUMBNAIL / longest) for side in images.shape[2:0:-1])
        images = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])
    n, h, w, _ = images.shape
    sheet = images.reshape(lines, n // lines, h, w, 3).transpose(0, 2, 1, 3, 4).reshape(lines * h, -1, 3)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def read_images(path: Path, rows: list[dict]) -> np.ndarray:
    """The images of a sheet that `image_sheet` made, one a row of the table, (n, h, w, 3) uint8."""
    lines = len(grouped(rows, "row"))
    columns = len(rows) // lines
    sheet = np.asarray(Image.open(path).convert("RGB"))
    h, w = sheet.shape[0] // lines, sheet.shape[1] // columns
    return sheet.reshape(lines, h, columns, w, 3).transpose(0, 2, 1, 3, 4).reshape(-1, h, w, 3)
