"""The architecture of Stable Diffusion 1.5, built without a download: memory and speed do not depend on weight values.

`stable_diffusion_15` builds the whole pipeline with random weights. `meta_unet` builds a UNet of any config without
values, and `materialise` fills it with zeros; under a FakeTensorMode 860 million parameters take no memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_distill.errors import InputError, MissingError, reading

BUNDLED = Path(__file__).parent / "assets" / "pipeline"
LONGEST_NAME = 255  # of a file or folder
SD15_SHAPE = "sd15-shape"  # name of the pipeline built here
# The configs of stable-diffusion-v1-5/stable-diffusion-v1-5, as far as they differ from the defaults of diffusers and
# transformers.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SD15_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD15_TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SD15_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def stable_diffusion_15(tokenizer: CLIPTokenizer, device: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of SD 1.5 with random weights, DDIM in place of PNDM, and a given tokenizer, set to 77 tokens."""
    tokenizer.model_max_length = SD15_TEXT_ENCODER["max_position_embeddings"]
    with torch.device(device):  # initialised on the device itself: on a GPU it takes a second
        parts = {
            "unet": UNet2DConditionModel(**SD15_UNET),
            "vae": AutoencoderKL(**SD15_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15_TEXT_ENCODER)),
        }
    return StableDiffusionPipeline(
        **{name: part.to(dtype).eval() for name, part in parts.items()},
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SD15_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline_source(name: str) -> Path | str:
    """The folder of a pipeline, or its hub id where there is no such folder.

    Raises FileNotFoundError for a path that does not exist, ValueError for a checkpoint in one file.
    """
    folder = BUNDLED if name == "bundled" else Path(name).expanduser()
    if not name.strip() or not name.isprintable() or max(map(len, folder.parts), default=0) > LONGEST_NAME:
        raise MissingError(f"no pipeline folder {name[:LONGEST_NAME]!r}")
    if folder.is_file():
        made = f"StableDiffusionPipeline.from_single_file({str(folder)!r}).save_pretrained(FOLDER)"
        raise InputError(f"{folder}: a checkpoint in one file; diffusers makes a folder of it, once: {made}")
    if folder.is_dir():
        return folder
    if name == "bundled" or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise MissingError(f"no pipeline folder {folder}")
    return name


def unet_config(pipeline: str) -> dict[str, Any]:
    """The full config of a pipeline's UNet; no weights are loaded. Names are those of `pipeline.load_pipeline`.

    Raises FileNotFoundError, ValueError or OSError in one line, as `pipeline_source` and `part_config` do.
    """
    if pipeline == SD15_SHAPE:
        return dict(meta_unet(SD15_UNET).config)
    config = part_config(UNet2DConditionModel, source := pipeline_source(pipeline), "unet")
    if not isinstance(config.get("down_block_types"), list | tuple):
        raise InputError(f"{source}: unet/config.json: no list of down_block_types")
    return config


def part_config(kind: type[ConfigMixin], source: Path | str, part: str) -> dict[str, Any]:
    """The config of one part of a pipeline. Raises OSError, in one line, where it cannot be had."""
    try:
        return kind.load_config(source, subfolder=part)
    except (OSError, ValueError) as error:
        if isinstance(source, Path):
            raise MissingError(f"{source / part}: no readable {kind.config_name}") from None
        reason = str(error).strip().partition("\n")[0]
        raise MissingError(f"{source}: neither a folder here nor a pipeline that the hub gives us ({reason})") from None


def meta_unet(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """A UNet on the meta device: parameters have shapes and no values. Adapters can be added to it."""
    with reading("unet/config.json", "the config of a UNet of Stable Diffusion"), torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config)).to(dtype=dtype)


def materialise(module: nn.Module, device: str) -> None:
    """Replace parameters and buffers on the meta device by zeros on `device`, fake ones under a FakeTensorMode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                tensors[name] = nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros
