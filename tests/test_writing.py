"""The one way to write: whole or not at all, what was there is kept as it was, and nothing is left behind."""

import ast
import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

from lora_distill import storage, writing
from lora_distill.errors import InputError, RunError, WriteError
from lora_distill.settings import PACKAGE
from lora_distill.storage import cached, cached_folder, keep_value, kept_value, load_tensors, save_tensors
from lora_distill.writing import LOCK, atomic_write, locked, sweep, whole_file, whole_folder

WRITERS = {
    "text": lambda path: atomic_write(path, "new"),
    "tensors": lambda path: save_tensors(path, {"a": torch.ones(3)}),
}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


# ---------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_the_mode_of_a_file_is_kept(tmp_path, write, mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() != b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path, write, there):
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link.symlink_to("disk/target")
    write(link)
    assert link.is_symlink() and target.read_bytes() == link.read_bytes() != b"old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link", "target"]


def test_links_in_a_circle_are_one_line(tmp_path, write):
    (tmp_path / "a").symlink_to("b"), (tmp_path / "b").symlink_to("a")
    with pytest.raises(WriteError, match=rf"{tmp_path}/a could not be written: Too many levels of symbolic links"):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_else_than_a_file_is_not_replaced(tmp_path, write, kind):
    path = tmp_path / "there"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(WriteError, match=f"{path} could not be written: there is something else than a file"):
        write(path)
    assert list(tmp_path.iterdir()) == [path] and not path.is_file()


def test_the_null_device_is_not_replaced(write):
    with pytest.raises(WriteError, match="/dev/null could not be written"):
        write(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "a" * 250 + ".safe", "語" * 85])
def test_a_name_as_long_as_the_system_takes_is_written(tmp_path, write, name):
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_too_long_is_one_line(tmp_path, write):
    with pytest.raises(WriteError, match="could not be written: File name too long"):
        write(tmp_path / ("x" * 256))
    assert not list(tmp_path.iterdir())


def test_a_link_that_somebody_planted_is_not_written_through(tmp_path, write, monkeypatch):
    """Its name would have to be guessed; if it were, the folder could not be made."""
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / "victim").mkdir()
    (tmp_path / f".file.{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(WriteError, match=rf"{tmp_path}/file could not be written: File exists"):
        write(tmp_path / "file")
    assert not list((tmp_path / "victim").iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMLINK, errno.ESTALE])
@pytest.mark.parametrize("at", ["mkdir", "replace", "fsync"])
def test_what_the_system_refuses_is_one_line_with_the_file_and_the_old_one_stays(tmp_path, monkeypatch, number, at):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    if at == "fsync":
        monkeypatch.setattr(writing, "_to_disk", refuse)
    else:
        monkeypatch.setattr(Path if at == "mkdir" else os, at, refuse)
    with pytest.raises(WriteError, match=f"{path} could not be written: {os.strerror(number)}") as raised:
        atomic_write(path, "new")
    monkeypatch.undo()
    assert "\n" not in str(raised.value) and path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_library_leaves_beside_its_file_is_gone_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "file") as path:
        (path.parent / ".tmpOsQfOJ").write_bytes(b"as safetensors has it")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_is_replaced_as_a_whole_and_keeps_its_mode(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o750)
    (folder / "old").touch()
    with whole_folder(folder) as made:
        (made / "new").touch()
        assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(WriteError, match="something else than a folder"), whole_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# ---------------------------------------------------------------------------------------------- locks and sweeping


def test_what_killed_runs_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    left = [tmp_path / "deep" / f".a.{'0' * 16}.tmp", tmp_path / f".b.safetensors.{'f' * 16}.tmp"]
    left[0].mkdir(parents=True), (left[0] / "new").touch(), left[1].touch()
    own = [
        tmp_path / ".notes.tmp",
        tmp_path / "x.tmp",
        tmp_path / f".deadbeef.tmp{'0' * 16}",
        tmp_path / f".a.{'g' * 16}.tmp",
    ]
    for path in own:
        path.touch()
    with whole_file(tmp_path / "living") as living:
        sweep(tmp_path)
        living.write_text("whole", encoding="utf-8")
    assert not any(path.exists() for path in left) and all(path.exists() for path in own)
    assert (tmp_path / "living").read_text(encoding="utf-8") == "whole"


