"""The experiment of notebook 02 in small: one W0 in the LoRA run, a second UNet only in the conventional one."""

import pytest
import torch
from conftest import live_bytes
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from lora_distill.adapters import adapter_names, add_adapter, merged_copy, parameter_counts, role
from lora_distill.data.teacher import scene_prompts, teacher_set
from lora_distill.drawing import Wishes, header_wishes
from lora_distill.judge.judge import Judge, drawn, load_images
from lora_distill.judge.timing import threads, time_samplers, time_unet
from lora_distill.lora_files import read_lora
from lora_distill.pipeline import encode_prompts, load_pipeline, with_unet
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.settings import Settings
from lora_distill.train.recipes import distil_full_copy, distil_lora

SETTINGS = Settings(
    train_steps=4, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, eval_every=2, guidance_scale=3.0
)


@pytest.fixture
def bundle():
    return load_pipeline("bundled")


@pytest.fixture
def teacher(bundle, tmp_path):
    prompts = scene_prompts("noto", "train", 4, seed=0)
    return teacher_set(bundle, prompts.captions, Sampler(2, 3.0), 0, tmp_path / "cache")


def test_the_lora_run_holds_one_w0_and_the_conventional_run_four_more(bundle, teacher, tmp_path):
    """Between two updates: the copy and Adam's two moments of it; while training, gradients of its size besides."""
    w0 = sum(p.nbytes for p in bundle.unet.parameters())
    taken = []

    def measure(step, pipe):
        taken.append(live_bytes() - before)
        return {}

    before = live_bytes()
    distil_lora(bundle, teacher, SETTINGS, tmp_path, milestones=(2, measure, "bytes"))
    assert max(taken) < 0.1 * w0
    taken.clear()
    before = live_bytes()
    distil_full_copy(bundle, teacher, SETTINGS, tmp_path, milestones=(2, measure, "bytes"))
    assert 2.9 * w0 < max(taken) < 3.1 * w0


def test_two_equal_runs_write_equal_bytes_that_say_what_they_are(bundle, teacher, tmp_path):
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        distil_lora(bundle, teacher, SETTINGS, folder)
    assert len({(folder / "student.safetensors").read_bytes() for folder in folders}) == 1
    metadata = read_lora(folders[0] / "student.safetensors").metadata
    said = {"base": "bundled", "method": "guided distillation", "w": "3.0", "trained_steps": "4", "data": "scenes"}
    said |= {"rank": "4", "alpha": "4", "scheduler": "own", "steps": "25", "guidance_scale": "1.0", "resolution": "64"}
    assert metadata.items() >= said.items()
    assert header_wishes(metadata, "student") == Wishes(25, 1.0, "own", 64)
    assert str(tmp_path) not in str(metadata)


def test_w0_is_untouched_and_at_most_5_percent_are_trained(bundle, teacher, tmp_path):
    w0 = {name: value.clone() for name, value in bundle.unet.state_dict().items()}
    distil_lora(bundle, teacher, SETTINGS, tmp_path)
    after = {name.replace(".base_layer", ""): v for name, v in bundle.unet.state_dict().items() if "lora_" not in name}
    assert w0.keys() == after.keys() and all(torch.equal(w0[name], after[name]) for name in w0)
    base, lora = parameter_counts(bundle.unet)
    assert 0 < lora <= 0.05 * base


def test_the_log_holds_measurements_at_the_milestones(bundle, teacher, tmp_path):
    log = distil_lora(bundle, teacher, SETTINGS, tmp_path, milestones=(2, lambda step, pipe: {"seen": step}, "seen"))
    assert [row["step"] for row in log if "seen" in row] == [0, 2, 4]
    again = distil_lora(bundle, teacher, SETTINGS, tmp_path, milestones=(2, lambda step, pipe: 1 / 0, "seen"))
    assert again == log, "read back"


