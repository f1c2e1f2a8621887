"""Encoded images: equal to what VAE and text encoder say, random in every draw, made again when they must be."""

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers.models.autoencoders.vae import Encoder
from transformers import CLIPTextModel

from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import (
    LEFT_OR_RIGHT,
    Framing,
    caption_dropout,
    encode_images,
    first_images,
    image_batches,
    views,
)
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.train.step import step_generator

COUNT = 6
SQUARE = Framing(64)
MIRRORED = Framing(64, mirror=True)


@pytest.fixture(scope="module")
def bundle():
    return load_pipeline("bundled")


def captions(number: int) -> list[str]:
    return [f"a lion and {number} apples", "an owl at the top left", "a red bus"][: 1 + number % 3]


def captioned(pictures: list[PIL.Image.Image]) -> Dataset:
    rows = [
        {"id": str(i), "image": picture, "captions": captions(i), "split": "train"}
        for i, picture in enumerate(pictures)
    ]
    text = Value("string")
    return Dataset.from_list(
        rows, features=Features({"id": text, "image": Image(), "captions": List(text), "split": text})
    )


def photograph(seed: int, width: int = 100, height: int = 70) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def dataset():
    return captioned([photograph(seed) for seed in range(COUNT)])


@pytest.fixture
def encoded(bundle, dataset, tmp_path):
    """Encode the six images in some framing."""
    return lambda framing: encode_images(bundle, dataset, framing, tmp_path / "cache", batch_size=4)


@torch.no_grad()
def posterior(bundle, pixels):
    return bundle.vae.encode(pixels[None]).latent_dist


def draws(encoded, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return image_batches(encoded, 1000)(0, size, torch.Generator().manual_seed(seed))


class TestViews:
    def test_the_centre_of_the_image_at_its_shorter_side(self):
        picture = photograph(0, 96, 64)
        expected = np.array(picture)[:, 16:80].transpose(2, 0, 1) / 127.5 - 1
        assert np.allclose(views(picture, SQUARE, 0)[0, 0], expected, atol=1e-6)

    @pytest.mark.parametrize(("width", "height"), [(100, 70), (70, 100), (64, 64), (30, 50), (500, 333), (333, 500)])
    def test_any_shape_becomes_the_square(self, width, height):
        shape = views(photograph(0, width, height), Framing(64, random_crops=3, mirror=True), 0).shape
        assert shape == (3, 2, 3, 64, 64)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "CMYK", "P", "1", "YCbCr"])
    def test_any_mode_becomes_the_colours_that_it_shows(self, mode):
        picture = photograph(0).convert(mode)
        colour = views(picture.convert("RGB"), SQUARE, 0)
        assert torch.equal(views(picture, SQUARE, 0), colour) and colour.shape == (1, 1, 3, 64, 64)
        grey = mode in ("L", "LA", "1")
        assert torch.equal(colour[0, 0, 0], colour[0, 0, 2]) is grey, "grey stays grey, colour stays colour"

    @pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "F of 255", "F of 65535"])
    def test_a_ramp_of_16_bits_or_floats_stays_a_ramp(self, mode, tmp_path):
        ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
        kinds = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}
        top = float(mode.partition(" of ")[2] or (1 if mode == "F" else 65535))
        picture = PIL.Image.fromarray((ramp * top).astype(kinds.get(mode, "<f4")))
        assert picture.mode == mode.partition(" ")[0]
        assert np.allclose(views(picture, SQUARE, 0)[0, 0, 1].numpy(), ramp * 2 - 1, atol=1 / 127)

    def test_a_16_bit_png_stays_a_ramp(self, tmp_path):
        ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
        PIL.Image.fromarray(ramp).save(tmp_path / "ramp.png")
        with PIL.Image.open(tmp_path / "ramp.png") as picture:
            assert np.allclose(views(picture, SQUARE, 0)[0, 0, 1].numpy(), ramp / 32767.5 - 1, atol=1 / 127)

    def test_numbers_in_no_known_range_are_refused(self):
        with pytest.raises(ValueError, match=r"values lie between -1 and 1, in none of the ranges 0 to 1, 255 and"):
            views(PIL.Image.fromarray(np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)), SQUARE, 0)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L"])
    def test_what_is_transparent_is_white_whatever_colour_hides_there(self, mode):
        """Half is clear and hides magenta or grey, half is opaque."""
        grey = mode in ("LA", "L")
        clear, opaque = ((99,) * 3, (10,) * 3) if grey else ((255, 0, 255), (51, 102, 153))
        picture = PIL.Image.new("RGBA", (64, 64), (*clear, 0))
        picture.paste((*opaque, 255), (0, 0, 32, 64))
        if mode in ("RGBA", "LA", "PA"):
            picture = picture.convert(mode)
        else:  # a colour, or an entry of the palette, that counts as transparent
            picture = picture.convert("RGB").convert(mode)
            picture.info["transparency"] = picture.getpixel((63, 0))
        found = (views(picture, SQUARE, 0)[0, 0] + 1) * 127.5
        assert torch.allclose(found[:, 32, 5], torch.tensor(opaque).float(), atol=0.5)
        assert torch.allclose(found[:, 32, 60], torch.full((3,), 255.0), atol=0.5)

    def test_half_transparent_is_half_way_to_white(self):
        found = views(PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 128)), SQUARE, 0)
        assert torch.allclose(found, torch.full_like(found, 127 / 127.5 - 1), atol=0.01)

    def test_a_photograph_stands_as_its_camera_was_held(self):
        picture = photograph(0, 100, 70)
        picture.getexif()[0x0112] = 6  # a quarter turn
        turned = photograph(0, 100, 70).transpose(PIL.Image.Transpose.ROTATE_270)
        assert torch.equal(views(picture, SQUARE, 0), views(turned, SQUARE, 0))

    def test_the_second_view_is_the_first_one_mirrored(self):
        plain, mirrored = views(photograph(0), MIRRORED, 0)[0]
        assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)

    def test_random_crops_are_places_of_the_image_the_same_in_every_run(self):
        framing = Framing(64, random_crops=4)
        whole = np.array(photograph(0, 96, 64)).transpose(2, 0, 1) / 127.5 - 1
        crops = views(photograph(0, 96, 64), framing, 0)[:, 0]
        for crop in crops:
            assert any(np.allclose(crop, whole[:, :, x : x + 64], atol=1e-6) for x in range(33))
        assert len({crop.numpy().tobytes() for crop in crops}) > 1
        assert torch.equal(crops, views(photograph(0, 96, 64), framing, 0)[:, 0])
        assert not torch.equal(crops, views(photograph(0, 96, 64), framing, 1)[:, 0]), "other places in another image"


