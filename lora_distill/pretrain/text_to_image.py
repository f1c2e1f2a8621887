"""Training the bundled pipeline from scratch: VAE, text encoder, then text encoder and UNet together (notebook 00)."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lora_distill import diffusion, processes
from lora_distill.data import scenes
from lora_distill.errors import InputError
from lora_distill.fingerprint import tokenizer_digest
from lora_distill.finite import check_finite
from lora_distill.pretrain.parts import (
    PRETRAINED,
    PROMPT_LENGTH,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    tokenize,
)
from lora_distill.pretrain.vae import draw_all, encode_all, train_vae
from lora_distill.storage import cache_key, digest, git_commit, versions
from lora_distill.train.loop import train
from lora_distill.train.step import Schedule
from lora_distill.writing import check_place, whole_folder

CAPTION_DROPOUT = 0.1  # fraction of captions replaced by "", so that the model also learns the unconditional output
# What `pretrain` and `model-card` write into a pipeline's folder.
FILES = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae", "training.json", "scores.json",
         "README.md"}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Size and length of a pretraining. `full` made the bundled pipeline; `short` checks the code in a minute."""

    images: int
    schedules: dict[str, Schedule]  # by stage, in the order of training
    # The part of the objects that the UNet's captions name at random, as captions on the web are wrong: a model that
    # learns p(image | caption) draws wrong objects as often, which guidance corrects.
    caption_error: float = 0.1


PRESETS = {
    "full": Preset(
        images=29_000,
        schedules={
            "vae_crops": Schedule(
                4_800, 24, 1e-3, warmup_steps=100, final_learning_rate=0.2, beta2=0.99, mixed_precision="bf16"
            ),
            "vae_images": Schedule(1_200, 12, 2e-4, warmup_steps=20, beta2=0.99, mixed_precision="bf16"),
            "text_encoder": Schedule(1_500, 128, 1e-3, warmup_steps=100, beta2=0.99),
            "unet": Schedule(4_100, 64, 1e-3, warmup_steps=200, ema_decay=0.999, beta2=0.99, checkpoint_every=250),
        },
    ),
    "short": Preset(
        images=64,
        schedules={
            "vae_crops": Schedule(20, 8, 1e-3, warmup_steps=5, mixed_precision="bf16", log_every=5),
            "vae_images": Schedule(5, 4, 2e-4, mixed_precision="bf16", log_every=5),
            "text_encoder": Schedule(20, 16, 1e-3, warmup_steps=5, log_every=5),
            "unet": Schedule(20, 16, 1e-3, warmup_steps=5, ema_decay=0.9, log_every=5),
        },
    ),
}


def pretrain(preset: Preset, folder: Path, work: Path, seed: int = 0, device: str = "cpu") -> StableDiffusionPipeline:
    """Train the whole pipeline and save it in `folder`, UNet and VAE in half precision, with a record, training.json.

    Checkpoints are kept in `work`; an interrupted training is continued from there. A stage has a folder named by a key
    of all that it depends on: one whose data, tokenizer or earlier stages are others starts anew. A pipeline in
    `folder` is replaced as a whole. Raises InputError for a folder with anything else in it, WriteError where nothing
    can be written, both before the training.
    """
    _check_folder(folder)
    vae, logs = train_vae(preset.schedules, preset.images, work, seed, device)
    tokenizer, text_encoder, logs["text_encoder"] = train_text_encoder(preset, work, seed, device)
    pipe, logs["unet"] = train_text_to_image(preset, vae, tokenizer, text_encoder, work, seed, device)
    record = {
        "seed": seed,
        "images": preset.images,
        "caption_error": preset.caption_error,
        "schedules": {name: asdict(schedule) for name, schedule in preset.schedules.items()},
        "minutes": {name: round(minutes(logs[name], schedule), 1) for name, schedule in preset.schedules.items()},
        "devices": {name: log[-1]["device"] for name, log in logs.items()},
        "versions": versions(),
        "commit": git_commit(),
        "loss": {name: [[row["step"], round(row["loss"], 5)] for row in _thinned(log)] for name, log in logs.items()},
    }
    save_pipeline(pipe, folder, json.dumps(record, indent=1))
    return pipe


