"""The bundled pipeline from nothing, in small."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_distill.data import scenes
from lora_distill.pretrain import text_to_image
from lora_distill.pretrain.parts import PROMPT_LENGTH, build_text_encoder, build_tokenizer, build_unet, tokenize
from lora_distill.pretrain.text_to_image import PRESETS, CaptionReading, Preset, pretrain
from lora_distill.train.step import Schedule

CAPTIONS = text_to_image.grammar_captions(seed=0)
TINY = Preset(
    images=8,
    schedules={
        "vae_crops": Schedule(2, 2, 1e-3, mixed_precision="bf16", log_every=1),
        "vae_images": Schedule(1, 2, 1e-3, mixed_precision="bf16", log_every=1),
        "text_encoder": Schedule(2, 4, 1e-3, log_every=1),
        "unet": Schedule(2, 4, 1e-3, ema_decay=0.9, log_every=1),
    },
    caption_error=0.3,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS)


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    words = {word.strip(",") for caption in CAPTIONS for word in caption.split()}
    assert {word for word in words if len(tokenizer(word).input_ids) != 3} == set(), "start, the word, end"


def test_every_caption_fits(tokenizer):
    """The longest has four objects; each of its words is one token."""
    longest = [
        template.format(objects=", ".join([phrase.format(a="an owl", place="upper left")] * 4), bg="pink")
        for style in scenes.STYLES
        for template in scenes.TEMPLATES[style]
        for phrase in scenes.PHRASES[style]
    ]
    assert max(len(ids) for ids in tokenizer(longest).input_ids) == PROMPT_LENGTH - 1
    assert max(len(ids) for ids in tokenizer(CAPTIONS).input_ids) == PROMPT_LENGTH - 1
    assert tokenize(tokenizer, ["a lion", ""]).shape == (2, PROMPT_LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pretraining")
    pretrain(TINY, place / "pipeline", place / "work")
    return place


def test_what_was_trained_is_a_stock_pipeline(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a lion at the upper left, a bus at the lower right", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()


def test_the_record_states_what_was_done(folder):
    record = json.loads((folder / "pipeline" / "training.json").read_text())
    assert record["schedules"].keys() == record["minutes"].keys() == record["loss"].keys() == TINY.schedules.keys()
    assert record["images"] == 8 and record["caption_error"] == 0.3 and record["versions"]["torch"]
    assert record["devices"].keys() == TINY.schedules.keys() and all(record["devices"].values())


def test_trained_again_it_is_read_back_and_the_same(folder):
    weights = (folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    pretrain(TINY, folder / "again", folder / "work")
    assert (folder / "again" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_every_stage_of_every_preset_has_a_schedule():
    assert {tuple(preset.schedules) for preset in PRESETS.values()} == {tuple(TINY.schedules)}
    assert all(preset.caption_error == 0.1 for preset in PRESETS.values())


def test_reading_a_caption_asks_for_all_that_a_caption_says():
    lion, bus = (
        scenes.Object("lion", "upper left", 20, False, 1, 1),
        scenes.Object("bus", "lower right", 20, True, 34, 34),
    )
    background, *quarters = CaptionReading.classes(scenes.Scene("noto", "pink", (lion, bus)))
    assert list(scenes.BACKGROUNDS)[background] == "pink"
    assert [[*scenes.KINDS, None][quarter] for quarter in quarters] == ["lion", None, None, "bus"]


def test_the_caption_loss_of_an_even_guess_is_the_sum_of_log_counts(tokenizer):
    reading = CaptionReading(build_text_encoder(tokenizer))
    for head in reading.heads.values():
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    batch = {"input_ids": tokenize(tokenizer, CAPTIONS[:4]), "classes": torch.zeros(4, 5, dtype=torch.long)}
    assert reading(batch)[0].item() == pytest.approx(np.log([6, 25, 25, 25, 25]).sum(), rel=1e-5)


def test_a_caption_is_read_right_where_all_five_answers_are(tokenizer):
    reading = CaptionReading(build_text_encoder(tokenizer))
    for head in reading.heads.values():
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.arange(len(head.bias), 0.0, -1)  # answers class 0, whatever is asked
    classes = torch.zeros(4, 5, dtype=torch.long)
    classes[range(3), range(3)] = 1
    batch = {"input_ids": tokenize(tokenizer, CAPTIONS[:4]), "classes": classes}
    assert reading(batch)[1]["all_right"].item() == 1 / 4


def test_the_unet_has_the_block_types_of_stable_diffusion():
    unet = build_unet()
    assert {type(block).__name__ for block in unet.down_blocks} == {"CrossAttnDownBlock2D", "DownBlock2D"}
    assert sum(p.numel() for p in unet.parameters()) == 5_925_124