def test_a_link_that_is_named_like_something_left_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir(), (tmp_path / "mine" / "file").touch()
    (tmp_path / f".a.{'0' * 16}.tmp").symlink_to(tmp_path / "mine")
    sweep(tmp_path)
    assert (tmp_path / "mine" / "file").exists() and len(list(tmp_path.iterdir())) == 1


def test_one_run_alone_holds_a_folder_and_a_lock_that_is_left_is_none(tmp_path):
    (tmp_path / LOCK).write_text("1 of a container whose process has the same number", encoding="utf-8")
    with locked(tmp_path), pytest.raises(RunError, match=f"{tmp_path}: another process writes there"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_lock_is_free_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "_acquire", none)
    with pytest.warns(UserWarning, match=f"{tmp_path}: no lock could be had"), locked(tmp_path):
        atomic_write(tmp_path / "file", "whole")
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("at", ["mkdir", "touch"])
def test_a_folder_that_cannot_be_written_to_is_not_called_held(tmp_path, monkeypatch, at):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, at, refuse)
    with pytest.raises(WriteError, match=f"{tmp_path} could not be written: Permission denied"), locked(tmp_path):
        pass


# ---------------------------------------------------------------------------------------------- caches


def test_a_value_is_read_back_and_no_flipped_bit_passes(tmp_path):
    path, value = tmp_path / "simulate-key.json", {"total": 12_345, "terms": {"weights": 1.5, "ä": None}}
    keep_value(path, value)
    assert kept_value(path) == value and kept_value(tmp_path / "none.json") is None
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match=f"{path}: .*made again"):
            assert kept_value(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'{"total": 3}', b"\xff", b"[" * 5000])
