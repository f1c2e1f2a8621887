"""LoRA files of every form that people bring: as stock diffusers reads them, or refused with the true reason."""

import json
import random
import re
import warnings

import pytest
import torch
from conftest import moved, small_unet
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_distill.adapters import (
    TARGETS,
    adapter_names,
    adapter_parameters,
    add_adapter,
    export_kohya,
    load_adapter,
    merged_copy,
    save_adapter,
)
from lora_distill.errors import InputError, RunError
from lora_distill.lora_files import read_lora

CONFIG = {"r": 2, "lora_alpha": 3}


def output(unet, inputs):
    with torch.no_grad():
        return unet(*inputs).sample


def stock(path):
    """The UNet with a file as StableDiffusionPipeline.load_lora_weights adds it."""
    unet, mixin = small_unet(), StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(str(path), return_lora_metadata=True)
    assert all("lora" in key for key in state)
    mixin.load_lora_into_unet(state, alphas, unet, adapter_name="stock", metadata=metadata)
    return unet


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def adapted():
    """A UNet with an adapter on all layers, of rank 2 and alpha 3; no test changes it."""
    unet = small_unet()
    moved(unet, "student", alpha=3, targets="all")
    return unet


@pytest.fixture(scope="module")
def lora(adapted):
    """Its state by PEFT's names, without a prefix."""
    unet = adapted
    return {key: value.clone() for key, value in get_peft_model_state_dict(unet, adapter_name="student").items()}


def packed(**fields):
    return {LORA_ADAPTER_METADATA_KEY: json.dumps({f"unet.{key}": value for key, value in (CONFIG | fields).items()})}


def renamed(state, *rules, prefix=""):
    for old, new in rules:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return {prefix + key: value for key, value in state.items()}


