"""Other machines: Windows, macOS, a locale that is not UTF-8, a pipe with few letters, folders with odd names."""

import ast
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_distill import settings, storage
from lora_distill.settings import PACKAGE, load_settings, repository_root

ROOT = Path(__file__).parents[1]
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if "assets" not in path.parts]
WINDOWS = """
import builtins, importlib, sys
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
found = builtins.__import__
def on_windows(name, globals=None, *rest, **more):
    if name in POSIX and (globals or {}).get("__name__", "").startswith("lora_distill"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return found(name, globals, *rest, **more)
builtins.__import__ = on_windows
for name in sys.argv[1:]:
    importlib.import_module(name)
from lora_distill.storage import resident_peak_mb
print(resident_peak_mb())
"""
BINARY = {"rb", "wb", "ab", "xb", "r+b", "rb+", "w+b"}


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python on this checkout, whatever is installed."""
    surroundings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=surroundings, capture_output=True)


def test_every_module_is_imported_without_what_windows_lacks():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    done = python("-c", WINDOWS, *(name.removesuffix(".__init__") for name in names))
    assert (done.returncode, done.stderr.decode()[-2000:], done.stdout.split()[-1]) == (0, "", b"None")


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_memory_is_in_megabytes_on_linux_and_macos(monkeypatch, system, unit):
    used = types.SimpleNamespace(ru_maxrss=2_000_000)
    found = types.SimpleNamespace(RUSAGE_SELF=0, RUSAGE_CHILDREN=-1, getrusage=lambda who: used)
    monkeypatch.setitem(sys.modules, "resource", found)
    monkeypatch.setattr(sys, "platform", system)
    assert storage.resident_peak_mb() == 2 * unit


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["C", "cp1252", "ascii"],
)
@pytest.mark.parametrize(
    "command", ["--help", "sample --help", "settings --profile full", "claims --profile full", "settings --profile ü"]
)
def test_commands_write_to_a_pipe_that_lacks_letters(command, environment):
    done = python("-m", "lora_distill", *command.split(), **environment)
    assert done.returncode == (2 if command.endswith("ü") else 0)
    assert b"Traceback" not in done.stderr and b"not foreseen" not in done.stderr
    assert done.stdout or done.stderr.count(b"\n") == 1


def text_files(path: Path) -> Iterator[tuple[int, set[str | None]]]:
    """Where a module opens, reads or writes a file as text, or a process's output, with the arguments it names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = getattr(getattr(node.func, "value", None), "attr", getattr(getattr(node.func, "value", None), "id", ""))
        modes = {
            value.value for value in [*node.args, *(key.value for key in node.keywords)] if hasattr(value, "value")
        }
        named = {key.arg for key in node.keywords}
        opens = name == "open" and of not in {"Image", "os", "webbrowser"} and not modes & BINARY
        if opens or name in {"read_text", "write_text"} or "text" in named & {"text", "universal_newlines"}:
            yield node.lineno, named


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_text_file_says_its_encoding(path):
    assert [line for line, named in text_files(path) if "encoding" not in named] == []


@pytest.mark.parametrize("folder", ["with space", "{braces} {0}", "Zoë Ünïcode 目録", "100%", "a'b\"c"])
def test_a_checkout_lies_in_any_folder(tmp_path, monkeypatch, folder):
    (tmp_path / folder / "params").mkdir(parents=True)
    content = (ROOT / "params" / "cpu.yaml").read_text(encoding="utf-8").replace("pipeline: bundled", "pipeline: sd")
    (tmp_path / folder / "params" / "cpu.yaml").write_text(content, encoding="utf-8")
    (tmp_path / folder / "sd").mkdir()
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / folder / "lora_distill")
    assert repository_root() == tmp_path / folder
    assert load_settings("cpu").pipeline == str(tmp_path / folder / "sd")
    with pytest.raises(ValueError, match="no profile 'nope'"):
        load_settings("nope")


@pytest.mark.parametrize("module", ["lora_distill", "lora_distill.settings", "lora_distill.data.captioned"])
def test_a_warning_of_our_own_code_fails_its_test(module):
    with pytest.raises(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module=module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit("old", DeprecationWarning, "x.py", 1, module="another")
    assert len(caught) <= 1
