"""From latents to pixels as the stock pipeline goes, and what the fingerprint of a pipeline knows."""

import shutil

import numpy as np
import pytest
import torch

from lora_distill.pipeline import BUNDLED, choose_device, decode_latents, fingerprint, load_pipeline, to_uint8


def test_pixels_are_those_of_the_stock_image_processor(bundle):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = bundle.image_processor.postprocess(images, output_type="pil")
    assert np.array_equal(to_uint8(images), np.stack([np.asarray(image) for image in theirs]))


def test_the_images_are_those_of_the_stock_pipeline(bundle):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"guidance_scale": 1.0, "num_inference_steps": 1}
    latents = bundle(["a lion"], latents=noise, output_type="latent", **options).images
    (image,) = bundle(["a lion"], latents=noise, output_type="pil", **options).images
    assert np.array_equal(decode_latents(bundle, latents)[0], np.asarray(image))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_fingerprint_changes_with_one_weight_of(bundle, part):
    before = fingerprint(bundle)
    weight = next(getattr(bundle, part).parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
    changed = fingerprint(bundle)
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    assert changed != before


@pytest.mark.parametrize(
    ("part", "change"),
    [("unet", {"act_fn": "gelu"}), ("vae", {"scaling_factor": 0.5}), ("scheduler", {"prediction_type": "epsilon"})],
)
def test_the_fingerprint_changes_with_the_configuration_of(part, change):
    pipe = load_pipeline("bundled")
    before = fingerprint(pipe)
    getattr(pipe, part).register_to_config(**change)
    assert fingerprint(pipe) != before


def test_the_fingerprint_is_the_same_each_time_it_is_loaded(bundle):
    assert fingerprint(load_pipeline("bundled")) == fingerprint(bundle)


def test_the_fingerprint_changes_with_the_tokenizer(bundle):
    before = fingerprint(bundle)
    bundle.tokenizer.add_tokens(["zebra"])
    assert fingerprint(bundle) != before


def test_a_folder_without_its_index_is_named_with_it(tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "pipeline", ignore=shutil.ignore_patterns("*.safetensors", "model_index.json"))
    with pytest.raises(FileNotFoundError, match=r"not a whole Stable Diffusion pipeline, model_index\.json missing"):
        load_pipeline(str(tmp_path / "pipeline"))


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "~/nothing"])
def test_what_reads_like_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no pipeline folder"):
        load_pipeline(name)


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch, there, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto") == chosen and choose_device("cpu") == "cpu" and choose_device("cuda:1") == "cuda:1"
