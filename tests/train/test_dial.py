"""Guidance as the weight of a LoRA, and distillation on trajectories: losses by hand, files, stock diffusers."""

import pytest
import torch
from conftest import moved
from diffusers import DDIMScheduler

from lora_distill.adapters import lora_layers, role, set_weight
from lora_distill.data.teacher import scene_prompts, teacher_set
from lora_distill.data.trajectories import trajectories
from lora_distill.diffusion import guide
from lora_distill.drawing import Wishes, dial_of, header_wishes
from lora_distill.lora_files import read_lora
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample, unet_passes
from lora_distill.settings import Settings
from lora_distill.train.objectives import (
    GuidanceDial,
    GuidanceDistillation,
    RecordedOutputs,
    TeacherOutputs,
    TrajectoryDistillation,
)
from lora_distill.train.recipes import distil_dial, distil_on_trajectories

W0, EMPTY = 3.0, torch.full((1, 5, 8), 0.3)
SETTINGS = Settings(train_steps=4, batch_size=2, warmup_steps=1, log_every=1, checkpoint_every=2, guidance_scale=W0)


@pytest.fixture
def scheduler():
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.fixture
def noised(inputs):
    eps, timesteps, prompt_embeds = inputs
    latents = torch.randn(eps.shape, generator=torch.Generator().manual_seed(2))
    return {"latents": latents, "eps": eps, "timesteps": timesteps, "prompt_embeds": prompt_embeds}


@pytest.fixture
def recorded(unet, noised, scheduler):
    """The same points with the teacher's outputs, as trajectories have them."""
    x_t, uncond, cond = TeacherOutputs(unet, scheduler, EMPTY)(noised)
    return {**{name: noised[name] for name in ("timesteps", "prompt_embeds")}, "x_t": x_t, "uncond": uncond,
            "cond": cond}  # fmt: skip


def at(w, batch):
    return {**batch, "guidance_scale": torch.full((2,), w)}


def gradients(parameters):
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


# ---------------------------------------------------------------------------------------------- the losses