class TestEncoding:
    def test_mean_and_log_variance_are_those_of_the_vae(self, bundle, dataset, encoded):
        stored = encoded(MIRRORED).posteriors
        assert stored.shape == (COUNT, 1, 2, 2, 4, 8, 8) and stored.dtype == np.float16
        for number in range(COUNT):
            plain = views(dataset[number]["image"], SQUARE, number)[0, 0]
            for side, pixels in enumerate((plain, plain.flip(-1))):
                expected = posterior(bundle, pixels)
                mean, logvar = torch.tensor(stored[number, 0, side]).float()
                assert torch.allclose(mean, expected.mean[0], atol=5e-3)
                assert torch.allclose(logvar, expected.logvar[0], atol=1e-2)

    def test_mirrored_latents_are_not_latents_mirrored(self, encoded):
        """Why both are encoded: a convolutional VAE is not exactly symmetric."""
        plain, mirrored = encoded(MIRRORED).posteriors[:, 0, :, 0].swapaxes(0, 1)
        assert np.abs(mirrored - plain[..., ::-1]).mean() > 0.1

    def test_every_caption_is_embedded_with_its_image(self, bundle, encoded):
        found = encoded(SQUARE)
        assert found.first_caption.tolist() == [0, 1, 3, 6, 7, 9, 12]
        for number in range(COUNT):
            own = found.prompt_embeds[found.first_caption[number] : found.first_caption[number + 1]]
            assert torch.allclose(torch.tensor(own).float(), encode_prompts(bundle, captions(number)), atol=5e-3)

    def test_a_batch_more_or_less_changes_nothing(self, bundle, dataset, encoded, tmp_path):
        at_once = encode_images(bundle, dataset, SQUARE, tmp_path / "other", batch_size=COUNT)
        assert np.allclose(encoded(SQUARE).posteriors, at_once.posteriors, atol=5e-3)

    def test_scenes_are_encoded_like_any_other(self, bundle, tmp_path):
        some = captioned_images("scenes/fluent/8k", "val", cache_dir=tmp_path / "scenes").select(range(3))
        batch = draws(encode_images(bundle, some, SQUARE, tmp_path), 4)
        assert batch["latents"].shape == (4, 4, 8, 8) and batch["prompt_embeds"].shape[0] == 4

    def test_a_resolution_that_the_vae_cannot_shrink_is_refused(self, encoded):
        with pytest.raises(ValueError, match="resolution: expected a multiple of 8 for this VAE, got 60"):
            encoded(Framing(60))

    def test_values_beyond_float16_are_refused_and_leave_no_file(self, dataset, tmp_path):
        pipe = load_pipeline("bundled")
        pipe.vae.quant_conv.bias.fill_(1e6)
        with pytest.raises(ValueError, match=r"posteriors-\w+.npy: values that float16 cannot hold"):
            encode_images(pipe, dataset, SQUARE, tmp_path)
        assert not list(tmp_path.iterdir())


