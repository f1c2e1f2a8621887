"""Roles on one W0, and LoRA files that lose nothing on their way."""

import pytest
import torch
from conftest import moved, small_unet
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from lora_distill.adapters import (
    adapter_names,
    adapter_parameters,
    add_adapter,
    add_sum,
    base_weights,
    export_kohya,
    load_adapter,
    merged_copy,
    plain_copy,
    role,
    rounding_error,
    save_adapter,
)
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.storage import DamagedFileError


def output(unet, inputs):
    with torch.no_grad():
        return unet(*inputs).sample


def state(unet):
    """All that a role may touch: active adapters, on or off, and what is trained."""
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    switches = [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    return switches, [p.requires_grad for p in unet.parameters()]


# ---------------------------------------------------------------------------------------------- one W0


def test_a_new_adapter_changes_nothing_yet(unet, inputs):
    before = output(unet, inputs)
    add_adapter(unet, "student", rank=2, alpha=2)
    assert torch.equal(output(unet, inputs), before)


def test_the_teacher_is_the_unet_without_adapters(unet, inputs):
    before = output(unet, inputs)
    moved(unet, "student")
    assert not torch.allclose(output(unet, inputs), before, atol=1e-3)
    with role(unet, None):
        assert torch.equal(output(unet, inputs), before)


def test_there_is_one_w0_however_many_roles(unet):
    w0 = sum(p.numel() for p in unet.parameters())
    pointers = {p.data_ptr() for p in unet.parameters()}
    adapters = [*moved(unet, "student"), *moved(unet, "finetune", rank=3)]
    assert sum(p.numel() for p in unet.parameters()) == w0 + sum(p.numel() for p in adapters)
    assert pointers <= {p.data_ptr() for p in unet.parameters()}


def test_parameters_are_two_matrices_a_layer_of_the_rank(unet):
    parameters = add_adapter(unet, "student", rank=3, alpha=3)
    layers = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    assert len(parameters) == 2 * len(layers) and all(3 in p.shape for p in parameters)
    expected = sum(3 * (layer.in_features + layer.out_features) for layer in layers)
    assert sum(p.numel() for p in parameters) == expected


def test_training_an_adapter_leaves_w0_bit_identical(unet, inputs):
    w0 = {name: p.clone() for name, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(add_adapter(unet, "student", rank=2, alpha=2), lr=0.1)
    for _ in range(3):
        unet(*inputs).sample.square().mean().backward()
        optimizer.step()
    after = {n.replace(".base_layer", ""): p for n, p in unet.named_parameters() if "lora_" not in n}
    assert after.keys() == w0.keys() and all(torch.equal(after[name], w0[name]) for name in w0)


def test_only_the_newest_adapter_is_trained(unet):
    old, new = add_adapter(unet, "old", rank=2, alpha=2), add_adapter(unet, "new", rank=2, alpha=2)
    assert all(p.requires_grad for p in new) and not any(p.requires_grad for p in old)
    assert sum(p.requires_grad for p in unet.parameters()) == len(new)


def test_adapters_of_a_16_bit_w0_are_32_bit(unet):
    parameters = add_adapter(unet.bfloat16(), "student", rank=2, alpha=2)
    assert {p.dtype for p in parameters} == {torch.float32}


def test_adapters_are_16_bit_where_that_is_asked(unet):
    parameters = add_adapter(unet.bfloat16(), "student", rank=2, alpha=2, dtype=torch.bfloat16)
    assert {p.dtype for p in parameters} == {torch.bfloat16}


def test_the_first_weights_come_from_the_seed_alone(unet):
    torch.manual_seed(11)
    one = add_adapter(unet, "one", rank=2, alpha=2, seed=5)
    after = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), after), "the global generator is left alone"
    two = add_adapter(unet, "two", rank=2, alpha=2, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_sum_of_adapters_is_what_diffusers_makes_of_them(unet, inputs):
    moved(unet, "fast", targets="all")
    moved(unet, "styled", seed=4, rank=3, alpha=6)
    add_sum(unet, "both", {"fast": 1.0, "styled": 0.5})
    with role(unet, "both"):
        ours = output(unet, inputs)
    unet.set_adapters(["fast", "styled"], [1.0, 0.5])
    unet.enable_adapters()
    assert torch.allclose(ours, output(unet, inputs), atol=1e-5)
    with pytest.raises(ValueError, match="has an adapter 'both' already"):
        add_sum(unet, "both", {"fast": 1.0})
    with pytest.raises(ValueError, match="no adapter 'slow' on this UNet"):
        add_sum(unet, "more", {"slow": 1.0})


# ---------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("played", [None, "one", "two"])
def test_a_role_leaves_everything_as_it_was(unet, played):
    moved(unet, "one"), moved(unet, "two")
    found = state(unet)
    with role(unet, played):
        assert state(unet)[1] == found[1], "what is trained never changes"
    assert state(unet) == found


def test_a_role_knows_adapters_that_were_added_or_deleted_since(unet, inputs):
    base = output(unet, inputs)
    moved(unet, "one")
    with role(unet, None):
        assert torch.equal(output(unet, inputs), base)
    moved(unet, "two", targets="all")  # on layers that carried none
    with role(unet, None):
        assert torch.equal(output(unet, inputs), base)
    unet.delete_adapters("two")
    moved(unet, "two", targets="all", seed=4)
    with role(unet, None):
        assert torch.equal(output(unet, inputs), base)
    unet.unload_lora()
    moved(unet, "three")
    with role(unet, None):
        assert torch.equal(output(unet, inputs), base)


def test_a_role_does_not_walk_through_the_modules_each_time(unet, monkeypatch):
    moved(unet, "student")
    with role(unet, None):
        pass
    monkeypatch.setattr(type(unet), "modules", None)
    monkeypatch.setattr(type(unet), "parameters", None)
    with role(unet, None), role(unet, "student"):
        pass


def test_a_role_is_left__by_an_exception_too(unet):
    moved(unet, "student")
    found = state(unet)
    with pytest.raises(ZeroDivisionError), role(unet, None):
        raise ZeroDivisionError
    assert state(unet) == found


def test_roles_nest(unet, inputs):
    base = output(unet, inputs)
    moved(unet, "student")
    student = output(unet, inputs)
    with role(unet, None):
        with role(unet, "student"):
            with role(unet, None):
                assert torch.equal(output(unet, inputs), base)
            assert torch.equal(output(unet, inputs), student)
        assert torch.equal(output(unet, inputs), base)
    assert torch.equal(output(unet, inputs), student)


def test_a_role_that_nobody_can_play(unet):
    with pytest.raises(ValueError, match="no adapter 'student' on this UNet; it carries none"):
        role(unet, "student").__enter__()
    add_adapter(unet, "finetune", rank=2, alpha=2)
    with pytest.raises(ValueError, match="carries \\['finetune'\\]"):
        role(unet, "student").__enter__()


def test_gradients_are_the_same_with_gradient_checkpointing(unet, inputs):
    parameters = moved(unet, "student")

    def gradients():
        with torch.no_grad(), role(unet, None):
            target = unet(*inputs).sample
        (unet(*inputs).sample - target).square().mean().backward()
        found = [p.grad.clone() for p in parameters]
        unet.zero_grad()
        return found

    plain = gradients()
    unet.enable_gradient_checkpointing()
    unet.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(), strict=True))
    assert any(gradient.abs().max() > 0 for gradient in plain)


