"""Tables of memory and operations, the cache of what is simulated, and the command that writes them."""

import json

import pytest

from lora_distill import settings as settings_module
from lora_distill.memory import report
from lora_distill.memory.measure import simulate
from lora_distill.memory.schemes import INFERENCE, Setup
from lora_distill.settings import Settings, figures_dir
from lora_distill.shapes import SD15_VAE, unet_config
from lora_distill.storage import read_table

BUNDLE, SD15 = unet_config("bundled"), unet_config("sd15-shape")
ONE_PASS = "one_pass_merged"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The folder that the command fills for two schemes at one batch."""
    monkeypatch.setattr(settings_module, "repository_root", lambda: tmp_path)
    chosen = Settings(pipeline="bundled")
    paths = report.write(chosen, names=("lora_finetune", "guided_batched"), batches=(1,))
    assert {str(path) for path in figures_dir(chosen).iterdir()} == set(paths)
    return figures_dir(chosen)


def test_the_command_writes_what_is_on_paper_and_simulated(written):
    assert {path.name for path in written.iterdir()} == {"01_memory_simulated.csv", "01_flops.csv", "01_memory.json"}
    rows = read_table(written / "01_memory_simulated.csv")
    assert [row["scheme"] for row in rows] == ["lora_finetune", "lora_finetune", "guided_batched"]
    assert all(row["account_to_simulation"] == pytest.approx(1, abs=0.05) for row in rows)
    assert {"commit", "versions", "device", "kind"} <= json.loads((written / "01_memory.json").read_text()).keys()
    flops = {row["scheme"]: row["tflop_an_image_and_step"] for row in read_table(written / "01_flops.csv")}
    assert flops.keys() == {"lora_finetune", "guided_batched"}


# ---------------------------------------------------------------------------------------------- cache


def counted(calls):
    """`simulate`, with the batches of every call written down."""

    def way(scheme, setup, config, *batches):
        calls.append(batches)
        return simulate(scheme, setup, config, *batches)

    return way


def test_a_batch_that_was_simulated_is_read_from_disk(tmp_path):
    calls = []
    first = report.peaks(counted(calls), ONE_PASS, Setup(1, 64), [1, 2], BUNDLE, tmp_path)
    assert report.peaks(counted(calls), ONE_PASS, Setup(1, 64), [2, 1], BUNDLE, tmp_path) == first[::-1]
    assert first == simulate(INFERENCE[ONE_PASS], Setup(1, 64), BUNDLE, 1, 2)
    report.peaks(counted(calls), ONE_PASS, Setup(1, 64), [1, 3], BUNDLE, tmp_path)
    assert calls == [(1, 2), (3,)]


@pytest.mark.parametrize("change", [{"resolution": 128}, {"precision": "float32"}])
def test_another_setup_is_simulated_anew(tmp_path, change):
    [first] = report.peaks(simulate, ONE_PASS, Setup(1, 64), [1], BUNDLE, tmp_path)
    [other] = report.peaks(simulate, ONE_PASS, Setup(**{"resolution": 64, **change}), [1], BUNDLE, tmp_path)
    assert first.total < other.total


# ---------------------------------------------------------------------------------------------- tables


def test_savings_by_hand_are_those_of_the_account():
    rows = report.savings(BUNDLE, batches=(1,))
    row = next(r for r in rows if (r["reading"], r["precision"]) == ("inference", "16-bit"))
    guided, one = (report.on_paper(INFERENCE[name], BUNDLE) for name in ("guided_batched", "one_pass_merged"))
    assert row["batch_1"] == pytest.approx(100 * (1 - one / guided), abs=0.05)
    assert len(rows) == 3 * 3 * 2 + 2


def test_half_or_more_has_a_star_and_49_5_has_none():
    table = report.starred([{"reading": "sharing", "batch_1": 49.5}, {"reading": "sharing", "batch_1": 50.0}])
    assert table["batch_1"].tolist() == ["49.5", "50.0*"]


def test_a_larger_card_takes_a_larger_batch_and_checkpointing_too():
    rows = report.largest_batches(SD15, cards=(8, 24), most=64)
    assert all(row["8_gb_card"] <= row["24_gb_card"] for row in rows)
    fits = {(row["scheme"], row["checkpointing"]): row["24_gb_card"] for row in rows}
    assert fits["lcm_lora_shared", False] < fits["lcm_lora_shared", True]


def test_an_8_bit_optimizer_changes_nothing_of_a_rank_4_lora_and_much_of_a_full_fine_tune():
    row = next(r for r in report.what_pays(SD15, batches=(1,)) if r["change"] == "8-bit optimizer")
    assert abs(row["LoRA distillation, one W0"]) < 0.01 and row["full fine-tune"] < -5


# ---------------------------------------------------------------------------------------------- operations


def test_decoding_costs_three_evaluations():
    assert report.decoder_flops(SD15_VAE, 512) == pytest.approx(2.515e12, rel=0.01)


def test_a_picture_costs_its_steps_and_one_decoding():
    rows = report.image_tflop(
        {"guided_batched": 2.0, "one_pass_unmerged": 1.0, "one_pass_merged": 1.0, "few_step": 1.0}
    )
    assert [row["unet_tflop"] for row in rows] == [50.0, 25.0, 25.0, 4.0]
    assert {row["decoder_tflop"] for row in rows} == {2.515}
