"""The rule of every claim: from the numbers that a run measured to a verdict and our numbers in words.

A function is named for its claim in assets/claims.yaml and takes what that claim measures, by name; its docstring is
the rule that is printed. Verdicts are tried in the order reproduced, partly, too coarse; where none holds the claim is
not reproduced.

Spread. Quality is measured with several sampling seeds on the same prompts; sd is their standard deviation. Where a
profile trains a student several times (more_train_seeds), each sampling seed judges another training and sd holds the
spread of both; otherwise it does not hold that of training. The spread of a difference is twice the root of the summed
squares of both sd. Where it is so large that the opposite cannot be excluded either, that B is lower by a fiftieth of
its distance or by a point, that the loss is within its margin, the measurement is too coarse. One seed has no spread:
nothing is told from it. Nor is a loss where there is no margin, as where guidance gains nothing: on photographs it
often worsens the distance. Some students were trained several times and what they are compared with once: then one of
the two sd lacks the spread of training (`trainings` in the tables). Of seconds, the slowest and fastest of several runs
stand for the spread. The account of memory has none: it is counted, not sampled.
"""

from collections.abc import Callable

REPRODUCED, PARTLY, NOT_REPRODUCED, TOO_COARSE = "reproduced", "partly", "not reproduced", "too coarse to tell"
ONE_SEED = "one seed has no spread, cannot tell"
NO_MARGIN = "no positive margin, cannot tell"
UNTOLD = (TOO_COARSE, ONE_SEED, NO_MARGIN)
Ruling = tuple[str, str]  # one of the verdicts or of UNTOLD, and our numbers in words
SLIDES_SPEED_UP = 2.07 / 0.86


def inference_time_40_percent(
    saving_25: float, saving_50: float, unet_saving: float, student_slowest: float, teacher_fastest: float
) -> Ruling:
    """Reproduced: the medians save 40 % at 25 and at 50 steps. Partly: they save 20 %."""
    surely, least = 100 * (1 - student_slowest / teacher_fastest), min(saving_25, saving_50)
    here = (
        f"{_n(saving_25)} % less at 25 steps, {_n(saving_50)} % at 50 (medians), {_n(surely)} % for the slowest run "
        f"against the teacher's fastest; {_n(unet_saving)} % without text encoder and decoder"
    )
    return _verdict(least >= 40, partly=least >= 20), here


