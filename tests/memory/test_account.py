"""Memory: the account on paper and the simulation agree; parameter counts; what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from lora_distill.adapters import add_adapter, parameter_counts
from lora_distill.memory.account import account, largest_batch
from lora_distill.memory.measure import simulate
from lora_distill.memory.schemes import INFERENCE, PRECISIONS, TRAINING, Setup, find_scheme
from lora_distill.shapes import meta_unet, unet_config

UNETS = {name: unet_config(name) for name in ("bundled", "sd15-shape")}
BUNDLE, SD15 = UNETS.values()
LCM = TRAINING["lcm_lora_shared"]


def total(terms: dict[str, int]) -> int:
    return sum(terms.values())


@cache
def simulated(scheme, setup: Setup, unet: str, *batches: int) -> list[int]:
    return [peak.total for peak in simulate(scheme, setup, UNETS[unet], *batches)]


def agree(scheme, setup: Setup, unet: str, *batches: int) -> bool:
    on_paper = [total(account(scheme, replace(setup, batch=batch), UNETS[unet])) for batch in batches]
    return on_paper == pytest.approx(simulated(scheme, setup, unet, *batches), rel=0.05)


# ---------------------------------------------------------------------------------------------- parameter counts


def test_the_unet_of_sd15_has_as_many_parameters_as_published():
    assert parameter_counts(meta_unet(SD15)) == (859_520_964, 0)


@pytest.mark.parametrize(("rank", "targets", "count"), [(4, "attention", 797_184), (64, "all", 67_252_224)])
def test_lora_parameters_on_sd15(rank, targets, count):
    unet = meta_unet(SD15)
    add_adapter(unet, "student", rank=rank, alpha=rank, targets=targets)
    assert parameter_counts(unet) == (859_520_964, count)


def test_31_percent_of_sd15_are_linear():
    linear = sum(m.weight.numel() for m in meta_unet(SD15).modules() if isinstance(m, torch.nn.Linear))
    assert linear / 859_520_964 == pytest.approx(0.31, abs=0.005)


# ---------------------------------------------------------------------------------------------- against the simulation


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", TRAINING)
def test_account_is_the_simulation_within_5_percent_in_training(name, checkpointing):
    assert agree(TRAINING[name], Setup(1, 64, checkpointing), "bundled", 4, 16)


@pytest.mark.parametrize("name", INFERENCE)
def test_account_is_the_simulation_within_5_percent_in_sampling(name):
    assert agree(INFERENCE[name], Setup(1, 64), "bundled", 4, 16)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_account_is_the_simulation_within_5_percent_in_every_precision(precision):
    assert agree(TRAINING["lora_distillation_shared"], Setup(8, 64, precision=precision), "bundled", 8)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("lora_distillation_shared", False), ("lcm_lora_shared", True), ("guided_batched", False)],
)
def test_account_is_the_simulation_within_5_percent_on_sd15(name, checkpointing):
    assert agree(find_scheme(name), Setup(1, checkpointing=checkpointing), "sd15-shape", 1, 16)


# ---------------------------------------------------------------------------------------------- what it says


def test_lcm_lora_of_sd15_on_one_16_bit_w0_stays_below_its_targets():
    [batch_1] = simulated(LCM, Setup(), "sd15-shape", 1)
    _, batch_16 = simulated(LCM, Setup(checkpointing=True), "sd15-shape", 1, 16)
    assert batch_1 <= 3.8e9 and batch_16 <= 7e9


@pytest.mark.parametrize("batch", [1, 16])
def test_sharing_w0_saves_exactly_one_unet(batch):
    shared, separate = (
        account(TRAINING[f"lora_distillation_{kind}"], Setup(batch), SD15) for kind in ("shared", "separate")
    )
    assert total(separate) - total(shared) == 4 * 859_520_964


def test_a_quantised_base_and_8_bit_states_take_less_in_their_own_terms_only():
    plain, nf4, small_states = (
        account(LCM, setup, SD15) for setup in (Setup(), Setup(quantised_base="nf4"), Setup(optimizer="adamw-8bit"))
    )
    assert {term for term in plain if plain[term] != nf4[term]} == {"weights"}
    assert {term for term in plain if plain[term] != small_states[term]} == {"optimizer"}


def test_the_largest_batch_fits_and_one_more_does_not():
    budget = 120e6
    batch = largest_batch(LCM, Setup(resolution=64), BUNDLE, budget)
    peaks = [total(account(LCM, Setup(b, 64), BUNDLE)) for b in (batch, batch + 1)]
    assert peaks[0] <= budget < peaks[1]


def test_a_card_that_is_too_small_takes_no_batch():
    assert largest_batch(LCM, Setup(resolution=64), BUNDLE, 1e6) == 0


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": -1}, "rank: must be at least 1, got -1"),
        ({"rank": 0}, "rank: must be at least 1, got 0"),
        ({"targets": "attn"}, "targets: must be one of attention, all, got 'attn'"),
        ({"precision": "fp8"}, "precision: must be one of float32, mixed"),
    ],
)
@pytest.mark.parametrize("way", [account, simulate])
def test_a_scheme_that_no_run_can_use_is_refused(way, change, message):
    with pytest.raises(ValueError, match=message):
        way(replace(LCM, **change), Setup(resolution=64), BUNDLE)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (Setup(resolution=500), "resolution: must be a multiple of 64 for this UNet, got 500"),
        (Setup(resolution=0), "resolution: must be a multiple of 64 for this UNet, got 0"),
        (Setup(batch=0), "batch: must be at least 1, got 0"),
        (Setup(optimizer="sgd"), "optimizer: must be one of adamw, adamw-fused, adamw-8bit, got 'sgd'"),
        (Setup(quantised_base="int4"), "quantised_base: must be one of none, int8, nf4, got 'int4'"),
    ],
)
def test_a_setup_that_no_run_can_use_is_refused(setup, message):
    with pytest.raises(ValueError, match=message) as caught:
        account(LCM, setup, SD15)
    assert "\n" not in str(caught.value)


def test_an_unknown_scheme_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown scheme 'lcm'; there are full_finetune, .*lcm_lora_shared"):
        find_scheme("lcm")
