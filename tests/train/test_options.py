"""Settings of how a training is computed: they change memory and speed, not what is learned."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import small_unet
from diffusers import DDIMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from lora_distill import processes
from lora_distill.adapters import adapter_parameters, add_adapter
from lora_distill.data.encoded import consistency_batches
from lora_distill.data.teacher import teacher_set
from lora_distill.data.trajectories import dial_batches
from lora_distill.devices import is_compiled
from lora_distill.pipeline import load_pipeline
from lora_distill.sampling import Sampler
from lora_distill.settings import Settings
from lora_distill.train import optimizer
from lora_distill.train.checkpoint import CHECKPOINT
from lora_distill.train.loop import train
from lora_distill.train.objectives import (
    ConsistencyDistillation,
    ConsistencyMimicry,
    Denoising,
    GuidanceDial,
    GuidanceDistillation,
    RecordedOutputs,
    TeacherOutputs,
    TrajectoryDistillation,
)
from lora_distill.train.recipes import distil_full_copy, distil_lora
from lora_distill.train.step import Schedule, TrainingStep

SETTINGS = Settings(train_steps=2, batch_size=2, warmup_steps=1, log_every=1, lora_rank=2)
EMPTY = torch.zeros(1, 5, 8)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    captions = [
        "a lion at the upper left, a bus at the lower right, blue",
        "a crown at the top right, green",
    ]
    return teacher_set(load_pipeline("bundled"), captions, Sampler(2, 3.0), 0, tmp_path_factory.mktemp("teacher"))


def draw(step, batch_size, generator):
    return {
        "latents": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "eps": torch.randn(batch_size, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (batch_size,), generator=generator),
        "prompt_embeds": torch.randn(batch_size, 5, 8, generator=generator),
    }


# ---------------------------------------------------------------------------------------------- checkpointing


def recomputed(unet, found):
    """Note in `found` every forward pass of the last block, and whether it has gradients."""
    unet.up_blocks[-1].resnets[0].register_forward_pre_hook(lambda *_: found.append(torch.is_grad_enabled()))


def test_activations_are_computed_again_and_the_adapter_is_the_same(teacher, tmp_path):
    trained, passes = {}, {}
    for checkpointing in (False, True):
        pipe = load_pipeline("bundled")
        recomputed(pipe.unet, passes.setdefault(checkpointing, []))
        distil_lora(pipe, teacher, SETTINGS.model_copy(update={"gradient_checkpointing": checkpointing}),
                    tmp_path / str(checkpointing))  # fmt: skip
        trained[checkpointing] = adapter_parameters(pipe.unet, "student")
        assert not pipe.unet.is_gradient_checkpointing, "as found"
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained[False], trained[True], strict=True))
    assert passes[False] == [False, True] * 2 and passes[True] == [False, True, True] * 2


def test_of_a_full_copy_the_student_alone_is_checkpointed_and_a_flag_that_was_set_stays(teacher, tmp_path):
    pipe, passes = load_pipeline("bundled"), []
    recomputed(pipe.unet, passes)
    settings = SETTINGS.model_copy(update={"gradient_checkpointing": True})
    student, _ = distil_full_copy(pipe, teacher, settings, tmp_path)
    assert passes == [False, False] and not student.unet.is_gradient_checkpointing
    pipe.unet.enable_gradient_checkpointing()
    distil_lora(pipe, teacher, settings, tmp_path)
    assert pipe.unet.is_gradient_checkpointing


# ---------------------------------------------------------------------------------------------- torch.compile


def test_a_compiled_unet_trains_the_same_and_is_compiled_once_a_role(tmp_path):
    """Teacher, target and student, which are one UNet. The backend runs the graphs as they are."""
    graphs, seen, trained = [], [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def draw_batch(step, batch_size, generator):
        seen.append(len(graphs))
        return consistency_batches(draw, 1000, 20, 2.0, 5.0)(step, batch_size, generator)

    for with_compile in (False, True):
        unet = small_unet()
        parameters = add_adapter(unet, "student", rank=2, alpha=2)
        if with_compile:
            unet.compile(backend=backend)
        objective = ConsistencyDistillation(unet, unet, DDIMScheduler(), EMPTY)
        plan = Schedule(4, 2, 1e-2, log_every=1, ema_decay=0.9)
        train(objective, draw_batch, plan, tmp_path / str(with_compile))
        trained.append(parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*trained, strict=True))
    assert 3 <= seen[-3] == seen[-2] == seen[-1] == len(graphs), "all in the first update"


def test_a_full_copy_is_compiled_if_w0_is(teacher, tmp_path, monkeypatch):
    pipe = load_pipeline("bundled")
    monkeypatch.setattr("lora_distill.train.recipes.train", lambda *_, **__: [])
    assert not is_compiled(distil_full_copy(pipe, teacher, SETTINGS, tmp_path)[0].unet)
    pipe.unet.compile(backend="eager")
    monkeypatch.setattr("lora_distill.devices._cannot_compile", lambda device: None)
    assert is_compiled(distil_full_copy(pipe, teacher, SETTINGS, tmp_path)[0].unet)


# ---------------------------------------------------------------------------------------------- optimizers


def test_8_bits_without_a_gpu_are_refused_in_one_line_and_never_replaced(teacher, tmp_path):
    settings = SETTINGS.model_copy(update={"optimizer": "adamw-8bit"})
    pipe = load_pipeline("bundled")
    with pytest.raises(ValueError, match=r"^optimizer: adamw-8bit needs a CUDA GPU; adamw runs everywhere$"):
        distil_full_copy(pipe, teacher, settings, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    distil_lora(pipe, teacher, settings, tmp_path)  # an adapter has few weights: adamw


def test_8_bits_without_their_package_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    weight = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"^optimizer: adamw-8bit needs bitsandbytes: pip install bitsandbytes, or"):
        optimizer.adamw_8bit([weight], lr=1e-3)


class FakeAdamW8bit(torch.optim.SGD):
    """Momentum that is kept as bitsandbytes keeps its states: step counts in Python, moments in eight bits."""

    def __init__(self, parameters, lr, betas, weight_decay):
        super().__init__(parameters, lr=lr)

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "state1": torch.zeros(p.shape, dtype=torch.uint8)}
                state["step"] += 1
                state["state1"] = (state["state1"] // 2 + (p.grad * 100).abs().clamp(0, 127).to(torch.uint8)).clone()
                p.data -= group["lr"] * (state["state1"].float() / 100 + 0.1 * state["step"]) * p.grad.sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_in_8_bits_equals_an_uninterrupted_one(tmp_path, monkeypatch, dtype):
    """With a stand-in for bitsandbytes, which needs a GPU."""
    package = ModuleType("bitsandbytes")
    package.optim = ModuleType("bitsandbytes.optim")
    package.optim.AdamW8bit = FakeAdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    monkeypatch.setattr(optimizer, "EIGHT_BITS_ON", "cpu")
    plan = Schedule(4, 2, 1e-3, log_every=1, checkpoint_every=2, optimizer="adamw-8bit")

    def cut(step, batch_size, generator):
        if step == 3:
            raise KeyboardInterrupt
        return draw(step, batch_size, generator)

    def objective():
        unet = small_unet().to(dtype).requires_grad_(True)
        return GuidanceDistillation(unet, small_unet().to(dtype), DDIMScheduler(), 3.0, EMPTY), unet

    whole, resumed = objective(), objective()
    train(whole[0], draw, plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(objective()[0], cut, plan, tmp_path / "cut")
    assert (tmp_path / "cut" / CHECKPOINT).exists()
    train(resumed[0], draw, plan, tmp_path / "cut")
    assert all(map(torch.equal, whole[1].parameters(), resumed[1].parameters()))


# ---------------------------------------------------------------------------------------------- GPUs


class NoValues(TorchDispatchMode):
    """Refuses what waits for a GPU: the value of a tensor, or a shape that depends on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select")
        return function(*args, **(kwargs or {}))


