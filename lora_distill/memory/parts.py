"""What the command `measure` measures: parts that each run alone in a process, on real tensors with random values.

A process of its own gives each part a clean peak, and gives its memory back. A part returns plain numbers: bytes, and
seconds of every repeat. `lora_distill.memory.benchmark` chooses the parts and writes their tables.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psutil
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lora_distill import storage
from lora_distill.judge.timing import time_samplers
from lora_distill.memory.conventional import ConventionalGuidance, token_ids
from lora_distill.memory.measure import Peak, Tracker, assign, measure_cuda
from lora_distill.memory.schemes import Setup, find_scheme
from lora_distill.memory.steps import Step, prepare
from lora_distill.pipeline import decode_latents, encode_prompts, load_pipeline
from lora_distill.sampling import Sampler, initial_noise, sample
from lora_distill.shapes import unet_config
from lora_distill.train.step import Schedule, TrainingStep

GUIDANCE = 7.5  # of the two works; no time and no memory depends on it
PROMPT = "a brown dog"
QUICK = 5.0  # seconds: a training step that takes no longer is timed twice
SAMPLERS = {  # what an image takes: steps, and the pass of each
    "guided teacher, 25 steps": (25, "guided_pass"),
    "one-pass student, 25 steps": (25, "one_pass"),
    "guided teacher, 50 steps": (50, "guided_pass"),
    "one-pass student, 50 steps": (50, "one_pass"),
    "LCM-LoRA, 4 steps": (4, "lcm_pass"),
}
WHOLE = {name: pass_ for name, pass_ in SAMPLERS.items() if pass_[0] != 50}  # images that a GPU makes whole

ON_ONE_W0 = ("lora_distillation_shared", "lcm_lora_shared")  # our training, beside the conventional step


@dataclass(frozen=True)
class Part:
    """One measurement. `step`: memory and seconds of a scheme's step; `passes`: seconds of what an image is made of;
    `images`: seconds of whole images; `training`: images a second of three ways to train, in turns.

    `name` is a scheme of `schemes`, or a sampler of SAMPLERS; empty where one part measures several.
    """

    kind: Literal["step", "passes", "images", "training"]
    name: str = ""
    batch: int = 1
    resolution: int = 512
    precision: str = "float32"  # one of schemes.PRECISIONS for a step, else a dtype
    repeats: int = 1

    @property
    def setup(self) -> Setup:
        """The setting of a step: AdamW is fused, as training runs it."""
        return Setup(self.batch, self.resolution, precision=self.precision, optimizer="adamw-fused")

    def __str__(self) -> str:
        what = {"passes": "passes of an image", "images": "whole images", "training": "images a second in training"}
        name = ", ".join(filter(None, (what.get(self.kind), self.name)))
        return f"{name}, {self.resolution} px, batch {self.batch}, {self.precision}"


def measure(part: Part, pipeline: str, device: str) -> dict[str, Any]:
    """Run one part; `pipeline` as in `load_pipeline`. What a machine cannot hold comes back as a `note`."""
    run = {"step": _step, "passes": _passes, "images": _images, "training": _training}[part.kind]
    before = psutil.Process().memory_info().rss
    try:
        found = run(part, pipeline, device)
    except RuntimeError as error:
        return {"note": does_not_fit(error)}
    return found | {"threads": torch.get_num_threads(), "resident_before": before}


def does_not_fit(error: RuntimeError) -> str:
    """A note on memory that was not there; any other error is raised again."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit: the device ran out of memory"
    if "allocate memory" not in str(error):  # of the allocator of the CPU
        raise error
    return "does not fit: the machine ran out of memory"


# ---------------------------------------------------------------------------------------------- a scheme's step