# ---------------------------------------------------------------------------------------------- copies and files


def test_a_plain_copy_is_w0_and_shares_no_memory(unet, inputs):
    before = output(unet, inputs)
    moved(unet, "student")
    copy = plain_copy(unet)
    assert torch.equal(output(copy, inputs), before) and not adapter_names(copy)
    assert not {p.data_ptr() for p in copy.parameters()} & {p.data_ptr() for p in unet.parameters()}


def test_copies_draw_no_random_weights(unet):
    moved(unet, "student")
    before = torch.get_rng_state()
    assert plain_copy(unet).device == merged_copy(unet, "student").device == torch.device("cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_plain_copy_is_trained_and_keeps_dtypes(unet):
    copy = plain_copy(unet.bfloat16(), time_cond_proj_dim=16)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16} and all(p.requires_grad for p in copy.parameters())
    assert not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_merged_copy_has_peft_s_updates_and_shares_all_other_weights(unet, targets):
    moved(unet, "student", alpha=3, targets=targets)
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, BaseTunerLayer)}
    merged = dict(merged_copy(unet, "student").named_parameters())
    for name, layer in layers.items():
        assert torch.allclose(merged[f"{name}.weight"], layer.weight + layer.get_delta_weight("student"), atol=1e-6)
    w0 = base_weights(unet)
    shared = {name for name, p in merged.items() if p.data_ptr() == w0[name].data_ptr()}
    assert shared == merged.keys() - {f"{name}.weight" for name in layers}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_merged_in_float32_and_rounded_once(dtype):
    exact, half = small_unet(), small_unet()
    half.to(dtype)
    exact.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    for each in (exact, half):
        for p in moved(each, "student"):
            p.data = (0.1 * p.data).to(dtype).to(each.dtype)
    reference, merged = merged_copy(exact, "student").state_dict(), merged_copy(half, "student").state_dict()
    assert all(torch.equal(merged[name], reference[name].to(dtype)) for name in merged)