def of_kohya(state, alpha=3.0):
    pairs = {}
    for key, value in state.items():
        name, _, part = key.partition(".lora_")
        name = f"lora_unet_{name.replace('.', '_')}"
        pairs[f"{name}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        pairs[f"{name}.alpha"] = torch.tensor(alpha)
    return pairs


ATTENTION = r"(attn\d)\.(to_[qkv]|to_out)(?:\.0)?\.lora_"
FORMS = {  # the tensors' names, the metadata
    "peft": lambda s: (renamed(s, prefix="unet."), packed(target_modules=TARGETS["all"])),
    "peft, no config": lambda s: (renamed(s, prefix="unet."), {}),
    "diffusers": lambda s: (renamed(s, ("lora_A", "lora.down"), ("lora_B", "lora.up"), prefix="unet."), {}),
    "old attention processors": lambda s: (
        renamed(
            {key: value for key, value in s.items() if ".attn" in key},
            (ATTENTION + "A", r"\1.processor.\2_lora.down"),
            (ATTENTION + "B", r"\1.processor.\2_lora.up"),
            prefix="unet.",
        ),
        {},
    ),
    "kohya": lambda s: (of_kohya(s), {"ss_network_dim": "2"}),
    "kohya, no alpha": lambda s: ({key: v for key, v in of_kohya(s).items() if "alpha" not in key}, {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_of_each_form_is_loaded_as_stock_diffusers_loads_it(lora, inputs, tmp_path, form, dtype):
    tensors, metadata = FORMS[form](lora)
    path = tmp_path / "lora.safetensors"
    save_file({key: value.to(dtype) for key, value in tensors.items()}, path, metadata)
    ours = small_unet()
    load_adapter(ours, "mine", path)
    theirs = output(stock(path), inputs)
    assert torch.equal(output(ours, inputs), theirs) and not torch.allclose(
        theirs, output(small_unet(), inputs), atol=0.01
    )
    assert torch.allclose(output(merged_copy(ours, "mine"), inputs), theirs, atol=1e-5)


@pytest.mark.parametrize(
    "form",
    [
        lambda s: (s, {}),
        lambda s: (renamed(s, (r"\.weight$", ".default.weight")), {}),
        lambda s: (renamed(s, prefix="module.unet."), {}),
        lambda s: (renamed(s, prefix="base_model.model."), {}),
        lambda s: (renamed(s, prefix="base_model.model.unet."), {}),
    ],
    ids=["no prefix", "adapter's name", "module", "base_model.model", "base_model.model.unet"],
)
@pytest.mark.filterwarnings("ignore:.*adapter_config.json")
def test_prefixes_that_stock_diffusers_stumbles_over_are_read(lora, inputs, tmp_path, form):
    """Stock loads nothing of the first, without an error."""
    tensors, metadata = form(lora)
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    save_file(*FORMS["peft, no config"](lora)[:1], tmp_path / "plain.safetensors")
    unet = small_unet()
    load_adapter(unet, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(unet, inputs), output(stock(tmp_path / "plain.safetensors"), inputs))


def test_a_folder_of_peft_has_its_scale_in_the_file_beside(lora, adapted, inputs, tmp_path):
    save_file(renamed(lora, prefix="base_model.model."), tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"no adapter_config\.json of PEFT beside it, alpha is taken for the rank"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    again = small_unet()
    load_adapter(again, "mine", tmp_path)
    assert torch.equal(output(again, inputs), output(adapted, inputs))
    for damaged in ("", "{", "[1]", '{"r": 2}'):
        (tmp_path / "adapter_config.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(InputError, match=r"^\S*adapter_config\.json: [^\n]*expected[^\n]*$"):
            read_lora(tmp_path)


def test_every_layer_of_a_kohya_file_has_its_own_alpha(lora, inputs, tmp_path):
    """Stock diffusers reads alphas that differ wrongly for attention, and a missing one as the commonest."""
    tensors = of_kohya(lora)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    for number, key in enumerate(alphas):
        tensors[key] = torch.tensor(float(number % 3 + 1))
    tensors.pop(alphas[0])  # kohya's code then takes the rank
    save_file(tensors, tmp_path / "lora.safetensors")
    unet = small_unet()
    load_adapter(unet, "mine", tmp_path / "lora.safetensors")
    found = {f"lora_unet_{n.replace('.', '_')}.alpha": m for n, m in unet.named_modules() if hasattr(m, "lora_A")}
    assert found.keys() == set(alphas)
    for number, key in enumerate(alphas):
        assert found[key].scaling["mine"] == (number % 3 + 1) / 2 if number else 1.0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha_pattern": {"to_q": 8}},
        {"rank_pattern": {"to_k": 3}},
        {"rank_pattern": {"to_k": 3, "proj_in": 1}, "alpha_pattern": {"to_k": 5}, "use_rslora": True},
        {"use_rslora": True},
    ],
    ids=["plain", "alphas", "ranks", "both", "rslora"],
)
def test_scales_that_differ_by_layer_are_kept_by_both_forms(unet, inputs, tmp_path, options):
    targets = ["to_q", "to_k", "to_v", "proj_in", "conv1"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, **options), adapter_name="student")
    for name, p in unet.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    expected = output(unet, inputs)
    save_adapter(unet, "student", tmp_path / "peft.safetensors")
    export_kohya(unet, "student", tmp_path / "kohya.safetensors")
    for name in ("peft", "kohya"):
        ours = small_unet()
        load_adapter(ours, "mine", tmp_path / f"{name}.safetensors")
        assert torch.allclose(output(ours, inputs), expected, atol=1e-5), name
        assert torch.allclose(output(stock(tmp_path / f"{name}.safetensors"), inputs), expected, atol=1e-5), name
        save_adapter(ours, "mine", tmp_path / "again.safetensors")
        again = small_unet()
        load_adapter(again, "mine", tmp_path / "again.safetensors")
        assert torch.equal(output(again, inputs), output(ours, inputs))


# ---------------------------------------------------------------------------------------------- refused


def one(key, *shape):
    return {key: torch.ones(shape or (2, 8))}


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHERS = {
    "dora of kohya": (one("lora_unet_x.dora_scale"), "DoRA"),
    "dora of peft": (one(f"unet.{LAYER}.lora_magnitude_vector"), "DoRA"),
    "loha": (one("lora_unet_x.hada_w1_a"), "LoHa"),
    "lokr": (one("lora_unet_x.lokr_w1"), "LoKr"),
    "tucker": (one("lora_unet_x.lora_mid.weight"), "Tucker"),
    "oft": (one("lora_unet_x.oft_blocks"), "OFT"),
    "boft": (one("unet.x.boft_R"), "OFT"),
    "glora": (one("lora_unet_x.a1.weight"), "GLoRA"),
    "full": (one("lora_unet_x.diff"), "whole differences"),
    "norms": (one("lora_unet_x.diff_b"), "whole differences"),
    "ia3": (one("lora_unet_x.on_input"), "IA3"),
    "biases": (one(f"unet.{LAYER}.lora_B.bias"), "with biases"),
    "control": (one("lora_controlnet"), "Control-LoRA"),
    "text encoder of kohya": (
        one("lora_te_text_model_encoder_layers_0_x.alpha"),
        "made for the text encoder too",
    ),
    "text encoder of diffusers": (
        one("text_encoder.text_model.x.lora_linear_layer.up"),
        "made for the text enc",
    ),
    "sdxl": (one("lora_te2_text_model_x.alpha"), "made for Stable Diffusion XL"),
    "sdxl of diffusers": (one("text_encoder_2.text_model.x.lora_A.weight"), "made for Stable Diffusion XL"),
    "original names": (one("lora_unet_input_blocks_4_1_proj_in.alpha"), "original Stable Diffusion code"),
    "flux": (one("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"), "made for a transformer"),
    "flux of kohya": (one("lora_unet_double_blocks_0_img_attn_proj.alpha"), "made for a transformer"),
    "sd3": (one("lora_unet_joint_blocks_0_x.alpha"), "made for a transformer"),
    "flux of ai-toolkit": (one("diffusion_model.double_blocks.0.x.lora_A.weight"), "made for a transformer"),
    "embedding": (one("emb_params"), "not a LoRA file, it holds 1 tensors, the first is emb_params"),
    "checkpoint": (one("model.diffusion_model.time_embed.0.weight"), "not a LoRA file"),
    "nothing": ({}, "not a LoRA file, it holds no tensors"),
    "half": (one(f"unet.{LAYER}.lora_A.weight"), "matrix B of this layer is missing"),
    "no rank": (
        one(f"unet.{LAYER}.lora_A.weight", 0, 8) | one(f"unet.{LAYER}.lora_B.weight", 8, 0),
        "are no product of one rank",
    ),
    "two ranks": (
        one(f"unet.{LAYER}.lora_A.weight", 2, 8) | one(f"unet.{LAYER}.lora_B.weight", 8, 3),
        "are no product of one rank",
    ),
    "vectors": (
        one(f"unet.{LAYER}.lora_A.weight", 8) | one(f"unet.{LAYER}.lora_B.weight", 8),
        "are no product of one rank",
    ),
    "twice": (
        {f"{p}{LAYER}.lora_{x}.weight": torch.ones(2, 2) for p in ("", "unet.") for x in "AB"},
        "two adapters in one file",
    ),
    "integers": ({f"unet.{LAYER}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)}, "expected floating-point"),
    "unknown": (one("unet.x.lora_C.weight"), "is no part of a LoRA that is known here"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_kind_of_file_is_refused_by_its_kind(kind, unet, tmp_path):
    tensors, reason = OTHERS[kind]
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError) as caught:
        load_adapter(unet, "mine", path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value) and "\n" not in str(caught.value)
    assert not adapter_names(unet)


@pytest.mark.parametrize(("width", "kind"), [(768, "Diffusion 1"), (1024, "Diffusion 2"), (2048, "Diffusion XL")])
@pytest.mark.parametrize("name", ["unet.{}.lora_{}.weight", "lora_unet_{}.lora_{}.weight"])
def test_the_stable_diffusion_that_a_lora_is_for_is_named(unet, tmp_path, width, kind, name):
    layer = LAYER.replace("attn1.to_q", "attn2.to_k")
    parts = ("A", "B") if name.startswith("unet") else ("down", "up")
    layer = layer if name.startswith("unet") else layer.replace(".", "_")
    shapes = zip(parts, [(2, width), (8, 2)], strict=True)
    save_file({name.format(layer, part): torch.ones(shape) for part, shape in shapes}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=rf"another architecture: Stable {kind}, whose prompts have {width} features"):
        load_adapter(unet, "mine", tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("lora.safetensors", b"", "not a readable LoRA file"),
        ("lora.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        ("lora.safetensors", b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        ("lora.safetensors", b"\n <html>", "a web page"),
        ("lora.safetensors", b"PK\x03\x04 archive/data.pkl", "a zip file or a pickle"),
        ("lora.safetensors", b"\xff" * 8 + b"{}", "not a readable LoRA file"),
        ("lora.safetensors", (2).to_bytes(8, "little") + b"[]", "not a readable LoRA file"),
        ("lora.bin", b"\x80\x02", "a pickle could run code and is not loaded"),
        ("lora.PT", b"\x80\x02", "a pickle could run code and is not loaded"),
        ("lora.ckpt", b"\x80\x02", "a pickle could run code and is not loaded"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_by_what_it_is(unet, tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: [^\n]*{reason}[^\n]*$"):
        load_adapter(unet, "mine", path)


def test_of_a_folder_the_only_file_is_taken(unet, inputs, tmp_path):
    with pytest.raises(InputError, match=r"a folder; expected one \.safetensors file in it, found none"):
        read_lora(tmp_path)
    moved(unet, "student")
    save_adapter(unet, "student", tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "._pytorch_lora_weights.safetensors").write_bytes(b"of a Mac")
    other = small_unet()
    load_adapter(other, "mine", tmp_path)
    assert torch.equal(output(other, inputs), output(unet, inputs))
    save_adapter(unet, "student", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"found b\.safetensors, pytorch_lora_weights\.safetensors; name the file"):
        read_lora(tmp_path)


# ---------------------------------------------------------------------------------------------- PEFT's config


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 10**7}, "the config says rank 10000000, the tensors have 2"),
        *(({"r": value}, "r: expected a whole number above 0") for value in (0, -1, 2.5, True, None, "2", [2])),
        *(
            ({"lora_alpha": value}, "lora_alpha: expected a number above 0")
            for value in (0, -3, float("nan"), float("inf"), 10**400, True, None, "3")
        ),
        ({"alpha_pattern": {"to_q": 0}}, "alpha_pattern: to_q: expected a number above 0"),
        ({"alpha_pattern": [1]}, "alpha_pattern: expected names of layers"),
        *(
            ({"alpha_pattern": {pattern: 1}}, "alpha_pattern: expected names of layers")
            for pattern in ("(a+)+b", "", "[", "*", "+a", "\\", "a**", ".*.*.*.*.*x")
        ),
        ({"alpha_pattern": {"to_q": "5"}}, "alpha_pattern: to_q: expected a number above 0, got '5'"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"rank_pattern": {"to_q": 3}}, "the config says rank 3, the tensors have 2"),
        ({"use_dora": True}, "use_dora: True is not read"),
        ({"lora_bias": True}, "lora_bias: True is not read"),
        ({"bias": "all"}, "bias: 'all' is not read"),
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA' is not read"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save: "),
        ({"layer_replication": [[0, 2]]}, "layer_replication: "),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4 changes W0 itself"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora changes W0 itself"),
    ],
)
def test_a_config_that_does_not_fit_or_is_not_lora_s_is_refused(adapted, lora, tmp_path, fields, reason):
    path = tmp_path / "lora.safetensors"
    save_file(renamed(lora, prefix="unet."), path, packed(**fields))
    with pytest.raises(InputError) as caught:
        load_adapter(small_unet(), "mine", path)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"r"'])
def test_a_config_that_is_not_a_table_is_refused(lora, tmp_path, text):
    path = tmp_path / "lora.safetensors"
    save_file(renamed(lora, prefix="unet."), path, {LORA_ADAPTER_METADATA_KEY: text})
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: lora_adapter_metadata: expected [^\n]*$"):
        read_lora(path)


def test_of_a_config_for_several_parts_the_one_of_the_unet_counts(lora, adapted, inputs, tmp_path):
    fields = {"unet.r": 2, "r": 9, "unet.lora_alpha": 3, "lora_alpha": 8, "text_encoder.lora_alpha": 7}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(fields)}
    save_file(renamed(lora, prefix="unet."), tmp_path / "lora.safetensors", metadata)
    unet = small_unet()
    load_adapter(unet, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(unet, inputs), output(adapted, inputs))


@pytest.mark.parametrize("value", [None, False, [], 0, ""])
def test_unknown_fields_that_are_off_are_left_out(lora, adapted, inputs, tmp_path, value):
    save_file(renamed(lora, prefix="unet."), tmp_path / "lora.safetensors", packed(of_tomorrow=value, target_modules=7))
    other = small_unet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(other, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(other, inputs), output(adapted, inputs))


def test_unknown_fields_that_are_on_are_left_out_with_a_warning(lora, adapted, inputs, tmp_path):
    save_file(renamed(lora, prefix="unet."), tmp_path / "lora.safetensors", packed(of_tomorrow=True))
    other = small_unet()
    with pytest.warns(UserWarning, match="fields of another version of PEFT are left out: of_tomorrow"):
        load_adapter(other, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(other, inputs), output(adapted, inputs))


def test_nothing_that_a_config_names_is_imported_or_initialised(lora, adapted, inputs, tmp_path):
    fields = {"megatron_core": "antigravity", "init_lora_weights": "orthogonal", "target_modules": ["conv_in"]}
    save_file(renamed(lora, prefix="unet."), tmp_path / "lora.safetensors", packed(**fields))
    other, state = small_unet(), torch.get_rng_state()
    w0 = {name: p.clone() for name, p in other.named_parameters()}
    load_adapter(other, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(other, inputs), output(adapted, inputs)) and torch.equal(torch.get_rng_state(), state)
    left = {n.replace(".base_layer", ""): p for n, p in other.named_parameters() if "lora_" not in n}
    assert all(torch.equal(w0[name], p) for name, p in left.items()) and left.keys() == w0.keys()


def test_alpha_in_two_places_is_refused(lora, tmp_path):
    save_file(of_kohya(lora), tmp_path / "lora.safetensors", packed())
    with pytest.raises(InputError, match="alpha is in the metadata and in a tensor"):
        read_lora(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float16, torch.float8_e4m3fn])
def test_an_alpha_may_be_a_whole_number_or_a_short_one(lora, inputs, tmp_path, dtype):
    """Tools that extract, merge or resize a LoRA write its rank as alpha."""
    tensors = {key: value.to(dtype) if key.endswith(".alpha") else value for key, value in of_kohya(lora).items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    unet = small_unet()
    load_adapter(unet, "mine", tmp_path / "lora.safetensors")
    assert torch.equal(output(unet, inputs), output(stock(tmp_path / "lora.safetensors"), inputs))


@pytest.mark.parametrize("alpha", [0.0, -1.0, torch.nan, torch.inf])
def test_an_alpha_of_kohya_that_is_no_number_above_0_is_refused(lora, tmp_path, alpha):
    save_file(of_kohya(lora, alpha), tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"alpha: expected a number above 0|not finite"):
        read_lora(tmp_path / "lora.safetensors")


def test_numbers_that_the_unet_s_dtype_cannot_hold_are_refused(lora, tmp_path):
    save_file({key: 1e30 * value for key, value in renamed(lora, prefix="unet.").items()}, tmp_path / "a.safetensors")
    unet = small_unet().half()
    with pytest.raises(InputError, match=r"holds numbers that torch\.float16 cannot"):
        load_adapter(unet, "mine", tmp_path / "a.safetensors")
    assert not adapter_names(unet)


@pytest.mark.parametrize("pattern", ["to_q", "^to_q", "attn1.to_q", r"attn1\.to_q", ".*attn1.*to_q", r"attn\d+\.to_q"])
def test_patterns_of_names_are_peft_s(lora, inputs, tmp_path, pattern):
    """With the targets of every layer, stock diffusers reads the same."""
    path = tmp_path / "lora.safetensors"
    save_file(renamed(lora, prefix="unet."), path, packed(alpha_pattern={pattern: 7}, target_modules=TARGETS["all"]))
    unet = small_unet()
    load_adapter(unet, "mine", str(path))
    assert torch.equal(output(unet, inputs), output(stock(path), inputs))


def test_a_name_that_is_taken_or_none_is_refused(unet, tmp_path):
    moved(unet, "student")
    path = tmp_path / "lora.safetensors"
    save_adapter(unet, "student", path)
    for use in (lambda name: load_adapter(unet, name, path), lambda name: add_adapter(unet, name, rank=1, alpha=1)):
        with pytest.raises(InputError, match="this UNet has an adapter 'student' already"):
            use("student")
        for name in ("", "a.b", "keys", "parameters"):
            with pytest.raises(InputError, match=f"adapter '{name}': expected a name without dots"):
                use(name)
    assert adapter_names(unet) == ["student"]
    with pytest.raises(InputError, match="no adapter 'nobody' on this UNet"):
        adapter_parameters(unet, "nobody")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank: expected a number above 0, got 0"),
        ({"alpha": 0}, "alpha: expected a number above 0, got 0"),
        ({"alpha": float("nan")}, "alpha: expected a number above 0, got nan"),
        ({"alpha": float("inf")}, "alpha: expected a number above 0, got inf"),
        ({"targets": "some"}, "targets: expected attention or all, got 'some'"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed: expected 0 to 4294967295, got 4294967296"),
    ],
)
def test_numbers_that_make_no_adapter_are_refused(unet, options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        add_adapter(unet, "student", **({"rank": 2, "alpha": 2} | options))


def test_what_is_added_to_a_header_is_text_and_replaces_nothing(unet, inputs, tmp_path):
    moved(unet, "student", alpha=3)
    path = tmp_path / "lora.safetensors"
    save_adapter(unet, "student", path, {"steps": 3, "format": "x", "seal": "x", LORA_ADAPTER_METADATA_KEY: "{}"})
    other = small_unet()
    assert load_adapter(other, "mine", path)["steps"] == "3" and torch.equal(
        output(other, inputs), output(unet, inputs)
    )


@pytest.mark.parametrize("save", [save_adapter, export_kohya])
def test_weights_that_are_not_finite_are_not_saved(unet, tmp_path, save):
    moved(unet, "student")[3].data[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"lora\.safetensors: 1 of \d+ tensors are not finite[^\n]*; nothing is saved"):
        save(unet, "student", tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="no adapter 'nobody' on this UNet; it carries \\['student'\\]"):
        save(unet, "nobody", tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- sealed


@pytest.fixture
def small(tmp_path):
    """A small file of ours, its bytes and its layers."""
    unet = small_unet()
    unet.add_adapter(LoraConfig(r=1, lora_alpha=2, target_modules=["time_emb_proj"]), adapter_name="student")
    path = tmp_path / "lora.safetensors"
    save_adapter(unet, "student", path, {"base": "bundled", "w": "3.0"})
    return path, path.read_bytes(), content(path)


def content(path):
    """What a file does: its layers with their scales."""
    file = read_lora(path)
    layers = {name: (layer.a.tolist(), layer.b.tolist(), layer.alpha) for name, layer in file.layers.items()}
    return layers, file.rank_stabilised


def refused_or_equal(path, changed, expected):
    path.write_bytes(changed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return content(path) == expected
    except InputError as error:
        return str(path) in str(error) and "\n" not in str(error)


def test_a_flipped_bit_anywhere_in_the_header_is_refused_or_changes_nothing(small):
    path, whole, expected = small
    end = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(0)
    flips = [(place, 1 << generator.randrange(8)) for place in range(end)]
    bad = [
        (place, bit)
        for place, bit in flips
        if not refused_or_equal(path, whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :], expected)
    ]
    assert not bad, [whole[place - 10 : place + 10] for place, _ in bad]


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_byte_changed_removed_or_added_is_refused_or_changes_nothing(small, data):
    path, whole, expected = small
    place = data.draw(st.integers(0, len(whole) - 1))
    new = data.draw(st.binary(max_size=3))
    gone = data.draw(st.integers(0, 3))
    assert refused_or_equal(path, whole[:place] + new + whole[place + gone :], expected)


def test_an_alpha_altered_in_the_config_is_refused(small):
    path, _, _ = small
    metadata = header(path)
    metadata[LORA_ADAPTER_METADATA_KEY] = metadata[LORA_ADAPTER_METADATA_KEY].replace(
        'lora_alpha": 2', 'lora_alpha": 9'
    )
    save_file(load_file(path), path, metadata)
    with pytest.raises(InputError, match="contents do not match their digest"):
        read_lora(path)


@pytest.mark.parametrize("save", [save_adapter, export_kohya])
def test_the_same_adapter_gives_the_same_bytes(unet, tmp_path, save):
    moved(unet, "student")
    metadata = {name: name for name in "zyxwvutsrq"} | {"ü": 'quote " and\nline\x1f'}
    for number in range(4):
        save(unet, "student", tmp_path / f"{number}.safetensors", metadata)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert header(tmp_path / "0.safetensors").items() >= metadata.items()
