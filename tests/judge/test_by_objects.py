"""Judgements by number of objects: which prompts are of which number, and what is counted of them."""

import json

import numpy as np
import pytest

from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.judge import by_objects
from lora_distill.judge.judge import Method, Quality
from lora_distill.judge.metrics import Proportion, mean_score
from lora_distill.judge.reader import Verdicts
from lora_distill.sampling import Sampler

PROMPTS = scene_prompts("noto", "test", 16, seed=0)
RNG = np.random.default_rng(0)


def quality(right: np.ndarray, images=None) -> Quality:
    n = len(right)
    verdicts = Verdicts({"all": right}, RNG.random(n), RNG.random(n))
    return Quality(images, {}, None, "all", verdicts)


def test_the_strata_of_test_prompts_are_as_large_as_each_other():
    masks = by_objects.strata(PROMPTS)
    assert len(masks) == 15 and masks["all", "all"].all()
    assert {int(masks[str(n), name].sum()) for n in (1, 2, 3, 4) for name in ("seen", "held out")} == {2}
    for (objects, composition), mask in masks.items():
        for scene, inside in zip(PROMPTS.scenes, mask, strict=True):
            fits = objects in ("all", str(scene.count))
            assert inside == (fits and composition in ("all", "held out" if scene.unseen else "seen"))


def test_val_has_no_held_out_prompts_and_photographs_are_all_of_one_kind():
    assert {name for _, name in by_objects.strata(scene_prompts("noto", "val", 8, 0))} == {"all", "seen"}
    photographs = Prompts(None, ["a dog", "a cat"])
    assert list(by_objects.strata(photographs)) == [("all", "all")] and by_objects.objects_of(photographs) is None


def test_errors_of_a_group_are_those_of_its_prompts_over_all_seeds(bundle):
    judged = {
        name: [quality(RNG.random(16) < 0.5, np.full((16, 2, 2, 3), grey, np.uint8)) for _ in range(2)]
        for name, grey in (("teacher", 0), ("student", 16))
    }
    methods = {"teacher": Method(Sampler(4, 3.0), bundle), "student": Method(Sampler(4), bundle, ["a", "b"])}
    rows = by_objects.error_rows(judged, methods, PROMPTS, baseline="teacher")
    assert len(rows) == 30
    (row,) = (r for r in rows if (r["method"], r["objects"], r["compositions"]) == ("student", "3", "held out"))
    mask = by_objects.strata(PROMPTS)["3", "held out"]
    wrong = np.stack([~one.right[mask] for one in judged["student"]])
    share, fit = Proportion.clustered(wrong), np.mean([one.fit_error[mask] for one in judged["student"]], axis=0)
    assert (row["errors"], row["low"], row["high"]) == (wrong.mean(), *share.interval)
    assert (row["n"], row["seeds"], row["trainings"], row["unet_passes"]) == (2, 2, 2, 4)
    score = mean_score("", fit)
    assert (row["fit_error"], row["fit_error_low"], row["fit_error_high"]) == (score.value, score.low, score.high)
    assert row["object_errors"] == pytest.approx(1 - np.mean([one.object_share[mask] for one in judged["student"]]))
    assert row["psnr_to_teacher_db"] == pytest.approx(10 * np.log10(255**2 / 16**2))
    assert {r["psnr_to_teacher_db"] for r in rows if r["method"] == "teacher"} == {None}


def test_images_of_photographs_have_no_errors_to_count(bundle):
    bare = Quality(np.zeros((1, 2, 2, 3), np.uint8), {}, None, "")
    methods = {"teacher": Method(Sampler(4), bundle)}
    assert by_objects.error_rows({"teacher": [bare]}, methods, Prompts(None, ["a dog"])) == []


class TestShareOverPromptsAndSeeds:
    def test_images_that_are_alike_within_a_prompt_count_once(self):
        flags = np.tile(np.arange(40) % 4 > 0, (3, 1))
        share = Proportion.clustered(flags)
        assert (share.value, share.count) == (0.75, 120)
        assert share.interval == pytest.approx(Proportion(0.75, 40).interval, abs=0.002)

    def test_independent_images_count_each(self):
        flags = np.random.default_rng(1).random((4, 2000)) < 0.7
        share = Proportion.clustered(flags)
        assert share.effective > 0.9 * flags.size

    def test_shares_without_any_error_have_the_interval_of_all_images(self):
        assert Proportion.clustered(np.ones((3, 20), bool)).interval == Proportion(1.0, 60).interval


class TestErrorsOfTheCaptions:
    def test_a_named_at_random_object_is_right_once_in_24(self):
        assert by_objects.predicted_right(1.0, 1) == pytest.approx(1 / 24)
        assert by_objects.predicted_right(0.1, 4) == pytest.approx((1 - 23 * 0.1 / 24) ** 4)

    def test_all_prompts_are_the_mean_over_them(self):
        found = by_objects.predictions(0.1, PROMPTS)
        assert found.keys() == {"all", "1", "2", "3", "4"}
        assert found["all"] == pytest.approx(np.mean([found[n] for n in "1234"]))
        assert by_objects.predictions(None, PROMPTS) == by_objects.predictions(0.1, Prompts(None, ["a dog"])) == {}

    def test_a_pipeline_says_it_in_the_record_of_its_training_or_not_at_all(self, tmp_path):
        assert by_objects.caption_error(str(tmp_path)) is None
        (tmp_path / "training.json").write_text(json.dumps({"seed": 0}), encoding="utf-8")
        assert by_objects.caption_error(str(tmp_path)) is None
        (tmp_path / "training.json").write_text(json.dumps({"caption_error": 0.1}), encoding="utf-8")
        assert by_objects.caption_error(str(tmp_path)) == 0.1
