"""The order of the house: a module imports from floors below its own or from its own wing, and never in a circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from lora_distill.settings import PACKAGE

FLOORS = [  # from the ground up
    {"errors"},
    {"diffusion", "shapes", "processes", "finite", "yaml_file", "parameters"},
    {"refusals", "writing"},
    {"settings"},
    {"storage", "devices"},
    {"pipeline_files", "lora_files", "lora_layers", "fingerprint", "arrays", "cpu_runtime"},
    {"pipeline", "adapters"},
    {"sampling"},
    {"data"},
    {"judge", "train"},
    {"pretrain", "memory", "deployment", "drawing", "rehearsal", "sweep"},
    {"dial"},
    {"publish"},
    {"__main__"},
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" and "assets" not in path.parts
}


def room(module: str) -> str:
    """The wing of a module, or the module itself at the top."""
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            base = node.module.partition(".")[2]
            names = {f"{base}.{alias.name}".strip(".") for alias in node.names}
            found |= {name for name in names if name in MODULES} or {base}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{module}: relative import"
    return found & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_from_a_floor_above_or_beside(module):
    above = {name for name in imports(module) if room(name) != room(module) and floor(name) >= floor(module)}
    assert not above


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) == "publish"])
def test_what_publishes_reads_files_and_knows_no_model(module):
    assert {room(name) for name in imports(module)} <= {
        "errors",
        "publish",
        "processes",
        "settings",
        "storage",
        "writing",
    }


def test_no_import_goes_in_a_circle():
    TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_the_init_of_a_wing_holds_a_docstring_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) and len(tree.body) == 1
