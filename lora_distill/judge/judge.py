"""One judge for every sampler: the same prompts, the same noise, the same measure of alignment and reference images."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from lora_distill import processes
from lora_distill.data import scenes
from lora_distill.data.captioned import bundled_scenes, captioned_images, image_digests
from lora_distill.data.encoded import Framing, views
from lora_distill.data.pictures import picture_reader
from lora_distill.data.teacher import Prompts, captioned_prompts, scene_prompts
from lora_distill.errors import MissingError, reading
from lora_distill.fingerprint import fingerprint
from lora_distill.judge import distances
from lora_distill.judge.features import LAYERS, Features
from lora_distill.judge.metrics import FrechetDistance, Proportion, Score, aligner, compare
from lora_distill.judge.pictures import Pictures, batches, kept_pictures, pictures_key, slug, stored_pictures
from lora_distill.judge.reader import Verdicts
from lora_distill.pipeline import decode_latents, encode_prompts, to_uint8
from lora_distill.sampling import Sampler, initial_noise, sample, step_generators
from lora_distill.settings import Settings
from lora_distill.storage import cache_key, digest
from lora_distill.writing import atomic_write

JUDGED = 2  # version of sampled pictures, in the keys of their caches: raise it when they change
EXTRACTOR, FD = "EfficientNet-Lite0", "fd_efficientnet_lite0"
EARLY = (5, 10, 20, 40)  # updates after which a student is looked at beside the regular ones
COLUMNS = {"all": "all_correct", "content": "content", "clip": "clip_cosine", "": FD}  # of what counts, in tables


@dataclass(frozen=True)
class Quality:
    """What the judge found in the images of one sampler and one seed."""

    images: np.ndarray | Pictures  # (n, h, w, 3) uint8
    alignment: dict[str, Proportion | Score]  # by attribute of a scene; photographs have "clip", or nothing
    distance: FrechetDistance  # to the reference images of the judge
    key: str = "all"  # the alignment that counts; "" where there is none
    verdicts: Verdicts | None = None  # of the reader, image by image; None for photographs

    @property
    def right(self) -> np.ndarray | None:
        """Whether each image is right in what counts, (n,) bool; None for photographs."""
        return self.verdicts.right[self.key] if self.verdicts else None

    @property
    def object_share(self) -> np.ndarray | None:
        """The share of each image's asked objects that are in their place, (n,); None for photographs."""
        return self.verdicts.object_share if self.verdicts else None

    @property
    def fit_error(self) -> np.ndarray | None:
        """How far each image's objects are from clean ones, (n,) up to 1; None for photographs."""
        return self.verdicts.fit_error if self.verdicts else None

    @cached_property
    def features(self) -> Features:
        """Of the images, for `metrics.compare` with the judge's `reference` and for `metrics.fidelity`."""
        return self.distance.features(self.images)

    @cached_property
    def frechet_distance(self) -> float:
        """FD-EfficientNet-Lite0 to the reference images."""
        return distances.frechet_distance(self.features.frechet, self.distance.reference.frechet)

    @property
    def counted(self) -> Proportion | Score:
        """The alignment that counts; where photographs have no CLIP, the distance."""
        if self.key:
            return self.alignment[self.key]
        return Score(self.distance.name, self.frechet_distance, len(self.images))

    @property
    def column(self) -> str:
        """The column of what counts."""
        return COLUMNS[self.key]


