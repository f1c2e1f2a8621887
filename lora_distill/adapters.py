"""Roles on one W0: named LoRA adapters on a single frozen UNet, saved to LoRA files and loaded from them.

The teacher is the UNet with every adapter off; a student, a fine-tune or an LCM is the same UNet with one adapter on.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_distill.errors import InputError
from lora_distill.finite import not_finite
from lora_distill.lora_files import Layer, LoraFile, read_lora, write_kohya, write_lora
from lora_distill.lora_layers import LeanConv2d, LeanLinear, with_lean_layers

TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    # the fourteen suffixes of LCM-LoRA (Luo et al. 2023): every convolution and linear layer except conv_in, conv_out
    # and the two of time_embedding
    "all": [
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ],
}


def add_adapter(
    unet: UNet2DConditionModel,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: str = "attention",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Parameter]:
    """Add a trainable LoRA adapter, W0 + (alpha / rank) B A with B = 0, freeze W0 and return all A and B.

    Earlier adapters are switched off and frozen. `dtype` is that of A and B, independent of W0's: float32 under
    autocast; 16 bits when the whole step is computed in 16 bits, with float32 masters in the optimizer.

    Raises InputError for a rank, alpha, seed or targets that make no adapter, and for a name that is taken or none.
    """
    _check_free(unet, name)
    _check_numbers(rank, alpha, targets, seed)
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[targets], init_lora_weights="gaussian")
    config = with_lean_layers(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapter(name)
    parameters = adapter_parameters(unet, name)
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return parameters


def _check_free(unet: UNet2DConditionModel, name: str) -> None:
    """Raise InputError for an adapter's name that the UNet has already, or that PyTorch takes for no module."""
    if name in adapter_names(unet):
        raise InputError(f"this UNet has an adapter {name!r} already; delete it or take another name")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InputError(f"adapter {name!r}: expected a name without dots that is no word of PyTorch's")


def _check_numbers(rank: int, alpha: float, targets: str, seed: int) -> None:
    if targets not in TARGETS:
        raise InputError(f"targets: expected {' or '.join(TARGETS)}, got {targets!r}")
    for key, value in (("rank", rank), ("alpha", alpha)):
        if not 0 < value < math.inf:
            raise InputError(f"{key}: expected a number above 0, got {value}")
    if not 0 <= seed < 2**32:  # PyTorch on a CPU would take the last 32 bits
        raise InputError(f"seed: expected 0 to {2**32 - 1}, got {seed}")


def add_sum(unet: UNet2DConditionModel, name: str, weights: Mapping[str, float]) -> None:
    """Add the adapter `name`, the sum of others' updates with these weights: its A and B are theirs side by side.

    Equal to diffusers' `set_adapters` of several names with weights. Raises InputError for a name that is taken or
    none, and for an adapter that the UNet does not carry.
    """
    _check_free(unet, name)
    summed: dict[str, list[Layer]] = {}
    for adapter, weight in weights.items():
        for layer_name, layer in _as_file(unet, adapter, Path(adapter)).layers.items():
            scaled = weight * layer.alpha / layer.rank * layer.b
            summed.setdefault(layer_name, []).append(Layer(layer.a, scaled, layer.rank))
    layers = {
        layer_name: Layer(torch.cat([one.a for one in parts]), torch.cat([one.b for one in parts], dim=1),
                          sum(one.rank for one in parts))
        for layer_name, parts in summed.items()
    }  # fmt: skip
    _load(unet, name, LoraFile(Path(name), layers, {}))


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> list[torch.nn.Parameter]:
    """All A and B of one adapter, as a list of parameters. Raises InputError for one that the UNet does not carry."""
    _check_carried(unet, name)
    return [p for key, p in unet.named_parameters() if "lora_" in key and f".{name}." in key]


def adapter_names(unet: UNet2DConditionModel) -> list[str]:
    """The names of the adapters on a UNet, sorted."""
    return sorted(getattr(unet, "peft_config", {}))