class TestCache:
    def test_a_cut_encoding_goes_on_at_the_next_batch(self, bundle, dataset, tmp_path, monkeypatch):
        """Cut in the second of two batches of images, then in the captions."""
        encode, sizes = bundle.vae.encode, []

        def cut_at(number):
            def counted(pixels):
                if len(sizes) == number:
                    raise KeyboardInterrupt
                sizes.append(len(pixels))
                return encode(pixels)

            monkeypatch.setattr(bundle.vae, "encode", counted)
            return encode_images(bundle, dataset, SQUARE, tmp_path / "cut", batch_size=4)

        with pytest.raises(KeyboardInterrupt):
            cut_at(1)
        found = cut_at(None)
        assert sizes == [4, 2]
        monkeypatch.undo()
        whole = encode_images(bundle, dataset, SQUARE, tmp_path / "whole", batch_size=4)
        assert np.array_equal(found.posteriors, whole.posteriors)
        assert np.array_equal(found.prompt_embeds, whole.prompt_embeds)

    def test_another_pillow_and_other_merges_are_encoded_anew(self, dataset, tmp_path, made, monkeypatch):
        pipe = load_pipeline("bundled")
        encode_images(pipe, dataset, SQUARE, tmp_path)
        made.clear()
        monkeypatch.setattr(PIL, "__version__", "0.0")
        encode_images(pipe, dataset, SQUARE, tmp_path)
        assert made == ["posteriors"]
        pipe.tokenizer.add_tokens(["bicycle"])
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
        encode_images(pipe, dataset, SQUARE, tmp_path)
        assert made == ["posteriors", "captions"]

    def test_an_image_that_cannot_be_read_is_named(self, bundle, dataset, tmp_path, monkeypatch):
        def explode(*_):
            raise PIL.Image.DecompressionBombError("Image size exceeds limit")

        monkeypatch.setattr("lora_distill.data.encoded.upright_rgb", explode)
        with pytest.raises(ValueError, match=r"^image 0 cannot be read: Image size exceeds limit$"):
            encode_images(bundle, dataset, SQUARE, tmp_path)

    @pytest.fixture
    def made(self, monkeypatch):
        """What has been encoded so far: "posteriors" and "captions", a word each time, in turn."""
        calls = []

        def count(module, word):
            forward = module.forward

            def counted(self, *args, **kwargs):
                calls.extend([word] if calls[-1:] != [word] else [])  # batches of one encoding count once
                return forward(self, *args, **kwargs)

            monkeypatch.setattr(module, "forward", counted)

        count(Encoder, "posteriors")
        count(CLIPTextModel, "captions")
        return calls

    def test_a_second_time_nothing_is_encoded(self, encoded, made):
        one, two = encoded(MIRRORED), encoded(MIRRORED)
        assert made == ["posteriors", "captions"]
        assert np.array_equal(one.posteriors, two.posteriors) and np.array_equal(one.prompt_embeds, two.prompt_embeds)
        assert isinstance(two.posteriors, np.memmap), "read from disk where it is indexed"

    @pytest.mark.parametrize(
        "framing", [MIRRORED, Framing(32), Framing(64, random_crops=1), Framing(64, random_crops=2)], ids=repr
    )
    def test_another_framing_is_encoded_for_itself(self, encoded, made, framing):
        encoded(SQUARE)
        made.clear()
        encoded(framing)
        assert made == ["posteriors"]

    def test_other_images_captions_and_weights_are_encoded_anew(self, bundle, dataset, tmp_path, made):
        def encode(pipe, images):
            made.clear()
            encode_images(pipe, images, SQUARE, tmp_path)
            return made.copy()

        encode(bundle, dataset)
        assert encode(bundle, captioned([photograph(seed) for seed in range(1, COUNT + 1)])) == ["posteriors"]
        other_words = dataset.map(lambda row: {"captions": [caption + " ." for caption in row["captions"]]})
        assert encode(bundle, other_words) == ["captions"]
        assert encode(bundle, dataset.select(range(3))) == ["posteriors", "captions"]

        changed = load_pipeline("bundled")
        with torch.no_grad():
            changed.unet.conv_in.bias += 1
            assert encode(changed, dataset) == [], "latents and embeddings do not depend on the UNet"
            changed.vae.encoder.conv_in.bias += 0.01
            assert encode(changed, dataset) == ["posteriors"]
            next(changed.text_encoder.parameters()).add_(0.01)
            assert encode(changed, dataset) == ["captions"]

    def test_a_file_cut_short_is_made_again(self, encoded, made, tmp_path):
        whole = np.array(encoded(SQUARE).posteriors)
        path = next((tmp_path / "cache").glob("posteriors-*"))
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.warns(UserWarning, match=r"posteriors-\w+.npy: not a whole array .*; made again"):
            assert np.array_equal(encoded(SQUARE).posteriors, whole)
        assert made == ["posteriors", "captions", "posteriors"]