def _step(part: Part, pipeline: str, device: str) -> dict[str, Any]:
    """Bytes at the peak of a step, and the seconds of the next one; of a larger batch on a CPU the bytes alone."""
    config, scheme = unet_config(pipeline), find_scheme(part.name)
    if device != "cpu":
        live, reserved = measure_cuda(scheme, part.setup, config, device)
        step = prepare(scheme, part.setup, config, device)
        for unet in step.unets:
            fill_randomly(unet)  # a GPU runs faster on zeros, which take less power
        seconds = _timed_steps(step, random_inputs(step, part.batch), device, warm_ups=2, repeats=max(part.repeats, 3))
        return {"live": live, "reserved": reserved, "seconds": seconds}
    step = prepare(scheme, part.setup, config, device)
    for unet in step.unets:
        fill_randomly(unet)
    inputs = random_inputs(step, part.batch)
    peak = _tracked(step, inputs)
    seconds = _timed_steps(step, inputs, device, warm_ups=0, repeats=1) if part.batch == 1 else []
    if seconds and seconds[0] < QUICK:
        seconds += _timed_steps(step, inputs, device, warm_ups=0, repeats=1)
    resident = storage.resident_peak_mb()
    return {"live": peak.total, "terms": peak.terms, "resident": resident and 1e6 * resident, "seconds": seconds}


def _tracked(step: Step, inputs: dict[str, Tensor]) -> Peak:
    """The first step: the live bytes of its tensors at their peak."""
    with Tracker() as tracker:
        assign(step, tracker)
        tracker.reset()
        step.run(inputs)
    return Peak(tracker.peak, tracker.flops)


def _timed_steps(
    step: Step | Callable, inputs: dict[str, Tensor], device: str, *, warm_ups: int, repeats: int
) -> list[float]:
    run = step.run if isinstance(step, Step) else step
    return [_seconds(lambda: run(inputs), device)[1] for _ in range(warm_ups + repeats)][warm_ups:]


@torch.no_grad()
def fill_randomly(module: nn.Module) -> None:
    """Give every parameter random values of the size of trained ones, so that its memory is really written.

    Zeros are memory that the system promises and does not give. One block of random numbers serves for all.
    """
    block = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    for p in module.parameters():
        flat = p.view(-1)
        for part in flat.split(len(block)):
            part.copy_(block[: len(part)])


def random_inputs(step: Step, batch: int) -> dict[str, Tensor]:
    """A step's inputs with random numbers for latents, noise and prompts."""
    inputs = step.inputs(batch)
    for name in ("latents", "eps", "prompt_embeds"):
        inputs[name] = torch.randn_like(inputs[name])
    return inputs


# ---------------------------------------------------------------------------------------------- images


def _passes(part: Part, pipeline: str, device: str) -> dict[str, Any]:
    """Seconds of text encoder, UNet passes and decoder, in turns after one round that warms up.

    A folded adapter leaves the layers of W0, so W0 stands for the student. In 16 bits on a CPU a pass is first
    compared with one in float32, and nothing more is timed where it is no quicker.
    """
    pipe = load_pipeline(pipeline, device, torch.float32 if device == "cpu" else getattr(torch, part.precision))
    note = ""
    if device == "cpu" and part.precision != "float32":
        seconds = []
        for dtype in (torch.float32, getattr(torch, part.precision)):
            pipe.to(dtype)
            one_pass = image_parts(pipe, part)["one_pass"]
            seconds.append([_seconds(one_pass, device)[1] for _ in range(2)][1])
        note = f"a pass takes {seconds[1]:.3g} s, in float32 {seconds[0]:.3g} s"
        if seconds[1] >= seconds[0]:
            return {"note": f"{part.precision} is no quicker here: {note}"}
    calls = image_parts(pipe, part)
    rounds = [{name: _seconds(call, device)[1] for name, call in calls.items()} for _ in range(1 + part.repeats)][1:]
    return {"seconds": {name: [each[name] for each in rounds] for name in calls}, "remark": note}


