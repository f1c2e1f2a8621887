"""What a profile takes before anything starts: downloads, disk, memory and operations by notebook, and hours here.

Memory is the account's. Operations are counted from the settings: UNet passes of samplers and trainings, images
encoded and decoded. Time is the number of operations divided by what networks reach, a SHARE of the rate of a matrix
product on this device, plus FIXED seconds a notebook.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from lora_distill.errors import InputError, MissingError, reading
from lora_distill.judge.guided import PAPER_W
from lora_distill.judge.judge import looked_at
from lora_distill.judge.timing import few, protocol
from lora_distill.memory.account import account
from lora_distill.memory.report import GB, RESERVE, TERA
from lora_distill.memory.schemes import INFERENCE, TOKENS, TRAINING, Setup, Training
from lora_distill.settings import Settings
from lora_distill.shapes import (
    SD15_SHAPE,
    SD15_TEXT_ENCODER,
    SD15_VAE,
    meta_unet,
    part_config,
    pipeline_source,
    unet_config,
)

# Of the rate of a matrix product: on a CPU what the bundled series reached on two cores; on a GPU what SD 1.5 reaches
# in diffusers' own table of speeds at batch 16, uncompiled (an A100 80 TFLOP/s of about 250, a T4 11.5 of about 38).
SHARES = {"cpu": 0.5, "cuda": 0.3}
SD15 = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")
# Bytes that the hub sends, about: the archives of both sets of photographs, and 151 million float32 parameters.
DOWNLOADS = {"jxie/flickr8k": 1.1e9, "nlphuji/flickr30k": 4.4e9, "openai/clip-vit-base-patch32": 0.6e9}
SIZES = {"8k": (6000, 1000), "30k": (29000, 1000)}  # images to train on and to test on
GRID = (1, 4, 8, 16)  # batches of notebook 04's seconds over batches and resolutions
CAPTIONS = 5  # of a photograph
FIXED = {"01": 75.0, "02": 25.0, "03": 25.0, "04": 25.0}  # seconds without a network of the profile, on two cores
FEATURES = 0.8e9  # operations of the features of an image, EfficientNet-Lite0 at 224 px
DECODER_TENSORS = 0.8e9  # bytes of activations of SD 1.5's decoder on an image of 512 px in float32, as simulated
DECODED_AT_ONCE = 2**20  # pixels
LORA_BACKWARD, FULL_BACKWARD = 1.1, 2.0  # forwards that a backward pass costs
FULL_LCM = Training("full LCM", "unet", "separate", "consistency")  # of notebook 03: both UNets, all weights trained
PROCESS = 1.5e9  # bytes of a notebook's own process on the host


@dataclass(frozen=True)
class Model:
    """A pipeline on paper: configs, parameters of its three networks, and operations an image."""

    unet: Mapping[str, Any]
    parameters: tuple[int, int, int]  # UNet, VAE, text encoder
    channels: int  # of the decoder at full size
    forward: float  # operations of one UNet pass
    decode: float
    encode: float


@dataclass(frozen=True)
class Work:
    """What a notebook computes."""

    passes: float = 0.0  # UNet forwards of one image
    decoded: float = 0.0  # images
    encoded: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.passes + other.passes, self.decoded + other.decoded, self.encoded + other.encoded)

    def flops(self, model: Model) -> float:
        """Operations of this work with a model."""
        images = self.decoded * (model.decode + FEATURES) + self.encoded * model.encode
        return self.passes * model.forward + images


def images(count: float, passes: float) -> Work:
    """`count` images of `passes` UNet passes each, decoded."""
    return Work(count * passes, count)


# ---------------------------------------------------------------------------------------------- the pipeline on paper


def model_of(pipeline: str, resolution: int) -> Model:
    """A pipeline's sizes and operations, from its configs; SD 1.5's are known, so that nothing is downloaded."""
    if pipeline in (*SD15, SD15_SHAPE):
        unet, vae, text = unet_config(SD15_SHAPE), SD15_VAE, CLIPTextConfig(**SD15_TEXT_ENCODER)
    else:
        source = pipeline_source(pipeline)
        unet, vae = unet_config(pipeline), part_config(AutoencoderKL, source, "vae")
        text = _text_config(source)
    with reading(pipeline, "configs of Stable Diffusion"):
        with torch.device("meta"):
            networks = meta_unet(unet), AutoencoderKL.from_config(dict(vae)), CLIPTextModel(text)
        channels = networks[1].config.block_out_channels
        side = resolution // 2 ** (len(channels) - 1)
        operations = _operations(networks[0], networks[1], side)
    return Model(unet, tuple(map(_parameters, networks)), channels[0], *operations)


def _text_config(source: Path | str) -> CLIPTextConfig:
    try:
        return CLIPTextConfig.from_pretrained(source, subfolder="text_encoder")
    except Exception:  # transformers raises errors of its own for values that do not fit
        raise MissingError(f"{source}: no readable text_encoder/config.json") from None


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def _operations(unet: nn.Module, vae: AutoencoderKL, side: int) -> tuple[float, float, float]:
    """Operations of a UNet pass, of decoding and of encoding one image; `side` is that of a latent."""
    shrink = 2 ** (len(vae.config.block_out_channels) - 1)
    with torch.device("meta"):
        latents = torch.empty(1, unet.config.in_channels, side, side)
        embeds = torch.empty(1, TOKENS, unet.config.cross_attention_dim)
        pixels = torch.empty(1, 3, shrink * side, shrink * side)
        calls = (lambda: unet(latents, torch.empty(1), embeds), lambda: vae.decode(latents), lambda: vae.encode(pixels))
        counted = []
        for call in calls:
            with FlopCounterMode(display=False) as counter:
                call()
            counted.append(counter.get_total_flops())
    return tuple(counted)


# ---------------------------------------------------------------------------------------------- operations by notebook


def work(settings: Settings, on_gpu: bool = False) -> dict[str, Work]:
    """What notebooks 02 to 04 compute. Notebook 01 is left out: its steps take what memory is free, or are left out."""
    return {"01": Work(), "02": _guided(settings), "03": _few_steps(settings), "04": _timed(settings, on_gpu)}


def _guided(s: Settings) -> Work:
    """Curve of w, teacher images, trainings with their milestones, and the verdict."""
    steps, two = s.sampling_steps, 2 if s.guidance_scale != 1 else 1
    curve = sum(steps * (2 if w != 1 else 1) for w in s.guidance_scales)
    total = images(s.curve_prompts * len(s.guidance_scales), curve / len(s.guidance_scales))
    total += images(s.teacher_images, two * steps) + Work(14 * 64 * 2)
    if s.guidance_scale not in s.guidance_scales:
        total += images(s.curve_prompts, two * steps)
    seen = s.train_steps * s.batch_size * s.gradient_accumulation
    again = 1 + len(s.more_train_seeds)
    at_paper_w = 0 if s.guidance_scale == PAPER_W else 1 + bool(s.more_train_seeds)  # its teacher, and its student
    if at_paper_w > 1:
        total += images(s.teacher_images, 2 * steps)
    trainings = (again + (at_paper_w > 1)) * _step(s, 2, LORA_BACKWARD)
    trainings += again * s.full_copies * _step(s, 2, FULL_BACKWARD)
    milestones = (1 + s.full_copies) * len(looked_at(s))
    total += Work(seen * trainings) + images(milestones * s.curve_prompts, steps)
    judged = s.eval_prompts * len(s.eval_seeds)
    for passes in (
        two * steps,
        (1 + two) / 2 * steps,
        *[steps] * (2 + s.full_copies),
        *[2 * steps, steps][:at_paper_w],
    ):
        total += images(judged, passes)
    for few_steps in (n for n in (4, 8) if n < steps):
        total += images(judged, two * few_steps) + images(judged, few_steps)
    return total


def _step(s: Settings, before: float, backward: float) -> float:
    """Forwards of a training step an image: those before the student's, its own, and its backward."""
    return before + 1 + backward + s.gradient_checkpointing


