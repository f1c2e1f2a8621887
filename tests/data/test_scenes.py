"""The small world: scenes that are known exactly, captions that say what is there and where, splits, drawings."""

import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image

from lora_distill.data import scenes
from lora_distill.settings import PACKAGE

COUNT = 4_000


@pytest.fixture(scope="module", params=scenes.STYLES)
def sampled(request):
    """Training scenes of a style."""
    return scenes.sample_scenes(request.param, "train", COUNT, seed=0)


def objects(data):
    return [one for scene in data for one in scene.objects]


def near(count, total, share):
    """Within five standard deviations of a binomial."""
    return abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5


def even(values, options):
    """Whether each option comes up equally often, within five standard deviations."""
    counted = Counter(values)
    return counted.keys() == set(options) and all(near(n, len(values), 1 / len(options)) for n in counted.values())


# ---------------------------------------------------------------------------------------------- scenes


def test_each_object_lies_inside_a_quarter_of_its_own(sampled):
    corners = {"upper left": (0, 0), "upper right": (0, 32), "lower left": (32, 0), "lower right": (32, 32)}
    for scene in sampled:
        places = [one.place for one in scene.objects]
        assert 1 <= scene.count == len(set(places)) <= 4 and places == sorted(places, key=list(corners).index)
        for one in scene.objects:
            top, left = corners[one.place]
            assert top <= one.top and one.top + one.size <= top + 32
            assert left <= one.left and one.left + one.size <= left + 32


def test_no_kind_is_twice_in_a_scene(sampled):
    assert all(len({one.kind for one in scene.objects}) == scene.count for scene in sampled)


def test_kinds_places_backgrounds_sizes_and_sides_are_even(sampled):
    assert even([scene.background for scene in sampled], scenes.BACKGROUNDS)
    assert even([one.size for one in objects(sampled)], (20, 23, 26))
    assert even([one.mirrored for one in objects(sampled)], (False, True))
    allowed = set(product(scenes.KINDS, scenes.PLACES)) - scenes.held_out()
    assert even([(one.kind, one.place) for one in objects(sampled)], allowed)


def test_where_in_its_quarter_an_object_lies_is_even(sampled):
    for size in scenes.SIZES:
        found = [one for one in objects(sampled) if one.size == size]
        assert even([one.left % 32 for one in found], range(33 - size))
        assert even([one.top % 32 for one in found], range(33 - size))


def test_training_scenes_have_one_to_four_objects_in_the_stated_shares(sampled):
    counted = Counter(scene.count for scene in sampled)
    assert all(near(counted[n], COUNT, share) for n, share in {1: 0.15, 2: 0.25, 3: 0.3, 4: 0.3}.items())


def test_a_scene_survives_json():
    for scene in scenes.sample_scenes("fluent", "test", 8, seed=0):
        assert scenes.Scene.from_dict(scene.as_dict()) == scene


# ---------------------------------------------------------------------------------------------- splits


def test_one_object_and_place_in_eight_is_held_out():
    pairs = scenes.held_out()
    assert pairs < set(product(scenes.KINDS, scenes.PLACES)) and len(pairs) == 12 == 24 * 4 / 8
    assert len({kind for kind, _ in pairs}) == 12, "a kind misses one place at most"
    assert Counter(place for _, place in pairs) == dict.fromkeys(scenes.PLACES, 3)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("style", scenes.STYLES)
def test_no_training_or_validation_image_shows_what_is_held_out(style, seed):
    for split in ("train", "val"):
        data = scenes.sample_scenes(style, split, 1_000, seed)
        assert not {(one.kind, one.place) for one in objects(data)} & scenes.held_out()
        assert not any(scene.unseen for scene in data)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_test_scenes_have_each_number_of_objects_with_and_without_a_held_out_one_equally_often(style):
    data = scenes.sample_scenes(style, "test", 800, seed=0)
    strata = Counter(
        (scene.count, bool({(one.kind, one.place) for one in scene.objects} & scenes.held_out())) for scene in data
    )
    assert strata == dict.fromkeys(product((1, 2, 3, 4), (False, True)), 100)
    assert [scene.unseen for scene in data] == [index % 8 >= 4 for index in range(800)]
    assert [scene.count for scene in data] == [1 + index % 4 for index in range(800)]


def test_validation_scenes_have_each_number_of_objects_in_turns():
    assert [scene.count for scene in scenes.sample_scenes("noto", "val", 40, seed=0)] == [1, 2, 3, 4] * 10


