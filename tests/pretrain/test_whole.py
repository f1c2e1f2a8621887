"""What pretraining leaves: one pipeline of one training, whole, whatever was there and whenever it was killed."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lora_distill import writing
from lora_distill.errors import InputError, RunError, WriteError
from lora_distill.pretrain import model_card, text_to_image, vae
from lora_distill.pretrain.parts import build_text_encoder, build_tokenizer
from lora_distill.pretrain.text_to_image import Preset, pretrain, train_text_encoder, train_text_to_image
from lora_distill.train.checkpoint import RESULT
from lora_distill.train.step import Schedule

TINY = Preset(
    images=8,
    schedules={
        "vae_crops": Schedule(1, 2, 1e-3, log_every=1),
        "vae_images": Schedule(1, 2, 1e-3, log_every=1),
        "text_encoder": Schedule(1, 4, 1e-3, log_every=1),
        "unet": Schedule(1, 4, 1e-3, log_every=1),
    },
)
WORDS = ["a lion at the upper left", "an owl, on a pink background", "the cat in the bottom right"]
SCRIPT = f"""
import sys
from lora_distill.pretrain.parts import build_tokenizer
build_tokenizer({WORDS}).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module", autouse=True)
def captions():
    """The captions of the grammar are made once."""
    texts = text_to_image.grammar_captions(0)[::10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_image, "grammar_captions", lambda seed: texts)
        yield texts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("pretraining")
    pretrain(TINY, place / "pipeline", place / "work")
    return place


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stages(work):
    return {path.name.rpartition("-")[0]: path.name for path in work.iterdir()}


# ---------------------------------------------------------------------------------------------- the tokenizer


def test_the_tokenizer_is_the_same_in_every_process(tmp_path):
    surroundings = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "other"], env=surroundings, check=True)
    build_tokenizer(WORDS).save_pretrained(tmp_path / "own")
    assert contents(tmp_path / "own") == contents(tmp_path / "other")


def test_the_tokenizer_is_the_same_whatever_the_order_of_the_captions():
    one, two = (build_tokenizer(texts).get_vocab() for texts in (WORDS, WORDS[::-1]))
    assert one == two and sorted(one.values()) == list(range(len(one)))


# ---------------------------------------------------------------------------------------------- stages and their keys


def test_a_stage_whose_tokenizer_is_another_starts_anew(made, captions, monkeypatch):
    tokenizer, _, _ = train_text_encoder(TINY, made / "work")
    assert len(list((made / "work").glob("text_encoder-*"))) == 1, "the same: read back"
    monkeypatch.setattr(text_to_image, "grammar_captions", lambda seed: [*captions[:200], "one more zebra"])
    other, _, _ = train_text_encoder(TINY, made / "work")
    assert other.get_vocab() != tokenizer.get_vocab()
    assert len(list((made / "work").glob("text_encoder-*"))) == 2


@pytest.mark.parametrize("change", ["images", "seed", "tokenizer", "text encoder", "vae", "caption error", "nothing"])
def test_the_unets_folder_depends_on_all_that_decides_its_weights(tmp_path, change):
    def place(images=8, seed=0, tokenizer=("a lion at the upper left",), scale=1.0, vae_scale=1.0, error=0.1):
        torch.manual_seed(0)
        own = build_tokenizer(list(tokenizer))
        encoder, autoencoder = build_text_encoder(own), vae.build_vae()
        with torch.no_grad():
            next(encoder.parameters()).mul_(scale), next(autoencoder.parameters()).mul_(vae_scale)
        preset = replace(TINY, images=images, caption_error=error)
        train_text_to_image(preset, autoencoder, own, encoder, tmp_path, seed)

    changes = {"images": {"images": 9}, "seed": {"seed": 1}, "tokenizer": {"tokenizer": ["an owl"]}, "nothing": {},
               "text encoder": {"scale": 2.0}, "vae": {"vae_scale": 2.0},
               "caption error": {"error": 0.2}}  # fmt: skip
    place(), place(**changes[change])
    assert len(list(tmp_path.iterdir())) == (1 if change == "nothing" else 2)


