"""Whether a pipeline is whole and one that we can read: its folder before it is loaded, its parts afterwards.

diffusers and transformers fill what a folder lacks with random numbers or an empty vocabulary and go on; here it is
refused, in one line that names the file.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from lora_distill.diffusion import PREDICTION_TYPES
from lora_distill.errors import InputError, MissingError, reading
from lora_distill.finite import check_finite
from lora_distill.shapes import BUNDLED
from lora_distill.storage import DamagedFileError

PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
WEIGHTS = ("text_encoder", "vae", "unet")  # the parts with weights
CONFIGS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}  # of the others config.json
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
# Pipelines of the same parts, told apart by how they are sampled.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "LatentConsistencyModelPipeline")
STEMS = {"text_encoder": "model"}  # names of weights by transformers; others are by diffusers
DIGESTS = BUNDLED.with_name("pipeline.sha256")  # of the bundled pipeline, as sha256sum writes them
LARGEST_SIDE = 1024  # of latents
SPARE = re.compile(r"position_ids|text_projection|logit_scale")  # tensors of a text encoder that are not needed
SPECIAL = re.compile(r"<.*>|\[.*\]")  # tokens that are made of no others
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of a VAE's attention


# ---------------------------------------------------------------------------------------------- before loading


def check_folder(folder: Path) -> None:
    """Raise InputError, in one line, for a folder with a file missing, cut, or that is no part of our pipelines."""
    if missing := [part for part in ("model_index.json", *PARTS) if not (folder / part).exists()]:
        raise MissingError(f"{folder}: not a whole Stable Diffusion pipeline, {', '.join(missing)} missing")
    kind = json_table(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise InputError(f"{folder / 'model_index.json'}: _class_name: expected {PIPELINES[0]}, got {kind!r}")
    for part in PARTS:
        config = json_table(folder / part / CONFIGS.get(part, "config.json"))
        if part in ("unet", "vae") and config.get("_class_name", KINDS[part].__name__) != KINDS[part].__name__:
            raise InputError(f"{folder / part}: expected a {KINDS[part].__name__}, got {config['_class_name']!r}")
    _check_tokenizer(folder / "tokenizer")
    for part in WEIGHTS:
        _check_weights(folder / part)


def json_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Raises InputError, in one line that names the file, for anything else."""
    with reading(path, "a table in JSON"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a table in JSON, got {type(found).__name__}")
    return found


def _check_tokenizer(folder: Path) -> None:
    """Raise InputError where vocabulary or merges are missing or cut: transformers would go on with what there is."""
    if (folder / "tokenizer.json").exists():
        place, model = folder / "tokenizer.json", json_table(folder / "tokenizer.json").get("model")
        vocabulary, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    elif not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise MissingError(f"{folder}: tokenizer.json is missing, and so are vocab.json and merges.txt in its place")
    else:
        place, vocabulary = folder / "vocab.json", json_table(folder / "vocab.json")
        with reading(folder / "merges.txt", "a text of merges in UTF-8"):
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise InputError(f"{place}: expected a vocabulary, found none")
    made = [token for token in vocabulary if len(token.removesuffix("</w>")) > 1 and not SPECIAL.fullmatch(token)]
    if len(merges or ()) < len(made):
        raise InputError(f"{place}: {len(made)} tokens of several letters and {len(merges or ())} merges: cut short")


def weight_files(part: Path) -> set[Path]:
    """The safetensors files of one part."""
    return {path for path in part.glob("*.safetensors") if not path.name.startswith(".")}


def loaded_files(part: Path, variant: str | None) -> set[Path]:
    """Those of a part's files that are loaded: of the variant where the part has it; others may lie beside them.

    Where a file and an index of shards are both there, diffusers takes the shards and transformers the file.
    """
    stem = STEMS.get(part.name, "diffusion_pytorch_model")
    for kind in dict.fromkeys((variant, None)):
        whole = part / f"{stem}.{kind}.safetensors" if kind else part / f"{stem}.safetensors"
        index = part / (f"{stem}.safetensors.index.{kind}.json" if kind else f"{stem}.safetensors.index.json")
        found = {whole} if whole.is_file() else set()
        if index.is_file() and not (found and part.name in STEMS):
            found = _shards(index)
        if found:
            return found
    return set()


def _shards(index: Path) -> set[Path]:
    shards = json_table(index).get("weight_map")
    if not isinstance(shards, dict) or not all(_is_name(shard) for shard in shards.values()):
        raise InputError(f"{index}: weight_map: expected names of tensors with the names of their files")
    return {index.parent / shard for shard in shards.values()}


def _check_weights(part: Path) -> None:
    files = weight_files(part)
    for index in (*part.glob("*.safetensors.index.json"), *part.glob("*.safetensors.index.*.json")):
        files |= _shards(index)
    if not files and any(part.glob("*.bin")):
        raise MissingError(f"{part}: pickled weights (.bin) alone, which are not loaded; a .safetensors file is needed")
    if not files:
        raise MissingError(f"{part}: no weights, a .safetensors file is missing")
    for file in sorted(files):
        _check_tensors(file)


def _is_name(shard: Any) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard


def _check_tensors(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise MissingError(f"{file}: a link to a file that is not there, {file.readlink()}; download it again")
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: expected a file of weights, there is something else")
    try:
        with safe_open(file, framework="pt"):
            pass
    except FileNotFoundError:
        raise MissingError(f"{file}: missing, though the index beside it names it") from None
    except SafetensorError as error:
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise DamagedFileError(f"{file}: a pointer of Git LFS, not the weights: git lfs pull") from None
        raise DamagedFileError(f"{file}: not a whole safetensors file ({error})") from None
    except OSError as error:
        raise DamagedFileError(f"{file}: cannot be read ({error.strerror or error})") from None


def check_kind(place: Path | str, unet: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Raise InputError for a pipeline that is not text-to-image on latents, by the configs of three parts."""
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent:
        raise InputError(
            f"{place}: its UNet takes {channels} channels and latents have {latent}: a pipeline for inpainting or "
            "another edit; a text-to-image pipeline is needed"
        )
    if (made := unet.get("out_channels", 4)) != latent:
        raise InputError(f"{place}: its UNet makes {made} channels and latents have {latent}")
    if unet.get("addition_embed_type"):
        raise InputError(f"{place}: its UNet takes more than a prompt, as Stable Diffusion XL's does; 1 and 2 are read")
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(key):
            raise InputError(f"{place}: its UNet takes more than a prompt ({key}); Stable Diffusion 1 and 2 are read")
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        known = " or ".join(PREDICTION_TYPES)
        raise InputError(f"{place}: prediction_type: expected {known} in the scheduler's config, got {kind!r}")
    _check_betas(scheduler, _join(place, "scheduler"))


def _check_betas(config: dict[str, Any], place: str) -> None:
    """Raise InputError for numbers of which no scheduler can be made; what a config lacks has its default."""
    _check_count(config.get("num_train_timesteps", 1000), 10**5, f"{place}: num_train_timesteps")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if config.get("trained_betas") is None and not (
        _is_number(start) and _is_number(end) and 0 < start < 1 and start <= end < 1
    ):
        raise InputError(f"{place}: expected 0 < beta_start <= beta_end < 1, got {start!r} and {end!r}")


def check_bundle() -> None:
    """Raise `DamagedFileError` where a file of the bundled pipeline is not the one that this package came with."""
    for line in DIGESTS.read_text(encoding="utf-8").splitlines():
        expected, name = line.split("  ", 1)
        path = BUNDLED / name
        if not path.is_file():
            raise MissingError(f"{path}: missing from the bundled pipeline; install the package again, or git checkout")
        if _sha256(path) != expected:
            raise DamagedFileError(f"{path}: altered since it was released; install the package again, or git checkout")


def bundle_digests() -> str:
    """The text of `DIGESTS` for the bundled pipeline as it is: of all files that decide its pictures."""
    files = [BUNDLED / "model_index.json", *(path for path in BUNDLED.glob("*/*") if path.is_file())]
    names = sorted(path.relative_to(BUNDLED).as_posix() for path in files)
    return "".join(f"{_sha256(BUNDLED / name)}  {name}\n" for name in names)


def _sha256(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":  # git may give it the line ends of Windows
        content = content.replace(b"\r\n", b"\n")
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------------------------------------- after loading


def check_loaded(pipe: StableDiffusionPipeline, place: Path | str) -> None:
    """Raise InputError, in one line, for parts that are of another kind, do not fit together or hold no numbers."""
    for part, kind in KINDS.items():
        if not isinstance(getattr(pipe, part), kind):
            raise InputError(f"{place}: {part}: expected a {kind.__name__}, got {type(getattr(pipe, part)).__name__}")
        unfilled = [name for name, value in getattr(pipe, part).state_dict().items() if value.is_meta]
        if unfilled:
            named = f"{len(unfilled)} tensors are missing from the weights, {min(unfilled)}"
            raise DamagedFileError(f"{_join(place, part)}: {named}; files that lie beside are not loaded")
        hint = "another download may be whole"
        check_finite(getattr(pipe, part).state_dict(), _join(place, part), hint, error=DamagedFileError)
    text, unet, vae = pipe.text_encoder.config, pipe.unet.config, pipe.vae.config
    if (dim := unet.cross_attention_dim) != text.hidden_size:
        raise InputError(f"{place}: the UNet takes prompts of {dim} features and they have {text.hidden_size}")
    scale = vae.scaling_factor
    if not _is_number(scale) or not 1e-3 < scale < 1e3:
        raise InputError(f"{_join(place, 'vae')}: scaling_factor: expected 0.001 to 1000, about 0.18, got {scale!r}")
    _check_count(unet.sample_size, LARGEST_SIDE, f"{_join(place, 'unet')}: sample_size")
    _check_vocabulary(pipe.tokenizer, text, _join(place, "tokenizer"))
    _check_schedule(pipe.scheduler, _join(place, "scheduler"))


def _join(place: Path | str, part: str) -> str:
    return str(place / part) if isinstance(place, Path) else f"{place}: {part}"


def _check_count(value: Any, most: int, key: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InputError(f"{key}: expected a whole number from 1 to {most}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, text: CLIPTextConfig, place: str) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{place}: expected CLIP's tokenizer, got {type(tokenizer).__name__}")
    length, most = tokenizer.model_max_length, text.max_position_embeddings
    if not isinstance(length, int) or not 2 < length <= most:
        raise InputError(f"{place}: model_max_length: expected 3 to {most}, as the text encoder takes, got {length!r}")
    last = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= last < text.vocab_size:
        raise InputError(
            f"{place}: {last + 1} tokens where the text encoder has {text.vocab_size}: of another pipeline"
        )
    if (tokenizer.padding_side, tokenizer.truncation_side) != ("right", "right"):
        raise InputError(f"{place}: padding_side and truncation_side: expected right, as CLIP's")
    if tokenizer.pad_token_id is None:
        raise InputError(f"{place}: no pad_token, which fills prompts up")


def _check_schedule(scheduler: Any, place: str) -> None:
    """Raise InputError for a noise schedule that is none: alpha_bar_t falls from almost 1 to almost 0."""
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None:
        raise InputError(f"{place}: {type(scheduler).__name__} has no alphas_cumprod, as Stable Diffusion 1 and 2 have")
    takes = list(signature(scheduler.step).parameters.values())[3:]  # after output, timestep and sample
    if more := [one.name for one in takes if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]:
        raise InputError(f"{place}: {type(scheduler).__name__} needs more than the UNet's output: {', '.join(more)}")
    falling = torch.as_tensor(alphas_cumprod).double()
    if not bool(falling.isfinite().all() and (falling.diff() <= 0).all() and falling[0] < 1 and falling[-1] >= 0):
        raise InputError(f"{place}: no noise schedule: alphas_cumprod does not fall from 1 towards 0")
    count, tried = scheduler.config.num_train_timesteps, deepcopy(scheduler)
    if len(falling) != count:
        raise InputError(f"{place}: num_train_timesteps: {count}, and trained_betas has {len(falling)}")
    with reading(place, "a scheduler that gives timesteps"):
        tried.set_timesteps(min(2, count))
    if not 0 <= min(tried.timesteps) <= max(tried.timesteps) < count:
        raise InputError(f"{place}: its timesteps leave the schedule, up to {max(tried.timesteps):g} of {count}")


def blame(folder: Path) -> None:
    """Raise InputError for the part whose config, or weights beside it, are why a folder cannot be loaded."""
    for part, kind in KINDS.items():
        path = folder / part / "config.json"
        with reading(path, f"a config of {kind.__name__}"), torch.device("meta"):
            config = json_table(path)
            model = kind(CLIPTextConfig(**config)) if part == "text_encoder" else kind.from_config(config)
        needed = {name.removeprefix("text_model."): value.shape for name, value in model.state_dict().items()}
        for file in sorted(weight_files(folder / part)):
            for name, value in load_file(file).items():
                shape = needed.get(name.removeprefix("text_model."), value.shape)
                if shape != value.shape:
                    sizes = f"{name} is {tuple(value.shape)}, by config.json {tuple(shape)}"
                    raise InputError(f"{file}: weights do not fit the config of their part: {sizes}")


def check_names(pipe: StableDiffusionPipeline, folder: Path, variant: str | None) -> None:
    """Raise InputError where files lack tensors that a part has, which would be random, or hold others."""
    for part in WEIGHTS:
        files = loaded_files(folder / part, variant)
        dtypes = {name: kind for file in files for name, kind in _dtypes(file).items()}
        if odd := [
            name for name, kind in dtypes.items() if not kind.startswith(("F", "BF")) and not SPARE.search(name)
        ]:
            raise InputError(f"{folder / part}: {odd[0]}: expected floating-point numbers, got {dtypes[odd[0]]}")
        there = _names(dtypes)
        needed = _names(getattr(pipe, part).state_dict())
        if lost := needed - there:
            named = f"{len(lost)} of {len(needed)} tensors are missing from the weights, {min(lost)}"
            raise InputError(f"{folder / part}: {named}")
        if more := there - needed:
            named = f"{len(more)} tensors that its config does not know, {min(more)}"
            raise InputError(f"{folder / part}: weights and config are of two models: {named}")


def _dtypes(file: Path) -> dict[str, str]:
    """The dtypes of a file's tensors as safetensors writes them: F32, F16, BF16, F8_E4M3, I64, BOOL."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a dict)


def _names(names: Iterable[str]) -> set[str]:
    """Names of tensors in one way of writing, without those that are not needed."""
    plain = (name.removeprefix("text_model.") for name in names if not SPARE.search(name))
    return {".".join(OLD_NAMES.get(word, word) for word in name.split(".")) for name in plain}
