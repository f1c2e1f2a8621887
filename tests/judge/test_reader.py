"""The reader: it sees exactly what was drawn, says "something else" of what was not, and its verdicts count."""

import csv
from dataclasses import replace
from itertools import product

import campaign_reader
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from lora_distill.data import scenes
from lora_distill.data.scenes import KINDS, QUARTER, SIZES, STYLES, Object, Scene
from lora_distill.judge import eye
from lora_distill.judge.reader import (
    EMPTY,
    MARGIN,
    OTHER,
    WORST,
    Reader,
    Reading,
    asked,
    compare_readings,
    judge_images,
)

COUNT = 1_000  # drawn pictures of each style; tests/campaign_reader.py reads 5,000
CORNERS = {"upper left": (0, 0), "upper right": (0, 32), "lower left": (32, 0), "lower right": (32, 32)}
TRIO = Scene(
    "noto",
    "pink",
    (
        Object("lion", "upper left", 26, False, 3, 3),
        Object("bus", "upper right", 20, True, 38, 8),
        Object("owl", "lower right", 23, False, 36, 36),
    ),
)


@pytest.fixture(scope="module")
def reader():
    return Reader()


def drawn(data):
    return np.stack([scenes.draw(scene) for scene in data])


def painted(*parts, background="pink"):
    """A picture of sprites (h, w, 4), premultiplied, each at its (top, left)."""
    canvas = np.ones((64, 64, 3), np.float32) * np.float32(scenes.BACKGROUNDS[background]) / 255
    for sprite, top, left in parts:
        window = canvas[top : top + sprite.shape[0], left : left + sprite.shape[1]]
        window[:] = sprite[..., :3] + (1 - sprite[..., 3:]) * window
    return np.round(canvas * 255).clip(0, 255).astype(np.uint8)


def first_kinds(reader, pictures):
    """What the reader sees in the upper left quarter of pictures."""
    return np.array([reading.kinds[0] for reading in reader.read(np.stack(pictures))])


def blurred(images, radius):
    return np.stack([np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))) for image in images])


def noisy(images, sd):
    return np.clip(images + np.random.default_rng(0).normal(0, sd, images.shape), 0, 255).round().astype(np.uint8)


def shifted(images):
    """By one pixel down and to the right."""
    return np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), mode="edge")[:, :64, :64]


def quarter_turned(images):
    return np.rot90(images, axes=(1, 2)).copy()