def test_what_is_no_value_is_made_again(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.warns(UserWarning, match="made again"):
        assert kept_value(tmp_path / "a.json") is None


def made_folder(folder, calls):
    def make(place):
        calls.append(place)
        (place / "deep").mkdir()
        (place / "deep" / "rows.arrow").write_bytes(bytes(range(200)))
        (place / "info.json").write_text("{}", encoding="utf-8")

    return cached_folder(folder, make)


@pytest.mark.parametrize("spoil", ["flip", "cut", "gone", "more", "seal", "seal gone", "seal []", "seal {}", "empty"])
def test_a_cached_folder_that_is_altered_is_made_again(tmp_path, spoil):
    calls, folder = [], tmp_path / "scenes-key"
    made_folder(folder, calls), made_folder(folder, calls)
    assert len(calls) == 1
    rows, seal = folder / "deep" / "rows.arrow", folder / storage.SEAL
    content = rows.read_bytes()
    {
        "flip": lambda: rows.write_bytes(content[:50] + b"x" + content[51:]),
        "cut": lambda: rows.write_bytes(content[:50]),
        "gone": rows.unlink,
        "more": (folder / "more").touch,
        "seal": lambda: seal.write_bytes(b"\xff"),
        "seal gone": seal.unlink,
        "seal []": lambda: seal.write_text("[]", encoding="utf-8"),
        "seal {}": lambda: seal.write_text("{}", encoding="utf-8"),
        "empty": lambda: rows.write_bytes(b""),
    }[spoil]()
    with pytest.warns(UserWarning, match=f"{folder}: .*made again"):
        made_folder(folder, calls)
    assert len(calls) == 2 and rows.read_bytes() == content and not (folder / "more").exists()


def test_a_cached_folder_that_could_not_be_made_is_not_there(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise InputError("no scenes")

    with pytest.raises(InputError, match="no scenes"):
        cached_folder(tmp_path / "scenes-key", fail)
    assert not (tmp_path / "scenes-key").exists()


@pytest.mark.parametrize("kind", ["folder", "unreadable"])
def test_a_cache_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, kind):
    path = tmp_path / "features-key.safetensors"
    path.mkdir() if kind == "folder" else path.touch()
    if kind == "unreadable":

        def refuse(*_, **__):
            raise OSError(errno.ESTALE, "Stale file handle")

        monkeypatch.setattr(storage, "safe_open", refuse)
    with pytest.raises(InputError, match=rf"^{path}: expected a safetensors file \([^\n]*\)$"):
        load_tensors(path)
    with pytest.raises((InputError, WriteError), match=str(path)):
        cached(tmp_path, "features", "key", lambda: {"a": torch.ones(1)})


# ---------------------------------------------------------------------------------------------- nobody else writes

WRITES = {"write_text", "write_bytes", "save_file", "savefig", "save_pretrained", "copyfile", "copy", "copy2", "move",
          "copytree", "to_csv", "to_parquet", "save_to_disk", "tofile", "memmap", "truncate", "dump"}  # fmt: skip
INSIDE = {"whole_file", "whole_folder", "TemporaryDirectory", "tempfile.TemporaryDirectory"}
# Functions that write into a folder which their caller puts in its place as a whole, or that need another way.
ALLOWED = {
    "arrays": "an array is made part by part, in a folder of parts, and renamed",
    "writing": "here is the one way to write",
    "storage": "sorts the header of a file that is being written",
    "rehearsal": "writes into a temporary folder that `write_inputs` renames",
    "publish.figures": "all files of a figure are written beside and get their names together",
}


def writes(module: Path) -> list[str]:
    """The places of a module where something is written outside of a block of `whole_file` or `whole_folder`."""
    found = []

    def look(node, inside):
        if isinstance(node, ast.With):
            inside = inside or any(ast.unparse(item.context_expr).partition("(")[0] in INSIDE for item in node.items)
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            opens = name in ("open", "fdopen") and any(isinstance(m, str) and set(m) & set("wax+") for m in modes)
            to_memory = any(getattr(argument, "id", "") == "buffer" for argument in node.args)
            copies = name == "copy" and ast.unparse(node.func) != "shutil.copy"  # of objects
            if (opens or name in WRITES) and not (inside or to_memory or copies):
                found.append(f"{module.name}:{node.lineno} {name}")
        for child in ast.iter_child_nodes(node):
            look(child, inside)

    look(ast.parse(module.read_text(encoding="utf-8")), False)
    return found


MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts
}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ALLOWED])
def test_nothing_is_written_but_whole(module):
    assert writes(MODULES[module]) == []


@pytest.mark.parametrize("module", [module for module in ALLOWED if module != "writing"])
def test_no_exception_is_idle(module):
    assert writes(MODULES[module])


def test_the_look_for_writes_finds_them(tmp_path):
    lines = ["path.write_text('x')", "open(path, 'w')", "path.open(mode='r+b')", "save_file(tensors, path)"]
    (tmp_path / "a.py").write_text("\n".join(lines), encoding="utf-8")
    assert len(writes(tmp_path / "a.py")) == 4
    inside = "with whole_file(path) as temporary:\n    save_file(tensors, temporary)\nfigure.savefig(buffer)\n"
    (tmp_path / "a.py").write_text(f"{inside}path.open('rb')\nopen(path)\n", encoding="utf-8")
    assert writes(tmp_path / "a.py") == []


def test_a_killed_writer_leaves_the_old_file_and_the_next_start_nothing_else(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom lora_distill.writing import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as path:\n    path.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "file").write_text("old", encoding="utf-8")
    surroundings = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script, tmp_path / "file"], env=surroundings, check=False)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "old" and len(list(tmp_path.iterdir())) == 2
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {"file", LOCK}