class Judge:
    """Judges samplers on a fixed set of prompts against reference images of the same split.

    What the bundled scenes show is read exactly, and `key` names the attribute that counts, "all" or "content". Of
    other images a CLIP, `clip` is its folder or hub id, gives the cosine to their captions; without one the distance
    alone is judged. With `cache_dir` the features of the reference are kept there, and the pictures that were sampled:
    a long evaluation that was cut off goes on where it was. `layers` names more features than the Frechet distance
    needs.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        prompts: Prompts,
        reference: np.ndarray | Pictures,
        *,
        key: str = "all",
        cache_dir: Path | None = None,
        batch_size: int = 50,
        clip: str = "",
        layers: Iterable[str] | None = None,
    ):
        self.pipe = pipe
        self.prompts = prompts
        self.cache_dir = cache_dir
        self.batch_size = batch_size
        self.clip = "" if prompts.scenes else clip
        self.key = key if prompts.scenes else "clip" if clip else ""
        self.prompt_embeds = encode_prompts(pipe, prompts.captions)
        self.empty_embeds = encode_prompts(pipe, [""])
        self.align = aligner(prompts, clip, str(pipe.device), batch_size)
        self.frechet_distance = FrechetDistance(reference, str(pipe.device), cache_dir=cache_dir, layers=layers)

    def __call__(
        self, sampler: Sampler, seed: int, pipe: StableDiffusionPipeline | None = None, folder: Path | None = None
    ) -> Quality:
        """Sample the prompts from noise that depends on the seed alone, and judge the images.

        With a `folder` they are kept there, whatever else is cached.
        """
        return self.judge_images(self.images(sampler, seed, pipe, folder=folder))

    def images(
        self,
        sampler: Sampler,
        seed: int,
        pipe: StableDiffusionPipeline | None = None,
        count: int | None = None,
        folder: Path | None = None,
    ) -> np.ndarray | Pictures:
        """The images (n, h, w, 3) uint8 that are judged, or those of the first `count` prompts alone."""
        pipe, captions = pipe or self.pipe, self.prompts.captions[:count]
        noise, generators = initial_noise(pipe, len(captions), seed), step_generators(len(captions), seed)

        def make(rows: slice) -> np.ndarray:
            embeds = self.prompt_embeds[:count][rows], self.empty_embeds
            return decode_latents(pipe, sample(pipe, sampler, noise[rows], *embeds, generators[rows]), self.batch_size)

        if folder is None and (self.cache_dir is None or sampler.adapter):  # an adapter that plays may be in training
            parts = [slice(i, i + self.batch_size) for i in range(0, len(captions), self.batch_size)]
            bar = {"desc": "sampling", "mininterval": 2, "leave": False, "disable": not processes.is_main()}
            return np.concatenate([make(rows) for rows in tqdm(parts, **bar)])
        key = cache_key(
            version=JUDGED,
            pipeline=[fingerprint(pipe, sampler.adapter), type(pipe.unet).__name__, pipe.unet.device.type],
            captions=captions,
            sampler=repr(sampler),
            seed=seed,
        )
        return kept_pictures(folder or self.cache_dir / f"judged-{key}", key, len(captions), self.batch_size, make)

    def judge_images(self, images: np.ndarray | Pictures) -> Quality:
        """The judgement of images that are at hand, one a prompt."""
        return Quality(images, (found := self.align(images)).scores, self.frechet_distance, self.key, found.verdicts)

    def milestones(
        self, sampler: Sampler, steps: Sequence[int]
    ) -> tuple[Sequence[int], Callable[[int, StableDiffusionPipeline], dict], str]:
        """The `milestones` of a recipe: alignment and distance of the student after those updates, on seed 0."""

        def measure(step: int, student: StableDiffusionPipeline) -> dict[str, float]:
            quality = self(sampler, seed=0, pipe=student)
            clean = {"fit_error": quality.alignment["fit_error"].value} if quality.verdicts else {}
            return {quality.column: quality.counted.value, **clean, FD: quality.frechet_distance}

        depends_on = {"reference": digest(self.reference.rows), "captions": self.prompts.captions}
        depends_on |= {"clip": self.clip} if self.clip else {}
        return steps, measure, cache_key(sampler=repr(sampler), steps=list(steps), **depends_on)

    def distance_interval(self, quality: Quality, resamples: int = 100) -> tuple[float, float]:
        """The 95 % bootstrap interval of the Frechet distance over the images; the reference stays as it is."""
        rows, reference = quality.features.frechet, self.reference.frechet
        drawn = distances.resampled(distances.frechet_distance, rows, reference, resamples, seed=0)
        return distances.interval(quality.frechet_distance, drawn)

    @property
    def reference(self) -> Features:
        """The features of the reference images."""
        return self.frechet_distance.reference


def looked_at(settings: Settings) -> list[int]:
    """The updates of guided distillation after which its student is judged: most is learnt in the first forty."""
    steps = {0, *EARLY, *range(settings.eval_every, settings.train_steps, settings.eval_every), settings.train_steps}
    return sorted(step for step in steps if step <= settings.train_steps)


def judge_for(
    pipe: StableDiffusionPipeline, settings: Settings, source: str, split: str, count: int, key: str, cache_dir: Path
) -> Judge:
    """The judge of `count` prompts of a split of a source, as the settings say: see `held_out` and `Judge`.

    On the test split it keeps all features that the last notebook measures.
    """
    layers = LAYERS[EXTRACTOR] if split == "test" else None
    return Judge(
        pipe,
        *held_out(source, split, count, settings),
        key=key,
        cache_dir=cache_dir,
        batch_size=settings.eval_batch,
        clip=settings.clip,
        layers=layers,
    )


class Method(NamedTuple):
    """How a row of a table makes its images: a sampler on a pipeline, with one adapter a training folded into it.

    Of a method that trains whole UNets, `copies` are the pipelines of its further trainings.
    """

    sampler: Sampler
    pipe: StableDiffusionPipeline
    adapters: Sequence[str | None] = (None,)
    copies: Sequence[StableDiffusionPipeline] = ()

    @property
    def trainings(self) -> list[tuple[StableDiffusionPipeline, str | None]]:
        """Pipeline and adapter of each training."""
        return [*((self.pipe, adapter) for adapter in self.adapters), *((copy, None) for copy in self.copies)]


def judge_methods(
    judge: Judge,
    methods: dict[str, Method],
    seeds: Iterable[int],
    deploy: Callable[[StableDiffusionPipeline, str | None], StableDiffusionPipeline],
    folder: Path,
    notebook: str,
) -> dict[str, list[Quality]]:
    """Every method judged with every seed of sampling, on what `deploy(pipe, adapter)` makes of its pipeline.

    Each seed takes the next of a method's trainings, and the first again after the last. The pictures are kept in
    folder/images/<notebook>/<method>/<seed>, for later notebooks: see `load_images`.
    """
    judged, index = {}, {}
    for name, method in methods.items():
        places = [Path("images", notebook, slug(name), str(seed)) for seed in seeds]
        judged[name] = [
            judge(method.sampler, seed, deploy(*training), folder / place)
            for seed, training, place in zip(seeds, cycle(method.trainings), places, strict=False)
        ]
        found = zip(places, judged[name], strict=True)
        index[name] = [{"folder": p.as_posix(), "count": len(q.images), "key": q.images.key} for p, q in found]
    atomic_write(folder / f"{notebook}_images.json", json.dumps(index, indent=1))
    return judged


def distance_floor(distance: FrechetDistance, prompts: Prompts, seed: int) -> float | None:
    """The Frechet distance of as many scenes as there are prompts, drawn anew from the test split: real against real.

    None for photographs, whose reference holds all the real images there are.
    """
    return distance(drawn(prompts.scenes[0].style, "test", len(prompts), seed)) if prompts.scenes else None


def further_distances(
    methods: dict[str, list[np.ndarray | Pictures]],
    reference: np.ndarray | Pictures,
    sources: dict[str, str],
    *,
    device: str = "cpu",
    cache_dir: Path | None = None,
    seed: int = 0,
) -> list[dict]:
    """What `metrics.compare` finds on other extractors, a row a method and metric: mean and deviation over seeds.

    `methods` has the images (n, h, w, 3) uint8 of each seed, `sources` each extractor's weights, {"Inception": file}.
    Raises as `extractors.load_extractor` does.
    """
    rows = []
    for extractor, source in sources.items():
        layers = dict.fromkeys(layer for layer in LAYERS[extractor] if layer)
        judge = FrechetDistance(reference, device, extractor, source, cache_dir, layers)
        for method, seeds in methods.items():
            found = [compare(judge.features(images), judge.reference, seed=seed) for images in seeds]
            for metric, score in found[0].items():
                values = [scores[metric].value for scores in found]
                rows.append(
                    {"method": method, "metric": metric, "n": score.count, "seeds": len(seeds),
                     "reference_n": score.reference_count, "value": np.mean(values), "sd": deviation(values)}
                )  # fmt: skip
    return rows


def calibration(judge: Judge, split: str, seed: int) -> dict[str, float]:
    """Columns that say what a Frechet distance means: that of as many images as there are prompts, by their kind.

    `_floor`: other real images of the split. `_vae`: these after the VAE, the best that a sampler in latent space can
    do. `_other_style`: real images in the other drawing style. Empty for photographs, whose reference holds all the
    real images there are.
    """
    if not judge.prompts.scenes:
        return {}
    style, count = judge.prompts.scenes[0].style, len(judge.prompts)
    real = drawn(style, split, count, seed)
    (other,) = set(scenes.STYLES) - {style}
    kinds = {
        "floor": real,
        "vae": reconstructions(judge.pipe, real, judge.batch_size),
        "other_style": drawn(other, split, count, seed),
    }
    return {f"{FD}_{kind}": judge.frechet_distance(images) for kind, images in kinds.items()}


@torch.no_grad()
def reconstructions(pipe: StableDiffusionPipeline, images: np.ndarray, batch_size: int = 50) -> np.ndarray:
    """Images (n, h, w, 3) uint8 after the pipeline's VAE, of the same shape."""
    parts = []
    for part in batches(images, batch_size):
        pixels = torch.from_numpy(part).permute(0, 3, 1, 2).to(pipe.device, pipe.vae.dtype) / 127.5 - 1
        parts.append(pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor)
    return decode_latents(pipe, torch.cat(parts), batch_size)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (n - 1 in the denominator); None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def drawn(style: str, split: str, count: int, seed: int) -> np.ndarray:
    """Reference images of a split of the bundled world, (n, 64, 64, 3) uint8."""
    return np.stack([scenes.draw(scene) for scene in scenes.sample_scenes(style, split, count, seed)])


