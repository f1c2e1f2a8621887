"""The bundled pipeline's scores on 1,000 test prompts, and the model card that states them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from lora_distill.data import scenes
from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.errors import reading
from lora_distill.judge.metrics import Proportion, prompt_alignment
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline, to_uint8
from lora_distill.pretrain.text_to_image import CAPTION_DROPOUT, CAPTION_NOISE
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches
from lora_distill.storage import device_name, now
from lora_distill.writing import atomic_write

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0)
STEPS = 25
SEED = 0
NOTHING = dict.fromkeys(("all", "objects", "relation", "background", "style"), 0.0)
EMPTY = {  # scores that are not there yet, to see whether a card can be written
    "count": 1, "held_out_layouts": 0, "sampler": "", "seed": 0, "device": "", "guidance": {"1.0": NOTHING},
    "reconstruction": {"noto": 0.0, "fluent": 0.0},
}  # fmt: skip


def score(pipe: StableDiffusionPipeline, count: int = 1000) -> dict:
    """Share of test images that the reader reads right: VAE reconstructions, and samples at each guidance scale."""
    prompts = scene_prompts("noto", "test", count, SEED)
    curve = {w: _alignment(pipe, prompts, w) for w in GUIDANCE_SCALES}
    unseen = np.array([scene.layout in scenes.held_out_layouts() for scene in prompts.scenes])
    return {
        "count": count,
        "seed": SEED,
        "sampler": f"{type(pipe.scheduler).__name__}, {STEPS} steps",
        "device": device_name(str(pipe.device)),
        "scored": now(),
        "held_out_layouts": int(unseen.sum()),
        "reconstruction": {
            "noto": _reconstruction(pipe, "noto", count),
            "fluent": _reconstruction(pipe, "fluent", count),
        },
        "guidance": {str(w): {name: p.value for name, p in alignment.items()} for w, alignment in curve.items()},
    }


def _alignment(pipe: StableDiffusionPipeline, prompts: Prompts, guidance_scale: float) -> dict[str, Proportion]:
    noise = initial_noise(pipe, len(prompts), SEED)
    embeds, empty = encode_prompts(pipe, prompts.captions), encode_prompts(pipe, [""])
    sampler = Sampler(STEPS, guidance_scale)
    latents = sample_in_batches(pipe, sampler, noise, embeds, empty, SEED, title=f"w = {guidance_scale:g}")
    return prompt_alignment(decode_latents(pipe, latents), prompts.scenes)


@torch.no_grad()
def _reconstruction(pipe: StableDiffusionPipeline, style: str, count: int) -> float:
    """The share of drawn test images that the reader reads right after the VAE: the ceiling of all scores."""
    data = scenes.sample_scenes(style, "test", count, SEED)
    images = []
    for start in range(0, count, 50):
        pixels = torch.from_numpy(np.stack([scenes.draw(scene) for scene in data[start : start + 50]]))
        latents = pipe.vae.encode(pixels.to(pipe.device).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        images.append(to_uint8(pipe.vae.decode(latents).sample))
    return prompt_alignment(np.concatenate(images), data)["all"].value


def write(folder: Path, count: int = 1000) -> dict:
    """Score the pipeline in `folder` and write scores.json and its model card, README.md, there; return the scores.

    Raises MissingError or InputError, before anything is scored, where the record of its training is not whole.
    """
    record = folder / "training.json"
    with reading(record, "the record that pretrain writes beside a pipeline"):
        training = json.loads(record.read_text(encoding="utf-8"))
        render(training, EMPTY)
    scores = score(load_pipeline(str(folder)), count)
    atomic_write(folder / "scores.json", json.dumps(scores, indent=1))
    atomic_write(folder / "README.md", render(training, scores))
    return scores


def render(training: dict, scores: dict) -> str:
    """The model card as Markdown, from the contents of training.json and scores.json alone."""
    count = scores["count"]
    best = max(scores["guidance"], key=lambda w: scores["guidance"][w]["all"])
    gain = 100 * (scores["guidance"][best]["all"] - scores["guidance"]["1.0"]["all"])
    ceiling = {style: Proportion(value, count) for style, value in scores["reconstruction"].items()}
    rows = "\n".join(
        f"| {float(w):g} | {Proportion(a['all'], count)} | {100 * a['objects']:.1f} % | {100 * a['relation']:.1f} % "
        f"| {100 * a['background']:.1f} % | {100 * a['style']:.1f} % |"
        for w, a in scores["guidance"].items()
    )
    stages = "\n".join(
        f"| {name.replace('_', ' ')} | {plan['steps']:,} | {plan['batch_size']} "
        f"| {plan['steps'] * plan['batch_size']:,} | {plan['learning_rate']:g} | {training['minutes'][name]:g} |"
        for name, plan in training["schedules"].items()
    )
    return f"""# A small Stable Diffusion of emoji scenes

A pipeline in the folder layout of Stable Diffusion 1.5 for machines without a GPU or a network: 64 x 64 images of two
emoji in a relation on a pastel background, 8 x 8 x 4 latents, v-prediction on Stable Diffusion's noise schedule.
`StableDiffusionPipeline.from_pretrained` loads it as it is. It exists to study distillation and is good for nothing
else.

## Training

Data: {training["images"]:,} scenes of the bundled world (training split, base style Noto; the VAE saw both styles),
drawn from seed {training["seed"]}, five captions an image. One layout in eight is held out of training. The text
encoder first learnt to say from a caption, of either style, what its scene is, in place of CLIP's contrastive training,
and then learnt on with the UNet. Meanwhile {CAPTION_DROPOUT:.0%} of the captions were empty, which guidance needs, and
after {training["clean_steps"]:,} steps {CAPTION_NOISE:.0%} were another image's, as on the web, which guidance mends.
Notebook 00 with `pretrain: full`, or `python -m lora_distill pretrain --preset full`, makes it again.

| stage | steps | batch | images or captions seen | learning rate | minutes |
|---|---|---|---|---|---|
{stages}

Device: {training["device"]}. Versions: {", ".join(f"{k} {v}" for k, v in training["versions"].items())}.
Code: commit {training["commit"]}.

## Scores

{count:,} prompts of the test split, {scores["held_out_layouts"]} of them with held-out layouts, {scores["sampler"]},
seed {scores["seed"]}, float32, {scores["device"]}. "All correct" is the reader's verdict on objects, relation,
background and style together; intervals are 95 % Wilson. Ceiling, the reader on VAE reconstructions of drawn test
images: {ceiling["noto"]} (Noto), {ceiling["fluent"]} (Fluent).

| guidance w | all correct | objects | relation | background | style |
|---|---|---|---|---|---|
{rows}

Guidance matters here: w = 1 is {gain:.1f} points below w = {float(best):g}.

## Licences

Trained on renderings of Noto Emoji (Apache-2.0, Google) and Fluent Emoji (MIT, Microsoft); the weights are Apache-2.0.
"""
