"""From latents to pixels as the stock pipeline goes, and what the fingerprint of a pipeline knows."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import moved

from lora_distill.adapters import add_adapter, role
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import BUNDLED, decode_latents, load_pipeline, to_uint8, with_unet
from lora_distill.storage import digest


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


def test_the_fingerprint_changes_with_the_weight_of_an_adapter(bundle):
    moved(bundle.unet, "student")
    before = fingerprint(bundle, "student")
    with role(bundle.unet, "student", 2.0):
        assert fingerprint(bundle, "student") != before
    assert fingerprint(bundle, "student") == before


def test_the_fingerprint_is_the_same_each_time_it_is_loaded(bundle):
    assert fingerprint(load_pipeline("bundled")) == fingerprint(bundle)


def test_the_fingerprint_changes_with_the_tokenizer(bundle):
    before = fingerprint(bundle)
    bundle.tokenizer.add_tokens(["zebra"])
    assert fingerprint(bundle) != before


def test_the_fingerprint_changes_with_the_merges_of_the_tokenizer(bundle, tmp_path):
    before = fingerprint(bundle)
    bundle.tokenizer.save_pretrained(tmp_path)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    bundle.tokenizer = type(bundle.tokenizer).from_pretrained(tmp_path)
    assert fingerprint(bundle) != before


def test_using_the_tokenizer_leaves_the_fingerprint(bundle):
    before = fingerprint(bundle)
    bundle.tokenizer(["a lion"], padding="max_length", truncation=True, max_length=7)
    assert fingerprint(bundle) == before


@pytest.fixture
def hashed(monkeypatch):
    """The number of tensors that were hashed, one entry a call."""
    counts = []
    monkeypatch.setattr(
        "lora_distill.fingerprint.digest", lambda tensors: counts.append(len(tensors)) or digest(tensors)
    )
    return counts


def test_frozen_weights_are_hashed_once(bundle, hashed):
    first = fingerprint(bundle)
    add_adapter(bundle.unet, "student", rank=2, alpha=2)
    assert fingerprint(bundle) == first == fingerprint(with_unet(bundle, bundle.unet)) and len(hashed) == 3


CHANGES = {
    "in place": lambda weight, unet: weight.add_(1),
    "replaced": lambda weight, unet: setattr(weight, "data", weight.data + 1),
    "another dtype": lambda weight, unet: unet.bfloat16(),
    "loaded": lambda weight, unet: unet.load_state_dict({k: v + 1 for k, v in unet.state_dict().items()}),
    "assigned": lambda weight, unet: unet.load_state_dict(
        {k: v + 1 for k, v in unet.state_dict().items()}, assign=True
    ),
    "its slice": lambda weight, unet: weight[0].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_is_never_of_earlier_weights(bundle, change):
    before = fingerprint(bundle)
    with torch.no_grad():
        CHANGES[change](bundle.unet.conv_in.weight, bundle.unet)
    assert fingerprint(bundle) != before


def test_weights_that_are_rounded_and_widened_again_have_another_fingerprint(bundle):
    before = fingerprint(bundle)
    bundle.unet.bfloat16().float()
    assert fingerprint(bundle) != before


def test_weights_in_training_are_hashed_each_time(bundle):
    bundle.unet.requires_grad_(True)
    before = fingerprint(bundle)
    bundle.unet.conv_in.weight.data.mul_(2)  # as a moving average is put in place: PyTorch does not count it
    assert fingerprint(bundle) != before


def test_an_adapter_that_is_fused_into_w0_changes_the_fingerprint(bundle):
    moved(bundle.unet, "student")
    before = fingerprint(bundle)
    bundle.unet.fuse_lora()
    assert fingerprint(bundle) != before


def test_a_folder_without_its_index_is_named_with_it(tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "pipeline", ignore=shutil.ignore_patterns("*.safetensors", "model_index.json"))
    with pytest.raises(FileNotFoundError, match=r"not a whole Stable Diffusion pipeline, model_index\.json missing"):
        load_pipeline(str(tmp_path / "pipeline"))


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "~/nothing"])
def test_what_reads_like_a_path_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no pipeline folder"):
        load_pipeline(name)
