"""The settings of a run: flat, typed and frozen, read from params/<profile>.yaml or a notebook's parameters cell.

An unknown key and a value of the wrong type or out of range are refused in one line before anything runs.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from lora_distill.errors import InputError, MissingError, reading
from lora_distill.parameters import parameters
from lora_distill.refusals import FROM_PAPERMILL, IN_QUOTES, key_of, refusal, shown
from lora_distill.yaml_file import Place, read_yaml

PACKAGE = Path(__file__).resolve().parent
SCENES = r"scenes/(noto|fluent)/(8k|30k)"
NAMED = {  # sources that are not on a disk
    "pipeline": r"bundled|sd15-shape",
    "data": rf"scenes|{SCENES}",
    "flickr_8k": SCENES,
    "flickr_30k": rf"{SCENES}|",
    "clip": "",
}
EXTRACTOR_FILES = {"Inception": "", "DINOv2": "config.json", "CLIP": "config.json"}  # what a path must have
DEVICES = r"auto|cpu|cuda(:(0|[1-9]\d{0,2}))?"
ENOUGH_PROMPTS = 20  # with fewer, what a run says about quality is no result
# Of 64 bits, which PyTorch's generators take, `sampling.step_generators` needs 20 for the images of a seed, and NumPy's
# older generators, of libraries, take 32.
MAX_SEED = 2**32 - 1
MAX_COUNT = 10**9  # of anything: more is a slip, and libraries count in 32 bits
MAX_RANK = 1280  # the width of Stable Diffusion's widest layers: a higher rank gives nothing more
TIMESTEPS = 1000  # of the noise schedules of Stable Diffusion 1 and 2
RESERVED = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"  # names that are no folders on Windows
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Guidance = Annotated[float, Field(ge=1, le=1000)]


def _count(default: int, description: str, least: int = 1, most: int = MAX_COUNT, **more: Any) -> Any:
    """A whole number in a range."""
    return Field(default, ge=least, le=most, description=description, **more)


class SettingsError(InputError):
    """Invalid settings; the message is one line with the key, its place and what is expected."""


class Settings(BaseModel):
    """All settings of a run. The defaults are those of params/cpu.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    profile: str = Field(
        "cpu",
        pattern=r"^\w([\w.-]*[\w-])?$",
        max_length=100,
        description="name of the run, and of its folder in runs/: letters, digits, _, - and, inside, dots",
    )
    seed: int = _count(0, "seed of training, data and the adapters' first weights", 0, MAX_SEED)
    more_train_seeds: list[Seed] = Field(
        [], description="seeds of further trainings of the students; each of eval_seeds judges the next training"
    )

    pipeline: str = Field(
        "bundled", min_length=1, description="bundled, a folder in the Stable Diffusion layout, or a hub id"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what frozen weights are stored in")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="autocast in training; no computes it all in dtype, A and B included, on float32 masters"
    )
    pretrain: Literal["short", "full"] = Field("short", description="how long notebook 00 trains the small pipeline")

    data: str = Field(
        "scenes", min_length=1, description="captioned images: scenes, a folder as one finds Flickr8k, or a hub id"
    )
    style: Literal["noto", "fluent"] = Field("noto", description="drawing style of the bundled scenes")
    teacher_images: int = _count(256, "images the teacher makes to distil on", most=10**6)

    guidance_scale: float = Field(3.0, ge=1, le=1000, description="w of the teacher; 1 is no guidance")
    sampling_steps: int = _count(25, "steps of the multi-step samplers", most=10**4)
    scheduler: Literal["own", "ddim", "dpm++"] = Field(
        "own", description="of the multi-step samplers: own, the pipeline's; ddim, with trailing timesteps; dpm++"
    )

    train_steps: int = _count(100, "optimiser updates")
    batch_size: int = _count(32, "images a forward pass, over all processes together")
    gradient_accumulation: int = _count(1, "forward passes an update")
    learning_rate: float = Field(1.0e-3, gt=0, description="learning rate of LoRA training")
    full_learning_rate: float = Field(5.0e-5, gt=0, description="learning rate of the conventional full copy")
    warmup_steps: int = _count(20, "updates of linear warm-up in every training, at most its steps", 0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="decay of the weights' moving average; 0 is off")
    log_every: int = _count(10, "updates between lines of the log")
    checkpoint_every: int = _count(100, "updates between checkpoints")
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

    lora_rank: int = _count(4, "rank of the adapters", most=MAX_RANK)
    lora_alpha: int = _count(4, "scale of the adapters, as alpha / rank", most=10**4)
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
    resolution: int = _count(64, "side of the images in pixels", 8, 4096)
    mirror: bool = Field(False, description="mirror images whose caption has no left or right")
    skip_unusable: bool = Field(False, description="leave out images that cannot be read, with a warning")
    lcm_steps: int = _count(40, "updates of each consistency training")
    lcm_batch_size: int = _count(8, "images a forward pass, in all trainings of notebook 03")
    lcm_learning_rate: float = Field(2.0e-4, gt=0, description="learning rate of the full LCM")
    lcm_lora_learning_rate: float = Field(2.0e-3, gt=0, description="learning rate of LCM-LoRA and of the mimic")
    finetune_steps: int = _count(150, "updates of the plain LoRA fine-tune")
    finetune_learning_rate: float = Field(
        3.0e-3, gt=0, description="learning rate of the plain fine-tune with lcm_rank on lcm_targets"
    )
    finetune_attention_learning_rate: float = Field(
        1.0e-3, gt=0, description="learning rate of the plain fine-tune with lora_rank on attention"
    )
    finetune_caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of captions that a fine-tune sees empty, to learn the pass without a prompt"
    )
    finetune_guidance_scales: list[Guidance] = Field(
        [1.0, 3.0], min_length=1, max_length=1000, description="w at which the plain fine-tunes are judged"
    )
    few_images: int = _count(0, "first images of the larger set on which LCM-LoRA is trained too; 0: none", 0)
    lcm_ema_decay: float = Field(0.9, ge=0, lt=1, description="decay of the consistency target; 0: the student itself")
    lcm_rank: int = _count(16, "rank of LCM-LoRA and of the mimic; alpha is the same", most=MAX_RANK)
    lcm_targets: Literal["attention", "all"] = Field("all", description="layers of LCM-LoRA and of the mimic")
    w_min: float = Field(2.0, ge=1, le=1000, description="least guidance scale of the full LCM")
    w_max: float = Field(5.0, ge=1, le=1000, description="greatest guidance scale of the full LCM")
    ddim_skip: int = _count(20, "timesteps the DDIM solver skips; must divide the schedule's", most=10**4)
    huber_c: float = Field(1.0e-3, gt=0, description="where the pseudo-Huber loss turns from square to absolute")
    mse_weight: float = Field(1.0, ge=0, description="weight of the MSE when the LoRA mimics the LCM")
    kl_weight: float = Field(1.0, ge=0, description="weight of the KL when the LoRA mimics the LCM")

    eval_prompts: int = _count(32, "prompts of a verdict; of scenes a multiple of 8, for equal shares of all kinds")
    curve_prompts: int = _count(32, "prompts a point of a curve, or of a measurement in training")
    eval_batch: int = _count(48, "images sampled, encoded or decoded at a time")
    clip: str = Field("", description="CLIP model that scores photographs, a folder or a hub id; scenes need none")
    extractors: dict[Literal["Inception", "DINOv2", "CLIP"], Annotated[str, Field(min_length=1)]] = Field(
        {},
        description="more distances, on Inception, DINOv2 or CLIP: each with a file, folder or hub id of its weights",
    )
    eval_every: int = _count(100, "updates between measurements in training")
    eval_seeds: list[Seed] = Field([0, 1, 2], min_length=1, max_length=1000, description="seeds of sampling")
    guidance_scales: list[Guidance] = Field(
        [1.0, 2.0, 3.0, 5.0, 7.5, 10.0],
        min_length=1,
        max_length=1000,
        description="w of the curves of quality against guidance",
    )
    timing_batch: int = _count(8, "images a timed call")
    timing_repeats: int = _count(
        30, "timed calls of one image, after those that warm up; a tenth of them of a batch", most=10**5
    )

    @field_validator("profile")
    @classmethod
    def _a_folder_on_every_machine(cls, profile: str) -> str:
        if re.fullmatch(RESERVED, profile, re.IGNORECASE):
            raise InputError(f"profile: {profile} cannot be a folder's name on Windows; another name would do")
        return profile

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        return checked_device(device)

    @field_validator("pipeline", "data", "flickr_8k", "flickr_30k", "clip")
    @classmethod
    def _from_the_root(cls, source: str, info: ValidationInfo) -> str:
        return located(info.field_name, source)

    @field_validator("extractors")
    @classmethod
    def _all_from_the_root(cls, sources: dict[str, str]) -> dict[str, str]:
        return {name: located("extractors", source) for name, source in sources.items()}

    @field_validator("eval_seeds", "more_train_seeds", "guidance_scales", "finetune_guidance_scales")
    @classmethod
    def _distinct(cls, values: list[float], info: ValidationInfo) -> list[float]:
        if len(set(values)) < len(values):
            raise InputError(f"{info.field_name}: must differ from each other, got {shown(values)}")
        return values

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
    def _fits_the_pipeline(self) -> "Settings":
        timesteps, factor = _timesteps(self.pipeline), _vae_factor(self.pipeline)
        if self.sampling_steps > timesteps:
            raise InputError(
                f"sampling_steps: must be at most {timesteps}, the timesteps of the noise schedule, "
                f"got {self.sampling_steps}"
            )
        if timesteps % self.ddim_skip or self.ddim_skip == timesteps:
            raise InputError(
                f"ddim_skip: must divide {timesteps}, the timesteps of the noise schedule, and be less; "
                f"got {self.ddim_skip}"
            )
        if self.resolution % factor:
            raise InputError(f"resolution: must be a multiple of {factor}, the VAE's factor, got {self.resolution}")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Settings":
        if self.mse_weight == self.kl_weight == 0:
            raise InputError("mse_weight: must be above 0 where kl_weight is 0, or the mimic has nothing to learn")
        if self.optimizer == "adamw-8bit" and self.device == "cpu" and self.full_copies:
            raise InputError("optimizer: adamw-8bit needs a GPU, and device is cpu; adamw would do")
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
    path = _profile_file(profile_or_path)
    source = f"{path.parent.name}/{path.name}"
    try:
        values, lines = read_yaml(path, source)
    except InputError as error:
        raise SettingsError(str(error)) from None
    if not isinstance(values, dict):
        raise SettingsError(f"{source}: expected lines of 'key: value', got {shown(values) if values else 'nothing'}")
    settings = checked(values, source, lines)
    if not _same_name(settings.profile, path.stem):  # a copy that kept its profile would overwrite that profile's run
        raise SettingsError(_misnamed(settings.profile, path.stem, source, lines))
    return settings


