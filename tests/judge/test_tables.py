"""The tables of notebooks 02 to 04: every number in a row follows from the judgements, logs and timings given."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.judge import overview, tables
from lora_distill.judge.judge import (
    Judge,
    Method,
    Quality,
    calibration,
    distance_floor,
    drawn,
    judge_methods,
    reconstructions,
)
from lora_distill.judge.metrics import (
    Aligned,
    FrechetDistance,
    Proportion,
    Score,
    aligner,
    compare,
    fidelity,
    inception_score,
    psnr,
)
from lora_distill.judge.pictures import Pictures
from lora_distill.pipeline import load_pipeline, to_uint8
from lora_distill.sampling import Sampler

ROOT = Path(__file__).parents[2]
PROMPTS, REAL = scene_prompts("noto", "test", 8, seed=0), drawn("noto", "test", 60, seed=1)
GUIDED, SINGLE = Sampler(25, 3.0), Sampler(25)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("bundled")


@pytest.fixture(scope="module")
def judge(pipe):
    return Judge(pipe, PROMPTS, REAL)


@pytest.fixture(scope="module")
def qualities(judge):
    """The judgements of what was asked for, and of two other sets of drawings."""
    asked = drawn("noto", "test", 8, seed=0)
    return [judge.judge_images(images) for images in (asked, *(drawn("fluent", "test", 8, seed) for seed in (3, 4)))]


def columns(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


# ---------------------------------------------------------------------------------------------- judging methods


def test_each_seed_of_sampling_takes_the_next_training(tmp_path):
    called = []

    def judge(sampler, seed, pipe, folder):
        called.append((sampler, seed, *pipe))
        return SimpleNamespace(seed=seed, images=Pictures(0, None))

    judged = judge_methods(
        judge,
        {
            "teacher": Method(GUIDED, "pipe"),
            "student": Method(SINGLE, "pipe", ["one", "two"]),
            "copy": Method(Sampler(3), "first copy", copies=["second copy"]),
        },
        [0, 1, 2],
        lambda pipe, adapter: (pipe, adapter),
        tmp_path,
        "02_x",
    )
    assert {name: [one.seed for one in found] for name, found in judged.items()} == {
        "teacher": [0, 1, 2],
        "student": [0, 1, 2],
        "copy": [0, 1, 2],
    }
    assert [(seed, *training) for sampler, seed, *training in called if sampler == GUIDED] == [
        *((0, "pipe", None), (1, "pipe", None), (2, "pipe", None))
    ]
    assert [(seed, *training) for sampler, seed, *training in called if sampler == SINGLE] == [
        *((0, "pipe", "one"), (1, "pipe", "two"), (2, "pipe", "one"))
    ]
    assert [(seed, *training) for sampler, seed, *training in called if sampler == Sampler(3)] == [
        *((0, "first copy", None), (1, "second copy", None), (2, "first copy", None))
    ]


def test_the_floor_is_the_distance_of_other_real_images_and_photographs_have_none():
    distance = FrechetDistance(REAL)
    assert distance_floor(distance, PROMPTS, seed=5) == distance(drawn("noto", "test", 8, seed=5))
    assert distance_floor(distance, Prompts(None, ["a dog"]), seed=5) is None


def test_a_distance_stands_beside_those_of_real_images_of_the_vae_and_of_the_other_style(judge, monkeypatch):
    found = calibration(judge, "test", seed=5)
    real, other = drawn("noto", "test", 8, seed=5), drawn("fluent", "test", 8, seed=5)
    assert found == {
        "fd_efficientnet_lite0_floor": judge.frechet_distance(real),
        "fd_efficientnet_lite0_vae": judge.frechet_distance(reconstructions(judge.pipe, real)),
        "fd_efficientnet_lite0_other_style": judge.frechet_distance(other),
    }
    monkeypatch.setattr(judge, "prompts", Prompts(None, ["a dog"]))
    assert calibration(judge, "test", seed=5) == {}


def test_reconstructions_are_those_of_the_vae(pipe):
    images = drawn("noto", "test", 3, seed=0)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = to_uint8(pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample)
    assert abs(reconstructions(pipe, images, batch_size=2).astype(int) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------- curves


def test_a_guidance_scale_has_a_row_a_number_of_objects_and_the_distance_of_all(judge, qualities):
    asked, other, _ = qualities
    rows = tables.guidance_rows({1.0: other, 3.0: asked}, judge, 3.0, 0.5, {"fd_efficientnet_lite0_vae": 5.0})
    assert columns(rows, "guidance_scale", "objects", "n") == [
        (w, objects, n) for w in (1.0, 3.0) for objects, n in (("all", 8), *((str(n), 2) for n in (1, 2, 3, 4)))
    ]
    low, high = Proportion(1.0, 8).interval
    one, two = (row for row in rows if row["objects"] == "all")
    assert (two["all_correct"], two["low"], two["high"], two["n"]) == (1.0, low, high, 8)
    assert (two["fit_error"], one["fit_error"]) == (np.mean(asked.fit_error), np.mean(other.fit_error))
    ends = judge.distance_interval(other)
    assert (one["fd_efficientnet_lite0_low"], one["fd_efficientnet_lite0_high"]) == ends
    assert one["fd_efficientnet_lite0"] == other.frechet_distance and one["all_correct"] == 0.0
    assert [row["fd_efficientnet_lite0_vae"] for row in rows] == ([5.0] + [None] * 4) * 2
    assert {row["teacher_guidance_scale"] for row in rows} == {3.0}
    predicted = [row["predicted"] for row in rows]
    assert predicted[1:5] == [(1 - 0.5 * 23 / 24) ** n for n in (1, 2, 3, 4)]
    assert predicted[0] == pytest.approx(np.mean(predicted[1:5])) and predicted[5:] == [None] * 5
    assert "predicted" not in tables.guidance_rows({1.0: other}, judge, 3.0)[0], "the pipeline does not say"


LOG = [
    {"step": 0, "all_correct": 0.5, "fit_error": 0.25, "fd_efficientnet_lite0": 90.0},
    {"step": 10, "loss": 0.3},
    {"step": 20, "loss": 0.2},
    {"step": 20, "all_correct": 0.75, "fit_error": 0.125, "fd_efficientnet_lite0": 80.0},
]


def test_milestones_are_the_measurements_of_a_log_and_the_teacher_comes_last_without_a_step(judge, qualities):
    rows = tables.milestone_rows({"LoRA": LOG}, qualities[0], judge)
    assert columns(rows, "method", "step", "all_correct", "n") == [
        *(("LoRA", 0, 0.5, 8), ("LoRA", 20, 0.75, 8), ("teacher, two passes", None, 1.0, 8))
    ]
    assert [row["fd_efficientnet_lite0_low"] is None for row in rows] == [True, True, False]
    assert [row["fit_error"] for row in rows] == [0.25, 0.125, np.mean(qualities[0].fit_error)]
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"


def test_losses_are_the_other_lines_of_a_log():
    assert tables.loss_rows({"LoRA": LOG}) == [
        {"method": "LoRA", "step": 10, "loss": 0.3},
        {"method": "LoRA", "step": 20, "loss": 0.2},
    ]


def share(value):
    return Quality([None] * 8, {"content": Proportion(value, 8)}, None, "content")


def test_points_are_shown_a_row_a_method_and_a_column_a_number_of_passes():
    shown = overview.passes({"DDIM": {1: share(0.25)}, "LCM-LoRA": {1: share(0.5), 4: share(1.0)}})
    assert shown.loc["LCM-LoRA", 4] == "100.0 %" and shown.loc["DDIM", 4] == ""


# ---------------------------------------------------------------------------------------------- quality


def test_a_row_of_quality_is_the_mean_and_deviation_over_its_seeds(pipe, judge, qualities):
    asked, *others = qualities
    methods = {"teacher, two passes": Method(GUIDED, pipe), "LoRA student": Method(SINGLE, pipe, ["a", "b"])}
    judged = {"teacher, two passes": [asked, asked], "LoRA student": others}
    floor = {"fd_efficientnet_lite0_floor": 43.64211}
    teacher, student = tables.quality_rows(judged, methods, judge, floor, baseline="teacher, two passes")
    distances = [quality.frechet_distance for quality in others]
    assert student["fd_efficientnet_lite0"] == round(np.mean(distances), 6)
    assert student["fd_efficientnet_lite0_sd"] == round(np.std(distances, ddof=1), 6)
    assert student["psnr_to_teacher_db"] == round(np.mean([psnr(q.images, asked.images) for q in others]), 6)
    assert student["fit_error"] == round(np.mean([quality.fit_error for quality in others]), 6)
    assert teacher["psnr_to_teacher_db"] is None and teacher["all_correct_percent"] == 100
    low, high = Proportion.clustered(np.ones((2, 8), bool)).interval
    assert (teacher["low_percent"], teacher["high_percent"]) == (round(100 * low, 6), round(100 * high, 6))
    assert columns([teacher, student], "n", "seeds", "trainings", "reference_n", "unet_passes") == [
        *((8, 2, 1, 60, 50), (8, 2, 2, 60, 25))
    ]
    assert student["fd_efficientnet_lite0_floor"] == 43.64211


def test_one_seed_has_no_deviation(pipe, judge, qualities):
    (row,) = tables.quality_rows({"base": qualities[:1]}, {"base": Method(GUIDED, pipe)}, judge, {})
    assert (row["all_correct_sd"], row["fd_efficientnet_lite0_sd"]) == (None, None)


def test_a_row_of_few_steps_has_the_content_and_the_style(pipe, judge, qualities, monkeypatch):
    monkeypatch.setattr(judge, "key", "content")
    pair = [replace(quality, key="content") for quality in qualities[:2]]
    (base,) = tables.quality_rows({"base": pair}, {"base": Method(GUIDED, pipe)}, judge, {})
    assert (base["content_percent"], base["flickr_style_percent"]) == (50, 50)
    assert base["content_sd"] == round(np.std([0, 100], ddof=1), 6)


# ---------------------------------------------------------------------------------------------- photographs


def cosine(value):
    return Score("CLIP cosine", value, 8, low=value - 0.02, high=value + 0.02)


@pytest.fixture
def photographs(judge, qualities, monkeypatch):
    """The judge and two judgements as of photographs whose content CLIP scores."""
    monkeypatch.setattr(judge, "key", "clip")
    values = zip(qualities[:2], (0.3125, 0.2925), strict=True)
    monkeypatch.setattr(judge, "prompts", Prompts(None, PROMPTS.captions))
    return [replace(quality, key="clip", alignment={"clip": cosine(value)}, verdicts=None) for quality, value in values]


def test_of_photographs_the_alignment_is_clips_cosine_and_there_is_no_style(pipe, judge, photographs):
    methods = {"base, guided": Method(GUIDED, pipe)}
    (row,) = tables.quality_rows({"base, guided": photographs}, methods, judge, {})
    assert (row["clip_cosine"], row["clip_cosine_sd"]) == (0.3025, round(0.02 / 2**0.5, 6))
    assert not {"content_percent", "all_correct_percent", "flickr_style_percent"} & row.keys()
    assert "CLIP cosine" in overview.quality([row]).columns
    assert overview.quality([row]).loc["base, guided", "CLIP cosine"] == "0.302 ± 0.014"


def test_curves_of_photographs_are_of_the_cosine_with_its_interval(judge, photographs):
    (curve,) = tables.guidance_rows({3.0: photographs[0]}, judge, 3.0)
    assert (curve["clip_cosine"], curve["low"], curve["high"], curve["n"]) == (0.3125, 0.2925, 0.3325, 8)
    log = [{"step": 0, "clip_cosine": 0.25, "fd_efficientnet_lite0": 90.0}]
    rows = tables.milestone_rows({"LoRA": log}, photographs[0], judge)
    assert columns(rows, "clip_cosine", "low") == [(0.25, None), (0.3125, 0.2925)]
    assert overview.passes({"DDIM": {4: photographs[0]}}).loc["DDIM", 4] == "0.312"


def test_without_a_clip_the_distance_alone_is_judged(pipe, judge, qualities, monkeypatch):
    monkeypatch.setattr(judge, "key", "")
    monkeypatch.setattr(judge, "prompts", Prompts(None, PROMPTS.captions))
    bare = replace(qualities[1], key="", alignment={}, verdicts=None)
    (row,) = tables.quality_rows({"base": [bare]}, {"base": Method(GUIDED, pipe)}, judge, {})
    (curve,) = tables.guidance_rows({3.0: bare}, judge, 3.0)
    assert not [name for name in {**row, **curve} if name.startswith(("all_", "content", "clip", "flickr"))]
    assert curve["fd_efficientnet_lite0"] == bare.frechet_distance
    log = [{"step": 0, "fd_efficientnet_lite0": 90.0}]
    assert [row["n"] for row in tables.milestone_rows({"LoRA": log}, bare, judge)] == [8, 8]


def test_results_on_photographs_are_named_for_what_they_are():
    rows = [
        {"method": name, "clip_cosine": 0.3125, "fd_efficientnet_lite0": 50.0, "unet_passes": 25}
        for name in ("base, guided", "fine-tuned, rank 16", "base, guided, 4 steps", "base, DDIM, 4 passes",
                     "base, DPM++, 4 passes", "base, LCM scheduler", "LCM-LoRA cats")
    ]  # fmt: skip
    found = overview.few_step_results(rows, "fine-tuned, rank 16", "me/cats")
    assert found["CLIP cosine, guided teacher"] == "0.312"
    assert found["CLIP cosine, base with 4 passes: DDIM, DPM++, LCM scheduler"] == "0.312, 0.312, 0.312"
    assert found["FD-EfficientNet-Lite0 to real images: base, fine-tune, LCM-LoRA cats"] == "50.0, 50.0, 50.0"
    assert not [label for label in found if "content" in label or "Flickr" in label or "mimics" in label]
    titles = [overview.few_step_title(source) for source in ("scenes/fluent/8k", "jxie/flickr8k", "me/cats")]
    assert titles == [f"LCM-LoRA on {name} (test captions)" for name in ("the Flickr stand-in", "Flickr8k", "cats")]


def test_results_without_full_copies_name_what_there_is():
    rows = [
        {"method": name, "all_correct_percent": 97.0, "unet_passes": 25}
        for name in ("teacher, two passes", "LoRA student", "no guidance")
    ]
    assert not [label for label in overview.guided_results(rows, [], 8, 1000) if "full copy" in label]


# ---------------------------------------------------------------------------------------------- more measures


@pytest.fixture(scope="module")
def image_set(qualities):
    asked, *others = [quality.images for quality in qualities]
    rows = {"base, guided": {"trainings": 1, "unet_passes": 50}, "LCM": {"trainings": 2, "unet_passes": 4}}
    images = {"base, guided": [asked, asked], "LCM": others}
    return tables.ImageSet(images, rows, PROMPTS, REAL, aligner(PROMPTS), key="content", baseline="base, guided")


def test_every_measure_of_a_method_is_the_mean_over_its_seeds(image_set):
    base, lcm = tables.measure_rows("few steps", image_set, seed=0)
    judge = FrechetDistance(REAL, layers=["block10", "head", "logits"])
    features = [judge.features(images) for images in image_set.images["LCM"]]
    scores = [compare(one, judge.reference, seed=0) for one in features]
    for short in ("KID", "precision", "recall"):
        values = [one[f"{short}-EfficientNet-Lite0"].value for one in scores]
        name = f"{short.lower()}_efficientnet_lite0"
        assert (lcm[name], lcm[f"{name}_sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), abs=5e-5)
    sure = [inception_score(one, splits=2).value for one in features]
    assert lcm["is_efficientnet_lite0"] == pytest.approx(np.mean(sure), abs=5e-5)
    asked = image_set.images["base, guided"][0]
    near = [
        fidelity(*pair, *[judge.features(images) for images in pair])
        for pair in zip(image_set.images["LCM"], [asked] * 2, strict=True)
    ]
    assert lcm["psnr_to_teacher_db"] == pytest.approx(np.mean([one["PSNR to teacher"].value for one in near]), abs=5e-5)
    assert (base["psnr_to_teacher_db"], base["fd_efficientnet_lite0_to_teacher"]) == (None, None)
    assert (base["alignment_percent"], lcm["trainings"], lcm["unet_passes"], lcm["reference_n"]) == (100, 2, 4, 60)
    assert base["fd_efficientnet_lite0_floor"] == round(judge(drawn("noto", "test", 8, seed=2)), 6)


def test_photographs_have_clips_cosine_and_no_floor_and_without_clip_no_place_on_the_front(image_set):
    prompts = Prompts(None, PROMPTS.captions)
    scored = image_set._replace(prompts=prompts, key="clip", align=lambda images: Aligned({"clip": cosine(0.3)}))
    row = tables.measure_rows("few steps", scored, seed=0)[0]
    assert (row["clip_cosine"], row["clip_cosine_sd"], row["fd_efficientnet_lite0_floor"]) == (0.3, 0, None)
    curve = {"unet_passes": 50, "objects": "all", "low": 0.2, "high": 0.4, "n": 8, "trained": False}
    curves = [{"method": "teacher", "clip_cosine": 0.3, "fd_efficientnet_lite0": 50.0, **curve}]
    sets = {"guided distillation": scored._replace(images={}), "few steps": scored}
    assert [row["method"] for row in tables.front_rows(curves, sets, "PNDM")] == ["LCM, all weights", "PNDM, guided"]
    bare = image_set._replace(prompts=prompts, key="", align=lambda images: Aligned({}))
    assert not [name for name in tables.measure_rows("few steps", bare, seed=0)[0] if name.startswith(("ali", "clip"))]
    (point,) = tables.front_rows([{"method": "DDIM", "fd_efficientnet_lite0": 50.0, **curve}], {"few": bare}, "DDIM")
    assert (point["method"], point["fd_efficientnet_lite0"]) == ("DDIM", 50.0)


def test_the_front_is_the_curves_and_the_points_that_they_lack_in_the_order_of_passes(image_set):
    sets = {"guided distillation": image_set._replace(images={}), "few steps": image_set}
    curves = [
        {"method": method, "unet_passes": passes, "objects": objects, "content": value, "fit_error": 0.2,
         **Proportion(value, 8).columns, "trained": False}
        for method, passes, value in (("teacher", 50, 1.0), ("DDIM, one pass", 1, 0.5)) for objects in ("all", "4")
    ]  # fmt: skip
    rows = tables.front_rows(curves, sets, "DDIM")
    assert columns(rows, "method", "unet_passes", "content", "trained") == [
        *(("DDIM, one pass", 1, 0.5, False), ("LCM, all weights", 4, 0.0, True), ("DDIM, guided", 50, 1.0, False))
    ]
    assert curves[0]["method"] == "teacher", "what was given stays as it was"


# ---------------------------------------------------------------------------------------------- notebook 04


TIMES = [
    {"runtime": runtime, "threads": threads, "method": method, "deployed": runtime == "OpenVINO",
     "seconds_an_image": seconds * (1 + batch / 8), "lowest": seconds, "highest": 2 * seconds, "steps": steps,
     "saving_percent": saved, "saving_percent_low": saved - 1, "saving_percent_high": saved + 1,
     "times_faster": faster, "times_faster_unet": faster, "vae_seconds": 0.01, "unet_seconds": 0.8 * seconds,
     "batch": batch, "repeats": 30, "device": "a CPU"}
    for batch in (1, 8) for runtime in ("PyTorch", "OpenVINO") for threads in (1, 2)
    for method, seconds, saved, faster, steps in (
        ("teacher, two passes", 0.32 / threads, 0.0, 1.0, 25), ("LoRA student, merged", 0.2, 10.0 * threads, 1.5, 25),
        ("LCM-LoRA 8k", 0.08, 66.7, 3.0, 4),
    )
]  # fmt: skip


def test_our_speed_is_that_of_what_is_deployed_on_one_thread():
    assert columns(tables.speed_rows(TIMES), "source", "method", "seconds") == [
        ("slides, 2.4 times", "base", 2.07),
        ("slides, 2.4 times", "LCM-LoRA", 0.86),
        ("here, 4.0 times", "base", 0.36),
        ("here, 4.0 times", "LCM-LoRA", 0.09),
    ]


def test_the_slides_distances_stand_before_ours():
    ours = {"method": "LCM", "fd_efficientnet_lite0": 5.0, "fd_efficientnet_lite0_sd": 1.0,
            "fd_efficientnet_lite0_floor": 2.0, "n": 8, "seeds": 3}  # fmt: skip
    rows = tables.distance_rows([ours])
    assert [row["distance"] for row in rows] == [None, None, 26.95, 24.85, 5.0]
    assert [row["metric"] for row in rows[-2:]] == ["FID", "FD-EfficientNet-Lite0"] and rows[-1]["seeds"] == 3


def test_results_say_the_seconds_of_each_runtime_and_the_range_of_the_grid():
    grid = [
        {"method": method, "batch": batch, "resolution": side, "saving_percent": saved, "threads": 2}
        for method, batch, side, saved in (
            *(("LoRA student, merged", 1, 64, 31.2), ("LoRA student, merged", 16, 96, 46.8)),
            ("LCM-LoRA, 4 steps", 16, 96, 86.0),
        )
    ]
    saved = "10.0 (9.0 to 11.0) % on 1 thread, 20.0 (19.0 to 21.0) % on 2 threads"
    assert overview.seconds_results(TIMES, grid) == {
        "saved by the merged student of the teacher's seconds, one image, PyTorch": saved,
        "saved by the merged student of the teacher's seconds, one image, OpenVINO": saved,
        "times faster, one image, LCM-LoRA 8k, merged, 4 steps": "3.0 on 1 thread, 3.0 on 2 threads",
        "saved by one pass, batch 1 to 16, 64 and 96 px": "31 to 47 % on 2 threads",
    }


def test_a_table_of_seconds_is_of_one_image_and_has_intervals():
    table = overview.seconds(TIMES)
    assert len(table) == 12 and table.loc[("PyTorch", 2, "LoRA student, merged"), "saved, %"] == "20.0 (19.0 to 21.0)"
    assert overview.seconds_caption(TIMES).startswith(
        "batch 1, prompt to pixels, medians of 30 in turns; saved turn by turn"
    )


def test_sentences_on_seconds_come_from_the_tables():
    contrast = {"method": "LCM-LoRA 30k", "against": "LCM-LoRA 8k", "deployed": True, "threads": 1, "batch": 1}
    said = overview.seconds_found(TIMES, [contrast | {"value": 1.01, "low": 0.99, "high": 1.03}])
    assert "20 (19 to 21) % on OpenVINO, 2 threads." in said
    assert said.endswith("LCM-LoRA 30k takes 1.01 (0.99 to 1.03) times the seconds of LCM-LoRA 8k.")
    # (2.41 x 0.09 - (0.36 - 0.256)) / (0.256 / 25) = 10.9
    assert overview.slides_found(TIMES).endswith("The slides' 2.4 times is what 11 guided steps would give.")


def test_results_of_guided_distillation_name_the_share_of_trained_parameters():
    rows = [
        {"method": name, "all_correct_percent": percent, "unet_passes": passes}
        for name, percent, passes in (
            *(("teacher, two passes", 97.22, 50), ("LoRA student", 97.78, 25)),
            *(("full copy", 97.5, 25), ("no guidance", 64.44, 25)),
        )
    ]
    errors = [
        {"method": "LoRA student", "objects": objects, "compositions": "all", "errors": value}
        for objects, value in (("all", 0.25), ("1", 0.05), ("4", 0.125))
    ]
    found = overview.guided_results(rows, errors, trained=8, frozen=1000)
    assert found["errors of LoRA student with one pass, 1 to 4 objects"] == "5.0, 12.5 %"
    assert found["trained parameters"] == "0.80 % of the UNet"
    assert found["UNet passes an image, teacher and student"] == "50 and 25"
    assert found["all correct, one pass without guidance"] == "64.4 %"


def test_results_are_saved_under_their_title(tmp_path):
    shown = overview.save_results(tmp_path / "02_results.json", "a title", {"a number": "3 %"})
    assert json.loads((tmp_path / "02_results.json").read_text()) == {"a title": {"a number": "3 %"}}
    assert shown.loc["a number", "a title"] == "3 %"


# ---------------------------------------------------------------------------------------------- tables to read


def test_an_overview_writes_means_with_their_deviation_and_leaves_out_what_was_not_measured():
    rows = [
        {"method": "teacher", "unet_passes": 50, "all_correct_percent": 97.22, "all_correct_sd": 0.79,
         "flickr_style_percent": None, "psnr_to_teacher_db": None, "n": 60},
        {"method": "student", "unet_passes": 25, "all_correct_percent": 97.78, "all_correct_sd": 0.8,
         "flickr_style_percent": None, "psnr_to_teacher_db": 24.25, "n": 60},
    ]  # fmt: skip
    shown = overview.quality(rows)
    assert list(shown.columns) == ["passes", "all correct, %", "PSNR to teacher, dB"]
    assert list(shown.loc["teacher"]) == ["50", "97.2 ± 0.8", ""]
    assert list(shown.loc["student"]) == ["25", "97.8 ± 0.8", "24.2"]


def test_a_caption_says_what_the_table_rests_on(pipe):
    row = {"n": 60, "seeds": 3, "trainings": 1, "reference_n": 1000}
    known = {f"fd_efficientnet_lite0_{kind}": fd for kind, fd in (("floor", 43.64), ("vae", 50), ("other_style", 300))}
    assert overview.caption([row | known, row | known | {"trainings": 3}], Method(GUIDED, pipe)) == (
        "N = 60 prompts x 3 seeds (students: 3 trainings), against 1000 real images; DDIM, 25 steps, w = 3, float32; "
        "FD-EfficientNet-Lite0 at this N of other real images 43.6, these after the VAE 50.0, "
        "the other drawing style 300.0"
    )
    bare = overview.caption([row], Method(Sampler(4, scheduler="dpm++"), pipe))
    assert bare == "N = 60 prompts x 3 seeds, against 1000 real images; DPM-Solver++ 2M, 4 steps, w = 1, float32"


# ---------------------------------------------------------------------------------------------- sentences


def test_the_curve_of_guidance_is_told_for_each_number_of_objects():
    rows = [
        {"guidance_scale": w, "objects": objects, "all_correct": share, "predicted": 0.5 if w == 1 else None}
        for objects, shares in (("all", (0.25, 0.75, 0.5)), ("1", (0.5, 1.0, 0.75)))
        for w, share in zip((1.0, 3.0, 10.0), shares, strict=True)
    ]
    assert overview.guidance_found(rows).splitlines() == [
        "All prompts: 25.0 % right at w = 1 (the captions' errors alone predict 50.0 %), 75.0 % at w = 3, "
        "50.0 % at w = 10.",
        "1 object: 50.0 % right at w = 1 (the captions' errors alone predict 50.0 %), 100.0 % at w = 3, "
        "75.0 % at w = 10.",
    ]
    photographs = [{"guidance_scale": w, "objects": "all", "clip_cosine": c} for w, c in ((1.0, 0.25), (7.5, 0.3125))]
    assert overview.guidance_found(photographs) == "The best CLIP cosine is 0.312, at w = 7.5."


def test_a_contrast_says_whether_its_interval_excludes_no_difference():
    row = {"method": "LoRA student", "against": "teacher", "measure": "errors ratio", "objects": "all"}
    rows = [
        {**row, "value": 1.25, "low": 0.75, "high": 2.0},
        {**row, "measure": "FD difference", "value": 2.0, "low": 1.0, "high": 3.0},
        {**row, "objects": "1", "value": 9.0, "low": 9.0, "high": 9.0},
    ]
    assert overview.contrasts_found(rows).splitlines() == [
        "LoRA student against teacher, errors ratio: 1.25 (0.75 to 2); 1, no difference, lies inside.",
        "LoRA student against teacher, FD difference: 2 (1 to 3); 0, no difference, lies outside.",
    ]


def test_errors_are_read_by_number_of_objects_and_the_untrained_rival_stands_beside():
    row = {"compositions": "all", "errors": 0.125, "low": 0.0625, "high": 0.25, "unet_passes": 25}
    rows = [{**row, "method": "LoRA student", "objects": objects} for objects in ("all", "4")]
    rows += [{**row, "method": "base, guided, 4 steps", "objects": "all", "errors": 0.0, "unet_passes": 8}]
    shown = overview.errors(rows)
    assert shown.loc["LoRA student", "4"] == "12.5 (6.2 to 25.0)" and list(shown.columns) == ["all", "4"]
    assert overview.untrained_rival(rows).splitlines() == [
        "LoRA student: 12.5 % wrong (6.2 to 25.0) in 25 UNet evaluations.",
        "base, guided, 4 steps: 0.0 % wrong (6.2 to 25.0) in 8 UNet evaluations.",
    ]


def test_what_guidance_adds_is_told_of_each_quantity():
    rows = [
        {"timestep": t, "quantity": quantity, "relative_difference": value}
        for quantity, values in (("v", (0.25, 0.5)), ("ε", (0.5, 0.125)))
        for t, value in zip((19, 999), values, strict=True)
    ]
    assert overview.differences_found(rows).splitlines() == [
        "v: most at t = 999 (50.0 % of its size), least at t = 19 (25.0 %).",
        "ε: most at t = 19 (50.0 % of its size), least at t = 999 (12.5 %).",
    ]


def test_it_is_told_when_a_student_first_comes_into_the_teachers_interval():
    rows = [{"method": m, "step": step, "all_correct": share} for m, step, share in (
        ("LoRA", 0, 0.5), ("LoRA", 10, 0.75), ("LoRA", 20, 1.0), ("copy", 0, 0.5))]  # fmt: skip
    teacher = {"method": "teacher", "step": None, "all_correct": 0.875, "low": 0.75, "high": 1.0}
    assert overview.milestones_found([*rows, teacher]).splitlines() == [
        "LoRA: first within the teacher's 95 % interval after 10 updates (share of right pictures).",
        "copy: never that near (share of right pictures).",
    ]
    distances = [{"method": "LoRA", "step": step, "fd_efficientnet_lite0": fd} for step, fd in ((0, 9.0), (5, 4.0))]
    teacher = {"method": "teacher", "step": None, "fd_efficientnet_lite0": 3.0, "fd_efficientnet_lite0_high": 5.0}
    assert "after 5 updates (FD-EfficientNet-Lite0)" in overview.milestones_found([*distances, teacher])


@pytest.mark.parametrize(("sd", "said"), [(0.0123, "0.152 ± 0.012, 0.152 ± 0.012"), (None, "0.152, 0.152")])
def test_a_mean_over_one_seed_has_no_deviation(sd, said):
    measures = {"kid_efficientnet_lite0": 0.1523, "kid_efficientnet_lite0_sd": sd, "recall_efficientnet_lite0": 0.5}
    results = overview.evaluation_results([{"method": name, **measures} for name in (tables.TEACHER, "LoRA student")])
    assert next(text for name, text in results.items() if name.startswith("KID")) == said
    further = overview.further([{"set": "a", "method": "b", "metric": "FID", "value": 0.1523, "sd": sd}])
    assert further.iloc[0, 0] == said.partition(",")[0]


def test_a_caption_names_no_distance_that_was_not_measured():
    row = {"n": 8, "seeds": 3, "trainings": 1, "reference_n": 60}
    unknown = {f"{tables.FD}_{kind}": None for kind in overview.CALIBRATION}
    assert (
        overview.caption([row | unknown])
        == overview.caption([row])
        == "N = 8 prompts x 3 seeds, against 60 real images"
    )
