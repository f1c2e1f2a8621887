"""The command `bench`: what each step trains, that both sides minimise the same loss, its tables and its refusals."""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import moved
from diffusers import UNet2DConditionModel

from lora_distill import __main__ as cli
from lora_distill import settings as settings_module
from lora_distill.errors import InputError, MissingError, RunError
from lora_distill.memory import bench, growth
from lora_distill.memory.bench import METHODS, Data
from lora_distill.memory.conventional import ConventionalConsistency, ConventionalDenoising, ConventionalGuidance
from lora_distill.pipeline import encode_prompts, load_pipeline, with_unet
from lora_distill.settings import Settings
from lora_distill.storage import read_table, save_table
from lora_distill.train.objectives import ConsistencyDistillation, Denoising, GuidanceDistillation

BATCH = 2
SETTINGS = bench.settings_for(Settings(lora_rank=2, lora_alpha=2, lcm_rank=2, warmup_steps=0), "cpu", BATCH)


@pytest.fixture(scope="module")
def pipe():
    """The bundle with a UNet that is trained in a blink."""
    pipe = load_pipeline("bundled")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, **sizes, **blocks})
    return with_unet(pipe, unet.eval().requires_grad_(False))


@pytest.fixture
def data(pipe, tmp_path) -> Data:
    return Data(pipe, SETTINGS, tmp_path, captions=4)


# ---------------------------------------------------------------------------------------------- the steps


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_changes_what_it_trains_and_nothing_else(method, data):
    update = method.build(data)
    pipeline = [*data.pipe.unet.parameters(), *data.pipe.vae.parameters(), *data.pipe.text_encoder.parameters()]
    named = {**dict(update.objective.named_parameters()), **{f"pipe.{i}": p for i, p in enumerate(pipeline)}}
    before = {name: p.detach().clone() for name, p in named.items()}
    losses = [float(update()) for _ in range(3)]  # the first changes B alone, for B is zero
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    trained = {name for name, p in named.items() if p.requires_grad}
    assert changed <= trained and len(changed) > 0.9 * len(trained)  # some gradients are below AdamW's epsilon
    assert all(0 < loss < 100 for loss in losses)


def test_every_subject_has_its_conventional_step_first_and_ours_after_it():
    for subject in {method.subject for method in METHODS}:
        first, *others = [method for method in METHODS if method.subject == subject]
        assert first.name.startswith("conventional") and others
        assert not any(other.name.startswith("conventional") for other in others)


def test_two_unets_are_held_by_the_conventional_distillations_alone(data):
    copies = {
        method: sum(p.numel() for p in {p.data_ptr(): p for p in method.build(data).objective.parameters()}.values())
        - sum(p.numel() for part in (data.pipe.vae, data.pipe.text_encoder) for p in part.parameters())
        * method.name.startswith("conventional")
        for method in METHODS
    }
    one = sum(p.numel() for p in data.pipe.unet.parameters())
    two = {method for method, size in copies.items() if size >= 2 * one}
    assert {method.subject for method in two} == {bench.GUIDANCE, bench.LCM_LORA}
    assert all(method.name.startswith("conventional") for method in two)


def given(pipe, objective, batch, seed=0) -> dict[str, torch.Tensor]:
    """The batch of our objectives that a conventional one makes of its own after this seed."""
    torch.manual_seed(seed)
    latents, eps, embeds = objective.encoded(batch)
    return {**batch, "latents": latents, "eps": eps, "prompt_embeds": embeds}


def both_losses(pipe, theirs, ours, batch) -> tuple[float, float]:
    expected, _ = ours(given(pipe, theirs, batch))
    torch.manual_seed(0)
    loss, _ = theirs(batch)
    return loss.item(), expected.item()


@pytest.fixture
def batch(data) -> dict[str, torch.Tensor]:
    drawn = data.pictures(BATCH)(0, BATCH, torch.Generator().manual_seed(1))
    return drawn | {"timesteps": torch.tensor([19, 779]), "guidance_scale": torch.tensor([2.0, 5.0])}


@pytest.fixture
def student(pipe) -> UNet2DConditionModel:
    """A UNet with an adapter that changes its output."""
    student = bench.plain_copy(pipe.unet)
    moved(student, "student", targets="all")
    return student


def test_conventional_guided_distillation_has_the_loss_of_guidance_distillation(pipe, student, batch):
    theirs = ConventionalGuidance(pipe, student, pipe.unet, 3.0)
    ours = GuidanceDistillation(student, student, pipe.scheduler, 3.0, encode_prompts(pipe, [""]))
    loss, expected = both_losses(pipe, theirs, ours, batch)
    assert loss == pytest.approx(expected, rel=1e-5) and loss > 0


