"""Pipelines as the hub has them since 2022: old config keys, PNDM, 16 bits; and folders refused in one line."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_distill import pipeline
from lora_distill.adapters import plain_copy
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import BUNDLED, decode_latents, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, unet_passes
from lora_distill.shapes import unet_config

PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def edited(folder, part, drop=(), **values):
    """Change one part's config: keys that are dropped, keys that get another value."""
    (path,) = [path for path in (folder / part).glob("*config.json") if path.name != "tokenizer_config.json"]
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(config | values))


@pytest.fixture
def folder(tmp_path):
    """The bundled pipeline as a folder of one's own."""
    return shutil.copytree(BUNDLED, tmp_path / "pipeline")


@pytest.fixture
def old(folder):
    """The same in the form of Stable Diffusion 1.5: keys that did not exist in 2022 are absent; PNDM predicts eps."""
    edited(folder, "unet", drop=("time_cond_proj_dim", "use_linear_projection", "resnet_out_scale_factor"))
    edited(folder, "vae", drop=("scaling_factor", "force_upcast"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PNDM))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    return folder


def first_timestep(scheduler):
    return int(scheduler.timesteps[0])


# ---------------------------------------------------------------------------------------------- old configs


def test_a_full_lcm_is_made_of_a_config_without_time_cond_proj_dim(old):
    unet = load_pipeline(str(old)).unet
    copy = plain_copy(unet, time_cond_proj_dim=16)
    x, t, embeds = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 36, 128)
    with torch.no_grad():
        assert torch.equal(copy(x, t, embeds, timestep_cond=torch.randn(2, 16)).sample, unet(x, t, embeds).sample)
        assert torch.equal(plain_copy(unet)(x, t, embeds).sample, unet(x, t, embeds).sample)
    assert copy.config.time_cond_proj_dim == 16 and plain_copy(copy).config.time_cond_proj_dim == 16


def test_a_vae_whose_config_lacks_the_scaling_factor_has_that_of_stable_diffusion(old):
    pipe = load_pipeline(str(old))
    assert pipe.vae.config.scaling_factor == 0.18215
    assert decode_latents(pipe, 0.1 * torch.randn(1, 4, 8, 8)).shape == (1, 64, 64, 3)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "lcm"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_named_sampler_starts_at_the_noisiest_timestep(old, name, steps):
    from lora_distill.sampling import build_scheduler

    pipe = load_pipeline(str(old))
    scheduler = build_scheduler(pipe, name)
    scheduler.set_timesteps(steps)
    assert first_timestep(scheduler) == 999 and unet_passes(pipe, Sampler(steps, scheduler=name)) == steps


