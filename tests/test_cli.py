"""The command line: exit codes, and one line instead of a traceback."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_distill import __main__ as cli
from lora_distill import adapters
from lora_distill import sampling as teacher_sampling
from lora_distill.deployment import deployed
from lora_distill.pipeline import load_pipeline
from lora_distill.publish import series
from lora_distill.settings import repository_root


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
    assert code == 0 and all(name in out for name in ("reproduce", "prepare", "publish", "claims", "figures"))


@pytest.mark.parametrize("arguments", [["--version"], ["sample", "--version"], ["train", "x", "--version"]])
def test_versions_are_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["lora_distill", *arguments])
    cli.main()
    out = capsys.readouterr().out
    assert out.startswith("lora_distill 0.1.0, torch ") and out.count("\n") == 1


def test_what_stands_after_two_dashes_is_no_option():
    assert cli._split(["sample", "--debug", "--", "--debug"]) == (["sample", "--debug"], ["--", "--debug"])
    assert cli._split(["sample", "a"]) == (["sample", "a"], [])


@pytest.mark.parametrize("name", ["reproduce", "distill", "measure", "plan"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("device: cuda:99", "device: cuda:99, but PyTorch finds no GPU here; auto or cpu would do"),
        ("device: mps", "x.yaml, line 2: device: mps is refused"),
        ("clip: ./nowhere", "clip: no file or folder "),
        ("extractors: {Inception: ./nowhere.pth}", "extractors: Inception: no file or folder "),
        ("flickr_30k: /nowhere", "flickr_30k: no file or folder /nowhere"),
        ("ddim_skip: 7", "x.yaml, line 2: ddim_skip: must divide 1000"),
    ],
)
def test_what_a_run_needs_is_checked_before_it_starts(command, tmp_path, monkeypatch, name, line, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "x.yaml").write_text(f"profile: x\n{line}\n", encoding="utf-8")
    code, out, err = command(name, "--profile", str(tmp_path / "x.yaml"))
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_a_plan_for_a_card_that_is_not_here_asks_for_no_gpu(command, tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("profile: x\ndevice: cuda\n", encoding="utf-8")
    code, out, _ = command("plan", "--profile", str(tmp_path / "x.yaml"), "--card", "15", "--tflops", "38")
    assert code == 0 and "a card of 15 GiB" in out


WITHOUT_A_CHECKOUT = "no folder {}: profiles lie in a checkout of the repository; "


ON_PROFILES = [
    "settings", "prepare", "reproduce", "claims", "figures", "report", "publish", "distill", "memory", "measure",
    "plan", "rehearse", "sweep", "bench",
]  # fmt: skip


@pytest.mark.parametrize("name", ON_PROFILES)
def test_without_a_checkout_every_command_says_that_one_is_needed(command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_distill.settings.PACKAGE", tmp_path / "site-packages" / "lora_distill")
    code, out, err = command(name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(WITHOUT_A_CHECKOUT.format(tmp_path / "params")) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 1, "the output: No space left on device\n"),
        ("--version >/dev/full", 1, "the output: No space left on device\n"),
        ("--profile nope 2>/dev/full", 2, ""),
        ("--profile nope 2>&-", 2, ""),
        ("| head -n 1", 0, ""),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has /dev/full")
def test_a_closed_or_full_output_changes_no_exit_code_and_shows_no_traceback(redirect, code, said):
    command = f"{sys.executable} -m lora_distill settings {redirect}"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    assert (done.returncode, done.stderr) == (code, said)


def test_settings_are_printed_with_their_meaning(command):
    code, out, _ = command("settings", "--profile", "smoke")
    assert code == 0 and "train_steps: 4 " in out and "# optimiser updates" in out


def test_claims_are_printed_with_their_verdicts(command):
    code, out, _ = command("claims", "--profile", "full")
    assert code == 0 and "lcm-lora-2-4-times-faster: " in out and out.rstrip().endswith("cannot tell")
    assert out.startswith("reading ") and out.splitlines()[0].endswith("figures/full")


@pytest.mark.parametrize("name", ["claims", "figures"])
def test_a_profile_that_never_ran_is_one_line(command, tmp_path, name):
    (tmp_path / "never.yaml").write_text("profile: never\n", encoding="utf-8")
    code, out, err = command(name, "--profile", str(tmp_path / "never.yaml"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("no results in runs/never/figures nor in figures/never; ")


def test_verdicts_are_not_printed_from_tables_that_were_edited(command, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    shutil.copytree(repository_root() / "figures" / "full", folder)
    monkeypatch.setattr("lora_distill.settings.results_dir", lambda _: folder)
    assert command("claims", "--profile", "full")[0] == 0
    path = folder / "02_quality.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("1", "2"), encoding="utf-8")
    code, out, err = command("claims", "--profile", "full")
    assert code == 2 and "claims:" not in out
    assert err == f"{path} was changed since it was committed; git checkout restores it\n"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"seed": 0, "since_removed": 1}, ""),
        ({"seed": 7}, ", made with seed: 7, not as the profile says now"),
        ({"seed": 7, "data": "x"}, ", made with seed: 7 and 1 more, not as the profile says now"),
        ([], ""),
    ],
)
def test_verdicts_of_a_run_with_other_settings_say_so(command, tmp_path, monkeypatch, made, said):
    """A profile is edited after its run: without a word, the old numbers would be taken for its own."""
    folder = tmp_path / "run" / "figures"
    folder.mkdir(parents=True)
    shutil.copy(repository_root() / "figures" / "full" / "02_quality.csv", folder)
    (folder.parent / "manifest.json").write_text(json.dumps({"settings": made}), encoding="utf-8")
    monkeypatch.setattr("lora_distill.settings.results_dir", lambda _: folder)
    code, out, _ = command("claims", "--profile", "full")
    assert code == 0 and out.splitlines()[0].endswith(f"run/figures{said}")


def test_a_run_that_is_not_finished_is_not_published(command, tmp_path):
    (tmp_path / "never.yaml").write_text("profile: never\n", encoding="utf-8")
    code, _, err = command("publish", "--profile", str(tmp_path / "never.yaml"))
    assert code == 1 and err.startswith("01_lora_memory of profile never: it has not run to its end; ")


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("papermill", ["reproduce"], "papermill is not installed: pip install 'lora_distill[series]'\n"),
        ("ipykernel", ["reproduce"], "ipykernel is not installed: pip install 'lora_distill[series]'\n"),
        ("nbconvert", ["report"], "nbconvert is not installed: pip install 'lora_distill[series]'\n"),
        ("matplotlib", ["figures"], "matplotlib is not installed: pip install 'lora_distill[series]'\n"),
    ],
)
def test_an_extra_that_is_not_installed_is_one_line(package, arguments, message):
    """In a fresh process, in which nothing is imported yet."""
    code = f"import sys; sys.modules[{package!r}] = None; from lora_distill.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, message)


def test_a_cpu_runtime_that_is_not_installed_is_one_line(command, monkeypatch):
    def deploy(profile):
        deployed(load_pipeline("bundled"), graphs=Path("graphs"))

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(series, "prepare", deploy)
    code, _, err = command("prepare")
    assert (code, err) == (1, "the CPU runtime is not installed: pip install 'lora_distill[cpu]'\n")


def test_the_name_of_a_file_breaks_no_line(command, tmp_path):
    path = tmp_path / "a\nb.yaml"
    path.write_text("profile: c\n", encoding="utf-8")
    code, _, errors = command("settings", "--profile", str(path))
    assert code == 2 and errors.count("\n") == 1


def test_unknown_profile_is_one_line(command):
    code, _, err = command("reproduce", "--profile", "nope")
    assert code == 2 and err.startswith("no profile 'nope'") and err.count("\n") == 1


DISTIL = "teacher_images: 2, sampling_steps: 2, scheduler: {}, train_steps: 2, warmup_steps: 1, batch_size: 2"


@pytest.mark.parametrize(("scheduler", "kind"), [("own", "DDIMScheduler"), ("dpm++", "DPMSolverMultistepScheduler")])
def test_a_lora_is_distilled_with_the_scheduler_of_the_settings(capsys, tmp_path, monkeypatch, scheduler, kind):
    """Twice: what is finished is read back."""
    profile = tmp_path / "little.yaml"
    profile.write_text(f"{{profile: little, device: cpu, {DISTIL.format(scheduler)}}}", encoding="utf-8")
    monkeypatch.setattr("lora_distill.settings.repository_root", lambda: tmp_path)
    built, build = [], teacher_sampling.build_scheduler
    monkeypatch.setattr(teacher_sampling, "build_scheduler", lambda *a: built.append(build(*a)) or built[-1])
    for _ in range(2):
        cli.distill(str(profile))
        path = capsys.readouterr().out.splitlines()[-1]
    assert path == str(tmp_path / "runs" / "little" / "student.safetensors")
    adapters.load_adapter(load_pipeline("bundled").unet, "student", Path(path))
    assert [type(scheduler).__name__ for scheduler in built] == [kind]


def test_a_fault_of_the_program_is_one_line_with_its_place_and_debug_keeps_the_traceback(command, monkeypatch):
    monkeypatch.setattr(series, "prepare", lambda profile: json.loads("x"))
    code, _, err = command("prepare")
    assert code == 1 and err.startswith("JSONDecodeError: Expecting value") and "__main__.py, line" in err
    with pytest.raises(json.JSONDecodeError):
        command("prepare", "--debug")


def test_a_tilde_that_the_shell_left_is_the_home_folder(command, tmp_path, monkeypatch):
    """bash expands ~ in --out ~/x and not in --out=~/x."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}, "l.safetensors")
    assert command("export", "l.safetensors", "--out=~/kohya.safetensors")[0] == 0
    assert command("sample", "a lion at the upper left", "--steps=1", "--out=~/picture.png")[0] == 0
    assert command("train", "~/no-pictures", "--out=~/lora.safetensors")[0] == 2
    assert {path.name for path in (tmp_path / "home").glob("[!.]*")} == {"kohya.safetensors", "picture.png"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"l.safetensors"}