def _check_folder(folder: Path) -> None:
    """Raise InputError for a folder that holds anything but a pipeline of `pretrain`, WriteError for a bad place."""
    check_place(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(there - FILES if "model_index.json" in there else there)
    if others:
        raise InputError(f"{folder}: has more in it than a pipeline, {others[0]}; name a new folder")


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path, record: str) -> None:
    """Save a pipeline, with UNet and VAE in half precision, and the record of its training, whole.

    The text encoder stays in float32: transformers keeps the dtype of a file, diffusers loads as float32 by default.
    The weights of `pipe` are rounded too. Raises RunError for weights that half precision cannot hold.
    """
    for part in (pipe.unet, pipe.vae):
        part.half()
    try:
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            check_finite(part.state_dict(), f"{type(part).__name__} in half precision")
        with whole_folder(folder) as temporary:
            pipe.save_pretrained(temporary)
            (temporary / "training.json").write_text(record, encoding="utf-8")
    finally:
        for part in (pipe.unet, pipe.vae):
            part.float()
    processes.wait()


def minutes(log: list[dict], schedule: Schedule) -> float:
    """The time of the logged steps, in minutes."""
    steps = [row["step"] for row in log]
    return sum(
        (step - before) * schedule.batch_size / row["images_per_s"] / 60
        for step, before, row in zip(steps, [0, *steps], log, strict=False)
    )


def _thinned(log: list[dict], rows: int = 200) -> list[dict]:
    return log[:: max(1, len(log) // rows)]


# ---------------------------------------------------------------------------------------------- text encoder


class CaptionReading(nn.Module):
    """Classify the scene from its caption: cross-entropy over the background and what is in each quarter.

    It takes the place of CLIP's contrastive training. Without it, UNet and text encoder trained together know the
    words long before they know which object stands where.
    """

    attributes: ClassVar = {
        "background": list(scenes.BACKGROUNDS),
        **{place.replace(" ", "_"): [*scenes.KINDS, None] for place in scenes.PLACES},  # None: nothing is there
    }

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in self.attributes.items()})

    @classmethod
    def classes(cls, scene: scenes.Scene) -> list[int]:
        """The class of each attribute of a scene, in the order of `attributes`."""
        shown = [scene.background, *(scene.kinds.get(place) for place in scenes.PLACES)]
        return [words.index(one) for words, one in zip(cls.attributes.values(), shown, strict=True)]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pooled = self.text_encoder(batch["input_ids"]).pooler_output  # (b, dim), the state at the end token
        logits = [head(pooled) for head in self.heads.values()]  # (b, classes) per attribute
        losses = [
            nn.functional.cross_entropy(scores, answer)
            for scores, answer in zip(logits, batch["classes"].unbind(1), strict=True)
        ]
        right = torch.stack([scores.argmax(1) for scores in logits], dim=1) == batch["classes"]  # (b, attributes)
        return torch.stack(losses).sum(), {"all_right": right.all(1).float().mean()}


