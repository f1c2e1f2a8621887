"""Errors that a person can act on: one line that says where and what would do.

Commands print the line alone, and exit with 2 for an `InputError`, with 1 for a `RunError`. Anything else that is
raised is a fault of this package; `--debug` shows where.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """What was given cannot be used: a value, a file, a folder. The message names it and what would do."""


class MissingError(InputError, FileNotFoundError):
    """A file or folder that is not there."""


class RunError(RuntimeError):
    """A run that failed, though nothing was wrong with what it was given."""


POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git-lfs has not fetched
NOT_FETCHED = "a pointer of git-lfs in place of the file; run git lfs pull"


class WriteError(OSError, RunError):
    """A file that could not be written, for instance because the disk is full."""


@contextmanager
def reading(place: str | Path, expected: str) -> Iterator[None]:
    """The boundary to a library that reads a file: whatever it raises becomes one line with the place.

    Raises `MissingError` when the file is not there, and `InputError` with what was `expected` and the library's
    reason for anything else. Our own errors pass unchanged.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except FileNotFoundError as error:
        raise MissingError(f"{error.filename or place}: not found; expected {expected}") from error
    except Exception as error:  # a library may raise anything
        reason = NOT_FETCHED if is_pointer(place) else one_line(error)
        raise InputError(f"{place}: expected {expected} ({reason})") from error


def is_pointer(place: str | Path) -> bool:
    """Whether a file is what git-lfs leaves in its place until it is fetched."""
    try:
        with open(place, "rb") as file:
            return file.read(len(POINTER)) == POINTER
    except (OSError, ValueError):
        return False


def printable(message: str, limit: int = 2000) -> str:
    """A message on one line, of which a terminal obeys nothing: names in a file may hold line ends and escapes."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line; the name of its kind where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
