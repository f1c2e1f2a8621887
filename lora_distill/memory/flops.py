"""Floating point operations of a UNet evaluation, a training step and a picture, counted by torch on fake tensors.

A multiplication and an addition are two operations; only matrix products and convolutions are counted, as is usual.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_distill.memory.measure import FakeValues
from lora_distill.memory.schemes import Scheme, Setup
from lora_distill.memory.steps import prepare


def step_flops(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any]) -> int:
    """Operations of one step of a scheme, over its whole batch. Raises ValueError as `prepare`.

    Attention is counted in its plain form: what the fused kernels compute twice in backward is left out.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FakeValues():
        step = prepare(scheme, setup, unet_config, "cpu")
        with FlopCounterMode(display=False) as counter:
            step()
    return counter.get_total_flops()


def decoder_flops(vae_config: Mapping[str, Any], resolution: int) -> int:
    """Operations of decoding one latent to a picture of `resolution` pixels."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(vae_config))
        latents = torch.empty(1, vae.config.latent_channels, resolution // 8, resolution // 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return counter.get_total_flops()