def test_the_second_stage_of_the_vae_depends_on_the_first(made, tmp_path):
    for rate in (1e-3, 2e-3):
        schedules = TINY.schedules | {"vae_crops": replace(TINY.schedules["vae_crops"], learning_rate=rate)}
        vae.train_vae(schedules, 8, tmp_path)
    assert len(list(tmp_path.glob("vae_images-*"))) == 2


def test_it_goes_on_with_the_stages_that_are_whole(made, tmp_path, monkeypatch):
    """A kill in the last stage: the others are read, and the pipeline is that of an uninterrupted run."""
    plain = text_to_image.train_text_to_image

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_to_image, "train_text_to_image", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TINY, tmp_path / "pipeline", tmp_path / "work")
    assert not (tmp_path / "pipeline").exists()
    monkeypatch.setattr(text_to_image, "train_text_to_image", plain)
    pretrain(TINY, tmp_path / "pipeline", tmp_path / "work")
    one, two = contents(made / "pipeline"), contents(tmp_path / "pipeline")
    assert one.pop("training.json") and two.pop("training.json") and one == two


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def pipe(made):
    return text_to_image.StableDiffusionPipeline.from_pretrained(made / "pipeline")


def saved(pipe, folder):
    text_to_image.save_pipeline(pipe, folder, "{}")


def test_a_pipeline_is_replaced_whole(pipe, made, tmp_path):
    folder = tmp_path / "pipeline"
    saved(pipe, folder)
    (folder / "scores.json").write_text("{}", encoding="utf-8")
    (folder / "unet" / "left.safetensors").write_bytes(b"of another training")
    saved(pipe, folder)
    assert contents(folder).keys() == contents(made / "pipeline").keys()
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


@pytest.mark.parametrize("stop", ["save_pretrained", "write_text"])
def test_the_old_pipeline_stays_when_the_new_one_cannot_be_written(pipe, tmp_path, monkeypatch, stop):
    folder = tmp_path / "pipeline"
    saved(pipe, folder)
    before = contents(folder)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    kind = text_to_image.StableDiffusionPipeline if stop == "save_pretrained" else type(folder)
    monkeypatch.setattr(kind, stop, full)
    with pytest.raises(WriteError, match=f"{folder} could not be written: No space left"):
        saved(pipe, folder)
    monkeypatch.undo()
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_where_the_system_cannot_exchange_folders_it_is_replaced_in_two_steps(pipe, tmp_path, monkeypatch):
    folder = tmp_path / "pipeline"
    saved(pipe, folder)
    (folder / "scores.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(writing.ctypes, "CDLL", lambda *_: object())
    saved(pipe, folder)
    assert "scores.json" not in contents(folder) and [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_a_link_stays_one(pipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "pipeline").symlink_to(tmp_path / "disk" / "pipeline")
    for _ in range(2):
        saved(pipe, tmp_path / "pipeline")
    assert (tmp_path / "pipeline").is_symlink() and (tmp_path / "disk" / "pipeline" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["notes.txt", ".git", "lora.safetensors", "README.md"])
def test_a_folder_with_anything_else_in_it_is_refused_before_the_training(tmp_path, name):
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=rf"{tmp_path}: has more in it than a pipeline, {name}; name a new folder"):
        pretrain(TINY, tmp_path, tmp_path / "work")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_place_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "pipeline"):
        with pytest.raises(WriteError, match=f"{folder} could not be written"):
            pretrain(TINY, folder, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_weights_that_half_precision_cannot_hold_are_no_pipeline(pipe, tmp_path):
    huge = copy.copy(pipe)
    huge.unet = copy.deepcopy(pipe.unet)
    huge.unet.conv_in.weight.data.mul_(1e9)
    with pytest.raises(RunError, match="UNet2DConditionModel in half precision: 1 of"):
        saved(huge, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_every_stage_has_a_result(made):
    assert stages(made / "work").keys() == TINY.schedules.keys()
    assert all((made / "work" / name / RESULT).is_file() for name in stages(made / "work").values())


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"images": "many"}'])
def test_a_card_without_a_record_is_refused_before_the_scoring(tmp_path, monkeypatch, content):
    monkeypatch.setattr(model_card, "load_pipeline", lambda _: 1 / 0)
    if content is not None:
        (tmp_path / "training.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{tmp_path}/training\.json: [^\n]*the record that pretrain writes[^\n]*$"):
        model_card.write(tmp_path)
