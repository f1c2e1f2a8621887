"""Figures on disk: saved with the numbers they show, and drawn again from these, to the same bytes, without a model."""

import hashlib
import io
import json
import textwrap
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from pydantic import BaseModel, Field, TypeAdapter

from lora_distill import processes
from lora_distill.errors import InputError, MissingError, reading
from lora_distill.publish import stamps
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.stamps import PROVENANCE, sha256
from lora_distill.publish.style import grouped
from lora_distill.settings import ENOUGH_PROMPTS, PACKAGE, Settings, figures_dir
from lora_distill.storage import device_name, git_commit, read_table, table_text
from lora_distill.writing import atomic_write, whole_file

STYLE = PACKAGE / "assets" / "figures.mplstyle"
CHARACTERS = 20  # of a caption, in an inch
THUMBNAIL = 128  # pixels, as a grid shows a picture at most an inch wide
WITHOUT_FIGURE = {"bench"}  # tables that `save_rows` writes
NO_DATES = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}}


def save(
    name: str, settings: Settings, rows: list[dict], images: np.ndarray | None = None, folder: Path | None = None
) -> Figure | None:
    """Write runs/<profile>/figures/<name>.csv and, drawn from it, .svg and .png; return the figure.

    They go to another `folder` where it is given. A grid's `images`, (n, h, w, 3) uint8, one a row, go to
    <name>_images.png. What made the results goes to provenance.json and into each file's metadata. The figure is closed
    for pyplot: a cell that ends in it shows it once. Of several processes the main one alone draws. Raises ValueError
    for a name that plots.FIGURES lacks, and for rows that it cannot draw.
    """
    if name not in FIGURES:
        raise InputError(f"no figure {name!r} in lora_distill/publish/plots.py")
    if not processes.is_main():
        return None
    folder = folder or figures_dir(settings)
    data = {f"{name}.csv": table_text(rows).encode()}
    if images is not None:
        data[f"{name}_images.png"] = image_sheet(images, lines=len(grouped(rows, "row")))
    source = _source(settings, data)
    known = _known(folder)
    with ExitStack() as stack:  # all of a figure or nothing: no new table beside an old picture
        places = {file: _write(stack, folder / file, content) for file, content in data.items()}
        figure, drawn = render(name, folder, source, places=places)
        for file, content in (drawn | {PROVENANCE: provenance_text(known | {name: source})}).items():
            _write(stack, folder / file, content)
    return figure


def save_rows(name: str, settings: Settings, rows: list[dict], folder: Path) -> Path:
    """Write a table that no figure shows, <name>.csv, and what made it to provenance.json; return its path."""
    data = {f"{name}.csv": table_text(rows).encode()}
    known = _known(folder) | {name: _source(settings, data)}
    with ExitStack() as stack:
        for file, content in (data | {PROVENANCE: provenance_text(known)}).items():
            _write(stack, folder / file, content)
    return folder / f"{name}.csv"


def _source(settings: Settings, data: dict[str, bytes]) -> dict[str, Any]:
    """What made the results of a figure or table, whose files are `data`."""
    return {
        "profile": settings.profile,
        "eval_prompts": settings.eval_prompts,
        "params": hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16],
        "commit": git_commit(),
        "device": device_name(settings.device),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in data.items()},
    }


def _write(stack: ExitStack, path: Path, content: bytes) -> Path:
    """Write a file that gets its name when the stack ends well; return its place until then."""
    temporary = stack.enter_context(whole_file(path))
    temporary.write_bytes(content)
    return temporary


