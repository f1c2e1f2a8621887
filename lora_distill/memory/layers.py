"""The layers of a UNet in the order in which they run, with the sizes of what goes in and out: the account's raw data.

Sizes come from one pass on the meta device, which knows shapes and computes nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from lora_distill.adapters import add_adapter
from lora_distill.shapes import meta_unet

TOKENS = 77  # of a prompt, in every Stable Diffusion
KINDS = {nn.Conv2d: "conv", nn.Linear: "linear", nn.GroupNorm: "norm", nn.LayerNorm: "norm", nn.SiLU: "silu"}
RESIDUAL_BLOCKS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock)


@dataclass(frozen=True)
class Value:
    """A tensor: its storage, elements an image, and whether a gradient flows to it."""

    key: int
    size: int
    has_grad: bool


@dataclass(frozen=True)
class Layer:
    """One call of a layer: what goes in and out, the elements of its matrix and of all that it trains."""

    kind: str  # conv, linear, norm, silu, geglu or attention
    inputs: tuple[Value, ...]
    output: Value
    matrix: int = 0
    trained: int = 0
    lora: bool = False
    heads_by_tokens: int = 0  # of attention, the size of its softmax statistics
    unit: int | None = None  # the block, by its first layer, that gradient checkpointing runs again as a whole
    residuals: tuple[Value, ...] = ()  # inputs of the residual blocks around it
    transformer: Value | None = None  # input of the transformer block around it
    stage: Value | None = None  # input of the up block around it


@dataclass(frozen=True)
class Skip:
    """A long skip connection, made before layer `made`, joined to the up path before layer `used` as `joined`.

    A forward pass holds it to the end of its up block, layer `held`.
    """

    made: int
    used: int
    held: int
    size: int
    joined: Value


@dataclass(frozen=True)
class Layers:
    """A UNet's layers in order, its long skips, and the input of each checkpointed block by its first layer."""

    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...]
    units: dict[int, Value]
    parameters: int  # of W0


def layers_of(unet_config: Mapping[str, Any], latent_size: int, *, rank: int, targets: str, trained: str) -> Layers:
    """The layers of a UNet for latents of a size, with LoRA of a rank (0 is none); `trained` is unet, lora or none."""
    return _layers_of(json.dumps(dict(unet_config), sort_keys=True), latent_size, rank, targets, trained)


@lru_cache(maxsize=64)
def _layers_of(config: str, latent_size: int, rank: int, targets: str, trained: str) -> Layers:
    config = json.loads(config)
    unet = meta_unet(config).train()
    if rank:
        add_adapter(unet, "account", rank=rank, alpha=rank, targets=targets)
    if trained != "lora":
        unet.requires_grad_(trained == "unet")
    recorder = _Recorder(unet)
    latents = torch.empty(1, config["in_channels"], latent_size, latent_size, device="meta")
    embeds = torch.empty(1, TOKENS, config["cross_attention_dim"], device="meta")
    unet(latents, torch.empty(1, device="meta"), embeds)
    return recorder.result()


