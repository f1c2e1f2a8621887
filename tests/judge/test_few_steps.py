"""The tables of notebook 03 and its sentences: what they say follows from the judgements and the rows given."""

import numpy as np
import pytest

from lora_distill.data import scenes
from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.judge import few_steps_words as words
from lora_distill.judge.few_steps import (
    composition_labels,
    contrasts,
    mixture_rows,
    passes_rows,
    style_rows,
)
from lora_distill.judge.judge import FD, Method, Quality, drawn
from lora_distill.judge.metrics import FrechetDistance, Score, aligner
from lora_distill.pipeline import load_pipeline
from lora_distill.sampling import Sampler

PROMPTS = scene_prompts("fluent", "test", 8, seed=0)
ASKED = np.stack([scenes.draw(scene) for scene in PROMPTS.scenes])
WRONG_AT_FOUR = np.where(np.array([scene.count == 4 for scene in PROMPTS.scenes])[:, None, None, None], 255, ASKED)


@pytest.fixture(scope="module")
def judged():
    """The judgement of images: those that were asked for are all right."""
    align, distance = aligner(PROMPTS), FrechetDistance(drawn("fluent", "test", 20, seed=1))

    def judge(images) -> Quality:
        found = align(images.astype(np.uint8))
        return Quality(images.astype(np.uint8), found.scores, distance, "content", found.verdicts)

    return judge


@pytest.fixture(scope="module")
def qualities(judged):
    return judged(ASKED), judged(WRONG_AT_FOUR)


@pytest.fixture
def photographs(qualities):
    """The judgement of images without a reader."""
    return Quality(ASKED, {"clip": Score("CLIP cosine", 0.3, 8)}, qualities[0].distance, "clip")


def of(rows, **columns):
    """The one row with these values."""
    (row,) = [row for row in rows if all(row[name] == value for name, value in columns.items())]
    return row


class TestPasses:
    def test_a_point_is_a_row_of_all_prompts_and_one_a_number_of_objects(self, qualities):
        rows = passes_rows({"DDIM": {4: qualities[1]}, "LCM": {1: qualities[0]}}, PROMPTS, ["LCM"], {f"{FD}_vae": 7.0})
        assert [row["objects"] for row in rows] == 2 * ["all", "1", "2", "3", "4"]
        assert [row["content"] for row in rows[:5]] == [0.75, 1.0, 1.0, 1.0, 0.0]
        assert [row["n"] for row in rows[:5]] == [8, 2, 2, 2, 2]
        assert {row["method"]: row["trained"] for row in rows} == {"DDIM": False, "LCM": True}
        assert rows[0][FD] == qualities[1].frechet_distance and rows[1][FD] is None
        assert rows[4]["fit_error"] > rows[3]["fit_error"]
        assert {row[f"{FD}_vae"] for row in rows} == {7.0}

    def test_photographs_have_one_row_and_no_fit_error(self, photographs):
        (row,) = passes_rows({"DDIM": {4: photographs}}, Prompts(None, ["a dog"] * 8), [], {})
        assert (row["objects"], row["clip_cosine"], row["fit_error"]) == ("all", 0.3, None)
        assert row[FD] == photographs.frechet_distance