def test_a_seed_gives_the_same_scenes_and_a_longer_draw_starts_with_them():
    ten = scenes.sample_scenes("noto", "train", 10, seed=4)
    assert scenes.sample_scenes("noto", "train", 20, seed=4)[:10] == ten
    others = [("noto", "train", 5), ("noto", "val", 4), ("fluent", "train", 4)]
    assert all(scenes.sample_scenes(style, split, 10, seed) != ten for style, split, seed in others)


def test_sizes_are_those_of_flickr():
    assert {size: sum(splits.values()) for size, splits in scenes.SPLIT_SIZES.items()} == {"8k": 8000, "30k": 31014}


# ---------------------------------------------------------------------------------------------- captions

NAMES = {word: kind for kind, words in scenes.KINDS.items() for word in words}
WHERE = {"top": "upper", "upper": "upper", "bottom": "lower", "lower": "lower"}


def meaning(caption):
    """Background and the kind at each place, by the words of a caption alone: kinds and places come in pairs."""
    words = re.findall(r"\w+", caption)
    (background,) = [word for word in words if word in scenes.BACKGROUNDS]
    kinds = [(i, NAMES[word]) for i, word in enumerate(words) if word in NAMES]
    places = [(i, f"{WHERE[word]} {words[i + 1]}") for i, word in enumerate(words) if word in WHERE]
    mentions = [what for _, what in sorted(kinds + places)]
    pairs = [mentions[i : i + 2] for i in range(0, len(mentions), 2)]
    found = {next(x for x in pair if x in scenes.PLACES): next(x for x in pair if x in scenes.KINDS) for pair in pairs}
    assert len(found) == len(pairs) == len(kinds) == len(places), caption
    return background, found


@pytest.mark.parametrize("style", scenes.STYLES)
def test_captions_name_every_object_and_its_place(style):
    rng = np.random.default_rng(0)
    for scene in scenes.sample_scenes(style, "train", 500, seed=0):
        five = scenes.captions(scene, rng)
        assert len(five) == len(set(five)) == 5
        for caption in five:
            assert meaning(caption) == (scene.background, {one.place: one.kind for one in scene.objects})


@pytest.mark.parametrize("style", scenes.STYLES)
def test_every_order_of_four_objects_and_every_word_come_up(style):
    rng = np.random.default_rng(0)
    data = scenes.sample_scenes(style, "train", 2000, seed=0)
    texts = [caption for scene in data for caption in scenes.captions(scene, rng)]
    orders = {tuple(meaning(text)[1]) for text in texts}
    assert len([order for order in orders if len(order) == 4]) == 24
    wanted = {word for words in (*scenes.KINDS.values(), *scenes.PLACES.values()) for word in words}
    assert not [phrase for phrase in wanted if not any(re.search(rf"\b{phrase}\b", text) for text in texts)]


def test_the_styles_have_habits_of_their_own():
    shared = set(scenes.TEMPLATES["noto"]) & set(scenes.TEMPLATES["fluent"])
    assert len(shared) == 3 and all(len(templates) == 5 for templates in scenes.TEMPLATES.values())
    assert scenes.PHRASES["noto"] != scenes.PHRASES["fluent"]


def test_articles_fit_their_nouns():
    rng = np.random.default_rng(0)
    text = " ".join(c for s in scenes.sample_scenes("noto", "train", 2000, seed=0) for c in scenes.captions(s, rng))
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


def test_words_that_no_caption_has_are_named_once():
    rng = np.random.default_rng(0)
    known = [c for style in scenes.STYLES for s in scenes.sample_scenes(style, "train", 200, 0)
             for c in scenes.captions(s, rng)]  # fmt: skip
    assert scenes.unknown_words(known) == []
    assert scenes.unknown_words(["A dog, left; a lion", "two dog above"]) == ["dog", "two", "above"]


# ---------------------------------------------------------------------------------------------- wrong captions


@pytest.mark.parametrize("error", [0.1, 0.2, 1.0])
def test_so_many_objects_are_named_wrongly_and_nothing_else_is(sampled, error):
    rng = np.random.default_rng(0)
    others = [scenes.mistaken(scene, error, rng) for scene in sampled]
    pairs = list(zip(objects(sampled), objects(others), strict=True))
    wrong = [(one, other) for one, other in pairs if one.kind != other.kind]
    assert near(len(wrong), len(pairs), 23 / 24 * error)
    assert {other.kind for _, other in wrong} == set(scenes.KINDS)
    for scene, other in zip(sampled, others, strict=True):
        assert (other.background, other.style) == (scene.background, scene.style)
        for a, b in zip(scene.objects, other.objects, strict=True):
            assert (a.place, a.size, a.mirrored, a.left, a.top) == (b.place, b.size, b.mirrored, b.left, b.top)


