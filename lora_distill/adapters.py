"""Roles on one W0: named LoRA adapters on a single frozen UNet, and the LoRA files that stock diffusers reads.

The teacher is the UNet with every adapter off; a student, a fine-tune or an LCM is the same UNet with one adapter on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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

    On exit, also by an exception, every layer has its earlier state: active adapters, on or off, requires_grad. PEFT's
    own switches change requires_grad as a side effect; this one does not. Leave the teacher's role before backward:
    gradient checkpointing recomputes the forward pass with the role that is on at that moment.

    Raises ValueError for an adapter that the UNet does not have.
    """
    if adapter is not None:
        _check_carried(unet, adapter)
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    found = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    trained = [(p, p.requires_grad) for p in unet.parameters()]
    try:
        for layer in layers:
            _switch(layer, adapter is None, [adapter] if adapter else layer.active_adapters)
        _restore_requires_grad(trained)
        yield unet
    finally:
        for layer, disabled, active in found:
            _switch(layer, disabled, active)
        _restore_requires_grad(trained)


def _check_carried(unet: UNet2DConditionModel, adapter: str) -> None:
    if adapter not in adapter_names(unet):
        raise ValueError(f"no adapter {adapter!r} on this UNet; it carries {adapter_names(unet) or 'none'}")


def _switch(layer: BaseTunerLayer, disabled: bool, active: list[str]) -> None:
    layer.set_adapter(active)
    layer.enable_adapters(not disabled)


def _restore_requires_grad(trained: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, flag in trained:
        parameter.requires_grad_(flag)


# ---------------------------------------------------------------------------------------------- copies


def plain_copy(unet: UNet2DConditionModel, time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """A second UNet with the weights of W0 and no adapters: the student of conventional distillation.

    With `time_cond_proj_dim` it also takes an embedded guidance scale, as a full LCM does (Luo et al. 2023). The new
    projection is zero, so that the untrained student equals the teacher.
    """
    state = {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if "lora_" not in key}
    config = {**unet.config, "time_cond_proj_dim": time_cond_proj_dim}
    copy = UNet2DConditionModel.from_config(config).to(unet.device, unet.dtype)
    if time_cond_proj_dim:
        state["time_embedding.cond_proj.weight"] = torch.zeros_like(copy.time_embedding.cond_proj.weight)
    copy.load_state_dict(state)
    return copy


@torch.no_grad()
def merged_copy(unet: UNet2DConditionModel, adapter: str) -> UNet2DConditionModel:
    """A second UNet without PEFT layers and with weights W0 + (alpha / rank) B A, for deployment.

    Raises ValueError for an adapter that the UNet does not carry.
    """
    _check_carried(unet, adapter)
    copy = plain_copy(unet).requires_grad_(False)
    weights = dict(copy.named_parameters())
    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:
            weights[f"{name}.weight"].add_(layer.get_delta_weight(adapter).to(copy.dtype))
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
            raise ValueError(
                f"{path}: made for another architecture: {key} {tuple(value.shape)} does not fit this UNet"
            )