def redraw(folder: Path, *, pdf: bool = False) -> list[Path]:
    """Draw all figures of a folder anew from what `save` left, as PDF too where asked; return the paths of the SVGs.

    Raises ValueError or FileNotFoundError, in one line that names the file, when one is missing or has changed.
    """
    provenance = read_provenance(folder)
    if not (names := [name for name in FIGURES if name in provenance]):
        raise MissingError(f"no figures in {folder}; python -m lora_distill reproduce makes them")
    for name in names:
        check(folder, provenance[name]["sha256"])
    for name in names:
        _, drawn = render(name, folder, provenance[name], pdf=pdf)
        with ExitStack() as stack:
            for file, content in drawn.items():
                _write(stack, folder / file, content)
    if _provenance(folder)[0] != provenance:
        atomic_write(folder / PROVENANCE, provenance_text(provenance))
    stamps.renew(folder.parent, (folder / f"{name}.{kind}" for name in names for kind in ("svg", "png")))
    return [folder / f"{name}.svg" for name in names]


def render(
    name: str, folder: Path, source: dict[str, Any], *, pdf: bool = False, places: dict[str, Path] | None = None
) -> tuple[Figure, dict[str, bytes]]:
    """Draw one figure from its saved rows and images: the figure, and as SVG and PNG with `source` in their metadata.

    `places` says where files lie that have no name in the folder yet.
    """
    plot, places = FIGURES[name], places or {}
    table, sheet = f"{name}.csv", f"{name}_images.png"
    rows = read_table(places.get(table, folder / table))
    with plt.style.context(STYLE, after_reset=True):  # neither a matplotlibrc nor a notebook changes the bytes
        with reading(folder / table, f"what figure {name} shows; run its notebook again"):
            images = [read_images(places.get(sheet, folder / sheet), rows)] if sheet in source["sha256"] else []
            try:
                figure = plot.draw(rows, *images)
            except KeyError as column:
                raise InputError(f"{folder / table} has no column {column}; run its notebook again") from None
        if (prompts := source.get("eval_prompts", ENOUGH_PROMPTS)) < ENOUGH_PROMPTS:
            mark = f"{prompts} prompts: not a result"
            figure.text(0.5, 0.5, mark, color="#bbbbbb", fontsize=20, ha="center", rotation=20)
        comment = json.dumps({**{key: source[key] for key in source if key != "sha256"}, "claims": plot.claims})
        _print_below(figure, f"Figure {_number(name)}. {plot.caption}. {_basis(rows, source)}")
        metadata = {
            "svg": {"Title": plot.caption, "Description": comment, **NO_DATES["svg"]},
            "png": {"Title": plot.caption, "Comment": comment, "Software": None},
        }
        if pdf:
            metadata["pdf"] = {"Title": plot.caption, "Keywords": comment, **NO_DATES["pdf"]}
        drawn = {f"{name}.{kind}": _saved(figure, kind, fields) for kind, fields in metadata.items()}
    plt.close(figure)
    return figure, drawn


def _number(name: str) -> str:
    """A figure's number: its notebook's, and its place among the figures of that notebook; of a command its name."""
    notebook, of_notebook, _ = name.partition("_")
    if not of_notebook:
        return name
    return f"{notebook}.{1 + [other for other in FIGURES if other.startswith(notebook)].index(name)}"


def _basis(rows: list[dict], source: dict[str, Any]) -> str:
    """What a figure rests on: N, seeds and trainings, where its rows say them, profile and device."""
    parts = []
    for column, said in (("n", "N ="), ("seeds", "seeds:"), ("trainings", "trainings:")):
        values = [row[column] for row in rows if isinstance(row.get(column), int)]
        if values:
            least, most = min(values), max(values)
            parts.append(f"{said} {least:,}" + (f" to {most:,}" if most > least else ""))
    parts += [f"profile {source['profile']}"] if "profile" in source else []
    text = ", ".join([*parts, *([source["device"]] if source.get("device") else [])])
    return f"{text[:1].upper()}{text[1:]}."


