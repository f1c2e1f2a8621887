"""Which names of a notebook are its parameters: those that its parameters cell assigned when it last ran.

`globals()` also holds what later cells left, and names that were misspelt once and mended since; they are none.
"""

import ast
from collections.abc import Collection, Iterable
from inspect import isroutine
from types import ModuleType
from typing import Any

MARK, READER = "profile", "from_notebook"  # the parameters cell assigns the first; the cell after it calls the second


def parameters(namespace: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The parameters in a notebook's `globals()`: all known names, and unknown ones that stand among them.

    IPython keeps the source of each cell that ran; without it every plain name counts at the first call, and at later
    calls the known ones alone.
    """
    found = {name: value for name, value in namespace.items() if name in known and not _is_code(value)}
    if isinstance(sources := namespace.get("In"), list) and sources:
        written = assigned(str(source) for source in sources)
    else:
        written = set() if namespace.get("_settings_checked") else set(namespace)
        namespace["_settings_checked"] = True
    unknown = {name: namespace[name] for name in written if name in namespace and name not in known}
    return found | {name: value for name, value in unknown.items() if _is_parameter(name, value)}


def assigned(sources: Iterable[str]) -> set[str]:
    """The names assigned from the last run of the parameters cell to the call that reads them."""
    names: set[str] = set()
    reading = True
    for source in sources:
        try:
            body = ast.parse(source).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # IPython said so when the cell ran
            continue
        calls = [number for number, statement in enumerate(body) if _reads(statement)]
        found = {name for statement in body[: calls[0] if calls else None] for name in _targets(statement)}
        from_papermill = source.lstrip().startswith("# Parameters")
        if MARK in found and not from_papermill:  # papermill's cell adds to ours
            names = set()
        reading = reading or MARK in found or from_papermill
        if reading:
            names |= found
        reading = reading and not calls
    return names


def _reads(statement: ast.stmt) -> bool:
    """Whether a statement calls the function that reads the parameters."""
    called = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(READER in (getattr(func, "id", ""), getattr(func, "attr", "")) for func in called)


def _targets(statement: ast.stmt) -> Iterable[str]:
    """The names that a statement assigns, in its blocks too."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        for node in (node for target in targets for node in ast.walk(target)):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield from _targets(child)


def _is_code(value: Any) -> bool:
    """Whether a value is a module, class or function: an import, not a parameter."""
    return isinstance(value, ModuleType | type) or isroutine(value)


def _is_parameter(name: str, value: Any) -> bool:
    """Whether a name can be a parameter: its value is of a type that YAML has, and the name is not IPython's own."""
    plain = value is None or isinstance(value, str | int | float | list | dict)
    return plain and not name.startswith("_") and name not in {"In", "Out"}
