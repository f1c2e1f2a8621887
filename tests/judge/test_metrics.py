"""The numbers that judge images, against independent plain computations on what is on disk."""

import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from lora_distill import rehearsal
from lora_distill.data import scenes
from lora_distill.data.teacher import scene_prompts
from lora_distill.judge import metrics
from lora_distill.judge.distances import frechet_distance, kernel_distance
from lora_distill.judge.features import EfficientNetLite0, Features, extract
from lora_distill.judge.judge import Judge, Method, drawn, further_distances, judge_methods, load_images
from lora_distill.judge.metrics import (
    ClipCosine,
    FrechetDistance,
    Proportion,
    Score,
    compare,
    fidelity,
    inception_score,
    latent_mse,
    metric_name,
    prompt_alignment,
    psnr,
    real_floor,
)
from lora_distill.judge.reader import EMPTY, MARGIN, Reader
from lora_distill.pipeline import load_pipeline
from lora_distill.sampling import Sampler


def test_wilsons_interval_has_the_bounds_that_solve_its_equation():
    """|p - bound| = z sqrt(bound (1 - bound) / n), by definition."""
    proportion = Proportion(0.93, 200)
    for bound in proportion.interval:
        assert abs(0.93 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 200) ** 0.5, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_all_or_nothing_is_not_a_point(value):
    low, high = Proportion(value, 50).interval
    assert 0 <= low < high <= 1 and high - low == pytest.approx(3.84146 / (50 + 3.84146), rel=1e-3)


def test_a_table_has_the_interval_and_n_of_a_share():
    proportion = Proportion(0.8, 10)
    assert proportion.columns == dict(zip(("low", "high", "n"), (*proportion.interval, 10), strict=True))


def test_a_proportion_reads_as_one_line():
    assert str(Proportion(0.5, 100)) == "50.0 % (40.4 to 59.6, N = 100)"


def test_alignment_is_1_for_the_scenes_that_were_drawn_and_0_for_others():
    shown = scenes.sample_scenes("noto", "val", 20, seed=0)
    images = np.stack([scenes.draw(s) for s in shown])
    found = prompt_alignment(images, shown)
    assert found.pop("fit_error").value < 0.01
    assert all(score.value == 1 and score.count == 20 for score in found.values())
    others = [s for s in scenes.sample_scenes("noto", "val", 200, seed=1)][-20:]
    assert prompt_alignment(images, others)["all"].value == 0


def test_alignment_of_saved_images_is_the_count_of_what_they_were_drawn_to_show(tmp_path):
    """PNGs that show what was asked, or something else in one known attribute; counted from their labels alone."""
    asked = scenes.sample_scenes("noto", "val", 12, seed=4)
    other_colour, other_kind = {"blue": "pink"}, {"lion": "frog"}
    shown = [
        scene if i % 4 == 0 else
        replace(scene, style="fluent") if i % 4 == 1 else
        replace(scene, background=other_colour.get(scene.background, "blue")) if i % 4 == 2 else
        replace(scene, objects=tuple(replace(one, kind=other_kind.get(one.kind, "lion")) for one in scene.objects))
        for i, scene in enumerate(asked)
    ]  # fmt: skip
    for i, (scene, prompt) in enumerate(zip(shown, asked, strict=True)):
        Image.fromarray(scenes.draw(scene)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.json").write_text(json.dumps({"shown": scene.as_dict(), "asked": prompt.as_dict()}))

    count = Counter()
    for path in tmp_path.glob("*.json"):
        shows, asks = json.loads(path.read_text()).values()
        same = {key: shows[key] == asks[key] for key in shows}
        count.update({name: same[name] for name in ("objects", "background", "style")})
        count["content"] += same["objects"] and same["background"]
        count["all"] += all(same.values())
    assert count == {"objects": 9, "background": 9, "style": 9, "content": 6, "all": 3}

    images = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))])
    measured = prompt_alignment(images, asked)
    assert {name: round(measured[name].value * 12) for name in count} == count
    assert measured["object_share"].value == 0.75


# ---------------------------------------------------------------------------------------------- distances


@pytest.fixture(scope="module")
def features():
    """Of three sets of images: noto, other noto and fluent, 120 each."""
    network = EfficientNetLite0()
    draws = {"reference": ("noto", 0), "noto": ("noto", 1), "fluent": ("fluent", 0)}
    return {name: extract(network, drawn(style, "val", 120, seed)) for name, (style, seed) in draws.items()}


