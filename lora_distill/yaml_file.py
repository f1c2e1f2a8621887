"""Plain YAML, as files of settings need it: texts, numbers, true or false, lists and mappings of these.

Whatever YAML would read as something else than it looks is refused, and so is a key that is written twice. What makes
a small text large (aliases, deep nesting) is refused before it is expanded.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from lora_distill.errors import InputError, reading

MAX_BYTES = 2**16  # a profile takes 4,000
MAX_DEPTH = 4
MAX_DIGITS = 40
CORE = "tag:yaml.org,2002:"
INTEGER = re.compile(r"[-+]?(0|[1-9]\d*)")
NUMBER = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
Place = tuple[str | int, ...]


class YamlError(InputError):
    """A text that is no plain YAML; the message is one line with the file and the line in it."""


def read_yaml(path: Path, name: str = "") -> tuple[Any, dict[Place, int]]:
    """The value of a YAML file, and the line of each key and item: {("eval_seeds", 1): 12}.

    `name` stands for the file in messages. Raises `YamlError`, or `MissingError` when there is no such file.
    """
    with reading(name or path, "a file of UTF-8 text"), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise YamlError(f"{name or path}: expected at most {MAX_BYTES // 1024} kB, this is something else")
        text = content.decode("utf-8")
    return parse_yaml(text, name or str(path))


def parse_yaml(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """`read_yaml` of a text. Raises `YamlError`."""
    try:
        loader = _PlainLoader(text)
        lines: dict[Place, int] = {}
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"{name}, line {mark.line + 1 if mark else 1}: {_reason(error)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"{name}, line {line}: not YAML: character U+{error.character:04X}") from None
    except Exception as error:  # of PyYAML's parts, for instance for \U00110000
        raise YamlError(f"{name}: not YAML ({' '.join(str(error).split())[:200]})") from None


def _reason(error: yaml.MarkedYAMLError) -> str:
    if isinstance(error, _Refusal):
        return error.problem
    tab = " (indent with spaces, not tabs)" if r"'\t'" in str(error.problem) else ""
    return " ".join(f"not YAML: {error.context or ''} {error.problem or ''}".split())[:300] + tab


class _Refusal(yaml.MarkedYAMLError):
    """What YAML allows and a plain file does not have."""

    def __init__(self, where: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=where.start_mark)


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's loader as far as nodes; it follows no alias and nests a few levels alone."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        if not self.check_event(yaml.StreamEndEvent):
            raise _Refusal(self.peek_event(), "a second document begins (---); one a file is read")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refusal(event, f"*{event.anchor[:60]}: aliases are not read; write the value itself")
        if event.anchor is not None:
            raise _Refusal(event, f"&{event.anchor[:60]}: anchors are not read; write the value where it is needed")
        if event.tag is not None:
            raise _Refusal(event, f"{event.tag.replace(CORE, '!!')[:60]}: tags are not read; write the value alone")
        if self.depth >= MAX_DEPTH:
            raise _Refusal(event, f"nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value(loader: _PlainLoader, node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    """The value of a node; the line of each key and item in it is added to `lines`."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, place, lines)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*place, index] = item.start_mark.line + 1
        return [_value(loader, item, (*place, index), lines) for index, item in enumerate(node.value)]
    return _scalar(loader, node)


def _mapping(loader: _PlainLoader, node: yaml.MappingNode, place: Place, lines: dict[Place, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refusal(key, "a key must be a word, not a list or a mapping")
        if key.tag == f"{CORE}merge":
            raise _Refusal(key, "<<: merged keys are not read; write them out")
        if key.value in found:
            first = lines[*place, key.value]
            raise _Refusal(key, f"{key.value[:60]} is written twice, first in line {first}; leave one of them")
        lines[*place, key.value] = key.start_mark.line + 1
        found[key.value] = _value(loader, value, (*place, key.value), lines)
    return found


def _scalar(loader: _PlainLoader, node: yaml.ScalarNode) -> Any:
    """A text, number, truth value or None. Refused is what YAML 1.1 takes for another number than it looks."""
    text, kind = node.value, node.tag.removeprefix(CORE)
    shown = text if len(text) < 60 else f"{text[:57]}..."
    if kind in {"int", "float"} and len(text) > MAX_DIGITS:
        raise _Refusal(node, f"{shown}: a number of {len(text)} characters")
    if kind in {"int", "float"} and not (INTEGER if kind == "int" else NUMBER).fullmatch(text):
        raise _Refusal(node, f"{shown}: YAML reads it as {_as_read(loader, node)}; write that, or text in quotes")
    if kind == "timestamp":
        raise _Refusal(node, f"{shown}: YAML reads it as a date; write it in quotes")
    return loader.construct_object(node) if kind in {"int", "float", "bool", "null"} else text


def _as_read(loader: _PlainLoader, node: yaml.ScalarNode) -> str:
    try:
        return str(loader.construct_object(node))
    except ValueError:  # PyYAML takes 0b_ for a number
        return "a number"