def _print_below(figure: Figure, text: str) -> None:
    """Write the caption under all of a figure, which `savefig.bbox: tight` makes room for; the layout stays."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for legend in figure.legends:  # one outside of the axes would follow the lower edge down into the caption
        box = legend.get_window_extent().transformed(figure.transFigure.inverted())
        legend.borderaxespad = 0
        legend.set_loc("lower left")
        legend.set_bbox_to_anchor((box.x0, box.y0), transform=figure.transFigure)
    lines = textwrap.fill(text, max(40, int(CHARACTERS * figure.get_figwidth())))
    below = figure.get_tightbbox().y0 - 0.08  # inches
    figure.text(0, below / figure.get_figheight(), lines, fontsize=7, va="top", color="0.25", parse_math=False)


def _saved(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def check(folder: Path, digests: dict[str, str]) -> None:
    """Raise FileNotFoundError or ValueError for the first file of a figure that is missing or was changed."""
    for file, digest in digests.items():
        if not (folder / file).is_file():
            raise MissingError(f"{folder / file} is missing; run its notebook again")
        if sha256(folder / file) != digest:
            raise InputError(f"{folder / file} is damaged or was changed by hand; run its notebook again")


def read_provenance(folder: Path) -> dict[str, Any]:
    """What made the results of each figure of a folder; empty where there is no figure.

    What the file lacks, or all of it when it cannot be read, is taken from the pictures, which hold it too; a warning
    says so. Raises `InputError` where neither says it.
    """
    known, problem = _provenance(folder)
    lost = [name for name in FIGURES if name not in known and (folder / f"{name}.csv").is_file()]
    restored = {name: _from_picture(folder, name) for name in lost if (folder / f"{name}.png").is_file()}
    if restored:
        why = problem or f"{folder / PROVENANCE} lacks {next(iter(restored))}"
        warnings.warn(f"{why}; made again from the pictures", stacklevel=2)
    elif problem and (folder / PROVENANCE).exists():
        raise InputError(f"{folder / PROVENANCE} is damaged; delete it, and run the notebooks again")
    return known | restored


def _provenance(folder: Path) -> tuple[dict[str, Any], str]:
    """What provenance.json says, and why it says nothing."""
    path = folder / PROVENANCE
    try:
        with reading(path, "what made each figure"):
            known = TypeAdapter(dict[str, dict[str, Any]]).validate_json(path.read_bytes(), strict=True)
            for name in known.keys() & (FIGURES.keys() | WITHOUT_FIGURE):
                Source.model_validate(known[name])
            return known, ""
    except InputError as error:
        return {}, str(error)


def _known(folder: Path) -> dict[str, Any]:
    """`read_provenance` where a figure is about to be written: what cannot be known does not hinder it."""
    if not folder.is_dir():
        return {}
    try:
        return read_provenance(folder)
    except InputError as error:
        warnings.warn(f"{error}; begun anew", stacklevel=3)
        return {}


def _from_picture(folder: Path, name: str) -> dict[str, Any]:
    """What made a figure, as its PNG says. Raises `InputError` for one that does not."""
    path = folder / f"{name}.png"
    with reading(path, "a figure that says what made it; run its notebook again"):
        with Image.open(path) as picture:
            source = json.loads(picture.text["Comment"])
        source.pop("claims")
        files = [file for file in (f"{name}.csv", f"{name}_images.png") if (folder / file).is_file()]
        restored = source | {"sha256": {file: sha256(folder / file) for file in files}}
        Source.model_validate(restored)
        return restored


class Source(BaseModel, extra="allow", strict=True):
    """What made the results of one figure, as far as it is read; `sha256` has the files that it is drawn from."""

    eval_prompts: int = ENOUGH_PROMPTS
    sha256: dict[Annotated[str, Field(pattern=r"^[\w-]+\.(csv|png)$")], str]


def provenance_text(provenance: dict[str, Any]) -> bytes:
    """What made the results of each figure of a folder, in the order of their names, as the content of a file."""
    return (json.dumps(dict(sorted(provenance.items())), indent=1) + "\n").encode()


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