def plain_frechet(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), the trace by the eigenvalues of A B."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(np.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def test_the_distance_is_frechets_on_features_of_saved_images(features, tmp_path):
    """The network called by hand on PNGs that were read back, and the formula in plain numpy."""
    network = EfficientNetLite0()

    def rows_from_disk(name, images):
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{name}{i:03}.png")
        arrays = np.stack([np.asarray(Image.open(path)) for path in sorted(tmp_path.glob(f"{name}*.png"))])
        with torch.no_grad():
            rows = network(torch.from_numpy(arrays).permute(0, 3, 1, 2), ["block10"])["block10"]
        np.save(tmp_path / f"{name}.npy", rows.double().numpy())
        return np.load(tmp_path / f"{name}.npy")

    images = drawn("fluent", "val", 120, seed=0)
    expected = plain_frechet(rows_from_disk("a", images), rows_from_disk("b", drawn("noto", "val", 120, seed=0)))
    assert compare(features["fluent"], features["reference"])["FD-EfficientNet-Lite0"].value == pytest.approx(
        expected, rel=1e-4
    )


def plainly_right(image: np.ndarray, scene: scenes.Scene) -> bool:
    """Whether an image shows its scene: every sprite compared with every window of each quarter, in numpy."""
    border = np.sort(np.concatenate([image[:2], image[-2:]]).reshape(-1, 3), axis=0)[(4 * 64 - 1) // 2]
    colours = {name: np.array(colour) for name, colour in scenes.BACKGROUNDS.items()}
    name = min(colours, key=lambda name: np.linalg.norm(border - colours[name]))
    left = np.pad((image - border.astype(float)) / 255, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    side = scenes.QUARTER + 2 * MARGIN
    seen = {
        place: plainly_seen(left[top : top + side, x : x + side], colours[name] / 255)
        for place, (top, x) in scenes.CORNERS.items()
    }
    wanted = {place: (scene.style, kind) for place, kind in scene.kinds.items()}
    return name == scene.background and {place: found for place, found in seen.items() if found != EMPTY} == wanted


def plainly_seen(quarter: np.ndarray, background: np.ndarray) -> tuple[str, str] | str | None:
    """Style and kind of what fits a quarter best, "empty", or None for something else.

    What of the quarter itself lies beside a sprite counts as its error.
    """
    errors, energies, inside = {}, [], np.zeros_like(quarter)
    inside[MARGIN:-MARGIN, MARGIN:-MARGIN] = quarter[MARGIN:-MARGIN, MARGIN:-MARGIN]
    for size, style in product(scenes.SIZES, scenes.STYLES):
        own = np.lib.stride_tricks.sliding_window_view(inside, (size, size, 3)).reshape(-1, size * size * 3)
        beside = (inside**2).sum() - (own**2).sum(1)
        windows = np.lib.stride_tricks.sliding_window_view(quarter, (size, size, 3)).reshape(-1, size * size * 3)
        for kind, rgba in zip(scenes.KINDS, scenes.sprites(style, size).astype(float), strict=True):
            drawn = rgba[..., :3] - rgba[..., 3:] * background
            for sprite in (drawn.ravel(), drawn[:, ::-1].ravel()):
                energies.append(float(sprite @ sprite))
                squares = beside + (windows**2).sum(1) - 2 * windows @ sprite + energies[-1]
                errors[style, kind] = min(errors.get((style, kind), np.inf), squares.min() / energies[-1])
    if (inside**2).sum() < Reader.empty * min(energies):
        return EMPTY
    best = min(errors, key=errors.get)
    return best if errors[best] <= Reader.tolerance else None


def test_the_numbers_of_a_run_follow_from_the_images_that_it_saved(bundle, tmp_path):
    """What the judge said of a sampler, counted and computed again by plain code from the file of its images."""
    prompts, real = scene_prompts("noto", "test", 10, seed=0), drawn("noto", "test", 150, seed=1)
    methods = {"teacher": Method(Sampler(4), bundle)}
    test = judge_methods(Judge(bundle, prompts, real), methods, [0], lambda pipe, _: pipe, tmp_path, "02_x")
    (said,), (images,) = test["teacher"], load_images(tmp_path, "02_x")["teacher"]
    images = images[:]

    count = sum(plainly_right(image, scene) for image, scene in zip(images, prompts.scenes, strict=True))
    assert said.counted.value == count / 10

    network = EfficientNetLite0()
    with torch.no_grad():
        rows, others = (
            network(torch.from_numpy(array).permute(0, 3, 1, 2), ["block10"])["block10"].double().numpy()
            for array in (images, real)
        )
    assert said.frechet_distance == pytest.approx(plain_frechet(rows, others), rel=1e-4)


def test_further_distances_are_those_of_each_seed_on_average():
    reference = drawn("noto", "val", 40, seed=0)
    seeds = [drawn("fluent", "val", 40, seed=i) for i in (1, 2)]
    rows = further_distances({"base": seeds}, reference, {"EfficientNet-Lite0": ""})
    by_metric = {row["metric"]: row for row in rows}
    network = EfficientNetLite0()
    features = [extract(network, images) for images in seeds]
    values = [compare(one, extract(network, reference))["KID-EfficientNet-Lite0"].value for one in features]
    found = by_metric["KID-EfficientNet-Lite0"]
    assert (found["value"], found["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (found["method"], found["n"], found["seeds"], found["reference_n"]) == ("base", 40, 2, 40)
    assert by_metric.keys() >= {"FD-EfficientNet-Lite0", "recall-EfficientNet-Lite0"}


def test_a_distance_to_a_fixed_reference_can_be_asked_again(features):
    distance = FrechetDistance(drawn("noto", "val", 30, seed=0))
    images = drawn("fluent", "val", 30, seed=0)
    expected = frechet_distance(features["fluent"].frechet[:30], features["reference"].frechet[:30])
    assert distance.name == "FD-EfficientNet-Lite0"
    assert distance(images) == pytest.approx(expected, rel=1e-3) and distance(images) == distance(images)
    assert distance(drawn("noto", "val", 30, seed=0)) == pytest.approx(0, abs=1e-3 * expected)


def test_the_reference_is_kept_on_disk_where_a_folder_is_given(tmp_path):
    images = drawn("noto", "val", 4, seed=0)
    assert FrechetDistance(images, cache_dir=tmp_path)(images) == FrechetDistance(images, cache_dir=tmp_path)(images)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_another_style_is_farther_than_the_floor_by_every_measure(features):
    floor = real_floor(features["noto"], features["reference"], count=100)
    other = compare(features["fluent"][:100], features["reference"])
    assert floor.keys() == other.keys() and all(score.count == 100 for score in floor.values())
    for name, score in other.items():
        farther = -1 if name.startswith(("precision", "recall")) else 1
        assert farther * score.value > farther * floor[name].value, name
    assert other["FD-EfficientNet-Lite0"].value > 1.5 * floor["FD-EfficientNet-Lite0"].value
    with pytest.raises(ValueError, match="floor at N = 121 needs as many real images beside the reference, got 120"):
        real_floor(features["noto"], features["reference"], count=121)


def test_every_score_has_its_extractor_in_its_name_and_its_n(features):
    scores = compare(features["noto"][:50], features["reference"], resamples=20)
    assert list(scores) == [f"{m}-EfficientNet-Lite0" for m in ("FD", "KID", "precision", "recall")]
    assert all(s.name == name and (s.count, s.reference_count) == (50, 120) for name, s in scores.items())
    for name in ("FD-EfficientNet-Lite0", "KID-EfficientNet-Lite0"):
        assert scores[name].low < scores[name].value < scores[name].high
    assert inception_score(features["noto"]).name == "IS-EfficientNet-Lite0"
    assert asdict(Score("FD", 1.0, 5)).keys() == {"name", "value", "count", "reference_count", "low", "high"}
    assert str(Score("FD-X", 6.54321, 50, 120, 5.0, 8.0)) == "FD-X 6.543 (5 to 8), N = 50"


def test_only_inceptions_distance_is_called_fid():
    assert [metric_name(m, "Inception") for m in ("FD", "KID", "IS", "precision")] == [
        *("FID", "KID", "IS"),
        "precision-Inception",
    ]
    assert metric_name("FD", "DINOv2") == "FD-DINOv2"


def test_the_kernel_distance_takes_the_head_and_manifolds_do_too(features):
    swapped = Features("EfficientNet-Lite0", features["fluent"].rows | {"block10": features["noto"].frechet})
    scores = compare(swapped, features["reference"])
    kernel = kernel_distance(features["fluent"].kernel, features["reference"].kernel)
    assert scores["KID-EfficientNet-Lite0"].value == pytest.approx(kernel)
    assert scores["FD-EfficientNet-Lite0"] == compare(features["noto"], features["reference"])["FD-EfficientNet-Lite0"]


def test_clips_embeddings_are_compared_by_cmmd():
    rows = {"image_embeds": torch.randn(9, 8, generator=torch.Generator().manual_seed(0))}
    other = {"image_embeds": -rows["image_embeds"]}
    scores = compare(Features("CLIP", rows), Features("CLIP", other), resamples=5)
    assert list(scores) == ["CMMD", "precision-CLIP", "recall-CLIP"] and scores["CMMD"].low < scores["CMMD"].high
    with pytest.raises(ValueError, match="features of CLIP cannot be compared with those of DINOv2"):
        compare(Features("CLIP", rows), Features("DINOv2", {"cls": rows["image_embeds"]}))


def test_clip_score_is_the_mean_cosine_of_images_and_captions(tmp_path):
    """On a CLIP with random weights, and the bundled pipeline's tokenizer, against the model called by hand."""
    torch.manual_seed(0)
    tokenizer = load_pipeline("bundled").tokenizer
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = size | {"image_size": 64, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.visual_projection.weight.data.neg_()  # with these weights the cosines are below 0
    model.save_pretrained(tmp_path)
    square = {"height": 64, "width": 64}
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=square), tokenizer)
    processor.save_pretrained(tmp_path)
    images, captions = (
        drawn("noto", "val", 3, seed=0),
        ["a lion at the upper left", "a crown", "on pink, an owl over a car"],
    )

    score = ClipCosine(captions, tmp_path, batch_size=2)(images)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model(**inputs)
    cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    assert score.value == pytest.approx(float(cosines.mean()), abs=1e-5) and score.count == 3
    assert (score.high - score.low) / 2 == pytest.approx(1.96 * float(cosines.std()) / 3**0.5, rel=1e-3)
    with pytest.raises(ValueError, match="3 images and 4 captions"):
        ClipCosine([*captions, "one more"], tmp_path)(images)


def test_clip_is_loaded_once_for_all_judges(tmp_path, monkeypatch):
    rehearsal.write_clip(tmp_path)
    first = ClipCosine(["a dog", "two children"], tmp_path)
    monkeypatch.setattr(metrics, "pretrained_clip", lambda source: pytest.fail("loaded again"))
    assert ClipCosine(["a bird"], tmp_path).model is first.model


# ---------------------------------------------------------------------------------------------- fidelity


def test_psnr_is_ten_log_of_the_squared_peak_over_the_error():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(images, images + 5) == pytest.approx(20 * np.log10(255 / 5)) and psnr(images, images) == float("inf")
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(images, images[:1])


def test_the_error_of_latents_is_the_mean_of_squares():
    latents = torch.arange(32.0).reshape(2, 4, 2, 2)
    assert latent_mse(latents, latents + 3) == pytest.approx(9)
    with pytest.raises(ValueError, match="differ in shape"):
        latent_mse(latents, latents[:1])


def test_fidelity_compares_with_the_teacher_image_by_image_and_as_a_set(features):
    teacher = drawn("noto", "val", 120, seed=0)
    images = np.clip(teacher.astype(int) + 4, 0, 255).astype(np.uint8)
    latents = torch.zeros(120, 4, 8, 8)
    scores = fidelity(images, teacher, features["noto"], features["reference"], latents, latents + 2)
    error = np.mean((images.astype(float) - teacher) ** 2)
    assert scores["PSNR to teacher"].value == pytest.approx(10 * np.log10(255**2 / error))
    assert scores["latent MSE to teacher"].value == 4
    expected = compare(features["noto"], features["reference"])["FD-EfficientNet-Lite0"].value
    assert scores["FD-EfficientNet-Lite0 to teacher"].value == expected
    assert all(score.count == 120 for score in scores.values())
