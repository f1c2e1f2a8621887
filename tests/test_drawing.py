"""What `sample` draws and `export` writes: said, checked before a model is loaded, never black."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import moved
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lora_distill import __main__ as cli
from lora_distill import drawing
from lora_distill.adapters import load_adapter, save_adapter
from lora_distill.data import scenes
from lora_distill.drawing import Wishes, header_wishes
from lora_distill.pipeline import BUNDLED, load_pipeline

LION = "a lion at the upper left, a bus at the lower right, on a blue background"
HEADER = {"made_by": "lora_distill", "base": "bundled", "w": "3.0", "method": "guided distillation", "rank": "2"}
HEADER |= {"guidance_scale": "1.0", "scheduler": "dpm++", "steps": "3", "resolution": "72", "trained_steps": "150"}


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder; its exit code, stdout and stderr without progress bars."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora_distill", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err.rpartition("\r")[2].rpartition("\x1b[A")[2]

    return run


@pytest.fixture
def lora(bundle, tmp_path):
    """A LoRA file of ours for the bundled pipeline."""
    moved(bundle.unet, "student", alpha=3)
    save_adapter(bundle.unet, "student", tmp_path / "student.safetensors", HEADER)
    return tmp_path / "student.safetensors"


def picture(path):
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_lora_of_ours_is_sampled_as_its_header_says(command, lora):
    code, out, _ = command("sample", LION, "--lora", lora)
    first, last = out.splitlines()
    assert (code, last) == (0, "sample.png") and picture("sample.png").shape == (72, 72, 3)
    said = "DPM-Solver++ 2M, 3 steps, guidance 1, 72 x 72 pixels, seed 0"
    assert first == f"{said}, what was not said from the LoRA's header"
    code, out, _ = command("sample", LION, "--lora", lora, "--steps", 2, "--scheduler", "ddim", "--resolution", 64)
    assert out.startswith("DDIM, 2 steps, guidance 1, 64 x 64 pixels, seed 0")


def test_without_a_lora_the_bundle_is_drawn_at_its_best(command):
    code, out, _ = command("sample", LION, LION, "--steps", 1)
    assert code == 0 and out.startswith("DDIM, 1 step, guidance 3, 64 x 64 pixels, seed 0\n")
    assert picture("sample.png").shape == (64, 128, 3)


def test_a_folder_is_drawn_with_the_guidance_of_diffusers(command):
    assert command("sample", LION, "--steps", 1, "--pipeline", BUNDLED)[1].startswith("DDIM, 1 step, guidance 7.5,")


def test_few_steps_of_a_lora_without_a_header_get_a_warning(command, lora, bundle):
    moved(bundle.unet, "other", alpha=3)
    save_adapter(bundle.unet, "other", lora.with_name("other.safetensors"), {"steps": "9", "scheduler": "no"})
    with pytest.warns(UserWarning, match=r"4 steps of the pipeline's own scheduler; an LCM-LoRA needs scheduler lcm"):
        _, out, _ = command("sample", LION, "--lora", "other.safetensors", "--steps", 4)
    assert out.startswith("DDIM, 4 steps, guidance 1,") and "header" not in out


def test_a_lora_of_another_base_gets_a_warning(command, lora):
    with pytest.warns(UserWarning, match=r"made for the pipeline bundled, drawn with"):
        command("sample", LION, "--lora", lora, "--pipeline", BUNDLED, "--steps", 1)


@pytest.mark.parametrize(
    ("field", "value"), [("steps", "many"), ("steps", "2.5"), ("resolution", ""), ("guidance_scale", "high")]
)
def test_a_header_whose_values_are_none_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^lora\.safetensors: {field}: expected a number in the header"):
        header_wishes(HEADER | {field: value}, "lora.safetensors")
    assert header_wishes({field: value}, "lora.safetensors") == Wishes()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"steps": "0"}, "steps: 0 is too few"),
        ({"steps": "100000"}, "steps: 100000 is too many"),
        ({"scheduler": "lms"}, "scheduler: expected own, ddim, dpm\\+\\+, lcm, got 'lms'"),
        ({"guidance_scale": "nan"}, "guidance_scale: expected a number of 1 or more, got nan"),
        ({"guidance_scale": "-1"}, "guidance_scale: expected a number of 1 or more, got -1"),
        ({"resolution": "65"}, "resolution: expected a multiple of 8"),
        ({"resolution": "800000"}, "resolution: expected a multiple of 8 up to 8192"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused(command, lora, bundle, header, said):
    moved(bundle.unet, "other", alpha=3)
    save_adapter(bundle.unet, "other", lora, HEADER | header)
    code, _, err = command("sample", LION, "--lora", lora)
    assert code == 2 and err.count("\n") == 1
    assert re.search(said, err), err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x.bmp"], "x.bmp: expected a name that ends in .png, .jpg"),
        (["--out", "x"], "x: expected a name that ends in .png, .jpg"),
        (["--out", "folder.png"], "folder.png: a folder; expected the name of a file"),
        (["--out", "file/x.png"], "file/x.png could not be written"),
        (["--out", "n" * 300 + ".png"], "nnn.png could not be written: File name too long"),
        (["--out", "/proc/x.png"], "/proc/x.png could not be written"),
        (["--guidance-scale", "inf"], "guidance_scale: expected a number of 1 or more, got inf"),
        (["--scheduler", "euler"], "scheduler: expected own, ddim, dpm++, lcm, got 'euler'"),
        (["--lora", "none.safetensors"], "none.safetensors: no such LoRA file here"),
        (["--lora", "folder.png"], "folder.png: a folder; expected one .safetensors file in it"),
        (["--lora", "file"], "file: not a readable LoRA file"),
        (["--pipeline", "./none"], "no pipeline folder none"),
        (["--pipeline", "folder.png"], "not a whole Stable Diffusion pipeline"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(command, monkeypatch, tmp_path, arguments, said):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_bytes(b"text")
    monkeypatch.setattr(drawing, "encode_prompts", None)
    code, out, err = command("sample", LION, *arguments)
    assert code in (1, 2) and said in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize(
    "arguments",
    ["--steps=0", "--resolution=0", "--resolution=9999", f"--seed={2**32}", "--seed=-1", "--guidance-scale=nan"],
)
def test_values_out_of_range_are_refused_by_the_command_line(command, arguments):
    code, out, err = command("sample", LION, arguments)
    assert code == 2 and "Invalid value" in err and not out


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--steps", "1001"], "1001 is too many"), (["--resolution", "65"], "65")]
)
def test_values_that_the_pipeline_cannot_take_are_one_line(command, arguments, said):
    code, _, err = command("sample", LION, *arguments)
    assert code == 2 and said in err and err.count("\n") == 1


def test_the_greatest_seed_draws_a_picture_of_its_own(command):
    pictures = []
    for seed in (0, 2**31, 2**32 - 1, 2**32 - 1):
        assert command("sample", LION, "--steps", 1, "--seed", seed, "--scheduler", "lcm")[0] == 0
        pictures.append(picture("sample.png"))
    assert np.array_equal(pictures[2], pictures[3])
    assert len({each.tobytes() for each in pictures}) == 3


@pytest.mark.parametrize("size", [1e30, 1e19, 1e8, 1e5])
def test_a_lora_that_blows_latents_up_gives_no_picture(command, lora, bundle, size):
    """Finite weights whose picture would be black or of one colour."""
    moved(bundle.unet, "other", alpha=3)
    for name, p in bundle.unet.named_parameters():
        if ".other." in name:
            p.data *= size
    save_adapter(bundle.unet, "other", lora, HEADER | {"resolution": "64"})
    code, _, err = command("sample", LION, "--lora", lora)
    assert (code, err.count("\n")) == (1, 1) and err.startswith("the ") and "of 1 of 1 prompts" in err
    assert not lora.with_name("sample.png").exists()


def test_words_that_the_bundle_does_not_know_are_named_with_those_that_it_knows(command):
    with pytest.warns(UserWarning) as caught:
        command("sample", "a dog riding a lion", "Two cats!", "🐶", "y" * 999, "--steps", 1)
    (said,) = [str(one.message) for one in caught if "does not know" in str(one.message)]
    assert said.startswith(
        f"the bundled pipeline does not know dog, riding, two, cats, 🐶, {'y' * 30}; it draws up to four of lion, frog,"
    )
    assert len(scenes.KINDS) == 24 and all(kind in said and kind in cli.sample.__doc__ for kind in scenes.KINDS)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_every_word_of_a_caption_is_known(style):
    rng = np.random.default_rng(0)
    drawn = scenes.sample_scenes(style, "train", 300, seed=0)
    assert scenes.unknown_words([text for scene in drawn for text in scenes.captions(scene, rng)]) == []


def test_an_empty_prompt_is_drawn_with_a_warning(command):
    with pytest.warns(UserWarning, match="an empty prompt is drawn as it is"):
        assert command("sample", " ", "--steps", 1)[0] == 0


def test_too_little_memory_is_one_line(command, monkeypatch):
    def none_left(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(drawing, "initial_noise", none_left)
    code, _, err = command("sample", LION)
    assert (code, err) == (1, "not enough memory: fewer prompts or a smaller resolution would do\n")


# ---------------------------------------------------------------------------------------------- export


def test_an_exported_lora_is_the_same_lora_and_says_what_it_is(command, lora, bundle):
    code, out, _ = command("export", lora, "--out", "kohya.safetensors")
    assert (code, out) == (0, "kohya.safetensors\n")
    again = load_pipeline("bundled").unet
    header = load_adapter(again, "again", lora.with_name("kohya.safetensors"))
    x = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 36, 128)
    with torch.no_grad():
        assert torch.allclose(again(*x).sample, bundle.unet(*x).sample, atol=1e-5)
    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3.0"}
    expected |= {"ss_sd_model_name": "bundled", "ss_steps": "150", "modelspec.resolution": "72x72"}
    assert header.items() >= (HEADER | expected).items()
    assert command("sample", LION, "--lora", "kohya.safetensors")[1].startswith("DPM-Solver++ 2M, 3 steps")
    assert command("export", "kohya.safetensors", "--out", "again.safetensors")[0] == 0
    assert lora.with_name("again.safetensors").read_bytes() == lora.with_name("kohya.safetensors").read_bytes()


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2"), (128, None)])
def test_an_export_says_which_stable_diffusion_it_is_for(command, tmp_path, width, version):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, width), key.format("B"): torch.ones(8, 2)}, tmp_path / "a.safetensors")
    assert command("export", "a.safetensors", "--out", "b.safetensors")[0] == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata().get("ss_base_model_version") == version


@pytest.mark.parametrize("out", ["student.safetensors", "x.png", "file/x.safetensors"])
def test_an_export_that_cannot_be_is_one_line(command, lora, out):
    lora.with_name("file").touch()
    before = lora.read_bytes()
    code, _, err = command("export", lora, "--out", out)
    assert code in (1, 2) and err.count("\n") == 1 and out in err and lora.read_bytes() == before


def test_a_dial_is_drawn_in_one_pass_with_the_weight_of_its_guidance(command, bundle, tmp_path):
    with torch.no_grad():
        for p in moved(bundle.unet, "student"):
            p *= 0.05  # pictures stay pictures at four times the weight
    header = HEADER | {"method": "guidance dial", "w0": "3", "w_min": "1", "w_max": "7.5", "guidance_scale": "3.0"}
    save_adapter(bundle.unet, "student", tmp_path / "dial.safetensors", header)
    for w, weight in (("3", "1"), ("5", "2"), ("1", "0")):
        code, out, err = command("sample", LION, "--lora", "dial.safetensors", "--guidance-scale", w)
        assert (
            code == 0 and f"guidance {w} in one pass, the LoRA's weight {weight}," in out and "trained for" not in err
        )
    code, out, _ = command("sample", LION, "--lora", "dial.safetensors")
    assert "guidance 3 in one pass, the LoRA's weight 1," in out
    with pytest.warns(UserWarning, match=r"dial\.safetensors: trained for guidance from 1 to 7\.5, drawn with 9"):
        assert command("sample", LION, "--lora", "dial.safetensors", "--guidance-scale", "9")[0] == 0