def guided(unet):
    return GuidanceDistillation(unet, unet, DDIMScheduler(), 3.0, EMPTY), draw


def consistent(unet):
    objective = ConsistencyDistillation(unet, unet, DDIMScheduler(), EMPTY)
    objective.moving_average = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
    return objective, consistency_batches(draw, 1000, 20, 2.0, 5.0)


def mimic(unet):
    return ConsistencyMimicry(unet, small_unet(1), DDIMScheduler()), consistency_batches(draw, 1000, 20, 2.0, 5.0)


def dial(unet):
    outputs = TeacherOutputs(unet, DDIMScheduler(), EMPTY)
    return GuidanceDial(unet, "student", outputs, 3.0), dial_batches(draw, 1.0, 7.5)


def recorded(step, batch_size, generator):
    latents = {name: torch.randn(batch_size, 4, 8, 8, generator=generator) for name in ("x_t", "uncond", "cond")}
    return draw(step, batch_size, generator) | latents


def on_trajectories(unet):
    return TrajectoryDistillation(unet, 3.0), recorded


def dial_on_trajectories(unet):
    return GuidanceDial(unet, "student", RecordedOutputs(), 3.0), dial_batches(recorded, 1.0, 7.5)


def denoising(unet):
    return Denoising(unet, DDIMScheduler()), draw


