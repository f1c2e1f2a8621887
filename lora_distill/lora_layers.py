"""PEFT's LoRA layers, computed with fewer operations in training; parameters, switches and files are PEFT's.

With gradients the update is added in one operation, W0 x + s B (A x), where PEFT takes three and as many tensors of the
output's size. Without gradients, where a layer is `folded`, it computes (W0 + s B A) x: the sum exists for one layer at
a time. Everywhere else PEFT's own forward runs, bit for bit as in stock diffusers.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from torch import Tensor, nn
from torch.nn import functional


class LeanLinear(Linear):
    """PEFT's LoRA of a linear layer."""

    folded = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _adapter_alone(self, args, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        if self.folded:
            return functional.linear(x, _folded(self, adapter), self.base_layer.bias)
        output, (h, scale) = self.base_layer(x), _scaled(self.lora_A[adapter](x), self.scaling[adapter])
        b = self.lora_B[adapter].weight.t()  # (rank, out); h is (..., rank), the output (..., out)
        return torch.addmm(_rows(output), _rows(h), b, alpha=scale).view(output.shape)


class LeanConv2d(Conv2d):
    """PEFT's LoRA of a convolution: A has its kernel, B is 1 x 1."""

    folded = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _adapter_alone(self, args, kwargs)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        if self.folded:
            return self.base_layer._conv_forward(x, _folded(self, adapter), self.base_layer.bias)
        output, (h, scale) = self.base_layer(x), _scaled(self.lora_A[adapter](x), self.scaling[adapter])
        b = self.lora_B[adapter].weight.flatten(1)  # (out, rank); h is (b, rank, h, w), the output (b, out, h, w)
        if output.is_contiguous():
            products = b.expand(len(output), -1, -1)
            return torch.baddbmm(output.flatten(2), products, h.flatten(2), alpha=scale).view(output.shape)
        output, h = output.permute(0, 2, 3, 1), h.permute(0, 2, 3, 1)  # channels last
        summed = torch.addmm(_rows(output), _rows(h), b.t(), alpha=scale)
        return summed.view(output.shape).permute(0, 3, 1, 2)


def with_lean_layers(config: LoraConfig) -> LoraConfig:
    """The config of an adapter, with these layers for all that carry no adapter yet."""
    config._register_custom_module({nn.Linear: LeanLinear, nn.Conv2d: LeanConv2d})
    return config


def _folded(layer: LoraLayer, adapter: str) -> Tensor:
    """W0 + s B A, in the shape of W0."""
    w0, a = layer.base_layer.weight, layer.lora_A[adapter].weight
    b, scale = _scaled(layer.lora_B[adapter].weight, layer.scaling[adapter])
    return torch.addmm(w0.flatten(1), b.flatten(1), a.flatten(1), alpha=scale).view(w0.shape)


def _scaled(tensor: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """A tensor and the number that is still to multiply it: a weight that is a tensor itself is multiplied at once."""
    return (tensor * scale, 1.0) if isinstance(scale, Tensor) else (tensor, scale)


def _adapter_alone(layer: LoraLayer, args: tuple, kwargs: dict) -> str | None:
    """The adapter whose update is all that the layer adds to W0's product; None where PEFT's forward is to run."""
    if layer.disable_adapters or layer.merged or args or kwargs or not (torch.is_grad_enabled() or layer.folded):
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        return None
    plain = isinstance(layer.lora_dropout[active[0]], nn.Identity)
    same_dtype = layer.lora_A[active[0]].weight.dtype == layer.base_layer.weight.dtype
    return active[0] if plain and same_dtype else None


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
