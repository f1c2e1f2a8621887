"""Seconds per image: what the timer holds and in which turns, on a clock whose every second is known."""

import pytest
import torch

from lora_distill.judge import timing
from lora_distill.judge.timing import (
    Timing,
    compare_times,
    method_rows,
    protocol,
    runtime,
    saving_bound,
    thread_counts,
    time_grid,
    time_runtimes,
    time_samplers,
    unet_rows,
)
from lora_distill.pipeline import load_pipeline, with_unet
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.storage import read_table, save_table

PROMPTS = ["a lion", "an owl", "a bus"]


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("bundled")


@pytest.fixture
def clock(monkeypatch):
    """Time passes only in the three parts: 1 s a prompt, 10 s a UNet pass and image, 100 s a decoded image.

    The calls of sampling are noted; in each one everything takes longer by the factor `slower` of its number.
    """

    class Clock:
        seconds, calls, slower = 0.0, [], {}

        def factor(self):
            return self.slower.get(len(self.calls), 1)

    clock = Clock()

    def encode(pipe, prompts):
        clock.seconds += len(prompts) * clock.factor()
        return torch.zeros(len(prompts), 24, 128)

    def draw(pipe, sampler, noise, prompt_embeds, empty_embeds, generators):
        clock.calls.append((sampler, tuple(noise.shape), empty_embeds is not None))
        clock.seconds += 10 * len(noise) * sampler.steps * (2 if sampler.guidance_scale != 1 else 1) * clock.factor()
        return noise

    def decode(pipe, latents):
        clock.seconds += 100 * len(latents) * clock.factor()

    monkeypatch.setattr(timing, "encode_prompts", encode)
    monkeypatch.setattr(timing, "sample", draw)
    monkeypatch.setattr(timing, "decode_latents", decode)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.seconds)
    return clock


def test_parts_are_timed_apart_and_per_image(pipe, clock):
    one, two = Sampler(3), Sampler(3, 2.0)
    timings = time_samplers({"one": (pipe, one), "two": (pipe, two)}, PROMPTS[:2], repeats=2)
    assert timings["one"] == timing.Timing([1.0] * 2, [30.0] * 2, [100.0] * 2)
    assert timings["two"] == timing.Timing([1.5] * 2, [60.0] * 2, [100.0] * 2), 'guidance encodes "" too'
    assert timings["two"].unet_share == 60 / 161.5


def test_contestants_take_turns_and_what_warms_up_is_not_counted(pipe, clock):
    one, two = Sampler(1), Sampler(2)
    clock.slower = dict.fromkeys(range(4), 1000)
    timings = time_samplers({"one": (pipe, one), "two": (pipe, two)}, PROMPTS[:1], repeats=3, warm_ups=2)
    assert [sampler for sampler, *_ in clock.calls] == [one, two] * 5
    assert timings["one"].unet == [10.0] * 3 and timings["two"].unet == [20.0] * 3


def test_a_grid_has_a_row_a_contestant_batch_and_resolution_and_is_a_table(pipe, clock, tmp_path):
    clock.slower = {
        10: 3
    }  # the tenth sampling call, the second repeat of the last batch and resolution, from its VAE on
    guided = {"two passes": (pipe, Sampler(3, 2.0))}
    rows = time_grid(guided, PROMPTS, [1, 4], [64, 32], 2, "two passes")
    assert [(row["resolution"], row["batch"]) for row in rows] == [(64, 1), (64, 4), (32, 1), (32, 4)]
    assert [shape for _, shape, _ in clock.calls[::3]] == [(1, 4, 8, 8), (4, 4, 8, 8), (1, 4, 4, 4), (4, 4, 4, 4)]
    assert rows[0] == {
        "method": "two passes", "seconds_an_image": 162.0, "lowest": 162.0, "highest": 162.0,
        "resolution": 64, "batch": 1, "steps": 3, "unet_passes": 6, "device": "cpu", "dtype": "float32",
        "runtime": "PyTorch", "threads": torch.get_num_threads(),
        "text_encoder": 2.0, "unet": 60.0, "vae": 100.0, "repeats": 2, "warm_ups": 1,
        "saving_percent": 0.0, "saving_percent_low": 0.0, "saving_percent_high": 0.0,
    }  # fmt: skip
    save_table(tmp_path / "times.csv", rows)
    assert read_table(tmp_path / "times.csv") == rows


def test_what_was_measured_before_is_not_timed_again(pipe, clock):
    before = {"one": Timing([1.0] * 5, [2.0] * 5, [3.0] * 5)}
    rows = time_grid({"one": (pipe, Sampler(1))}, PROMPTS, [1, 2], [64], 2, "one", measured={(64, 1): before})
    assert [(row["batch"], row["seconds_an_image"], row["repeats"]) for row in rows] == [(1, 6.0, 5), (2, 111.0, 2)]
    assert {shape[0] for _, shape, _ in clock.calls} == {2}


