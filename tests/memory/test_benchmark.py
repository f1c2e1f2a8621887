"""The command `measure`: every kind of part is run, one that was measured is read, and what does not fit is refused."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lora_distill import __main__ as cli
from lora_distill import settings as settings_module
from lora_distill.errors import InputError
from lora_distill.memory import benchmark, parts
from lora_distill.memory.benchmark import MEMORY, SECONDS
from lora_distill.memory.measure import simulate
from lora_distill.memory.parts import SAMPLERS, Part
from lora_distill.memory.schemes import TRAINING
from lora_distill.pipeline import load_pipeline
from lora_distill.settings import Settings
from lora_distill.shapes import unet_config
from lora_distill.storage import read_table, save_table
from lora_distill.train.objectives import GuidanceDistillation

ROOT = Path(__file__).parents[2]
BUNDLE, SD15 = unet_config("bundled"), unet_config("sd15-shape")
SHARED, ONE_PASS = Part("step", "lora_distillation_shared", resolution=64), Part("step", "one_pass_merged", 2, 64)
PASSES = Part("passes", resolution=64, repeats=2)
WHOLE = Part("images", "LCM-LoRA, 4 steps", resolution=64)
CHOSEN = Settings(pipeline="bundled")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run's tables, in an empty repository; nothing is simulated."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "cpu.yaml").write_text("profile: cpu\npipeline: bundled\ndevice: cpu\n")
    for module in (settings_module, benchmark.storage):
        monkeypatch.setattr(module, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(benchmark.report, "fill_cache", lambda *_: None)
    return tmp_path / "runs" / "cpu" / "figures"


@pytest.fixture
def instead(monkeypatch):
    """Nothing is run; the parts that would have been."""
    ran = []

    def alone(part, pipeline, device):
        ran.append(part)
        return {"live": 4e9, "resident": 5e9, "seconds": [2.0, 4.0], "threads": 1, "resident_before": 1e8}

    monkeypatch.setattr(benchmark, "alone", alone)
    return ran


# ---------------------------------------------------------------------------------------------- the whole command


def test_the_command_measures_every_kind_of_part_in_a_process_of_its_own(folder, monkeypatch, capsys):
    chosen = [SHARED, ONE_PASS, PASSES, WHOLE]
    monkeypatch.setattr(benchmark, "parts_of", lambda *_: chosen)
    monkeypatch.setattr(sys, "argv", ["lora_distill", "measure", "--profile", "cpu"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert capsys.readouterr().out.count("/4] ") == 4
    step, sampling = read_table(folder / f"{MEMORY}.csv")
    assert (step["scheme"], step["precision"], step["optimizer"]) == (SHARED.name, "float32", "adamw-fused")
    assert step["measured_gb"] == pytest.approx(step["account_gb"], rel=0.05) and step["steps_timed"] == 2
    assert step["process_gb"] > step["process_before_gb"] > 0.1
    assert sampling["batch"] == 2 and sampling["seconds_a_step"] is None
    *computed, whole = read_table(folder / f"{SECONDS}.csv")
    assert {row["method"] for row in computed} == SAMPLERS.keys() and whole["how"] == "run whole"
    assert {row["how"] for row in computed} == {"computed from passes"} and whole["repeats"] == 1
    assert {path.name for path in folder.glob("01_measured*.svg")} == {f"{MEMORY}.svg", f"{SECONDS}.svg"}
    made_by = json.loads((folder / "01_measured_cpu.json").read_text())
    assert {"commit", "versions", "machine", "settings"} <= made_by.keys()


def test_what_was_measured_before_a_cut_is_not_measured_again(folder, instead, monkeypatch, capsys):
    def cut(part, *_):
        raise KeyboardInterrupt

    benchmark.run(CHOSEN, "cpu", parts=[SHARED])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(benchmark, "alone", cut)
        benchmark.run(CHOSEN, "cpu", parts=[SHARED, ONE_PASS])
    assert [row["scheme"] for row in read_table(folder / f"{MEMORY}.csv")] == [SHARED.name]
    benchmark.run(CHOSEN, "cpu", parts=[SHARED, ONE_PASS])
    assert instead == [SHARED, ONE_PASS]
    assert "(measured before)" in capsys.readouterr().out
    assert [row["seconds_a_step"] for row in read_table(folder / f"{MEMORY}.csv")] == [3.0, 3.0]


def test_what_the_machine_cannot_hold_is_a_row_with_the_reason_and_is_tried_again(folder, instead, monkeypatch):
    with monkeypatch.context() as small:
        small.setattr(benchmark, "available", lambda device: 5e8)
        benchmark.run(CHOSEN, "cpu", parts=[SHARED, PASSES])
    [row] = read_table(folder / f"{MEMORY}.csv")
    assert row["measured_gb"] is None and row["note"] == "refused: needs about 0.9 GB, and 0.5 GB are free"
    [row] = read_table(folder / f"{SECONDS}.csv")
    assert row["how"] == "not measured" and row["note"].startswith("refused: ")
    assert not instead
    benchmark.run(CHOSEN, "cpu", parts=[SHARED])
    assert instead == [SHARED] and read_table(folder / f"{MEMORY}.csv")[0]["measured_gb"] == 4.0


def test_no_part_is_started_after_the_minutes(folder, instead):
    benchmark.run(CHOSEN, "cpu", minutes=0, parts=[SHARED])
    assert not instead and read_table(folder / f"{MEMORY}.csv")[0]["note"] == "not measured: no time was left"


def test_rows_of_another_device_stay(folder, instead):
    benchmark.run(CHOSEN, "cpu", parts=[SHARED])
    [row] = read_table(folder / f"{MEMORY}.csv")
    save_table(folder / f"{MEMORY}.csv", [row | {"device": "cuda", "machine": "a GPU"}, row])
    benchmark.run(CHOSEN, "cpu", parts=[SHARED])
    assert [row["device"] for row in read_table(folder / f"{MEMORY}.csv")] == ["cpu", "cuda"]


def test_a_damaged_table_is_one_line(folder, instead):
    folder.mkdir(parents=True)
    (folder / f"{MEMORY}.csv").write_text("")
    with pytest.raises(ValueError, match=r"01_measured_memory\.csv is no table; delete it, "):
        benchmark.run(CHOSEN, "cpu", parts=[SHARED])


def test_steps_of_sd15_are_measured_live_where_they_fit_and_refused_where_not(instead, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "available", lambda device: 6e9)
    shared, conventional = benchmark.live([*reversed(benchmark.WANTED)], "cpu", tmp_path)
    assert instead == [Part("step", "lora_distillation_shared", resolution=64)]
    assert shared["measured_gb"] == 4.0 and conventional["note"].startswith("refused: needs about 19")
    table = benchmark.shown([shared, conventional], ["label", "measured_gb", "note"])
    assert table.shape == (2, 3) and table["measured_gb"].tolist() == [4.0, ""]


@pytest.mark.parametrize("content", ["device,x\ncpu,1\n", "a,a\n1,2\n", "device,resolution\ncpu\n", "\0\0"])
def test_a_table_with_other_columns_is_one_line(folder, content):
    folder.mkdir(parents=True)
    (folder / f"{MEMORY}.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"01_measured_memory\.csv .*; delete it, and measure writes it again"):
        benchmark.read("cpu", MEMORY)


def test_a_table_that_is_not_there_yet_names_the_command(folder):
    assert benchmark.read("cpu", MEMORY) == []
    assert "python -m lora_distill measure" in benchmark.shown([], ["label"]).to_string()


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_part_whose_process_is_killed_is_a_note_and_is_measured_again(folder, monkeypatch):
    monkeypatch.setattr(benchmark.parts_module, "measure", killed)
    benchmark.run(CHOSEN, "cpu", parts=[SHARED])
    [row] = read_table(folder / f"{MEMORY}.csv")
    assert row["note"] == "its process was killed, most often for want of memory"
    assert not list((folder.parent / "cache").glob("measured-*"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_part_on_a_gpu_runs_in_a_spawned_process(device, monkeypatch):
    """A process that is forked from one that has used CUDA cannot use it, and a fork server's are forked."""
    kinds = []

    def get_context(kind):
        kinds.append(kind)
        return multiprocessing.get_context("spawn")

    monkeypatch.setattr(benchmark, "get_context", get_context)
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(parts, "measure", lambda part, pipeline, where: {"note": where})
    assert benchmark.alone(SHARED, "bundled", device) == {"note": device}
    assert kinds == ["spawn"]