def train_text_encoder(
    preset: Preset, folder: Path, seed: int = 0, device: str = "cpu"
) -> tuple[CLIPTokenizer, CLIPTextModel, list[dict]]:
    """Train the tokenizer, and the text encoder by `CaptionReading`, on captions of every style; both and the log."""
    data = [s for style in scenes.STYLES for s in scenes.sample_scenes(style, "train", preset.images // 2, seed)]
    rng = np.random.default_rng([seed, 1])
    captions = [c for s in data for c in scenes.captions(s, rng)]
    tokenizer = build_tokenizer(grammar_captions(seed))
    input_ids = tokenize(tokenizer, captions).view(len(data), -1, PROMPT_LENGTH)  # (n, 5, tokens)
    classes = torch.tensor([CaptionReading.classes(s) for s in data])  # (n, attributes)

    torch.manual_seed(seed)
    objective = CaptionReading(build_text_encoder(tokenizer)).to(device)

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        caption = torch.randint(input_ids.shape[1], (batch_size,), generator=generator)
        return {"input_ids": input_ids[rows, caption], "classes": classes[rows]}

    schedule = replace(preset.schedules["text_encoder"], seed=seed)
    key = cache_key(
        version=PRETRAINED,
        seed=seed,
        images=preset.images,
        art=scenes.drawing_fingerprint(),
        tokenizer=tokenizer_digest(tokenizer),
        plan=repr(schedule),
        processes=processes.in_series(),
    )
    log = train(objective, draw_batch, schedule, folder / f"text_encoder-{key}", device=device, title="text encoder")
    return tokenizer, objective.text_encoder, log


# ---------------------------------------------------------------------------------------------- text to image


class TextToImage(nn.Module):
    """The denoising objective for UNet and text encoder together (Rombach et al. 2022, eq. 3)."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = scheduler.alphas_cumprod

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        alpha, sigma = diffusion.alpha_sigma(self.alphas_cumprod, batch["timesteps"])
        x_t = diffusion.add_noise(batch["latents"], batch["eps"], alpha, sigma)  # (b, 4, h, w)
        prompt_embeds = self.text_encoder(batch["input_ids"])[0]  # (b, tokens, dim)
        output = self.unet(x_t, batch["timesteps"], prompt_embeds).sample
        target = diffusion.target_output(batch["latents"], batch["eps"], alpha, sigma, self.prediction_type)
        return diffusion.mean_squared_error(output, target), {}


def train_text_to_image(
    preset: Preset,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    folder: Path,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """Train text encoder and UNet on style noto, with dropped and wrong captions and EMA; the pipeline and the log."""
    data = scenes.sample_scenes("noto", "train", preset.images, seed)
    rng = np.random.default_rng(seed)
    captions = [scenes.captions(s, rng, preset.caption_error) for s in data]  # (n, 5)
    input_ids = tokenize(tokenizer, [c for five in captions for c in five]).view(len(data), -1, PROMPT_LENGTH)
    empty_ids = tokenize(tokenizer, [""])
    mean, std = encode_all(vae, draw_all(data), device)
    vae.register_to_config(scaling_factor=1 / float((mean.var() + std.square().mean()).sqrt()))

    starts = [digest(vae.state_dict()), digest(text_encoder.state_dict())]
    torch.manual_seed(seed)
    scheduler = build_scheduler()
    objective = TextToImage(text_encoder, build_unet(), scheduler).to(device)

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        caption = torch.randint(input_ids.shape[1], (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        noise = torch.randn(2, batch_size, *mean.shape[1:], generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        ids = input_ids[rows, caption]
        return {
            "latents": (mean[rows] + std[rows] * noise[0]) * vae.config.scaling_factor,
            "eps": noise[1],
            "timesteps": timesteps,
            "input_ids": torch.where(dropped[:, None], empty_ids, ids),
        }

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=objective.text_encoder,
        tokenizer=tokenizer,
        unet=objective.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    schedule = replace(preset.schedules["unet"], seed=seed)
    key = cache_key(
        version=PRETRAINED,
        seed=seed,
        images=preset.images,
        art=scenes.drawing_fingerprint(),
        starts=[tokenizer_digest(tokenizer), *starts],
        captions=[CAPTION_DROPOUT, preset.caption_error],
        plan=repr(schedule),
        processes=processes.in_series(),
    )
    place = folder / f"unet-{key}"
    log = train(objective, draw_batch, schedule, place, device=device, title="text encoder and UNet")
    return pipeline, log


def grammar_captions(seed: int) -> list[str]:
    """Captions of every style, enough to contain every word and template."""
    rng = np.random.default_rng(seed)
    return [
        c
        for style in scenes.STYLES
        for s in scenes.sample_scenes(style, "train", 2_000, seed)
        for c in scenes.captions(s, rng)
    ]