def _profile_file(profile_or_path: str | Path) -> Path:
    """The file of a profile, which is there. Raises `SettingsError` that says what there is instead."""
    given, params = Path(profile_or_path), repository_root() / "params"
    by_path = given.suffix.lower() in {".yaml", ".yml"}
    path = given if by_path else params / f"{profile_or_path}.yaml"
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as error:  # a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"no profile {shown(str(profile_or_path))}: {reason}") from None
    names = ", ".join(sorted(file.stem for file in params.glob("*.yaml")))
    if not names and not by_path:
        raise SettingsError(
            f"no folder {params}: profiles lie in a checkout of the repository; the path of a YAML file works too"
        )
    if by_path:
        raise SettingsError(f"no file {path}; a profile of {params} would do too: {names or 'there is none'}")
    raise SettingsError(f"no profile {shown(str(profile_or_path))} in {params}; available: {names}")


def _same_name(profile: str, stem: str) -> bool:
    return unicodedata.normalize("NFC", profile) == unicodedata.normalize("NFC", stem)  # macOS decomposes file names


def _misnamed(profile: str, stem: str, source: str, lines: dict[Place, int]) -> str:
    try:
        Settings(profile=stem)
    except ValidationError:  # a name that no profile can have
        return f"{source}: the file must be named as its profile, {profile}.yaml"
    place = f"{source}, line {lines['profile',]}" if ("profile",) in lines else source
    return f"{place}: profile: must be {stem!r} as the file is named, got {profile!r}"


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Settings from a notebook's `globals()` after its parameters cell; keys that it does not set keep their defaults.

    A line is printed where the profile's name is that of a file in params/ and the values are others. Raises
    `SettingsError` for an unknown name, a wrong type or a value out of range.
    """
    given = parameters(namespace, Settings.model_fields)
    settings = checked(given, "the parameters cell", text_hint=FROM_PAPERMILL)
    if others := _other_values(settings):
        name, (key, value) = settings.profile, next(iter(others.items()))
        more = f" and {len(others) - 1} more" * (len(others) > 1)
        print(
            f"profile {name}: not as in params/{name}.yaml, where {key} is {shown(value)}{more}; all of it: "
            f"from lora_distill.settings import load_settings; settings = load_settings({name!r})"
        )
    return settings


def _other_values(settings: Settings) -> dict[str, Any]:
    """The values of the profile's file that are not those of the settings; none where there is no such file."""
    try:
        named = load_settings(settings.profile).model_dump()
    except SettingsError:
        return {}
    return {key: value for key, value in named.items() if value != getattr(settings, key)}