def held_out(source: str, split: str, count: int, settings: Settings) -> tuple[Prompts, np.ndarray | Pictures]:
    """`count` prompts of a split, and reference images (n, h, w, 3) uint8 to compare with.

    Of the bundled scenes ("scenes", in the settings' style, or "scenes/<style>/<size>"), 1,000 drawings of other scenes
    than the prompts'. Of photographs, as is usual, every image of the split, in the same framing as in training, read
    when it is needed.
    """
    if source == "scenes" or bundled_scenes(source):
        style, _ = bundled_scenes(source) or (settings.style, "")
        prompts = scene_prompts(style, split, count, settings.seed)
        return prompts, drawn(style, split, 1000, settings.seed + 1)
    images = captioned_images(source, split, skip_unusable=settings.skip_unusable)
    framing, picture = Framing(settings.resolution), picture_reader(images)

    def read(number: int) -> np.ndarray:
        return to_uint8(views(picture(number), framing, number)[0])[0]

    key = cache_key(images=list(image_digests(images)), framing=asdict(framing), pillow=PIL.__version__)
    return captioned_prompts(images, count, settings.seed), Pictures(len(images), read, key)


def load_images(folder: Path, notebook: str) -> dict[str, list[Pictures]]:
    """The pictures of each method, seed by seed, that `judge_methods` kept in a run's folder, read when needed.

    Raises FileNotFoundError where the notebook was not run.
    """
    path = folder / f"{notebook}_images.json"
    command = f"python -m lora_distill reproduce --profile {folder.name} --notebook {notebook}"
    if not path.exists():
        raise MissingError(f"no {path.name} in {folder}; {command} makes it")
    with reading(path, f"the index of pictures; {command} makes it again"):
        index = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: [(folder / one["folder"], int(one["count"]), one["key"]) for one in seeds]
                for name, seeds in index.items()}  # fmt: skip
    for place, _, key in (one for seeds in kept.values() for one in seeds):
        if pictures_key(place) != key:
            raise MissingError(f"{place}: not the pictures of {path.name}; {command} makes both")
    return {name: [stored_pictures(*one) for one in seeds] for name, seeds in kept.items()}
