"""The ledger of claims: what the two works say that can be measured, and what the tables of a run say about it.

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
from lora_distill.publish.rules import NOT_REPRODUCED, PARTLY, REPRODUCED, RULES, UNTOLD
from lora_distill.settings import PACKAGE, results_folders
from lora_distill.storage import read_frame

CLAIMS = PACKAGE / "assets" / "claims.yaml"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_TESTABLE)
WORKS = {
    "paper": "LoRA-Enhanced Distillation on Guided Diffusion Models",
    "slides": "Enhancing Image Generation with LCM LoRA Distillation",
    "readers": "What readers of both ask for",
}


CONDITIONS = {  # columns of tables that `measure` writes
    "machine": ("machine",), "precision": ("dtype", "precision"), "runtime": ("runtime",), "batch": ("batch",),
    "resolution": ("resolution",),
}  # fmt: skip
CONDITION_TEXTS = {"batch": "batch {}", "resolution": "{} px"}


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
    take: Literal["only", "min", "max", "median", "each"] = "only"


class Claim(_Strict):
    """One sentence of the ledger. Either it is measured, and ruled by its function, or `not_testable` says why not."""

    id: str = Field(pattern=r"^[a-z0-9-]+$")
    work: Literal["paper", "slides", "readers"]
    statement: str
    source: str
    stated: str
    measured: dict[str, Quantity] = {}
    not_testable: str = ""
    notes: str = ""

    @model_validator(mode="after")
    def _either_measured_or_not_testable(self) -> "Claim":
        if bool(self.measured) == bool(self.not_testable):
            raise InputError("not_testable: needed where nothing is measured, and only there")
        return self


@dataclass(frozen=True)
class Verdict:
    """What a run says about a claim, one of VERDICTS, with the numbers it rests on.

    `here` is our numbers in words, with a remark where they are too coarse, or why there are none.
    """

    claim: Claim
    quantities: dict[str, float | list[float]]
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

    What was not measured there makes it "not testable here". Raises `ClaimsError` for a table that cannot be read.
    """
    if claim.not_testable:
        return Verdict(claim, {}, NOT_TESTABLE, claim.not_testable)
    try:
        quantities = {name: measure(quantity, folder) for name, quantity in claim.measured.items()}
    except Missing as reason:
        return Verdict(claim, {}, NOT_TESTABLE, str(reason))
    try:
        verdict, here = RULES[claim.id](**quantities)
    except ArithmeticError as error:
        raise ClaimsError(f"claim {claim.id}: {error}") from None
    here += conditions(claim, folder)
    if verdict in UNTOLD:
        return Verdict(claim, quantities, NOT_TESTABLE, f"{here}: {verdict}")
    return Verdict(claim, quantities, verdict, here)


def ledger(folder: Path) -> list[Verdict]:
    """The verdicts on all claims from the tables in a folder of results. Raises `ClaimsError` as `judge` does."""
    return [judge(claim, folder) for claim in load()]


def measure(quantity: Quantity, folder: Path) -> float | list[float]:
    """Look a number up in the tables of a folder, in the unit of its column; a list of numbers where each is taken.

    Raises `Missing` when the table, the row or the value is not there, `ClaimsError` when the table is malformed.
    """
    path, table = _read(quantity, folder)
    if unknown := quantity.where.keys() - set(table.columns):
        raise ClaimsError(f"{path} has no column {min(unknown)!r}; it has {', '.join(map(str, table.columns))}")
    if quantity.column not in table.columns:  # of photographs there is no reader's verdict, and without CLIP no cosine
        raise Missing(f"no {quantity.column} in {path.name}")
    table = _rows(quantity, path, table)
    place = ", ".join(f"{column} {value}" for column, value in quantity.where.items())
    values = _numbers(table[quantity.column], f"{path}: {quantity.column}, {place}").dropna()
    if values.abs().max() == math.inf:
        raise ClaimsError(f"{path}: {quantity.column}, {place}: expected finite numbers")
    if values.empty:
        raise Missing(f"no {quantity.column} in {path.name} for {place}")
    if quantity.take == "each":
        return values.astype(float).to_list()
    if quantity.take != "only":
        return float(values.agg(quantity.take))
    if len(values) > 1:
        raise ClaimsError(f"{path}: {len(values)} rows for {place}; one was expected")
    return float(values.iloc[0])


def conditions(claim: Claim, folder: Path) -> str:
    """Machine, precision, runtime, batch and size of what a claim rests on, in brackets; empty for other tables than
    those that `measure` writes."""
    found: dict[str, set[str]] = {kind: set() for kind in CONDITIONS}
    for quantity in claim.measured.values():
        path, table = _read(quantity, folder)
        if "machine" not in table.columns:
            continue
        table = _rows(quantity, path, table)
        for kind, columns in CONDITIONS.items():
            for column in set(columns) & set(table.columns):
                found[kind] |= {str(value) for value in table[column]}
    texts = {
        kind: ", ".join(sorted(values, key=lambda text: (len(text), text))) for kind, values in found.items() if values
    }
    parts = [CONDITION_TEXTS.get(kind, "{}").format(text) for kind, text in texts.items()]
    return f" [{'; '.join(parts)}]" if parts else ""


def check(folder: Path) -> None:
    """Raise `InputError` for a table that verdicts would rest on and that was changed after it was made."""
    others = {quantity.profile for claim in load() for quantity in claim.measured.values()} - {""}
    found = [[each for each in results_folders(profile) if each.is_dir()] for profile in sorted(others)]
    for each in (folder, *(first for first, *_ in filter(None, found))):
        stamps.check_tables(each)


def summary(verdicts: list[Verdict]) -> str:
    """How many claims have which verdict, in a line."""
    counts = Counter(verdict.verdict for verdict in verdicts)
    return f"{len(verdicts)} claims: " + ", ".join(f"{counts[name]} {name}" for name in VERDICTS)


def as_table(verdicts: list[Verdict]) -> str:
    """The ledger in Markdown, a table for each work."""
    parts = []
    for work, title in WORKS.items():
        rows = [(v.claim.statement, v.claim.stated, v.here, v.verdict) for v in verdicts if v.claim.work == work]
        lines = ["| claim | stated | here | verdict |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in row) + " |" for row in rows]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, summary(verdicts) + "."])


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


def _written(value: float | list[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in (value if isinstance(value, list) else [value]))


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
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        found = _numbers(table[column], f"{path}: {column}") if is_number else table[column]
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