def image_parts(pipe: StableDiffusionPipeline, part: Part) -> dict[str, Callable[[], Any]]:
    """What an image is made of, by name: each pass is a sampler's own step."""
    noise = initial_noise(pipe, part.batch, seed=0, resolution=part.resolution)
    prompts = [PROMPT] * part.batch
    embeds, empty = encode_prompts(pipe, prompts), encode_prompts(pipe, [""])
    generators = [torch.Generator().manual_seed(i) for i in range(part.batch)]

    def one_step(**sampler: Any) -> Callable[[], Tensor]:
        return lambda: sample(pipe, Sampler(1, **sampler), noise, embeds, empty, generators)

    return {
        "text": lambda: encode_prompts(pipe, prompts),
        "text_guided": lambda: (encode_prompts(pipe, prompts), encode_prompts(pipe, [""])),
        "guided_pass": one_step(guidance_scale=GUIDANCE),
        "one_pass": one_step(),
        "lcm_pass": one_step(scheduler="lcm"),
        "decoder": lambda: decode_latents(pipe, noise, part.batch),
    }


def _images(part: Part, pipeline: str, device: str) -> dict[str, Any]:
    """Seconds an image from prompt to pixels, by sampler, in turns; on a CPU of one sampler, after one warm pass."""
    pipe = load_pipeline(pipeline, device, getattr(torch, part.precision))
    names = [part.name] if part.name else list(WHOLE)
    contestants = {name: (pipe, _sampler(name)) for name in names}
    if device == "cpu":
        image_parts(pipe, part)["one_pass"]()
    timings = time_samplers(
        contestants, [PROMPT] * part.batch, part.repeats, part.resolution, warm_ups=int(device != "cpu")
    )
    return {"images": {name: asdict(timing) for name, timing in timings.items()}}


def _sampler(name: str) -> Sampler:
    steps, pass_ = SAMPLERS[name]
    return Sampler(
        steps, GUIDANCE if pass_ == "guided_pass" else 1.0, scheduler="lcm" if pass_ == "lcm_pass" else "own"
    )


# ---------------------------------------------------------------------------------------------- training on a GPU


def _training(part: Part, pipeline: str, device: str) -> dict[str, Any]:
    """Seconds of a step of guided distillation and of LCM-LoRA on one W0, and of the conventional step, in turns."""
    runs = {"conventional, as scripts run it": _conventional(part, pipeline, device)}
    for name in ON_ONE_W0:
        step = prepare(find_scheme(name), replace(part.setup, precision="16-bit"), unet_config(pipeline), device)
        for unet in step.unets:
            fill_randomly(unet)
        runs[name] = (step, random_inputs(step, part.batch))
    seconds = {name: [] for name in runs}
    for repeat in range(2 + part.repeats):
        for name, (run, inputs) in runs.items():
            taken = _timed_steps(run, inputs, device, warm_ups=0, repeats=1)
            seconds[name] += taken if repeat >= 2 else []
    tf32 = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
    return {"steps": seconds, "remark": f"matrix products of float32 in TF32: {tf32}"}


def _conventional(part: Part, pipeline: str, device: str) -> tuple[TrainingStep, dict[str, Tensor]]:
    """The conventional step in float32, and a batch for it."""
    pipe = load_pipeline(pipeline, device)
    teacher = load_pipeline(pipeline, device).unet
    objective = ConventionalGuidance(pipe, pipe.unet, teacher, GUIDANCE)
    pipe.unet.requires_grad_(True).train()
    step = TrainingStep(objective, Schedule(1, part.batch, 1e-5), device)
    ids = token_ids(pipe, [PROMPT, ""]).to(device)
    batch = {
        "images": torch.rand(part.batch, 3, part.resolution, part.resolution, device=device) * 2 - 1,
        "ids": ids[:1].expand(part.batch, -1),
        "empty_ids": ids[1:].expand(part.batch, -1),
        "timesteps": torch.full((part.batch,), 500, device=device),
    }
    return step, batch


def _seconds(call: Callable[[], Any], device: str) -> tuple[Any, float]:
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return result, time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
