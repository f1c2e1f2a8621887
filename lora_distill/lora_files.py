"""LoRA files: every form of plain LoRA on a UNet that stock diffusers reads, and the two forms that are written.

A file is read into layers without a UNet, so that nothing is allocated before ranks are held against the shapes.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from lora_distill.errors import InputError, MissingError, reading
from lora_distill.finite import check_finite
from lora_distill.storage import DamagedFileError, seal, write_safetensors
from lora_distill.writing import whole_file

SEAL = "seal"  # the field with the digest of tensors and all other fields
MADE_BY = "made_by"  # the field by which headers of this package are known
KOHYA = "lora_unet_"  # before the names of layers in files of kohya-ss, where underscores stand for dots
PREFIXES = ("base_model.model.", "unet.", "module.")  # of PEFT, diffusers and DistributedDataParallel
PICKLES = {".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth"}
PART = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<ab>[AB])(?:\.\w+)?\.weight|lora_(?P<way>down|up)\.weight|(?P<alpha>alpha))"
)
# What a key says that our layers, W0 + (alpha / rank) B A on a UNet, cannot hold.
OTHER_KINDS = {
    r"lora_te2_|text_encoder_2\.|add_embedding|label_emb": "made for Stable Diffusion XL; 1 and 2 are read",
    r"double_blocks|single_blocks|joint_blocks|single_transformer|^transformer\.|lora_transformer_"
    r"|diffusion_model\.(layers|blocks)": "made for a transformer, as Stable Diffusion 3 and Flux are; UNets are read",
    r"lora_controlnet": "a Control-LoRA, half of a ControlNet; plain LoRA is read",
    r"dora_scale|lora_magnitude_vector": "DoRA, which scales the columns of W0 too; plain LoRA is read",
    r"\.hada_": "LoHa, whose update is no product of two matrices; plain LoRA is read",
    r"\.lokr_": "LoKr, whose update is no product of two matrices; plain LoRA is read",
    r"\.lora_mid\.": "LoCon with a third matrix (Tucker); plain LoRA is read",
    r"\.oft_|\.boft_|oft_blocks|oft_diag": "OFT, which rotates W0; plain LoRA is read",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA; plain LoRA is read",
    r"\.ia3_|\.on_input$": "IA3, which scales layers; plain LoRA is read",
    r"\.diff(_b)?$": "whole differences of weights; plain LoRA is read",
    r"lora_(up|down|A|B)(\.\w+)?\.bias$|\.bias_(indices|values)$": "LoRA with biases; plain LoRA is read",
    r"lora_embedding_[AB]": "LoRA of embeddings, which a UNet does not have",
    r"input_blocks|output_blocks|middle_block": "in the names of the original Stable Diffusion code; "
    "those of diffusers, PEFT and kohya-ss are read",
    r"^lora_te1?_|^lora_prior_te_|(^|\.)text_encoder\.|(^|\.)text_model\.": "made for the text encoder too "
    "({count} of {total} tensors), and adapters here are on the UNet alone; diffusers' load_lora_weights takes both",
}
# Fields of PEFT's config that change what a file means, with the values under which they change nothing.
OFF = (None, False, [], {})
NEUTRAL = {"peft_type": (None, "LORA"), "bias": (None, "none"), "use_dora": OFF, "lora_bias": OFF, "use_qalora": OFF}
NEUTRAL |= dict.fromkeys(
    (
        *("modules_to_save", "layer_replication", "alora_invocation_tokens", "target_parameters", "use_bdlora"),
        *("trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    ),
    OFF,
)
CHANGES_W0 = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of `init_lora_weights`: A and B are not on W0 itself


@dataclass(frozen=True)
class Layer:
    """One layer's update (alpha / rank) B A; with rank-stabilised LoRA it is alpha / sqrt(rank)."""

    a: Tensor  # (rank, in) or (rank, in, kernel, kernel)
    b: Tensor  # (out, rank) or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """What a LoRA file holds. In files of kohya-ss the names of `layers` have underscores in place of dots."""

    path: Path
    layers: dict[str, Layer]
    metadata: dict[str, str]
    rank_stabilised: bool = False

    def config(self) -> dict[str, Any]:
        """PEFT's config of exactly these layers: their ranks and alphas, and nothing else that the file may say."""
        rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*self._scales().values(), strict=True))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(self.layers),
            "rank_pattern": {f"^{re.escape(name)}": r for name, (r, _) in self._scales().items() if r != rank},
            "alpha_pattern": {f"^{re.escape(name)}": a for name, (_, a) in self._scales().items() if a != alpha},
            "use_rslora": self.rank_stabilised,
        }

    def state(self) -> dict[str, Tensor]:
        """The tensors by PEFT's names."""
        parts = ("lora_A", "a"), ("lora_B", "b")
        return {f"{name}.{ab}.weight": getattr(x, part) for name, x in self.layers.items() for ab, part in parts}

    def _scales(self) -> dict[str, tuple[int, float]]:
        return {name: (layer.rank, layer.alpha) for name, layer in self.layers.items()}