@pytest.mark.parametrize("seed", [2**32, 2**63, 10**30, -1])
def test_a_seed_that_is_none_is_refused_by_every_command_that_takes_one(command, seed, tmp_path):
    commands = (["pretrain", "--preset=short", f"--out={tmp_path / 'p'}"], ["sample", "x"], ["train", str(tmp_path)])
    for arguments in commands:
        code, _, said = command(*arguments, f"--seed={seed}")
        assert code == 2 and "--seed" in said and "not foreseen" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "error"), [([], 0.1), (["--caption-error=0"], 0), (["--caption-error=0.2"], 0.2)])
def test_the_errors_of_the_captions_of_a_pretraining_can_be_chosen(command, tmp_path, monkeypatch, options, error):
    chosen = []
    monkeypatch.setattr("lora_distill.pretrain.text_to_image.pretrain", lambda preset, *_: chosen.append(preset))
    assert command("pretrain", "--preset=short", f"--out={tmp_path / 'p'}", "--device=cpu", *options)[0] == 0
    assert [preset.caption_error for preset in chosen] == [error]


@pytest.mark.parametrize("error", ["-0.1", "1.1", "nan", "half"])
def test_a_share_of_errors_that_is_none_is_refused(command, tmp_path, error):
    code, _, said = command("pretrain", "--preset=short", f"--out={tmp_path / 'p'}", f"--caption-error={error}")
    assert code == 2 and "--caption-error" in said and list(tmp_path.iterdir()) == []