OBJECTIVES = [guided, on_trajectories, dial, dial_on_trajectories, consistent, mimic, denoising]


@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_step_asks_no_tensor_for_its_value(method, precision, monkeypatch):
    """AdamW apart: it is fused, which asks for nothing on a GPU."""
    unet = small_unet()
    add_adapter(unet, "student", rank=2, alpha=2)
    objective, draw_batch = method(unet)
    step = TrainingStep(objective, Schedule(1, 2, 1e-3, mixed_precision=precision))
    monkeypatch.setattr(step.adamw, "step", lambda: None)
    batch = draw_batch(0, 2, torch.Generator().manual_seed(0))
    with NoValues():
        step(batch)


def test_the_tables_of_an_objective_lie_on_its_device():
    """Else every step would copy them to the GPU, and wait."""
    unet = small_unet()
    add_adapter(unet, "student", rank=2, alpha=2)
    for method in OBJECTIVES:
        objective = method(unet)[0].to("meta")
        assert all(table.device.type == "meta" for table in objective.buffers())
        unet = small_unet()
        add_adapter(unet, "student", rank=2, alpha=2)


# ---------------------------------------------------------------------------------------------- keys


def test_another_number_of_processes_is_another_training(teacher, tmp_path, monkeypatch):
    pipe, keys = load_pipeline("bundled"), []
    monkeypatch.setattr("lora_distill.train.recipes.train", lambda *args, **_: keys.append(args[3].name))
    monkeypatch.setattr("lora_distill.train.recipes._save", lambda *_: None)
    for count in (1, 2, 2):
        monkeypatch.setattr(processes, "count", lambda count=count: count)
        distil_lora(pipe, teacher, SETTINGS, tmp_path)
    assert keys[0] != keys[1] == keys[2]


def test_a_batch_that_the_processes_cannot_share_evenly_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 4 processes, got 6"):
        from lora_distill.train.step import own_rows

        own_rows(6)


def test_the_plan_of_a_full_copy_alone_has_the_optimizer_of_the_settings(teacher, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr("lora_distill.train.recipes.train", lambda *args, **_: plans.append(args[2]))
    pipe, settings = load_pipeline("bundled"), SETTINGS.model_copy(update={"optimizer": "adamw-8bit"})
    distil_lora(pipe, teacher, settings, tmp_path)
    distil_full_copy(pipe, teacher, settings, tmp_path)
    assert [plan.optimizer for plan in plans] == ["adamw", "adamw-8bit"]
    assert replace(plans[1], optimizer="adamw") != plans[1]
