"""Prompts, and the cache of what the frozen teacher made: found again for the same inputs, and for no others."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_distill.data import scenes
from lora_distill.data.captioned import captioned_images
from lora_distill.data.teacher import noised_batches, scene_prompts, teacher_for, teacher_set, training_captions
from lora_distill.pipeline import encode_prompts
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, cached

PROMPTS = [
    "a lion at the upper left, a bus at the lower right, blue",
    "a crown at the top right, green",
]
GUIDED = Sampler(2, 3.0)


def test_a_prompt_is_one_of_the_five_captions_of_its_scene_and_not_always_the_same_one():
    prompts = scene_prompts("noto", "val", 50, seed=3)
    rng = np.random.default_rng([3, 1])
    chosen = set()
    for scene, caption in zip(prompts.scenes, prompts.captions, strict=True):
        five = scenes.captions(scene, rng)
        rng.integers(5)  # the draw of the caption, between those of two scenes
        chosen.add(five.index(caption))
    assert len(prompts) == 50 and chosen == {0, 1, 2, 3, 4}
    assert scene_prompts("noto", "val", 50, seed=3) == prompts != scene_prompts("noto", "val", 50, seed=4)


def test_training_captions_name_what_no_other_split_shows():
    """Read back by the words of the caption: the scene is one of the training split's."""
    captions = training_captions("scenes", "noto", 20, seed=0)
    sampled = scenes.sample_scenes("noto", "train", 20, 0)
    rng = np.random.default_rng([0, 1])
    for scene, caption in zip(sampled, captions, strict=True):
        assert caption in scenes.captions(scene, rng)
        rng.integers(5)


def test_the_key_of_a_cache_changes_with_each_part_and_not_with_their_order():
    parts = {"a": 1, "b": [1, 2], "c": "x"}
    assert cache_key(**dict(reversed(parts.items()))) == cache_key(**parts)
    others = [{**parts, "a": 2}, {**parts, "b": [2, 1]}, {**parts, "c": "y"}, {**parts, "d": None}]
    assert len({cache_key(**p) for p in [parts, *others]}) == 5


def test_what_is_cached_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.arange(3)}

    first, second = (cached(tmp_path, "thing", "key", make) for _ in range(2))
    assert torch.equal(first["x"], second["x"]) and len(made) == 1


@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: content[:-1] + b"\xff"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    make = lambda: {"x": torch.arange(3)}  # noqa: E731
    cached(tmp_path, "thing", "key", make)
    path = tmp_path / "thing-key.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"{path}.*made again"):
        assert torch.equal(cached(tmp_path, "thing", "key", make)["x"], torch.arange(3))
    assert torch.equal(cached(tmp_path, "thing", "key", lambda: 1 / 0)["x"], torch.arange(3))


def test_the_teacher_set_is_what_the_guided_sampler_makes(bundle, tmp_path):
    made = teacher_set(bundle, PROMPTS, GUIDED, 5, tmp_path)
    embeds, empty = encode_prompts(bundle, PROMPTS), encode_prompts(bundle, [""])
    assert torch.equal(made["prompt_embeds"], embeds) and torch.equal(made["empty_embeds"], empty)
    assert torch.equal(made["latents"], sample(bundle, GUIDED, initial_noise(bundle, 2, 5), embeds, empty))