class TestVerdict:
    def test_style_and_both_at_once_stand_beside_the_errors(self, judged, qualities):
        other = [scenes.Scene("noto", scene.background, scene.objects) for scene in PROMPTS.scenes]
        noto = judged(np.stack([scenes.draw(scene) for scene in other]))
        methods = dict.fromkeys("ab", Method(Sampler(4), load_pipeline("bundled")))
        rows = style_rows({"a": [qualities[0], qualities[1]], "b": [noto, noto]}, methods, PROMPTS)
        whole = {"objects": "all", "compositions": "all"}
        assert of(rows, method="a", **whole)["errors"] == 0.125
        assert of(rows, method="a", **whole)["all_correct"] == 0.875
        assert [of(rows, method="b", **whole)[name] for name in ("errors", "style", "all_correct")] == [0, 0, 0]
        assert of(rows, method="a", objects="4", compositions="all")["errors"] == 0.5

    def test_a_mixture_has_content_style_both_cleanness_and_distance(self, qualities, photographs):
        first, second = mixture_rows({0.0: qualities[1], 1.0: qualities[0]})
        assert (first["weight"], first["content"], first["all_correct"]) == (0.0, 0.75, 0.75)
        assert (second["content"], second["style"], second["all_correct"]) == (1, 1, 1)
        assert second["fit_error"] < first["fit_error"] and second[FD] == qualities[0].frechet_distance
        (row,) = mixture_rows({0.5: photographs})
        assert row["clip_cosine"] == 0.3 and "style" not in row

    def test_a_bootstrap_draws_within_number_and_composition(self):
        assert len(set(composition_labels(PROMPTS))) == 8
        assert composition_labels(Prompts(None, ["a dog"])) is None

    def test_the_works_pairs_are_compared_where_both_were_judged(self):
        names = ["base, guided", "base, guided, 4 steps", "LCM", "LoRA mimics LCM", "fine-tuned, rank 4, w = 1",
                 "LCM-LoRA 8k", "LCM-LoRA 30k", "LCM-LoRA 600 of 30k", "fine-tune + LCM-LoRA 8k"]  # fmt: skip
        pairs = contrasts(names)
        assert pairs["LCM-LoRA 8k against base, guided"] == ("LCM-LoRA 8k", "base, guided")
        for method, against in (
            ("LCM-LoRA 30k", "LCM-LoRA 8k"),
            ("LCM-LoRA 30k", "LCM-LoRA 600 of 30k"),
            ("LoRA mimics LCM", "LCM"),
            ("LCM-LoRA 8k", "base, guided, 4 steps"),
            ("fine-tuned, rank 4, w = 1", "base, guided"),
            ("fine-tune + LCM-LoRA 8k", "fine-tuned, rank 4, w = 1"),
        ):
            assert pairs[f"{method} against {against}"] == (method, against)
        assert not any("base, LCM scheduler" in pair for pair in pairs.values())
        assert list(contrasts(["base, guided", "LCM-LoRA 8k"])) == ["LCM-LoRA 8k against base, guided"]


# ---------------------------------------------------------------------------------------------- sentences


def point(method, passes, objects, content, trained=False):
    return {"method": method, "unet_passes": passes, "objects": objects, "content": content, "trained": trained}


CURVES = [
    *(point("DDIM, guided", 8, o, c) for o, c in (("all", 0.6), ("1", 0.9), ("4", 0.3))),
    *(point("DDIM, guided", 16, o, c) for o, c in (("all", 0.8), ("1", 0.9), ("4", 0.6))),
    *(point("LCM scheduler, guided", 8, o, c) for o, c in (("all", 0.7), ("1", 0.9), ("4", 0.5))),
    *(point("LCM-LoRA 8k", 8, o, c, True) for o, c in (("all", 0.9), ("1", 1.0), ("4", 0.8))),
    *(point("teacher", 50, o, c) for o, c in (("all", 0.85), ("1", 1.0), ("4", 0.7))),
]


def test_the_rivals_are_the_best_of_at_most_eight_evaluations():
    assert words.rivals(CURVES, "LCM-LoRA 8k") == (
        "The best sampler of the base with at most 8 evaluations is LCM scheduler, guided with 8 evaluations: 70% "
        "right (4 objects: 50% right). LCM-LoRA 8k with 8 evaluations: 90% right (4 objects: 80% right). teacher with "
        "50 evaluations: 85% right (4 objects: 70% right)."
    )


def test_of_distances_the_least_is_the_best():
    values = (("a", 4, 9.0), ("b", 8, 7.0), ("LCM-LoRA 8k", 1, 5.0), ("teacher", 9, 6.0))
    rows = [
        {"method": method, "unet_passes": passes, "objects": "all", FD: value, "trained": method == "LCM-LoRA 8k"}
        for method, passes, value in values
    ]
    assert words.rivals(rows, "LCM-LoRA 8k") == (
        "The best sampler of the base with at most 8 evaluations is b with 8 evaluations: FD 7.0. LCM-LoRA 8k with 1 "
        "evaluation: FD 5.0. teacher with 9 evaluations: FD 6.0."
    )


def test_what_the_sampler_does_stands_beside_what_training_does():
    assert words.sampler_or_training(CURVES, "LCM-LoRA 8k") == (
        "With 8 evaluations each: guided DDIM 90% right (n = 1), 30% right (n = 4); the base with LCM's scheduler, "
        "guided 90% right (n = 1), 50% right (n = 4); LCM-LoRA 8k 100% right (n = 1), 80% right (n = 4)."
    )


