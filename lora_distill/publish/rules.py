"""The rule of every claim: from the numbers that a run measured to a verdict and our numbers in words.

A function is named for its claim in assets/claims.yaml and takes what that claim measures, by name; its docstring is
the rule that is printed.

A work's claim is *reproduced* where its number is: ours, with its whole interval, lies within a quarter of it on either
side. It is *direction only* where ours goes the same way, or where the work gives no number. A check of ours *holds* or
*fails*. Where the interval has room for both answers, none is given.

Intervals are those of `judge.paired`: 95 %, by paired bootstrap over prompts, seeds and trainings, or over the turns of
a timing. The account of memory has none: it is counted, not sampled. A difference counts when its interval excludes
"none" and it is as large as what matters. Two methods are equal when the interval lies within a margin. What matters
and the margins were chosen before the world of one to four objects was judged:

* 1.25 times the errors. Where a teacher draws 8 of 100 pictures wrong, a student may draw 10: about as much as two
  seeds of a hundred pictures differ by, and far less than the step from guidance to none.
* 1.05 times a Frechet distance for a difference, 1.1 times for equality: half of the least and the least step that a
  reader of tables of FID calls better.
* 1 dB of PSNR, 5 % of the seconds, 1 % of the memory (as far as the account is from its simulation).
"""

from collections.abc import Callable
from statistics import mean
from typing import NamedTuple

REPRODUCED, DIRECTION, NOT_REPRODUCED = "reproduced", "direction only", "not reproduced"
HOLDS, FAILS = "holds", "fails"
UNTOLD = "the interval holds both answers"
BLIND = "the distance does not surely tell the base without guidance from the teacher"  # so it can tell nothing equal
NEAR = 0.25  # of a work's number: how far ours may be from it
ERRORS, DISTANCE, FARTHER, PSNR, SECONDS, MEMORY = 1.25, 1.1, 1.05, 1.0, 1.05, 1.0
SLIDES_SPEED_UP, BASE = 2.07 / 0.86, "the base's"
Ruling = tuple[str, str]  # a verdict or UNTOLD, and our numbers in words


