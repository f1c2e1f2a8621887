"""Where a pipeline runs and in what: devices, 16 bits on old GPUs, torch.compile, attention; tested without a GPU."""

import pytest
import torch
from conftest import moved

from lora_distill import devices, pipeline
from lora_distill.adapters import merged_copy, plain_copy, role
from lora_distill.deployment import deployed
from lora_distill.devices import choose_device, compiled, is_compiled
from lora_distill.fingerprint import fingerprint
from lora_distill.judge.timing import runtime
from lora_distill.pipeline import encode_prompts, load_pipeline, pipeline_for
from lora_distill.settings import Settings


def gpus(monkeypatch, count):
    """Let PyTorch report so many GPUs; return the list of those that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(("count", "device"), [(2, "cuda"), (0, "cpu")])
def test_auto_is_the_gpu_where_there_is_one(monkeypatch, count, device):
    gpus(monkeypatch, count)
    assert choose_device("auto") == device and choose_device("cpu") == "cpu"


def test_a_gpu_by_number_becomes_the_current_one_for_every_library(monkeypatch):
    chosen = gpus(monkeypatch, 2)
    assert choose_device("cuda:1") == "cuda:1" and chosen == [1]


@pytest.mark.parametrize(
    ("count", "device", "said"),
    [
        (0, "cuda", "device: cuda, but PyTorch finds no GPU here; auto or cpu would do"),
        (0, "cuda:1", "device: cuda:1, but PyTorch finds no GPU here"),
        (2, "cuda:2", "device: cuda:2, but this machine has 2 GPUs, numbered from 0"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(monkeypatch, count, device, said):
    gpus(monkeypatch, count)
    with pytest.raises(ValueError, match=f"^{said}[^\n]*$"):
        choose_device(device)


def test_one_gpu_by_number_is_refused_for_several_processes(monkeypatch):
    gpus(monkeypatch, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="device: cuda:1 is one GPU for 2 processes; auto or cuda would do"):
        choose_device("cuda:1")


def test_a_gpu_that_emulates_bfloat16_is_named_with_what_would_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.warns(UserWarning, match="this GPU emulates bfloat16, which is slow: use float16"):
        devices.warn_of_emulation("cuda")
    devices.warn_of_emulation("cpu")


def test_the_layout_for_a_gpu_changes_no_result(bundle):
    def results(pipe):
        moved(pipe.unet, "student", targets="all")
        inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
        embeds = encode_prompts(pipe, ["a lion", "an owl"])
        with torch.no_grad():
            unets = pipe.unet, merged_copy(pipe.unet, "student"), plain_copy(pipe.unet)
            return [unet(*inputs, embeds).sample for unet in unets] + [pipe.vae.decode(inputs[0]).sample]

    expected, before = results(load_pipeline("bundled")), fingerprint(bundle)
    precision = torch.get_float32_matmul_precision()
    try:
        pipeline._tune_for_gpu(bundle)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert bundle.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(results(bundle), expected, strict=True))
    assert fingerprint(bundle) == before


def test_attention_is_pytorch_s_own_for_all_roles(bundle):
    assert {type(processor).__name__ for processor in bundle.unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_the_pipeline_of_a_run_follows_all_of_its_settings():
    pipe = pipeline_for(Settings(device="cpu", dtype="bfloat16", resolution=96))
    assert (pipe.unet.dtype, pipe.unet.config.sample_size) == (torch.bfloat16, 12) and not is_compiled(pipe.unet)


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def eager(monkeypatch):
    """torch.compile that traces the graphs and runs them in eager mode: no compiler is needed."""
    from functools import partial, partialmethod

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    devices._cannot_compile.cache_clear()
    yield
    devices._cannot_compile.cache_clear()
    torch._dynamo.reset()


def test_a_compiled_unet_keeps_its_roles_and_its_outputs(unet, inputs, eager):
    def outputs():
        found = []
        with torch.no_grad():
            for name in (None, "one"):
                with role(unet, name):
                    found.append(unet(*inputs).sample)
        return found

    moved(unet, "one")
    expected = outputs()
    compiled(unet)
    assert is_compiled(unet) and runtime(unet) == "torch.compile"
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs(), expected, strict=True))
    moved(unet, "two", seed=6)
    with torch.no_grad(), role(unet, None):
        assert torch.allclose(unet(*inputs).sample, expected[0], atol=1e-5), "with an adapter that came later"


def test_gradients_of_a_compiled_unet_are_the_same(unet, inputs, eager):
    parameters = moved(unet, "student")

    def gradients():
        unet.zero_grad()
        unet(*inputs).sample.square().mean().backward()
        return [p.grad.clone() for p in parameters]

    expected = gradients()
    compiled(unet)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(), expected, strict=True))


def test_where_torch_compile_cannot_work_one_warning_says_so(unet, inputs, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C compiler was found\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    devices._cannot_compile.cache_clear()
    said = r"^compile: torch.compile does not work here, running without it \(no C compiler was found\)$"
    with pytest.warns(UserWarning, match=said) as caught:
        compiled(unet)
    devices._cannot_compile.cache_clear()
    assert len(caught) == 1 and not is_compiled(unet) and unet(*inputs).sample.isfinite().all()


def test_what_is_deployed_from_a_compiled_unet_is_compiled(eager):
    pipe = load_pipeline("bundled", dtype=torch.bfloat16)
    compiled(pipe.unet)
    assert is_compiled(deployed(pipe).unet)