# ---------------------------------------------------------------------------------------------- sources and devices


def checked_device(device: str) -> str:
    """The name of a device. Raises `InputError` for another; whether it is here, `devices.check_device` says."""
    if device.partition(":")[0] == "mps":
        raise InputError(
            "device: mps is refused: consistency training computes in float64, which MPS lacks, and nothing was ever "
            "run there; auto or cpu would do"
        )
    if not re.fullmatch(DEVICES, device):
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got the text {shown(device)}")
    return device


def located(key: str, source: str) -> str:
    """The source of a key as its whole path where it is a file or folder; relative ones start at the checkout's root.

    So a profile means the same folder in a command and in a notebook, whose working folder is another. Raises
    `InputError` for scenes that there are not.
    """
    if re.fullmatch(NAMED.get(key, "(?!)"), source):
        return source
    if source != source.strip() or not source.isprintable():
        raise InputError(f"{key}: expected no spaces around it and no control characters, got {shown(source)}")
    if NAMED.get(key) and re.fullmatch(NAMED[key], source, re.IGNORECASE):
        raise InputError(f"{key}: expected {source.lower()} in small letters, got {shown(source)}")
    with reading(f"{key}: {shown(source)}", "a file, a folder or a hub id"):  # ~nobody, or a name of 300 letters
        if (path := repository_root() / Path(source).expanduser()).exists():
            return str(path)
    if re.fullmatch("none|null|no|false", source, re.IGNORECASE):  # else a hub id, asked for long after the start
        none = ', or "" for none' if re.fullmatch(NAMED.get(key, "(?!)"), "") else ""
        raise InputError(f"{key}: expected a folder or a hub id{none}, got the text {shown(source)}")
    if "scenes" in NAMED.get(key, "") and re.fullmatch("scenes(/.*)?", source):
        raise InputError(f"{key}: expected scenes/noto or scenes/fluent with /8k or /30k, got the text {shown(source)}")
    if others := [other for other, names in NAMED.items() if names and re.fullmatch(names, source)]:
        raise InputError(f"{key}: {source} is a value of {others[0]}; expected a folder or a hub id here")
    return source


