"""Peak memory of a scheme's step on paper: what always lives, and the worst moment of the UNet evaluations it makes.

The moments are those of `memory_pass`, in the order in which a scheme runs: the teacher's passes without gradients,
the student's forward and backward, the optimizer's update.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_distill.memory.layers import TOKENS, Layers, layers_of
from lora_distill.memory.passes import Pass, add_up
from lora_distill.memory.schemes import (
    TERMS,
    Bytes,
    Inference,
    Precision,
    Scheme,
    Setup,
    Training,
    check,
    latent_size,
    precision_of,
)

QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes an element; nf4 has a float32 scale for every 64


def account(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any]) -> Bytes:
    """Bytes by term at the peak of one step. Raises ValueError for what no run can use."""
    check(scheme, setup, unet_config)
    moments = (
        _sampling(scheme, setup, unet_config)
        if isinstance(scheme, Inference)
        else _training(scheme, setup, unet_config)
    )
    peak = max(moments, key=lambda moment: sum(moment.values()))
    return {term: round(peak.get(term, 0)) for term in TERMS}


def largest_batch(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], budget: float, most: int = 512) -> int:
    """The largest batch whose peak stays within `budget` bytes, at most `most`; 0 when one image is too many."""
    fitting, too_many = 0, most + 1
    while too_many - fitting > 1:
        batch = (fitting + too_many) // 2
        fits = sum(account(scheme, replace(setup, batch=batch), unet_config).values()) <= budget
        fitting, too_many = (batch, too_many) if fits else (fitting, batch)
    return fitting


def _sampling(scheme: Inference, setup: Setup, config: Mapping[str, Any]) -> Iterator[Bytes]:
    precision = precision_of(scheme, setup)
    layers = layers_of(config, latent_size(setup), rank=scheme.rank, targets=scheme.targets, trained="none")
    inputs = _inputs(precision, setup, config, scheme.copies)
    static = add_up(_static(layers, precision, setup, full=False), inputs)
    for moment in Pass(layers, precision, setup.batch * scheme.copies).without_gradients():
        yield add_up(static, moment)


def _training(scheme: Training, setup: Setup, config: Mapping[str, Any]) -> Iterator[Bytes]:
    precision, side, full = precision_of(scheme, setup), latent_size(setup), scheme.trains == "unet"
    rank = 0 if full else scheme.rank
    layers = layers_of(config, side, rank=rank, targets=scheme.targets, trained=scheme.trains)
    script = scheme.objective == "consistency" and scheme.teacher == "separate"
    both_at_once = 1 if script or scheme.teacher == "none" else 2  # halves of guidance in one teacher pass
    static = _static(layers, precision, setup, full)
    student = Pass(layers, precision, setup.batch)
    plain = layers_of(config, side, rank=0, targets="attention", trained="none")
    if scheme.teacher == "separate":
        static = add_up(static, {"weights": _weights(plain, precision.frozen.itemsize, setup)})
    waiting = student.kept_after_forward(setup.checkpointing) if script else {}  # the script's student goes first
    if scheme.teacher != "none":
        teacher = Pass(plain, precision, setup.batch * both_at_once)
        inputs = _inputs(precision, setup, config, both_at_once)
        yield from (add_up(static, inputs, waiting, moment) for moment in teacher.without_gradients())
    static = add_up(static, _inputs(precision, setup, config))
    if scheme.objective == "consistency":
        yield from (add_up(static, waiting, moment) for moment in student.without_gradients())
    yield from (
        add_up(static, moment) for moment in student.with_gradients(setup.checkpointing, precision.trained.itemsize)
    )
    yield add_up(static, _update(layers, setup))


def _update(layers: Layers, setup: Setup) -> Bytes:
    """AdamW's step: all gradients in float32, and foreach's square roots of all second moments.

    The 8-bit one is a single kernel and has no square roots in memory.
    """
    trained = sum(layer.trained for layer in layers.layers)
    return {"gradients": 4 * trained, "activations": 4 * trained if setup.optimizer == "adamw" else 0}


# ---------------------------------------------------------------------------------------------- what always lives


def _static(layers: Layers, precision: Precision, setup: Setup, full: bool) -> Bytes:
    width = (precision.trained if full else precision.frozen).itemsize
    lora = sum(layer.trained or layer.matrix for layer in layers.layers if layer.lora)
    trained = [layer.trained for layer in layers.layers if layer.trained]
    masters = 4 * sum(trained) if precision.trained.itemsize < 4 else 0
    return {
        "weights": _weights(layers, width, setup, quantise=not full),
        "lora": lora * (precision.trained if trained else precision.frozen).itemsize,
        "optimizer": masters + sum(_moments(count, setup) for count in trained),
    }


def _weights(layers: Layers, width: int, setup: Setup, quantise: bool = True) -> float:
    total = layers.parameters * width
    if quantise and setup.quantised_base != "none":
        linear = sum(layer.matrix for layer in layers.layers if layer.kind == "linear" and not layer.lora)
        total += linear * (QUANTISED[setup.quantised_base] - width)
    return total


def _moments(count: int, setup: Setup) -> float:
    """Adam's two moments; of the 8-bit one a byte each and a float32 scale for every 256, from 4096 elements on."""
    return count * (2 + 8 / 256) if setup.optimizer == "adamw-8bit" and count >= 4096 else 8 * count


def _inputs(precision: Precision, setup: Setup, config: Mapping[str, Any], copies: int = 1) -> Bytes:
    """Latents, noise and prompt embeddings, and their doubled batch where both halves of guidance run at once."""
    width = 4 if precision.autocast else precision.frozen.itemsize
    latents = config["in_channels"] * latent_size(setup) ** 2
    embeds = TOKENS * config["cross_attention_dim"]
    doubled = copies * (latents + embeds) if copies > 1 else 0
    return {"activations": width * (setup.batch * (2 * latents + embeds + doubled) + embeds)}