def _few_steps(s: Settings) -> Work:
    """Encoding, curves of the base, trainings on every set, sums of adapters, and the verdict."""
    sets, curve, judged = _sets(s), s.curve_prompts, s.eval_prompts * len(s.eval_seeds)
    again, two = 1 + len(s.more_train_seeds), 2 if s.guidance_scale != 1 else 1
    loras = len(sets) + (len(sets) > 1 and s.few_images > 0)
    total = Work(encoded=sum(sets.values()) * (1 + s.mirror))
    for passes in (two * s.sampling_steps, *(two * n for n in (2, 4, 8) * 3), *(1, 2, 4, 8) * (3 + s.full_copies)):
        total += images(curve, passes)
    steps = loras * again * _step(s, 3, LORA_BACKWARD)
    if s.full_copies:
        steps += _step(s, 3, FULL_BACKWARD) + 3 * _step(s, 1, LORA_BACKWARD)
        total += images(4 * curve, 4)  # the LCM and its mimics
    batch = s.lcm_batch_size * s.gradient_accumulation
    fine_tuned = 2 * again * s.finetune_steps * batch
    total += Work(s.lcm_steps * batch * steps + fine_tuned * _step(s, 0, LORA_BACKWARD)) + images(4 * curve, 4)
    scales = {s.guidance_scale, *s.finetune_guidance_scales}
    tuned = [s.sampling_steps * (2 if w != 1 else 1) for w in scales] * 2
    for passes in (two * s.sampling_steps, *tuned, two * 4, *[4] * (4 + 2 * s.full_copies + loras)):
        total += images(judged, passes)
    return total