def test_on_recorded_points_the_loss_and_gradients_are_those_of_guided_distillation(unet, noised, recorded, scheduler):
    parameters = moved(unet, "student")
    found = []
    for objective, batch in (
        (GuidanceDistillation(unet, unet, scheduler, W0, EMPTY), noised),
        (TrajectoryDistillation(unet, W0), recorded),
    ):
        loss, _ = objective(batch)
        loss.backward()
        found.append([loss.detach(), *gradients(parameters)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_no_teacher_runs_on_recorded_points(unet, recorded):
    moved(unet, "student")
    calls = []
    unet.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    TrajectoryDistillation(unet, W0)(recorded)
    GuidanceDial(unet, "student", RecordedOutputs(), W0)(at(2.0, recorded))
    assert calls == [True, True]


@pytest.mark.parametrize("w", [1.5, 3.0, 7.5])
def test_the_dials_loss_is_that_of_the_adapter_at_its_weight_over_w_less_1(unet, recorded, w):
    moved(unet, "student")
    loss, _ = GuidanceDial(unet, "student", RecordedOutputs(), W0)(at(w, recorded))
    with role(unet, "student", (w - 1) / (W0 - 1)):
        output = unet(recorded["x_t"], recorded["timesteps"], recorded["prompt_embeds"]).sample
    expected = (output - guide(recorded["uncond"], recorded["cond"], w)).square().mean() / (w - 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_guidance_the_dial_has_nothing_to_learn(unet, recorded):
    moved(unet, "student")
    assert GuidanceDial(unet, "student", RecordedOutputs(), W0)(at(1.0, recorded))[0] < 1e-6


@pytest.mark.parametrize("teacher", ["noised", "recorded"])
def test_gradient_checkpointing_changes_no_gradient_of_the_dial(unet, noised, recorded, scheduler, teacher):
    parameters = moved(unet, "student")
    outputs, batch = (TeacherOutputs(unet, scheduler, EMPTY), noised)
    if teacher == "recorded":
        outputs, batch = RecordedOutputs(), recorded
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        GuidanceDial(unet, "student", outputs, W0)(at(5.0, batch))[0].backward()
        found.append(gradients(parameters))
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# ---------------------------------------------------------------------------------------------- the weight


def test_a_weight_multiplies_the_update_and_is_taken_off_again(unet, inputs):
    moved(unet, "student", alpha=6)
    before = [dict(layer.scaling) for layer in lora_layers(unet)]
    with torch.no_grad(), role(unet, "student", 0.5):
        half = unet(*inputs).sample
        assert {layer.scaling["student"] for layer in lora_layers(unet)} == {1.5}
    assert [dict(layer.scaling) for layer in lora_layers(unet)] == before
    set_weight(unet, "student", torch.tensor(0.5))
    with torch.no_grad(), role(unet, "student"):
        torch.testing.assert_close(unet(*inputs).sample, half)


def test_a_weight_of_0_is_w0_and_one_is_taken_off_after_an_exception(unet, inputs):
    moved(unet, "student")
    with torch.no_grad():
        with role(unet, None):
            teacher = unet(*inputs).sample
        with role(unet, "student", 0.0):
            torch.testing.assert_close(unet(*inputs).sample, teacher)
    with pytest.raises(RuntimeError), role(unet, "student", 2.0):
        raise RuntimeError
    assert {layer.scaling["student"] for layer in lora_layers(unet)} == {1.0}


# ---------------------------------------------------------------------------------------------- training and files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The bundled pipeline, a teacher set and trajectories."""
    folder, pipe = tmp_path_factory.mktemp("made"), load_pipeline("bundled")
    captions, sampler = scene_prompts("noto", "train", 3, seed=0).captions, Sampler(2, W0)
    return pipe, teacher_set(pipe, captions, sampler, 0, folder), trajectories(pipe, captions, sampler, 0, folder)


@pytest.mark.parametrize("kind", ["noised", "recorded"])
def test_a_trained_dial_says_its_range_and_is_drawn_by_stock_diffusers_with_its_weight(made, tmp_path, kind):
    pipe, noised, recorded = made
    log = distil_dial(pipe, noised if kind == "noised" else recorded, SETTINGS, tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(0 < row["loss"] < 10 for row in log)
    assert {layer.scaling["dial"] for layer in lora_layers(pipe.unet) if "dial" in layer.scaling} == {1.0}
    metadata = read_lora(tmp_path / "dial.safetensors").metadata
    said = {"method": "guidance dial", "w0": "3", "w_min": "1", "w_max": "7.5", "guidance_scale": "3.0"}
    assert metadata.items() >= said.items()
    assert dial_of(metadata, "dial") == 3.0 and header_wishes(metadata, "dial") == Wishes(25, 3.0, "own", 64)

    stock = load_pipeline("bundled")
    stock.load_lora_weights(tmp_path, weight_name="dial.safetensors", adapter_name="dial")
    noise, embeds = initial_noise(pipe, 1, 0), encode_prompts(pipe, ["a lion"])
    for w in (1.5, 5.0):
        stock.set_adapters(["dial"], [(w - 1) / 2])
        options = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
        theirs = stock(["a lion"], latents=noise.clone(), **options).images
        ours = sample(pipe, sampler := Sampler(2, w, adapter="dial", w0=3.0), noise, embeds, None)
        assert torch.equal(ours, theirs) and unet_passes(pipe, sampler) == 2


def test_a_student_on_trajectories_trains_from_where_it_was_cut(made, tmp_path):
    pipe, _, recorded = made
    whole = distil_on_trajectories(pipe, recorded, SETTINGS, tmp_path / "whole")

    def cut(step, pipe):
        if step == 2:
            raise KeyboardInterrupt
        return {}

    looked = (2, lambda step, pipe: {}, "none")
    with pytest.raises(KeyboardInterrupt):
        distil_on_trajectories(pipe, recorded, SETTINGS, tmp_path / "cut", milestones=(2, cut, "none"))
    again = distil_on_trajectories(pipe, recorded, SETTINGS, tmp_path / "cut", milestones=looked)
    assert [row["loss"] for row in again if "loss" in row] == [row["loss"] for row in whole]
    files = [(tmp_path / name / "trajectories.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert read_lora(tmp_path / "cut" / "trajectories.safetensors").metadata["guidance_scale"] == "1.0"


def test_milestones_are_measured_at_weight_1(made, tmp_path):
    pipe, seen = made[0], []

    def measure(step, measured):
        seen.append({layer.scaling["dial"] for layer in lora_layers(pipe.unet) if "dial" in layer.scaling})
        return {}

    distil_dial(pipe, made[2], SETTINGS, tmp_path, milestones=(1, measure, "weights"))
    assert seen == [{1.0}] * 5


def test_a_w0_above_the_range_extends_it(made, tmp_path):
    distil_dial(made[0], made[2], SETTINGS.model_copy(update={"guidance_scale": 9.0, "train_steps": 1}), tmp_path)
    assert read_lora(tmp_path / "dial.safetensors").metadata["w_max"] == "9"


def test_a_dial_for_no_guidance_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="guidance_scale: a dial's w0 must be above 1"):
        distil_dial(made[0], made[2], SETTINGS.model_copy(update={"guidance_scale": 1.0}), tmp_path)


@pytest.mark.parametrize("w0", ["1", "0.5", "three", "nan", "inf"])
def test_a_header_with_a_w0_that_is_none_is_refused(w0):
    with pytest.raises(ValueError, match=r"my\.safetensors: w0: expected a number above 1 in the header"):
        dial_of({"made_by": "lora_distill", "w0": w0}, "my.safetensors")


def test_a_header_of_others_says_nothing_of_a_dial():
    assert dial_of({"w0": "3"}, "theirs") is None and dial_of({}, "none") is None
