"""The judge: the same prompts and noise for every sampler, and what a training asks of it."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import moved

from lora_distill import processes, rehearsal
from lora_distill.adapters import adapter_parameters
from lora_distill.data.captioned import captioned_images
from lora_distill.data.teacher import scene_prompts
from lora_distill.judge.features import cached_features, extract, load_extractor
from lora_distill.judge.judge import Judge, Method, drawn, held_out, judge_for, judge_methods, load_images, looked_at
from lora_distill.judge.pictures import Pictures, batches, kept_pictures, slug
from lora_distill.judge.reader import judge_images
from lora_distill.sampling import Sampler
from lora_distill.settings import Settings


def test_the_first_images_of_a_judge_are_those_of_all(bundle):
    judge = Judge(bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1))
    first, everything = judge.images(Sampler(2), seed=0, count=2), judge.images(Sampler(2), seed=0)
    assert first.shape[0] == 2 and everything.shape[0] == 4
    assert abs(first.astype(int) - everything[:2]).max() <= 1, "a grey level, where rounding falls to the other side"
    assert (judge.images(Sampler(2), seed=0, count=9) == everything).all()


def test_milestones_are_the_judgement_of_the_student_on_seed_0(bundle):
    judge = Judge(bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1))
    steps, measure, key = judge.milestones(Sampler(2), [5, 10])
    assert key == judge.milestones(Sampler(2), [5, 10])[2] != judge.milestones(Sampler(3), [5, 10])[2]
    quality = judge(Sampler(2), seed=0)
    assert steps == [5, 10] and measure(100, bundle) == {
        "all_correct": quality.counted.value,
        "fit_error": quality.fit_error.mean(),
        "fd_efficientnet_lite0": quality.frechet_distance,
    }


def test_students_are_looked_at_early_regularly_and_at_the_end():
    settings = Settings(train_steps=130, eval_every=50)
    assert looked_at(settings) == [0, 5, 10, 20, 40, 50, 100, 130]
    assert looked_at(Settings(train_steps=20, eval_every=50)) == [0, 5, 10, 20]


def test_a_judgement_of_scenes_has_the_verdicts_of_one_reading_image_by_image(bundle):
    prompts = scene_prompts("noto", "val", 4, seed=0)
    judge = Judge(bundle, prompts, drawn("noto", "val", 20, seed=1), key="content")
    images = drawn("noto", "val", 4, seed=0)
    images[0] = 255
    quality, verdicts = judge.judge_images(images), judge_images(images, prompts.scenes)
    assert quality.right.tolist() == verdicts.right["content"].tolist() == [False, True, True, True]
    assert (quality.object_share == verdicts.object_share).all() and (quality.fit_error == verdicts.fit_error).all()
    assert quality.alignment["content"].value == 0.75
    half = 1.959964 * verdicts.fit_error.std(ddof=1) / 2
    score = quality.alignment["fit_error"]
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half))


# ---------------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("photographs")
    rehearsal.write_photographs(folder / "8k", "flickr8k", train=4, val=3, test=5)
    rehearsal.write_clip(folder / "clip")
    return Settings(data=str(folder / "8k"), clip=str(folder / "clip"), resolution=64, eval_batch=2)


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_held_out_of_photographs_are_captions_and_all_images_of_that_split(photographs, split):
    images = captioned_images(photographs.data, split)
    prompts, reference = held_out(photographs.data, split, 3, photographs)
    captions = {caption for five in images["captions"] for caption in five}
    assert prompts.scenes is None and set(prompts.captions) <= captions
    assert isinstance(reference, Pictures) and reference[:].shape == (len(images), 64, 64, 3)


def test_what_is_held_out_of_scenes_is_that_of_the_bundled_world_in_either_notation():
    settings = Settings(style="noto")
    prompts, reference = held_out("scenes", "val", 3, settings)
    assert prompts == scene_prompts("noto", "val", 3, 0) == held_out("scenes/noto/8k", "val", 3, settings)[0]
    assert (reference == drawn("noto", "val", 1000, seed=1)).all()


def test_photographs_are_judged_by_clip_and_without_one_by_their_distance(bundle, photographs, tmp_path):
    options = (photographs.data, "test", 3, "all", tmp_path)
    judge = judge_for(bundle, photographs, *options)
    quality = judge(Sampler(2), seed=0)
    assert (judge.key, quality.column, list(quality.alignment)) == ("clip", "clip_cosine", ["clip"])
    assert -1 < quality.counted.low < quality.counted.value < quality.counted.high < 1
    assert judge.milestones(Sampler(2), [5])[1](0, bundle).keys() == {"clip_cosine", "fd_efficientnet_lite0"}
    bare = judge_for(bundle, photographs.model_copy(update={"clip": ""}), *options)
    quality = bare(Sampler(2), seed=0)
    assert (bare.key, quality.column, quality.alignment) == ("", "fd_efficientnet_lite0", {})
    assert (quality.right, quality.object_share, quality.fit_error) == (None, None, None)
    assert quality.counted.value == quality.frechet_distance


def test_features_of_pictures_are_those_of_their_array(photographs, tmp_path):
    _, reference = held_out(photographs.data, "test", 3, photographs)
    network = load_extractor("EfficientNet-Lite0")
    plain = extract(network, reference[:], ["block10"]).frechet
    assert (cached_features(network, reference, tmp_path, ["block10"]).frechet == plain).all()
    reference.read = lambda number: pytest.fail("read")
    assert (cached_features(network, reference, tmp_path, ["block10"]).frechet == plain).all()


# ---------------------------------------------------------------------------------------------- pictures on disk


def grey(rows: slice) -> np.ndarray:
    return np.stack([np.full((4, 6, 3), number, np.uint8) for number in range(rows.start, rows.stop)])


def test_pictures_on_disk_are_those_that_were_made_and_are_read_in_batches(tmp_path):
    pictures = kept_pictures(tmp_path, "key", 5, 2, grey)
    assert (np.asarray(pictures) == grey(slice(0, 5))).all() and (pictures[-1] == 4).all() and len(pictures) == 5
    assert [len(batch) for batch in batches(pictures, 2)] == [2, 2, 1]


def test_a_cut_run_goes_on_at_the_first_missing_picture_and_another_key_makes_all_anew(tmp_path):
    made = []

    def make(rows):
        made.append((rows.start, rows.stop))
        return grey(rows)

    kept_pictures(tmp_path, "key", 5, 2, make)
    (tmp_path / "00003.png").unlink()
    kept_pictures(tmp_path, "key", 5, 2, make)
    assert made == [(0, 2), (2, 4), (4, 5), (2, 4)]
    kept_pictures(tmp_path, "other", 5, 5, make)
    assert made[-1] == (0, 5)


def test_two_processes_make_one_half_each(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(processes, "share", lambda items: items[1::2])
    with pytest.raises(FileNotFoundError, match=r"00000\.png: made by another process"):
        kept_pictures(tmp_path, "key", 4, 1, lambda rows: made.append(rows.start) or grey(rows))
    assert made == [1, 3]


def test_a_spoilt_picture_is_named(tmp_path):
    pictures = kept_pictures(tmp_path, "key", 2, 2, grey)
    (tmp_path / "00001.png").write_bytes((tmp_path / "00001.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"00001\.png: expected a whole picture; delete it"):
        pictures[:]


def test_judged_pictures_lie_in_a_folder_a_method_and_seed_and_come_back_in_their_order(bundle, tmp_path):
    judge = Judge(bundle, scene_prompts("noto", "val", 3, seed=0), drawn("noto", "val", 20, seed=1), batch_size=2)
    methods = {"teacher, two passes": Method(Sampler(2, 3.0), bundle), "base": Method(Sampler(2), bundle)}
    test = judge_methods(judge, methods, [0, 4], lambda pipe, adapter: pipe, tmp_path, "02_x")
    loaded = load_images(tmp_path, "02_x")
    assert list(loaded) == list(methods) and (tmp_path / "images/02_x/base/4/00002.png").exists()
    for name in methods:
        for pictures, quality in zip(loaded[name], test[name], strict=True):
            assert isinstance(quality.images, Pictures) and (pictures[:] == quality.images[:]).all()
    plain = judge.images(Sampler(2), 4)
    assert (np.asarray(PIL.Image.open(tmp_path / "images/02_x/base/4/00002.png")) == plain[2]).all()


def test_two_methods_never_share_a_folder():
    names = ["base, DDIM, 4 passes", "base DDIM 4 passes", "base-ddim-4-passes", "LCM-LoRA 8k", "lcm-lora 8k"]
    assert len({slug(name) for name in names}) == len(names)
    assert all(Path(slug(name)).name == slug(name) for name in [*names, "../x", "a/b"])


def test_pictures_that_were_made_anew_since_their_index_are_not_taken_for_those_of_the_index(bundle, tmp_path):
    judge = Judge(bundle, scene_prompts("noto", "val", 2, seed=0), drawn("noto", "val", 20, seed=1))
    methods = {"base": Method(Sampler(2), bundle)}
    judge_methods(judge, methods, [0], lambda pipe, adapter: pipe, tmp_path, "02_x")
    kept_pictures(tmp_path / "images/02_x/base/0", "of another training", 2, 2, grey)
    with pytest.raises(FileNotFoundError, match=r"base/0: not the pictures of 02_x_images\.json; .* makes both"):
        load_images(tmp_path, "02_x")


def test_an_adapter_that_is_on_is_in_the_key_of_what_it_drew(bundle, tmp_path):
    judge = Judge(bundle, scene_prompts("noto", "val", 2, seed=0), drawn("noto", "val", 20, seed=1))
    moved(bundle.unet, "student")
    first = judge.images(Sampler(2, adapter="student"), 0, folder=tmp_path)[:]
    with torch.no_grad():
        for p in adapter_parameters(bundle.unet, "student"):
            p.mul_(2)
    assert (judge.images(Sampler(2, adapter="student"), 0, folder=tmp_path)[:] != first).any()