def _timed(s: Settings, on_gpu: bool) -> Work:
    """Seconds of forwards by batch, of every method, and over batches and resolutions; trainings are read.

    On a CPU each is timed on two runtimes and two numbers of threads.
    """
    repeats, steps = s.timing_repeats, s.sampling_steps
    turns, grid_repeats = protocol(s.timing_batch, repeats), few(repeats)
    runtimes, threads, larger = (1, 1, 2.25) if on_gpu else (2, 2, 2.25)  # work of a side half as large again
    ladder = sum(size for size in (1, 2, 4, 8, 16, 32) if size <= 2 * s.eval_batch)
    total = Work(runtimes * threads * ladder * (repeats // 2 + 2) + larger * ladder * (repeats // 3 + 2))
    deployed = [2 * steps, 1.5 * steps, steps, *[steps] * s.full_copies, 8, *[4] * len(_sets(s))]
    passes = deployed + [2 * steps, steps] * (runtimes - 1)
    timed = sum(batch * (count + 1) for batch, count in turns.items())
    total += images(threads * timed * len(passes), sum(passes) / len(passes))
    grid = sum(batch for batch in GRID if batch <= s.eval_batch)
    return total + images((1 + larger) * grid * (grid_repeats + 1) * 3, (3 * steps + 4) / 3)


def _sets(s: Settings) -> dict[str, float]:
    """Training images of each set of notebook 03 that is used."""
    found = {"8k": s.flickr_8k, "30k": s.flickr_30k}
    return {name: s.image_share * _size(source, name) for name, source in found.items() if source}


def _size(source: str, name: str) -> int:
    """Training images of a source: of a folder three quarters of its pictures, else what Flickr8k or 30k has."""
    folder = Path(source).expanduser()
    if source.startswith("scenes/") or not folder.is_dir():
        return SIZES[name][0]
    return round(0.75 * sum(path.suffix.lower() in {".jpg", ".jpeg", ".png"} for path in folder.rglob("*")))


# ---------------------------------------------------------------------------------------------- memory by notebook


def precision(settings: Settings) -> str:
    """The name in schemes.PRECISIONS of what the settings ask for; the two 16-bit formats take the same."""
    if settings.dtype == "float32":
        return "float32" if settings.mixed_precision == "no" else "mixed"
    return "16-bit" if settings.mixed_precision == "no" else "mixed, 16-bit base"


def peaks(settings: Settings, model: Model) -> dict[str, float]:
    """Bytes at the peak of each notebook on the device that trains and samples."""
    s, (unet, *others) = settings, model.parameters
    width = 4 if s.dtype == "float32" else 2
    beside, w0 = width * sum(others), width * unet  # VAE and text encoder; a second UNet
    guided = [_trained(s, model, "lora_distillation_shared", s.batch_size, s.lora_rank, s.lora_targets)]
    few = [_trained(s, model, "lcm_lora_shared", s.lcm_batch_size, s.lcm_rank, s.lcm_targets, s.lcm_ema_decay)]
    if s.full_copies:
        guided.append(_trained(s, model, "conventional_distillation", s.batch_size, ema=s.ema_decay))
        few.append(_trained(s, model, FULL_LCM, s.lcm_batch_size, ema=s.lcm_ema_decay))
    # Beside W0: the trained copy, and merged students, which share with W0 what their adapter leaves alone.
    judging = max(_sampling(s, model, s.eval_batch, s.resolution), w0 + _decoding(s, model)) + w0 * (s.full_copies + 2)
    students = w0 * (s.full_copies + 1 + len(_sets(s)))
    largest = max(batch for batch in GRID if batch == 1 or batch <= s.eval_batch)
    multiple = 8 * 2 ** (len(model.unet["down_block_types"]) - 1)  # the account's; the UNet itself takes any side
    larger = multiple * ceil(s.resolution * 1.5 / multiple)
    timing = max(_sampling(s, model, largest, larger), w0 + 2.25 * _decoding(s, model)) + students
    return {"01": 0.0, "02": beside + max(*guided, judging), "03": beside + max(*few, judging), "04": beside + timing}


def _sampling(s: Settings, model: Model, batch: int, resolution: int) -> float:
    """Bytes of a guided pass, W0 included."""
    setup = Setup(batch, resolution, precision="float32" if s.dtype == "float32" else "16-bit")
    return sum(account(INFERENCE["guided_batched"], setup, model.unet).values())


def _decoding(s: Settings, model: Model) -> float:
    """Bytes of activations of the decoder, which takes so many pixels at a time, or one image."""
    pixels = max(s.resolution**2, min(DECODED_AT_ONCE, s.eval_batch * s.resolution**2))
    return DECODER_TENSORS * model.channels / 128 * (1 if s.dtype == "float32" else 0.5) * pixels / 512**2


def _trained(
    s: Settings,
    model: Model,
    scheme: str | Training,
    batch: int,
    rank: int = 4,
    targets: str = "attention",
    ema: float = 0.0,
) -> float:
    """Bytes at the peak of a training: of the account, and of the moving average in float32."""
    scheme = replace(TRAINING[scheme] if isinstance(scheme, str) else scheme, rank=rank, targets=targets)
    full = scheme.trains == "unet"
    optimizer = "adamw-8bit" if full and s.optimizer == "adamw-8bit" else "adamw-fused"
    terms = account(scheme, Setup(batch, s.resolution, s.gradient_checkpointing, precision(s), optimizer), model.unet)
    lora_width = 2 if precision(s) == "16-bit" else 4
    trained = model.parameters[0] if full else terms["lora"] / lora_width
    return sum(terms.values()) + 4 * trained * (ema > 0)


def host(settings: Settings, model: Model, notebook: str) -> float:
    """Bytes in the machine's own memory beside a GPU: the largest checkpoint, or the pipeline as it is loaded."""
    s, unet = settings, model.parameters[0]
    if notebook == "01":
        return PROCESS
    ema = {"02": s.ema_decay, "03": s.lcm_ema_decay, "04": 0}[notebook] > 0
    moments = 2 if s.optimizer == "adamw-8bit" else 8
    checkpoint = unet * (4 + moments + 4 * ema) if s.full_copies and notebook != "04" else 0
    return PROCESS + max(checkpoint, 4 * sum(model.parameters))


# ---------------------------------------------------------------------------------------------- downloads, disk, time


def downloads(settings: Settings, model: Model) -> dict[str, float]:
    """Bytes by hub id; nothing for what is bundled or lies in a folder."""
    s = settings
    sources = {s.data, s.flickr_8k, s.flickr_30k, s.clip} - {""}
    found = {name: size for name, size in DOWNLOADS.items() if any(source.startswith(name) for source in sources)}
    local = s.pipeline in ("bundled", SD15_SHAPE) or Path(s.pipeline).expanduser().is_dir()
    return found if local else {s.pipeline: 4.0 * sum(model.parameters), **found}


def disk(settings: Settings, model: Model) -> dict[str, float]:
    """Bytes that a run writes, by kind; encodings have 16 bits."""
    s, width = settings, 4 if settings.dtype == "float32" else 2
    side, dim, unet = s.resolution // 8, model.unet["cross_attention_dim"], model.parameters[0]
    latent, prompt = 4 * side**2, TOKENS * dim
    trained = sum(_sets(s).values())
    judged = 12 * s.eval_prompts * len(s.eval_seeds)
    copies = 2 * unet * 4 + max(host(s, model, "03"), host(s, model, "02")) - PROCESS if s.full_copies else 0
    return {
        "encoded images and captions": 2 * trained * (2 * latent * (1 + s.mirror) + CAPTIONS * prompt),
        "teacher latents": width * s.teacher_images * (latent + prompt),
        "judged latents and images": judged * (width * latent + 3 * s.resolution**2),
        "full copies and a checkpoint": copies,
    }


def trajectories(settings: Settings, model: Model) -> float:
    """Bytes of the teacher's guided trajectories, which `distill --trajectories` keeps in 16 bits."""
    s, side = settings, settings.resolution // 8
    point, prompt = 3 * 4 * side**2, TOKENS * model.unet["cross_attention_dim"]  # x_t and both outputs
    return 2.0 * s.teacher_images * (s.sampling_steps * point + prompt)


def rate(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of a matrix product on a device, the best of as many as fit in `seconds`."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds or best == float("inf"):
        clock = time.perf_counter()
        product = a @ b
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - clock)
    del a, b, product
    if device != "cpu":
        torch.cuda.empty_cache()  # a notebook's kernel is another process, and needs the memory
    return 2 * side**3 / best


def any_device(settings: Settings) -> str:
    """A device of the kind that the settings ask for; several processes have one each."""
    return "cpu" if settings.device == "cpu" or not torch.cuda.is_available() else "cuda"


# ---------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """A profile on a device: a row a notebook, and whether it fits."""

    rows: list[dict[str, Any]]
    downloads: dict[str, float]
    disk: dict[str, float]
    trajectories: float  # bytes, of which the notebooks need none
    place: str  # the memory that it must fit in, in words
    room: float  # bytes of it
    rate: float  # operations a second of a matrix product
    share: float  # of it that is reached

    @property
    def refusal(self) -> str:
        """Why the profile does not fit, in one line; empty where it does."""
        worst = max(self.rows, key=lambda row: row["device_gb"])
        if worst["device_gb"] * GB <= self.room:
            return ""
        needed = f"notebook {worst['notebook']} needs about {worst['device_gb']:.1f} GB"
        return f"{needed}, and {self.place} has {self.room / GB:.1f} GB"

    @property
    def last_lines(self) -> list[str]:
        """Time, and whether it fits, in two lines."""
        hours = sum(row["minutes"] for row in self.rows) / 60
        took = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        parts = f"{100 * self.share:.0f} % of {self.rate / TERA:.3g} TFLOP/s"
        fits = f"does not fit: {self.refusal}" if self.refusal else f"fits in {self.room / GB:.1f} GB of {self.place}"
        return [f"about {took} at {parts}, which a matrix product reaches", fits]

    def __str__(self) -> str:
        head = ["notebook     device GB  host GB       TFLOP  minutes"]
        lines = [
            f"{row['notebook']:<10}{row['device_gb']:>12.1f}{row['host_gb']:>9.1f}"
            f"{row['tflop']:>12,.1f}{row['minutes']:>9.1f}"
            for row in self.rows
        ]
        sizes = [_listed("downloads", self.downloads), _listed("disk", self.disk)]
        sizes.append(f"guided trajectories, of distill --trajectories: about {self.trajectories / GB:.2f} GB")
        return "\n".join([*sizes, *head, *lines, *self.last_lines])


def _listed(title: str, sizes: dict[str, float]) -> str:
    found = {name: size for name, size in sizes.items() if size >= 0.005 * GB}
    each = ", ".join(f"{name} {size / GB:.2f}" for name, size in found.items())
    return f"{title}: {sum(sizes.values()) / GB:.1f} GB" + (f" ({each})" if each else "")


def plan(settings: Settings, device: str, *, card: float | None = None, tflops: float | None = None) -> Plan:
    """The plan of a profile; with `card`, in GiB, and `tflops` for a GPU that is not here."""
    if card is not None and tflops is None:
        raise InputError("tflops: needed with card, for the rate of a GPU that is not here cannot be measured")
    model = model_of(settings.pipeline, settings.resolution)
    on_gpu = card is not None or device != "cpu"
    speed = tflops * TERA if tflops else rate(device, getattr(torch, settings.dtype))
    share, needs, rows = SHARES["cuda" if on_gpu else "cpu"], peaks(settings, model), []
    for notebook, done in work(settings, on_gpu).items():
        beside, flops = host(settings, model, notebook), done.flops(model)
        minutes = (FIXED[notebook] + flops / (share * speed)) / 60
        memory = needs[notebook] + (0 if on_gpu else beside)
        row = {"notebook": notebook, "device_gb": memory / GB, "host_gb": beside / GB}
        rows.append(row | {"tflop": flops / TERA, "minutes": minutes})
    place, room = _room(device, card)
    sizes = downloads(settings, model), disk(settings, model), trajectories(settings, model)
    return Plan(rows, *sizes, place, room, speed, share)


def _room(device: str, card: float | None) -> tuple[str, float]:
    """Where a profile must fit, and its bytes: less RESERVE on a GPU."""
    if card is not None:
        return f"a card of {card:g} GiB", card * 2**30 - RESERVE
    if device == "cpu":
        return "this machine's memory", float(psutil.virtual_memory().available)
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.get_device_name(device), total - RESERVE
