"""The slides' phases in small: what is trained, what is left alone, and that stock diffusers draws the result."""

import pytest
import torch
from conftest import live_bytes
from diffusers import LCMScheduler

from lora_distill.adapters import adapter_names, adapter_parameters
from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import Framing, encode_images
from lora_distill.drawing import Wishes, header_wishes
from lora_distill.lora_files import read_lora
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators
from lora_distill.settings import Settings
from lora_distill.train.recipes import finetune_lora, lora_file, mimic_lcm, train_lcm, train_lcm_lora

SETTINGS = Settings(
    lcm_steps=2, finetune_steps=2, lcm_batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, lcm_rank=2
)
PROMPTS = ["a lion at the upper left, a bus at the lower right, on a blue background"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    dataset = captioned_images("scenes/fluent/8k", "val", cache_dir=folder).select(range(8))
    return encode_images(load_pipeline("bundled"), dataset, Framing(64), folder)


def w0(pipe):
    state = pipe.unet.state_dict()
    return {name.replace(".base_layer", ""): v.clone() for name, v in state.items() if "lora_" not in name}


def test_a_full_lcm_takes_w_as_an_input_and_leaves_its_teacher_alone(bundle, images, tmp_path):
    before = w0(bundle)
    lcm_pipe, log = train_lcm(bundle, images, SETTINGS, tmp_path)
    assert lcm_pipe.unet.config.time_cond_proj_dim and not bundle.unet.config.time_cond_proj_dim
    assert lcm_pipe.unet.time_embedding.cond_proj.weight.abs().max() > 0, "it learns"
    assert all(torch.equal(before[name], value) for name, value in w0(bundle).items())
    assert [row["step"] for row in log] == [1, 2]


def test_a_full_lcm_leaves_alone_an_adapter_that_was_trained_before(bundle, images, tmp_path):
    train_lcm_lora(bundle, images, SETTINGS, tmp_path, name="earlier")
    before = [p.clone() for p in adapter_parameters(bundle.unet, "earlier")]
    train_lcm(bundle, images, SETTINGS, tmp_path)
    assert all(map(torch.equal, before, adapter_parameters(bundle.unet, "earlier")))


def test_an_lcm_lora_needs_no_second_unet(bundle, images, tmp_path):
    weights, taken = w0(bundle), []
    size = sum(p.nbytes for p in bundle.unet.parameters())
    before = live_bytes()
    milestones = 1, lambda *_: taken.append(live_bytes() - before) or {}, "bytes"
    train_lcm_lora(bundle, images, SETTINGS, tmp_path, milestones=milestones)
    assert max(taken) < 0.3 * size, "A, B, their moving average and Adam's moments, at rank 2 on all layers"
    assert all(torch.equal(weights[name], value) for name, value in w0(bundle).items())


def test_the_phases_put_their_adapters_on_one_w0(bundle, images, tmp_path):
    lcm_pipe, _ = train_lcm(bundle, images, SETTINGS, tmp_path)
    mimic_lcm(bundle, lcm_pipe, images, SETTINGS, tmp_path)
    train_lcm_lora(bundle, images, SETTINGS, tmp_path)
    finetune_lora(bundle, images, SETTINGS, tmp_path, rank=2, targets="attention")
    assert adapter_names(bundle.unet) == ["finetune", "lcm_lora", "mimic"]
    said = {name: read_lora(lora_file(tmp_path, name)).metadata for name in adapter_names(bundle.unet)}
    assert {name: header["method"] for name, header in said.items()} == {
        "finetune": "fine-tune", "lcm_lora": "LCM-LoRA", "mimic": "LCM mimicry"
    }  # fmt: skip
    assert header_wishes(said["lcm_lora"], "lcm") == header_wishes(said["mimic"], "mimic") == Wishes(4, 1.0, "lcm", 64)
    assert header_wishes(said["finetune"], "finetune") == Wishes(25, 3.0, "own", 64) and "w" not in said["finetune"]


def test_a_finished_training_is_read_back_and_another_w_is_another_training(bundle, images, tmp_path):
    log = train_lcm_lora(bundle, images, SETTINGS, tmp_path)
    assert train_lcm_lora(bundle, images, SETTINGS, tmp_path) == log
    train_lcm_lora(bundle, images, SETTINGS.model_copy(update={"guidance_scale": 5.0}), tmp_path)
    assert len(list(tmp_path.glob("lcm_lora-*"))) == 2


@pytest.mark.parametrize("name", ["lcm_lora", "again"])
def test_stock_diffusers_draws_the_few_steps_from_the_file(bundle, images, tmp_path, name):
    train_lcm_lora(bundle, images, SETTINGS, tmp_path, name=name)
    noise = initial_noise(bundle, 1, seed=1)
    embeds = encode_prompts(bundle, PROMPTS), encode_prompts(bundle, [""])
    ours = sample(bundle, Sampler(4, scheduler="lcm", adapter=name), noise, *embeds, step_generators(1, 1))
    stock = load_pipeline("bundled")
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.load_lora_weights(str(tmp_path), weight_name=lora_file(tmp_path, name).name)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = stock(PROMPTS, latents=noise, generator=step_generators(1, 1), **options).images
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_skip_that_does_not_divide_is_one_line(bundle, images, tmp_path):
    with pytest.raises(ValueError, match="ddim_skip: expected a divisor of the 1000 timesteps, got 7"):
        train_lcm_lora(bundle, images, SETTINGS.model_copy(update={"ddim_skip": 7}), tmp_path)


def test_w_min_above_w_max_is_one_line(bundle, images, tmp_path):
    with pytest.raises(ValueError, match="expected 1 <= w_min <= w_max, got 6 and 5"):
        train_lcm(bundle, images, SETTINGS.model_copy(update={"w_min": 6.0}), tmp_path)


def test_a_fine_tune_with_another_rate_or_dropout_is_another_training(bundle, images, tmp_path):
    first = finetune_lora(bundle, images, SETTINGS, tmp_path, 2, "attention")
    settings = SETTINGS.model_copy(update={"finetune_learning_rate": 0.1})
    assert finetune_lora(bundle, images, settings, tmp_path, 2, "attention", learning_rate=3.0e-3) == first
    without = SETTINGS.model_copy(update={"finetune_caption_dropout": 0.0})
    finetune_lora(bundle, images, without, tmp_path, 2, "attention")
    assert len(list(tmp_path.glob("finetune-*"))) == 2