# ---------------------------------------------------------------------------------------------- reading


def read_lora(path: Path) -> LoraFile:
    """The layers and metadata of a LoRA file, or of the only one in a folder: PEFT's, diffusers' or kohya's form.

    Raises `MissingError` where there is none; `DamagedFileError` for a file that is cut, altered or not finite;
    InputError for another kind of adapter, with the kind, and for ranks and alphas that do not fit the tensors.
    """
    path = lora_path(path)
    tensors, metadata = _contents(path)
    _check_kind(path, tensors)
    tensors = {name: _as_floats(f"{path}: {name}", value) for name, value in tensors.items()}
    check_finite(tensors, str(path), error=DamagedFileError)
    config = _config(path, tensors, metadata)
    layers = {name: _layer(path, name, parts, config) for name, parts in _by_layer(path, tensors).items()}
    return LoraFile(path, layers, metadata, rank_stabilised=bool(config and config.get("use_rslora")))


def _as_floats(place: str, value: Tensor) -> Tensor:
    """A tensor in 16 or 32 bits; an alpha may be a whole number, as tools that extract and merge write a rank."""
    whole = value.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) and place.endswith(".alpha")
    if not value.is_floating_point() and not whole:
        raise InputError(f"{place}: expected floating-point numbers, got {value.dtype}")
    return value if value.is_floating_point() and value.element_size() in (2, 4) else value.float()


def lora_path(path: Path) -> Path:
    """The file itself, or the only .safetensors file of a folder. Raises InputError in one line for what is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:5]) or "none"
            raise InputError(f"{path}: a folder; expected one .safetensors file in it, found {names}; name the file")
        return found[0]
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: a pickle could run code and is not loaded; a .safetensors file is needed")
    if not path.is_file():
        raise MissingError(f"{path}: no such LoRA file here; one on the hub is first downloaded, with `hf download`")
    return path


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file, which match its seal if it has one."""
    with reading(path, "a LoRA file"), path.open("rb") as file:
        start = file.read(200).lstrip()
    for kind, begins in {
        "a pointer of Git LFS, not the file it stands for: git lfs pull": b"version https://git-lfs",
        "a web page, not a file": b"<",
        "a zip file or a pickle, which could run code and is not loaded": b"PK\x03\x04",
    }.items():
        if start.startswith(begins):
            raise InputError(f"{path}: {kind}; a .safetensors file is needed")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except Exception as error:  # SafetensorError, and what torch says of its dtypes
        raise DamagedFileError(f"{path}: not a readable LoRA file ({' '.join(str(error).split())})") from None
    sealed = {name: value for name, value in metadata.items() if name != SEAL}
    if metadata.get(SEAL) not in {None, seal(tensors, sealed)}:
        raise DamagedFileError(f"{path}: contents do not match their digest: altered since it was written")
    return tensors, metadata


