"""The bundled pipeline's scores on 1,000 test prompts, and the model card that states them."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from lora_distill.data import scenes
from lora_distill.data.teacher import Prompts, scene_prompts
from lora_distill.errors import reading
from lora_distill.judge.metrics import Proportion
from lora_distill.judge.reader import Verdicts, judge_images
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline, to_uint8
from lora_distill.pretrain.text_to_image import CAPTION_DROPOUT
from lora_distill.sampling import Sampler, initial_noise, sample_in_batches
from lora_distill.storage import device_name, now
from lora_distill.writing import atomic_write

GUIDANCE_SCALES = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0)
STEPS = 25
SEED = 0
SEEN = {str(n): f"{n}, seen" for n in scenes.COUNTS}  # number of objects: the group of those without a held-out one
NOTHING = dict.fromkeys(("n", "all", "objects", "background", "style", "object_share", "fit_error"), 1.0)
EMPTY = {  # scores that are not there yet, to see whether a card can be written
    "count": 1, "unseen": 0, "sampler": "", "seed": 0, "device": "",
    "guidance": {"1.0": dict.fromkeys(("all", "seen", "unseen", *map(str, scenes.COUNTS), *SEEN.values()), NOTHING)},
    "reconstruction": {"noto": {"all": NOTHING, "4": NOTHING}, "fluent": {"all": NOTHING, "4": NOTHING}},
}  # fmt: skip


def score(pipe: StableDiffusionPipeline, count: int = 1000, split: str = "test") -> dict:
    """What the reader says of VAE reconstructions, and of samples at each guidance scale, by number of objects."""
    prompts = scene_prompts("noto", split, count, SEED)
    return {
        "count": count,
        "seed": SEED,
        "sampler": f"{type(pipe.scheduler).__name__}, {STEPS} steps",
        "device": device_name(str(pipe.device)),
        "scored": now(),
        "unseen": sum(scene.unseen for scene in prompts.scenes),
        "reconstruction": {style: _reconstruction(pipe, style, count) for style in scenes.STYLES},
        "guidance": {str(w): _sampled(pipe, prompts, w) for w in GUIDANCE_SCALES},
    }


def _sampled(pipe: StableDiffusionPipeline, prompts: Prompts, guidance_scale: float) -> dict[str, dict[str, float]]:
    noise = initial_noise(pipe, len(prompts), SEED)
    embeds, empty = encode_prompts(pipe, prompts.captions), encode_prompts(pipe, [""])
    sampler = Sampler(STEPS, guidance_scale)
    latents = sample_in_batches(pipe, sampler, noise, embeds, empty, SEED, title=f"w = {guidance_scale:g}")
    return _by_count(judge_images(decode_latents(pipe, latents), prompts.scenes), prompts.scenes)


def _by_count(verdicts: Verdicts, data: list[scenes.Scene]) -> dict[str, dict[str, float]]:
    """The means of what is measured: of all images, by number of objects, by seen and unseen ones, and by both."""
    unseen, objects = np.array([scene.unseen for scene in data]), np.array([scene.count for scene in data])
    groups = {"all": unseen | True, **{str(n): objects == n for n in scenes.COUNTS}, "seen": ~unseen, "unseen": unseen}
    groups |= {SEEN[str(n)]: (objects == n) & ~unseen for n in scenes.COUNTS}
    columns = {**verdicts.right, "object_share": verdicts.object_share, "fit_error": verdicts.fit_error}
    return {
        name: {"n": int(rows.sum()), **{column: float(values[rows].mean()) for column, values in columns.items()}}
        for name, rows in groups.items()
        if rows.any()
    }


@torch.no_grad()
def _reconstruction(pipe: StableDiffusionPipeline, style: str, count: int) -> dict[str, dict[str, float]]:
    """What the reader says of drawn test images after the VAE: the ceiling of all scores."""
    data = scenes.sample_scenes(style, "test", count, SEED)
    images = []
    for start in range(0, count, 50):
        pixels = torch.from_numpy(np.stack([scenes.draw(scene) for scene in data[start : start + 50]]))
        latents = pipe.vae.encode(pixels.to(pipe.device).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        images.append(to_uint8(pipe.vae.decode(latents).sample))
    return _by_count(judge_images(np.concatenate(images), data), data)


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
    count, guidance = scores["count"], {float(w): groups for w, groups in scores["guidance"].items()}
    best = max(guidance, key=lambda w: guidance[w]["all"]["all"])
    gains = {n: 100 * (guidance[best][SEEN[n]]["all"] - guidance[1.0][SEEN[n]]["all"]) for n in ("1", "4")}
    predicted = " | ".join(f"{100 * (1 - 23 / 24 * training['caption_error']) ** n:.0f} %" for n in scenes.COUNTS)
    ceilings = ", ".join(
        f"{_share(found['all'])} ({style}; {_share(found['4'])} at four objects)"
        for style, found in scores["reconstruction"].items()
    )
    rows = "\n".join(_card_row(w, groups) for w, groups in guidance.items())
    stages = "\n".join(
        f"| {name.replace('_', ' ')} | {plan['steps']:,} | {plan['batch_size']} "
        f"| {plan['steps'] * plan['batch_size']:,} | {plan['learning_rate']:g} | {training['minutes'][name]:g} "
        f"| {training['devices'][name]} |"
        for name, plan in training["schedules"].items()
    )
    return f"""# A small Stable Diffusion of emoji scenes

