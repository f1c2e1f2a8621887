"""Paired contrasts: each equals its plain definition, pairs what is shared, and says how little few errors tell."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_distill.judge import distances, paired
from lora_distill.judge.metrics import psnr
from lora_distill.judge.paired import Judged, contrast_rows, draws, errors_ratio, mean_difference, seconds_ratio

RNG = np.random.default_rng(0)


def features(seeds: int, prompts: int, width: int = 5, shift: float = 0.0) -> np.ndarray:
    return RNG.normal(shift, 1, (seeds, prompts, width))


def test_a_resample_holds_as_many_of_each_stratum_and_one_seed_fewer_than_there_are():
    drawn = draws(["a", "b", "b", "a", "b"], seeds=3, resamples=50)
    assert (drawn.prompts[:, [0, 3]].sum(1) == 2).all() and (drawn.prompts[:, [1, 2, 4]].sum(1) == 3).all()
    assert (drawn.seeds.sum(1) == 2).all() and drawn.seeds.std() > 0 and drawn.prompts.std() > 0
    again = draws(["a", "b", "b", "a", "b"], seeds=3, resamples=50)
    assert (again.prompts == drawn.prompts).all() and (again.seeds == drawn.seeds).all()


def test_one_seed_is_always_drawn_and_several_spread_as_their_deviation_with_ddof_1_says():
    assert (draws(np.zeros(4), 1, 9).seeds == 1).all()
    values = np.array([[1.0], [2.0], [6.0]])
    means = paired.drawn_means(values, draws(np.zeros(1), 3, 20000))
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)


def test_a_drawn_mean_is_that_of_the_rows_written_out():
    values, drawn = RNG.normal(size=(3, 7)), draws(np.arange(7) % 2, 3, 20)
    for mean, prompts, seeds in zip(paired.drawn_means(values, drawn), drawn.prompts, drawn.seeds, strict=True):
        written = values[np.repeat(np.arange(3), seeds)][:, np.repeat(np.arange(7), prompts)]
        assert mean == pytest.approx(written.mean())


def test_a_drawn_frechet_distance_is_that_of_the_rows_written_out():
    rows, reference, drawn = features(2, 30), features(1, 40, shift=0.3)[0], draws(np.zeros(30), 2, 4)
    frechet = paired.drawn_frechet(rows, reference, drawn)
    for i in range(5):
        prompts = drawn.prompts[i - 1] if i else np.ones(30, int)
        seeds = np.repeat([0, 1], drawn.seeds[i - 1]) if i else [0, 1]
        sets = [torch.tensor(rows[s][np.repeat(np.arange(30), prompts)]) for s in seeds]
        real = torch.tensor(reference)
        assert frechet[i] == pytest.approx(np.mean([distances.frechet_distance(each, real) for each in sets]), rel=1e-6)


def test_a_difference_of_drawn_kernels_is_that_of_the_unbiased_kid():
    ours, theirs, reference = features(1, 40), features(1, 40, shift=0.4), features(1, 40, shift=0.1)[0]
    drawn = draws(np.zeros(40), 1, 3)
    found = paired.drawn_kernel(ours, reference, drawn) - paired.drawn_kernel(theirs, reference, drawn)
    kid = [distances.kernel_distance(torch.tensor(x[0]), torch.tensor(reference)) for x in (ours, theirs)]
    assert found[0] == pytest.approx(kid[0] - kid[1], rel=1e-5)


def test_a_resampled_kid_equals_the_one_of_a_single_set():
    ours, reference, drawn = features(1, 25), features(1, 30)[0], draws(np.zeros(25), 1, 6)
    counts = [torch.tensor(np.repeat(np.arange(25), row)) for row in drawn.prompts]
    kernel, rows, real = distances.polynomial_kernel, torch.tensor(ours[0]), torch.tensor(reference)
    for found, index in zip(paired.drawn_kernel(ours, reference, drawn)[1:], counts, strict=True):
        other = kernel(rows[index], rows[index]) * (index[:, None] != index[None])
        pairs = (index[:, None] != index[None]).sum()
        assert found == pytest.approx(float(other.sum() / pairs - 2 * kernel(rows[index], real).mean()), rel=1e-6)


def test_distance_to_the_teachers_images_draws_both_alike():
    rows, drawn = features(2, 30), draws(np.zeros(30), 2, 8)
    assert paired.drawn_frechet(rows, rows, drawn) == pytest.approx(np.zeros(9), abs=1e-6)


def test_what_a_hard_prompt_does_to_both_cancels():
    hard, noise = RNG.normal(0, 5, 200), RNG.normal(0, 0.1, (2, 3, 200))
    drawn = draws(np.zeros(200), 3, 400)
    _, low, high = mean_difference(hard + noise[0] + 1, hard + noise[1], drawn)
    assert low < 1 < high and high - low < 0.1
    alone = np.quantile(paired.drawn_means(hard + noise[0], drawn), [0.025, 0.975])
    assert np.diff(alone)[0] > 1


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says():
    """Of methods with an effect of prompt, seed and image each, 4 seeds; Owen's bootstrap errs to the wide side."""
    held = 0
    for i in range(200):
        rng = np.random.default_rng(i)
        one, two = (rng.normal(size=(8, 60)) + 0.5 * rng.normal(size=(8, 1)) for _ in range(2))
        _, low, high = mean_difference(one, two, draws(np.zeros(60), 8, 200, seed=i))
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 1


@pytest.mark.parametrize(
    ("ours", "theirs", "value"), [(0, 0, 1.0), (0, 9, 0.5 / 9.5), (9, 0, 19.0), (20, 10, 20.5 / 10.5)]
)
def test_half_an_error_is_added_to_both(ours, theirs, value):
    errors = [np.arange(300).reshape(3, 100) < count for count in (ours, theirs)]
    contrast = errors_ratio(*errors, draws(np.zeros(100), 3, 1000))
    assert contrast.value == pytest.approx(value) and contrast.low < value < contrast.high


