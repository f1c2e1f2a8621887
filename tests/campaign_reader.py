"""The reader against many drawn pictures, and against the eye, by hand: python tests/campaign_reader.py WHAT.

drawn: reads 5,000 drawn pictures of each style; all must be read as they were drawn.
sheets: draws 200 pictures with the bundled pipeline, by several samplers and guidance scales so that bad ones are among
them, and writes them to figures/reader as numbered sheets of 20, with labels.csv to be filled in by eye.
table: writes confusion.csv, what the reader says of these pictures at several tolerances, from sheets and labels.
"""

import csv
import io
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lora_distill.data import scenes
from lora_distill.data.teacher import scene_prompts
from lora_distill.judge import eye
from lora_distill.judge.reader import EMPTY, Reader, asked
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators
from lora_distill.writing import atomic_write

FOLDER = Path(__file__).parents[1] / "figures" / "reader"
SAMPLERS = (  # eight, for 25 pictures each
    Sampler(25, 1.0), Sampler(25, 3.0), Sampler(25, 7.5), Sampler(25, 10.0), Sampler(2, 3.0), Sampler(4, 3.0),
    Sampler(3, 3.0, scheduler="dpm++"), Sampler(2, 1.0),
)  # fmt: skip
COUNT, A_SHEET, COLUMNS, SCALE, TEXT, GAP = 200, 20, 5, 4, 44, 8
EYES = {"first": "labels.csv", "second": "labels_second.csv"}  # of two who labelled without knowing of each other


# ---------------------------------------------------------------------------------------------- drawn pictures


def read_drawn(count: int = 5_000) -> None:
    """Read drawn pictures; exit with the first that is not read as it was drawn."""
    reader = Reader()
    for style in scenes.STYLES:
        data = scenes.sample_scenes(style, "test", count, seed=99)
        for start in range(0, count, 250):
            part = data[start : start + 250]
            for scene, reading in zip(part, reader.read(np.stack([scenes.draw(s) for s in part])), strict=True):
                found = (reading.background, reading.style, reading.kinds)
                assert found == (scene.background, style, asked(scene)), f"{scene}: {reading}"
        print(f"{style}: {count} of {count} read as they were drawn", flush=True)


# ---------------------------------------------------------------------------------------------- sheets for the eye


def order() -> np.ndarray:
    """The number of a picture on the sheets, for each as it was drawn: who looks does not know the sampler."""
    return np.random.default_rng(0).permutation(COUNT)


def write_sheets(pipeline: str = "bundled", folder: Path = FOLDER) -> None:
    """Draw the pictures, and write sheets and the labels to be filled in."""
    pipe, prompts, each = load_pipeline(pipeline), scene_prompts("noto", "test", COUNT, seed=11), COUNT // len(SAMPLERS)
    empty, noise = encode_prompts(pipe, [""]), initial_noise(pipe, COUNT, seed=11)
    embeds, generators = encode_prompts(pipe, prompts.captions), step_generators(COUNT, seed=11)
    images, rows = [None] * COUNT, [None] * COUNT
    for number, sampler in enumerate(SAMPLERS):
        part = slice(number * each, (number + 1) * each)
        drawn = decode_latents(pipe, sample(pipe, sampler, noise[part], embeds[part], empty, generators[part]))
        for i, image in zip(range(part.start, part.stop), drawn, strict=True):
            place = int(order()[i])
            images[place], rows[place] = image, _row(place, prompts.captions[i], prompts.scenes[i], sampler)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, COUNT, A_SHEET):
        captions = [row["caption"] for row in rows[start : start + A_SHEET]]
        sheet = draw_sheet(np.stack(images[start : start + A_SHEET]), captions, start)
        sheet.save(folder / f"sheet_{start // A_SHEET + 1:02}.png", optimize=True)
    atomic_write(folder / "labels.csv", _text(rows))


def _row(number: int, caption: str, scene: scenes.Scene, sampler: Sampler) -> dict:
    wanted = dict(zip(scenes.PLACES, asked(scene), strict=True))
    looked = {place: EMPTY if kind == EMPTY else "" for place, kind in wanted.items()}
    drawn = {"sampler": sampler.scheduler, "steps": sampler.steps, "w": sampler.guidance_scale}
    kinds = {f"asked {place}": kind for place, kind in wanted.items()}
    return {"number": number, "caption": caption, **looked, **kinds, **drawn}


def draw_sheet(images: np.ndarray, captions: list[str], first: int) -> Image.Image:
    """Pictures (n, 64, 64, 3) at four times their size, each below its number and caption."""
    side = SCALE * scenes.IMAGE_SIZE
    lines = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (side + GAP), lines * (side + TEXT)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = _corner(i)
        said = "\n".join(textwrap.wrap(f"{first + i}: {caption}", 43)[:3])
        pen.multiline_text((x, y - TEXT + 2), said, fill="black", spacing=1)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
    return sheet


def _corner(i: int) -> tuple[int, int]:
    side = SCALE * scenes.IMAGE_SIZE
    return i % COLUMNS * (side + GAP), i // COLUMNS * (side + TEXT) + TEXT


def read_sheets(folder: Path = FOLDER) -> np.ndarray:
    """The pictures of all sheets, (n, 64, 64, 3) uint8, exactly as they were drawn."""
    side, images = SCALE * scenes.IMAGE_SIZE, []
    for path in sorted(folder.glob("sheet_*.png")):
        with Image.open(path) as opened:
            sheet = np.asarray(opened.convert("RGB"))
        for x, y in map(_corner, range(A_SHEET)):
            images.append(sheet[y : y + side : SCALE, x : x + side : SCALE])
    return np.stack(images)


# ---------------------------------------------------------------------------------------------- the reader and the eye


def read_labels(folder: Path = FOLDER, name: str = "first") -> list[dict]:
    """What an eye said, with what was asked. Raises ValueError for a row that is not filled in."""
    first, own = ({row["number"]: row for row in _rows(folder / EYES[one])} for one in ("first", name))
    rows = [first[number] | labels for number, labels in own.items()]
    for row in rows:
        for place in scenes.PLACES:
            allowed = (EMPTY, eye.WRONG) if row[f"asked {place}"] == EMPTY else eye.LABELS
            if row[place] not in allowed:
                raise ValueError(f"{EYES[name]}: picture {row['number']}, {place}: expected {', '.join(allowed)}")
    return rows


def _rows(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def confusion(folder: Path = FOLDER) -> list[dict]:
    """The table of the pictures in `folder` and of what both eyes said of them."""
    reader = Reader()
    reader.tolerance = np.inf
    labels = {name: read_labels(folder, name) for name in EYES}
    return eye.confusion(reader.read(read_sheets(folder)), labels)


def write_table(folder: Path = FOLDER) -> None:
    """Write confusion.csv, and print by tolerance how often an object is right for the eye, the reader, both alike."""
    table = confusion(folder)
    atomic_write(folder / "confusion.csv", _text(table))
    for row in eye.shares(table):
        said = ", ".join(f"{name} {100 * row[name]:.1f} %" for name in ("labelled", "reader", "alike"))
        chosen = " (chosen)" * (row["tolerance"] == Reader.tolerance)
        print(f"{row['eye']} eye, tolerance {row['tolerance']:g}: {said}{chosen}")


def _text(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader(), writer.writerows(rows)
    return file.getvalue()


if __name__ == "__main__":
    {"drawn": read_drawn, "sheets": write_sheets, "table": write_table}[sys.argv[1]](*sys.argv[2:3])
