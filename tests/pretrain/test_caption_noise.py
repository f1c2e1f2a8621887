"""What the small pipeline's UNet sees in training: its own captions, some of them empty, and in the end some wrong."""

import numpy as np
import pytest
import torch

from lora_distill import diffusion
from lora_distill.data import scenes
from lora_distill.pretrain import text_to_image
from lora_distill.pretrain.parts import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    tokenize,
)
from lora_distill.pretrain.text_to_image import CAPTION_DROPOUT, CAPTION_NOISE, Preset, TextToImage
from lora_distill.train.step import Schedule

IMAGES, CLEAN_STEPS, COUNT = 200, 7, 4000


@pytest.fixture(scope="module")
def captions():
    """The five captions of each image, as `train_text_to_image` draws them with seed 0."""
    rng = np.random.default_rng(0)
    return [scenes.captions(s, rng) for s in scenes.sample_scenes("noto", "train", IMAGES, 0)]


@pytest.fixture(scope="module")
def tokenizer(captions):
    return build_tokenizer([c for five in captions for c in five])


@pytest.fixture(scope="module")
def drawn(tokenizer, captions, tmp_path_factory):
    """For a step: which image each row shows, and whose caption it has (-1 where it is empty)."""
    caught = {}
    vae = build_vae()
    encoded = torch.arange(float(IMAGES))[:, None, None, None].expand(-1, 4, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_image, "train", lambda objective, draw_batch, *_, **__: caught.update(draw=draw_batch))
        patch.setattr(text_to_image, "encode_all", lambda *_: (encoded, torch.zeros_like(encoded)))
        text_to_image.train_text_to_image(
            Preset(IMAGES, {"unet": Schedule(10, COUNT, 1e-3)}, CLEAN_STEPS),
            vae,
            tokenizer,
            build_text_encoder(tokenizer),
            tmp_path_factory.mktemp("work"),
        )
    owners = {tuple(tokenize(tokenizer, [c])[0].tolist()): i for i, five in enumerate(captions) for c in five}
    owners[tuple(tokenize(tokenizer, [""])[0].tolist())] = -1

    def draw(step):
        batch = caught["draw"](step, COUNT, torch.Generator().manual_seed(0))
        shown = (batch["latents"][:, 0, 0, 0] / vae.config.scaling_factor).round().int()
        return shown, torch.tensor([owners[tuple(ids)] for ids in batch["input_ids"].tolist()])

    return draw


def same_scene(captions, one, other):
    """Two images may share a caption."""
    return bool(set(captions[one]) & set(captions[other]))


def wrong(captions, shown, owner):
    """How many rows have a caption that is neither empty nor of their image."""
    pairs = zip(shown.tolist(), owner.tolist(), strict=True)
    return sum(b >= 0 and not same_scene(captions, a, b) for a, b in pairs)


def within(count, share, total=COUNT):
    """Within five standard deviations of a binomial."""
    return abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("step", [0, CLEAN_STEPS - 1])
def test_no_caption_is_wrong_at_first(drawn, captions, step):
    assert wrong(captions, *drawn(step)) == 0


@pytest.mark.parametrize("step", [CLEAN_STEPS, CLEAN_STEPS + 1])
def test_later_a_fifth_of_the_captions_is_of_another_image(drawn, captions, step):
    share = CAPTION_NOISE * (1 - CAPTION_DROPOUT) * (1 - 1 / IMAGES)
    assert within(wrong(captions, *drawn(step)), share)


@pytest.mark.parametrize("step", [0, CLEAN_STEPS])
def test_a_tenth_of_the_captions_is_empty_throughout(drawn, step):
    assert within(int((drawn(step)[1] == -1).sum()), CAPTION_DROPOUT)


def test_the_loss_is_the_distance_to_the_velocity_of_the_scheduler(tokenizer):
    scheduler, generator = build_scheduler(), torch.Generator().manual_seed(0)
    objective = TextToImage(build_text_encoder(tokenizer), build_unet(), scheduler)
    latents, eps = torch.randn(2, 2, 4, 8, 8, generator=generator)
    ids, timesteps = tokenize(tokenizer, ["a lion left of a bus, pink", ""]), torch.tensor([3, 900])
    with torch.no_grad():
        loss, _ = objective({"latents": latents, "eps": eps, "timesteps": timesteps, "input_ids": ids})
        x_t = scheduler.add_noise(latents, eps, timesteps)
        output = objective.unet(x_t, timesteps, objective.text_encoder(ids).last_hidden_state).sample
    assert scheduler.config.prediction_type == "v_prediction"
    expected = diffusion.mean_squared_error(output, scheduler.get_velocity(latents, eps, timesteps))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
