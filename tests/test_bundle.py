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

SCORES = json.loads((BUNDLED / "scores.json").read_text())
ALL_CORRECT = {float(w): alignment["all"] for w, alignment in SCORES["guidance"].items()}
BEST = max(ALL_CORRECT, key=ALL_CORRECT.get)


@pytest.fixture(scope="module")
def bundle():
    return load_pipeline("bundled")


def test_it_weighs_at_most_20_mb_and_holds_no_pickle():
    files = [path for path in BUNDLED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt"}


def test_its_scores_meet_the_bars():
    assert SCORES["count"] >= 1000
    assert SCORES["reconstruction"]["noto"] >= 0.95
    assert ALL_CORRECT[BEST] >= 0.85
    assert ALL_CORRECT[1.0] <= ALL_CORRECT[BEST] - 0.15, "guidance must matter"


def test_its_model_card_is_rendered_from_its_records():
    training = json.loads((BUNDLED / "training.json").read_text())
    assert (BUNDLED / "README.md").read_text() == model_card.render(training, SCORES)


def test_a_fresh_sample_of_the_scores_agrees_with_the_card(bundle):
    prompts = scene_prompts("noto", "test", 40, seed=7)
    embeds, empty = encode_prompts(bundle, prompts.captions), encode_prompts(bundle, [""])
    latents = sample(bundle, Sampler(model_card.STEPS, BEST), initial_noise(bundle, 40, seed=7), embeds, empty)
    right = prompt_alignment(decode_latents(bundle, latents), prompts.scenes)["all"]
    low, high = right.interval
    assert low - 0.05 <= ALL_CORRECT[BEST] <= high + 0.05


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