A pipeline in the folder layout of Stable Diffusion 1.5 for machines without a GPU or a network: 64 x 64 images of one
to four emoji, each in its own quarter of a pastel background, 8 x 8 x 4 latents, v-prediction on Stable Diffusion's
noise schedule. `StableDiffusionPipeline.from_pretrained` loads it as it is. It exists to study distillation and is good
for nothing else.

## Training

Data: {training["images"]:,} scenes of the bundled world (training split, base style Noto; the VAE saw both styles),
drawn from seed {training["seed"]}, five captions an image. One (object, place) in eight is held out of training. The
text encoder first learnt to say from a caption, of either style, what each quarter shows, in place of CLIP's
contrastive training, and then learnt on with the UNet. Meanwhile {CAPTION_DROPOUT:.0%} of the captions were empty,
which guidance needs.

**The captions have errors, on purpose.** While the UNet was trained, each object of a caption was named at random with
probability p = {training["caption_error"]:g}, as captions on the web are wrong. A model that learns this draws wrong
objects as often, and guidance mends it. Without such errors guidance would have nothing to mend here.

Notebook 00 with `pretrain: full`, or `python -m lora_distill pretrain --preset full`, makes it again.

| stage | steps | batch | images or captions seen | learning rate | minutes | on |
|---|---|---|---|---|---|---|
{stages}

Versions: {", ".join(f"{k} {v}" for k, v in training["versions"].items())}.
Code: commit {training["commit"]}.

## Scores

{count:,} prompts of the test split, each number of objects equally often, {scores["unseen"]} of them with a held-out
(object, place); {scores["sampler"]}, seed {scores["seed"]}, float32, {scores["device"]}. "All right" is the reader's
verdict on objects, places, background and style together, in per cent of the images; intervals are 95 % Wilson. The
columns by number of objects are of prompts without a held-out (object, place). "Objects" is the share of single objects
that are right, "error" how far they are from a drawn one (0 is clean). Ceiling, all right on VAE reconstructions of
drawn test images: {ceilings}.

| guidance w | all right | 1 object | 2 | 3 | 4 | seen | held out | objects | error |
|---|---|---|---|---|---|---|---|---|---|
{rows}

The errors of the captions alone would leave at w = 1, (1 − 23p/24)^n for n objects: | {predicted} |.
Guidance matters here: w = 1 is {gains["1"]:.1f} points below w = {best:g} at one object, {gains["4"]:.1f} at four.

## Licences

Trained on renderings of Noto Emoji (Apache-2.0, Google) and Fluent Emoji (MIT, Microsoft); the weights are Apache-2.0.
"""


def _share(found: dict[str, float]) -> str:
    return str(Proportion(found["all"], int(found["n"])))


def _card_row(guidance_scale: float, groups: dict[str, dict[str, float]]) -> str:
    """A row of the card: all right by number of objects without held-out ones, and the measures of single objects."""
    parts = " | ".join(f"{100 * groups[name]['all']:.1f}" for name in (*SEEN.values(), "seen", "unseen"))
    everything = groups["all"]
    return (
        f"| {guidance_scale:g} | {_share(everything)} | {parts} | {100 * everything['object_share']:.1f} "
        f"| {everything['fit_error']:.3f} |"
    )
