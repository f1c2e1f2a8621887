"""Training the bundled pipeline from nothing: the VAE, then text encoder and UNet together (notebook 00).

The result has the folder layout of Stable Diffusion 1.5 and goes through the same code; only its size differs.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_distill import diffusion, scenes
from lora_distill.provenance import atomic_write, device_name, git_commit, versions
from lora_distill.training import Schedule, train

CROP_SIZE = 32
PROMPT_LENGTH = 24  # tokens; the longest caption has 16, start and end included
CAPTION_DROPOUT = 0.1  # of the captions are replaced by "", so that the model also learns the unconditional eps
# of the captions belong to another image, as on the web: a model that learns p(image | caption) well then draws
# something else as often, and guidance has something to mend. Only after `clean_steps`: with noise from the start, words
# take several times as long (after 1,750 steps 15 % of objects were right at w = 1, without noise 73 %).
CAPTION_NOISE = 0.2


@dataclass(frozen=True)
class Preset:
    """The sizes of a pretraining run; `full` made the bundle, `short` shows in a minute that the code trains."""

    images: int
    vae_crops: Schedule
    vae_images: Schedule
    unet: Schedule
    clean_steps: int  # of the UNet's steps before caption noise sets in


PRESETS = {
    "full": Preset(
        images=29_000,
        vae_crops=Schedule(
            4_800, 24, 1e-3, warmup_steps=100, final_learning_rate=0.2, beta2=0.99, mixed_precision="bf16"
        ),
        vae_images=Schedule(1_200, 8, 2e-4, warmup_steps=20, beta2=0.99, mixed_precision="bf16"),
        unet=Schedule(5_000, 64, 1e-3, warmup_steps=200, ema_decay=0.999, beta2=0.99, checkpoint_every=250),
        clean_steps=3_500,
    ),
    "short": Preset(
        images=64,
        vae_crops=Schedule(20, 8, 1e-3, warmup_steps=5, mixed_precision="bf16", log_every=5),
        vae_images=Schedule(5, 4, 2e-4, mixed_precision="bf16", log_every=5),
        unet=Schedule(20, 16, 1e-3, warmup_steps=5, ema_decay=0.9, log_every=5),
        clean_steps=10,
    ),
}


def pretrain(preset: Preset, folder: Path, work: Path, seed: int = 0, device: str = "cpu") -> StableDiffusionPipeline:
    """Train the whole pipeline and save it to `folder`, UNet and VAE in half precision, training.json beside them.

    Checkpoints are kept in `work`; a run that was interrupted goes on from there.
    """
    vae, vae_logs = train_vae(preset, work, seed, device)
    pipe, unet_log = train_text_to_image(preset, vae, work, seed, device)
    save_pipeline(pipe, folder)
    logs = {**vae_logs, "unet": unet_log}
    record = {
        "seed": seed,
        "images": preset.images,
        "clean_steps": preset.clean_steps,
        "schedules": {name: asdict(getattr(preset, name)) for name in logs},
        "minutes": {name: round(minutes(log, getattr(preset, name)), 1) for name, log in logs.items()},
        "device": device_name(device),
        "versions": versions(),
        "commit": git_commit(),
        "loss": {name: [[row["step"], round(row["loss"], 5)] for row in _thinned(log)] for name, log in logs.items()},
    }
    atomic_write(folder / "training.json", json.dumps(record, indent=1))
    return pipe


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save a pipeline with UNet and VAE in half precision.

    The text encoder stays in float32: transformers loads what it finds, where diffusers goes back to float32.
    """
    for part in (pipe.unet, pipe.vae):
        part.half()
    pipe.save_pretrained(folder)
    for part in (pipe.unet, pipe.vae):
        part.float()


def minutes(log: list[dict], schedule: Schedule) -> float:
    """How long the logged steps took."""
    steps = [row["step"] for row in log]
    return sum(
        (step - before) * schedule.batch_size / row["images_per_s"] / 60
        for step, before, row in zip(steps, [0, *steps], log, strict=False)
    )


