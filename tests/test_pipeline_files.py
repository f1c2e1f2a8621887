"""Damaged pipeline folders: each is refused in one line that names the file; none is completed with random numbers."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_distill import pipeline_files
from lora_distill.errors import InputError
from lora_distill.fingerprint import fingerprint
from lora_distill.pipeline import BUNDLED, latent_side, load_pipeline

CONFIGS = {
    "model_index": "model_index.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    "vocabulary": "tokenizer/tokenizer.json",
}


@pytest.fixture
def folder(tmp_path):
    """The bundled pipeline as a folder of one's own, of links: a test replaces files."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "pipeline", copy_function=os.link))


def write(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **values):
    write(path, json.dumps(json.loads(path.read_text(encoding="utf-8")) | values))


def retensor(part, change):
    (path,) = part.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def refused(folder, *said):
    with pytest.raises(InputError) as caught:
        load_pipeline(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 600
    assert all(re.search(each, message) for each in said), message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"3", b"\xff\xfe", b"version https://git-lfs"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_json_file_that_is_no_table_is_refused(folder, config, content):
    write(folder / CONFIGS[config], content)
    refused(folder, re.escape(CONFIGS[config]), "expected a table in JSON")


@pytest.mark.parametrize("config", [*CONFIGS.values()])
def test_a_json_file_that_is_not_there_is_refused(folder, config):
    (folder / config).unlink()
    refused(folder, re.escape(config.partition("/")[0]), "missing|not found")


@pytest.mark.parametrize(
    ("config", "values", "said"),
    [
        ("model_index", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name: expected StableDiffusionPipeline"),
        ("model_index", {"_class_name": "FluxPipeline"}, "_class_name: expected StableDiffusionPipeline"),
        ("model_index", {"_class_name": None}, "_class_name: expected StableDiffusionPipeline"),
        ("model_index", {"unet": [None, None]}, "unet"),
        ("model_index", {"unet": ["diffusers", "AutoencoderKL"]}, "cannot be loaded|unet: expected a UNet2D"),
        ("model_index", {"unet": ["my_unet", "MyUNet"]}, "cannot be loaded"),
        ("model_index", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "scheduler"),
        ("model_index", {"tokenizer": ["transformers", "T5Tokenizer"]}, "."),
        ("unet", {"_class_name": "Transformer2DModel"}, "unet: expected a UNet2DConditionModel"),
        ("unet", {"in_channels": 9}, "9 channels"),
        ("unet", {"out_channels": 8}, "makes 8 channels"),
        ("unet", {"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ("unet", {"class_embed_type": "timestep"}, "takes more than a prompt"),
        ("unet", {"num_class_embeds": 7}, "takes more than a prompt"),
        ("unet", {"cross_attention_dim": 77}, "unet/.*weights do not fit .*attn2.* is .*, by config.json"),
        ("unet", {"block_out_channels": "many"}, r"unet/config\.json: expected a config of UNet2DConditionModel"),
        ("unet", {"down_block_types": ["NoSuchBlock"]}, r"unet/config\.json"),
        ("unet", {"block_out_channels": []}, r"unet/config\.json"),
        ("unet", {"sample_size": 0}, "sample_size: expected a whole number from 1 to 1024, got 0"),
        ("unet", {"sample_size": None}, "sample_size"),
        ("unet", {"sample_size": "64"}, "sample_size"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae: expected a AutoencoderKL"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: expected 0.001 to 1000, about 0.18, got 0"),
        ("vae", {"scaling_factor": -1.0}, "scaling_factor"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor"),
        ("vae", {"scaling_factor": "0.18"}, "scaling_factor"),
        ("vae", {"scaling_factor": None}, "scaling_factor"),
        ("vae", {"scaling_factor": 1e30}, "scaling_factor"),
        ("vae", {"scaling_factor": 1e-30}, "scaling_factor"),
        ("vae", {"scaling_factor": True}, "scaling_factor"),
        ("vae", {"latent_channels": 16}, "16"),
        ("unet", {"sample_size": 10**6}, "sample_size: expected a whole number from 1 to 1024, got 1000000"),
        ("unet", {"sample_size": [8, 8]}, "sample_size"),
        ("unet", {"time_cond_proj_dim": 256}, "1 of 325 tensors are missing"),
        ("unet", {"attention_head_dim": 7}, "unet/.*weights do not fit the config of their part"),
        ("unet", {"block_out_channels": [320000, 640000, 1280000]}, "unet/.*weights do not fit"),
        ("text", {"num_hidden_layers": 1}, "text_encoder: weights and config are of two models: 16 tensors"),
        ("text", {"num_hidden_layers": 9}, "text_encoder: 112 of 148 tensors are missing"),
        ("text", {"max_position_embeddings": 77}, "text_encoder/.*weights do not fit"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps: expected a whole number from 1 to 100000"),
        ("scheduler", {"trained_betas": [0.5] * 3}, "num_train_timesteps: 1000, and trained_betas has 3"),
        ("tokenizer", {"pad_token": "never"}, "473 tokens where the text encoder has 472"),
        ("tokenizer", {"pad_token": None}, "no pad_token"),
        ("tokenizer", {"padding_side": "left"}, "padding_side and truncation_side: expected right"),
        ("vae", {"block_out_channels": {}}, r"vae/config\.json"),
        ("text", {"hidden_size": 99}, "text_encoder"),
        ("text", {"vocab_size": 7}, "weights do not fit"),
        ("text", {"num_attention_heads": 0}, "text_encoder|cannot be loaded"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type: expected epsilon or v_prediction"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type: expected epsilon or v_prediction"),
        ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps|scheduler"),
        ("scheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps|scheduler"),
        ("scheduler", {"num_train_timesteps": 10.5}, "num_train_timesteps|scheduler"),
        ("scheduler", {"beta_end": 2}, "expected 0 < beta_start <= beta_end < 1, got 0.00085 and 2"),
        ("scheduler", {"beta_start": 0.5}, "expected 0 < beta_start <= beta_end < 1"),
        ("scheduler", {"beta_start": -0.1}, "expected 0 < beta_start <= beta_end < 1"),
        ("scheduler", {"beta_start": "small"}, "scheduler"),
        ("scheduler", {"beta_end": float("nan")}, "expected 0 < beta_start <= beta_end < 1"),
        ("scheduler", {"beta_schedule": "unheard-of"}, "scheduler|cannot be loaded"),
        ("scheduler", {"trained_betas": [0.1, -3.0, 0.2]}, "no noise schedule"),
        ("scheduler", {"timestep_spacing": "unheard-of"}, "scheduler: expected a scheduler that gives timesteps"),
        ("tokenizer", {"model_max_length": 10**30}, "model_max_length: expected 3 to 36"),
        ("tokenizer", {"model_max_length": 77}, "model_max_length: expected 3 to 36"),
        ("tokenizer", {"model_max_length": "long"}, "tokenizer"),
        ("tokenizer", {"model_max_length": 0}, "model_max_length"),
        ("tokenizer", {"model_max_length": -5}, "model_max_length"),
        ("vocabulary", {"model": {}}, r"tokenizer\.json: expected a vocabulary"),
        (
            "vocabulary",
            {"model": {"type": "BPE", "vocab": {}, "merges": []}},
            r"tokenizer\.json: expected a vocabulary",
        ),
        ("vocabulary", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, "."),
        ("vocabulary", {"model": {"type": "BPE", "vocab": {"a</w>": 7 * 10**6}, "merges": []}}, "."),
    ],
    ids=str,
)
def test_a_config_that_makes_no_pipeline_is_refused(folder, config, values, said):
    edit(folder / CONFIGS[config], **values)
    refused(folder, said)


def test_code_in_a_pipeline_s_folder_is_not_run(folder, tmp_path):
    write(folder / "unet" / "my_unet.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyUNet: pass\n")
    write(folder / "my_unet.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass MyUNet: pass\n")
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    refused(folder)
    edit(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "my_unet.MyUNet"})
    load_pipeline(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder, part, value):
    def change(tensors):
        next(iter(tensors.values())).view(-1)[0] = value

    retensor(folder / part, change)
    refused(folder, rf"{part}: 1 of \d+ tensors are not finite")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_tensor_of_another_name_is_no_replacement_for_a_missing_one(folder, part):
    """The counts are the same; the missing one would be random."""

    def change(tensors):
        tensors["of_another_model.weight"] = tensors.pop(next(iter(tensors)))

    retensor(folder / part, change)
    refused(folder, rf"{part}: 1 of \d+ tensors are missing from the weights")


def test_whole_numbers_in_place_of_weights_are_refused(folder):
    retensor(folder / "unet", lambda tensors: tensors.update({"conv_in.weight": tensors["conv_in.weight"].int()}))
    refused(folder, r"unet: conv_in\.weight: expected floating-point numbers, got I32")


def test_weights_in_shards_are_the_same_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, names = load_file(path), [f"diffusion_pytorch_model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    files = {key: names[number % 2] for number, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if files[key] == name}, path.with_name(name), {"format": "pt"})
    path.unlink()
    index = {"metadata": {}, "weight_map": files}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert fingerprint(load_pipeline(str(folder))) == fingerprint(load_pipeline("bundled"))
    path.with_name(names[1]).unlink()
    refused(folder, names[1], "missing, though the index beside it names it")


@pytest.mark.parametrize("name", [" ", "a" * 300, "x/y\n", "/dev/null", "a/b/c", "./none", "http://huggingface.co/a/b"])
def test_a_name_that_can_be_no_pipeline_is_one_line(name):
    with pytest.raises(FileNotFoundError, match=r"\Ano pipeline folder [^\n]+\Z"):
        load_pipeline(name)


@pytest.mark.parametrize("resolution", [0, -8, 4, 12, 64.0, True, "64", 10**6])
def test_a_resolution_that_is_none_is_one_line(bundle, resolution):
    with pytest.raises(InputError, match="resolution: expected a multiple of 8 "):
        latent_side(bundle, resolution)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_more_tensors_than_a_config_knows_are_refused(folder, part):
    retensor(folder / part, lambda tensors: tensors.update({"of_another_model.weight": torch.ones(1)}))
    refused(folder, f"{part}: weights and config are of two models: 1 tensors that its config does not know")


def test_names_of_old_files_are_known(folder):
    """A text encoder with position_ids, an unneeded projection and text_model. before each name."""
    before = fingerprint(load_pipeline("bundled"))

    def change(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            tensors[name if name.startswith("text_model.") else f"text_model.{name}"] = value
        tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
        tensors["text_projection.weight"] = torch.ones(2, 2)

    retensor(folder / "text_encoder", change)
    assert fingerprint(load_pipeline(str(folder))) == before


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 3}, {"a": "../elsewhere.safetensors"}, {"a": "none"}])
def test_an_index_of_shards_that_names_no_files_is_refused(folder, weight_map):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    refused(folder, r"unet/", "weight_map: expected names of tensors|missing, though the index beside it names it")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"), (b"", "not a whole")],
)
def test_weights_that_were_not_downloaded_are_named(folder, content, said):
    write(folder / "vae" / "diffusion_pytorch_model.safetensors", content)
    refused(folder, said)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_file_beside_the_weights_is_neither_loaded_nor_taken_for_what_they_lack(folder, part):
    before, (path,) = fingerprint(load_pipeline(str(folder))), (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    save_file(
        {name: torch.zeros_like(value) for name, value in tensors.items()}, path.with_stem(f"{path.stem}.non_ema")
    )
    save_file({"emb_params": torch.ones(2)}, path.with_stem("something_else"))
    assert fingerprint(load_pipeline(str(folder))) == before
    tensors.pop(max(tensors))
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    refused(folder, rf"{part}: 1 of \d+ tensors are missing from the weights")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_shards_that_do_not_hold_what_their_index_says_are_refused(folder, part):
    (path,) = (folder / part).glob("*.safetensors")
    tensors, names = load_file(path), [f"{path.stem}-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({key: tensors[key] for key in list(tensors)[number::2]}, path.with_name(name), {"format": "pt"})
    path.unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, names[0])}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(folder, rf"{part}: \d+ .*tensors are missing from the weights|cannot be loaded")


def test_a_part_that_has_its_fp16_file_beside_another_file_is_loaded_from_it(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before, tensors = fingerprint(load_pipeline(str(folder))), load_file(path)
    save_file(tensors, path.with_stem(f"{path.stem}.fp16"), {"format": "pt"})
    save_file({name: value * 0 for name, value in tensors.items()}, path.with_stem(f"{path.stem}.non_ema"))
    path.unlink()
    assert fingerprint(load_pipeline(str(folder))) == before


def test_a_link_to_a_file_that_is_gone_and_what_is_no_file_are_named(folder):
    """As in a cache of the hub whose blobs were deleted or half downloaded. A pipe would be waited for."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/0123")
    refused(folder, r"unet/.*: a link to a file that is not there, \.\./\.\./blobs/0123; download it again")
    path.unlink()
    os.mkfifo(path)
    refused(folder, "expected a file of weights, there is something else")


def test_the_names_of_shards_of_a_variant_are_those_of_diffusers(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = path.with_name("diffusion_pytorch_model.safetensors.index.fp16.json")
    index.write_text(json.dumps({"weight_map": {"a": "none.safetensors"}}), encoding="utf-8")
    refused(folder, r"none\.safetensors: missing, though the index beside it names it")


def test_a_vocabulary_in_two_files_is_read(folder):
    before = load_pipeline("bundled").tokenizer("a lion at the upper left").input_ids
    model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    assert load_pipeline(str(folder)).tokenizer("a lion at the upper left").input_ids == before
    for name in ("merges.txt", "vocab.json"):
        (folder / "tokenizer" / name).rename(folder / name)
        refused(folder, "tokenizer.json is missing, and so are vocab.json and merges.txt")
        (folder / name).rename(folder / "tokenizer" / name)
    write(folder / "tokenizer" / "merges.txt", "\n".join(["#version: 0.2", *merges[:-1]]))
    refused(folder, r"vocab\.json: \d+ tokens of several letters and \d+ merges: cut short")
    for content in (b"{}", b"", b"[]"):
        write(folder / "tokenizer" / "vocab.json", content)
        refused(folder, r"vocab\.json: expected a")


# ---------------------------------------------------------------------------------------------- the bundle


def test_the_digests_are_those_of_the_bundled_pipeline():
    """After the bundle is trained anew: DIGESTS.write_text(bundle_digests(), encoding="utf-8")."""
    assert pipeline_files.DIGESTS.read_text(encoding="utf-8") == pipeline_files.bundle_digests()


def test_a_bundle_that_was_altered_is_refused(folder, monkeypatch):
    monkeypatch.setattr("lora_distill.pipeline_files.BUNDLED", folder)
    monkeypatch.setattr("lora_distill.shapes.BUNDLED", folder)
    load_pipeline("bundled")
    text = (folder / "unet" / "config.json").read_text(encoding="utf-8")
    write(folder / "unet" / "config.json", text.replace("\n", "\r\n"))
    load_pipeline("bundled")  # as git writes it on Windows
    for name, change in {
        "unet/config.json": lambda b: b.replace(b"1", b"2"),
        "text_encoder/model.safetensors": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "tokenizer/tokenizer.json": lambda b: b + b" ",
    }.items():
        whole = (folder / name).read_bytes()
        write(folder / name, change(whole))
        with pytest.raises(InputError, match=rf"{name}: altered since it was released"):
            load_pipeline("bundled")
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name}: missing from the bundled pipeline"):
            load_pipeline("bundled")
        write(folder / name, whole if name != "unet/config.json" else text)
    load_pipeline("bundled")