def _check_kind(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for what is no LoRA, and with its kind for an adapter that our layers cannot hold."""
    for pattern, kind in OTHER_KINDS.items():
        if found := [name for name in tensors if re.search(pattern, name)]:
            raise InputError(f"{path}: {kind.format(count=len(found), total=len(tensors))} ({found[0]})")
    if not any("lora" in name for name in tensors):
        held = f"{len(tensors)} tensors, the first is {min(tensors)}" if tensors else "no tensors"
        raise InputError(f"{path}: not a LoRA file, it holds {held}")


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors "A", "B" and perhaps "alpha" of each layer, by its name without prefixes."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        (name,) = convert_unet_state_dict_to_peft({key: None})
        match = PART.fullmatch(name)
        if not match:
            raise InputError(f"{path}: {key} is no part of a LoRA that is known here")
        part = match["ab"] or match["alpha"] or {"down": "A", "up": "B"}[match["way"]]
        parts = layers.setdefault(_without_prefix(match["layer"]), {})
        if part in parts:
            raise InputError(f"{path}: {key}: two adapters in one file, {part} of this layer is there twice")
        parts[part] = value
    return layers


def _without_prefix(name: str) -> str:
    for prefix in (*PREFIXES, *PREFIXES, KOHYA):
        name = name.removeprefix(prefix)
    return name


def _layer(path: Path, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Layer:
    """One layer with its alpha, whose rank is the one of its tensors."""
    if lacking := {"A", "B"} - parts.keys():
        raise InputError(f"{path}: {name}: matrix {' and '.join(sorted(lacking))} of this layer is missing")
    a, b = parts["A"], parts["B"]
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise InputError(f"{path}: {name}: A {tuple(a.shape)} and B {tuple(b.shape)} are no product of one rank")
    rank = a.shape[0]
    if config and "alpha" in parts:
        raise InputError(f"{path}: {name}: alpha is in the metadata and in a tensor; one of them would do")
    if config:
        return Layer(a, b, _configured(path, name, rank, config))
    alpha = parts["alpha"].float() if "alpha" in parts else torch.tensor(float(rank))
    if alpha.numel() != 1 or not alpha.isfinite() or alpha <= 0:
        raise InputError(f"{path}: {name}.alpha: expected a number above 0, got {alpha.tolist()}")
    return Layer(a, b, alpha.item())


def _configured(path: Path, name: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha of a layer as the config has it. Raises InputError when the config's rank is not that of the tensors."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = ranks.get(get_pattern_key(ranks, name), config["r"])
    if expected != rank:
        raise InputError(f"{path}: {name}: the config says rank {expected}, the tensors have {rank}")
    return alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])


# ---------------------------------------------------------------------------------------------- PEFT's config


def _config(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's config, from the metadata as diffusers writes it or from the file beside as PEFT does; None without."""
    beside = path.with_name("adapter_config.json")
    of_peft = any(name.startswith("base_model.model.") for name in tensors)
    if LORA_ADAPTER_METADATA_KEY in metadata:
        place, text = f"{path}: {LORA_ADAPTER_METADATA_KEY}", metadata[LORA_ADAPTER_METADATA_KEY]
    elif of_peft and beside.is_file():
        place = str(beside)
        with reading(beside, "PEFT's config in JSON"):
            text = beside.read_text(encoding="utf-8")
    else:
        if of_peft:
            warnings.warn(
                f"{path}: no adapter_config.json of PEFT beside it, alpha is taken for the rank", stacklevel=2
            )
        return None
    with reading(place, "PEFT's config in JSON"):
        config = json.loads(text)
    if not isinstance(config, dict):
        raise InputError(f"{place}: expected a table of PEFT's config, got {type(config).__name__}")
    of_unet = {key.removeprefix("unet."): value for key, value in config.items() if key.startswith("unet.")}
    config = of_unet or {key: value for key, value in config.items() if not key.startswith("text_encoder.")}
    _check_config(place, config)
    return config


def _check_config(place: str, config: Mapping[str, Any]) -> None:
    """Raise InputError for a value that we cannot follow; of unknown fields that are on, say so in a warning."""
    if not isinstance(config.get("r"), int) or isinstance(config["r"], bool) or config["r"] < 1:
        raise InputError(f"{place}: r: expected a whole number above 0, got {config.get('r')!r}")
    _check_alpha(f"{place}: lora_alpha", config.get("lora_alpha"))
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(_is_name(key) for key in pattern):
            raise InputError(f"{place}: {field}: expected names of layers with numbers")
        for key, value in pattern.items():
            _check_alpha(f"{place}: {field}: {key}", value)
    if not isinstance(config.get("use_rslora", False), bool | None):
        raise InputError(f"{place}: use_rslora: expected true or false, got {config['use_rslora']!r}")
    for field, neutral in NEUTRAL.items():
        if config.get(field) not in neutral:
            raise InputError(f"{place}: {field}: {config[field]!r} is not read; plain LoRA is")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_W0):
        raise InputError(f"{place}: init_lora_weights: {start} changes W0 itself; convert the file to plain LoRA")
    unknown = [field for field in config if field not in LoraConfig.__dataclass_fields__ and config[field]]
    if unknown:
        warnings.warn(f"{place}: fields of another version of PEFT are left out: {', '.join(unknown)}", stacklevel=2)