def test_a_gpu_that_is_full_is_a_note(monkeypatch):
    monkeypatch.setattr(parts, "prepare", out_of_memory)
    assert parts.measure(SHARED, "bundled", "cpu") == {"note": "does not fit: the device ran out of memory"}


# ---------------------------------------------------------------------------------------------- which parts, and needs


def test_on_a_cpu_the_two_schemes_of_the_claim_come_first_and_every_scheme_at_every_size():
    chosen = benchmark.parts_of("cpu", SD15)
    assert [part.name for part in chosen[:2]] == ["conventional_distillation", "lora_distillation_shared"]
    assert len(chosen) == len(set(chosen))
    steps = [part for part in chosen if part.kind == "step" and part.batch == 1]
    assert len(steps) == 3 * 12 and {part.resolution for part in steps} == {512, 256, 64}
    assert {part.precision for part in chosen if part.kind == "passes"} == {"float32", "bfloat16"}


@pytest.mark.parametrize("side", [None, [64, 64], 0, 3, 10, "64", 64.0])
def test_a_unet_that_does_not_say_its_side_is_one_line(side):
    with pytest.raises(InputError, match=r"^unet/config.json: sample_size: expected a multiple of 8, got ") as error:
        benchmark.parts_of("cpu", SD15 | {"sample_size": side})
    assert "\n" not in str(error.value)


