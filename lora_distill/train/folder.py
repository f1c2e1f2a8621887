"""A LoRA from a folder of captioned pictures, without a profile, splits or a CLIP: what the command `train` runs."""

import shlex
import shutil
from pathlib import Path
from typing import Literal

import torch

from lora_distill import processes
from lora_distill.data.captioned import captioned_images
from lora_distill.data.encoded import Framing, encode_images
from lora_distill.devices import check_device, choose_device
from lora_distill.errors import InputError, MissingError
from lora_distill.pipeline import pipeline_for
from lora_distill.settings import Settings, check_paths, checked
from lora_distill.shapes import unet_config
from lora_distill.train.recipes import finetune_lora, lora_file, train_lcm_lora
from lora_distill.writing import locked, whole_file

Method = Literal["finetune", "lcm-lora"]
RATES = {"finetune": (3e-3, 1e-4), "lcm-lora": (1e-3, 1e-4)}  # of each method: for the bundled pipeline, for others
GUIDANCE = (3.0, 7.5)  # w of the teacher of an LCM-LoRA, for the same
FACTOR = 8  # pixels a latent, in Stable Diffusion and in the bundled pipeline


def train_folder(
    folder: Path, out: Path, settings: Settings, method: Method = "finetune", *, skip_unusable: bool = False
) -> int:
    """Train a LoRA on all captioned pictures of a folder and write it to `out`; return how many pictures there are.

    `settings` are from `folder_settings`. Encoded pictures and checkpoints are kept in `work_folder(out)`: the same
    call goes on where it was cut, and another one with the same pictures does not encode them again. Raises InputError
    for a folder or a name that cannot be used before anything is loaded, RunError where another run has that folder.
    """
    work = checked_output(out)
    if not folder.is_dir():
        raise MissingError(f"{folder}: expected a folder of pictures with captions")
    check_paths(settings)
    with locked(work):
        images = captioned_images(folder, "all", skip_unusable=skip_unusable, cache_dir=work)
        pipe = pipeline_for(settings)
        encoded = encode_images(pipe, images, Framing(settings.resolution), work, settings.lcm_batch_size)
        if method == "finetune":
            finetune_lora(pipe, encoded, settings, work, settings.lcm_rank, settings.lcm_targets, name="lora")
        else:
            train_lcm_lora(pipe, encoded, settings, work, name="lora")
        if processes.is_main():
            with whole_file(out) as temporary:
                shutil.copyfile(lora_file(work, "lora"), temporary)
    return len(images)


def folder_settings(
    method: Method = "finetune",
    *,
    pipeline: str = "bundled",
    steps: int = 400,
    rank: int = 16,
    batch_size: int = 4,
    learning_rate: float | None = None,
    resolution: int | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Settings:
    """The settings of a training on a folder; what is not given is what suits the pipeline.

    Raises InputError for a method, a pipeline or a value that cannot be.
    """
    if method not in RATES:
        raise InputError(f"method: expected {' or '.join(RATES)}, got {method!r}")
    if pipeline != "bundled" and (there := Path(pipeline).expanduser()).exists():
        pipeline = str(there.resolve())  # of settings a relative path starts at the checkout
    other = pipeline != "bundled"
    rates = {name: rate[other] for name, rate in RATES.items()}
    if learning_rate is not None:
        rates[method] = learning_rate
    values = {
        "profile": "train",
        "seed": seed,
        "pipeline": pipeline,
        "device": device,
        "dtype": _dtype(device),
        "guidance_scale": GUIDANCE[other],
        "resolution": _own_resolution(pipeline) if resolution is None else resolution,
        "warmup_steps": min(20, steps // 10),
        **dict.fromkeys(("train_steps", "lcm_steps", "finetune_steps"), steps),
        "lcm_batch_size": batch_size,
        "lcm_rank": rank,
        "finetune_learning_rate": rates["finetune"],
        "lcm_lora_learning_rate": rates["lcm-lora"],
    }
    return checked(values, "train")


def work_folder(out: Path) -> Path:
    """The folder beside a LoRA file in which its training keeps what it needs to go on."""
    return out.with_name(f"{out.stem}-work")


def checked_output(out: Path) -> Path:
    """The `work_folder` of a LoRA file. Raises InputError for a name that is no file's or not a safetensors file's."""
    if out.suffix != ".safetensors" or out.is_dir():
        raise InputError(f"out: expected the name of a .safetensors file, got {out}")
    return work_folder(out)


def drawing_command(out: Path, method: Method, pipeline: str) -> str:
    """The command that draws with a LoRA from `train_folder`."""
    options = ["" if pipeline == "bundled" else f" --pipeline {shlex.quote(pipeline)}"]
    options += [" --scheduler lcm --steps 4" if method == "lcm-lora" else ""]
    return f'python -m lora_distill sample "PROMPT" --lora {shlex.quote(str(out))}{"".join(options)}'


def _dtype(device: str) -> str:
    """What frozen weights are stored in: half of the memory on a GPU."""
    check_device(device)
    if choose_device(device) == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def _own_resolution(pipeline: str) -> int:
    """The resolution that a pipeline was made for. Raises InputError where its UNet does not say."""
    side = unet_config(pipeline).get("sample_size")
    if not isinstance(side, int):
        raise InputError(f"resolution: the UNet of {pipeline} does not say its own; give one")
    return FACTOR * side