def check_paths(settings: Settings) -> None:
    """Raise `SettingsError` for the first file or folder in the settings that is not there; hub ids are not looked up.

    A name is taken for a hub id when it has the form of one and no folder here begins as it does.
    """
    for key in NAMED:
        _check_path(key, getattr(settings, key))
    for name, source in settings.extractors.items():
        _check_path(f"extractors: {name}", source)
        if Path(source).is_absolute() and not (path := Path(source) / EXTRACTOR_FILES[name]).is_file():
            raise SettingsError(f"extractors: {name}: no file {path}")
    for key, file in (("pipeline", "model_index.json"), ("clip", "config.json")):
        folder = Path(getattr(settings, key))
        if folder.is_absolute() and not (folder / file).is_file():
            raise SettingsError(f"{key}: no {file} in {folder}")
    for key in ("data", "flickr_8k", "flickr_30k"):
        folder = Path(getattr(settings, key))
        if folder.is_absolute() and not (folder.is_dir() and any(folder.iterdir())):
            raise SettingsError(f"{key}: expected a folder with images and captions, got {folder}")


def _check_path(key: str, source: str) -> None:
    if re.fullmatch(NAMED.get(key, "(?!)"), source) or (Path(source).is_absolute() and Path(source).exists()):
        return
    hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source) and source[0] not in "./"
    if hub_id and not ("/" in source and (repository_root() / source.split("/")[0]).is_dir()):
        return
    path = repository_root() / Path(source).expanduser()
    raise SettingsError(f"{key}: no file or folder {path}; relative paths start at {repository_root()}")


