"""Small fixed runs give the numbers that were recorded for the version of the code that makes them.

Keys of caches and trainings hold a version number instead of a digest of source code. Where a number here changes,
what is kept in run folders is no longer what the code would make: raise that version, and record the new numbers.
"""

import pytest
import torch

from lora_distill.adapters import adapter_parameters
from lora_distill.data import captioned, encoded, scenes, teacher
from lora_distill.data.encoded import Framing, encode_images
from lora_distill.data.trajectories import TRAJECTORIES, trajectories
from lora_distill.judge import features, judge
from lora_distill.judge.judge import Judge, drawn
from lora_distill.pipeline import load_pipeline
from lora_distill.sampling import Sampler
from lora_distill.settings import Settings
from lora_distill.train import recipes

# whatever a training rests on is written here, so that a change of defaults changes no record
SETTINGS = Settings(
    train_steps=2,
    lcm_steps=2,
    finetune_steps=2,
    batch_size=2,
    lcm_batch_size=2,
    warmup_steps=1,
    log_every=1,
    lcm_rank=2,
    learning_rate=2.0e-3,
    full_learning_rate=2.0e-4,
    lcm_learning_rate=1.0e-4,
    lcm_lora_learning_rate=1.0e-3,
    finetune_learning_rate=3.0e-3,
    lcm_ema_decay=0.95,
)
TRAININGS = ("student", "trajectories", "dial", "full copy", "lcm", "mimic", "lcm_lora", "finetune")
# of trainings: the losses of both updates and the norm of what was trained
RECORDED = {
    ("student", 2): [1.366083, 1.182626, 38.71813],
    ("trajectories", 2): [0.9814773, 1.516546, 38.71311],
    ("dial", 2): [0.4211209, 1.997699, 38.71276],
    ("full copy", 2): [1.366083, 1.070203, 126.699],
    ("lcm", 2): [0.01388638, 0.03280866, 126.6974],
    ("mimic", 2): [0.0270524, 0.005966947, 152.6259],
    ("lcm_lora", 2): [0.01286613, 0.02754666, 152.6254],
    ("finetune", 2): [0.3147042, 0.5415465, 54.70925],
    ("teacher set", 2): [1.011874, 1.317007],
    ("trajectories set", 1): [0.8710636, 1.316951],
    ("encoded", 2): [3.073671, 1.307049],
    ("world", 2): [220.52059, 214.23063, 209.09473],
    ("features", 1): [4.342513, 0.7183648, 2.386574],
    ("judged", 2): [214.2123, 640.1172],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline, two teacher images and their trajectories, and four encoded drawings."""
    folder = tmp_path_factory.mktemp("inputs")
    pipe = load_pipeline("bundled")
    captions = teacher.training_captions("scenes", "noto", 2, seed=0)
    teacher_set = teacher.teacher_set(pipe, captions, Sampler(2, 3.0), 0, folder)
    dataset = captioned.captioned_images("scenes/fluent/8k", "val", cache_dir=folder).select(range(4))
    kept = trajectories(pipe, captions, Sampler(2, 3.0), 0, folder)
    return pipe, teacher_set, encode_images(pipe, dataset, Framing(64), folder), kept


def trained(name, inputs, folder):
    """The losses of a recipe's two updates and the norm of its trained parameters."""
    pipe, teacher_set, images, kept = inputs
    if name == "student":
        log = recipes.distil_lora(pipe, teacher_set, SETTINGS, folder)
    elif name == "trajectories":
        log = recipes.distil_on_trajectories(pipe, kept, SETTINGS, folder)
    elif name == "dial":
        log = recipes.distil_dial(pipe, kept, SETTINGS, folder)
    elif name == "full copy":
        copy_pipe, log = recipes.distil_full_copy(pipe, teacher_set, SETTINGS, folder)
    elif name == "finetune":
        log = recipes.finetune_lora(pipe, images, SETTINGS, folder, rank=2, targets="attention")
    elif name == "lcm_lora":
        log = recipes.train_lcm_lora(pipe, images, SETTINGS, folder)
    else:
        copy_pipe, log = recipes.train_lcm(pipe, images, SETTINGS, folder)
        if name == "mimic":
            log = recipes.mimic_lcm(pipe, copy_pipe, images, SETTINGS, folder)
    parameters = copy_pipe.unet.parameters() if name in ("full copy", "lcm") else adapter_parameters(pipe.unet, name)
    norm = torch.stack([p.double().norm() for p in parameters]).norm()
    return [*(row["loss"] for row in log), norm.item()]


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_the_recorded_one(inputs, tmp_path, name):
    assert trained(name, inputs, tmp_path) == pytest.approx(RECORDED[name, recipes.RECIPE], rel=1e-4)


def test_teacher_images_are_the_recorded_ones(inputs):
    found = [inputs[1]["latents"].std().item(), inputs[1]["prompt_embeds"].std().item()]
    assert found == pytest.approx(RECORDED["teacher set", teacher.TEACHER_SET], rel=1e-4)


def test_trajectories_are_the_recorded_ones(inputs):
    found = [float(array.astype("float64").std()) for array in (inputs[3].points, inputs[3].prompt_embeds)]
    assert found == pytest.approx(RECORDED["trajectories set", TRAJECTORIES], rel=1e-3)


def test_encoded_images_are_the_recorded_ones(inputs):
    arrays = inputs[2].posteriors, inputs[2].prompt_embeds
    found = [float(array.astype("float64").std()) for array in arrays]
    assert found == pytest.approx(RECORDED["encoded", encoded.ENCODED], rel=1e-3)


def test_the_drawn_world_is_the_recorded_one():
    sampled = captioned.split_scenes("fluent", "8k", "val", 0)[:3]
    found = [float(scenes.draw(scene).mean()) for scene in sampled]
    assert found == pytest.approx(RECORDED["world", captioned.WORLD], rel=1e-6)


def test_features_are_the_recorded_ones():
    extractor = features.load_extractor("EfficientNet-Lite0")
    rows = features.extract(extractor, drawn("noto", "val", 2, seed=0)).rows
    found = [rows[layer].std().item() for layer in extractor.layers]
    assert found == pytest.approx(RECORDED["features", features.FEATURES], rel=1e-4)


def test_what_is_judged_is_the_recorded_one(inputs):
    quality = Judge(inputs[0], teacher.scene_prompts("noto", "val", 2, seed=0), drawn("noto", "val", 20, seed=1))(
        Sampler(2, scheduler="lcm"), seed=0
    )
    found = [float(quality.images.mean()), quality.frechet_distance]
    assert found == pytest.approx(RECORDED["judged", judge.JUDGED], rel=1e-3)