def test_the_share_of_scenes_without_an_error_falls_with_the_number_of_objects(sampled):
    """(1 - 23p/24)^n for n objects."""
    rng = np.random.default_rng(0)
    right = Counter(scene.count for scene in sampled if scenes.mistaken(scene, 0.1, rng).kinds == scene.kinds)
    total = Counter(scene.count for scene in sampled)
    assert all(near(right[n], total[n], (1 - 23 / 24 * 0.1) ** n) for n in (1, 2, 3, 4))


def test_each_caption_has_errors_of_its_own_and_without_any_none_has():
    data = [scene for scene in scenes.sample_scenes("noto", "train", 400, seed=0) if scene.count == 4]
    rng = np.random.default_rng(0)
    five = [[meaning(caption)[1] for caption in scenes.captions(scene, rng, 0.2)] for scene in data]
    wrong = [[found != scene.kinds for found in each] for each, scene in zip(five, data, strict=True)]
    assert any(0 < sum(each) < 5 for each in wrong)
    assert near(sum(map(sum, wrong)), 5 * len(wrong), 1 - (1 - 23 / 24 * 0.2) ** 4)
    clean, plain = (scenes.captions(data[0], np.random.default_rng(3), *error) for error in ((0.0,), ()))
    assert clean == plain


# ---------------------------------------------------------------------------------------------- drawing


def plainly_drawn(scene):
    """The image pixel by pixel: each sprite over what is there, by its transparency."""
    picture = [[[c / 255 for c in scenes.BACKGROUNDS[scene.background]] for _ in range(64)] for _ in range(64)]
    for one in scene.objects:
        sprite = scenes.sprites(scene.style, one.size)[list(scenes.KINDS).index(one.kind)].tolist()
        for y, x in product(range(one.size), range(one.size)):
            *colour, alpha = sprite[y][one.size - 1 - x if one.mirrored else x]
            pixel = picture[one.top + y][one.left + x]
            pixel[:] = [c + (1 - alpha) * below for c, below in zip(colour, pixel, strict=True)]
    return np.round(255 * np.array(picture)).clip(0, 255)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_a_drawing_is_its_sprites_on_its_background(style):
    data = scenes.sample_scenes(style, "test", 8, seed=5)
    assert {one.mirrored for one in objects(data)} == {False, True}
    for scene in data:
        drawn = scenes.draw(scene)
        assert (drawn.shape, drawn.dtype) == ((64, 64, 3), np.uint8)
        assert np.abs(drawn - plainly_drawn(scene)).max() <= 1, "a grey level, where rounding falls to the other side"


def test_sprites_are_the_tiles_of_the_sheet():
    """At the sheet's own size nothing is resized."""
    with Image.open(PACKAGE / "assets" / "sprites.png") as sheet:
        rgba = np.asarray(sheet.convert("RGBa")) / np.float32(255)
    side = rgba.shape[0] // 2
    assert rgba.shape == (2 * side, 24 * side, 4)
    for row, style in enumerate(scenes.STYLES):
        tiles = rgba[row * side : (row + 1) * side].reshape(side, 24, side, 4).swapaxes(0, 1)
        assert np.array_equal(scenes.sprites(style, side), tiles)


def test_the_fingerprint_changes_with_what_is_drawn_or_said(monkeypatch):
    first = scenes.drawing_fingerprint()
    assert scenes.drawing_fingerprint() == first
    monkeypatch.setattr(scenes, "SIZES", (20, 23))
    second = scenes.drawing_fingerprint()
    monkeypatch.setattr(scenes, "PHRASES", {})
    assert len({first, second, scenes.drawing_fingerprint()}) == 3


def test_the_sprite_sheet_is_small_and_its_licences_are_beside_it():
    assert (PACKAGE / "assets" / "sprites.png").stat().st_size < 0.6e6
    assert {path.name for path in (PACKAGE / "assets").glob("LICENSE*")} == {"LICENSE-noto.txt", "LICENSE-fluent.txt"}
