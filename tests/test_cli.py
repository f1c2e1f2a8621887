"""The command line: exit codes, and one line instead of a traceback."""

import errno
import json
import sys
from pathlib import Path

import pytest

from lora_distill import __main__ as cli
from lora_distill.publish import series


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command; its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora_distill", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0 and all(name in out for name in ("reproduce", "prepare", "notebooks", "settings"))


def test_settings_are_printed_with_their_meaning(command):
    code, out, _ = command("settings", "--profile", "smoke")
    assert code == 0 and "train_steps: 4 " in out and "# optimiser updates" in out


def test_claims_are_printed_with_their_verdicts(command):
    code, out, _ = command("claims", "--profile", "cpu")
    assert code == 0 and "conventional-raises-memory: reproduced" in out and out.rstrip().endswith("not testable here")


def test_unknown_profile_is_one_line(command):
    code, _, err = command("reproduce", "--profile", "nope")
    assert code == 2 and err.startswith("no profile 'nope'") and err.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora_distill", "prepare"])
    monkeypatch.setattr(series, "prepare", lambda profile: json.loads("x"))
    with pytest.raises(ValueError, match="Expecting value"):
        cli.main()


def test_a_full_disk_is_one_line(command, monkeypatch, tmp_path):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    picture = tmp_path / "lion.png"
    code, _, err = command("sample", "a lion above a bus", "--steps", "1", "--out", str(picture))
    last_line = err.rpartition("\r")[2].strip()  # after the progress bar
    assert code == 1 and last_line == f"{picture} could not be written: No space left on device"
