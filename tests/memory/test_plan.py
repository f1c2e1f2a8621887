"""The plan of a profile: its operations are those of its runs, and what does not fit is said before anything starts."""

import json
import sys
import time

import numpy as np
import pytest
import torch

from lora_distill import __main__ as cli
from lora_distill import rehearsal
from lora_distill.memory import plan as plans
from lora_distill.memory.plan import Plan, Work, model_of, plan, work
from lora_distill.pipeline import load_pipeline
from lora_distill.publish import series
from lora_distill.settings import Settings, load_settings
from lora_distill.shapes import SD15_SHAPE

CARDS = {"sd15-t4": 15, "sd15-flickr8k": 24, "sd15-flickr30k": 24}  # GiB that a card of 16 or 24 GB shows
SECONDS = {"01": 124, "02": 215, "03": 205, "04": 274}  # of the notebooks at profile cpu, on two cores


def of(profile: str, **options) -> Plan:
    return plan(load_settings(profile), "cpu", **options)


def test_sizes_of_sd15_are_those_published():
    model = model_of(SD15_SHAPE, 512)
    assert [round(count / 1e6, 1) for count in model.parameters] == [859.5, 83.7, 123.1]
    assert model.forward == pytest.approx(0.803e12, rel=0.01) and model.decode == pytest.approx(2.515e12, rel=0.01)
    assert model.encode == pytest.approx(1.117e12, rel=0.01)