def test_a_cut_teacher_set_goes_on_at_the_next_batch(bundle, tmp_path, monkeypatch):
    """Of five prompts, two at a time: cut in the second batch. The images are those of an uncut run."""
    prompts, passes = (PROMPTS * 3)[:5], []
    forward = UNet2DConditionModel.forward

    def counted(self, x, *args, **kwargs):
        if len(passes) == 3:
            raise KeyboardInterrupt
        passes.append(len(x) // 2)
        return forward(self, x, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(UNet2DConditionModel, "forward", counted)
        teacher_set(bundle, prompts, GUIDED, 5, tmp_path, batch_size=2)
    assert passes == [2, 2, 2], "two steps of the first batch, one of the second"
    passes.append(None)
    with monkeypatch.context() as patch:
        patch.setattr(UNet2DConditionModel, "forward", counted)
        made = teacher_set(bundle, prompts, GUIDED, 5, tmp_path, batch_size=2)
    assert passes[4:] == [2, 2, 1, 1], "the second and third batch alone"
    embeds, empty = encode_prompts(bundle, prompts), encode_prompts(bundle, [""])
    whole = sample(bundle, GUIDED, initial_noise(bundle, 5, 5), embeds, empty)
    assert torch.allclose(made["latents"], whole, atol=1e-5) and torch.equal(made["prompt_embeds"], embeds)


def test_noise_in_the_steps_does_not_depend_on_the_batch(bundle, tmp_path):
    sampler = Sampler(2, scheduler="lcm")
    one, two = (teacher_set(bundle, PROMPTS, sampler, 5, tmp_path / str(n), batch_size=n) for n in (1, 2))
    assert torch.allclose(one["latents"], two["latents"], atol=1e-5)


def test_captions_for_teacher_images_obey_what_the_settings_say_of_images(tmp_path):
    """A folder with a picture that cannot be read, of which the first half is used."""
    lines = ["image,caption"]
    for number in range(40):
        PIL.Image.new("RGB", (8, 8), (6 * number, 0, 99)).save(tmp_path / f"{number}.jpg")
        lines.append(f"{number}.jpg,picture {number}")
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    train = captioned_images(tmp_path, "train")["id"]
    (tmp_path / train[0]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 of \d+ images are missing or unreadable"):
        training_captions(str(tmp_path), "noto", 99, 0)
    with pytest.warns(UserWarning, match="left out"):
        found = training_captions(str(tmp_path), "noto", 99, 0, share=0.5, skip_unusable=True, cache_dir=tmp_path)
    allowed = {f"picture {Path(name).stem}" for name in train[1 : -(-len(train) // 2)]}
    assert set(found) == allowed and len(found) == 99


def test_a_teacher_set_is_used_again_for_the_same_inputs_only(bundle, tmp_path):
    def files(*changes):
        teacher_set(*changes, tmp_path)
        return len(list(tmp_path.glob("teacher-*")))

    assert files(bundle, PROMPTS, GUIDED, 5) == files(bundle, PROMPTS, GUIDED, 5) == 1
    assert files(bundle, PROMPTS[::-1], GUIDED, 5) == 2
    assert files(bundle, PROMPTS, Sampler(2, 2.0), 5) == 3
    assert files(bundle, PROMPTS, GUIDED, 6) == 4
    bundle.scheduler.register_to_config(beta_end=0.013)
    assert files(bundle, PROMPTS, GUIDED, 5) == 5
    with torch.no_grad():
        bundle.text_encoder.get_input_embeddings().weight[-1, 0] += 1
    assert files(bundle, PROMPTS, GUIDED, 5) == 6


def test_batches_pair_latents_with_their_own_prompts():
    teacher = {"latents": torch.arange(8.0)[:, None, None, None].expand(8, 4, 2, 2)}
    teacher["prompt_embeds"] = torch.arange(8.0)[:, None, None].expand(8, 5, 3)
    draw = noised_batches(teacher, 1000)
    batch = draw(0, 500, torch.Generator().manual_seed(0))
    assert torch.equal(batch["latents"][:, 0, 0, 0], batch["prompt_embeds"][:, 0, 0])
    assert batch["eps"].shape == (500, 4, 2, 2) and abs(batch["eps"].mean()) < 0.05
    assert batch["latents"].unique().tolist() == list(range(8))
    assert 0 <= batch["timesteps"].min() < 20 and 980 < batch["timesteps"].max() < 1000
    again = draw(9, 500, torch.Generator().manual_seed(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_the_teacher_set_of_a_run_is_of_the_settings_captions_and_sampler(bundle, tmp_path):
    settings = Settings(teacher_images=3, sampling_steps=2, guidance_scale=3.0, eval_batch=2, scheduler="dpm++")
    captions = training_captions("scenes", settings.style, 3, settings.seed)
    sampler = Sampler(2, 3.0, scheduler="dpm++")
    plain = teacher_set(bundle, captions, sampler, settings.seed, tmp_path / "plain")
    found = teacher_for(bundle, settings, tmp_path / "run")
    assert all(torch.allclose(found[name], plain[name], atol=1e-4) for name in plain)
