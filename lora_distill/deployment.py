"""A pipeline as one would run it: the adapter folded into W0, and on a CPU the networks on OpenVINO."""

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from lora_distill.adapters import UNetInRole, merged_copy, rounding_error
from lora_distill.cpu_runtime import OpenvinoDecoder, OpenvinoUNet
from lora_distill.devices import compiled, is_compiled
from lora_distill.errors import InputError
from lora_distill.pipeline import with_unet

ROUNDING = 0.1  # an adapter is folded into W0 if rounding changes its update by less, relative to the update's norm


def deployed(
    pipe: StableDiffusionPipeline,
    adapter: str | None = None,
    graphs: Path | None = None,
    *,
    for_timing: bool = False,
    compile: bool = True,
) -> StableDiffusionPipeline:
    """The pipeline with an adapter folded into W0, and q, k, v of attention in one product (k, v in cross-).

    With a folder for its `graphs`, UNet and VAE decoder run on OpenVINO on a CPU in float32; elsewhere they stay
    in PyTorch. The images are the same up to rounding. Weights that neither the adapter nor the product changes are
    shared with W0. An adapter whose update 16 bits cannot hold is not folded: it runs beside W0, with a warning; it is
    folded all the same `for_timing`, for seconds do not depend on values. Compiled if the pipeline's UNet is, unless
    `compile` is False.

    Raises ValueError for a UNet that takes w as an input: a full LCM is its own deployed form; ModuleNotFoundError, in
    one line, where OpenVINO is to be used and not installed.
    """
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise InputError("a UNet that takes the guidance scale as an input is not deployed: it runs as it is")
    if adapter and not for_timing and (error := rounding_error(pipe.unet, adapter)) > ROUNDING:
        dtype = str(pipe.unet.dtype).removeprefix("torch.")
        lost = f"weights in {dtype} would change its update by {100 * error:.0f} %"
        warnings.warn(f"adapter {adapter!r} is not folded into W0 but runs beside it: {lost}", stacklevel=2)
        return with_unet(pipe, UNetInRole(pipe.unet, adapter))
    unet = merged_copy(pipe.unet, adapter)
    unet.fuse_qkv_projections()
    ready = with_unet(pipe, unet.eval().requires_grad_(False))
    if graphs and unet.device.type == "cpu" and unet.dtype == torch.float32:
        ready.unet = OpenvinoUNet(unet, graphs)
        ready.vae = _decoder(pipe.vae, graphs)
    elif compile and is_compiled(pipe.unet):
        compiled(unet)
    return ready


@lru_cache(maxsize=1)
def _decoder(vae: nn.Module, graphs: Path) -> OpenvinoDecoder:
    """One for all that is deployed of a pipeline: no adapter changes the VAE."""
    return OpenvinoDecoder(vae, graphs)


def deployments(graphs: Path | None, kept: int = 2, **options: bool) -> Callable[..., StableDiffusionPipeline]:
    """A function of (pipe, adapter) that gives them `deployed`, with its `options`, and remembers the last `kept`.

    A full LCM is its own deployed form and comes back as it is. An adapter that is trained on afterwards must have
    another name.
    """

    remembered = lru_cache(maxsize=kept)(partial(deployed, graphs=graphs, **options))

    def deploy(pipe: StableDiffusionPipeline, adapter: str | None = None) -> StableDiffusionPipeline:
        return pipe if pipe.unet.config.time_cond_proj_dim is not None else remembered(pipe, adapter)

    return deploy
