"""The one way to write: a file or folder stands there whole or not at all, and one run at a time writes in a folder."""

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lora_distill import processes
from lora_distill.errors import InputError, RunError, WriteError, one_line

TEMPORARY = ".tmp"  # the end of the names of what is being written
LEFT = re.compile(r"\.[0-9a-f]{16}\.tmp$")  # and what stands before it: a file of somebody else may end like this
# What a disk says that takes no more; libraries put it behind errors of their own.
NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
LOCK = ".lock"  # held by the run that writes in a folder


@contextmanager
def whole_file(path: Path, *, by_any: bool = False) -> Iterator[Path]:
    """A temporary path to write to, put in the place of `path` at the end of the block; on any error `path` stays.

    The mode of a file that is replaced is kept, and a link at `path` stays one: what it points to is replaced. Of
    several processes the main one alone leaves a file, unless it is written `by_any`. Raises WriteError that names the
    file, for instance when the disk is full.
    """
    with _writing(path):
        target = _target(path)
        if target.exists() and not target.is_file():
            raise WriteError(f"{path} could not be written: there is something else than a file")
        with _temporary_folder(target) as folder:
            temporary = folder / f"new{target.suffix[:20]}"
            temporary.touch()
            mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
            yield temporary
            if by_any or processes.is_main():
                os.chmod(temporary, mode)  # a library may have made a file of its own, for its user alone
                _to_disk(temporary)
                os.replace(temporary, target)


@contextmanager
def whole_folder(path: Path, *, by_any: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, put in the place of `path` at the end of the block, whose contents are dropped.

    On any error, and when it is killed, the old folder or the new one is there, not a mixture. A link at `path` stays
    one. Of several processes the main one alone leaves a folder, unless it is made `by_any`. Raises WriteError.
    """
    with _writing(path):
        target = _target(path)
        if target.exists() and not target.is_dir():
            raise WriteError(f"{path} could not be written: there is something else than a folder")
        with _temporary_folder(target) as folder:
            temporary = folder / "new"
            temporary.mkdir()
            yield temporary
            if by_any or processes.is_main():
                for file in temporary.rglob("*"):
                    if file.is_file():
                        _to_disk(file)
                _exchange(temporary, target)


def check_place(path: Path) -> None:
    """Raise WriteError when no folder can be put at `path`: asked before the long work whose result goes there."""
    with _writing(path):
        target = _target(path)
        if target.exists() and not target.is_dir():
            raise WriteError(f"{path} could not be written: there is something else than a folder")
        if os.path.ismount(target):
            raise WriteError(f"{path} could not be written: a disk is mounted there; name a folder on it")
        with _temporary_folder(target):
            pass


def _target(path: Path) -> Path:
    """Where a link at `path` leads, or `path`."""
    if not path.is_symlink():
        return path
    if (target := Path(os.path.realpath(path))).is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


@contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, held until the end of the block, when it is deleted with all that is left in it.

    A folder, for libraries write files of their own beside the one that they are to write. Nobody else can have made
    it: process numbers repeat in containers.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsencode(target.name)[:200].decode(errors="ignore")  # a name may have 255 bytes
    folder = target.with_name(f".{name}.{secrets.token_hex(8)}{TEMPORARY}")
    folder.mkdir(mode=0o700)
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a temporary folder, so that no other process sweeps it; whether nobody held it.

    The system lets go of it when its process ends. Where it has no such locks, on Windows, open files are not deleted.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except (ImportError, OSError):
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError as error:
        free = not isinstance(error, BlockingIOError)
    try:
        yield free
    finally:
        os.close(descriptor)


def _to_disk(file: Path) -> None:
    """Wait until a file's content is on the disk: after a power cut its name would stand for an empty file."""
    with file.open("r+b") as opened, suppress(OSError):  # a disk may not have this
        os.fsync(opened.fileno())


def _exchange(new: Path, target: Path) -> None:
    """Put a folder in another's place: in one step where the system has one, else in two."""
    if not target.exists():
        os.rename(new, target)
        return
    shutil.copymode(target, new)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of Linux
    try:
        rename = ctypes.CDLL(None).renameat2
        done = rename(here, os.fsencode(new), here, os.fsencode(target), exchange) == 0
    except (AttributeError, OSError, TypeError):
        done = False
    if not done:
        os.rename(target, new.with_name("old"))
        os.rename(new, target)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as one line that names it."""
    try:
        yield
    except (InputError, RunError):
        raise
    except SafetensorError as error:  # safetensors raises this when the disk is full
        raise WriteError(f"{path} could not be written: {one_line(error)}") from None
    except Exception as error:
        if (cause := _refused(error)) is None:
            raise
        raise WriteError(cause.errno, f"{path} could not be written: {cause.strerror or one_line(cause)}") from None


def _refused(error: Exception) -> OSError | None:
    """The error of the system, which libraries put behind errors of their own; None where it is none of a disk."""
    found, chain = error if isinstance(error, OSError) else None, error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in NO_PLACE:
            return chain
        chain = chain.__cause__ or chain.__context__
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder: of several processes that write there, one works and the others are refused in one line.

    Temporary files that killed runs left in it are swept. Of the processes of one launch the main one holds it for all.
    A disk that has no locks is written to without, with a warning. Raises RunError when another process holds it,
    WriteError where nothing can be written.
    """
    if not processes.is_main():
        yield
        return
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(f"{folder}: another process writes there; wait for its end or take another folder") from None
    except OSError as error:
        warnings.warn(f"{folder}: no lock could be had ({error.strerror}); start nothing else there", stacklevel=3)
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Delete the temporary folders and files that killed runs left in a folder and below."""
    for left in folder.rglob(f".*{TEMPORARY}"):
        if LEFT.search(left.name):
            with _held(left) as free:
                if free and left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                elif free:
                    with suppress(OSError):
                        left.unlink()


def check_writable(path: Path) -> None:
    """Raise OSError, in one line, where a file could not be written, before the work that would make it."""
    with _writing(path):
        if path.is_dir():
            raise InputError(f"{path}: a folder; expected the name of a file")
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=target.parent).close()


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write a file whole, text as UTF-8. Raises WriteError as `whole_file` does."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
