"""Roles on one W0: named LoRA adapters on a single frozen UNet, and the LoRA files that stock diffusers reads.

The teacher is the UNet with every adapter off; a student, a fine-tune or an LCM is the same UNet with one adapter on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lora_distill.errors import InputError
from lora_distill.storage import DamagedFileError, digest, whole_file

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
    """
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[targets], init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=name)
    unet.set_adapter(name)
    parameters = adapter_parameters(unet, name)
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    return parameters


def adapter_parameters(unet: UNet2DConditionModel, name: str) -> list[torch.nn.Parameter]:
    """All A and B of one adapter, as a list of parameters."""
    return [p for key, p in unet.named_parameters() if "lora_" in key and f".{name}." in key]


def adapter_names(unet: UNet2DConditionModel) -> list[str]:
    """The names of the adapters on a UNet, sorted."""
    return sorted(getattr(unet, "peft_config", {}))


def parameter_counts(unet: UNet2DConditionModel) -> tuple[int, int]:
    """(number of parameters of W0, number of parameters of all adapters)."""
    lora = sum(p.numel() for key, p in unet.named_parameters() if "lora_" in key)
    return sum(p.numel() for p in unet.parameters()) - lora, lora


@contextmanager
def role(unet: UNet2DConditionModel, adapter: str | None) -> Iterator[UNet2DConditionModel]:
    """Inside the block the UNet runs with one adapter, given by name, or with None: W0 alone, the teacher.

    On exit, also by an exception, every layer has its earlier state: active adapters, on or off. requires_grad is not
    touched; PEFT's own switches change it as a side effect. Leave the teacher's role before backward: gradient
    checkpointing recomputes the forward pass with the role that is on at that moment.

    Raises ValueError for an adapter that the UNet does not have.
    """
    if adapter is not None:
        _check_carried(unet, adapter)
    layers = lora_layers(unet)
    found = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter:
                layer._active_adapter = [adapter]
        yield unet
    finally:
        for layer, (disabled, active) in zip(layers, found, strict=True):
            layer._disable_adapters, layer._active_adapter = disabled, active


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


def save_adapter(unet: UNet2DConditionModel, name: str, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one adapter as a LoRA file for `StableDiffusionPipeline.load_lora_weights`.

    The keys are PEFT's and the metadata holds the adapter's config, so that alpha != rank and adapters on all layers
    are kept. `metadata` is added.
    """
    state = get_peft_model_state_dict(unet, adapter_name=name)
    tensors = {f"unet.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    config = {key: _jsonable(value) for key, value in unet.peft_config[name].to_dict().items()}
    packed = json.dumps({f"unet.{key}": value for key, value in config.items()}, sort_keys=True)
    fields = {"format": "pt", LORA_ADAPTER_METADATA_KEY: packed, "digest": digest(tensors)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {**fields, **(metadata or {})})


def _jsonable(value):
    return sorted(value) if isinstance(value, set) else value


def export_kohya(unet: UNet2DConditionModel, name: str, path: Path) -> None:
    """Write one adapter in the format of kohya-ss, which ComfyUI, AUTOMATIC1111 and diffusers read."""
    state = get_peft_model_state_dict(unet, adapter_name=name)
    tensors = convert_state_dict_to_kohya({f"unet.{key}": value.detach().cpu() for key, value in state.items()})
    alpha = torch.tensor(float(unet.peft_config[name].lora_alpha))  # the conversion writes the rank as alpha
    tensors = {key: alpha.clone() if key.endswith(".alpha") else value for key, value in tensors.items()}
    with whole_file(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, {"format": "pt"})


def load_adapter(unet: UNet2DConditionModel, name: str, path: Path) -> dict[str, str]:
    """Load a LoRA file as the adapter `name` and return the file's metadata.

    Raises `DamagedFileError` for a file that is missing, unreadable or does not match its digest (files of
    `save_adapter` have one, others need none); ValueError for a file made for another architecture.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedFileError(f"{path}: not a readable LoRA file ({error})") from None
    if metadata.get("digest") not in {None, digest(state)}:
        raise DamagedFileError(f"{path}: contents do not match their digest")
    if bad := [key for key, value in state.items() if not value.isfinite().all()]:
        raise DamagedFileError(f"{path}: {len(bad)} of {len(state)} tensors are not finite, the first is {bad[0]}")
    _check_architecture(unet, state, path)
    config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY]) if LORA_ADAPTER_METADATA_KEY in metadata else None
    unet.load_lora_adapter(state, prefix="unet", adapter_name=name, metadata=config)
    return metadata


def _check_architecture(unet: UNet2DConditionModel, state: dict[str, torch.Tensor], path: Path) -> None:
    modules = dict(unet.named_modules())
    for key, value in state.items():
        module_name, _, part = key.removeprefix("unet.").partition(".lora_")
        module = modules.get(module_name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        axis = {"A.weight": 1, "B.weight": 0}.get(part)
        if axis is None or weight is None or value.shape[axis] != weight.shape[axis]:
            raise InputError(
                f"{path}: made for another architecture: {key} {tuple(value.shape)} does not fit this UNet"
            )