def test_the_rounding_error_says_how_much_of_an_update_16_bits_hold(unet):
    parameters = moved(unet, "student")
    assert rounding_error(unet, "student") < 1e-4
    unet.bfloat16()
    assert rounding_error(unet, "student") < 0.1
    for p in parameters:
        p.data *= 1e-3
    assert rounding_error(unet, "student") == pytest.approx(1, abs=0.05), "all of it is lost"
    for p in parameters:
        p.data.zero_()
    assert rounding_error(unet, "student") == 0


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_merged_and_unmerged_are_the_same_function(unet, inputs, targets):
    moved(unet, "student", alpha=3, targets=targets)
    assert torch.allclose(output(merged_copy(unet, "student"), inputs), output(unet, inputs), atol=1e-5)


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("alpha", [2, 7])
def test_a_file_gives_back_the_adapter_exactly(unet, inputs, tmp_path, targets, alpha):
    moved(unet, "student", alpha=alpha, targets=targets)
    save_adapter(unet, "student", tmp_path / "lora.safetensors", {"note": "kept"})
    other = small_unet()
    metadata = load_adapter(other, "again", tmp_path / "lora.safetensors")
    assert metadata["note"] == "kept" and torch.equal(output(other, inputs), output(unet, inputs))
    pairs = zip(adapter_parameters(unet, "student"), adapter_parameters(other, "again"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_stock_diffusers_draws_the_same_from_the_file_and_after_fusing(bundle, tmp_path, targets):
    moved(bundle.unet, "student", alpha=1, targets=targets)
    save_adapter(bundle.unet, "student", tmp_path / "lora.safetensors")
    prompts, noise = (
        ["a lion at the upper left, a bus at the lower right, blue"],
        initial_noise(bundle, 1, seed=1),
    )
    embeds = encode_prompts(bundle, prompts), encode_prompts(bundle, [""])
    ours = sample(bundle, Sampler(2, adapter="student"), noise, *embeds)
    teacher = sample(bundle, Sampler(2), noise, *embeds)
    stock = load_pipeline("bundled")
    stock.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    options = {"latents": noise, "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    assert (stock(prompts, **options).images - ours).abs().max() <= 1e-5
    stock.fuse_lora()
    assert (stock(prompts, **options).images - ours).abs().max() <= 1e-3
    assert (teacher - ours).abs().max() > 0.1


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_kohya_export_loads_in_stock_diffusers(bundle, tmp_path, targets):
    moved(bundle.unet, "student", alpha=1, targets=targets)
    export_kohya(bundle.unet, "student", tmp_path / "kohya.safetensors")
    stock = load_pipeline("bundled")
    stock.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), encode_prompts(bundle, ["a lion"])
    assert torch.allclose(output(stock.unet, inputs), output(bundle.unet, inputs), atol=1e-5)


def test_a_file_for_another_architecture_is_refused(unet, tmp_path):
    moved(unet, "student")
    save_adapter(unet, "student", tmp_path / "lora.safetensors")
    wider = small_unet(channels=(16, 32))
    with pytest.raises(ValueError, match=r"lora\.safetensors: made for another architecture: unet\..*lora"):
        load_adapter(wider, "student", tmp_path / "lora.safetensors")
    assert not adapter_names(wider)


@pytest.mark.parametrize("length", [0, 50, -1])
def test_a_truncated_file_is_refused(unet, tmp_path, length):
    moved(unet, "student")
    path = tmp_path / "lora.safetensors"
    save_adapter(unet, "student", path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedFileError, match="not a readable LoRA file"):
        load_adapter(small_unet(), "student", path)


def test_a_missing_file_is_named(unet, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none.safetensors")):
        load_adapter(unet, "student", tmp_path / "none.safetensors")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_file_with_numbers_that_are_not_finite_is_refused(unet, tmp_path, value):
    moved(unet, "student")
    save_adapter(unet, "student", tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    tensors[min(tensors)][0, 0] = value
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(DamagedFileError, match=r"1 of \d+ tensors are not finite, unet"):
        load_adapter(small_unet(), "student", tmp_path / "lora.safetensors")
