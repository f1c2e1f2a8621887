"""The judge: the same prompts and noise for every sampler, and what a training asks of it."""

from lora_distill.data.teacher import scene_prompts
from lora_distill.judge.judge import Judge, drawn
from lora_distill.sampling import Sampler


def test_the_first_images_of_a_judge_are_those_of_all(bundle):
    judge = Judge(bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1))
    first, everything = judge.images(Sampler(2), seed=0, count=2), judge.images(Sampler(2), seed=0)
    assert first.shape[0] == 2 and everything.shape[0] == 4
    assert abs(first.astype(int) - everything[:2]).max() <= 1, "a grey level, where rounding falls to the other side"
    assert (judge.images(Sampler(2), seed=0, count=9) == everything).all()


def test_milestones_are_the_judgement_of_the_student_on_seed_0(bundle):
    judge = Judge(bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1))
    every, measure, key = judge.milestones(Sampler(2), every=50)
    assert key == judge.milestones(Sampler(2), every=50)[2] != judge.milestones(Sampler(3), every=50)[2]
    quality = judge(Sampler(2), seed=0)
    assert every == 50 and measure(100, bundle) == {
        "all_correct": quality.all_correct.value,
        "fd_efficientnet_lite0": quality.frechet_distance,
    }
