"""The settings of a run: flat, typed and frozen, read from params/<profile>.yaml or a notebook's parameters cell.

An unknown key and a value of the wrong type or out of range are refused in one line before anything runs.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from inspect import isroutine
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lora_distill.errors import InputError, MissingError

PACKAGE = Path(__file__).resolve().parent
NOT_PATHS = re.compile(r"bundled|sd15-shape|scenes(/\w+/\w+)?|")  # sources that are not on a disk
ENOUGH_PROMPTS = 20  # with fewer, what a run says about quality is no result


class SettingsError(InputError):
    """Invalid settings; the message is one line with the key, its place and what is expected."""


class Settings(BaseModel):
    """All settings of a run. The defaults are those of params/cpu.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    profile: str = Field("cpu", pattern=r"^\w[\w.-]*$", description="name of the run, and of its folder in runs/")
    seed: int = Field(0, ge=0, description="seed of training, data and the adapters' first weights")
    more_train_seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="seeds of further trainings of the students; each of eval_seeds judges the next training"
    )

    pipeline: str = Field(
        "bundled", min_length=1, description="bundled, a folder in the Stable Diffusion layout, or a hub id"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what frozen weights are stored in")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="autocast in training; no computes it all in dtype, A and B included, on float32 masters"
    )
    pretrain: Literal["short", "full"] = Field("short", description="how long notebook 00 trains the small pipeline")

    data: str = Field(
        "scenes", min_length=1, description="captioned images: scenes, a folder as one finds Flickr8k, or a hub id"
    )
    style: Literal["noto", "fluent"] = Field("noto", description="drawing style of the bundled scenes")
    teacher_images: int = Field(512, ge=1, description="images the teacher makes to distil on")

    guidance_scale: float = Field(3.0, ge=1, description="w of the teacher; 1 is no guidance")
    sampling_steps: int = Field(25, ge=1, description="steps of the multi-step samplers")
    scheduler: Literal["own", "ddim", "dpm++"] = Field(
        "own", description="of the multi-step samplers: own, the pipeline's; ddim, with trailing timesteps; dpm++"
    )

    train_steps: int = Field(150, ge=1, description="optimiser updates")
    batch_size: int = Field(32, ge=1, description="images a forward pass, over all processes together")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes an update")
    learning_rate: float = Field(2.0e-3, gt=0, description="learning rate of LoRA training")
    full_learning_rate: float = Field(2.0e-4, gt=0, description="learning rate of the conventional full copy")
    warmup_steps: int = Field(20, ge=0, description="updates of linear warm-up in every training, at most its steps")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average; 0 is off")
    log_every: int = Field(10, ge=1, description="updates between lines of the log")
    checkpoint_every: int = Field(100, ge=1, description="updates between checkpoints")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in backward: less memory, a third more time"
    )
    compile: bool = Field(False, description="torch.compile of the UNet's forward passes, for a GPU")
    full_copies: bool = Field(
        True, description="train a whole UNet too: the conventional copy, the full LCM and the LoRA that mimics it"
    )
    optimizer: Literal["adamw", "adamw-8bit"] = Field(
        "adamw", description="of the full copies; adamw-8bit needs a GPU and bitsandbytes"
    )

    lora_rank: int = Field(4, ge=1, description="rank of the adapters")
    lora_alpha: int = Field(4, ge=1, description="scale of the adapters, as alpha / rank")
    lora_targets: Literal["attention", "all"] = Field("attention", description="attention: q, k, v, out; all: more")

    flickr_8k: str = Field(
        "scenes/fluent/8k",
        min_length=1,
        description="images of notebook 03, the smaller set: scenes/<style>/<size>, a folder or a hub id",
    )
    flickr_30k: str = Field("scenes/fluent/30k", description="images of notebook 03, the larger set; empty: none")
    image_share: float = Field(
        0.1, gt=0, le=1, description="the part of each training split that is used, its first images"
    )
    resolution: int = Field(64, ge=8, description="side of the images in pixels")
    mirror: bool = Field(False, description="mirror images whose caption has no left or right")
    skip_unusable: bool = Field(False, description="leave out images that cannot be read, with a warning")
    lcm_steps: int = Field(40, ge=1, description="updates of each consistency training")
    lcm_batch_size: int = Field(16, ge=1, description="images a forward pass, in all trainings of notebook 03")
    lcm_learning_rate: float = Field(1.0e-4, gt=0, description="learning rate of the full LCM")
    lcm_lora_learning_rate: float = Field(1.0e-3, gt=0, description="learning rate of LCM-LoRA and of the mimic")
    finetune_steps: int = Field(200, ge=1, description="updates of the plain LoRA fine-tune")
    finetune_learning_rate: float = Field(3.0e-3, gt=0, description="learning rate of the plain LoRA fine-tune")
    lcm_ema_decay: float = Field(0.95, ge=0, lt=1, description="decay of the consistency target; 0: the student itself")
    lcm_rank: int = Field(16, ge=1, description="rank of LCM-LoRA and of the mimic; alpha is the same")
    lcm_targets: Literal["attention", "all"] = Field("all", description="layers of LCM-LoRA and of the mimic")
    w_min: float = Field(2.0, ge=1, description="least guidance scale of the full LCM")
    w_max: float = Field(5.0, ge=1, description="greatest guidance scale of the full LCM")
    ddim_skip: int = Field(20, ge=1, description="timesteps the DDIM solver skips; must divide the schedule's")
    huber_c: float = Field(1.0e-3, gt=0, description="where the pseudo-Huber loss turns from square to absolute")
    mse_weight: float = Field(1.0, ge=0, description="weight of the MSE when the LoRA mimics the LCM")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL when the LoRA mimics the LCM")

    eval_prompts: int = Field(60, ge=1, description="prompts of a verdict")
    curve_prompts: int = Field(60, ge=1, description="prompts a point of a curve, or of a measurement in training")
    eval_batch: int = Field(60, ge=1, description="images sampled, encoded or decoded at a time")
    clip: str = Field("", description="CLIP model that scores photographs, a folder or a hub id; scenes need none")
    extractors: dict[Literal["Inception", "DINOv2", "CLIP"], Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="more distances, on Inception, DINOv2 or CLIP: each with a file, folder or hub id of its weights",
    )
    eval_every: int = Field(50, ge=1, description="updates between measurements in training")
    eval_seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1, description="seeds of sampling")
    guidance_scales: list[Annotated[float, Field(ge=1)]] = Field(
        [1.0, 2.0, 3.0, 5.0, 7.5, 10.0], min_length=1, description="w of the curves of quality against guidance"
    )
    timing_batch: int = Field(8, ge=1, description="images a timed call")
    timing_repeats: int = Field(5, ge=1, description="timed calls, after those that warm up")

    @field_validator("pipeline", "data", "flickr_8k", "flickr_30k", "clip")
    @classmethod
    def _from_the_root(cls, source: str) -> str:
        return located(source)

    @field_validator("extractors")
    @classmethod
    def _all_from_the_root(cls, sources: dict[str, str]) -> dict[str, str]:
        return {name: located(source) for name, source in sources.items()}

    @field_validator("eval_seeds", "more_train_seeds")
    @classmethod
    def _distinct(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{info.field_name}: must differ from each other, got {seeds}")
        return seeds

    @property
    def is_result(self) -> bool:
        """Whether a run is large enough to say something about quality."""
        return self.eval_prompts >= ENOUGH_PROMPTS

    @model_validator(mode="after")
    def _other_trainings(self) -> "Settings":
        if self.seed in self.more_train_seeds:
            raise InputError(f"more_train_seeds: must not hold seed = {self.seed}, of the first training")
        if len(self.more_train_seeds) >= len(self.eval_seeds):
            trainings, seeds = 1 + len(self.more_train_seeds), len(self.eval_seeds)
            raise InputError(f"more_train_seeds: {trainings} trainings need as many eval_seeds, got {seeds}")
        return self

    @model_validator(mode="after")
    def _guidance_range(self) -> "Settings":
        if self.w_min > self.w_max:
            raise InputError(f"w_min: must be at most w_max = {self.w_max:g}, got {self.w_min:g}")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> "Settings":
        for key in ("train_steps", "lcm_steps", "finetune_steps"):
            if self.warmup_steps > (steps := getattr(self, key)):
                raise InputError(f"warmup_steps: must be at most {key} = {steps}, got {self.warmup_steps}")
        return self


def load_settings(profile_or_path: str | Path) -> Settings:
    """The settings of a profile, params/<profile>.yaml, or of a YAML file given by its path.

    Raises `SettingsError` when there is no such file or its content is invalid.
    """
    path = Path(profile_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        path = repository_root() / "params" / f"{profile_or_path}.yaml"
    if not path.parent.is_dir():
        raise SettingsError(
            f"no folder {path.parent}: profiles lie in a checkout of the repository; the path of a YAML file works too"
        )
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise SettingsError(f"no profile {path.stem!r} in {path.parent}; available: {names}")
    source = f"{path.parent.name}/{path.name}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: expected lines of 'key: value', got {_shown(values)}")
    settings = _validate({str(key): value for key, value in values.items()}, source)
    if settings.profile != path.stem:  # a copied file that kept its profile would overwrite that profile's run
        raise SettingsError(f"{source}: profile: must be {path.stem!r} as the file is named, got {settings.profile!r}")
    return settings


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Settings from a notebook's `globals()` after its parameters cell; keys that it does not set keep their defaults.

    Raises `SettingsError` for an unknown name, a wrong type or a value out of range.
    """
    # When the cell is run again, globals() also holds names of later cells: only then unknown names are ignored.
    first = not namespace.get("_settings_checked")
    namespace["_settings_checked"] = True
    known = Settings.model_fields
    parameters = {
        name: value
        for name, value in namespace.items()
        if (name in known and not _is_code(value)) or (name not in known and first and _is_parameter(name, value))
    }
    return _validate(parameters, "the parameters cell")


def located(source: str) -> str:
    """A source as its whole path where it is a file or folder; relative ones start at the checkout's root.

    So a profile means the same folder in a command and in a notebook, whose working folder is another.
    """
    if NOT_PATHS.fullmatch(source):
        return source
    path = repository_root() / Path(source).expanduser()
    return str(path) if path.exists() else source


def check_paths(settings: Settings) -> None:
    """Raise `SettingsError` for the first file or folder in the settings that is not there; hub ids are not looked up.

    A name is taken for a hub id when it has the form of one and no folder here begins as it does.
    """
    for key in ("pipeline", "data", "flickr_8k", "flickr_30k", "clip"):
        _check_path(key, getattr(settings, key))
    for name, source in settings.extractors.items():
        _check_path(f"extractors: {name}", source)
    for key, file in (("pipeline", "model_index.json"), ("clip", "config.json")):
        folder = Path(getattr(settings, key))
        if folder.is_absolute() and not (folder / file).is_file():
            raise SettingsError(f"{key}: no {file} in {folder}")


def _check_path(key: str, source: str) -> None:
    if NOT_PATHS.fullmatch(source) or (Path(source).is_absolute() and Path(source).exists()):
        return
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source) and source[0] not in "./"
    if hub_id and not ("/" in source and (repository_root() / source.split("/")[0]).is_dir()):
        return
    path = repository_root() / Path(source).expanduser()
    raise SettingsError(f"{key}: no file or folder {path}; relative paths start at {repository_root()}")


def repository_root() -> Path:
    """The checkout that holds this package, else the one around the working directory, else the working directory."""
    for folder in (PACKAGE.parent, Path.cwd(), *Path.cwd().parents):
        if (folder / "params" / "cpu.yaml").is_file():
            return folder
    return Path.cwd()


def run_dir(settings: Settings) -> Path:
    """The folder of a run: its notebooks, checkpoints and results."""
    return repository_root() / "runs" / settings.profile


def figures_dir(settings: Settings) -> Path:
    """The folder of a run's figures and tables, inside the run's own: a run changes no tracked file."""
    return run_dir(settings) / "figures"


def results_folders(profile: str) -> tuple[Path, Path]:
    """The two folders of a profile's figures and tables: that of its run and the committed one."""
    return repository_root() / "runs" / profile / "figures", repository_root() / "figures" / profile


def results_dir(settings: Settings) -> Path:
    """The first of a profile's `results_folders` that exists. Raises FileNotFoundError if neither does."""
    folders = results_folders(settings.profile)
    if not (there := [folder for folder in folders if folder.is_dir()]):
        names = " nor in ".join(str(folder.relative_to(repository_root())) for folder in folders)
        command = f"python -m lora_distill reproduce --profile {settings.profile}"
        raise MissingError(f"no results in {names}; {command} makes them")
    return there[0]


def _is_code(value: Any) -> bool:
    """Whether a value is a module, class or function: an import, not a parameter."""
    return isinstance(value, ModuleType | type) or isroutine(value)


def _is_parameter(name: str, value: Any) -> bool:
    """Whether a name can be a parameter: its value is of a type that YAML has, and the name is not IPython's own."""
    plain = value is None or isinstance(value, str | int | float | list | dict)
    return plain and not name.startswith("_") and name not in {"In", "Out"}


def _validate(values: dict[str, Any], source: str) -> Settings:
    """Settings from plain values. Raises `SettingsError` with the first problem, in one line."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        key = first["loc"][0]
        raise SettingsError(
            f"unknown key {key!r} in {source}; did you mean {_nearest(key, Settings.model_fields)!r}?{more}"
        )
    raise SettingsError(f"{source}: {_explain(first)}{more}")


def _nearest(key: str, known: Iterable[str]) -> str:
    """The known key most similar to this one, as a whole or in one of its words."""

    def likeness(other: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, other).ratio()
        return max(whole, *(SequenceMatcher(None, key, word).ratio() for word in other.split("_"))), whole

    return max(known, key=likeness)


EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "string_pattern_mismatch": "{description}",
    "string_too_short": "{description}",
    "too_short": "at least one value",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than": "less than {lt}",
}


def _explain(error: dict[str, Any]) -> str:
    """One of pydantic's errors as `key: expected ..., got ...`."""
    if error["type"] == "value_error":  # from a validator of this file: its message is complete
        return str(error["ctx"]["error"])
    key, *index = error["loc"]
    facts = {"description": Settings.model_fields[key].description, **error.get("ctx", {})}
    expected = EXPECTED.get(error["type"], error["msg"]).format(**facts)
    place = key + "".join(f"[{i}]" for i in index)
    return f"{place}: expected {expected}, got {_shown(error['input'])}{_yaml_hint(error)}"


def _shown(value: Any) -> str:
    """A wrong value as an error message shows it."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value!r}"
    return (
        repr(value)
        if isinstance(value, bool | int | float | list | dict)
        else f"an object of type {type(value).__name__}"
    )


def _yaml_hint(error: dict[str, Any]) -> str:
    """A hint where YAML reads something else than was meant: 1e-4 as text, no as false."""
    value = error["input"]
    if error["type"] == "float_type" and isinstance(value, str):
        mantissa, _, exponent = value.lower().partition("e")
        try:
            float(value)
        except ValueError:
            return ""
        if not exponent:
            return " (write it without quotes)"
        point = "" if "." in mantissa else ".0"
        sign = "" if exponent[0] in "+-" else "+"
        return f" (YAML reads {value} as text; write {mantissa}{point}e{sign}{exponent})"
    if isinstance(value, bool) and error["type"] in {"string_type", "literal_error"}:
        return " (YAML reads yes, no, on and off as true or false; write the text in quotes)"
    return ""
