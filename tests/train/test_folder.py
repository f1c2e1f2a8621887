"""A LoRA from a folder of pictures: one call, checked before anything is loaded, that goes on and repeats."""

import sys

import pytest
import torch
from PIL import Image

from lora_distill import __main__ as cli
from lora_distill.adapters import load_adapter
from lora_distill.errors import InputError
from lora_distill.pipeline import load_pipeline
from lora_distill.train import folder as own
from lora_distill.train.folder import folder_settings, train_folder, work_folder
from lora_distill.writing import locked


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures with captions."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 60), colour).save(folder / f"{number}.png")
    lines = ["image,caption", "0.png,a red picture", "1.png,a green picture", "2.png,a blue picture"]
    (folder / "captions.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `train`; its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora_distill", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("method", "more"), [("finetune", ""), ("lcm-lora", " --scheduler lcm --steps 4")])
def test_three_pictures_are_enough_and_the_command_says_how_to_draw(command, pictures, tmp_path, method, more):
    out = tmp_path / "my.safetensors"
    code, said, _ = command(pictures, "--out", out, "--method", method, "--steps", 2, "--rank", 2)
    assert code == 0
    assert said.splitlines()[-3:] == [
        f"{out}: trained on 3 pictures",
        f'draw with it: python -m lora_distill sample "PROMPT" --lora {out}{more}',
        f'in diffusers: pipe.load_lora_weights("{out}")',
    ]
    pipe = load_pipeline("bundled")
    load_adapter(pipe.unet, "mine", out)
    load_pipeline("bundled").load_lora_weights(str(out))  # as the last line says
    weights = [weight for name, weight in pipe.unet.named_parameters() if "lora_B" in name]
    assert weights and all(weight.isfinite().all() for weight in weights) and any(weight.any() for weight in weights)


def test_the_same_call_again_trains_nothing_and_gives_the_same_weights(pictures, tmp_path, monkeypatch):
    settings = folder_settings(steps=2, rank=2, device="cpu")
    assert train_folder(pictures, tmp_path / "a.safetensors", settings) == 3
    first = own.lora_file(work_folder(tmp_path / "a.safetensors"), "lora").read_bytes()
    assert (tmp_path / "a.safetensors").read_bytes() == first
    monkeypatch.setattr("lora_distill.train.step.TrainingStep.__call__", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr("lora_distill.data.encoded.views", lambda *_: pytest.fail("it encodes"))
    (tmp_path / "a.safetensors").unlink()
    train_folder(pictures, tmp_path / "a.safetensors", settings)
    assert (tmp_path / "a.safetensors").is_file()


def test_a_picture_that_cannot_be_read_is_named_and_left_out_on_demand(command, pictures, tmp_path):
    (pictures / "1.png").write_bytes(b"no picture")
    arguments = [pictures, "--out", tmp_path / "a.safetensors", "--steps", 1, "--rank", 1]
    code, _, said = command(*arguments)
    assert code == 2 and "1.png" in said and said.count("\n") == 1
    with pytest.warns(UserWarning, match="left out"):
        code, said, _ = command(*arguments, "--skip-unusable")
    assert code == 0 and "trained on 2 pictures" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.png"], "out: expected the name of a .safetensors file, got a.png"),
        (["--out", "."], "out: expected the name of a .safetensors file, got ."),
        (["--method", "dreambooth"], "method: expected finetune or lcm-lora, got 'dreambooth'"),
        (["--pipeline", "./nowhere/sd"], "no pipeline folder nowhere/sd"),
        (["--resolution", "65"], "train: resolution: must be a multiple of 8, the VAE's factor, got 65"),
        (["--resolution", "0"], "train: resolution: expected at least 8, got 0"),
        (["--learning-rate", "nan"], "train: finetune_learning_rate: expected a finite number, got nan"),
        (["--learning-rate", "-1"], "train: finetune_learning_rate: expected more than 0.0, got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    command, pictures, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own, "pipeline_for", lambda _: pytest.fail("a pipeline is loaded"))
    monkeypatch.setattr(own, "captioned_images", lambda *_, **__: pytest.fail("pictures are read"))
    assert command(pictures, *arguments) == (2, "", f"{message}\n")
    assert {path.name for path in tmp_path.iterdir()} == {pictures.name}


def test_no_folder_a_file_and_an_empty_folder_are_one_line(command, pictures, tmp_path):
    for folder in (tmp_path / "nowhere", pictures / "0.png", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, _, said = command(folder, "--out", tmp_path / "a.safetensors")
        assert code == 2 and str(folder) in said and said.count("\n") == 1 and "not foreseen" not in said


def test_a_folder_in_which_another_run_writes_is_one_line(command, pictures, tmp_path):
    out = tmp_path / "a.safetensors"
    with locked(work_folder(out)):
        code, _, said = command(pictures, "--out", out)
    assert code == 1 and said.count("\n") == 1 and "another process writes there" in said


def test_a_place_that_cannot_be_written_is_said_before_the_pipeline_is_loaded(command, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(own, "pipeline_for", lambda _: pytest.fail("a pipeline is loaded"))
    code, _, said = command(pictures, "--out", pictures / "0.png" / "a.safetensors")
    assert code == 1 and said.count("\n") == 1 and "0.png" in said and "not foreseen" not in said


def test_defaults_suit_the_pipeline(tmp_path, monkeypatch):
    bundled, other = folder_settings(device="cpu"), folder_settings(pipeline="sd15-shape", device="cpu")
    assert (bundled.resolution, bundled.finetune_learning_rate, bundled.guidance_scale) == (64, 3e-3, 3.0)
    assert (other.resolution, other.finetune_learning_rate, other.guidance_scale) == (512, 1e-4, 7.5)
    assert (bundled.dtype, bundled.lcm_steps, bundled.finetune_steps, bundled.warmup_steps) == ("float32", 400, 400, 20)
    assert folder_settings(steps=5, device="cpu").warmup_steps == 0
    monkeypatch.setattr(own, "choose_device", lambda _: "cuda")
    for native, dtype in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert folder_settings().dtype == dtype
    with pytest.raises(InputError, match="device: mps is refused"):
        folder_settings(device="mps")
