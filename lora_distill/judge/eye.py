"""The reader against the eye: what two lookers said of the objects of generated pictures, and what the reader says."""

from collections import Counter

from lora_distill.data.scenes import PLACES
from lora_distill.judge.reader import EMPTY, OTHER, Reader, Reading

TOLERANCES = tuple(round(0.5 + 0.1 * i, 1) for i in range(16))
RIGHT, DOUBLED, MELTED, MISSING, WRONG = LABELS = ("right", "doubled", "melted", "missing", "wrong")
ANSWERS = (RIGHT, "another object", OTHER, EMPTY, "background unknown")


def confusion(readings: list[Reading], labels: dict[str, list[dict[str, str]]]) -> list[dict]:
    """For each eye and each of `TOLERANCES`, how often the reader gives which answer to quarters of which label.

    `readings` are made with an infinite tolerance. `labels` has for each eye a row a picture: for each place, under its
    name, the label of its quarter, "empty" where nothing was asked for, and under "asked <place>" the kind asked for.
    """
    return [
        {"eye": eye, "tolerance": tolerance, "label": label, "reader": answer, "n": n}
        for eye, rows in labels.items()
        for tolerance in TOLERANCES
        for (label, answer), n in sorted(_counted(readings, rows, tolerance).items())
    ]


def _counted(readings: list[Reading], rows: list[dict[str, str]], tolerance: float) -> Counter[tuple[str, str]]:
    return Counter(
        (row[place], _answer(reading, number, row[f"asked {place}"], tolerance))
        for reading, row in zip(readings, rows, strict=True)
        for number, place in enumerate(PLACES)
    )


def _answer(reading: Reading, number: int, wanted: str, tolerance: float) -> str:
    if reading.background is None:
        return "background unknown"
    if reading.kinds[number] == EMPTY:
        return EMPTY
    if reading.errors[number] > tolerance:
        return OTHER
    return RIGHT if reading.kinds[number] == wanted else "another object"


def matrix(table: list[dict], tolerance: float = Reader.tolerance) -> list[dict]:
    """Of a confusion table, the counts at one tolerance: a row an eye and label, a column an answer of the reader."""
    rows = {}
    for row in table:
        if row["tolerance"] == tolerance:
            rows.setdefault((row["eye"], row["label"]), dict.fromkeys(ANSWERS, 0))[row["reader"]] = row["n"]
    order = {label: number for number, label in enumerate((*LABELS, EMPTY))}
    eyes = list(dict.fromkeys(eye for eye, _ in rows))
    keys = sorted(rows, key=lambda key: (eyes.index(key[0]), order[key[1]]))
    return [{"eye": eye, "label": label, **rows[eye, label]} for eye, label in keys]


def shares(table: list[dict]) -> list[dict]:
    """By eye and tolerance, of the objects asked for: the share right for the eye, the reader, and alike for both."""
    found = []
    for eye, tolerance in dict.fromkeys((row["eye"], row["tolerance"]) for row in table):
        rows = [r for r in table if (r["eye"], r["tolerance"]) == (eye, tolerance) and r["label"] != EMPTY]
        total = sum(row["n"] for row in rows)
        counts = {
            "labelled": sum(row["n"] for row in rows if row["label"] == RIGHT),
            "reader": sum(row["n"] for row in rows if row["reader"] == RIGHT),
            "alike": sum(row["n"] for row in rows if (row["label"] == RIGHT) == (row["reader"] == RIGHT)),
        }
        found.append({"eye": eye, "tolerance": tolerance, **{k: n / total for k, n in counts.items()}, "n": total})
    return found


def eyes_alike(one: list[dict[str, str]], other: list[dict[str, str]]) -> float:
    """The share of the objects asked for of which two eyes say alike whether they are right."""
    same = [
        (a[place] == RIGHT) == (b[place] == RIGHT)
        for a, b in zip(one, other, strict=True)
        for place in PLACES
        if a[place] != EMPTY
    ]
    return sum(same) / len(same)


def in_words(table: list[dict]) -> str:
    """What the table says at the reader's tolerance, a line an eye."""
    counts = {(row["eye"], row["label"]): row for row in matrix(table)}
    lines = []
    for row in shares(table):
        if row["tolerance"] == Reader.tolerance:
            good = counts[row["eye"], RIGHT]
            bad = [c for (eye, label), c in counts.items() if eye == row["eye"] and label not in (RIGHT, EMPTY)]
            taken = ", ".join(f"{c[RIGHT]} of {sum(c[a] for a in ANSWERS)} {c['label']}" for c in bad)
            refused = sum(good[a] for a in ANSWERS) - good[RIGHT]
            lines.append(
                f"The {row['eye']} eye finds {100 * row['labelled']:.1f} % of {row['n']} objects right, the reader "
                f"{100 * row['reader']:.1f} %; of each object they say alike in {100 * row['alike']:.1f} %. The reader "
                f"refuses {refused} of {refused + good[RIGHT]} right ones and takes for right {taken}."
            )
    return "\n".join(lines)