def test_links_that_lead_in_a_circle_are_said_before_a_picture_is_drawn(command, tmp_path, monkeypatch):
    (tmp_path / "a.png").symlink_to("a.png")
    monkeypatch.setattr("lora_distill.drawing.load_pipeline", lambda *_, **__: pytest.fail("was loaded"))
    code, _, said = command("sample", "a lion", "--out", str(tmp_path / "a.png"))
    assert code == 1 and "a.png could not be written: Too many levels of symbolic links" in said


def test_names_in_a_file_are_shown_and_not_obeyed(command, tmp_path):
    """Line ends and escapes of a terminal, and a name of a million letters."""
    for name in ("unet.x\n\x1b[31my.lora_C.weight", "unet." + "x" * 10**6 + ".lora_C.weight"):
        save_file({name: torch.ones(2)}, tmp_path / "lora.safetensors")
        code, _, said = command("export", str(tmp_path / "lora.safetensors"), "--out", str(tmp_path / "o.safetensors"))
        assert code == 2 and said.count("\n") == 1 and said.strip().isprintable() and len(said) < 3000
        assert "lora.safetensors: unet.x" in said and "no part of a LoRA" in said


def test_a_full_disk_is_one_line(command, monkeypatch, tmp_path):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    picture = tmp_path / "lion.png"
    code, _, err = command("sample", "a lion at the upper left", "--steps", "1", "--out", str(picture))
    last_line = err.rpartition("\r")[2].strip()  # after the progress bar
    assert code == 1 and last_line == f"{picture} could not be written: No space left on device"


def test_a_name_with_line_ends_does_not_break_the_line():
    from lora_distill.__main__ import _said
    from lora_distill.errors import InputError

    assert _said(InputError("a\nb\x1b.jpg: no caption")) == r"a\nb\x1b.jpg: no caption"