class Interval(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


# ---------------------------------------------------------------------------------------------- the paper


def inference_time_40_percent(
    student_25: Interval, teacher_25: Interval, student_50: Interval, teacher_50: Interval, unet_saving: float
) -> Ruling:
    """Reproduced: 30 to 50 % less at 25 and at 50 steps, whichever repeats are compared. Direction only: less."""
    savings = [_saved_range(student_25, teacher_25), _saved_range(student_50, teacher_50)]
    here = f"{_in(savings[0])} % less at 25 steps, {_in(savings[1])} % at 50, between any two repeats"
    return _numbered(savings, 40, least=5), f"{here}; {_n(unet_saving)} % without text encoder and decoder"


def memory_half_training(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Reproduced: 37.5 to 62.5 % less at batch 1, measured, and at 16, on paper. Direction only: less at both."""
    saved, here = _memory(before, after, paper_1, paper_16)
    return _numbered([_exactly(saved), _exactly(paper_16)], 50, least=MEMORY), here


def memory_half_before_distillation(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Reproduced: 37.5 to 62.5 % less at batch 1, measured, and at 16, on paper. Direction only: less at both."""
    return memory_half_training(before, after, paper_1, paper_16)


def conventional_raises_memory(full_1: float, full_16: float, distillation_1: float, distillation_16: float) -> Ruling:
    """Direction only: more by over 1 % at batch 1 and 16."""
    rise_1, rise_16 = 100 * (distillation_1 / full_1 - 1), 100 * (distillation_16 / full_16 - 1)
    here = (
        f"{_n(full_1)} → {_n(distillation_1)} GB at batch 1 (+{_n(rise_1)} %), "
        f"{_n(full_16)} → {_n(distillation_16)} GB at batch 16 (+{_n(rise_16)} %)"
    )
    return _work(rise_1 > MEMORY and rise_16 > MEMORY), here


def quality_kept(fd_ratio: Interval, kid: Interval, unguided: Interval) -> Ruling:
    """Direction only: the Frechet distance is at most 1.1 times the teacher's, with its interval, and that of the base
    without guidance is more.
    """
    return _as_near("the teacher's", fd_ratio, kid, unguided, _work)


def alignment_kept(errors: Interval) -> Ruling:
    """Direction only: at most 1.25 times the teacher's errors, with the interval."""
    return _work(_at_most(errors, ERRORS)), f"{_in(errors)} times the teacher's errors, margin {_n(ERRORS)}"


# ---------------------------------------------------------------------------------------------- the slides


def finetune_fid_below_base(fd_ratio: Interval, kid: Interval, narrow: Interval) -> Ruling:
    """Direction only: the wide fine-tune's Frechet distance is lower than the base's, by 5 % or more."""
    here = f"all layers: {_distance(BASE, fd_ratio, kid)}; attention alone: {_in(narrow)} times"
    return _work(_is_more(_inverse(fd_ratio), FARTHER)), here


def lcm_lora_fid_above_base(lcm_8k: Interval, kid_8k: Interval, lcm_30k: Interval, kid_30k: Interval) -> Ruling:
    """Direction only: the Frechet distances of both, 8k and 30k, are higher than the base's, by 5 % or more."""
    here = f"8k: {_distance(BASE, lcm_8k, kid_8k)}; 30k: {_distance(BASE, lcm_30k, kid_30k)}"
    return _work(_all(_is_more(lcm_8k, FARTHER), _is_more(lcm_30k, FARTHER))), here


def larger_data_better(fd_ratio: Interval, kid: Interval) -> Ruling:
    """Direction only: the Frechet distance after many pictures is lower than after few, by 5 % or more."""
    return _work(_is_more(_inverse(fd_ratio), FARTHER)), _distance("that after few pictures", fd_ratio, kid)


def lcm_lora_2_4_times_faster(ratio: Interval, lcm: float, base: float, base_unet: float, base_steps: float) -> Ruling:
    """Reproduced: 1.8 to 3 times as fast, with the interval, one image a call. Direction only: faster."""
    faster = _inverse(ratio)
    steps = (SLIDES_SPEED_UP * lcm - (base - base_unet)) / (base_unet / base_steps)
    here = f"{_in(faster)} times faster than {_n(base_steps)} guided steps; 2.4 times would be {steps:.0f} guided steps"
    verdict = _numbered([faster], SLIDES_SPEED_UP, none=1, least=SECONDS)
    return verdict, here


def larger_data_faster(ratio: Interval) -> Ruling:
    """Direction only: the seconds after 30k are fewer than after 8k, by 5 % or more."""
    return _work(_is_more(_inverse(ratio), SECONDS)), f"30k takes {_in(ratio)} times the seconds of 8k"


# ---------------------------------------------------------------------------------------------- checks: memory, seconds


def memory_half_inference(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Holds: at least 50 % less for one image, measured, and for 16, on paper."""
    saved, here = _memory(before, after, paper_1, paper_16)
    return _check(min(saved, paper_16) >= 50), here


def memory_half_sharing(before: float, after: float, paper_1: float, paper_16: float, most: float) -> Ruling:
    """Holds: at least 50 % less at batch 1, measured, and at 16, on paper."""
    verdict, here = memory_half_inference(before, after, paper_1, paper_16)
    return verdict, f"{here}; at most {_n(most)} % in any precision"


def memory_training_on_gpu(conventional_1: float, conventional_16: float, shared_1: float, shared_16: float) -> Ruling:
    """Holds: at least 50 % less at batch 1 and 16."""
    batch_1, batch_16 = 100 * (1 - shared_1 / conventional_1), 100 * (1 - shared_16 / conventional_16)
    here = f"{_n(batch_1)} % less at batch 1, {_n(batch_16)} % at batch 16"
    return _check(min(batch_1, batch_16) >= 50), here


def memory_inference_on_gpu(guided_1: float, guided_16: float, one_pass_1: float, one_pass_16: float) -> Ruling:
    """Holds: at least 50 % less for one image and for sixteen."""
    return memory_training_on_gpu(guided_1, guided_16, one_pass_1, one_pass_16)


def memory_account_is_true(
    simulated_least: float, simulated_most: float, measured_least: float, measured_most: float
) -> Ruling:
    """Holds: within 5 % of simulation and measurement."""
    least, most = min(simulated_least, measured_least), max(simulated_most, measured_most)
    here = (
        f"account / simulation {_n(simulated_least)} to {_n(simulated_most)} on SD 1.5, "
        f"account / measurement {_n(measured_least)} to {_n(measured_most)}"
    )
    return _check(least >= 0.95 and most <= 1.05), here


def inference_time_on_gpu(
    student_1: Interval, teacher_1: Interval, student_16: Interval, teacher_16: Interval
) -> Ruling:
    """Holds: at least 40 % less at batch 1 and 16, whichever repeats are compared."""
    savings = [_saved_range(student_1, teacher_1), _saved_range(student_16, teacher_16)]
    here = f"{_in(savings[0])} % less at batch 1, {_in(savings[1])} % at batch 16, between any two repeats"
    return _check(_all(*(_at_least(saving, 40) for saving in savings))), here


def inference_time_as_deployed(threads: list[float], deployed: list[Interval], in_pytorch: list[Interval]) -> Ruling:
    """Holds: one image takes at least 40 % less, with the interval, as deployed and at every number of threads."""
    savings, beside = ([_saved(ratio) for ratio in ratios] for ratios in (deployed, in_pytorch))
    count = f"{_each(threads)} thread{'s' if max(threads) > 1 else ''}"
    here = f"{_all_in(savings)} % less on {count}, one image; {_all_in(beside)} % in PyTorch"
    return _check(_all(*(_at_least(saving, 40) for saving in savings))), here


def time_over_batch_and_resolution(savings: list[Interval]) -> Ruling:
    """Holds: at least 40 % less, with the interval, at every batch and resolution."""
    least, most = min(each.value for each in savings), max(each.value for each in savings)
    enough = sum(each.low >= 40 for each in savings)
    here = f"{_n(least)} to {_n(most)} % less, surely 40 % in {enough} of {len(savings)} cells"
    return _check(_all(*(_at_least(each, 40) for each in savings))), here


def time_against_standard_distillation(ratios: list[Interval]) -> Ruling:
    """Holds: one image takes as long as the full copy's within 5 %, with the interval, at every number of threads."""
    here = f"{_all_in(ratios)} times the full copy's, margin {_n(SECONDS)}"
    return _check(_all(*(_is_same(each, SECONDS) for each in ratios))), here


# ---------------------------------------------------------------------------------------------- checks: quality


def alignment_kept_at_four_objects(errors: Interval) -> Ruling:
    """Holds: at most 1.25 times the teacher's errors, with the interval."""
    return _check(_at_most(errors, ERRORS)), f"{_in(errors)} times the teacher's errors, margin {_n(ERRORS)}"


def distance_against_standard_distillation(fd_ratio: Interval, kid: Interval, unguided: Interval) -> Ruling:
    """Holds: the Frechet distance is at most 1.1 times the full copy's, with the interval, and that of the base without
    guidance more than 1.1 times the teacher's.
    """
    return _as_near("the full copy's", fd_ratio, kid, unguided, _check)


def alignment_against_standard_distillation(errors: Interval) -> Ruling:
    """Holds: at most 1.25 times the full copy's errors, with the interval."""
    return _check(_at_most(errors, ERRORS)), f"{_in(errors)} times the full copy's errors, margin {_n(ERRORS)}"


def pictures_against_standard_distillation(psnr: Interval) -> Ruling:
    """Holds: the PSNR to the teacher's pictures is at most 1 dB below the full copy's, with the interval."""
    here = f"PSNR to the teacher's pictures {_in(psnr, '+')} dB against the full copy's, margin {_n(PSNR)} dB"
    return _check(_at_least(psnr, -PSNR)), here


def features_against_standard_distillation(fd_to_teacher: Interval, copied: float) -> Ruling:
    """Holds: the Frechet distance to the teacher's pictures is at most 1.1 times the full copy's, with the interval."""
    ratio = Interval(*(1 + each / copied for each in fd_to_teacher))
    here = f"FD to the teacher's pictures {_in(ratio)} times the full copy's ({_n(copied)}), margin {_n(DISTANCE)}"
    return _check(_at_most(ratio, DISTANCE)), here


def loss_against_standard_distillation(student: list[float], copied: list[float]) -> Ruling:
    """Holds: over the second half of the training the loss is at most 1.1 times the full copy's."""
    ours, theirs = (mean(losses[len(losses) // 2 :]) for losses in (student, copied))
    return _check(ours <= DISTANCE * theirs), f"loss {ours:.3g} (LoRA), {theirs:.3g} (full copy)"


def student_against_few_guided_steps(errors: Interval) -> Ruling:
    """Holds: the base with 4 guided steps makes at least 1.25 times the student's errors."""
    return _check(_is_more(_inverse(errors), ERRORS)), f"{_in(errors)} times the errors of 4 guided steps"


def student_against_as_many_passes(errors: Interval) -> Ruling:
    """Holds: the base with 4 guided steps makes at least 1.25 times the student's errors."""
    return student_against_few_guided_steps(errors)


def lcm_lora_alignment(errors: Interval) -> Ruling:
    """Holds: at most 1.25 times the guided base's errors, with the interval."""
    return _check(_at_most(errors, ERRORS)), f"{_in(errors)} times the guided base's errors, margin {_n(ERRORS)}"


def lcm_lora_against_untrained(errors: Interval) -> Ruling:
    """Holds: the untrained base makes at least 1.25 times the errors."""
    return _check(_is_more(_inverse(errors), ERRORS)), f"{_in(errors)} times the untrained base's errors"


def lcm_lora_against_few_guided_steps(errors: Interval) -> Ruling:
    """Holds: at most 1.25 times the errors of 4 guided steps, with the interval."""
    return _check(_at_most(errors, ERRORS)), f"{_in(errors)} times the errors of 4 guided steps, margin {_n(ERRORS)}"


def style_and_speed(errors: Interval, fine_tuned: float) -> Ruling:
    """Holds: at least 0.8 times as many pictures right, in content and style, as of the fine-tune, with the interval.

    Errors are most of both, so their ratio could hardly say no.
    """
    if not fine_tuned:
        return UNTOLD, "no picture of the fine-tune is right"
    wrong = 1 - fine_tuned
    right = Interval(*((1 - each * wrong) / fine_tuned for each in (errors.value, errors.high, errors.low)))
    here = f"{_in(right)} times as many right as the fine-tune's {_n(100 * fine_tuned)} %, margin {_n(1 / ERRORS)}"
    return _check(_at_least(right, 1 / ERRORS)), here


RULES: dict[str, Callable[..., Ruling]] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        inference_time_40_percent,
        memory_half_training,
        memory_half_before_distillation,
        conventional_raises_memory,
        quality_kept,
        alignment_kept,
        finetune_fid_below_base,
        lcm_lora_fid_above_base,
        larger_data_better,
        lcm_lora_2_4_times_faster,
        larger_data_faster,
        memory_half_inference,
        memory_half_sharing,
        memory_training_on_gpu,
        memory_inference_on_gpu,
        memory_account_is_true,
        inference_time_on_gpu,
        inference_time_as_deployed,
        time_over_batch_and_resolution,
        time_against_standard_distillation,
        alignment_kept_at_four_objects,
        distance_against_standard_distillation,
        alignment_against_standard_distillation,
        pictures_against_standard_distillation,
        features_against_standard_distillation,
        loss_against_standard_distillation,
        student_against_few_guided_steps,
        student_against_as_many_passes,
        lcm_lora_alignment,
        lcm_lora_against_untrained,
        lcm_lora_against_few_guided_steps,
        style_and_speed,
    )
}


# ---------------------------------------------------------------------------------------------- answers


def _at_most(number: Interval, margin: float) -> bool | None:
    """Whether the whole interval is at most a margin; None where it holds both answers, here and below."""
    return True if number.high <= margin else False if number.low > margin else None


def _at_least(number: Interval, margin: float) -> bool | None:
    return True if number.low >= margin else False if number.high < margin else None


def _is_same(ratio: Interval, margin: float) -> bool | None:
    """Whether a ratio lies within a margin on either side of 1."""
    return _all(_at_most(ratio, margin), _at_least(ratio, 1 / margin))


def _is_more(number: Interval, least: float, none: float = 1) -> bool | None:
    """Whether a number exceeds `none` with its interval, and by as much as matters; False where it surely does not."""
    if number.low > none and number.value >= least:
        return True
    return False if number.high < least else None


def _all(*answers: bool | None) -> bool | None:
    return False if False in answers else None if None in answers else True


def _work(answer: bool | None) -> str:
    """Of a claim without a number."""
    return UNTOLD if answer is None else DIRECTION if answer else NOT_REPRODUCED


def _check(answer: bool | None) -> str:
    return UNTOLD if answer is None else HOLDS if answer else FAILS


def _numbered(found: list[Interval], stated: float, least: float, none: float = 0) -> str:
    """Of a claim with a number that each of `found` is compared with."""
    near = [each.low >= (1 - NEAR) * stated and each.high <= (1 + NEAR) * stated for each in found]
    return REPRODUCED if all(near) else _work(_all(*(_is_more(each, least, none) for each in found)))


# ---------------------------------------------------------------------------------------------- numbers


def _exactly(value: float) -> Interval:
    return Interval(value, value, value)


def _inverse(ratio: Interval) -> Interval:
    return Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)


def _saved(ratio: Interval) -> Interval:
    """What is saved, per cent, of a ratio of seconds."""
    return Interval(*(100 * (1 - each) for each in (ratio.value, ratio.high, ratio.low)))


def _saved_range(student: Interval, teacher: Interval) -> Interval:
    """What is saved, per cent, of seconds with their ranges: least and most between any two repeats."""
    ratios = student.value / teacher.value, student.low / teacher.high, student.high / teacher.low
    return _saved(Interval(*ratios))


def _memory(before: float, after: float, paper_1: float, paper_16: float) -> tuple[float, str]:
    """Per cent saved at batch 1, and what is known in words."""
    saved = 100 * (1 - after / before)
    here = (
        f"{_n(saved)} % less at batch 1, measured ({_n(before)} → {_n(after)} GB; {_n(paper_1)} % on paper), "
        f"{_n(paper_16)} % at 16 on paper"
    )
    return saved, here


def _distance(other: str, fd_ratio: Interval, kid: Interval) -> str:
    """A ratio of Frechet distances in words, and whether the kernel distance on the same layer says the same."""
    return f"FD {_in(fd_ratio)} times {other}; {_kid(fd_ratio, kid)}"


def _as_near(
    other: str, fd_ratio: Interval, kid: Interval, unguided: Interval, verdict: Callable[[bool | None], str]
) -> Ruling:
    """Whether a Frechet distance is at most another's, where the measure sees as much as what guidance does."""
    near, sees = _at_most(fd_ratio, DISTANCE), _at_most(unguided, DISTANCE) is False
    margin = f"margin {_n(DISTANCE)}, without guidance {_in(unguided)} times the teacher's"
    here = f"{_distance(other, fd_ratio, kid)}; {margin}"
    return BLIND if near and not sees else verdict(near), here


def _kid(fd_ratio: Interval, kid: Interval) -> str:
    fd_side, kid_side = _side(fd_ratio, 1), _side(kid, 0)
    if not kid_side:
        return "KID sees no difference"
    said = "KID is higher" if kid_side > 0 else "KID is lower"
    return said if fd_side == kid_side else f"{said}, FD does not say so" if not fd_side else f"{said}, against FD"


def _side(number: Interval, none: float) -> int:
    """1 where a number surely lies above `none`, -1 where below, else 0."""
    return (number.low > none) - (number.high < none)


def _n(value: float) -> str:
    """A number to two decimals, without zeros at its end."""
    return f"{round(value, 2):g}"


def _in(number: Interval, sign: str = "") -> str:
    """A number with its interval, to three digits."""
    value, low, high = (f"{each:{sign}.3g}" for each in number)
    return f"{value} ({low} to {high})"


def _all_in(numbers: list[Interval]) -> str:
    return " and ".join(map(_in, numbers))


def _each(values: list[float]) -> str:
    return " and ".join(map(_n, values))