def test_methods_of_all_runtimes_take_turns_batch_1_first_on_one_thread_and_on_all(pipe, clock):
    counts = thread_counts()
    assert counts == sorted({1, torch.get_num_threads()})
    one, two, three = Sampler(1), Sampler(2), Sampler(3)
    entered = {"a": {"one": (pipe, one), "two": (pipe, two)}, "b": {"one": (pipe, three)}}
    timings = time_runtimes(entered, PROMPTS[:1], {1: 3, 2: 1})
    assert list(timings) == [(name, count, batch) for batch in (1, 2) for count in counts for name in "ab"]
    assert [sampler for sampler, *_ in clock.calls] == [one, two, three] * (4 + 2) * len(counts)
    assert [shape[0] for _, shape, _ in clock.calls] == [1] * 12 * len(counts) + [2] * 6 * len(counts)
    assert timings["a", 1, 1]["two"].unet == [20.0] * 3 and timings["b", counts[-1], 2]["one"].unet == [30.0]
    assert torch.get_num_threads() == counts[-1], "as it was before"


def test_one_image_is_timed_most_often():
    assert protocol(8, 30) == {1: 30, 8: 3} and protocol(2, 1) == {1: 1, 2: 1} and protocol(1, 50) == {1: 50}


TIMINGS = {
    ("PyTorch", 1, 1): {"teacher": Timing([1.0], [8.0], [1.0]), "student": Timing([1.0], [4.0], [1.0])},
    ("OpenVINO", 1, 1): {"teacher": Timing([1.0], [4.0], [1.0]), "student": Timing([1.0], [1.0], [1.0])},
}


def test_a_method_is_compared_with_the_baseline_of_its_runtime_and_threads():
    rows = method_rows(TIMINGS, "teacher", "OpenVINO", {"teacher": 25, "student": 4}, device="a CPU")
    assert [row["saving_percent"] for row in rows] == [0.0, 40.0, 0.0, 50.0]
    assert [row["times_faster"] for row in rows] == [1.0, 1.67, 1.0, 2.0]
    assert [row["times_faster_unet"] for row in rows] == [1.0, 2.0, 1.0, 4.0]
    assert [row["deployed"] for row in rows] == [False, False, True, True]
    assert rows[1] == rows[1] | {"seconds_an_image": 6.0, "unet_seconds": 4.0, "batch": 1, "repeats": 1, "steps": 4}


def test_what_is_saved_goes_turn_by_turn_and_has_an_interval():
    """The machine slows down threefold half-way: medians would compare its two speeds."""
    slow = [1.0] * 10 + [3.0] * 11
    teacher = Timing([0.0] * 21, [10 * each for each in slow], [0.0] * 21)
    student = Timing([0.0] * 21, [each * (6 + 0.1 * (i % 3)) for i, each in enumerate(slow)], [0.0] * 21)
    rows = method_rows({("PyTorch", 1, 1): {"teacher": teacher, "student": student}}, "teacher", "", {
        "teacher": 1, "student": 1}, "a CPU")  # fmt: skip
    assert rows[1]["saving_percent"] == 39
    assert 38 <= rows[1]["saving_percent_low"] <= 39 <= rows[1]["saving_percent_high"] <= 40


def test_the_student_and_every_lcm_lora_are_compared():
    names = ["teacher, two passes", "LoRA student, merged", "LCM-LoRA 8k", "LCM-LoRA 30k"]
    assert list(timing.pairs(names)) == [
        "LoRA student, merged against teacher, two passes",
        *(f"LCM-LoRA {name} against teacher, two passes" for name in ("8k", "30k")),
        "LCM-LoRA 30k against LCM-LoRA 8k",
    ]
    assert timing.pairs([*names, "full copy"])["LoRA student, merged against full copy"][1] == "full copy"


def test_contrasts_of_seconds_have_a_row_a_runtime_that_has_both():
    contrasts = {"student against teacher": ("student", "teacher"), "another": ("another", "teacher")}
    rows = timing.contrast_rows(TIMINGS, contrasts, "OpenVINO", "a CPU")
    assert [(row["runtime"], row["deployed"], row["value"]) for row in rows] == [
        ("PyTorch", False, 0.6), ("OpenVINO", True, 0.5)]  # fmt: skip
    assert rows[0] == rows[0] | {
        "contrast": "student against teacher",
        "low": 0.6,
        "high": 0.6,
        "repeats": 1,
        "batch": 1,
    }