def test_ddim_is_ddim_whatever_the_pipelines_own_scheduler_is(old):
    from diffusers import DDIMScheduler

    pipe = load_pipeline(str(old))
    noise, embeds = initial_noise(pipe, 1, seed=0), encode_prompts(pipe, ["a lion"])
    ours = sample(pipe, Sampler(4, 3.0, scheduler="ddim"), noise, embeds, encode_prompts(pipe, [""]))
    own = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipe.scheduler = DDIMScheduler(**own, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    options = {"guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "latent"}
    assert torch.equal(ours, pipe(["a lion"], latents=noise, **options).images)


def test_a_sampler_is_named_after_the_scheduler_that_it_builds(old):
    from lora_distill.sampling import sampler_name

    pipe = load_pipeline(str(old))
    names = {name: sampler_name(pipe, Sampler(scheduler=name)) for name in ("own", "ddim", "dpm++", "lcm")}
    assert names == {"own": "PNDM", "ddim": "DDIM", "dpm++": "DPM-Solver++ 2M", "lcm": "LCM"}


def test_two_kinds_of_ddim_have_two_names(bundle):
    from lora_distill.sampling import sampler_name

    bundle.scheduler.register_to_config(timestep_spacing="leading")
    assert [sampler_name(bundle, Sampler(scheduler=name)) for name in ("own", "ddim")] == ["DDIM (leading)", "DDIM"]


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_a_scheduler_of_ones_own_that_draws_noise_draws_it_from_the_seed(bundle, scheduler):
    import diffusers

    from lora_distill.sampling import sample_in_batches, step_generators

    bundle.scheduler = getattr(diffusers, scheduler).from_config(bundle.scheduler.config)
    noise, embeds = initial_noise(bundle, 2, seed=0), encode_prompts(bundle, ["a lion", "an owl"])
    first, again, other = (
        sample_in_batches(bundle, Sampler(3), noise, embeds, None, seed, batch_size=size)
        for seed, size in ((0, 2), (0, 1), (1, 2))
    )
    assert torch.allclose(first, again, atol=1e-4) and not torch.allclose(first, other, atol=0.1)
    options = {"guidance_scale": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    theirs = bundle(["a lion", "an owl"], latents=noise, generator=step_generators(2, 0), **options).images
    assert (first - theirs).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="draws noise at its steps: give one generator an image"):
        sample(bundle, Sampler(3), noise, embeds, None)


@pytest.mark.parametrize("name", ["own", "dpm++", "lcm"])
def test_more_steps_than_the_schedule_has_are_refused_in_one_line(bundle, name):
    with pytest.raises(ValueError, match=r"^steps: 1001 is too many for [^\n]+$"):
        unet_passes(bundle, Sampler(1001, scheduler=name))


# ---------------------------------------------------------------------------------------------- 16 bits


def test_between_the_steps_16_bit_sampling_computes_in_float32(old):
    """What is left is the rounding inside of the UNet: the same UNet's outputs, guided and stepped in float32."""
    pipe = load_pipeline(str(old), dtype=torch.bfloat16)
    noise, embeds = initial_noise(pipe, 2, seed=0), encode_prompts(pipe, ["a lion", "an owl"])
    empty = encode_prompts(pipe, [""])
    ours = sample(pipe, Sampler(4, 7.5, scheduler="ddim"), noise, embeds, empty)
    assert noise.dtype == ours.dtype == torch.float32

    exact = load_pipeline(str(old))

    class Rounded(torch.nn.Module):
        """The float32 pipeline's UNet, replaced by the 16-bit one: inputs are rounded, outputs are widened."""

        def __init__(self):
            super().__init__()
            self.config, self.dtype, self.device = exact.unet.config, torch.float32, exact.unet.device

        def forward(self, x, t, embeds, timestep_cond=None):
            output = pipe.unet(x.bfloat16(), t, embeds.bfloat16())
            output.sample = output.sample.float()
            return output

    exact.unet = Rounded()
    reference = sample(exact, Sampler(4, 7.5, scheduler="ddim"), noise, embeds.float(), empty.float())
    assert torch.equal(ours, reference)


def test_images_that_are_not_finite_are_an_error_and_no_black_pictures(bundle):
    latents = torch.zeros(3, 4, 8, 8)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="the latents of 1 of 3 prompts are not finite"):
        decode_latents(bundle, latents)
    with pytest.raises(RuntimeError, match=r"the latents of 2 of 2 prompts have left all bounds, they reach 3\.0e\+38"):
        decode_latents(bundle, torch.full((2, 4, 8, 8), 3e38))
    for scale, said in ((1e30, "have left all bounds"), (torch.nan, "are not finite")):
        bundle.vae.decoder.conv_out.weight.data.fill_(scale)
        with pytest.raises(RuntimeError, match=f"the images of 2 of 2 prompts {said}"):
            decode_latents(bundle, torch.ones(2, 4, 8, 8))


def test_a_vae_that_asks_for_float32_gets_it_in_fp16(folder, old):
    assert load_pipeline("bundled", dtype=torch.float16).vae.dtype == torch.float32
    assert load_pipeline("bundled", dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    assert load_pipeline(str(old), dtype=torch.float16).vae.dtype == torch.float16


def test_large_images_are_decoded_a_few_at_a_time(bundle):
    sizes = []
    decode = bundle.vae.decode
    bundle.vae.decode = lambda latents: sizes.append(len(latents)) or decode(latents)
    decode_latents(bundle, torch.zeros(52, 4, 8, 8))
    decode_latents(bundle, torch.zeros(5, 4, 64, 64))
    assert sizes == [50, 2, 4, 1]


# ---------------------------------------------------------------------------------------------- resolution


def test_a_pipeline_loaded_for_a_resolution_samples_at_it_everywhere():
    pipe, plain = load_pipeline("bundled", resolution=96), load_pipeline("bundled")
    noise = initial_noise(pipe, 1, seed=0)
    assert noise.shape == (1, 4, 12, 12) and plain_copy(pipe.unet).config.sample_size == 12
    images = pipe(["a lion"], num_inference_steps=1, output_type="latent").images
    assert images.shape == noise.shape, "stock diffusers takes it too"
    assert fingerprint(pipe) != fingerprint(plain) == fingerprint(load_pipeline("bundled", resolution=64))
    with pytest.raises(ValueError, match="resolution: expected a multiple of 8 for this VAE, got 60"):
        load_pipeline("bundled", resolution=60)


# ---------------------------------------------------------------------------------------------- refused in one line


@pytest.mark.parametrize("kind", ["sample", "epsilonn", None])
def test_an_unknown_prediction_type_is_refused(folder, kind):
    edited(folder, "scheduler", prediction_type=kind)
    with pytest.raises(ValueError, match=r"prediction_type: expected epsilon or v_prediction[^\n]*, got"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("formula", ["to_x0", "to_eps", "target_output"])
def test_no_formula_takes_an_unknown_prediction_type_for_v(formula):
    from lora_distill import diffusion

    one = torch.ones(1, 1, 1, 1)
    with pytest.raises(ValueError, match="prediction_type: expected epsilon or v_prediction, got 'sample'"):
        getattr(diffusion, formula)(one, one, one, one, "sample")


def test_a_unet_for_inpainting_is_refused(folder):
    edited(folder, "unet", in_channels=9)
    with pytest.raises(ValueError, match=r"its UNet takes 9 channels and latents have 4: a pipeline for inpainting"):
        load_pipeline(str(folder))


def test_a_unet_of_stable_diffusion_xl_is_refused(folder):
    edited(folder, "unet", addition_embed_type="text_time")
    with pytest.raises(ValueError, match=r"its UNet takes more than a prompt, as Stable Diffusion XL's does"):
        load_pipeline(str(folder))


def test_a_hub_pipeline_with_fp16_files_alone_is_loaded_from_these(monkeypatch, bundle):
    tried = []

    def from_pretrained(name, variant, **_):
        tried.append(variant)
        if variant is None:
            raise OSError("no file named diffusion_pytorch_model.safetensors\nin this repository")
        return bundle

    monkeypatch.setattr(pipeline.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(pipeline, "part_config", lambda kind, source, part: {})
    assert load_pipeline("somebody/fp16-alone") is bundle and tried == [None, "fp16"]


def test_where_there_are_fp16_files_alone_they_are_used(folder):
    before = fingerprint(load_pipeline(str(folder)))
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        path = folder / part / f"{name}.safetensors"
        save_file(
            {key: value.half() for key, value in load_file(path).items()},
            path.with_name(f"{name}.fp16.safetensors"),
            {"format": "pt"},
        )
    assert fingerprint(load_pipeline(str(folder))) == before, "the full files, where there are both"
    for path in folder.glob("*/*.safetensors"):
        if ".fp16" not in path.name:
            path.unlink()
    pipe = load_pipeline(str(folder))
    assert pipe.unet.dtype == torch.float32 and torch.equal(
        pipe.unet.conv_in.weight, pipe.unet.conv_in.weight.half().float()
    )
    assert unet_config(str(folder))["in_channels"] == 4


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["missing", "cut", "pickled", "tensor", "shape", "index"])
def test_weights_that_are_missing_cut_or_of_another_shape_are_refused_in_one_line(folder, part, damage):
    (path,) = (folder / part).glob("*.safetensors")
    said = {
        "missing": "no weights, a .safetensors file is missing",
        "cut": "not a whole safetensors file",
        "pickled": "pickled weights",
        "index": "missing, though the index beside it names it",
        "tensor": "1 of \\d+ tensors are missing",
        "shape": "weights do not fit the config of their part",
    }
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage in ("tensor", "shape"):
        tensors = load_file(path)
        name = max(tensors, key=lambda name: tensors[name].numel())
        shorter = {} if damage == "tensor" else {name: tensors[name][1:].clone()}
        save_file({key: value for key, value in tensors.items() if key != name} | shorter, path, {"format": "pt"})
    else:
        path.unlink()
    if damage == "pickled":
        torch.save({}, path.with_suffix(".bin"))
    if damage == "index":
        index = {"metadata": {}, "weight_map": {"a": f"{path.stem}-00001-of-00002.safetensors"}}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_pipeline(str(folder))
    assert re.fullmatch(rf"{folder}.*({said[damage]}).*", str(caught.value))


@pytest.mark.parametrize("load", [load_pipeline, unet_config])
def test_what_is_no_pipeline_is_refused_in_one_line(load, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    cases = [
        (str(tmp_path / "none"), FileNotFoundError, "no pipeline folder"),
        ("runs/my/model", FileNotFoundError, "no pipeline folder"),
        (str(file), ValueError, r"a checkpoint in one file; .*from_single_file"),
        (
            "nobody/no-such-pipeline",
            OSError,
            "nobody/no-such-pipeline: neither a folder here nor a pipeline that the hub",
        ),
    ]
    for name, kind, said in cases:
        with pytest.raises(kind, match=rf"^[^\n]*{said}[^\n]*$"):
            load(name)