class TestBatches:
    def test_are_settled_by_the_generator_alone(self, encoded):
        found = encoded(MIRRORED)
        one, two, other = draws(found, 8), draws(found, 8), draws(found, 8, seed=1)
        assert one.keys() == {"latents", "prompt_embeds", "eps", "timesteps"}
        assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in one)

    def test_have_the_shapes_of_the_objectives(self, encoded):
        batch = image_batches(encoded(SQUARE), 1000)(7, 5, step_generator(0, 7))
        assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
            "latents": ((5, 4, 8, 8), torch.float32),
            "prompt_embeds": ((5, 36, 128), torch.float32),
            "eps": ((5, 4, 8, 8), torch.float32),
            "timesteps": ((5,), torch.int64),
        }

    def test_a_latent_is_a_sample_of_the_posterior_times_the_scaling_factor(self, bundle, dataset, tmp_path):
        one = encode_images(bundle, dataset.select([0]), SQUARE, tmp_path)
        drawn = draws(one, 4000)["latents"] / bundle.vae.config.scaling_factor
        expected = posterior(bundle, views(dataset[0]["image"], SQUARE, 0)[0, 0])
        mean, std = expected.mean[0].half().float(), expected.std[0]  # as they are stored
        error = (drawn.mean(0) - mean) / (std / 4000**0.5)
        assert error.abs().mean() < 1 and error.abs().max() < 5, "in standard errors"
        assert (drawn.std(0) / expected.std[0] - 1).abs().max() < 0.06

    def test_every_image_every_caption_and_every_view_is_drawn_evenly(self, encoded):
        found = encoded(Framing(64, random_crops=2, mirror=True))
        # write into each entry which one it is, and no spread
        image, crop, mirrored = np.indices(found.posteriors.shape[:3])
        mean = (image + 10 * crop + 100 * mirrored)[..., None, None, None].astype(np.float16)
        logvar = np.full_like(mean, -60)
        caption = np.arange(len(found.prompt_embeds), dtype=np.float16)[:, None, None]
        marked = replace(found, posteriors=np.stack([mean, logvar], 3), prompt_embeds=caption, scaling_factor=1.0)
        batch = draws(marked, 24_000)
        code, caption = batch["latents"].flatten().round().long(), batch["prompt_embeds"].flatten().long()
        image, crop, mirrored = code % 10, code // 10 % 10, code // 100
        assert torch.equal(torch.bucketize(caption, found.first_caption, right=True) - 1, image), "its own captions"
        assert all(abs((image == i).float().mean() - 1 / COUNT) < 0.01 for i in range(COUNT))
        for i in range(COUNT):
            shares = caption[image == i].bincount(minlength=12)[found.first_caption[i] : found.first_caption[i + 1]]
            assert ((shares / shares.sum() - 1 / len(shares)).abs() < 0.04).all()
        assert abs(crop.float().mean() - 0.5) < 0.02
        sides = torch.tensor(["left" in c for i in range(COUNT) for c in captions(i)])[caption]
        assert mirrored[sides].sum() == 0, "never with a caption that says left"
        assert abs(mirrored[~sides].float().mean() - 0.5) < 0.02, "another caption of that image allows it"

    def test_without_mirroring_all_is_drawn_the_same_but_the_side(self, encoded):
        one, two = draws(encoded(SQUARE), 32), draws(encoded(MIRRORED), 32)
        assert all(torch.equal(one[name], two[name]) for name in ("prompt_embeds", "eps", "timesteps"))
        same = torch.isclose(one["latents"], two["latents"], atol=1e-2).flatten(1).all(1)
        assert 0 < same.sum() < 32

    def test_noise_is_normal_and_timesteps_are_uniform(self, encoded):
        batch = draws(encoded(SQUARE), 4000)
        assert abs(batch["eps"].mean()) < 0.01 and abs(batch["eps"].std() - 1) < 0.01
        assert batch["timesteps"].min() < 5 and batch["timesteps"].max() > 994
        assert abs(batch["timesteps"].float().mean() - 499.5) < 20


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("A dog on the left .", True),
        ("Right of a tree", True),
        ("a left-handed pitcher", True),
        ("the leftmost of three men", True),
        ("turning rightwards", True),
        ("his righthand man", True),
        ("a man left the shop", True),
        ("a bright upright piano", False),
        ("leftovers on a plate", False),
        ("a copyright sign", False),
        ("a cleft in the rock", False),
        ("a dog above a cat", False),
    ],
)
def test_left_and_right_are_found_as_words(caption, found):
    assert bool(LEFT_OR_RIGHT.search(caption)) == found


