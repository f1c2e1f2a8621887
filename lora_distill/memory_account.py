"""Peak memory of a scheme's step on paper: from the sizes of a UNet's layers and what each kind keeps for backward.

What a layer keeps for backward, and what is in flight while it runs; x is its input, y its output:

| layer | keeps | in flight, backward | in flight, forward |
|---|---|---|---|
| convolution | x | y, x | x, y |
| linear | x, if it is trained | y, x | x, y |
| group or layer norm, SiLU | x | y, x | x, y |
| attention, fused | q, k, v, y, softmax statistics | y, q, k, v | q, k, v, y |
| GEGLU | x (both halves), gelu of one | y, x | x, y, gelu of one |

A tensor that two layers keep counts once. The inputs of the residual blocks around a layer and the long skip
connections that wait are alive beside it. Autocast adds a float32 copy of every norm's input, a 16-bit copy of what a
matrix layer keeps after a norm, and 16-bit copies of the weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_distill.memory import (
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
from lora_distill.memory_layers import TOKENS, Layer, Layers, Value, layers_of

MATRIX_LAYERS = ("conv", "linear")
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes an element; nf4 has a float32 scale for every 64
Item = tuple[str, float]  # a term and bytes


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
    static = _sum(_static(layers, precision, setup, full=False), _inputs(scheme, setup, config, scheme.copies))
    for moment in Pass(layers, precision, setup.batch * scheme.copies).without_gradients():
        yield _sum(static, moment)


def _training(scheme: Training, setup: Setup, config: Mapping[str, Any]) -> Iterator[Bytes]:
    precision, side, full = precision_of(scheme, setup), latent_size(setup), scheme.trains == "unet"
    rank = 0 if full else scheme.rank
    layers = layers_of(config, side, rank=rank, targets=scheme.targets, trained=scheme.trains)
    script = scheme.objective == "consistency" and scheme.teacher == "separate"
    both_at_once = 1 if script or scheme.teacher == "none" else 2  # halves of guidance in one teacher pass
    static = _sum(_static(layers, precision, setup, full), _inputs(scheme, setup, config, both_at_once))
    student = Pass(layers, precision, setup.batch)
    plain = layers_of(config, side, rank=0, targets="attention", trained="none")
    if scheme.teacher == "separate":
        static = _sum(static, {"weights": _weights(plain, precision.frozen.itemsize, setup)})
    waiting = student.kept_after_forward(setup.checkpointing) if script else {}  # the script's student goes first
    if scheme.teacher != "none":
        teacher = Pass(plain, precision, setup.batch * both_at_once)
        yield from (_sum(static, waiting, moment) for moment in teacher.without_gradients())
    if scheme.objective == "consistency":
        yield from (_sum(static, waiting, moment) for moment in student.without_gradients())
    yield from (
        _sum(static, moment) for moment in student.with_gradients(setup.checkpointing, precision.trained.itemsize)
    )
    yield _sum(static, _update(layers))


def _update(layers: Layers) -> Bytes:
    """AdamW's step: all gradients in float32, and foreach's square roots of all second moments."""
    trained = sum(layer.trained for layer in layers.layers)
    return {"gradients": 4 * trained, "activations": 4 * trained}


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


def _inputs(scheme: Scheme, setup: Setup, config: Mapping[str, Any], copies: int) -> Bytes:
    """Latents, noise and prompt embeddings, and their doubled batch where both halves of guidance run at once."""
    precision = precision_of(scheme, setup)
    width = 4 if precision.autocast else precision.frozen.itemsize
    latents = config["in_channels"] * latent_size(setup) ** 2
    embeds = TOKENS * config["cross_attention_dim"]
    doubled = copies * (latents + embeds) if copies > 1 else 0
    return {"activations": width * (setup.batch * (2 * latents + embeds + doubled) + embeds)}


def _sum(*parts: Mapping[str, float]) -> Bytes:
    return {term: sum(part.get(term, 0) for part in parts) for term in TERMS}


# ---------------------------------------------------------------------------------------------- what comes and goes


@dataclass(frozen=True)
class Pass:
    """One UNet evaluation of a batch."""

    layers: Layers
    precision: Precision
    batch: int

    def __post_init__(self):
        object.__setattr__(self, "_wide", self._float32_tensors())

    def _float32_tensors(self) -> set[int]:
        """Under autocast norms give float32, and SiLU keeps it; all else has 16 bits."""
        wide: set[int] = set()
        for layer in self.layers.layers if self.precision.autocast else ():
            if layer.kind == "norm" or (layer.kind == "silu" and layer.inputs[0].key in wide):
                wide.add(layer.output.key)
        return wide

    def bytes_of(self, value: Value) -> int:
        width = 4 if value.key in self._wide else self.precision.compute.itemsize
        return value.size * width * self.batch

    # ---- with gradients

    def kept(self, index: int, layer: Layer) -> dict[Any, Item]:
        """What a layer keeps for backward, by a key that is the same for the same tensor."""
        if not layer.output.has_grad:
            return {}
        x, compute = layer.inputs[0], self.precision.compute.itemsize
        items = {value.key: ("activations", self.bytes_of(value)) for value in layer.inputs}
        if layer.kind in MATRIX_LAYERS:
            needs_x = layer.kind == "conv" or layer.trained
            copied = self.precision.autocast and (layer.lora or x.key in self._wide)
            key, size = ((index, "copy"), x.size * compute * self.batch) if copied else (x.key, self.bytes_of(x))
            items = {key: ("activations", size)} if needs_x else {}
            if self.precision.autocast and (layer.kind == "conv" or x.has_grad):
                stored = self.precision.trained if layer.trained else self.precision.frozen
                items[index, "cast"] = ("casts", layer.matrix * compute if stored.itemsize > compute else 0)
        elif layer.kind == "norm" and self.precision.autocast and x.key not in self._wide:
            items = {(index, "copy"): ("activations", 4 * x.size * self.batch)}
        elif layer.kind == "geglu":
            items[index, "gelu"] = ("activations", self.bytes_of(layer.output))
        elif layer.kind == "attention":
            items[layer.output.key] = ("activations", self.bytes_of(layer.output))
            items[index, "statistics"] = ("activations", 4 * layer.heads_by_tokens * self.batch)
        return items

    def _items(self, checkpointing: bool) -> tuple[list[tuple[int, Item]], dict[int, list[tuple[int, Item]]]]:
        """All that is kept, with the first layer that keeps it: over the whole forward, and in checkpointed blocks."""
        outside: dict[Any, tuple[int, Item]] = {}
        inside: dict[int, dict[Any, tuple[int, Item]]] = {}
        for index, layer in enumerate(self.layers.layers):
            unit = layer.unit if checkpointing else None
            if unit is not None and unit == index and layer.output.has_grad | self._graph_in(unit):
                value = self.layers.units[unit]
                outside.setdefault(value.key, (index, ("activations", self.bytes_of(value))))
            place = outside if unit is None else inside.setdefault(unit, {})
            for key, item in self.kept(index, layer).items():
                if key not in outside:
                    place.setdefault(key, (index, item))
        return list(outside.values()), {unit: list(items.values()) for unit, items in inside.items()}

    def _graph_in(self, unit: int) -> bool:
        return any(layer.output.has_grad for layer in self.layers.layers if layer.unit == unit)

    def kept_after_forward(self, checkpointing: bool) -> Bytes:
        """What backward waits for when the forward is done."""
        outside, _ = self._items(checkpointing)
        return _by_term(item for _, item in outside)

    def with_gradients(self, checkpointing: bool, gradient_width: int) -> Iterator[Bytes]:
        """Live bytes at the end of the forward, and at each layer of the backward, from the last to the first."""
        outside, inside = self._items(checkpointing)
        live = _by_term(item for _, item in outside)
        yield dict(live)
        release = _by_layer([*outside, *(entry for entries in inside.values() for entry in entries)])
        unit, done = None, 0
        for index, layer in reversed(list(enumerate(self.layers.layers))):
            if checkpointing and layer.unit not in (None, unit):  # the block's forward runs again
                live = _sum(live, _by_term(item for _, item in inside.get(layer.unit, [])))
            unit = layer.unit
            if layer.output.has_grad:
                yield _sum(live, {"activations": self._in_backward(index, layer), "gradients": done * gradient_width})
            for term, size in release.get(index, []):
                live[term] -= size
            done += layer.trained

    def _in_backward(self, index: int, layer: Layer) -> float:
        own = self._total((layer.output, *layer.inputs, *layer.residuals))
        if layer.lora:  # its output's gradient, scaled
            own += self.bytes_of(layer.output)
        waiting = sum(self.bytes_of(s.joined) for s in self.layers.skips if s.made <= index < s.used)
        return own + waiting

    # ---- without gradients

    def without_gradients(self) -> Iterator[Bytes]:
        """Live bytes at each layer of a forward that keeps nothing; autocast keeps casts of what could be trained."""
        compute = self.precision.compute.itemsize
        casts = self.precision.autocast and self.precision.frozen.itemsize > compute
        cached = 0
        for index, layer in enumerate(self.layers.layers):
            own = self._total((layer.output, *layer.inputs, *layer.residuals, layer.stage))
            if layer.kind == "geglu":
                own += self.bytes_of(layer.output)
            if layer.lora:  # W0's output, the scaled output and their sum
                own += 2 * self.bytes_of(layer.output)
            if layer.transformer:  # the stream, the last branch that was added to it, and its norm
                norm = 4 if self.precision.autocast else compute
                own += self.batch * layer.transformer.size * (2 * compute + norm)
            own += sum(s.size for s in self.layers.skips if s.made <= index < s.held) * compute * self.batch
            cached += layer.matrix * compute if self.precision.autocast and layer.trained else 0
            cast = layer.matrix * compute if casts and not layer.trained else 0
            yield {"activations": own, "casts": cached + cast}

    def _total(self, values: tuple[Value | None, ...]) -> float:
        """Bytes of tensors, each counted once."""
        return sum({value.key: self.bytes_of(value) for value in values if value}.values())


def _by_term(items: Iterable[Item]) -> Bytes:
    total = dict.fromkeys(TERMS, 0)
    for term, size in items:
        total[term] += size
    return total


def _by_layer(entries: Iterable[tuple[int, Item]]) -> dict[int, list[Item]]:
    by_layer: dict[int, list[Item]] = {}
    for index, item in entries:
        by_layer.setdefault(index, []).append(item)
    return by_layer