def test_on_a_gpu_batches_go_to_16_and_images_to_768_px(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    chosen = benchmark.parts_of("cuda", SD15)
    assert {part.batch for part in chosen if part.kind == "step"} == {1, 4, 16}
    assert {part.resolution for part in chosen if part.kind == "images"} == {512, 768}
    assert any(part.kind == "training" for part in chosen[:8])


def test_a_conventional_step_of_sd15_at_512_px_asks_for_twenty_gigabytes_and_a_shared_one_for_six():
    needs = {name: benchmark.need(Part("step", name), SD15, "cpu") / 1e9 for name in benchmark.WANTED}
    assert needs["conventional_distillation"] == pytest.approx(19.6, abs=0.5)
    assert needs["lora_distillation_shared"] == pytest.approx(6.3, abs=0.5)


# ---------------------------------------------------------------------------------------------- what parts measure


@pytest.mark.parametrize("name", ["conventional_distillation", "lora_distillation_shared", "guided_batched"])
def test_measured_bytes_are_those_of_the_simulation(name):
    part = Part("step", name, resolution=64)
    [peak] = simulate(TRAINING.get(name) or parts.find_scheme(name), part.setup, BUNDLE)
    assert parts.measure(part, "bundled", "cpu")["live"] == pytest.approx(peak.total, rel=0.01)


def test_seconds_of_an_image_are_those_of_its_parts():
    seconds = {"text": [1.0], "text_guided": [2.0], "guided_pass": [8.0], "one_pass": [4.0], "decoder": [6.0]}
    results = {Part("passes", batch=2): {"seconds": seconds | {"lcm_pass": [4.0]}, "threads": 2}}
    rows = {row["method"]: row for row in benchmark.seconds_rows(results, "cpu")}
    guided, student = rows["guided teacher, 25 steps"], rows["one-pass student, 25 steps"]
    assert guided["seconds_an_image"] == (2 + 25 * 8 + 6) / 2 and student["seconds_an_image"] == (1 + 25 * 4 + 6) / 2
    assert student["saving_percent"] == pytest.approx(100 * (1 - 107 / 208), rel=1e-4)
    assert student["unet_saving_percent"] == 50.0
    assert rows["LCM-LoRA, 4 steps"]["saving_percent"] == pytest.approx(100 * (1 - 23 / 208), rel=1e-4)


def test_training_is_timed_beside_the_conventional_step():
    found = parts.measure(Part("training", batch=1, resolution=64, precision="16-bit", repeats=1), "bundled", "cpu")
    assert found["steps"].keys() == {"conventional, as scripts run it", *parts.ON_ONE_W0}
    rows = benchmark.seconds_rows({Part("training", batch=4, resolution=64): found}, "cuda")
    assert all(row["images_per_s"] > 0 and row["how"] == "training steps" for row in rows)


def test_the_conventional_step_minimises_what_guided_distillation_does():
    """Its two forwards and encodings give the loss of guided distillation on the same latents and noise."""
    step, batch = parts._conventional(Part("training", batch=2, resolution=64), "bundled", "cpu")
    theirs, pipe = step.model, load_pipeline("bundled")
    torch.manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(batch["images"]).latent_dist.sample() * pipe.vae.config.scaling_factor
        eps = torch.randn_like(latents)
        embeds, empty = theirs.text_encoder(batch["ids"])[0], theirs.text_encoder(batch["empty_ids"][:1])[0]
    with torch.no_grad():
        theirs.student.conv_out.weight.mul_(0.5)  # else teacher and student agree but for guidance
    ours = GuidanceDistillation(theirs.student, theirs.teacher, pipe.scheduler, parts.GUIDANCE, empty)
    expected, _ = ours({"latents": latents, "eps": eps, "timesteps": batch["timesteps"], "prompt_embeds": embeds})
    torch.manual_seed(0)
    loss, _ = theirs(batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- what it imports


def test_a_machine_with_torch_and_diffusers_alone_can_measure():
    """No notebook package, no datasets and no runtime for a CPU is imported on the way."""
    blocked = [
        "datasets",
        "papermill",
        "nbformat",
        "nbconvert",
        "nbclient",
        "openvino",
        "matplotlib",
        "jinja2",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
    code += "import lora_distill.__main__, lora_distill.memory.benchmark, lora_distill.memory.parts"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
