"""What decides a pipeline's pictures, as a digest: weights, configurations and tokenizer."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_distill.storage import cache_key, digest


def fingerprint(pipe: StableDiffusionPipeline, adapter: str | None = None) -> str:
    """A digest of everything that decides what a pipeline makes: weights of W0, configurations and tokenizer.

    With an `adapter` that is on, or of a UNet that always runs with one (`adapters.UNetInRole`), that one too.
    """
    modules = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    configs = [pipe.scheduler.config, *(module.config for module in modules.values())]
    adapter = adapter or getattr(pipe.unet, "adapter", None)
    return cache_key(
        weights={name: weights_digest(module) for name, module in modules.items()},
        adapter=adapter and _adapter(getattr(pipe.unet, "unet", pipe.unet), adapter),
        configs=[_plain(config) for config in configs],
        tokenizer=tokenizer_digest(pipe.tokenizer),
    )


def _adapter(unet: UNet2DConditionModel, name: str) -> list[Any]:
    """What an adapter does to W0: its matrices, their scale and the weight that it has at this moment."""
    config = unet.peft_config[name]
    matrices = {key: value for key, value in unet.state_dict().items() if "lora_" in key and f".{name}." in key}
    scales = [
        (key, float(layer.scaling[name]))
        for key, layer in unet.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in layer.scaling
    ]
    return [digest(matrices), config.r, scales]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that turns text into tokens: vocabulary, merges, added tokens, normalisation, length."""
    rules = tokenizer.backend_tokenizer.to_str()
    rules = rules[rules.index('"added_tokens"') :]  # before them stand truncation and padding of the last call
    return cache_key(rules=rules, length=tokenizer.model_max_length, pad=tokenizer.pad_token_id)


_digests: WeakKeyDictionary = WeakKeyDictionary()  # module: what its weights were, their digest


def weights_digest(module: nn.Module) -> str:
    """A digest of a module's weights without adapters, by the names that they have without.

    Frozen weights are read once, and again when they were changed: PyTorch counts changes in place, except those
    through `.data`. Weights in training are read each time.
    """
    weights = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if "lora_" not in name
    }
    if any(tensor.requires_grad or tensor.is_inference() for tensor in weights.values()):
        return digest(weights)  # a moving average is put in place through .data
    merged = [
        (name, *layer.merged_adapters)  # PEFT adds them through .data
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer) and layer.merged_adapters
    ]
    tensors = [(StorageWeakRef(t.untyped_storage()), t.storage_offset(), t._version) for t in weights.values()]
    state = tensors, merged, list(weights)
    if _digests.get(module, (None, None))[0] != state:
        _digests[module] = state, digest(weights)
    return _digests[module][1]


def _plain(config: Mapping[str, Any] | PretrainedConfig) -> list[tuple[str, str]]:
    """The entries of a configuration that describe the model, not its origin or the version that loaded it."""
    values = config.to_dict() if isinstance(config, PretrainedConfig) else config
    passing = {"transformers_version", "dtype"}  # the dtype is in the digest of the weights
    return sorted((name, str(value)) for name, value in values.items() if name[0] != "_" and name not in passing)
