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
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lora_distill.data import scenes
from lora_distill.data.teacher import scene_prompts
from lora_distill.judge.reader import EMPTY, OTHER, Reader, asked
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators
from lora_distill.writing import atomic_write

FOLDER = Path(__file__).parents[1] / "figures" / "reader"
SAMPLERS = (  # eight, for 25 pictures each
    Sampler(25, 1.0), Sampler(25, 3.0), Sampler(25, 7.5), Sampler(25, 10.0), Sampler(2, 3.0), Sampler(4, 3.0),
    Sampler(3, 3.0, scheduler="dpm++"), Sampler(2, 1.0),
)  # fmt: skip
COUNT, A_SHEET, COLUMNS, SCALE, TEXT, GAP = 200, 20, 5, 4, 44, 8
LABELS = ("right", "doubled", "melted", "missing", "wrong")  # of an object that was asked for, as the eye sees it
NOTHING = "empty"  # of a quarter where none was asked for; what stands there all the same is "wrong"
TOLERANCES = tuple(round(0.15 + 0.05 * i, 2) for i in range(10))


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
    looked = {place: NOTHING if kind == EMPTY else "" for place, kind in wanted.items()}
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


def read_labels(folder: Path = FOLDER) -> list[dict]:
    """The rows of labels.csv. Raises ValueError for one that is not filled in."""
    rows = list(csv.DictReader(io.StringIO((folder / "labels.csv").read_text(encoding="utf-8"))))
    for row in rows:
        for place in scenes.PLACES:
            allowed = (NOTHING, "wrong") if row[f"asked {place}"] == EMPTY else LABELS
            if row[place] not in allowed:
                raise ValueError(f"labels.csv: picture {row['number']}, {place}: expected {', '.join(allowed)}")
    return rows


def confusion(images: np.ndarray, rows: list[dict]) -> list[dict]:
    """For each tolerance, how often the reader gives which answer to a quarter of which label."""
    reader = Reader()
    reader.tolerance = np.inf
    readings, table = reader.read(images), []
    for tolerance in TOLERANCES:
        counted = Counter()
        for reading, row in zip(readings, rows, strict=True):
            for place, kind, error in zip(scenes.PLACES, reading.kinds, reading.errors, strict=True):
                found = kind if kind == EMPTY or error <= tolerance else OTHER
                counted[row[place], answer(found, row[f"asked {place}"], reading.background)] += 1
        for label, said in sorted(counted):
            table.append({"tolerance": tolerance, "eye": label, "reader": said, "n": counted[label, said]})
    return table


def answer(kind: str, wanted: str, background: str | None) -> str:
    """What the reader's answer to a quarter comes to."""
    if background is None:
        return "background unknown"
    if kind in (EMPTY, OTHER):
        return kind
    return "right" if kind == wanted else "another object"


def shares(table: list[dict]) -> dict[float, dict[str, float]]:
    """By tolerance, of the asked quarters: the share that is right for the eye, for the reader, and for both alike."""
    found = {}
    for tolerance in dict.fromkeys(row["tolerance"] for row in table):
        rows = [row for row in table if row["tolerance"] == tolerance and row["eye"] != NOTHING]
        counts = {
            "eye": [row["n"] for row in rows if row["eye"] == "right"],
            "reader": [row["n"] for row in rows if row["reader"] == "right"],
            "alike": [row["n"] for row in rows if (row["eye"] == "right") == (row["reader"] == "right")],
        }
        found[tolerance] = {name: sum(ns) / sum(row["n"] for row in rows) for name, ns in counts.items()}
    return found


def write_table(folder: Path = FOLDER) -> None:
    """Write confusion.csv, and print by tolerance how often an object is right for the eye, the reader, both alike."""
    table = confusion(read_sheets(folder), read_labels(folder))
    atomic_write(folder / "confusion.csv", _text(table))
    for tolerance, found in shares(table).items():
        said = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found.items())
        print(f"tolerance {tolerance:g}: {said}{' (chosen)' * (tolerance == Reader.tolerance)}")


def _text(rows: list[dict]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    writer.writeheader(), writer.writerows(rows)
    return file.getvalue()


if __name__ == "__main__":
    {"drawn": read_drawn, "sheets": write_sheets, "table": write_table}[sys.argv[1]](*sys.argv[2:3])
