"""What a rehearsal runs on, made by code in seconds: a tiny Stable Diffusion, photographs in Flickr's layouts, a CLIP.

Files, keys and quirks are those of the originals (the hub's folders of 2022, the archives of Flickr8k and Flickr30k),
for what differs between them and the bundled pipeline is what breaks. Weights are random: nothing here is a result.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from lora_distill import processes
from lora_distill.data.captioned import split_by_id
from lora_distill.errors import InputError, RunError
from lora_distill.settings import Settings, load_settings
from lora_distill.writing import locked

SEED = 0
VERSION_FILE = "version.json"  # in the inputs: the code that made them, and a digest of every file


def settings(dtype: str = "bfloat16") -> Settings:
    """The settings of profile `rehearsal` in a dtype: bfloat16, its own, or another, with a run of its own."""
    own = load_settings("rehearsal")
    if dtype == own.dtype:
        return own
    try:
        return Settings(**(own.model_dump() | {"profile": f"rehearsal-{dtype}", "dtype": dtype}))
    except ValidationError:
        raise InputError(f"--dtype: expected bfloat16, float16 or float32, got {dtype!r}") from None


def write_inputs(folder: Path) -> Path:
    """Write what profile `rehearsal` names: sd15, flickr8k, flickr30k and clip; return the folder.

    A folder that this code has made is left as it is, unless a file of it is lost or altered. Of several processes the
    main one makes it, the others wait. Raises RunError where they do not see it, RunError where another run makes
    it.
    """
    if not processes.is_main():
        _wait_for(folder)
    elif not _is_whole(folder):
        with locked(folder.parent):
            _make_inputs(folder)
    return folder


def _make_inputs(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "inputs"
        write_pipeline(made / "sd15")
        write_photographs(made / "flickr8k", "flickr8k")
        write_photographs(made / "flickr30k", "flickr30k")
        write_clip(made / "clip")
        _write_json(made / VERSION_FILE, {"code": _digest(Path(__file__)), "files": _digests(made)})
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            folder.rename(Path(temporary) / "old")
        made.rename(folder)


def _is_whole(folder: Path) -> bool:
    """Whether this code has made a folder, and every file of it is there as it was."""
    try:
        version = json.loads((folder / VERSION_FILE).read_bytes())
        return version["code"] == _digest(Path(__file__)) and version["files"].items() <= _digests(folder).items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _digest(path) for path in folder.rglob("*") if path.is_file()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wait_for(folder: Path, seconds: int = 120) -> None:
    for _ in range(10 * seconds):
        if _is_whole(folder):
            return
        time.sleep(0.1)
    raise RunError(f"{folder}: made by another process and not seen by this one; they must share runs/")


# ---------------------------------------------------------------------------------------------- the pipeline

# config.json as stable-diffusion-v1-5 and stable-diffusion-2-1 have it: keys that diffusers got later are not there.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,  # the number of heads, by its old name
    "block_out_channels": [8, 16, 16, 16],  # 320, 640, 1280, 1280
    "center_input_sample": False,
    "cross_attention_dim": 16,  # 768
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,  # 32
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_21 = UNET | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [1, 2, 2, 2],  # 5, 10, 20, 20
    "cross_attention_dim": 24,  # 1024
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [4, 8, 8, 8],  # 128, 256, 512, 512
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,  # 32
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
VAE_21 = VAE | {"_diffusers_version": "0.10.0.dev0", "sample_size": 768}
TEXT_ENCODER = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 16,  # 768
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 32,  # 3072
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,  # 12
    "num_hidden_layers": 2,  # 12
    "pad_token_id": 1,
    "projection_dim": 16,  # 768
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
}
TEXT_ENCODER_21 = TEXT_ENCODER | {"hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 48, "projection_dim": 8}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SCHEDULER_21 = SCHEDULER | {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "prediction_type": "v_prediction",
}
KINDS = {
    "sd15": (UNET, VAE, TEXT_ENCODER, SCHEDULER, "<|endoftext|>"),
    "sd21": (UNET_21, VAE_21, TEXT_ENCODER_21, SCHEDULER_21, "!"),
}


def write_pipeline(folder: Path, kind: Literal["sd15", "sd21"] = "sd15") -> Path:
    """Write a tiny Stable Diffusion 1.5 or 2.1 with random weights, in the hub's layout; return the folder."""
    unet, vae, text_encoder, scheduler, pad = KINDS[kind]
    text_encoder = text_encoder | {"vocab_size": len(_vocabulary()[0])}
    _write_model_index(folder, unet["_diffusers_version"], scheduler["_class_name"])
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizer(folder / "tokenizer", pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        parts = {
            "unet": (UNet2DConditionModel.from_config(unet), unet, "diffusion_pytorch_model"),
            "vae": (AutoencoderKL.from_config(vae), vae, "diffusion_pytorch_model"),
            "text_encoder": (CLIPTextModel(CLIPTextConfig(**text_encoder)), text_encoder, "model"),
        }
    _let_prompts_count(parts["unet"][0])
    for name, (module, config, weights) in parts.items():
        _write_json(folder / name / "config.json", config)
        save_file(_weights(name, module), folder / name / f"{weights}.safetensors", {"format": "pt"})
    return folder


def _write_model_index(folder: Path, version: str, scheduler: str) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": version,
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)


