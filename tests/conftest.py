"""What several tests need: a UNet of Stable Diffusion's kind that is small enough to train in a blink."""

import gc
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel

from lora_distill.adapters import add_adapter
from lora_distill.pipeline import load_pipeline


def small_unet(seed: int = 0, channels: tuple[int, int] = (8, 16)) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).requires_grad_(False)


def moved(unet, name, seed=3, **options):
    """Add an adapter whose B is no longer zero, so that it changes the output."""
    parameters = add_adapter(unet, name, **{"rank": 2, "alpha": 2, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return parameters


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach at this moment, each storage once; no garbage is collected first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated things that merely exist
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [t for t in tensors if t.device.type == "cpu"]  # those on the meta device take no memory
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return small_unet()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_t (2, 4, 8, 8), timesteps (2,) and prompt_embeds (2, 5, 8) for `unet`."""
    generator = torch.Generator().manual_seed(1)
    x_t, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return x_t, torch.tensor([19, 777]), embeds


@pytest.fixture
def bundle():
    """The bundled pipeline, loaded anew: a test may change it."""
    return load_pipeline("bundled")
