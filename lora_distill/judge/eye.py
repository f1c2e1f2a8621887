"""The reader against the eye: 200 generated pictures, looked at once, and what the reader says of them."""

from collections import Counter

from lora_distill.data.scenes import PLACES
from lora_distill.judge.reader import EMPTY, OTHER, Reader, Reading

TOLERANCES = tuple(round(Reader.tolerance * tenths / 10, 3) for tenths in range(4, 17))
RIGHT, DOUBLED, MELTED, MISSING, WRONG = LABELS = ("right", "doubled", "melted", "missing", "wrong")
ANSWERS = (RIGHT, "another object", OTHER, EMPTY, "background unknown")


def confusion(readings: list[Reading], labels: list[dict[str, str]]) -> list[dict]:
    """How often the reader gives which answer to quarters of which label, a row a pair, for each of `TOLERANCES`.

    `readings` are made with an infinite tolerance. A row of `labels` has, for each place, the label of its quarter
    under the place's name, "empty" where nothing was asked for, and the kind that was asked for under "asked <place>".
    """
    table = []
    for tolerance in TOLERANCES:
        counted = Counter(
            (row[place], _answer(reading, number, row[f"asked {place}"], tolerance))
            for reading, row in zip(readings, labels, strict=True)
            for number, place in enumerate(PLACES)
        )
        table += [
            {"tolerance": tolerance, "eye": label, "reader": answer, "n": counted[label, answer]}
            for label, answer in sorted(counted)
        ]
    return table


def _answer(reading: Reading, number: int, wanted: str, tolerance: float) -> str:
    if reading.background is None:
        return "background unknown"
    if reading.kinds[number] == EMPTY:
        return EMPTY
    if reading.errors[number] > tolerance:
        return OTHER
    return RIGHT if reading.kinds[number] == wanted else "another object"


def matrix(table: list[dict], tolerance: float = Reader.tolerance) -> list[dict]:
    """Of a confusion table, the counts at one tolerance: a row a label of the eye, a column an answer of the reader."""
    counts = {(row["eye"], row["reader"]): row["n"] for row in table if row["tolerance"] == tolerance}
    labels = [label for label in (*LABELS, EMPTY) if any(eye == label for eye, _ in counts)]
    return [{"eye": label, **{answer: counts.get((label, answer), 0) for answer in ANSWERS}} for label in labels]


def shares(table: list[dict]) -> list[dict]:
    """By tolerance, of the objects asked for: the share that is right for the eye, the reader, and alike for both."""
    found = []
    for tolerance in dict.fromkeys(row["tolerance"] for row in table):
        rows = [row for row in table if row["tolerance"] == tolerance and row["eye"] != EMPTY]
        total = sum(row["n"] for row in rows)
        counts = {
            "eye": sum(row["n"] for row in rows if row["eye"] == RIGHT),
            "reader": sum(row["n"] for row in rows if row["reader"] == RIGHT),
            "alike": sum(row["n"] for row in rows if (row["eye"] == RIGHT) == (row["reader"] == RIGHT)),
        }
        found.append({"tolerance": tolerance, **{name: n / total for name, n in counts.items()}, "n": total})
    return found


def in_words(table: list[dict]) -> str:
    """What the table says at the reader's tolerance."""
    (chosen,) = [row for row in shares(table) if row["tolerance"] == Reader.tolerance]
    counts = {row["eye"]: row for row in matrix(table)}
    bad = {label: row for label, row in counts.items() if label not in (RIGHT, EMPTY)}
    let_by = ", ".join(f"{row[RIGHT]} of {sum(row[a] for a in ANSWERS)} {label}" for label, row in bad.items())
    good = counts[RIGHT]
    return (
        f"Of {chosen['n']} objects the eye finds {100 * chosen['eye']:.1f} % right, the reader with tolerance "
        f"{Reader.tolerance:g} {100 * chosen['reader']:.1f} %; of each single object both say the same in "
        f"{100 * chosen['alike']:.1f} %. The reader refuses {sum(good[a] for a in ANSWERS) - good[RIGHT]} of "
        f"{sum(good[a] for a in ANSWERS)} right ones, and takes for right {let_by}."
    )