def test_the_mimics_end_so_many_times_as_far():
    logs = {"MSE": [{"mse": 1.0}, {"mse": 0.002}], "KL": [{"mse": 1.0}, {"mse": 0.02}]}
    assert "MSE 0.0020 (1.0 times the least), KL 0.0200 (10.0 times the least)" in words.divergence(logs)
    assert words.divergence({}) == ""


def test_how_often_a_training_sees_an_image():
    assert words.epochs({"8k": 6000, "600 of 30k": 600}, 4800) == (
        "A training draws 4,800 images: 0.8 times each of 6,000 (8k), 8 times each of 600 (600 of 30k)."
    )


def contrast(method, against, measure, objects, value, low, high):
    return {"method": method, "against": against, "measure": measure, "objects": objects, "value": value, "low": low,
            "high": high}  # fmt: skip


CONTRASTS = [
    contrast("LCM-LoRA 30k", "LCM-LoRA 8k", "errors ratio", "all", 0.8, 0.6, 1.1),
    contrast("LCM-LoRA 30k", "LCM-LoRA 8k", "errors ratio", "1", 0.5, 0.2, 0.9),
    contrast("LCM-LoRA 30k", "LCM-LoRA 8k", "errors ratio, style too", "all", 1.0, 0.9, 1.1),
    contrast("LCM-LoRA 30k", "LCM-LoRA 8k", "errors ratio, style too", "1", 1.0, 0.9, 1.1),
    contrast("LCM-LoRA 30k", "LCM-LoRA 8k", "FD difference", "all", -2, -3, -1),
    contrast("LCM-LoRA 30k", "LCM-LoRA 600 of 30k", "errors ratio", "all", 0.5, 0.4, 0.6),
]


def test_a_contrast_is_a_row_and_says_where_it_includes_no_difference():
    table = words.compared(CONTRASTS, "LCM-LoRA 8k")
    assert table.loc["LCM-LoRA 30k"].to_dict() == {
        "times the errors": "0.80 (0.60 to 1.10) =",
        "n = 1": "0.50 (0.20 to 0.90)",
        "style counted too": "1.00 (0.90 to 1.10) =",
        "FD": "-2.0 (-3.0 to -1.0)",
    }
    assert words.compared(CONTRASTS, "LCM-LoRA 8k", ["LCM"]).empty


def test_more_data_is_the_larger_set_against_the_smaller_and_against_its_first_images():
    loras = ["LCM-LoRA 8k", "LCM-LoRA 30k", "LCM-LoRA 600 of 30k"]
    table = words.more_data(CONTRASTS, loras)
    assert list(table.index) == ["LCM-LoRA 30k against LCM-LoRA 8k", "LCM-LoRA 30k against LCM-LoRA 600 of 30k"]
    assert list(words.more_data(CONTRASTS, loras[:2]).index) == ["LCM-LoRA 30k against LCM-LoRA 8k"]
    assert "not testable" in words.more_data(CONTRASTS, loras[:1])


def test_where_nothing_is_in_the_style_a_distance_is_not_one_to_flickr():
    rows = [{"method": m, "flickr_style_percent": p} for m, p in (("base", 0.0), ("LCM-LoRA 8k", 1.0), ("tuned", 90.0))]
    assert "third style" in words.styles(rows, "base", ["LCM-LoRA 8k"])
    assert words.styles(rows, "base", ["tuned"]) == "Pictures in Flickr's style: base 0 %, tuned 90 %."
    assert words.styles([{"method": "base"}], "base", []) == ""


def test_a_mixture_is_a_line_a_weight():
    row = {"weight": 1.0, "content": 0.96, "style": 1.0, "all_correct": 0.955, "fit_error": 0.1, FD: 60.0}
    assert words.composition([row]) == (
        "λ = 1: content 96%, Flickr's style 100%, both at once 96%, fit error 0.100, FD 60.0"
    )
    assert words.composition([{"weight": 1.0, FD: 60.0}]) == ""


def test_the_summary_has_content_in_flickrs_style():
    rows = [{"method": "tuned", "objects": o, "compositions": "all", "errors": 0.2, "all_correct": 0.7}
            for o in ("all", "1")]  # fmt: skip
    assert words.at_once(rows, ["tuned", "LCM"]) == {"content in Flickr's style: tuned": "70.0 % (content 80.0 %)"}
    assert words.at_once([], ["tuned"]) == {}