@torch.no_grad()
def _let_prompts_count(unet: UNet2DConditionModel) -> None:
    """Make cross-attention loud, so that guidance has something to guide: with fresh weights a prompt hardly counts."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_v", "attn2.to_out.0")):
            module.weight.mul_(5)


def _weights(part: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names that the hub's files have: those of 2022 for the VAE's attention and CLIP's."""
    weights = {name: value.contiguous() for name, value in module.state_dict().items()}
    if part == "vae":
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for now, then in old.items():
            weights = {name.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): weights[name] for name in weights}
    if part == "text_encoder":
        prefix = "" if any(name.startswith("text_model.") for name in weights) else "text_model."
        weights = {prefix + name: value for name, value in weights.items()}
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return weights


# ---------------------------------------------------------------------------------------------- the tokenizer

SUBJECTS = ("a brown dog", "two children", "a man in a red shirt", "a woman", "a white bird", "three cyclists")
ACTIONS = ("runs", "jumps", "sits", "plays", "looks up", "stands")
PLACES = ("on the grass", "in the water", "by a wooden fence", "on a city street", "to the left of a car", "in snow")


def _vocabulary() -> tuple[dict[str, int], list[str]]:
    """The ids of all tokens and the merges: CLIP's bytes, and as merges the words of the captions alone."""
    letters = _bytes_as_letters()
    merges: dict[str, None] = {}
    for word in dict.fromkeys(" ".join((*SUBJECTS, *ACTIONS, *PLACES)).split()):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            merges["".join(pieces[:end]) + " " + pieces[end]] = None
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return {token: number for number, token in enumerate(tokens)}, list(merges)


