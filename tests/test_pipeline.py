"""Loading pipelines, and going between prompts, latents and pictures."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lora_distill.adapters import add_adapter
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import BUNDLED, decode_latents, encode_prompts, load_pipeline, save_picture, to_uint8
from lora_distill.pipeline_files import PARTS

LONG = "a lion " * 30


@pytest.mark.parametrize("part", PARTS)
def test_a_folder_with_a_part_missing_is_named_with_the_part(tmp_path, part):
    folder = tmp_path / "pipeline"
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"{folder}: not a whole Stable Diffusion pipeline, {part} missing"):
        load_pipeline(str(folder))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pipeline folder"):
        load_pipeline(str(tmp_path / "nothing"))


def test_nothing_of_a_loaded_pipeline_is_trained(bundle):
    parts = (bundle.unet, bundle.vae, bundle.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_prompt_embeddings_are_those_of_the_stock_pipeline(bundle):
    prompts = ["a lion at the upper left", "", "an owl at the bottom left, pink"]
    theirs, empty = bundle.encode_prompt(prompts, "cpu", 1, True)
    assert torch.allclose(encode_prompts(bundle, prompts, batch_size=2), theirs, atol=1e-5)
    assert torch.allclose(encode_prompts(bundle, [""]), empty[:1], atol=1e-5)


def test_prompts_that_are_too_long_are_counted_in_one_warning(bundle):
    with pytest.warns(UserWarning) as caught:
        encode_prompts(bundle, [LONG, "a lion", LONG], batch_size=1)
    assert [str(w.message) for w in caught] == ["2 of 3 prompts are longer than 36 tokens and were cut"]


def test_prompts_that_fit_are_no_cause_for_warning(bundle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(
            bundle, ["a drawing of a burger at the top right, a toadstool at the lower left, pink background"]
        )


def test_no_prompts_are_an_error(bundle):
    with pytest.raises(ValueError, match="no prompts"):
        encode_prompts(bundle, [])


def test_the_fingerprint_is_of_what_is_drawn_and_not_of_adapters(bundle):
    first = fingerprint(bundle)
    add_adapter(bundle.unet, "student", rank=2, alpha=2)
    assert fingerprint(bundle) == first
    bundle.scheduler.register_to_config(timestep_spacing="leading")
    second = fingerprint(bundle)
    with torch.no_grad():
        bundle.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert len({first, second, fingerprint(bundle)}) == 3


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.001, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_decoding_undoes_encoding(bundle):
    from lora_distill.data import scenes

    drawn = np.stack([scenes.draw(s) for s in scenes.sample_scenes("noto", "val", 3, seed=0)])
    with torch.no_grad():
        pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = bundle.vae.encode(pixels).latent_dist.mean * bundle.vae.config.scaling_factor
    decoded = decode_latents(bundle, latents, batch_size=2)
    assert decoded.shape == drawn.shape and np.abs(decoded.astype(int) - drawn).mean() < 8


def test_pictures_are_saved_side_by_side(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    for suffix, kind in ((".png", "PNG"), (".PNG", "PNG"), (".webp", "WEBP"), (".jpg", "JPEG"), (".jpeg", "JPEG")):
        save_picture(images, tmp_path / f"row{suffix}")
        with Image.open(tmp_path / f"row{suffix}") as picture:
            assert picture.format == kind and picture.size == (15, 4)
            exact = np.array_equal(np.asarray(picture), np.concatenate(list(images), axis=1))
        assert exact or kind == "JPEG"
    for name in ("row", "row.bmp", "row.txt"):
        with pytest.raises(ValueError, match=r"expected a name that ends in \.png, \.jpg, \.jpeg, \.webp"):
            save_picture(images, tmp_path / name)


def test_a_prompt_that_is_no_text_is_refused(bundle):
    with pytest.raises(ValueError, match=r"prompt 'a \\udce9': bytes that are no text in UTF-8"):
        encode_prompts(bundle, ["a lion", "a \udce9"])