def parameter_counts(unet: UNet2DConditionModel) -> tuple[int, int]:
    """(number of parameters of W0, number of parameters of all adapters)."""
    lora = sum(p.numel() for key, p in unet.named_parameters() if "lora_" in key)
    return sum(p.numel() for p in unet.parameters()) - lora, lora


@contextmanager
def role(
    unet: UNet2DConditionModel, adapter: str | None, weight: float | None = None
) -> Iterator[UNet2DConditionModel]:
    """Inside the block the UNet runs with one adapter, given by name, or with None: W0 alone, the teacher.

    With a `weight` the adapter's update is multiplied by it, as by the LoRA weight of other tools. On exit, also by an
    exception, every layer has its earlier state: active adapters and weights, on or off. requires_grad is not
    touched; PEFT's own switches change it as a side effect. Leave the teacher's role before backward: gradient
    checkpointing recomputes the forward pass with the role that is on at that moment.

    Raises ValueError for an adapter that the UNet does not have.
    """
    if adapter is not None:
        _check_carried(unet, adapter)
    layers = lora_layers(unet)
    found = [(layer._disable_adapters, layer._active_adapter, layer.scaling.get(adapter)) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter:
                layer._active_adapter = [adapter]
        if weight is not None:
            set_weight(unet, adapter, weight)
        yield unet
    finally:
        for layer, (disabled, active, scale) in zip(layers, found, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active
            if scale is not None:
                layer.scaling[adapter] = scale


def set_weight(unet: UNet2DConditionModel, adapter: str, weight: float | torch.Tensor) -> None:
    """Multiply an adapter's update by `weight` from now on; as a tensor, of one number, no GPU is waited for."""
    _check_carried(unet, adapter)
    for layer in lora_layers(unet):
        layer.set_scale(adapter, weight)  # of layers that have it


@contextmanager
def folded(unet: UNet2DConditionModel) -> Iterator[None]:
    """Inside the block a layer with one adapter on computes (W0 + s B A) x without gradients: one product, not three.

    The sum is made layer by layer, never a second W0. In float32 alone, without autocast: 16 bits would round a small
    update away.
    """
    layers = [layer for layer in lora_layers(unet) if isinstance(layer, LeanLinear | LeanConv2d)]
    exact = not torch.is_autocast_enabled(unet.device.type)
    layers = [layer for layer in layers if exact and layer.base_layer.weight.dtype == torch.float32]
    try:
        for layer in layers:
            layer.folded = True
        yield
    finally:
        for layer in layers:
            layer.folded = False


_layers: WeakKeyDictionary = WeakKeyDictionary()  # UNet: its adapters' configs, its LoRA layers


def lora_layers(unet: UNet2DConditionModel) -> list[BaseTunerLayer]:
    """The layers that carry adapters. They are looked for anew when an adapter has been added or removed."""
    configs = list(getattr(unet, "peft_config", {}).values())  # PEFT makes a new config for each adapter
    known, layers = _layers.get(unet, (None, []))
    if known is None or len(known) != len(configs) or any(a is not b for a, b in zip(known, configs, strict=True)):
        layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        _layers[unet] = configs, layers
    return layers


def _check_carried(unet: UNet2DConditionModel, adapter: str) -> None:
    if adapter not in adapter_names(unet):
        raise InputError(f"no adapter {adapter!r} on this UNet; it carries {adapter_names(unet) or 'none'}")


class UNetInRole(nn.Module):
    """A UNet that always runs with one of its adapters on, called as the UNet itself; it shares all weights with it."""

    def __init__(self, unet: UNet2DConditionModel, adapter: str):
        super().__init__()
        _check_carried(unet, adapter)
        self.unet = unet
        self.adapter = adapter

    @property
    def config(self) -> FrozenDict:
        return self.unet.config

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, *inputs, **options):
        with role(self.unet, self.adapter):
            return self.unet(*inputs, **options)


# ---------------------------------------------------------------------------------------------- copies


def plain_copy(unet: UNet2DConditionModel, time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """A second UNet with the weights of W0 and no adapters: the student of conventional distillation.

    With `time_cond_proj_dim` it also takes an embedded guidance scale, as a full LCM does (Luo et al. 2023). The new
    projection is zero, so that the untrained student equals the teacher.
    """
    weights = {name: value.clone() for name, value in base_weights(unet).items()}
    return _with_weights(unet, weights, time_cond_proj_dim)


@torch.no_grad()
def merged_copy(unet: UNet2DConditionModel, adapter: str | None) -> UNet2DConditionModel:
    """A second UNet, frozen and without PEFT layers, with weights W0 + (alpha / rank) B A, for deployment.

    The sum is computed in float32 and rounded once to W0's dtype; `rounding_error` says what that does to the update.
    Weights without an update, all of them when `adapter` is None, are shared with W0: do not train or change them.

    Raises ValueError for an adapter that the UNet does not carry.
    """
    weights = base_weights(unet)
    for name, w0, delta in _updates(unet, adapter):
        weights[name] = (w0.float() + delta).to(w0.dtype)
    return _with_weights(unet, weights).requires_grad_(False)


@torch.no_grad()
def rounding_error(unet: UNet2DConditionModel, adapter: str) -> float:
    """What merging in W0's dtype does to an adapter: the norm of the rounding error over that of the update.

    About 1 where updates are far below the spacing of the numbers (bfloat16 has 8 bits) and all but vanish.
    """
    error = size = 0.0
    for _, w0, delta in _updates(unet, adapter):
        exact = w0.float() + delta
        error += (exact.to(w0.dtype).float() - exact).square().sum(dtype=torch.float64)
        size += delta.square().sum(dtype=torch.float64)
    return float((error / size) ** 0.5) if size else 0.0


def _updates(unet: UNet2DConditionModel, adapter: str | None) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name of the weight, W0, (alpha / rank) B A in float32 whatever the dtype of A and B) of each layer."""
    if adapter is None:
        return
    _check_carried(unet, adapter)
    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            product = b.flatten(1) @ a.flatten(1)  # (out, rank) @ (rank, in x kernel)
            w0 = layer.get_base_layer().weight
            yield f"{name}.weight", w0, layer.scaling[adapter] * product.view(w0.shape)


def base_weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    """W0 by the names that it has without adapters; the tensors are the UNet's own."""
    return {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if "lora_" not in key}


def _with_weights(
    unet: UNet2DConditionModel, weights: dict[str, torch.Tensor], time_cond_proj_dim: int | None = None
) -> UNet2DConditionModel:
    """A UNet of the same configuration around these tensors: no weights are initialised or copied."""
    # without _use_default_values, a list of keys that the config file lacks: from_config would leave them out
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config |= {"time_cond_proj_dim": time_cond_proj_dim} if time_cond_proj_dim else {}
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(config)
    if time_cond_proj_dim:
        shape = copy.time_embedding.cond_proj.weight.shape
        zeros = torch.zeros(shape, dtype=unet.dtype, device=unet.device)
        weights = {"time_embedding.cond_proj.weight": zeros, **weights}
    copy.load_state_dict(weights, assign=True)
    return copy


# ---------------------------------------------------------------------------------------------- files


def save_adapter(unet: UNet2DConditionModel, name: str, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one adapter as a LoRA file for `StableDiffusionPipeline.load_lora_weights`.

    The keys are PEFT's and the metadata holds the adapter's config, so that alpha != rank and adapters on all layers
    are kept. `metadata` is added. The same adapter gives the same bytes. Raises RunError for weights that are not
    finite, InputError for an adapter that the UNet does not carry.
    """
    file = _as_file(unet, name, path)
    config = {key: _jsonable(value) for key, value in unet.peft_config[name].to_dict().items()}
    write_lora(path, file.layers, config, metadata or {})


def export_kohya(unet: UNet2DConditionModel, name: str, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write one adapter in the format of kohya-ss, which ComfyUI, AUTOMATIC1111 and diffusers read."""
    write_kohya(path, _as_file(unet, name, path, metadata or {}))


def load_adapter(unet: UNet2DConditionModel, name: str, path: Path) -> dict[str, str]:
    """Load a LoRA file, in any form that `lora_files.read_lora` reads, as the adapter `name`; return its metadata.

    Raises InputError, in one line, for a file that is damaged, holds another kind of adapter or is made for another
    architecture, and for a name that is taken; the UNet is then as it was.
    """
    _check_free(unet, name)
    file = _fitted(unet, read_lora(path))
    _load(unet, name, file)
    return file.metadata


def _load(unet: UNet2DConditionModel, name: str, file: LoraFile) -> None:
    with torch.random.fork_rng(devices=[]), _quiet():  # PEFT draws first weights, which are then overwritten
        unet.load_lora_adapter(file.state(), prefix=None, adapter_name=name, metadata=file.config())
    loaded = {key: value for key, value in unet.named_parameters() if "lora_" in key and f".{name}." in key}
    if not_finite(loaded):
        unet.delete_adapters(name)
        raise InputError(f"{file.path}: holds numbers that {unet.dtype} cannot; another dtype would do")


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block diffusers does not count the weights of other adapters as missing from the file."""
    logger = logging.getLogger("diffusers.utils.peft_utils")
    found, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = found


def _as_file(unet: UNet2DConditionModel, name: str, path: Path, metadata: Mapping[str, str] | None = None) -> LoraFile:
    """An adapter's layers, with the alpha that PEFT really applies to each."""
    _check_carried(unet, name)
    layers = {}
    for layer_name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A:
            a, b = layer.lora_A[name].weight.detach().cpu(), layer.lora_B[name].weight.detach().cpu()
            layers[layer_name] = Layer(a, b, layer.scaling[name] * layer.r[name])
    return LoraFile(path, layers, dict(metadata or {}))


def _jsonable(value):
    return sorted(value) if isinstance(value, set) else value


def _fitted(unet: UNet2DConditionModel, file: LoraFile) -> LoraFile:
    """The file with the UNet's names for its layers. Raises InputError where a layer or its shape is not the UNet's."""
    modules = {key.removesuffix(".weight"): value.shape for key, value in base_weights(unet).items()}
    flat = {name.replace(".", "_"): name for name in modules}
    layers = {}
    for found, layer in file.layers.items():
        name = found if found in modules else flat.get(found)
        shape = modules.get(name, ())
        if (layer.a.shape[1:], layer.b.shape[:1]) != (shape[1:], shape[:1]) or layer.b.shape[2:].numel() != 1:
            raise InputError(f"{file.path}: made for another architecture: {_misfit(found, layer, shape)}")
        if name in layers:
            raise InputError(f"{file.path}: {name} is there twice, in two forms")
        layers[name] = layer
    return replace(file, layers=layers)


def _misfit(name: str, layer: Layer, shape: Sequence[int]) -> str:
    """Why a layer does not fit, and which Stable Diffusion it is for where that shows."""
    if not shape:
        return f"unet.{name}: this UNet has no such layer that could carry a LoRA"
    width, kinds = (
        layer.a.shape[1],
        {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"},
    )
    if name.replace("_", ".").endswith(("attn2.to.k", "attn2.to.v")) and width in kinds:
        return f"{kinds[width]}, whose prompts have {width} features; here they have {shape[1]} (unet.{name}.lora_A)"
    sizes = f"lora_A {tuple(layer.a.shape)} and lora_B {tuple(layer.b.shape)}"
    return f"unet.{name}: {sizes} do not fit a weight of {tuple(shape)}"
