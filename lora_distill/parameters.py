"""Which names of a notebook are its parameters: those that its parameters cell assigned when it last ran.

`globals()` also holds what later cells left, and names that were misspelt once and mended since; they are none.
"""

import ast
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from inspect import isroutine
from types import ModuleType
from typing import Any

MARK, READER = "profile", "from_notebook"  # the parameters cell assigns the first; the cell after it calls the second
RUNNERS = {"run_cell_magic", "run_line_magic"}  # what IPython writes for %%time and %time
MAGICS = {"time", "capture", "prun"}  # that run code as it would run without them
BLOCKS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)  # names in them are not the notebook's


def parameters(namespace: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The parameters in a notebook's `globals()`: the known names, and unknown ones that stand among them.

    IPython keeps the source of each cell that ran. By it a known name counts unless only later cells computed it, as
    in `device = choose_device(...)` or `for seed in seeds`. Without IPython every plain name counts at the first call,
    and at later calls the known ones alone.
    """
    if isinstance(sources := namespace.get("In"), list) and sources:
        written, computed = assigned((str(source) for source in sources), known)
    else:
        written, computed = {}, set()
        if not namespace.get("_settings_checked"):
            written = dict.fromkeys(namespace, None)
        namespace["_settings_checked"] = True
    found = {}
    for name in [name for name in namespace if name in written or (name in known and name not in computed)]:
        value, literal = namespace[name], written.get(name)
        if literal is not None and (name in computed or _is_code(value)):  # a later cell left something else there
            value = ast.literal_eval(literal)
        if _is_parameter(name, value) or (name in known and not _is_code(value)):
            found[name] = value
    return found


def assigned(sources: Iterable[str], known: Collection[str]) -> tuple[dict[str, ast.expr | None], set[str]]:
    """The names that the parameters cell and what ran from it to the call of `READER` assigned, each with its value.

    Later cells add the known names that they assign a plain value. The second are the known names that they computed.
    """
    names: dict[str, ast.expr | None] = {}
    computed: set[str] = set()
    reading = True
    for source in sources:
        try:
            body = [part for statement in ast.parse(source).body for part in _run_by(statement)]
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # IPython said so when the cell ran
            continue
        end = next((number for number, statement in enumerate(body) if _reads(statement)), len(body))
        found = {name: value for statement in body[:end] for name, value in _targets(statement)}
        from_papermill = source.lstrip().startswith("# Parameters")
        if MARK in found and not from_papermill:  # papermill's cell adds to ours
            names = {name: value for name, value in names.items() if name in known}
        reading = reading or MARK in found or from_papermill
        if reading:
            names |= found
        after = body if not reading else body[end:]
        names |= {name: value for part in after for name, value in _targets(part) if name in known and _plain(value)}
        computed |= {name for part in after for name in _stored(part) if name in known}
        reading = reading and end == len(body)
    return names, computed


def _run_by(statement: ast.stmt) -> list[ast.stmt]:
    """A statement, or the statements in a magic that runs them here, as IPython keeps `%%time` above a cell."""
    match statement:
        case ast.Expr(ast.Call(ast.Attribute(attr=magic), [ast.Constant(name), *_, ast.Constant(str(code))])):
            with suppress(SyntaxError, ValueError):
                return ast.parse(code).body if magic in RUNNERS and name in MAGICS else [statement]
    return [statement]


def _reads(statement: ast.stmt) -> bool:
    """Whether a statement calls the function that reads the parameters."""
    called = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(READER in (getattr(func, "id", ""), getattr(func, "attr", "")) for func in called)


def _targets(statement: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """The names that a statement assigns, in its blocks too, with their values; None where it is computed."""
    if isinstance(statement, BLOCKS):
        return
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and statement.value is not None:
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            alone = isinstance(target, ast.Name) and not isinstance(statement, ast.AugAssign)
            for name in _stored(target):
                yield name, statement.value if alone and _plain(statement.value) else None
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            yield from _targets(child)


def _stored(node: ast.AST) -> Iterator[str]:
    """The names that a node binds: assigned, or of a loop."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
    if not isinstance(node, (*BLOCKS, *comprehensions)):
        for child in ast.iter_child_nodes(node):
            yield from _stored(child)


def _plain(value: ast.expr | None) -> bool:
    """Whether a value is written out."""
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def _is_code(value: Any) -> bool:
    """Whether a value is a module, class or function: an import, not a parameter."""
    return isinstance(value, ModuleType | type) or isroutine(value)


def _is_parameter(name: str, value: Any) -> bool:
    """Whether a name can be a parameter: its value is of a type that YAML has, and the name is not IPython's own."""
    plain = value is None or isinstance(value, str | int | float | list | dict)
    return plain and not name.startswith("_") and name not in {"In", "Out"}
