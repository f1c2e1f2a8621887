"""The bundled pipeline: small, stock, as good as its model card says."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_distill.data import scenes
from lora_distill.data.teacher import scene_prompts
from lora_distill.judge.metrics import prompt_alignment
from lora_distill.pipeline import BUNDLED, decode_latents, encode_prompts, load_pipeline
from lora_distill.pretrain import model_card
from lora_distill.sampling import Sampler, initial_noise, sample

SCORES = json.loads((BUNDLED / "scores.json").read_text(encoding="utf-8"))
GUIDANCE = {float(w): groups for w, groups in SCORES["guidance"].items()}
SEEN = ["1, seen", "2, seen", "3, seen", "4, seen"]


def right(guidance_scale, group="seen"):
    return GUIDANCE[guidance_scale][group]["all"]


BEST = max(GUIDANCE, key=right)


@pytest.fixture(scope="module")
def bundle():
    return load_pipeline("bundled")


def test_it_weighs_at_most_20_mb_and_holds_no_pickle():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}


def test_its_scores_are_of_every_number_of_objects_equally_often():
    assert SCORES["count"] == 1_000 and SCORES["unseen"] == 500
    for groups in GUIDANCE.values():
        assert {name: group["n"] for name, group in groups.items()} == (
            {"all": 1000, **dict.fromkeys("1234", 250), "seen": 500, "unseen": 500, **dict.fromkeys(SEEN, 125)}
        )
        for column in ("all", "objects", "background", "object_share", "fit_error"):
            for whole, parts in (("all", "1234"), ("all", ("seen", "unseen")), ("seen", SEEN)):
                mean = np.mean([groups[part][column] for part in parts])
                assert groups[whole][column] == pytest.approx(mean)


def test_its_scores_meet_the_bars():
    for groups in SCORES["reconstruction"].values():
        assert min(group["all"] for group in groups.values()) >= 0.98
    gains = [right(BEST, group) - right(1.0, group) for group in SEEN]
    assert gains[3] >= 0.3 and gains[3] > gains[0] >= 0.08, "guidance must matter, most where there is most to draw"
    assert right(BEST) >= 0.8 and 1 < BEST < 10 and right(10.0) < right(BEST), "the curve comes down again"


def test_what_is_held_out_is_harder():
    assert all(right(w, "unseen") < right(w, "seen") for w in GUIDANCE)


def test_without_guidance_it_is_at_most_as_good_as_its_captions():
    """(1 - 23p/24)^n of n objects are named right; the rest is what the model itself gets wrong."""
    training = json.loads((BUNDLED / "training.json").read_text(encoding="utf-8"))
    for n, group in enumerate(SEEN, start=1):
        expected = (1 - 23 / 24 * training["caption_error"]) ** n
        assert right(1.0, group) <= expected + 2 * (expected * (1 - expected) / 125) ** 0.5


def test_its_model_card_is_rendered_from_its_records():
    training = json.loads((BUNDLED / "training.json").read_text(encoding="utf-8"))
    assert (BUNDLED / "README.md").read_text(encoding="utf-8") == model_card.render(training, SCORES)


def test_a_fresh_sample_of_the_scores_agrees_with_the_card(bundle):
    prompts = scene_prompts("noto", "test", 40, seed=7)
    embeds, empty = encode_prompts(bundle, prompts.captions), encode_prompts(bundle, [""])
    latents = sample(bundle, Sampler(model_card.STEPS, BEST), initial_noise(bundle, 40, seed=7), embeds, empty)
    found = prompt_alignment(decode_latents(bundle, latents), prompts.scenes)["all"]
    low, high = found.interval
    assert low - 0.05 <= right(BEST, "all") <= high + 0.05


def test_the_reader_reads_its_vae_reconstructions(bundle):
    data = [s for style in scenes.STYLES for s in scenes.sample_scenes(style, "test", 50, seed=3)]
    pixels = torch.from_numpy(np.stack([scenes.draw(s) for s in data])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = bundle.vae.encode(pixels).latent_dist.mean * bundle.vae.config.scaling_factor
    assert prompt_alignment(decode_latents(bundle, latents), data)["all"].value >= 0.95


def test_stock_diffusers_ends_at_the_same_latents(bundle):
    prompts = [
        "a lion at the upper left, a bus at the lower right, blue",
        "a crown at the top right, green",
    ]
    stock = StableDiffusionPipeline.from_pretrained(BUNDLED)
    stock.set_progress_bar_config(disable=True)
    noise = initial_noise(bundle, 2, seed=1)
    theirs = stock(prompts, latents=noise, guidance_scale=BEST, num_inference_steps=25, output_type="latent").images
    ours = sample(bundle, Sampler(25, BEST), noise, encode_prompts(bundle, prompts), encode_prompts(bundle, [""]))
    assert (ours - theirs).abs().max() <= 1e-4
