"""What the small pipeline's UNet sees in training: captions of its pictures, some with errors and some empty."""

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
from lora_distill.pretrain.text_to_image import CAPTION_DROPOUT, Preset, TextToImage
from lora_distill.train.step import Schedule

IMAGES, COUNT = 400, 4000


def captions(error):
    """The five captions of each image, as `train_text_to_image` draws them with seed 0."""
    rng = np.random.default_rng(0)
    return [scenes.captions(s, rng, error) for s in scenes.sample_scenes("noto", "train", IMAGES, 0)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([c for error in (0.0, 0.5) for five in captions(error) for c in five])


@pytest.fixture(scope="module", params=[0.0, 0.1, 0.2])
def drawn(request, tokenizer, tmp_path_factory):
    """The error of the captions; for a step, which image each row shows and its caption as tokens."""
    caught = {}
    vae = build_vae()
    encoded = torch.arange(float(IMAGES))[:, None, None, None].expand(-1, 4, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_image, "train", lambda objective, draw_batch, *_, **__: caught.update(draw=draw_batch))
        patch.setattr(text_to_image, "encode_all", lambda *_: (encoded, torch.zeros_like(encoded)))
        text_to_image.train_text_to_image(
            Preset(IMAGES, {"unet": Schedule(10, COUNT, 1e-3)}, caption_error=request.param),
            vae,
            tokenizer,
            build_text_encoder(tokenizer),
            tmp_path_factory.mktemp("work"),
        )

    def draw(step):
        batch = caught["draw"](step, COUNT, torch.Generator().manual_seed(0))
        shown = (batch["latents"][:, 0, 0, 0] / vae.config.scaling_factor).round().int()
        return shown.tolist(), [tuple(ids) for ids in batch["input_ids"].tolist()]

    return request.param, draw


def tokens(tokenizer, texts):
    return [tuple(ids) for ids in tokenize(tokenizer, texts).tolist()]


def within(count, share, total=COUNT):
    """Within five standard deviations of a binomial."""
    return abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("step", [0, 9])
def test_each_row_has_a_caption_of_its_image_or_none_from_the_first_step_to_the_last(drawn, tokenizer, step):
    error, draw = drawn
    own = [{*tokens(tokenizer, five)} for five in captions(error)]
    (empty,) = tokens(tokenizer, [""])
    shown, given = draw(step)
    assert all(ids in own[image] for image, ids in zip(shown, given, strict=True) if ids != empty)
    assert within(given.count(empty), CAPTION_DROPOUT)


def test_captions_have_as_many_errors_as_are_stated(drawn, tokenizer):
    """A caption is right with (1 - 23p/24)^n: the words for what it names are those of the scene."""
    error, draw = drawn
    data = scenes.sample_scenes("noto", "train", IMAGES, 0)
    (empty,) = tokens(tokenizer, [""])
    pairs = [(data[image], ids) for image, ids in zip(*draw(0), strict=True) if ids != empty]
    right = sum(
        {kind for kind, words in scenes.KINDS.items() if set(words) & set(tokenizer.decode(ids).split())}
        == {one.kind for one in scene.objects}
        for scene, ids in pairs
    )
    shares = np.array([(1 - 23 / 24 * error) ** scene.count for scene, _ in pairs])
    assert abs(right - shares.sum()) <= 5 * (IMAGES / COUNT) ** -0.5 * (shares * (1 - shares)).sum() ** 0.5


def test_the_loss_is_the_distance_to_the_velocity_of_the_scheduler(tokenizer):
    scheduler, generator = build_scheduler(), torch.Generator().manual_seed(0)
    objective = TextToImage(build_text_encoder(tokenizer), build_unet(), scheduler)
    latents, eps = torch.randn(2, 2, 4, 8, 8, generator=generator)
    ids, timesteps = tokenize(tokenizer, ["a lion at the upper left, pink", ""]), torch.tensor([3, 900])
    with torch.no_grad():
        loss, _ = objective({"latents": latents, "eps": eps, "timesteps": timesteps, "input_ids": ids})
        x_t = scheduler.add_noise(latents, eps, timesteps)
        output = objective.unet(x_t, timesteps, objective.text_encoder(ids).last_hidden_state).sample
    assert scheduler.config.prediction_type == "v_prediction"
    expected = diffusion.mean_squared_error(output, scheduler.get_velocity(latents, eps, timesteps))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