def memory_half_training(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Reproduced: at least 50 % less at batch 1, measured, and at 16, on paper. Partly: at one of them."""
    saved = 100 * (1 - after / before)
    here = (
        f"{_n(saved)} % less at batch 1, measured ({_n(before)} → {_n(after)} GB; {_n(paper_1)} % on paper), "
        f"{_n(paper_16)} % at 16 on paper"
    )
    return _half(saved, paper_16), here


def memory_half_inference(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Reproduced: at least 50 % less for one image, measured, and for 16, on paper. Partly: for one of the two."""
    return memory_half_training(before, after, paper_1, paper_16)


def memory_half_before_distillation(before: float, after: float, paper_1: float, paper_16: float) -> Ruling:
    """Reproduced: at least 50 % less at batch 1, measured, and at 16, on paper. Partly: at one of them."""
    return memory_half_training(before, after, paper_1, paper_16)


def memory_half_sharing(before: float, after: float, paper_1: float, paper_16: float, most: float) -> Ruling:
    """Reproduced: at least 50 % less at batch 1, measured, and at 16, on paper. Partly: at one of them."""
    verdict, here = memory_half_training(before, after, paper_1, paper_16)
    return verdict, f"{here}; at most {_n(most)} % in any precision"


def conventional_raises_memory(full_1: float, full_16: float, distillation_1: float, distillation_16: float) -> Ruling:
    """Reproduced: more by over 1 % at batch 1 and 16. Partly: at one of them."""
    rise_1, rise_16 = 100 * (distillation_1 / full_1 - 1), 100 * (distillation_16 / full_16 - 1)
    here = (
        f"{_n(full_1)} → {_n(distillation_1)} GB at batch 1 (+{_n(rise_1)} %), "
        f"{_n(full_16)} → {_n(distillation_16)} GB at batch 16 (+{_n(rise_16)} %)"
    )
    return _verdict(rise_1 > 1 and rise_16 > 1, partly=rise_1 > 1 or rise_16 > 1), here


def quality_kept(
    teacher: float, teacher_sd: float, student: float, student_sd: float, unguided: float, seeds: float
) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = student - teacher, _spread(teacher_sd, student_sd), 0.1 * (unguided - teacher)
    here = f"FD-EfficientNet-Lite0 {_n(teacher)} → {_n(student)}: {_lost(lost, spread, margin)}"
    return _kept(lost, spread, margin, seeds), here


def alignment_kept(
    teacher: float, teacher_sd: float, student: float, student_sd: float, unguided: float, seeds: float
) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = teacher - student, _spread(teacher_sd, student_sd), 0.1 * (teacher - unguided)
    here = f"all correct {_n(teacher)} → {_n(student)} %: {_lost(lost, spread, margin, 'points ')}"
    return _kept(lost, spread, margin, seeds), here


def finetune_fid_below_base(
    base: float, base_sd: float, rank_4: float, rank_4_sd: float, rank_16: float, rank_16_sd: float, seeds: float
) -> Ruling:
    """Reproduced: both gain more than the spread. Partly: one does. Too coarse: one may gain 2 % of the base's."""
    gain_4, spread_4 = base - rank_4, _spread(base_sd, rank_4_sd)
    gain_16, spread_16 = base - rank_16, _spread(base_sd, rank_16_sd)
    here = (
        f"FD-EfficientNet-Lite0 of the base {_n(base)}: rank 4 {_n(rank_4)}, {_n(gain_4)} ± {_n(spread_4)} gained; "
        f"rank 16 {_n(rank_16)}, {_n(gain_16)} ± {_n(spread_16)} gained"
    )
    return _both_exceed(gain_4, spread_4, gain_16, spread_16, least=0.02 * base, seeds=seeds), here


def lcm_lora_fid_above_base(
    base: float, base_sd: float, lcm_8k: float, lcm_8k_sd: float, lcm_30k: float, lcm_30k_sd: float, seeds: float
) -> Ruling:
    """Reproduced: both exceed the base by more than the spread. Partly: one does. Too coarse: one may by 2 %."""
    above_8k, spread_8k = lcm_8k - base, _spread(base_sd, lcm_8k_sd)
    above_30k, spread_30k = lcm_30k - base, _spread(base_sd, lcm_30k_sd)
    here = (
        f"FD-EfficientNet-Lite0 of the base {_n(base)}: LCM-LoRA 8k {_n(lcm_8k)}, {_n(above_8k)} ± {_n(spread_8k)} "
        f"above it; 30k {_n(lcm_30k)}, {_n(above_30k)} ± {_n(spread_30k)} above it"
    )
    return _both_exceed(above_8k, spread_8k, above_30k, spread_30k, least=0.02 * base, seeds=seeds), here


def larger_data_better(lcm_8k: float, lcm_8k_sd: float, lcm_30k: float, lcm_30k_sd: float, seeds: float) -> Ruling:
    """Reproduced: the gain exceeds its spread. Too coarse: the gain may be 2 % of the distance."""
    gain, spread = lcm_8k - lcm_30k, _spread(lcm_8k_sd, lcm_30k_sd)
    here = f"FD-EfficientNet-Lite0 {_n(lcm_8k)} (8k) → {_n(lcm_30k)} (30k): {_n(gain)} ± {_n(spread)} gained"
    return _gained(gain, spread, 0.02 * lcm_8k, seeds), here


def lcm_lora_2_4_times_faster(times: float, base_fastest: float, lcm_slowest: float) -> Ruling:
    """Reproduced: its slowest run is 2.07 / 0.86 times as fast as the base's fastest. Partly: it is faster at all."""
    surely = base_fastest / lcm_slowest
    here = f"{_n(times)} times faster (medians), {_n(surely)} times by its slowest run against the base's fastest"
    return _verdict(surely >= SLIDES_SPEED_UP, partly=surely > 1), here


def larger_data_faster(small: float, small_fastest: float, large: float, large_slowest: float) -> Ruling:
    """Reproduced: the slowest run of 30k is faster than the fastest of 8k."""
    change = 100 * (large / small - 1)
    here = f"{_n(1000 * small)} ms an image (8k), {_n(1000 * large)} ms (30k): {_n(change)} %"
    return _verdict(large_slowest < small_fastest), here


def memory_training_on_gpu(conventional_1: float, conventional_16: float, shared_1: float, shared_16: float) -> Ruling:
    """Reproduced: at least 50 % less at batch 1 and 16. Partly: at one of them."""
    batch_1, batch_16 = 100 * (1 - shared_1 / conventional_1), 100 * (1 - shared_16 / conventional_16)
    return _half(batch_1, batch_16), f"{_n(batch_1)} % less at batch 1, {_n(batch_16)} % at batch 16"


def memory_inference_on_gpu(guided_1: float, guided_16: float, one_pass_1: float, one_pass_16: float) -> Ruling:
    """Reproduced: at least 50 % less for one image and for sixteen. Partly: for one of the two."""
    return memory_training_on_gpu(guided_1, guided_16, one_pass_1, one_pass_16)


def inference_time_on_gpu(saving_1: float, saving_16: float) -> Ruling:
    """Reproduced: at least 40 % less at batch 1 and 16. Partly: at one of them."""
    here = f"{_n(saving_1)} % less at batch 1, {_n(saving_16)} % at batch 16 (medians)"
    return _verdict(min(saving_1, saving_16) >= 40, partly=max(saving_1, saving_16) >= 40), here


def inference_time_as_deployed(
    threads: list[float],
    saving_percent: list[float],
    student_slowest: list[float],
    teacher_fastest: list[float],
    in_pytorch_percent: list[float],
) -> Ruling:
    """Reproduced: the median saves 40 % at every number of threads. Partly: it saves 20 %."""
    least = min(saving_percent)
    surely = [100 * (1 - s / t) for s, t in zip(student_slowest, teacher_fastest, strict=True)]
    count = f"{_each(threads)} thread{'s' if max(threads) > 1 else ''}"
    here = (
        f"{_each(saving_percent)} % less on {count} (medians), {_each(surely)} % for the slowest run against the "
        f"teacher's fastest; {_each(in_pytorch_percent)} % in PyTorch"
    )
    return _verdict(least >= 40, partly=least >= 20), here


def memory_account_is_true(
    simulated_least: float, simulated_most: float, measured_least: float, measured_most: float
) -> Ruling:
    """Reproduced: within 5 % of simulation and measurement. Partly: of the simulation."""
    simulated = simulated_least >= 0.95 and simulated_most <= 1.05
    measured = measured_least >= 0.95 and measured_most <= 1.05
    here = (
        f"account / simulation {_n(simulated_least)} to {_n(simulated_most)} on SD 1.5, "
        f"account / measurement {_n(measured_least)} to {_n(measured_most)}"
    )
    return _verdict(simulated and measured, partly=simulated), here


def distance_against_standard_distillation(
    copied: float, copied_sd: float, student: float, student_sd: float, teacher: float, unguided: float, seeds: float
) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = student - copied, _spread(copied_sd, student_sd), 0.1 * (unguided - teacher)
    values = f"{_n(copied)} (full copy), {_n(student)} (LoRA)"
    return _kept(lost, spread, margin, seeds), f"FD-EfficientNet-Lite0 {values}: {_lost(lost, spread, margin)}"


def inception_score_kept(teacher: float, teacher_sd: float, student: float, student_sd: float, seeds: float) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = teacher - student, _spread(teacher_sd, student_sd), 0.05 * teacher
    return _kept(lost, spread, margin, seeds), f"{_n(teacher)} → {_n(student)}: {_lost(lost, spread, margin)}"


def alignment_against_standard_distillation(
    copied: float, copied_sd: float, student: float, student_sd: float, teacher: float, unguided: float, seeds: float
) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = copied - student, _spread(copied_sd, student_sd), 0.1 * (teacher - unguided)
    here = f"{_n(copied)} % (full copy), {_n(student)} % (LoRA): {_lost(lost, spread, margin, 'points ')}"
    return _kept(lost, spread, margin, seeds), here


def time_over_batch_and_resolution(least: float, middle: float, most: float) -> Ruling:
    """Reproduced: 40 % less at every batch and resolution. Partly: at some."""
    here = f"{_n(least)} to {_n(most)} % less, median {_n(middle)} %"
    return _verdict(least >= 40, partly=most >= 40), here


def time_against_standard_distillation(
    copied: float, copied_slowest: float, student: float, student_fastest: float
) -> Ruling:
    """Reproduced: at most 5 % slower, with ranges that overlap. Partly: at most 20 % slower."""
    change = 100 * (student / copied - 1)
    here = f"{_n(1000 * copied)} ms an image (full copy), {_n(1000 * student)} ms (LoRA, merged): {_n(change)} %"
    return _verdict(change <= 5 and student_fastest <= copied_slowest, partly=change <= 20), here


def lcm_lora_time_over_batch_and_resolution(least_saved: float, most_saved: float) -> Ruling:
    """Reproduced: 2.07 / 0.86 times faster at every batch and resolution. Partly: at some."""
    least, most = 100 / (100 - least_saved), 100 / (100 - most_saved)
    verdict = _verdict(least >= SLIDES_SPEED_UP, partly=most >= SLIDES_SPEED_UP)
    return verdict, f"{_n(least)} to {_n(most)} times faster"


def lcm_lora_alignment(
    base: float, base_sd: float, lcm: float, lcm_sd: float, untrained: float, seeds: float
) -> Ruling:
    """Reproduced: the loss with its spread is within the margin. Too coarse: the loss less its spread is."""
    lost, spread, margin = base - lcm, _spread(base_sd, lcm_sd), 0.1 * (base - untrained)
    here = f"content correct {_n(base)} → {_n(lcm)} %: {_lost(lost, spread, margin, 'points ')}"
    return _kept(lost, spread, margin, seeds), here


def lcm_lora_against_untrained(
    untrained: float, untrained_sd: float, lcm: float, lcm_sd: float, seeds: float
) -> Ruling:
    """Reproduced: the gain exceeds its spread. Too coarse: the gain may be a point."""
    gain, spread = lcm - untrained, _spread(lcm_sd, untrained_sd)
    here = f"content correct {_n(untrained)} → {_n(lcm)} %: {_n(gain)} ± {_n(spread)} points gained"
    return _gained(gain, spread, 1, seeds), here


RULES: dict[str, Callable[..., Ruling]] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        inference_time_40_percent,
        memory_half_training,
        memory_half_inference,
        memory_half_before_distillation,
        memory_half_sharing,
        conventional_raises_memory,
        quality_kept,
        alignment_kept,
        finetune_fid_below_base,
        lcm_lora_fid_above_base,
        larger_data_better,
        lcm_lora_2_4_times_faster,
        larger_data_faster,
        memory_training_on_gpu,
        memory_inference_on_gpu,
        inference_time_on_gpu,
        inference_time_as_deployed,
        memory_account_is_true,
        distance_against_standard_distillation,
        inception_score_kept,
        alignment_against_standard_distillation,
        time_over_batch_and_resolution,
        time_against_standard_distillation,
        lcm_lora_time_over_batch_and_resolution,
        lcm_lora_alignment,
        lcm_lora_against_untrained,
    )
}


