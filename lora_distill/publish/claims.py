"""The two ledgers: what the works claim that can be measured, and our checks; and what the tables of a run say of each.

The claims are data, assets/claims.yaml, whose head explains the keys; how each is ruled stands in `rules`.
"""

import math
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import pandas
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_distill.errors import InputError, MissingError
from lora_distill.publish import stamps
from lora_distill.publish.rules import (
    BLIND,
    DIRECTION,
    FAILS,
    HOLDS,
    NOT_REPRODUCED,
    REPRODUCED,
    RULES,
    UNTOLD,
    Interval,
)
from lora_distill.settings import PACKAGE, results_folders
from lora_distill.storage import read_frame

CLAIMS = PACKAGE / "assets" / "claims.yaml"
NOT_TESTABLE, CANNOT_TELL = "not testable here", "cannot tell"
WORKS = {
    "paper": "LoRA-Enhanced Distillation on Guided Diffusion Models",
    "slides": "Enhancing Image Generation with LCM LoRA Distillation",
    "checks": "What readers of both ask, and what this project asks of itself",
}


@dataclass(frozen=True)
class Ledger:
    """One of the two ledgers: what its claims are called, of which works they are, and what verdicts they can have."""

    name: str
    works: tuple[str, ...]
    verdicts: tuple[str, ...]  # the last is that of a claim that nothing was told about


LEDGERS = (
    Ledger("Claims of the works", ("paper", "slides"), (REPRODUCED, DIRECTION, NOT_REPRODUCED, NOT_TESTABLE)),
    Ledger("Our checks", ("checks",), (HOLDS, FAILS, CANNOT_TELL)),
)
BOUNDS = {"value": ("low", "high"), "seconds_an_image": ("lowest", "highest")}  # columns of intervals; else _low, _high
CONDITIONS = {  # columns of tables of what was measured, and of contrasts: how a value is written
    "machine": "{}", "dtype": "{}", "precision": "{}", "runtime": "{}", "batch": "batch {}", "resolution": "{} px",
    "repeats": "{} repeats", "n": "N = {}", "seeds": "seeds: {}", "trainings": "trainings: {}",
}  # fmt: skip


class ClaimsError(InputError):
    """A ledger or a table that cannot be read; the message is one line that names the claim or the file."""


class Missing(LookupError):
    """A number that this run did not measure."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Quantity(_Strict):
    """A number in a table of results: the column of the rows in which other columns have given values.

    `profile` names the run whose table is meant, where it is always the same one.
    """

    table: str
    profile: str = ""
    where: dict[str, str | int | float | bool] = {}
    column: str
    take: Literal["only", "min", "max", "median", "each", "interval", "intervals"] = "only"

    @property
    def columns(self) -> tuple[str, ...]:
        """The column, and those of its interval where that is taken."""
        bounds = BOUNDS.get(self.column, (f"{self.column}_low", f"{self.column}_high"))
        return (self.column, *bounds) if self.take.startswith("interval") else (self.column,)


Number = float | list[float] | Interval | list[Interval]  # what a quantity was measured to be


class Claim(_Strict):
    """One sentence of the ledger. Either it is measured, and ruled by its function, or `not_testable` says why not."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    work: Literal["paper", "slides", "checks"]
    statement: str
    source: str
    stated: str
    measured: dict[str, Quantity] = {}
    construction: str = ""
    not_testable: str = ""
    notes: str = ""

    @property
    def ledger(self) -> Ledger:
        """The ledger that the claim is in."""
        return next(each for each in LEDGERS if self.work in each.works)

    @model_validator(mode="after")
    def _either_measured_or_not_testable(self) -> "Claim":
        if bool(self.measured) == bool(self.not_testable):
            raise InputError("not_testable: needed where nothing is measured, and only there")
        return self


@dataclass(frozen=True)
class Verdict:
    """What a run says about a claim, one of its ledger's verdicts, with the numbers it rests on.

    `here` is our numbers in words, with a remark where they are too coarse, or why there are none.
    """

    claim: Claim
    quantities: dict[str, Number]
    verdict: str
    here: str

    @property
    def why(self) -> str:
        """The rule that was applied; why none was, where there are no numbers."""
        return RULES[self.claim.id].__doc__ if self.quantities else self.here


