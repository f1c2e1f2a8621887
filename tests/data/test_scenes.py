"""The small world: scenes that are known exactly, captions that say what is there, a reader that sees it."""

import re

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lora_distill.data import scenes
from lora_distill.settings import PACKAGE

HELD_OUT = [s for s in scenes.sample_scenes("noto", "test", 4000, seed=0) if s.layout in scenes.held_out_layouts()]


@pytest.fixture(scope="module")
def clean():
    """2,000 scenes with held-out layouts, drawn."""
    assert len(HELD_OUT) == 2000
    return np.stack([scenes.draw(scene) for scene in HELD_OUT])


def all_right(images, shown=HELD_OUT):
    return scenes.agreement(scenes.Reader().read(images), shown)["all"].mean()


# ---------------------------------------------------------------------------------------------- the reader


def test_the_reader_reads_clean_renders(clean):
    assert all_right(clean) >= 0.99


def test_the_reader_reads_blurred_renders(clean):
    blurred = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.8))) for image in clean]
    assert all_right(np.stack(blurred)) >= 0.95


def test_the_reader_reads_noisy_renders(clean):
    noise = np.random.default_rng(0).normal(0, 8, clean.shape)
    assert all_right(np.clip(clean + noise, 0, 255).round().astype(np.uint8)) >= 0.95


@pytest.mark.parametrize("style", scenes.STYLES)
def test_the_reader_tells_the_styles_apart(style):
    shown = scenes.sample_scenes(style, "val", 200, seed=1)
    assert all_right(np.stack([scenes.draw(s) for s in shown]), shown) >= 0.99


def test_the_reader_sees_nothing_where_nothing_is():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    empty = np.full((1, 64, 64, 3), scenes.BACKGROUNDS["pink"], np.uint8)
    *noisy, plain = scenes.Reader().read(np.concatenate([noise, empty]))
    assert plain == scenes.Reading(background="pink")
    assert not any(reading.first or reading.second for reading in noisy)


def test_the_reader_is_not_content_with_another_scene(clean):
    assert all_right(clean[:500], HELD_OUT[1:501]) <= 0.01


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"background": "grey"}, {"background", "content"}),
        ({"style": "fluent"}, {"style"}),
        ({"axis": "vertical"}, {"relation", "content"}),
        ({"first": "bus", "second": "lion"}, {"relation", "content"}),
        ({"second": "owl"}, {"objects", "relation", "content"}),
    ],
)
def test_each_attribute_is_judged_for_itself(change, wrong):
    shown = scenes.Scene("noto", "pink", "lion", "bus", "horizontal", ((17, 32), (47, 32)))
    asked = scenes.Scene(**{**shown.as_dict(), **change})
    right = scenes.agreement(scenes.Reader().read(scenes.draw(shown)[None]), [asked])
    assert {name for name, values in right.items() if not values[0]} == wrong | {"all"}


# ---------------------------------------------------------------------------------------------- scenes and splits


def test_no_training_or_validation_image_shows_a_held_out_layout():
    for split in ("train", "val"):
        sampled = scenes.sample_scenes("noto", split, 3000, seed=0)
        assert not {scene.layout for scene in sampled} & scenes.held_out_layouts()


def test_one_layout_in_eight_is_held_out_and_half_of_the_test_scenes_show_one():
    assert len(scenes.held_out_layouts()) == len(scenes.layouts()) // 8 == 138
    test = scenes.sample_scenes("noto", "test", 1000, seed=0)
    assert sum(scene.layout in scenes.held_out_layouts() for scene in test) == 500


def test_a_seed_gives_the_same_scenes_and_a_longer_draw_starts_with_them():
    ten = scenes.sample_scenes("noto", "train", 10, seed=4)
    assert scenes.sample_scenes("noto", "train", 20, seed=4)[:10] == ten
    others = [("noto", "train", 5), ("noto", "val", 4), ("fluent", "train", 4)]
    assert all(scenes.sample_scenes(style, split, 10, seed) != ten for style, split, seed in others)


def test_sprites_stay_inside_the_image_and_apart():
    half = scenes.SPRITE_SIZE // 2
    for scene in scenes.sample_scenes("noto", "train", 2000, seed=0):
        (x0, y0), (x1, y1) = scene.positions
        assert all(half <= c <= scenes.IMAGE_SIZE - half for c in (x0, y0, x1, y1))
        assert (x1 - x0 if scene.axis == "horizontal" else y1 - y0) >= scenes.SPRITE_SIZE


def test_a_scene_survives_json():
    scene = scenes.sample_scenes("fluent", "val", 1, seed=0)[0]
    assert scenes.Scene.from_dict(scene.as_dict()) == scene


def test_the_sprite_sheet_is_small_and_its_licences_are_beside_it():
    assert (PACKAGE / "assets" / "sprites.png").stat().st_size < 0.6e6
    assert {path.name for path in (PACKAGE / "assets").glob("LICENSE*")} == {"LICENSE-noto.txt", "LICENSE-fluent.txt"}


def test_sizes_are_those_of_flickr():
    assert {size: sum(splits.values()) for size, splits in scenes.SPLIT_SIZES.items()} == {"8k": 8000, "30k": 31014}


# ---------------------------------------------------------------------------------------------- captions


def meaning(caption):
    """(background, first, second, axis) of a caption, by its words alone."""
    words = {word: kind for kind, names in scenes.KINDS.items() for word in names}
    kinds = [words[word] for word in re.findall(r"\w+", caption) if word in words]
    background = next(name for name in scenes.BACKGROUNDS if re.search(rf"\b{name}\b", caption))
    for axis, (forward, backward) in scenes.RELATIONS.items():
        if any(re.search(rf"\b{phrase}\b", caption) for phrase in forward):
            return background, kinds[0], kinds[1], axis
        if any(re.search(rf"\b{phrase}\b", caption) for phrase in backward):
            return background, kinds[1], kinds[0], axis
    raise AssertionError(caption)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_captions_say_what_the_scene_is(style):
    rng = np.random.default_rng(0)
    for scene in scenes.sample_scenes(style, "train", 500, seed=0):
        five = scenes.captions(scene, rng)
        assert len(set(five)) == 5
        assert {meaning(caption) for caption in five} == {(scene.background, scene.first, scene.second, scene.axis)}


def test_both_orders_and_every_word_come_up():
    rng = np.random.default_rng(0)
    text = " ".join(c for s in scenes.sample_scenes("noto", "train", 2000, seed=0) for c in scenes.captions(s, rng))
    wanted = [word for names in scenes.KINDS.values() for word in names]
    wanted += [phrase for ways in scenes.RELATIONS.values() for way in ways for phrase in way]
    assert not [phrase for phrase in wanted if not re.search(rf"\b{phrase}\b", text)]


def test_articles_fit_their_nouns():
    rng = np.random.default_rng(0)
    text = " ".join(c for s in scenes.sample_scenes("noto", "train", 2000, seed=0) for c in scenes.captions(s, rng))
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