def test_no_error_of_either_tells_nothing_and_many_tell_much():
    none = np.zeros((3, 100), bool)
    _, low, high = errors_ratio(none, none, draws(np.zeros(100), 3, 1000))
    assert low < 0.05 and high > 20
    many = RNG.random((3, 2000)) < 0.2
    _, low, high = errors_ratio(many, many, draws(np.zeros(2000), 3, 1000))
    assert 0.98 < low < 1 < high < 1.02, "of the very same pictures"


def test_a_difference_of_psnr_is_that_of_two_psnrs():
    teacher, one, two = RNG.integers(0, 256, (3, 1, 8, 4, 4, 3)).astype(np.uint8)
    quality = [SimpleNamespace(images=x[0], right=None, fit_error=None, features=SimpleNamespace(frechet=x[0, :, 0, 0]))
               for x in (one, two, teacher)]  # fmt: skip
    ours, theirs = (paired.judged([q], teacher=[quality[2]]) for q in quality[:2])
    contrast = paired.psnr_difference(ours.squared_error, theirs.squared_error, draws(np.zeros(8), 1, 100))
    assert contrast.value == pytest.approx(psnr(one[0], teacher[0]) - psnr(two[0], teacher[0]))
    assert contrast.low < contrast.value < contrast.high


def test_turns_are_compared_pair_by_pair():
    """A machine that slows down for a while slows both: the ratio stays."""
    slow = np.array([1.0, 5.0, 1.0, 3.0, 2.0] * 6)
    assert seconds_ratio(0.6 * slow, slow) == pytest.approx((0.6, 0.6, 0.6))
    value, low, high = seconds_ratio(RNG.normal(6, 0.5, 40), RNG.normal(10, 0.5, 40))
    assert low < value < high and low > 0.55 and high < 0.65


def test_methods_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="expected the same seeds and prompts"):
        mean_difference(np.zeros((2, 5)), np.zeros((2, 6)), draws(np.zeros(5), 2, 3))


def method(wrong: float, prompts: int, seeds: int = 3, width: int = 5, **more) -> Judged:
    return Judged(
        features(seeds, prompts, width, shift=wrong),
        RNG.random((seeds, prompts)) > wrong,
        fit_error=RNG.random((seeds, prompts)) * wrong,
        squared_error=RNG.random((seeds, prompts)) + wrong,
        **more,
    )


def test_a_table_of_contrasts_has_a_row_a_measure_and_number_of_objects():
    objects, reference = np.arange(40) % 4 + 1, features(1, 50)[0]
    methods = {"teacher": method(0.1, 40), "student": method(0.3, 40, trainings=3), "copy": method(0.2, 40)}
    pairs = {"student against teacher": ("student", "teacher"), "student against full copy": ("student", "copy")}
    options = {"teacher": "teacher", "resamples": 200, "distance_resamples": 20}
    rows = contrast_rows(methods, pairs, reference, objects, **options)
    assert {row["contrast"] for row in rows} == set(pairs)
    by_objects = {(row["measure"], row["objects"]) for row in rows if row["contrast"] == "student against full copy"}
    each = {(measure, n) for measure in (paired.ERRORS, paired.FIT_ERROR, paired.PSNR) for n in ("all", *"1234")}
    of_all = (paired.FD_DIFFERENCE, paired.FD_RATIO, paired.KID_DIFFERENCE, paired.FD_TO_TEACHER)
    assert by_objects == each | {(measure, "all") for measure in of_all}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert {row["n"] for row in rows if row["objects"] == "3"} == {10} and {row["seeds"] for row in rows} == {3}
    assert {(row["trainings"], row["against_trainings"]) for row in rows} == {(3, 1)}
    assert rows == contrast_rows(methods, pairs, reference, objects, **options), "from a seed"
    whole = next(row for row in rows if row["measure"] == paired.ERRORS and row["objects"] == "all")
    wrong = [(~methods[name].right).sum() + 0.5 for name in ("student", "teacher")]
    assert whole["value"] == pytest.approx(wrong[0] / wrong[1], rel=1e-4)


def test_photographs_have_distances_alone():
    methods = {name: Judged(features(1, 20)) for name in ("one", "two")}
    rows = contrast_rows(methods, {"a": ("one", "two")}, features(1, 30)[0], distance_resamples=5)
    assert [row["measure"] for row in rows] == [paired.FD_DIFFERENCE, paired.FD_RATIO, paired.KID_DIFFERENCE]


def test_a_thousand_resamples_of_5001_images_take_less_than_a_second():
    ours, theirs = RNG.random((2, 3, 1667)) < 0.1
    start = time.perf_counter()
    errors_ratio(ours, theirs, draws(np.arange(1667) % 8, 3, 1000))
    assert time.perf_counter() - start < 1


def test_where_content_counts_errors_of_style_are_compared_too():
    verdicts = SimpleNamespace(right={"content": np.array([True, True]), "all": np.array([True, False])})
    shown = SimpleNamespace(key="content", right=verdicts.right["content"], verdicts=verdicts, fit_error=np.zeros(2),
                            features=SimpleNamespace(frechet=np.eye(2)))  # fmt: skip
    one = paired.judged([shown])
    assert (~one.right).sum() == 0 and (~one.all_right).sum() == 1
    rows = contrast_rows({"one": one, "two": one}, {"a": ("one", "two")}, np.eye(2), distance_resamples=3)
    assert {row["measure"] for row in rows} >= {paired.ERRORS, paired.ERRORS_OF_ALL}