def load(path: Path = CLAIMS) -> list[Claim]:
    """Every claim, in the order of the file. Raises `ClaimsError` at the first claim that is not well formed."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ClaimsError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ClaimsError(f"{path.name}: expected a list of claims")
    claims = []
    for number, entry in enumerate(entries, start=1):
        place = f"{path.name}: claim {entry.get('id', number)}"
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            # a misspelt key is also a missing one: the spelling says more
            problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
            raise ClaimsError(f"{place}: {_explain(problem)}") from None
    ids = Counter(claim.id for claim in claims)
    if ids and max(ids.values()) > 1:
        raise ClaimsError(f"{path.name}: claim {ids.most_common(1)[0][0]}: id: is there twice")
    return claims


def judge(claim: Claim, folder: Path) -> Verdict:
    """The verdict on one claim from the tables in a folder of results.

    What was not measured there is told by no one. Raises `ClaimsError` for a table that cannot be read.
    """
    untold = claim.ledger.verdicts[-1]
    if claim.not_testable:
        return Verdict(claim, {}, untold, claim.not_testable)
    try:
        quantities = {name: measure(quantity, folder) for name, quantity in claim.measured.items()}
    except Missing as reason:
        return Verdict(claim, {}, untold, str(reason))
    try:
        verdict, here = RULES[claim.id](**quantities)
    except ArithmeticError as error:
        raise ClaimsError(f"claim {claim.id}: {error}") from None
    here += f"; by construction: {claim.construction}" if claim.construction else ""
    here += conditions(claim, folder)
    if verdict in (UNTOLD, BLIND):
        return Verdict(claim, quantities, untold, f"{here}: {verdict}")
    return Verdict(claim, quantities, verdict, here)


def ledger(folder: Path) -> list[Verdict]:
    """The verdicts on all claims from the tables in a folder of results. Raises `ClaimsError` as `judge` does."""
    return [judge(claim, folder) for claim in load()]


def measure(quantity: Quantity, folder: Path) -> Number:
    """Look a number up in the tables of a folder, in the unit of its column, or several, or with their intervals.

    Raises `Missing` when the table, the row or the value is not there, `ClaimsError` when the table is malformed.
    """
    path, table = _read(quantity, folder)
    if unknown := quantity.where.keys() - set(table.columns):
        raise ClaimsError(f"{path} has no column {min(unknown)!r}; it has {', '.join(map(str, table.columns))}")
    for column in quantity.columns:  # of photographs there is no reader's verdict, and without CLIP no cosine
        if column not in table.columns:
            raise Missing(f"no {column} in {path.name}")
    table = _rows(quantity, path, table)
    place = ", ".join(f"{column} {value}" for column, value in quantity.where.items())
    numbers = [_numbers(table[column], f"{path}: {column}, {place}") for column in quantity.columns]
    values = pandas.concat(numbers, axis=1).dropna()
    if (values.abs() == math.inf).any(axis=None):
        raise ClaimsError(f"{path}: {quantity.column}, {place}: expected finite numbers")
    if values.empty:
        raise Missing(f"no {quantity.column} in {path.name} for {place}")
    if quantity.take in ("min", "max", "median"):
        return float(values.iloc[:, 0].agg(quantity.take))
    found = [Interval(*row) if len(row) > 1 else row[0] for row in values.to_numpy().tolist()]
    if quantity.take in ("each", "intervals"):
        return found
    if len(found) > 1:
        raise ClaimsError(f"{path}: {len(found)} rows for {place}; one was expected")
    return found[0]


def conditions(claim: Claim, folder: Path) -> str:
    """What the numbers of a claim rest on, in brackets: of what `measure` measured machine, precision, runtime, batch
    and size; of a contrast how many prompts, seeds and trainings, or turns. Empty for other tables."""
    found: dict[str, set[str]] = {column: set() for column in CONDITIONS}
    for quantity in claim.measured.values():
        path, table = _read(quantity, folder)
        if {"machine", "against"} & set(table.columns):
            rows = _rows(quantity, path, table)
            for column in found.keys() & set(table.columns):
                found[column] |= {f"{value:g}" if isinstance(value, float) else str(value) for value in rows[column]}
    ordered = {column: sorted(values, key=lambda text: (len(text), text)) for column, values in found.items()}
    parts = [CONDITIONS[column].format(", ".join(values)) for column, values in ordered.items() if values]
    return f" [{'; '.join(parts)}]" if parts else ""


def check(folder: Path) -> None:
    """Raise `InputError` for a table that verdicts would rest on and that was changed after it was made."""
    others = {quantity.profile for claim in load() for quantity in claim.measured.values()} - {""}
    found = [[each for each in results_folders(profile) if each.is_dir()] for profile in sorted(others)]
    for each in (folder, *(first for first, *_ in filter(None, found))):
        stamps.check_tables(each)


def summary(verdicts: list[Verdict]) -> str:
    """How many claims of the works have which verdict, and then how many checks of ours, in a line."""
    return "; ".join(f"{name}: {found}" for name, found in counts(verdicts).items())


def counts(verdicts: list[Verdict]) -> dict[str, str]:
    """How many have which verdict, in words, by ledger."""
    return {ledger.name: _counted(ledger, verdicts) for ledger in LEDGERS}


def _counted(ledger: Ledger, verdicts: list[Verdict]) -> str:
    found = Counter(verdict.verdict for verdict in verdicts if verdict.claim.ledger == ledger)
    return f"{found.total()}, of them " + ", ".join(f"{found[name]} {name}" for name in ledger.verdicts)


def as_table(verdicts: list[Verdict]) -> str:
    """The ledgers in Markdown, a table for each work and one of our checks, each ledger with its count."""
    parts = []
    for ledger in LEDGERS:
        parts.append(f"**{ledger.name}: {_counted(ledger, verdicts)}.**")
        for work in ledger.works:
            rows = [(v.claim.statement, v.claim.stated, v.here, v.verdict) for v in verdicts if v.claim.work == work]
            lines = [f"| {WORKS[work]} | stated | here | verdict |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def as_text(verdicts: list[Verdict]) -> str:
    """The ledger for a terminal: every claim with its numbers, its rule and what there is to note."""
    blocks = []
    for v in verdicts:
        lines = [f"{v.claim.id}: {v.verdict}", v.claim.statement, f"stated: {v.claim.stated} ({v.claim.source})"]
        lines += [f"here: {v.here}"] + ([f"rule: {v.why}"] if v.quantities else [])
        blocks.append("\n    ".join(lines + ([v.claim.notes] if v.claim.notes else [])))
    return "\n".join([*blocks, "", summary(verdicts)])


def as_rows(verdicts: list[Verdict]) -> list[dict[str, str]]:
    """The ledger as rows of one shape, for a CSV."""
    return [
        {
            **{key: getattr(v.claim, key) for key in ("id", "work", "statement", "source", "stated")},
            "here": v.here,
            "verdict": v.verdict,
            "why": v.why,
            "quantities": "; ".join(f"{name} = {_written(value)}" for name, value in v.quantities.items()),
            "notes": v.claim.notes,
        }
        for v in verdicts
    ]


def _written(value: Number) -> str:
    if isinstance(value, Interval):
        return f"{value.value:.6g} ({value.low:.6g} to {value.high:.6g})"
    return ", ".join(map(_written, value)) if isinstance(value, list) else f"{value:.6g}"


def _read(quantity: Quantity, folder: Path) -> tuple[Path, pandas.DataFrame]:
    """The table of a quantity and where it lies: of another profile, in its run or else in its committed figures."""
    folders = results_folders(quantity.profile) if quantity.profile else (folder,)
    for path in (each / f"{quantity.table}.csv" for each in folders):
        try:
            return path, read_frame(path)
        except MissingError:
            continue
        except InputError as error:
            raise ClaimsError(f"{path} is no table: {str(error).removeprefix(str(path)).lstrip(':, ')}") from None
    of_profile = f" of profile {quantity.profile}" if quantity.profile else ""
    raise Missing(f"no {quantity.table}.csv{of_profile} yet")


def _rows(quantity: Quantity, path: Path, table: pandas.DataFrame) -> pandas.DataFrame:
    """The rows of a quantity's table in which other columns have the values of its `where`."""
    for column, value in quantity.where.items():
        found = table[column].astype(str) if isinstance(value, str) else table[column]
        if isinstance(value, int | float) and not isinstance(value, bool):
            found = _numbers(table[column], f"{path}: {column}")
        table = table[found == value]
    return table


def _numbers(column: pandas.Series, place: str) -> pandas.Series:
    """A column as numbers. Raises `ClaimsError` for one that holds text."""
    try:
        return pandas.to_numeric(column).astype(float)
    except (ValueError, TypeError):
        raise ClaimsError(f"{place}: expected numbers") from None


def _explain(error: dict[str, Any]) -> str:
    """One problem found by pydantic as `key: what is wrong`."""
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":  # our own validators say it all
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        known = [*Claim.model_fields, *Quantity.model_fields]
        close = get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}"
