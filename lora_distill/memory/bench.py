"""The command `bench`: our training steps beside those of public scripts, on this machine, in turns.

Each method first runs alone in a process, for its peak of memory and its operations. Then all of them take turns, round
by round, beside a matrix product that says what the machine can do; two methods are compared round by round. All is
float32, on pictures, captions and latents of random values: no time and no memory depends on them. What is timed is an
update: a batch drawn, forward, backward, AdamW and, where the recipe has one, the moving average. Reading and decoding
pictures is left out of the conventional steps, which scripts leave to other processes.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from lora_distill import processes, storage
from lora_distill.adapters import add_adapter, merged_copy, plain_copy
from lora_distill.arrays import mapped_rows
from lora_distill.data.encoded import EncodedImages, caption_dropout, consistency_batches, image_batches
from lora_distill.data.teacher import noised_batches, scene_prompts
from lora_distill.data.trajectories import KEPT, Trajectories, trajectory_batches
from lora_distill.devices import choose_device
from lora_distill.errors import InputError, MissingError, RunError
from lora_distill.judge.paired import seconds_ratio
from lora_distill.memory.benchmark import available, in_own_process
from lora_distill.memory.conventional import (
    ConventionalConsistency,
    ConventionalDenoising,
    ConventionalGuidance,
    PlainStep,
    token_ids,
    with_lora,
)
from lora_distill.memory.measure import Tracker
from lora_distill.memory.parts import does_not_fit
from lora_distill.pipeline import encode_prompts, load_pipeline
from lora_distill.settings import Settings
from lora_distill.train import recipes
from lora_distill.train.loop import peak_memory_mb
from lora_distill.train.objectives import (
    ConsistencyDistillation,
    Denoising,
    GuidanceDistillation,
    TrajectoryDistillation,
)
from lora_distill.train.step import Average, Schedule, TrainingStep, own_rows, step_generator

TABLE = "bench"  # its name without .csv, and that of its folder
COMMAND = "python -m lora_distill bench"
BATCH, ROUNDS, MINUTES = 16, 30, 3.5
STEPS = 2  # of a method in a round
ALONE = 3  # steps after which a peak of memory is read
CAPTIONS = 128  # of the data set, each of an image of its own
POINTS = 8  # of a trajectory of random values
SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices whose product is the measure of the machine
LEARNING_RATE = 1e-6  # of all: none diverges on random data
Batch = dict[str, Tensor]
Update = Callable[[], Any]  # one training step, its batch included; it returns the loss
Rows = list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------- what is trained on


@dataclass
class Data:
    """A pipeline and a data set of random values for it: pictures and captions, or what is cached of them.

    Cached latents and embeddings lie in files of `folder`, read row by row as in training; those of the teacher's
    images in memory, as `data.teacher` has them.
    """

    pipe: StableDiffusionPipeline
    settings: Settings
    folder: Path
    captions: int = CAPTIONS

    @property
    def timesteps(self) -> int:
        return self.pipe.scheduler.config.num_train_timesteps

    @property
    def latent(self) -> tuple[int, int, int]:
        side = self.settings.resolution // self.pipe.vae_scale_factor
        return self.pipe.unet.config.in_channels, side, side

    @property
    def embedding(self) -> tuple[int, int]:
        return self.pipe.tokenizer.model_max_length, self.pipe.unet.config.cross_attention_dim

    @cached_property
    def empty_embeds(self) -> Tensor:
        return encode_prompts(self.pipe, [""])

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        """A teacher set, as `data.teacher.teacher_set` gives it."""
        generator = torch.Generator().manual_seed(0)
        values = {"latents": self.latent, "prompt_embeds": self.embedding}
        drawn = {name: torch.randn(self.captions, *shape, generator=generator) for name, shape in values.items()}
        return drawn | {"empty_embeds": self.empty_embeds}

    @cached_property
    def encoded(self) -> EncodedImages:
        """Encoded images, as `data.encoded.encode_images` gives them, each with one caption."""
        shapes = {"posteriors": (1, 1, 2, *self.latent), "captions": self.embedding}
        arrays = [
            mapped_rows(self.folder / f"{name}-{self.captions}-{shape[-1]}.npy", (self.captions, *shape), 128,
                        partial(_random_rows, shape))
            for name, shape in shapes.items()
        ]  # fmt: skip
        first, mirrored = torch.arange(self.captions + 1), torch.zeros(self.captions, dtype=torch.bool)
        return EncodedImages(*arrays, first, mirrored, self.pipe.vae.config.scaling_factor, "random")

    @cached_property
    def recorded(self) -> Trajectories:
        """Guided trajectories, as `data.trajectories.trajectories` gives them, a few points each."""
        shape = (POINTS, KEPT, *self.latent)
        points = mapped_rows(self.folder / f"points-{self.captions}-{self.latent[-1]}.npy", (self.captions, *shape),
                             128, partial(_random_rows, shape))  # fmt: skip
        return Trajectories(points, self.encoded.prompt_embeds, torch.arange(POINTS) * 100 + 50, "random")

    def prepare(self) -> int:
        """Write the files of the encoded images, which other processes then find; return how many there are."""
        return len(self.encoded)

    def pictures(self, batch_size: int) -> Callable[[int, int, torch.Generator], Batch]:
        """A function that samples batches of pictures and captions, as a script's loader hands them over."""
        side, count_ = self.settings.resolution, 2 * batch_size
        images = torch.rand(count_, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        ids = token_ids(self.pipe, scene_prompts(self.settings.style, "train", count_, 0).captions)
        empty = token_ids(self.pipe, [""])

        def draw_batch(step: int, size: int, generator: torch.Generator) -> Batch:
            rows = torch.randint(count_, (size,), generator=generator)
            timesteps = torch.randint(self.timesteps, (size,), generator=generator)
            return {"images": images[rows], "ids": ids[rows], "empty_ids": empty.expand(size, -1),
                    "timesteps": timesteps}  # fmt: skip

        return draw_batch


def _random_rows(shape: tuple[int, ...], parts: list[slice]) -> Iterator[Tensor]:
    for part in parts:
        generator = torch.Generator().manual_seed(part.start)
        yield torch.randn(part.stop - part.start, *shape, generator=generator) / 4


# ---------------------------------------------------------------------------------------------- the methods


def conventional_guidance(data: Data) -> Update:
    settings, teacher = data.settings, data.pipe.unet
    student = plain_copy(teacher).requires_grad_(True).train()
    objective = ConventionalGuidance(data.pipe, student, teacher, settings.guidance_scale)
    return _by_script(objective, data.pictures(settings.batch_size), settings.batch_size, data)


def conventional_lcm_lora(data: Data) -> Update:
    settings, teacher = data.settings, data.pipe.unet
    student = with_lora(plain_copy(teacher), settings.lcm_rank, settings.lcm_targets)
    options = (data.empty_embeds, settings.ddim_skip, settings.huber_c)
    objective = ConventionalConsistency(data.pipe, student, teacher, *options)
    size = settings.lcm_batch_size
    draw_batch = consistency_batches(data.pictures(size), data.timesteps, settings.ddim_skip, *_one_scale(settings))
    return _by_script(objective, draw_batch, size, data)


def conventional_finetune(data: Data) -> Update:
    settings = data.settings
    student = with_lora(merged_copy(data.pipe.unet, None), settings.lora_rank, settings.lora_targets)
    size = settings.lcm_batch_size
    return _by_script(ConventionalDenoising(data.pipe, student), data.pictures(size), size, data)


def lora_guidance(data: Data) -> Update:
    """As `recipes.distil_lora`."""
    settings, teacher = data.settings, data.teacher
    student = _with_adapter(data, settings.lora_rank, settings.lora_targets)
    options = (data.pipe.scheduler, settings.guidance_scale, teacher["empty_embeds"])
    objective = GuidanceDistillation(student, student, *options)
    return _by_project(objective, noised_batches(teacher, data.timesteps), _plan(settings), data)


def lora_on_trajectories(data: Data) -> Update:
    """As `recipes.distil_on_trajectories`."""
    settings = data.settings
    student = _with_adapter(data, settings.lora_rank, settings.lora_targets)
    objective = TrajectoryDistillation(student, settings.guidance_scale)
    return _by_project(objective, trajectory_batches(data.recorded), _plan(settings), data)


def lcm_lora(data: Data) -> Update:
    """As `recipes.train_lcm_lora`, with its moving average."""
    settings = data.settings
    student = _with_adapter(data, settings.lcm_rank, settings.lcm_targets)
    options = (data.pipe.scheduler, data.empty_embeds, settings.ddim_skip, settings.huber_c)
    objective = ConsistencyDistillation(student, student, *options)
    batches = image_batches(data.encoded, data.timesteps)
    draw_batch = consistency_batches(batches, data.timesteps, settings.ddim_skip, *_one_scale(settings))
    plan = replace(_plan(settings), batch_size=settings.lcm_batch_size, ema_decay=settings.lcm_ema_decay)
    return _by_project(objective, draw_batch, plan, data)


def finetune(data: Data) -> Update:
    """As `recipes.finetune_lora`."""
    settings = data.settings
    objective = Denoising(_with_adapter(data, settings.lora_rank, settings.lora_targets), data.pipe.scheduler)
    batches = image_batches(data.encoded, data.timesteps)
    draw_batch = caption_dropout(batches, data.empty_embeds, settings.finetune_caption_dropout)
    plan = replace(_plan(settings), batch_size=settings.lcm_batch_size, ema_decay=0.0)
    return _by_project(objective, draw_batch, plan, data)


@dataclass(frozen=True)
class Method:
    """A way to train, and what it is compared with: the conventional one of the same subject, which stands first."""

    subject: str
    name: str
    build: Callable[[Data], Update]

    def __str__(self) -> str:
        return f"{self.subject}, {self.name}"


GUIDANCE, LCM_LORA, FINETUNE = "guided distillation", "LCM-LoRA", "LoRA fine-tune"
METHODS = (
    Method(GUIDANCE, "conventional: full copy, two UNets", conventional_guidance),
    Method(GUIDANCE, "LoRA on one W0", lora_guidance),
    Method(GUIDANCE, "LoRA on kept trajectories", lora_on_trajectories),
    Method(LCM_LORA, "conventional: two UNets", conventional_lcm_lora),
    Method(LCM_LORA, "on one W0", lcm_lora),
    Method(FINETUNE, "conventional", conventional_finetune),
    Method(FINETUNE, "latents and embeddings cached", finetune),
)


def _one_scale(settings: Settings) -> tuple[float, float]:
    return settings.guidance_scale, settings.guidance_scale


def _with_adapter(data: Data, rank: int, targets: str):
    """A UNet with an adapter around the weights of the pipeline's own, which are not copied."""
    student = merged_copy(data.pipe.unet, None)
    add_adapter(student, "student", rank=rank, alpha=rank, targets=targets)
    return student


def _plan(settings: Settings) -> Schedule:
    return replace(recipes.schedule(settings, LEARNING_RATE), gradient_accumulation=1, mixed_precision="no")


def _by_project(objective: nn.Module, draw_batch: Callable, plan: Schedule, data: Data) -> Update:
    """An update as `train.loop` makes it, of this process's rows of a batch."""
    step = TrainingStep(objective, plan, data.pipe.device)
    average = Average(step, objective, plan.ema_decay) if plan.ema_decay else None
    if average:
        average.hand_over()
    rows, numbers = own_rows(plan.batch_size), count()

    def update() -> Tensor:
        number = next(numbers)
        batch = draw_batch(number, plan.batch_size, step_generator(plan.seed, number))
        loss, _ = step({name: tensor[rows] for name, tensor in batch.items()})
        if average:
            average.step()
        return loss

    update.objective = objective
    return update


def _by_script(objective: nn.Module, draw_batch: Callable, batch_size: int, data: Data) -> Update:
    """An update as a script makes it."""
    step, device = PlainStep(objective.to(data.pipe.device), LEARNING_RATE), data.pipe.device
    generator, numbers = torch.Generator().manual_seed(0), count()

    def update() -> float:
        batch = draw_batch(next(numbers), batch_size, generator)
        return step({name: tensor.to(device) for name, tensor in batch.items()})

    update.objective = objective
    return update


# ---------------------------------------------------------------------------------------------- measuring


def settings_for(settings: Settings, device: str, batch: int) -> Settings:
    """A profile's settings as everything here is measured: in float32, every training with the same batch."""
    changed = {"device": device, "batch_size": batch, "lcm_batch_size": batch, "dtype": "float32"}
    return settings.model_copy(update=changed | {"mixed_precision": "no", "compile": False})


def check_one_process() -> None:
    """Raise InputError where several were started: each would have data of its own and time the others."""
    if processes.count() > 1:
        raise InputError("bench: expected one process; --growth starts two by itself")


def run(settings: Settings, rounds: int = ROUNDS, minutes: float = MINUTES) -> Rows:
    """Measure all methods with settings from `settings_for`, with PyTorch's threads of now; a row each.

    After `minutes` no further round is begun. Raises RunError where the machine cannot hold all methods side by side.
    """
    check_one_process()
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = Data(load(settings), settings, folder)
        data.prepare()
        alone = {}
        for number, method in enumerate(METHODS):
            options = (number, settings, torch.get_num_threads(), folder)
            found = in_own_process(sys.modules[__name__], "measure_alone", settings.device, *options)
            alone[method] = found
            print(f"{method}: {found.get('note') or _peak_in_words(found)}", flush=True)
        _check_room(list(alone.values()), settings.device)
        fitting = [method for method in METHODS if "note" not in alone[method]]
        timed, rates = in_turns(fitting, data, rounds, minutes)
    return rows_of(alone, timed, rates, settings)


def choose_threads(threads: int | None) -> int:
    """The number of threads to measure with; by default PyTorch's. Raises InputError for more than there are cores."""
    cores = psutil.cpu_count() or 1
    if threads is not None and threads > cores:
        raise InputError(f"--threads: this machine has {cores} core{'s' * (cores != 1)}, got {threads}")
    return threads or torch.get_num_threads()


def load(settings: Settings) -> StableDiffusionPipeline:
    """The pipeline of a run in float32."""
    return load_pipeline(settings.pipeline, settings.device, torch.float32, settings.resolution)


def measure_alone(number: int, settings: Settings, threads: int, folder: Path) -> dict[str, Any]:
    """Peak memory of a method in this process, which is its own, in MB, and the operations of one step.

    What the machine cannot hold comes back as a `note`.
    """
    torch.set_num_threads(threads)
    try:
        choose_device(settings.device)  # a GPU by number becomes this process's own
        update = METHODS[number].build(Data(load(settings), settings, folder))
        for _ in range(ALONE):
            update()
        peak = peak_memory_mb(torch.device(settings.device))
        with Tracker() as tracker:
            update()
    except RuntimeError as error:
        return {"note": does_not_fit(error)}
    return {"peak_mb": peak, "flops": tracker.flops}


def _peak_in_words(found: dict[str, Any]) -> str:
    peak = "peak not known" if found["peak_mb"] is None else f"peak {found['peak_mb']:,.0f} MB"
    return f"{peak}, {found['flops'] / 1e9:.1f} GFLOP a step"


def _check_room(alone: Sequence[dict[str, Any]], device: str) -> None:
    """Raise RunError where the methods do not fit side by side; what the least of them takes, all share."""
    peaks = [1e6 * found["peak_mb"] for found in alone if found.get("peak_mb")]
    if not peaks:
        return
    needed, free = max(peaks) + sum(peak - min(peaks) for peak in peaks), available(device)
    if needed > free:
        raise RunError(
            f"the methods side by side need about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; a smaller "
            "--batch or pipeline would do"
        )


def in_turns(
    methods: Sequence[Method], data: Data, rounds: int, minutes: float
) -> tuple[dict[Method, list[tuple[float, float]]], list[float]]:
    """Seconds of a step of each method, (on the clock, of the process's CPU) a round, and rates of matrix products.

    A first round warms up and is not counted. Every other round goes through the methods backwards.
    """
    updates = {method: method.build(data) for method in methods}
    timed: dict[Method, list[tuple[float, float]]] = {method: [] for method in methods}
    rates: list[float] = []
    device, start = str(data.pipe.device), time.monotonic()
    options = {"desc": "rounds", "mininterval": 2, "file": sys.stdout, "ncols": 100, "disable": not processes.is_main()}
    for number in tqdm(range(1 + rounds), **options):
        if number > 3 and time.monotonic() - start > 60 * minutes:
            break
        for method in methods if number % 2 else reversed(methods):
            seconds = timed_steps(updates[method], STEPS, device)
            if number:
                timed[method].append(seconds)
        rates += [matrix_product_rate(device)] if number else []
    return timed, rates


def timed_steps(update: Update, steps: int, device: str) -> tuple[float, float]:
    """Seconds of a step on the clock and of the process's CPU, a mean over some steps."""
    _synchronise(device)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        update()
    _synchronise(device)
    return (time.perf_counter() - start) / steps, (time.process_time() - cpu) / steps


def matrix_product_rate(device: str, products: int = 3) -> float:
    """Operations a second in a product of float32 matrices, the best of a few; on a GPU in TF32, as training has it."""
    side = SIDE[torch.device(device).type]
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    seconds = [timed_steps(lambda: left @ right, 1, device)[0] for _ in range(products)]
    return 2 * side**3 / min(seconds)


def _synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------------------------------------- the table


def rows_of(
    alone: dict[Method, dict[str, Any]],
    timed: dict[Method, list[tuple[float, float]]],
    rates: list[float],
    settings: Settings,
) -> Rows:
    """A row a method: seconds with quartiles, times as fast as the conventional one with its interval, share of the
    machine's rate, peak memory. What was not timed has its note.
    """
    first = {method.subject: method for method in reversed(METHODS)}
    rows = []
    for method, found in alone.items():
        row = {
            "subject": method.subject,
            "method": method.name,
            "batch": settings.batch_size,
            "resolution": settings.resolution,
            "rounds": len(timed.get(method, ())),
            "steps_a_round": STEPS,
        }
        row |= _times(timed.get(method), timed.get(first[method.subject]), settings.batch_size)
        row |= _share(found, row["seconds_a_step"], rates)
        machine = {
            "device": settings.device.partition(":")[0],
            "machine": storage.device_name(settings.device),
            "threads": torch.get_num_threads(),
            "torch": storage.versions()["torch"],
        }
        rows.append({name: _digits(value) for name, value in (row | machine).items()} | {"note": found.get("note")})
    return rows


def _times(timed: list[tuple[float, float]] | None, reference: list[tuple[float, float]] | None, batch: int) -> dict:
    names = ("seconds_a_step", "lower_quartile", "upper_quartile", "cpu_seconds_a_step", "images_per_s")
    ratios = ("times_as_fast", "times_as_fast_low", "times_as_fast_high")
    if not timed:
        return dict.fromkeys((*names, *ratios))
    seconds, cpu = ([each[i] for each in timed] for i in (0, 1))
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    row = dict(zip(names, (middle, low, high, median(cpu), batch / middle), strict=True))
    if not reference:
        return row | dict.fromkeys(ratios)
    ratio = seconds_ratio(seconds, [each[0] for each in reference])
    return row | dict(zip(ratios, (1 / ratio.value, 1 / ratio.high, 1 / ratio.low), strict=True))


def _share(found: dict[str, Any], seconds: float | None, rates: list[float]) -> dict[str, float | None]:
    flops, rate = found.get("flops"), median(rates) if rates else None
    share = 100 * flops / seconds / rate if flops and seconds and rate else None
    return {"gflop_a_step": flops and flops / 1e9, "matrix_product_gflops": rate and rate / 1e9,
            "share_of_rate_percent": share, "peak_mb": found.get("peak_mb")}  # fmt: skip


def _digits(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


COLUMNS = {  # of the table in words: what stands above, and how a row says it
    "training": lambda row: row["subject"],
    "step": lambda row: row["method"],
    "images/s": lambda row: f"{row['images_per_s']:.3g}",
    "times as fast": lambda row: (
        f"{row['times_as_fast']:.2f} ({row['times_as_fast_low']:.2f} to {row['times_as_fast_high']:.2f})"
    ),
    "peak, MB": lambda row: f"{row['peak_mb']:,.0f}",
    "of the matrix product's rate": lambda row: f"{row['share_of_rate_percent']:.0f} %",
}


def as_markdown(rows: Rows) -> str:
    """The table in Markdown, and below it in a line what it rests on."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([_cell(say, row) for say in COLUMNS.values()] for row in rows)]
    row = rows[0]
    basis = (
        f"Batch {row['batch']}, {row['resolution']} px, float32, {row['rounds']} rounds of {row['steps_a_round']} "
        f"steps; {row['machine']}, torch {row['torch']}."
    )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", basis])


def read(folders: Sequence[Path]) -> Rows:
    """The rows of the first of some folders that has the table. Raises MissingError where none has, InputError for
    another table.
    """
    for folder in folders:
        if (path := folder / f"{TABLE}.csv").exists():
            rows = storage.read_table(path)
            if not rows or "times_as_fast" not in rows[0]:
                raise InputError(f"{path}: expected the table of {COMMAND}; delete it, and the command writes it again")
            return rows
    raise MissingError(f"{folders[0]}: no {TABLE}.csv; {COMMAND} measures it")


def _cell(say: Callable[[dict], str], row: dict[str, Any]) -> str:
    try:
        return say(row)
    except TypeError:  # what was not measured
        return row["note"] or "not measured"
