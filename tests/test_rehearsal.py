"""What a rehearsal runs on: it has the files and quirks of the originals, and is the same every time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_distill import rehearsal
from lora_distill.data.captioned import captioned_images
from lora_distill.judge.features import load_extractor
from lora_distill.pipeline import load_pipeline
from lora_distill.storage import digest
from lora_distill.writing import locked

LATER_KEYS = {"time_cond_proj_dim", "scaling_factor", "prediction_type", "timestep_spacing", "force_upcast"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return rehearsal.write_inputs(tmp_path_factory.mktemp("rehearsal") / "inputs")


@pytest.fixture
def small_inputs(tmp_path, monkeypatch) -> Path:
    """Where to write inputs that are made in no time: a file for each model and set."""

    def write(folder, *_):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(folder.name, encoding="utf-8")

    def write_photographs(folder, layout):
        write(folder)
        write(folder / "Flickr8k_text")
        (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text(layout, encoding="utf-8")

    def write_pipeline(folder):
        write(folder)
        write(folder / "unet")

    monkeypatch.setattr(rehearsal, "write_pipeline", write_pipeline)
    monkeypatch.setattr(rehearsal, "write_photographs", write_photographs)
    monkeypatch.setattr(rehearsal, "write_clip", write)
    return tmp_path / "inputs"


def config(folder, part, name="config"):
    return json.loads((folder / part / f"{name}.json").read_text())


def test_the_tiny_pipeline_has_the_configs_of_2022(inputs):
    folder = inputs / "sd15"
    unet, vae = config(folder, "unet"), config(folder, "vae")
    scheduler = config(folder, "scheduler", "scheduler_config")
    assert not LATER_KEYS & (unet.keys() | vae.keys() | scheduler.keys())
    assert "use_linear_projection" not in unet and len(unet["block_out_channels"]) == 4
    assert (scheduler["_class_name"], scheduler["skip_prk_steps"], scheduler["steps_offset"]) == (
        "PNDMScheduler",
        True,
        1,
    )


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stock_diffusers_draws_with_it_in_every_dtype(tmp_path, kind, dtype):
    folder = rehearsal.write_pipeline(tmp_path, kind)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    made = pipe("A brown dog runs .", generator=torch.Generator().manual_seed(0), **options).images
    assert made.isfinite().all() and made.shape == (1, 4, 8, 8)
    assert pipe.scheduler.config.prediction_type == {"sd15": "epsilon", "sd21": "v_prediction"}[kind]
    assert pipe.tokenizer.model_max_length == 77


def test_every_weight_of_the_files_is_read_under_its_old_name(inputs):
    pipe, again = load_pipeline(str(inputs / "sd15")), load_pipeline(str(rehearsal.write_pipeline(inputs / "again")))
    for part in ("unet", "vae", "text_encoder"):
        assert digest(getattr(pipe, part).state_dict()) == digest(getattr(again, part).state_dict())
    assert pipe.vae.encoder.mid_block.attentions[0].to_q.weight.std() > 0.1, "from `query`, and not drawn anew"


def test_guidance_has_something_to_guide(inputs):
    pipe = load_pipeline(str(inputs / "sd15"))
    ids = pipe.tokenizer(["A brown dog runs .", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        made = pipe.unet(torch.ones(2, 4, 8, 8), 500, pipe.text_encoder(ids)[0]).sample
    assert (made[0] - made[1]).std() > 0.01 * made.std()


def test_the_photographs_come_in_the_layouts_of_both_sets(inputs):
    for name in ("flickr8k", "flickr30k"):
        sizes = {split: len(captioned_images(inputs / name, split)) for split in ("train", "val", "test")}
        assert sizes == {"train": 24, "val": 6, "test": 12}
    train = captioned_images(inputs / "flickr8k", "train")
    assert {"RGB", "RGBA", "L"} == {image.mode for image in train["image"]}
    assert len({image.size for image in train["image"]}) == 7
    assert {len(captions) for captions in train["captions"]} == {5}


def test_flickr30k_has_photographs_of_flickr8ks_test_split_under_other_names(inputs):
    test = {name.split("_")[0] for name in captioned_images(inputs / "flickr8k", "test")["id"]}
    train = {name.removesuffix(".jpg") for name in captioned_images(inputs / "flickr30k", "train")["id"]}
    assert len(test & train) == 3


def test_the_clip_is_an_extractor(inputs):
    clip = load_extractor("CLIP", str(inputs / "clip"))
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    assert clip(images, clip.layers)["image_embeds"].shape == (2, 16)


def test_inputs_are_made_once_and_again_when_the_code_changed(tmp_path, monkeypatch):
    folder = rehearsal.write_inputs(tmp_path / "inputs")
    (folder / "flickr8k" / "mine").write_text("")
    assert (rehearsal.write_inputs(folder) / "flickr8k" / "mine").exists()
    monkeypatch.setattr(rehearsal, "_digest", lambda path, known=rehearsal._digest: f"new {known(path)}")
    assert not (rehearsal.write_inputs(folder) / "flickr8k" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["inputs"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("sd15/unet/config.json", Path.unlink),
        ("flickr8k/Flickr8k_text/Flickr8k.token.txt", lambda path: path.write_text("", encoding="utf-8")),
        ("clip", shutil.rmtree),
        ("version.json", lambda path: path.write_text("[]", encoding="utf-8")),
        ("version.json", lambda path: path.write_bytes(b"\xff\xfe")),
        (".", lambda path: (shutil.rmtree(path), path.write_text("a file", encoding="utf-8"))),
        (".", lambda path: (path.rename(path.with_name("kept")), path.symlink_to(path.with_name("kept")))),
    ],
)
def test_inputs_that_are_lost_or_altered_are_made_again(small_inputs, name, damage):
    folder = rehearsal.write_inputs(small_inputs)
    before = rehearsal._digests(folder)
    damage(folder / name)
    assert rehearsal._digests(rehearsal.write_inputs(folder)) == before


def test_inputs_behind_a_link_stay_there(small_inputs):
    folder = rehearsal.write_inputs(small_inputs)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(elsewhere)
    (folder / "clip" / "config.json").unlink()
    rehearsal.write_inputs(folder)
    assert (elsewhere / "sd15" / "config.json").exists() and not (elsewhere / "clip" / "config.json").exists()


def test_of_two_that_make_the_inputs_one_is_refused(small_inputs):
    with locked(small_inputs.parent), pytest.raises(RuntimeError, match="writes there"):
        rehearsal.write_inputs(small_inputs)


def test_a_process_beside_the_main_one_waits_for_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rehearsal.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="inputs: made by another process and not seen by this one"):
        rehearsal.write_inputs(tmp_path / "inputs")


def test_another_dtype_is_another_run():
    own, other = rehearsal.settings(), rehearsal.settings("float32")
    assert (own.profile, own.dtype) == ("rehearsal", "bfloat16")
    assert (other.profile, other.dtype) == ("rehearsal-float32", "float32")
    with pytest.raises(ValueError, match="--dtype: expected bfloat16, float16 or float32, got 'fp8'"):
        rehearsal.settings("fp8")