# ---------------------------------------------------------------------------------------------- drawn pictures


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("style", STYLES)
def test_every_drawn_picture_is_read_as_it_was_drawn(reader, style, split):
    data = scenes.sample_scenes(style, split, COUNT // 2, seed=7)
    for scene, reading in zip(data, reader.read(drawn(data)), strict=True):
        assert (reading.background, reading.style, reading.kinds) == (scene.background, style, asked(scene))
        assert all(
            e < 5e-3 if kind != EMPTY else e == WORST for e, kind in zip(reading.errors, reading.kinds, strict=True)
        )


@pytest.mark.parametrize("change", [lambda x: blurred(x, 0.6), lambda x: noisy(x, 8), shifted])
def test_blur_noise_and_a_shift_leave_pictures_readable(reader, change):
    data = [scene for style in STYLES for scene in scenes.sample_scenes(style, "test", 100, seed=3)]
    assert judge_images(change(drawn(data)), data, reader).right["all"].mean() >= 0.99


def test_the_reader_is_not_content_with_another_scene(reader):
    data = scenes.sample_scenes("noto", "test", 201, seed=0)
    assert not judge_images(drawn(data[:-1]), data[1:], reader).right["all"].any()


# ---------------------------------------------------------------------------------------------- the search


def plain_blur(sprite, sd):
    """A Gaussian blur of (3, size, size), row by row and column by column; nothing is beyond the border."""
    at = torch.arange(sprite.shape[-1])
    weights = (-0.5 * ((at[:, None] - at) / sd).square()).exp()
    kernel = (-0.5 * (torch.arange(-(len(at) // 2), len(at) // 2 + 1) / sd).square()).exp().sum()
    near = (at[:, None] - at).abs() <= len(at) // 2
    weights = weights * near / kernel
    return weights @ sprite @ weights.T


def plain_errors(quarter, background):
    """The least squared error of each sprite, (style, kind), and it as a share of the sprite's detail.

    Tried at every size, side and pixel of a padded quarter. What counts is the squared difference over the quarter
    itself and over what of the sprite lies outside it.
    """
    inner = torch.zeros_like(quarter[:1])
    inner[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = 1
    errors = {}
    for size in SIZES:
        windows, inside = (x.unfold(1, size, 1).unfold(2, size, 1).permute(1, 2, 0, 3, 4).flatten(2)
                           for x in (quarter, inner.expand(3, -1, -1)))  # fmt: skip
        around = (quarter * inner).square().sum() - (windows * inside).square().sum(2)  # of the quarter, not the window
        for style in STYLES:
            for kind, rgba in zip(KINDS, torch.from_numpy(scenes.sprites(style, size)), strict=True):
                sprite = (rgba[..., :3] - rgba[..., 3:] * background).permute(2, 0, 1)
                detail = (sprite - plain_blur(sprite, size / 8)).square().sum()
                for side in (sprite, sprite.flip(2)):
                    error = (around + (windows - side.flatten()).square().sum(2)).min()
                    found = float(error), float(error / detail)
                    errors[style, kind] = min(errors.get((style, kind), (torch.inf, torch.inf)), found)
    return errors


@pytest.mark.parametrize("change", ["drawn", "blurred", "noisy", "shifted", "turned"])
def test_the_search_finds_what_trying_everything_finds(reader, change):
    data = [scene for style in STYLES for scene in scenes.sample_scenes(style, "test", 8, seed=11)][1::2]
    changes = {"drawn": lambda x: x, "blurred": lambda x: blurred(x, 1), "noisy": lambda x: noisy(x, 20),
               "shifted": shifted, "turned": quarter_turned}  # fmt: skip
    images = changes[change](drawn(data))
    for image, reading in zip(images, reader.read(images), strict=True):
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        colour = torch.cat([pixels[:, :2].flatten(1), pixels[:, -2:].flatten(1)], dim=1).median(dim=1).values
        left = torch.nn.functional.pad((pixels - colour[:, None, None]) / 255, (MARGIN,) * 4)
        background = torch.tensor(scenes.BACKGROUNDS[reading.background]) / 255
        for (top, x), kind, error in zip(CORNERS.values(), reading.kinds, reading.errors, strict=True):
            quarter = left[:, top : top + QUARTER + 2 * MARGIN, x : x + QUARTER + 2 * MARGIN]
            if kind != EMPTY:
                everything = plain_errors(quarter, background)
                best = min(everything, key=everything.get)
                found = everything[best][1] <= reader.tolerance
                assert kind == (best[1] if found else OTHER)
                assert error == pytest.approx(everything[best][1], abs=1e-2) if found else error > reader.tolerance


# ---------------------------------------------------------------------------------------------- something else


def sprite_of(style, kind, size=26):
    return scenes.sprites(style, size)[list(KINDS).index(kind)]


PAIRS = [(a, b) for a, b in product(KINDS, KINDS) if a != b][::7]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_an_empty_picture_is_empty(reader, style, background):
    (reading,) = reader.read(painted(background=background)[None])
    assert reading == Reading(background, None, (EMPTY,) * 4, (WORST,) * 4)


def test_a_background_of_another_colour_is_none_and_nothing_is_read_on_it(reader):
    pictures = np.stack(
        [np.full((64, 64, 3), colour, np.uint8) for colour in [(255, 0, 0), (0, 0, 0), (255, 255, 255)]]
    )
    assert reader.read(pictures) == [Reading()] * 3
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    assert all(not set(reading.kinds) & set(KINDS) for reading in reader.read(noise))


@pytest.mark.parametrize("style", STYLES)
def test_two_objects_that_overlap_in_one_quarter_are_something_else(reader, style):
    pictures = [painted((sprite_of(style, a, 20), 0, 0), (sprite_of(style, b, 20), 12, 12)) for a, b in PAIRS]
    assert (first_kinds(reader, pictures) == OTHER).mean() >= 0.85


@pytest.mark.parametrize("style", STYLES)
def test_an_object_that_is_there_twice_is_something_else(reader, style):
    pictures = [painted((sprite_of(style, kind, 20), 0, 0), (sprite_of(style, kind, 20), 11, 9)) for kind in KINDS]
    assert (first_kinds(reader, pictures) == OTHER).mean() >= 0.85


@pytest.mark.parametrize("style", STYLES)
def test_the_half_of_an_object_is_something_else(reader, style):
    pictures = [painted((sprite_of(style, kind)[:, :13], 3, 3)) for kind in KINDS]
    assert (first_kinds(reader, pictures) == OTHER).mean() >= 0.9


@pytest.mark.parametrize("style", STYLES)
def test_two_halves_that_are_not_of_one_object_are_something_else(reader, style):
    joined = [np.concatenate([sprite_of(style, a)[:, :13], sprite_of(style, b)[:, 13:]], axis=1) for a, b in PAIRS]
    assert (first_kinds(reader, [painted((sprite, 3, 3)) for sprite in joined]) == OTHER).mean() >= 0.7


@pytest.mark.parametrize("style", STYLES)
def test_a_melted_object_has_a_greater_error_the_more_it_is_melted(reader, style):
    pictures = np.stack([painted((sprite_of(style, kind), 3, 3)) for kind in KINDS])
    errors = np.array([[r.errors[0] for r in reader.read(blurred(pictures, radius))] for radius in (0.5, 1, 2, 3)])
    assert (np.diff(errors.mean(1)) > 0).all() and (errors[-1] > errors[0]).all()


@pytest.mark.parametrize("style", STYLES)
def test_objects_in_other_colours_are_something_else(reader, style):
    """A third style: what is light becomes dark."""
    inverted = [np.concatenate([s[..., 3:] - s[..., :3], s[..., 3:]], 2) for s in (sprite_of(style, k) for k in KINDS)]
    pictures = [painted((sprite, 3, 3), background=name) for sprite in inverted for name in scenes.BACKGROUNDS]
    assert (first_kinds(reader, pictures) == OTHER).all()


def test_a_picture_of_both_styles_has_none(reader):
    picture = painted((sprite_of("noto", "lion"), 3, 3), (sprite_of("fluent", "bus"), 35, 35))
    (reading,) = reader.read(picture[None])
    assert (reading.style, reading.kinds) == (None, ("lion", EMPTY, EMPTY, "bus"))


def test_what_is_something_else_has_no_part_in_the_style(reader):
    half = sprite_of("fluent", "crown")[:, :13]
    (reading,) = reader.read(painted((sprite_of("noto", "lion"), 3, 3), (half, 35, 35))[None])
    assert (reading.style, reading.kinds) == ("noto", ("lion", EMPTY, EMPTY, OTHER))


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
def test_no_sprite_is_so_faint_that_its_quarter_is_empty(reader, background):
    pictures = [
        painted((sprite_of(style, kind, 20), 6, 6), background=background) for style in STYLES for kind in KINDS
    ]
    assert first_kinds(reader, pictures).tolist() == [*KINDS, *KINDS]


def test_pictures_are_read_one_by_one_whatever_the_batch(reader):
    images = noisy(drawn(scenes.sample_scenes("noto", "test", 9, seed=2)), 10)
    one, other = reader.read(images), reader.read(torch.from_numpy(images), batch_size=2)
    assert [replace(r, errors=()) for r in one] == [replace(r, errors=()) for r in other]
    assert np.allclose([r.errors for r in one], [r.errors for r in other], atol=1e-5)


# ---------------------------------------------------------------------------------------------- against the eye


@pytest.fixture(scope="module")
def labels():
    return {name: campaign_reader.read_labels(name=name) for name in campaign_reader.EYES}


@pytest.fixture(scope="module")
def confusion():
    return campaign_reader.confusion()


@pytest.fixture(scope="module")
def agreement(confusion):
    return {(row["eye"], row["tolerance"]): row for row in eye.shares(confusion)}


def test_the_committed_confusion_table_follows_from_the_pictures_and_their_labels(confusion):
    with (campaign_reader.FOLDER / "confusion.csv").open(encoding="utf-8") as file:
        committed = list(csv.DictReader(file))
    assert committed == [{name: str(value) for name, value in row.items()} for row in confusion]


def test_200_pictures_of_eight_samplers_are_labelled_by_two(labels):
    assert [len(rows) for rows in labels.values()] == [200, 200]
    assert len({row["sampler"] + row["steps"] + row["w"] for row in labels["first"]}) == 8


def test_the_reader_finds_more_objects_right_than_the_stricter_eye_and_fewer_than_the_other(agreement):
    first, second = (agreement[name, Reader.tolerance] for name in campaign_reader.EYES)
    assert second["labelled"] < second["reader"] == first["reader"] < first["labelled"]


def test_no_other_tolerance_agrees_much_better_with_both_eyes(agreement):
    alike = {t: np.mean([agreement[name, t]["alike"] for name in campaign_reader.EYES]) for t in eye.TOLERANCES}
    assert alike[Reader.tolerance] > max(alike.values()) - 0.02


def test_a_confusion_table_counts_every_quarter():
    """The upper right one is found with the second tolerance and not with the first."""
    first, second = Reader.tolerance, eye.TOLERANCES[eye.TOLERANCES.index(Reader.tolerance) + 1]
    errors = (0.0, (first + second) / 2, WORST, 0.0)
    labels = {"upper left": "right", "upper right": "melted", "lower left": "empty", "lower right": "wrong"}
    labels |= {f"asked {place}": kind for place, kind in zip(CORNERS, ("lion", "bus", EMPTY, "owl"), strict=True)}
    readings = [Reading("pink", "noto", ("lion", "bus", EMPTY, "frog"), errors)]
    table = eye.confusion(readings, {"first": [labels]})
    strict, loose = (eye.matrix(table, tolerance) for tolerance in (first, second))
    assert [row["label"] for row in strict] == ["right", "melted", "wrong", "empty"]
    counted = [{(row["label"], name) for row in rows for name in eye.ANSWERS if row[name]} for rows in (strict, loose)]
    always = {("right", "right"), ("wrong", "another object"), ("empty", EMPTY)}
    assert counted == [always | {("melted", OTHER)}, always | {("melted", "right")}]
    shares = {row["tolerance"]: row for row in eye.shares(table)}
    expected = {"eye": "first", "tolerance": first, "labelled": 1 / 3, "reader": 1 / 3, "alike": 1, "n": 3}
    assert shares[first] == expected and shares[second]["reader"] == shares[second]["alike"] == 2 / 3
    said = "The reader refuses 0 of 1 right ones and takes for right 0 of 1 melted, 0 of 1 wrong."
    assert eye.in_words(table).endswith(said)


def test_on_a_background_that_is_not_known_no_quarter_has_an_answer():
    labels = [{place: "right" for place in CORNERS} | {f"asked {place}": "lion" for place in CORNERS}]
    (row,) = eye.matrix(eye.confusion([Reading()], {"first": labels}))
    assert row["background unknown"] == 4


def test_eyes_agree_where_both_or_neither_find_an_object_right():
    one, other = (
        [dict(zip(CORNERS, labels, strict=True))]
        for labels in (("right", "melted", "wrong", "empty"), ("right", "wrong", "right", "empty"))
    )
    assert eye.eyes_alike(one, other) == 2 / 3


def test_sheets_give_their_pictures_back(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    campaign_reader.draw_sheet(images, ["a lion at the upper left, pink"] * 20, 40).save(tmp_path / "sheet_01.png")
    assert np.array_equal(campaign_reader.read_sheets(tmp_path), images)


# ---------------------------------------------------------------------------------------------- verdicts


def test_what_is_asked_of_a_scene_is_said_quarter_by_quarter():
    assert asked(TRIO) == ("lion", "bus", EMPTY, "owl")


@pytest.mark.parametrize(
    ("change", "wrong", "share"),
    [
        ({}, set(), 1),
        ({"background": "grey"}, {"background", "content"}, 1),
        ({"background": None}, {"background", "content"}, 1),
        ({"style": "fluent"}, {"style"}, 1),
        ({"style": None}, {"style"}, 1),
        ({"kinds": ("lion", "bus", EMPTY, "frog")}, {"objects", "content"}, 2 / 3),
        ({"kinds": ("bus", "lion", EMPTY, "owl")}, {"objects", "content"}, 1 / 3),
        ({"kinds": ("lion", "bus", "crown", "owl")}, {"objects", "content"}, 1),
        ({"kinds": ("lion", "bus", OTHER, "owl")}, {"objects", "content"}, 1),
        ({"kinds": ("lion", EMPTY, EMPTY, OTHER)}, {"objects", "content"}, 1 / 3),
    ],
)
def test_each_attribute_is_judged_for_itself(change, wrong, share):
    reading = Reading(**{"background": "pink", "style": "noto", "kinds": asked(TRIO), **change})
    verdicts = compare_readings([reading], [TRIO])
    assert {name for name, values in verdicts.right.items() if not values[0]} == wrong | ({"all"} if wrong else set())
    assert verdicts.object_share[0] == pytest.approx(share)


def test_the_error_is_the_mean_of_the_quarters_that_should_have_an_object():
    scores = compare_readings(
        [Reading(errors=(0.1, 0.5, 9.0, 7.0)), Reading(errors=(0.2, 0.3, 0.0, 0.4))], [TRIO, TRIO]
    )
    assert scores.fit_error == pytest.approx([(0.1 + 0.5 + WORST) / 3, 0.3])


def test_verdicts_of_pictures_are_those_of_their_readings(reader):
    data = scenes.sample_scenes("fluent", "test", 16, seed=1)
    images = drawn([*data[:8], *data[:8]])
    one, other = judge_images(images, data, reader), compare_readings(reader.read(images), data)
    assert {name: values.tolist() for name, values in one.right.items()} == {
        name: values.tolist() for name, values in other.right.items()
    }
    assert one.right["all"].tolist() == [True] * 8 + [False] * 8
    assert (one.object_share == other.object_share).all() and (one.fit_error == other.fit_error).all()


def test_of_no_pictures_there_are_no_verdicts():
    verdicts = compare_readings([], [])
    assert verdicts.right["all"].shape == verdicts.object_share.shape == verdicts.fit_error.shape == (0,)


def test_pictures_and_scenes_come_in_pairs():
    with pytest.raises(ValueError, match="zip"):
        compare_readings([Reading()], [TRIO, TRIO])