def _bytes_as_letters() -> list[str]:
    """The letters that stand for the 256 bytes in a byte-level vocabulary, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _write_tokenizer(folder: Path, pad: str) -> None:
    vocabulary, merges = _vocabulary()
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        "bos_token": {"content": "<|startoftext|>", **flags},
        "eos_token": {"content": "<|endoftext|>", **flags},
        "unk_token": {"content": "<|endoftext|>", **flags},
    }
    _write_json(folder / "special_tokens_map.json", special | {"pad_token": pad})
    config: dict[str, Any] = {name: {"__type": "AddedToken", **token} for name, token in special.items()}
    config |= {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)


# ---------------------------------------------------------------------------------------------- CLIP


def write_clip(folder: Path) -> Path:
    """Write a tiny CLIP with random weights, its tokenizer and image processor; return the folder."""
    vocabulary, _ = _vocabulary()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        CLIPModel(config).save_pretrained(folder)
    _write_tokenizer(folder, "<|endoftext|>")
    processor = {
        "crop_size": 32,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 32,
    }
    _write_json(folder / "preprocessor_config.json", processor)
    return folder


# ---------------------------------------------------------------------------------------------- photographs

SIZES = ((500, 375), (375, 500), (500, 333), (333, 500), (500, 500), (496, 281), (60, 48))  # Flickr's long side is 500
FIRST_ID = 1000092795  # a photograph's number at Flickr; photograph n has the same number in both sets
FIRST = {"train": 0, "val": 2000, "test": 4000, "30k": 6000}  # the first photograph of Flickr8k's splits, of Flickr30k


def write_photographs(
    folder: Path, layout: Literal["flickr8k", "flickr30k"], train: int = 24, val: int = 6, test: int = 12
) -> Path:
    """Write photographs that code made up, five captions each, as Flickr8k or Flickr30k are unpacked.

    Flickr8k has split files, and a caption file that names an image which is in no split and not there, as the
    original does. Flickr30k has none: `data.captioned.split_by_id` splits it, and its counts are met that way; its
    training photographs start with up to three of Flickr8k's test split, under Flickr30k's shorter names. One
    photograph is grey-scale, and in Flickr8k one is a PNG with transparency. Return the folder.
    """
    numbers = _photographs_8k(train, val, test) if layout == "flickr8k" else _photographs_30k(train, val, test)
    images = folder / {"flickr8k": "Flicker8k_Dataset", "flickr30k": "flickr30k-images"}[layout]
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for name, number in numbers:
        _photograph(number, "RGBA" if name.endswith(".png") else "RGB").save(images / name, quality=90)
        lines += [f"{name}#{i}\t{caption}" for i, caption in enumerate(_captions(number))]
    if layout == "flickr30k":
        (folder / "results_20130124.token").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder
    texts = folder / "Flickr8k_text"
    texts.mkdir(exist_ok=True)
    lines += [f"2258277193_586949ec62.jpg.1#{i}\t{caption}" for i, caption in enumerate(_captions(0))]
    (texts / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = [name for name, _ in numbers]
    splits = {"train": names[:train], "dev": names[train : train + val], "test": names[train + val :]}
    for split, members in splits.items():
        (texts / f"Flickr_8k.{split}Images.txt").write_text("\n".join(members) + "\n", encoding="utf-8")
    return folder


def photo_id(number: int) -> int:
    """The Flickr id of made-up photograph `number`; names in Flickr8k begin with it, names in Flickr30k are it."""
    return FIRST_ID + 7919 * number


def _photographs_8k(train: int, val: int, test: int) -> list[tuple[str, int]]:
    """Name and number of each photograph, train's first, then val's, then test's; names end in a secret, as there."""
    counts = {"train": train, "val": val, "test": test}
    numbers = [FIRST[split] + i for split, count in counts.items() for i in range(count)]
    secrets = np.random.default_rng(SEED).integers(0, 2**40, len(numbers))
    return [
        (f"{photo_id(number)}_{secret:010x}.{'png' if number == 1 else 'jpg'}", number)
        for number, secret in zip(numbers, secrets, strict=True)
    ]


def _photographs_30k(train: int, val: int, test: int) -> list[tuple[str, int]]:
    """Name and number of each photograph, as many a split as asked for; the first three are in Flickr8k's test."""
    wanted = {"train": train, "val": val, "test": test}
    leaked = [number for number in range(FIRST["test"], FIRST["test"] + 12) if _split_30k(number) == "train"]
    found: list[int] = []
    for number in (*leaked[:3], *range(FIRST["30k"], FIRST["30k"] + 100 * sum(wanted.values()))):
        if wanted[_split_30k(number)]:
            wanted[_split_30k(number)] -= 1
            found.append(number)
    return [(f"{photo_id(number)}.jpg", number) for number in found]


def _split_30k(number: int) -> str:
    return split_by_id(f"{photo_id(number)}.jpg")


def _captions(number: int) -> list[str]:
    """Five captions of a photograph, as Flickr's: a sentence, a blank and the full stop."""
    rng = np.random.default_rng([SEED, 1, number])
    rows = rng.integers(0, 6, (5, 3))
    return [f"{SUBJECTS[i]} {ACTIONS[j]} {PLACES[k]} .".capitalize() for i, j, k in rows]


def _photograph(number: int, mode: str) -> Image.Image:
    """A made-up photograph: a smooth gradient, some shapes and noise; every sixth is grey, RGBA has a clear corner."""
    rng = np.random.default_rng([SEED, 2, number])
    width, height = SIZES[number % len(SIZES)]
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        x, y = rng.uniform(0, 0.7, 2) * (width, height)
        w, h = rng.uniform(0.1, 0.5, 2) * (width, height)
        shape((x, y, x + w, y + h), fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    noisy = np.asarray(picture) + rng.normal(0, 8, (height, width, 3))
    picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    if mode == "RGBA":
        alpha = np.full((height, width), 255, np.uint8)
        alpha[: height // 3, : width // 3] = 0
        picture.putalpha(Image.fromarray(alpha))
    elif number % 6 == 5:
        picture = picture.convert("L")
    return picture


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