def test_conventional_lcm_lora_has_the_loss_of_consistency_distillation_without_a_moving_average(pipe, student, batch):
    empty = encode_prompts(pipe, [""])
    theirs = ConventionalConsistency(pipe, student, pipe.unet, empty, 20, 1e-3)
    ours = ConsistencyDistillation(student, student, pipe.scheduler, empty, 20, 1e-3)
    loss, expected = both_losses(pipe, theirs, ours, batch)
    assert loss == pytest.approx(expected, rel=1e-4) and loss > 0


def test_the_conventional_fine_tune_has_the_loss_of_denoising(pipe, student, batch):
    theirs, ours = ConventionalDenoising(pipe, student), Denoising(student, pipe.scheduler)
    loss, expected = both_losses(pipe, theirs, ours, batch)
    assert loss == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------- the tables


@pytest.fixture
def in_place(pipe, monkeypatch):
    """Nothing has a process of its own, and the small pipeline is loaded."""
    for module in (bench, growth):
        monkeypatch.setattr(module, "load", lambda settings: pipe)
        monkeypatch.setattr(module, "in_own_process", lambda of, name, device, *a: getattr(of, name)(*a))
    monkeypatch.setattr(bench, "SIDE", {"cpu": 16})
    monkeypatch.setattr(growth, "SECONDS", 0.0)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `bench` in an empty repository; exit code, stdout and stderr."""
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "cpu.yaml").write_text("profile: cpu\ndevice: cpu\n", encoding="utf-8")
    import_module("lora_distill.publish.figures")  # its style lies in the package
    monkeypatch.setattr(settings_module, "PACKAGE", tmp_path / "lora_distill")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora_distill", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_writes_a_row_a_method_and_shows_it_again(in_place, command, tmp_path):
    code, out, _ = command("--batch", "2", "--rounds", "3")
    assert code == 0
    rows = read_table(tmp_path / "runs" / "cpu" / "figures" / "bench" / "bench.csv")
    assert [(row["subject"], row["method"]) for row in rows] == [(m.subject, m.name) for m in METHODS]
    for row in rows:
        assert row["lower_quartile"] <= row["seconds_a_step"] <= row["upper_quartile"] and row["rounds"] == 3
        assert row["images_per_s"] == pytest.approx(2 / row["seconds_a_step"], rel=1e-3)
        assert row["times_as_fast_low"] <= row["times_as_fast"] <= row["times_as_fast_high"]
        assert row["share_of_rate_percent"] == pytest.approx(
            100 * row["gflop_a_step"] / row["seconds_a_step"] / row["matrix_product_gflops"], rel=1e-3
        )
        assert row["peak_mb"] > 0 and row["note"] is None and row["batch"] == 2
    assert all(row["times_as_fast"] == 1 for row in rows if row["method"].startswith("conventional"))
    code, shown, _ = command("--show")
    assert code == 0 and shown.startswith("| training | step | images/s |") and shown.strip() in out


def test_operations_of_a_step_are_fewer_where_something_is_cached(in_place, data):
    flops = {m: bench.measure_alone(i, SETTINGS, 1, data.folder)["flops"] for i, m in enumerate(METHODS)}
    for subject in {method.subject for method in METHODS}:
        theirs, *ours = [count for method, count in flops.items() if method.subject == subject]
        assert all(count < theirs for count in ours)


def test_what_does_not_fit_is_a_row_with_a_note(in_place, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = bench.Method(METHODS[0].subject, METHODS[0].name, full)
    monkeypatch.setattr(bench, "METHODS", (broken, METHODS[1]))
    first, second = bench.run(SETTINGS, rounds=3)
    assert first["note"] == "does not fit: the device ran out of memory" and first["seconds_a_step"] is None
    assert second["seconds_a_step"] > 0 and second["times_as_fast"] is None
    assert "does not fit" in bench.as_markdown([first, second])


def test_after_the_minutes_no_round_is_begun(data):
    timed, rates = bench.in_turns(METHODS[:1], data, rounds=50, minutes=0)
    assert len(timed[METHODS[0]]) == len(rates) == 3


def test_growth_changes_one_thing_at_a_time():
    cases = growth.cases(SETTINGS, 1)
    values = {panel: [getattr(case, panel) for own, case in cases if own == panel and case.method == bench.LCM_LORA]
              for panel in dict(cases)}  # fmt: skip
    assert values == {"batch": [1, 2, 4, 8, 16, 32], "rank": [1, 4, 16, 64], "resolution": [32, 64, 96, 128],
                      "captions": [100, 1000, 10_000], "processes": [1, 2]}  # fmt: skip
    usual = growth.Case(bench.LCM_LORA, BATCH, growth.RANK, 64, growth.CAPTIONS, 1, 1)
    for panel, case in cases:
        assert {name for name, value in vars(case).items() if value != getattr(usual, name)} <= {panel, "method"}
    assert len(set(cases)) == len(cases) == 2 * 19


def test_growth_has_a_row_a_case_and_a_note_for_what_could_not_run(in_place, monkeypatch):
    usual = growth.Case(bench.LCM_LORA, 2, 1, 32, 4, 1, 1)
    chosen = [("rank", usual), ("batch", replace(usual, batch=1)), ("rank", replace(usual, rank=2)),
              ("captions", usual), ("processes", replace(usual, processes=2))]  # fmt: skip
    monkeypatch.setattr(growth, "cases", lambda *_: chosen)
    monkeypatch.setattr(growth, "_by_torchrun", lambda *a: {"note": "torchrun failed"})
    *rows, last = growth.run(SETTINGS)
    assert [(row["panel"], row["value"]) for row in [*rows, last]] == [(p, getattr(case, p)) for p, case in chosen]
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["seconds_a_step"], rel=1e-3)
        assert row["steps_timed"] == growth.LEAST and row["peak_mb"] > 100 and row["note"] is None
    assert rows[0]["images_per_s"] == rows[3]["images_per_s"]  # one case, measured once
    assert last["images_per_s"] is None and last["note"] == "torchrun failed"


def test_growth_stops_at_the_minutes_and_draws_what_it_has(in_place, command, monkeypatch, tmp_path):
    times = iter([0.0, 0.0, *[1000.0] * 100])
    monkeypatch.setattr(growth.time, "monotonic", lambda: next(times))
    code, _, _ = command("--growth", "--out", "there", "--batch", "1")
    first, *others = read_table(tmp_path / "there" / "growth.csv")
    assert code == 0 and first["images_per_s"] > 0
    assert {row["note"] for row in others if row["images_per_s"] is None} == {"not measured: no time was left"}
    assert (tmp_path / "there" / "growth.png").exists()


def test_growth_without_any_time_is_one_line(command):
    code, _, err = command("--growth", "--minutes", "0")
    assert code == 1 and err.splitlines()[-1] == (
        "growth: nothing was measured; the first case: not measured: no time was left"
    )


def test_two_processes_are_measured_as_torchrun_starts_them(tmp_path):
    case = growth.Case(bench.GUIDANCE, 2, 1, 32, 4, 2, 1)
    found = growth._by_torchrun(case, case.settings(SETTINGS), tmp_path)
    assert len(found["seconds"]) >= growth.LEAST and found["peak_mb"] > 100


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "100000"], "--threads: this machine has "),
        (["--profile", "nowhere"], "nowhere"),
        (["--show"], "no bench.csv; python -m lora_distill bench measures it"),
    ],
)
def test_wrong_values_are_one_line(command, arguments, message):
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--rounds", "2"], ["--threads", "0"], ["--minutes", "-1"]])
def test_numbers_out_of_range_are_refused(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and f"Invalid value for '{arguments[0]}'" in err


def test_a_machine_without_room_for_all_is_one_line(monkeypatch):
    monkeypatch.setattr(bench, "available", lambda device: 3.9e9)
    with pytest.raises(RunError, match=r"need about 4\.0 GB, and 3\.9 GB are free; a smaller --batch") as error:
        bench._check_room([{"peak_mb": 1000.0}, {"peak_mb": 2000.0}, {"peak_mb": 3000.0}, {"note": "full"}][:2] * 2,
                          "cpu")  # fmt: skip
    assert "\n" not in str(error.value)


def test_another_table_is_one_line(tmp_path):
    save_table(tmp_path / "bench.csv", [{"a": 1}])
    with pytest.raises(InputError, match=r"bench\.csv: expected the table of python -m lora_distill bench"):
        bench.read([tmp_path])
    with pytest.raises(MissingError):
        bench.read([Path("nowhere")])


def test_processes_that_cannot_share_a_batch_are_a_note():
    case = growth.Case(bench.GUIDANCE, 3, 1, 32, 4, 2, 1)
    assert growth.why_not(case, "cpu") == "a batch of 3 is not shared by 2 processes"
