"""A tiny pipeline in the Stable Diffusion folder layout, with random weights: facts here hold for any weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import tiny_unet

from lora_distill import scenes
from lora_distill.pipeline import load_pipeline
from lora_distill.small_pipeline import build_scheduler, build_text_encoder, build_tokenizer, build_vae


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A pipeline folder, written once; copy it before changing it."""
    rng = np.random.default_rng(0)
    captions = [c for s in scenes.sample_scenes("noto", "train", 300, 0) for c in scenes.captions(s, rng)]
    tokenizer = build_tokenizer(captions)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            vae=build_vae(),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=tiny_unet(),
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(tiny_folder) -> StableDiffusionPipeline:
    """The tiny pipeline, freshly loaded."""
    return load_pipeline(str(tiny_folder))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A tiny UNet that carries no adapter."""
    return tiny_unet()