def _verdict(reproduced: bool, *, partly: bool = False, too_coarse: bool = False) -> str:
    if reproduced:
        return REPRODUCED
    if partly:
        return PARTLY
    return TOO_COARSE if too_coarse else NOT_REPRODUCED


def _half(batch_1: float, batch_16: float) -> str:
    return _verdict(batch_1 >= 50 and batch_16 >= 50, partly=batch_1 >= 50 or batch_16 >= 50)


def _kept(lost: float, spread: float, margin: float, seeds: float) -> str:
    if seeds < 2 or not margin > 0:
        return ONE_SEED if seeds < 2 else NO_MARGIN
    return _verdict(lost + spread <= margin, too_coarse=lost - spread <= margin)


def _gained(gain: float, spread: float, least: float, seeds: float) -> str:
    """Whether a difference exceeds its spread; too coarse where it may be more than `least`."""
    if seeds < 2:
        return ONE_SEED
    return _verdict(gain > spread, too_coarse=gain + spread > least)


def _both_exceed(a: float, spread_a: float, b: float, spread_b: float, least: float, seeds: float) -> str:
    """Whether two differences exceed their spreads; too coarse where one that does not may be as much as `least`."""
    if seeds < 2:
        return ONE_SEED
    exceed, possible = (a > spread_a, b > spread_b), (a + spread_a > least, b + spread_b > least)
    return _verdict(all(exceed), partly=any(exceed), too_coarse=any(possible))


def _spread(sd: float, other_sd: float) -> float:
    return 2 * (sd**2 + other_sd**2) ** 0.5


def _lost(lost: float, spread: float, margin: float, unit: str = "") -> str:
    return f"{_n(lost)} ± {_n(spread)} {unit}lost, margin {_n(margin)}"


def _n(value: float) -> str:
    """A number to two decimals, without zeros at its end."""
    return f"{round(value, 2):g}"


def _each(values: list[float]) -> str:
    return " and ".join(map(_n, values))