def _check_alpha(place: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf or value > 1e30:
        raise InputError(f"{place}: expected a number above 0, got {value!r}")


def _is_name(pattern: str) -> bool:
    """Whether PEFT's pattern is a name, perhaps with wildcards: anything more could take for ever to match."""
    return bool(re.fullmatch(r"\^?((\\?[.-]|\w|\.[*+]|\\d\+?|\\w\+?)){1,300}\$?", pattern)) and pattern.count("*") < 4


# ---------------------------------------------------------------------------------------------- writing


def write_lora(path: Path, layers: Mapping[str, Layer], config: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write layers in the form of diffusers and PEFT, the config in the metadata, with a seal over all of it."""
    tensors = LoraFile(path, dict(layers), {}).state()
    packed = json.dumps({f"unet.{key}": value for key, value in config.items()}, sort_keys=True)
    _write(
        path, {f"unet.{key}": value for key, value in tensors.items()}, {**metadata, LORA_ADAPTER_METADATA_KEY: packed}
    )


def write_kohya(path: Path, file: LoraFile) -> None:
    """Write layers in the form of kohya-ss, which ComfyUI, AUTOMATIC1111 and diffusers read, with its metadata.

    Where layers differ in alpha, the commonest is written for all and B takes up the rest: diffusers reads alphas that
    differ for convolutions and not for attention.
    """
    stretch = {name: layer.rank**0.5 if file.rank_stabilised else 1 for name, layer in file.layers.items()}
    alphas = {name: layer.alpha * stretch[name] for name, layer in file.layers.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    tensors = {}
    for name, layer in file.layers.items():
        key = KOHYA + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = layer.a
        tensors[f"{key}.lora_up.weight"] = (layer.b.float() * (alphas[name] / alpha)).to(layer.b.dtype)
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    _write(path, tensors, _kohya_metadata(file, alpha))


def _kohya_metadata(file: LoraFile, alpha: float) -> dict[str, str]:
    """What files of kohya-ss say of themselves (ss_*), and Stability AI's ModelSpec, as far as it is known."""
    ours = file.metadata
    ranks = {layer.rank for layer in file.layers.values()}
    found = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(alpha)),
        "ss_sd_model_name": ours.get("base"),
        "ss_steps": ours.get("trained_steps"),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": ours.get("method"),
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": ours.get("resolution") and f"{ours['resolution']}x{ours['resolution']}",
        "modelspec.prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(ours.get("prediction_type", "")),
        **_architecture(file),
    }
    kept = {name: value for name, value in ours.items() if name not in (SEAL, LORA_ADAPTER_METADATA_KEY, "format")}
    return kept | {name: value for name, value in found.items() if value}


def _architecture(file: LoraFile) -> dict[str, str]:
    """The base model by the features of its prompts: 768 is Stable Diffusion 1, 1024 is 2."""
    widths = {layer.a.shape[1] for name, layer in file.layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    version = {768: 1, 1024: 2}.get(next(iter(widths), 0))
    if version is None:
        return {}
    kind = {1: "stable-diffusion-v1/lora", 2: "stable-diffusion-v2-768-v/lora"}[version]
    return {"ss_base_model_version": f"sd_v{version}", "ss_v2": str(version == 2), "modelspec.architecture": kind}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    check_finite(tensors, str(path), "nothing is saved")
    metadata = {key: str(value) for key, value in metadata.items() if key != SEAL} | {"format": "pt"}
    with whole_file(path) as temporary:
        write_safetensors(temporary, tensors, {**metadata, SEAL: seal(tensors, metadata)})