class _Recorder:
    """Hooks that write down what passes through a UNet."""

    def __init__(self, unet: UNet2DConditionModel):
        self.parameters = sum(p.numel() for name, p in unet.named_parameters() if "lora_" not in name)
        self.layers: list[Layer] = []
        self.units: dict[int, Value] = {}
        self.made: list[Value] = []
        self.used: list[tuple[int, Value]] = []
        self.held: list[int] = []
        self.residuals: list[Value] = []
        self.transformer: Value | None = None
        self.stage: Value | None = None
        self.unit: int | None = None
        self.alive: list[Tensor] = []  # no storage may be freed, or another tensor could get its address
        self.qkv: list[Value] = []
        self.halves: Value | None = None  # what GEGLU multiplies
        for name, module in unet.named_modules():
            self._hook_layer(name, module)
            if isinstance(module, RESIDUAL_BLOCKS):
                # diffusers checkpoints every resnet but the middle's first, and every transformer block
                is_unit = not isinstance(module, Transformer2DModel) and module is not unet.mid_block.resnets[0]
                module.register_forward_pre_hook(self._enter(is_unit))
                module.register_forward_hook(self._leave(is_unit))
        self._hook_skips(unet)

    def _hook_layer(self, name: str, module: nn.Module) -> None:
        if type(module) in KINDS:
            module.register_forward_hook(self._leaf(name))
        if isinstance(module, GEGLU):
            module.proj.register_forward_hook(self._geglu_input)
            module.register_forward_hook(self._geglu)
        if isinstance(module, Attention):
            for part in (module.to_q, module.to_k, module.to_v):
                part.register_forward_hook(lambda _, args, output: self.qkv.append(self.value(output)))
            module.to_out[0].register_forward_pre_hook(self._attention(module.heads))

    def _hook_skips(self, unet: UNet2DConditionModel) -> None:
        unet.conv_in.register_forward_hook(lambda _, args, output: self.made.append(self.value(output)))
        for block in unet.down_blocks:
            block.register_forward_hook(lambda _, args, output: self.made.extend(map(self.value, output[1])))
        for block in unet.up_blocks:
            block.register_forward_pre_hook(self._enter_stage, with_kwargs=True)
            block.register_forward_hook(self._leave_stage)
            for resnet in block.resnets:
                resnet.register_forward_pre_hook(
                    lambda _, args: self.used.append((len(self.layers), self.value(args[0])))
                )

    def value(self, tensor: Tensor) -> Value:
        self.alive.append(tensor)
        return Value(tensor.untyped_storage()._cdata, tensor.numel(), tensor.requires_grad)

    def add(self, kind: str, inputs: tuple[Value, ...], output: Value, **more) -> None:
        around = {"residuals": tuple(self.residuals), "transformer": self.transformer, "stage": self.stage}
        self.layers.append(Layer(kind, inputs, output, unit=self.unit, **around, **more))

    def _enter_stage(self, module: nn.Module, args, kwargs: dict[str, Any]) -> None:
        self.stage = self.value(kwargs["hidden_states"])

    def _leave_stage(self, module: nn.Module, args, output) -> None:
        self.stage = None
        self.held += [len(self.layers)] * (len(self.used) - len(self.held))

    def _leaf(self, name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kind = KINDS[type(module)]
            matrix = module.weight.numel() if kind in ("conv", "linear") else 0
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            self.add(
                kind, (self.value(args[0]),), self.value(output), matrix=matrix, trained=trained, lora="lora_" in name
            )

        return hook

    def _geglu_input(self, module: nn.Module, args, output: Tensor) -> None:
        self.halves = self.value(output)

    def _geglu(self, module: GEGLU, args, output: Tensor) -> None:
        self.add("geglu", (self.halves,), self.value(output))

    def _attention(self, heads: int):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].shape[1]
            self.add("attention", tuple(self.qkv), self.value(args[0]), heads_by_tokens=heads * tokens)
            self.qkv.clear()

        return hook

    def _enter(self, is_unit: bool):
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.residuals.append(self.value(args[0]))
            if isinstance(module, BasicTransformerBlock):
                self.transformer = self.residuals[-1]
            if is_unit:
                self.unit = len(self.layers)
                self.units[self.unit] = self.residuals[-1]

        return hook

    def _leave(self, is_unit: bool):
        def hook(module: nn.Module, args, output) -> None:
            self.residuals.pop()
            if isinstance(module, BasicTransformerBlock):
                self.transformer = None
            if is_unit:
                self.unit = None

        return hook

    def result(self) -> Layers:
        first_use: dict[int, int] = {}
        for index, layer in enumerate(self.layers):
            first_use.setdefault(layer.inputs[0].key, index)
        ends = zip(self.used, self.held, strict=True)
        pairs = zip(self.made, reversed(list(ends)), strict=True)
        skips = [Skip(first_use.get(v.key, used), used, held, v.size, joined) for v, ((used, joined), held) in pairs]
        return Layers(tuple(self.layers), tuple(skips), self.units, self.parameters)
