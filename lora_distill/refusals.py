"""What is wrong with a value, in one line: pydantic's errors in the words of a person who writes settings."""

import reprlib
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

from lora_distill.yaml_file import YamlError, parse_yaml

EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "string_pattern_mismatch": "{description}",
    "string_too_short": "{description}",
    "string_too_long": "{description}",
    "too_short": "at least one value",
    "too_long": "at most {max_length} values",
    "literal_error": "{expected}",
    "multiple_of": "a multiple of {multiple_of}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
MEANT = {"float_type": (int, float), "int_type": int, "bool_type": bool, "list_type": list, "dict_type": dict}
IN_QUOTES, FROM_PAPERMILL = "write it without quotes", "papermill -p passes text: give -y '{key}: {value}'"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def nearest(key: str, known: Iterable[str]) -> str:
    """The known key most similar to this one, as a whole or in one of its words."""

    key = key.lower().replace("-", "_")

    def likeness(other: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, other).ratio()
        return max(whole, *(SequenceMatcher(None, key, word).ratio() for word in other.split("_"))), whole

    return max(known, key=likeness)


def key_of(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """The place of one of pydantic's errors: the key, and the item of a list or mapping."""
    if error["type"] == "value_error":  # from a validator of the settings: its message begins with the key
        return (str(error["ctx"]["error"]).partition(":")[0],)
    return tuple(part for part in error["loc"] if part != "[key]")


def refusal(error: Mapping[str, Any], descriptions: Mapping[str, str], text_hint: str = IN_QUOTES) -> str:
    """One of pydantic's errors as `key: expected ..., got ...`; `text_hint` says how to give what is given as text."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    key, *index = key_of(error)
    if error["type"] == "extra_forbidden":
        return f"unknown key {shown(key)[:60]}; did you mean {nearest(str(key)[:60], descriptions)!r}?"
    place = f"{key}" + "".join(f"[{i}]" for i in index)
    facts = {"description": descriptions[key], **error.get("ctx", {})}
    template = EXPECTED.get(error["type"])
    expected = template.format(**facts) if template else error["msg"].removeprefix("Input should be ")
    got = error["input"]
    return f"{place}: expected {expected}, got {_told(got)}{_hint(str(key), got, error['type'], text_hint)}"


def shown(value: Any) -> str:
    """A value as an error message shows it, at most about a hundred characters."""
    try:
        return " ".join(_SHORT.repr(value).split())[:120]
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "numbers too long to show"


def _told(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {shown(value)}"
    return shown(value) if isinstance(value, bool | int | float | list | dict) else f"an object of type {_kind(value)}"


def _kind(value: Any) -> str:
    return type(value).__name__


def _hint(key: str, value: Any, problem: str, text_hint: str) -> str:
    """A hint where something else is read than was meant: 1e-4 as text, no as false, papermill's true as text."""
    if isinstance(value, bool) and problem in {"string_type", "literal_error"}:
        return " (YAML reads yes, no, on and off as true or false; write the text in quotes)"
    if problem not in MEANT or not isinstance(value, str):
        return ""
    if problem == "float_type" and (number := _exponent(value)):
        return f" (YAML reads {value} as text; write {number})"
    try:
        meant, _ = parse_yaml(value, "")
    except YamlError:
        return ""
    kinds = MEANT[problem]
    fits = isinstance(meant, kinds) and (kinds is bool or not isinstance(meant, bool))
    return f" ({text_hint.format(key=key, value=value.strip()[:80])})" if fits else ""


def _exponent(text: str) -> str:
    """1e-4 as YAML reads it for a number, 1.0e-4; empty for other texts."""
    mantissa, letter, exponent = text.strip().lower().partition("e")
    try:
        float(text)
    except ValueError:
        return ""
    if not letter or not exponent.lstrip("+-").isdigit() or ("." in mantissa and exponent[0] in "+-"):
        return ""
    point = "" if "." in mantissa else ".0"
    return f"{mantissa}{point}e{exponent if exponent[0] in '+-' else f'+{exponent}'}"
