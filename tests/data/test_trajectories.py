"""The teacher's trajectories on disk: the points of its own sampling, and batches of them."""

import numpy as np
import pytest
import torch

from lora_distill.adapters import role
from lora_distill.data.teacher import scene_prompts, teacher_set
from lora_distill.data.trajectories import dial_batches, trajectories, trajectory_batches
from lora_distill.diffusion import guide
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, build_scheduler, initial_noise

GUIDED = Sampler(3, 3.0)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("bundled")


@pytest.fixture(scope="module")
def captions():
    return scene_prompts("noto", "train", 3, seed=0).captions


@pytest.fixture(scope="module")
def kept(pipe, captions, tmp_path_factory):
    return trajectories(pipe, captions, GUIDED, 0, tmp_path_factory.mktemp("cache"), batch_size=2)


def test_there_is_a_point_a_step_and_each_has_three_latents(kept, pipe):
    side = pipe.unet.config.sample_size
    assert kept.points.shape == (3, 3, 3, 4, side, side) and kept.points.dtype == np.float16
    assert len(kept) == 3 and kept.timesteps.shape == (3,)
    assert torch.equal(torch.from_numpy(kept.points[:, 0, 0]).float(), initial_noise(pipe, 3, 0).half().float())


def test_outputs_are_those_of_two_separate_passes(kept, pipe, captions):
    embeds, empty = encode_prompts(pipe, captions), encode_prompts(pipe, [""])
    for step, t in enumerate(kept.timesteps):
        x_t, uncond, cond = torch.from_numpy(kept.points[:, step]).float().unbind(1)
        with torch.no_grad(), role(pipe.unet, None):
            torch.testing.assert_close(cond, pipe.unet(x_t, t, embeds).sample, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(uncond, pipe.unet(x_t, t, empty.expand_as(embeds)).sample, rtol=1e-2, atol=1e-2)


def test_a_step_from_each_point_leads_to_the_next_and_the_last_to_the_teachers_image(kept, pipe, captions, tmp_path):
    scheduler = build_scheduler(pipe, "own")
    scheduler.set_timesteps(GUIDED.steps)
    ends = [torch.from_numpy(kept.points[:, step, 0]).float() for step in range(1, 3)]
    ends.append(teacher_set(pipe, captions, GUIDED, 0, tmp_path)["latents"])
    for step, (t, end) in enumerate(zip(scheduler.timesteps, ends, strict=True)):
        x_t, uncond, cond = torch.from_numpy(kept.points[:, step]).float().unbind(1)
        found = scheduler.step(guide(uncond, cond, GUIDED.guidance_scale), t, x_t).prev_sample
        torch.testing.assert_close(found, end, rtol=1e-2, atol=2e-2)


def test_they_are_sampled_once_and_read_again(pipe, captions, tmp_path, monkeypatch):
    first = trajectories(pipe, captions, GUIDED, 0, tmp_path)
    monkeypatch.setattr("lora_distill.data.trajectories.sample", lambda *a: 1 / 0)
    again = trajectories(pipe, captions, GUIDED, 0, tmp_path)
    assert np.array_equal(first.points, again.points) and first.key == again.key


@pytest.mark.parametrize("changes", [{"seed": 1}, {"sampler": Sampler(3, 2.0)}, {"captions": ["a lion"] * 3}])
def test_other_inputs_have_another_key(pipe, captions, kept, tmp_path, changes):
    options = {"captions": captions, "sampler": GUIDED, "seed": 0, **changes}
    assert trajectories(pipe, cache_dir=tmp_path, **options).key != kept.key


@pytest.mark.parametrize("sampler", [Sampler(3), Sampler(3, 3.0, guided_fraction=0.5), Sampler(3, 3.0, w0=3.0)])
def test_a_teacher_without_guidance_in_all_its_steps_is_refused(pipe, captions, tmp_path, sampler):
    with pytest.raises(ValueError, match="guidance_scale: trajectories are of a teacher that is guided in all steps"):
        trajectories(pipe, captions, sampler, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_batch_holds_points_with_their_own_timestep_and_prompt(kept):
    batch = trajectory_batches(kept)(0, 16, torch.Generator().manual_seed(0))
    points = torch.from_numpy(kept.points).float()
    seen = set()
    for x_t, uncond, cond, t, embeds in zip(*(batch[name] for name in ("x_t", "uncond", "cond", "timesteps",
                                                                       "prompt_embeds")), strict=True):  # fmt: skip
        (row, step), *others = (points[:, :, 0] == x_t).all((2, 3, 4)).nonzero().tolist()
        assert not others and t == kept.timesteps[step]
        assert torch.equal(uncond, points[row, step, 1]) and torch.equal(cond, points[row, step, 2])
        assert torch.equal(embeds, torch.from_numpy(kept.prompt_embeds[row]).float())
        seen.add((row, step))
    assert len(seen) > 4


def test_a_dials_batch_has_one_w_and_batches_have_many(kept):
    draw = dial_batches(trajectory_batches(kept), 1.0, 7.5)
    drawn = [draw(step, 4, torch.Generator().manual_seed(step))["guidance_scale"] for step in range(200)]
    assert all(w.shape == (4,) and w.unique().numel() == 1 for w in drawn)
    values = torch.stack([w[0] for w in drawn])
    assert 1 <= values.min() < 1.3 and 7.2 < values.max() <= 7.5


@pytest.mark.parametrize("ends", [(0.5, 2.0), (3.0, 3.0), (5.0, 2.0)])
def test_a_range_of_w_that_is_none_is_refused(kept, ends):
    with pytest.raises(ValueError, match="w: expected a range from 1 or more upwards"):
        dial_batches(trajectory_batches(kept), *ends)