class TestFirstImages:
    def test_they_are_those_that_were_encoded_first_with_their_captions(self, encoded, bundle, dataset, tmp_path):
        few = first_images(encoded(SQUARE), 4)
        alone = encode_images(bundle, dataset.select(range(4)), SQUARE, tmp_path / "alone", batch_size=4)
        assert len(few) == 4
        for ours, theirs in zip(draws(few, 30).values(), draws(alone, 30).values(), strict=True):
            assert torch.allclose(ours, theirs, atol=2e-3)

    def test_a_training_on_them_has_a_key_of_its_own(self, encoded):
        whole = encoded(SQUARE)
        assert len({whole.key, first_images(whole, 3).key, first_images(whole, 4).key}) == 3

    @pytest.mark.parametrize("count", [0, COUNT + 1])
    def test_more_than_there_are_is_one_line(self, encoded, count):
        with pytest.raises(ValueError, match=f"few_images: expected 1 to {COUNT}, the images of the set, got {count}"):
            first_images(encoded(SQUARE), count)


class TestCaptionDropout:
    def test_a_share_of_the_captions_is_empty_and_all_else_as_it_was(self, encoded, bundle):
        batches, empty = image_batches(encoded(SQUARE), 1000), encode_prompts(bundle, [""])
        plain, dropped = (
            draw(0, 400, torch.Generator().manual_seed(0)) for draw in (batches, caption_dropout(batches, empty, 0.25))
        )
        embeds = dropped.pop("prompt_embeds")
        is_empty = (embeds == empty).all(dim=(1, 2))
        assert 70 < is_empty.sum() < 130
        assert torch.equal(embeds[~is_empty], plain.pop("prompt_embeds")[~is_empty])
        assert all(torch.equal(plain[name], dropped[name]) for name in plain | dropped)

    def test_no_share_is_no_change(self, encoded, bundle):
        batches = image_batches(encoded(SQUARE), 1000)
        none = caption_dropout(batches, encode_prompts(bundle, [""]), 0.0)
        one, other = (draw(3, 8, torch.Generator().manual_seed(1)) for draw in (batches, none))
        assert all(torch.equal(one[name], other[name]) for name in one)