def _thinned(log: list[dict], rows: int = 200) -> list[dict]:
    return log[:: max(1, len(log) // rows)]


# ---------------------------------------------------------------------------------------------- the parts


def build_vae() -> AutoencoderKL:
    """A x8 autoencoder with four latent channels, as Stable Diffusion's, at a thirtieth of the parameters."""
    return AutoencoderKL(
        sample_size=scenes.IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A small conditional UNet of Stable Diffusion's blocks on 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=scenes.IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # number of heads: diffusers kept SD 1.5's misnomer
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, with v-prediction and a sampler that starts from the last timestep."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text tower over the grammar's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are learnt from the captions: every word of the grammar is one token."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=2_000,  # more than the grammar needs: training stops when every word is one token
        end_of_word_suffix="</w>",
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=PROMPT_LENGTH)


# ---------------------------------------------------------------------------------------------- the VAE


class Reconstruction(nn.Module):
    """L1 + L2 reconstruction with a KL term that keeps the latents near a unit Gaussian (Rombach et al. 2022, §3.1)."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 5e-4):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * batch["noise"]
        difference = self.vae.decode(latents).sample.float() - images
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        reconstruction = difference.abs().mean() + difference.square().mean()
        return reconstruction + self.kl_weight * kl, {"reconstruction": reconstruction.detach(), "kl": kl.detach()}


def train_vae(
    preset: Preset, folder: Path, seed: int = 0, device: str = "cpu"
) -> tuple[AutoencoderKL, dict[str, list[dict]]]:
    """Train the VAE on scenes of every style, first on crops around the objects, then on whole images; with the logs.

    Two thirds of an image are flat background; crops of a quarter of the area around a sprite teach the same
    in a quarter of the time. The last steps see whole images, because group norms notice the difference.
    """
    torch.manual_seed(seed)
    objective = Reconstruction(build_vae().to(device))
    data = [s for style in scenes.STYLES for s in scenes.sample_scenes(style, "train", preset.images // 2, seed)]
    images = draw_all(data)
    centres = torch.tensor([s.positions for s in data])  # (n, 2, 2)

    def draw_crops(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        which = torch.randint(2, (batch_size,), generator=generator)
        jitter = torch.randint(-8, 9, (batch_size, 2), generator=generator)
        corners = (centres[rows, which] + jitter - CROP_SIZE // 2).clamp(0, scenes.IMAGE_SIZE - CROP_SIZE)
        crops = [
            images[row, :, y : y + CROP_SIZE, x : x + CROP_SIZE]
            for row, (x, y) in zip(rows.tolist(), corners.tolist(), strict=True)
        ]
        return {"images": torch.stack(crops), "noise": _latent_noise(batch_size, CROP_SIZE // 8, generator)}

    def draw_images(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        return {"images": images[rows], "noise": _latent_noise(batch_size, scenes.IMAGE_SIZE // 8, generator)}

    logs = {}
    for name, draw_batch in (("vae_crops", draw_crops), ("vae_images", draw_images)):
        schedule = replace(getattr(preset, name), seed=seed)
        title = name.replace("_", " on ")
        logs[name] = train(objective, draw_batch, schedule, folder / name, device=device, title=title)
    return objective.vae.eval(), logs


def draw_all(data: list[scenes.Scene]) -> Tensor:
    """Scenes as images (n, 3, 64, 64) uint8."""
    drawn = [scenes.draw(s) for s in tqdm(data, desc="drawing", mininterval=2, leave=False)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def _latent_noise(batch_size: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch_size, 4, side, side, generator=generator)


# ---------------------------------------------------------------------------------------------- text to image


class TextToImage(nn.Module):
    """The denoising objective with a text encoder that learns along (Rombach et al. 2022, eq. 3)."""

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
    preset: Preset, vae: AutoencoderKL, folder: Path, seed: int = 0, device: str = "cpu"
) -> tuple[StableDiffusionPipeline, list[dict]]:
    """Train text encoder and UNet on the base style, with caption dropout and EMA; the whole pipeline and the log."""
    data = scenes.sample_scenes("noto", "train", preset.images, seed)
    rng = np.random.default_rng(seed)
    captions = [scenes.captions(s, rng) for s in data]  # (n, 5)
    tokenizer = build_tokenizer(grammar_captions(seed))
    input_ids = tokenize(tokenizer, [c for five in captions for c in five]).view(len(data), -1, PROMPT_LENGTH)
    empty_ids = tokenize(tokenizer, [""])
    mean, std = encode_all(vae, draw_all(data), device)
    vae.register_to_config(scaling_factor=1 / float((mean.var() + std.square().mean()).sqrt()))

    torch.manual_seed(seed)
    scheduler = build_scheduler()
    objective = TextToImage(build_text_encoder(tokenizer), build_unet(), scheduler).to(device)

    def draw_batch(step: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        caption = torch.randint(input_ids.shape[1], (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        noise = torch.randn(2, batch_size, *mean.shape[1:], generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        mistaken = torch.rand(batch_size, generator=generator) < CAPTION_NOISE * (step >= preset.clean_steps)
        others = torch.randint(len(data), (batch_size,), generator=generator)
        ids = input_ids[torch.where(mistaken, others, rows), caption]
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
    schedule = replace(preset.unet, seed=seed)
    log = train(objective, draw_batch, schedule, folder / "unet", device=device, title="text encoder and UNet")
    return pipeline, log


def grammar_captions(seed: int) -> list[str]:
    """Captions enough, of every style, to hold every word of the grammar."""
    rng = np.random.default_rng(seed)
    return [
        c
        for style in scenes.STYLES
        for s in scenes.sample_scenes(style, "train", 2_000, seed)
        for c in scenes.captions(s, rng)
    ]


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as token ids, padded to the encoder's length: (n, tokens)."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt")
    return tokens.input_ids


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: Tensor, device: str, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of (n, 3, 64, 64) uint8 images, each (n, 4, 8, 8), unscaled."""
    parts = []
    for batch in tqdm(images.split(batch_size), desc="encoding", mininterval=2, leave=False):
        posterior = vae.encode(batch.to(device).float() / 127.5 - 1).latent_dist
        parts.append((posterior.mean.cpu(), posterior.std.cpu()))
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std