def test_stock_diffusers_draws_the_student_from_its_file(bundle, teacher, tmp_path):
    distil_lora(bundle, teacher, SETTINGS, tmp_path)
    prompts = ["a lion at the upper left, a bus at the lower right, on a blue background"]
    noise = initial_noise(bundle, 1, seed=1)
    ours = sample(
        bundle, Sampler(3, adapter="student"), noise, encode_prompts(bundle, prompts), encode_prompts(bundle, [""])
    )
    stock = load_pipeline("bundled")
    stock.load_lora_weights(str(tmp_path), weight_name="student.safetensors")
    theirs = stock(prompts, latents=noise, guidance_scale=1.0, num_inference_steps=3, output_type="latent").images
    assert (ours - theirs).abs().max() <= 1e-5


def test_merged_and_unmerged_agree_within_float_tolerance(bundle, teacher, tmp_path):
    distil_lora(bundle, teacher, SETTINGS, tmp_path)
    merged = merged_copy(bundle.unet, "student")
    assert not adapter_names(merged)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    embeds = encode_prompts(bundle, ["a lion", "an owl"])
    with torch.no_grad(), role(bundle.unet, "student"):
        assert (merged(x, t, embeds).sample - bundle.unet(x, t, embeds).sample).abs().max() <= 1e-4


def test_images_that_no_notebook_made_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--notebook 03_lcm_lora_flickr makes it$"):
        load_images(tmp_path, "03_lcm_lora_flickr")


def test_the_judge_gives_the_same_verdict_on_the_same_seed(bundle):
    judge = Judge(bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1))
    one, two = judge(Sampler(2), seed=0), judge(Sampler(2), seed=0)
    assert (one.images == two.images).all() and one.frechet_distance == two.frechet_distance


def test_a_judge_that_was_cut_off_samples_only_what_it_has_not_sampled(bundle, tmp_path, monkeypatch):
    prompts, real = scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1)
    first = Judge(bundle, prompts, real, cache_dir=tmp_path)(Sampler(2), seed=0)
    again = Judge(bundle, prompts, real, cache_dir=tmp_path)
    other = scene_prompts("noto", "val", 5, seed=0)
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("sampled"))
    assert (again(Sampler(2), seed=0).images[:] == first.images[:]).all()
    changed = with_unet(bundle, UNet2DConditionModel.from_config(bundle.unet.config))
    for judge, sampler, seed, pipe in [
        (again, Sampler(2), 1, bundle),
        (again, Sampler(3), 0, bundle),
        (again, Sampler(2), 0, changed),
        (Judge(bundle, other, real, cache_dir=tmp_path), Sampler(2), 0, bundle),
    ]:
        with pytest.raises(pytest.fail.Exception, match="sampled"):
            judge(sampler, seed, pipe)


def test_what_an_adapter_in_training_draws_is_not_kept(bundle, tmp_path):
    add_adapter(bundle.unet, "student", rank=2, alpha=2)
    judge = Judge(
        bundle, scene_prompts("noto", "val", 4, seed=0), drawn("noto", "val", 150, seed=1), cache_dir=tmp_path
    )
    judge(Sampler(2, adapter="student"), seed=0)
    assert not list(tmp_path.glob("judged-*"))


def test_the_timer_reports_every_part_of_every_repeat(bundle):
    timings = time_samplers({"two": (bundle, Sampler(2)), "one": (bundle, Sampler(1))}, ["a lion", "an owl"], repeats=3)
    assert timings.keys() == {"two", "one"}
    for timing in timings.values():
        assert len(timing.text_encoder) == len(timing.unet) == len(timing.vae) == 3
        assert all(total > unet > 0 for total, unet in zip(timing.total, timing.unet, strict=True))


def test_the_unet_is_timed_at_every_batch_size_and_left_as_it_was(bundle):
    threads_before = torch.get_num_threads()
    with threads(1):
        seconds = time_unet(bundle, [1, 16], repeats=3)
    assert seconds.keys() == {1, 16} and min(seconds.values()) > 0
    assert torch.get_num_threads() == threads_before


def test_another_unet_shares_the_rest_of_the_pipeline(bundle):
    other = with_unet(bundle, UNet2DConditionModel.from_config(bundle.unet.config))
    assert isinstance(other, StableDiffusionPipeline)
    assert other.vae is bundle.vae and other.unet is not bundle.unet and bundle.unet is not None