def _timesteps(pipeline: str) -> int:
    """The timesteps of a pipeline's noise schedule: as its folder says, else those of all Stable Diffusion."""
    count = _part_config(pipeline, "scheduler", "scheduler_config.json").get("num_train_timesteps")
    return count if type(count) is int and count > 0 else TIMESTEPS


def _vae_factor(pipeline: str) -> int:
    """How many pixels a latent has along a side: as the pipeline's folder says, else those of all Stable Diffusion."""
    channels = _part_config(pipeline, "vae", "config.json").get("block_out_channels")
    return 2 ** (len(channels) - 1) if isinstance(channels, list) and 0 < len(channels) < 9 else 8


def _part_config(pipeline: str, part: str, file: str) -> dict[str, Any]:
    """The config of one part of a pipeline's folder; empty where it cannot be read, which `load_pipeline` says."""
    folder = PACKAGE / "assets" / "pipeline" if pipeline == "bundled" else Path(pipeline)
    try:
        config = json.loads((folder / part / file).read_text(encoding="utf-8")) if folder.is_absolute() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


# ---------------------------------------------------------------------------------------------- folders


def repository_root() -> Path:
    """The checkout that holds this package, else the one around the working directory, else the working directory."""
    if (PACKAGE.parent / "params" / "cpu.yaml").is_file():
        return PACKAGE.parent
    with reading("the working folder", "a folder that is there"):
        here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "params" / "cpu.yaml").is_file()), here)


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


# ---------------------------------------------------------------------------------------------- validation


def checked(
    values: dict[str, Any], source: str, lines: Mapping[Place, int] | None = None, text_hint: str = IN_QUOTES
) -> Settings:
    """Settings from plain values of `source`. Raises `SettingsError` with the first problem, in one line."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
    descriptions = {key: field.description for key, field in Settings.model_fields.items()}
    more = f" (and {len(others)} more)" if others else ""
    raise SettingsError(
        f"{_place(key_of(first), source, lines or {})}: {refusal(first, descriptions, text_hint)}{more}"
    )


def _place(key: Place, source: str, lines: Mapping[Place, int]) -> str:
    """The file with the line of a key or, where it is not in the file, the file alone."""
    known = [lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in lines]
    return f"{source}, line {known[0]}" if known else source