def test_a_pipeline_on_paper_has_the_parameters_of_the_loaded_one():
    pipe = load_pipeline("bundled")
    counts = tuple(sum(p.numel() for p in part.parameters()) for part in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert model_of("bundled", 64).parameters == counts


@pytest.mark.parametrize("profile", CARDS)
def test_a_profile_of_sd15_fits_its_card_and_asks_the_hub_for_nothing(profile):
    found = of(profile, card=CARDS[profile], tflops=100)
    assert not found.refusal
    assert found.downloads["stable-diffusion-v1-5/stable-diffusion-v1-5"] == pytest.approx(4.27e9, rel=0.01)


def test_the_profile_for_16_gb_ends_within_a_free_session():
    """A T4 reaches 11.5 TFLOP/s on SD 1.5 in 16 bits: 30 % of 38."""
    found = of("sd15-t4", card=15, tflops=38)
    assert sum(row["minutes"] for row in found.rows) < 3.5 * 60
    assert max(row["host_gb"] for row in found.rows) < 12


def test_full_copies_do_not_fit_16_gb():
    settings = load_settings("sd15-t4").model_copy(update={"full_copies": True})
    found = plan(settings, "cpu", card=15, tflops=38)
    assert found.refusal.startswith("notebook 03 needs about ") and found.refusal.endswith(
        "a card of 15 GiB has 14.6 GB"
    )
    assert found.last_lines[-1] == f"does not fit: {found.refusal}"


def test_an_8_bit_optimizer_lowers_the_peak_of_the_full_copies_alone():
    settings = load_settings("sd15-flickr8k")
    adam, eight = (plans.peaks(settings.model_copy(update={"optimizer": name}), model_of(settings.pipeline, 512))
                   for name in ("adamw", "adamw-8bit"))  # fmt: skip
    assert eight["03"] < adam["03"] - 2e9 and eight["04"] == adam["04"]


def test_seconds_of_the_bundled_series_are_right_within_a_factor_of_two():
    """At the rate of a matrix product of the machine that took SECONDS: 172 GFLOP/s on two cores."""
    found = of("cpu", tflops=0.172)
    for row in found.rows:
        assert 0.5 < 60 * row["minutes"] / SECONDS[row["notebook"]] < 2


def test_guidance_adds_a_pass_to_every_step_of_the_teacher():
    one = Settings(guidance_scale=1.0, guidance_scales=[1.0], teacher_images=1000, eval_prompts=2, curve_prompts=10)
    two = one.model_copy(update={"guidance_scale": 3.0, "guidance_scales": [3.0]})
    images = 1000 + 10 + 2 * 3 * 1.5  # teacher images, the curve, and the verdict's teacher and half guided one
    fewer = 2 * 3 * (4 + 8)  # the verdict's samplers with four and eight steps
    assert work(two)["02"].passes - work(one)["02"].passes == 25 * images + fewer


def test_work_adds_up():
    assert Work(1, 2, 3) + Work(1, 1, 1) == Work(2, 3, 4)


def test_more_trainings_seeds_and_sets_are_more_work():
    base = Settings()
    for change in ({"more_train_seeds": [1]}, {"eval_seeds": [0, 1, 2, 3]}, {"gradient_checkpointing": True}):
        changed = work(base.model_copy(update=change))
        assert changed["02"].passes > work(base)["02"].passes and changed["03"].passes > work(base)["03"].passes
    assert work(base.model_copy(update={"flickr_30k": ""}))["03"].passes < work(base)["03"].passes


def test_the_rate_is_measured_in_less_than_a_second():
    clock = time.perf_counter()
    assert 1e9 < plans.rate("cpu", torch.float32) < 1e14 and time.perf_counter() - clock < 1


# ---------------------------------------------------------------------------------------------- the commands


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora_distill", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def test_the_plan_is_printed_a_row_a_notebook(command):
    code, out, _ = command("plan", "--profile", "sd15-flickr8k", "--card", "24", "--tflops", "150")
    lines = out.splitlines()
    assert code == 0 and [line[:2] for line in lines[4:8]] == ["01", "02", "03", "04"]
    assert lines[0].startswith("downloads: ") and lines[1].startswith("disk: ")
    assert lines[2].startswith("guided trajectories, of distill --trajectories: about ")
    assert lines[-2].startswith("about ") and lines[-1] == "fits in 24.3 GB of a card of 24 GiB"


def test_a_pipeline_that_is_not_there_is_one_line(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"profile: mine\npipeline: {tmp_path}/none\n")
    code, out, err = command("plan", "--profile", str(tmp_path / "mine.yaml"))
    assert code == 2 and not out and err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "down_block_types", None),
        ("unet", "down_block_types", []),
        ("unet", "down_block_types", ["Nope"]),
        ("unet", "block_out_channels", []),
        ("unet", "cross_attention_dim", None),
        ("unet", "in_channels", 9),
        ("vae", "latent_channels", "4"),
        ("vae", "block_out_channels", [8, 8]),
        ("text_encoder", "num_attention_heads", 7),
    ],
)
def test_configs_that_no_network_has_are_one_line(command, tmp_path, part, key, value):
    rehearsal.write_pipeline(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (tmp_path / "mine.yaml").write_text(f"profile: mine\npipeline: {tmp_path}/pipeline\n")
    code, out, err = command("plan", "--profile", str(tmp_path / "mine.yaml"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{part}/config.json" in err or err.startswith(str(tmp_path / "pipeline"))


def test_reproduce_stops_in_one_line_before_anything_runs_where_a_profile_does_not_fit(command, monkeypatch):
    monkeypatch.setattr(series, "reproduce", lambda *_, **__: pytest.fail("it started"))
    monkeypatch.setattr(plans.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 4e9}))
    code, out, err = command("reproduce", "--profile", "sd15-flickr8k")
    assert code == 1 and not out and err.count("\n") == 1
    assert err.startswith("profile sd15-flickr8k does not fit: notebook 03 needs about ")


def test_reproduce_says_how_long_a_profile_takes(command, monkeypatch):
    monkeypatch.setattr(series, "reproduce", lambda *_, **__: None)
    monkeypatch.setattr(plans.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 99e9}))
    _, out, _ = command("reproduce", "--profile", "sd15-flickr8k")
    assert out.startswith("about ") and "fits in 99.0 GB of this machine's memory" in out


def test_reproduce_of_the_bundled_pipeline_needs_no_plan(command, monkeypatch):
    monkeypatch.setattr(series, "reproduce", lambda *_, **__: None)
    monkeypatch.setattr(plans, "plan", lambda *_, **__: pytest.fail("not needed"))
    assert command("reproduce", "--profile", "cpu")[0] == 0


def test_a_card_that_is_not_here_needs_its_rate_too():
    with pytest.raises(ValueError, match="tflops: needed with card"):
        of("sd15-t4", card=15)


def test_trajectories_take_three_latents_a_step_and_a_prompt_an_image_in_16_bits():
    settings = load_settings("sd15-t4")
    found = plans.trajectories(settings, model_of(settings.pipeline, settings.resolution))
    points = np.empty((settings.teacher_images, settings.sampling_steps, 3, 4, 64, 64), np.float16)
    assert found == points.nbytes + np.empty((settings.teacher_images, 77, 768), np.float16).nbytes