def test_a_forward_of_the_unet_is_timed_at_each_batch_size_and_number_of_threads(pipe):
    rows = unet_rows({"PyTorch": pipe}, [1, 2], repeats=1, device="a CPU")
    assert [(row["threads"], row["batch"]) for row in rows] == [(t, b) for t in thread_counts() for b in (1, 2)]
    assert all(row["unet_seconds"] > 0 and row["device"] == "a CPU" for row in rows)


def test_a_row_has_the_median_and_the_spread_of_its_repeats(pipe, clock):
    clock.slower = {2: 3, 3: 2}  # from the VAE of the second call, which is the first repeat, to the third's UNet
    row = time_grid({"one pass": (pipe, Sampler(1))}, PROMPTS, [1], [64], 3, "one pass")[0]
    # repeats: text 1, 1 x 3, 1 x 2; UNet 10 x 3, 10 x 2, 10; VAE 100 x 3, 100 x 2, 100
    assert (row["lowest"], row["seconds_an_image"], row["highest"]) == (112.0, 223.0, 331.0)
    assert (row["text_encoder"], row["unet"], row["vae"]) == (2.0, 20.0, 200.0)


def test_real_times_of_every_resolution_add_up(pipe):
    rows = time_grid({"one": (pipe, Sampler(1)), "two": (pipe, Sampler(1, 2.0))}, PROMPTS, [2], [32, 64], 1, "two")
    for row in rows:
        parts = row["text_encoder"] + row["unet"] + row["vae"]
        assert 0 < parts == pytest.approx(row["seconds_an_image"])


def test_another_resolution_is_another_latent_and_the_default_is_the_unets_own(pipe):
    assert torch.equal(initial_noise(pipe, 2, seed=1), initial_noise(pipe, 2, seed=1, resolution=64))
    assert initial_noise(pipe, 2, seed=1, resolution=128).shape == (2, 4, 16, 16)
    with pytest.raises(ValueError, match="resolution: expected a multiple of 8 for this VAE, got 60"):
        initial_noise(pipe, 1, seed=0, resolution=60)


def test_one_pass_needs_no_empty_prompt(pipe):
    noise, embeds = initial_noise(pipe, 1, seed=1), torch.randn(1, 24, pipe.unet.config.cross_attention_dim)
    with_it = sample(pipe, Sampler(2), noise, embeds, torch.zeros_like(embeds))
    assert torch.equal(sample(pipe, Sampler(2), noise, embeds, None), with_it)


def test_a_compiled_unet_is_told_apart_wrapped_or_in_place():
    layer = torch.nn.Linear(2, 2)
    assert runtime(layer) == "PyTorch" and runtime(torch.compile(layer)) == "torch.compile"
    layer.compile(backend="eager")
    assert runtime(layer) == "torch.compile"


def test_rows_state_what_the_unet_runs_on(pipe, clock):
    other = with_unet(pipe, load_pipeline("bundled").unet)
    other.unet.compile()
    rows = time_grid({"plain": (pipe, Sampler(1)), "compiled": (other, Sampler(1))}, PROMPTS, [1], [64], 1, "plain")
    assert [row["runtime"] for row in rows] == ["PyTorch", "torch.compile"]


@pytest.mark.parametrize("f, rho", [(0.9, 0.5), (0.8, 0.66), (1.0, 1.0)])
def test_the_bound_is_what_is_left_out_of_a_simulated_teacher(f, rho):
    """A teacher of 100 s, f of it in forwards on 2B images that become forwards on B at rho times the price."""
    forwards, rest = 100 * f, 100 * (1 - f)
    student = forwards * rho + rest
    assert saving_bound(f, rho) == pytest.approx(1 - student / 100)


@pytest.mark.parametrize("f, rho, says", [(1.2, 0.5, "unet_share"), (-0.1, 0.5, "unet_share"), (0.5, 0.0, "rho")])
def test_shares_and_ratios_that_cannot_be_are_refused(f, rho, says):
    with pytest.raises(ValueError, match=says):
        saving_bound(f, rho)


def test_savings_stand_beside_the_bound_of_the_measured_times():
    rows = [
        {"method": name, "resolution": 64, "batch": 8, "steps": steps, "seconds_an_image": seconds, "unet": unet}
        for name, steps, seconds, unet in (("guided", 25, 2.0, 1.6), ("one pass", 25, 1.5, 1.1), ("few", 4, 0.5, 0.1))
    ]
    _, one_pass, few = compare_times(rows, "guided", {64: {8: 0.6, 16: 1.0}})
    assert one_pass["unet_share"] == 0.8 and one_pass["rho"] == 0.6
    assert one_pass["bound_percent"] == pytest.approx(80 * 0.4)
    assert few["bound_percent"] is None


def test_threads_do_not_count_on_a_gpu():
    assert thread_counts("cuda:1") == [1]
