"""One UNet evaluation on paper: what each kind of layer keeps for backward, and what is alive while it runs.

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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_distill.memory.layers import Layer, Layers, Value
from lora_distill.memory.schemes import TERMS, Bytes, Precision

MATRIX_LAYERS = ("conv", "linear")
Item = tuple[str, float]  # a term and bytes
Kept = tuple[int, Item]  # with the first layer that keeps it, after whose backward it goes


@dataclass(frozen=True)
class Pass:
    """One UNet evaluation of a batch: bytes by term at each of its moments."""

    layers: Layers
    precision: Precision
    batch: int

    @cached_property
    def _wide(self) -> set[int]:
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
        x = layer.inputs[0]
        if layer.kind in MATRIX_LAYERS:
            return self._kept_by_matrix(index, layer, x)
        if layer.kind == "norm" and self.precision.autocast and x.key not in self._wide:
            return {(index, "copy"): ("activations", 4 * x.size * self.batch)}
        items = {value.key: ("activations", self.bytes_of(value)) for value in layer.inputs}
        if layer.kind == "geglu":
            items[index, "gelu"] = ("activations", self.bytes_of(layer.output))
        elif layer.kind == "attention":
            items[layer.output.key] = ("activations", self.bytes_of(layer.output))
            items[index, "statistics"] = ("activations", 4 * layer.heads_by_tokens * self.batch)
        return items

    def _kept_by_matrix(self, index: int, layer: Layer, x: Value) -> dict[Any, Item]:
        """The input, where the layer needs it (torch's convolutions always do), and autocast's copies."""
        items: dict[Any, Item] = {}
        compute = self.precision.compute.itemsize
        if layer.kind == "conv" or layer.trained:
            copied = self.precision.autocast and (layer.lora or x.key in self._wide)
            key, size = ((index, "copy"), x.size * compute * self.batch) if copied else (x.key, self.bytes_of(x))
            items[key] = ("activations", size)
        if layer.kind == "conv" or x.has_grad:
            items[index, "cast"] = ("casts", self._cast(layer))
        return items

    def _cast(self, layer: Layer) -> int:
        """Bytes of the copy of a layer's matrix that autocast makes."""
        stored = self.precision.trained if layer.trained else self.precision.frozen
        compute = self.precision.compute
        return layer.matrix * compute.itemsize if stored != compute else 0

    def _items(self, checkpointing: bool) -> tuple[list[Kept], dict[int, list[Kept]]]:
        """All that is kept, with the first layer that keeps it: over the whole forward, and in checkpointed blocks."""
        outside: dict[Any, Kept] = {}
        inside: dict[int, dict[Any, Kept]] = {}
        for index, layer in enumerate(self.layers.layers):
            unit = layer.unit if checkpointing else None
            if unit == index and self._has_graph(unit):
                value = self.layers.units[unit]
                outside.setdefault(value.key, (index, ("activations", self.bytes_of(value))))
            place = outside if unit is None else inside.setdefault(unit, {})
            for key, item in self.kept(index, layer).items():
                if key not in outside:
                    place.setdefault(key, (index, item))
        return list(outside.values()), {unit: list(items.values()) for unit, items in inside.items()}

    def _has_graph(self, unit: int) -> bool:
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
                live = add_up(live, _by_term(item for _, item in inside.get(layer.unit, [])))
            unit = layer.unit
            if layer.output.has_grad:
                yield add_up(live, {"activations": self._in_backward(index, layer), "gradients": done * gradient_width})
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
        compute, cached = self.precision.compute.itemsize, 0
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
            cached += self._cast(layer) if layer.trained else 0
            yield {"activations": own, "casts": cached + (0 if layer.trained else self._cast(layer))}

    def _total(self, values: tuple[Value | None, ...]) -> float:
        """Bytes of tensors, each counted once."""
        return sum({value.key: self.bytes_of(value) for value in values if value}.values())


def _by_term(items: Iterable[Item]) -> Bytes:
    total = dict.fromkeys(TERMS, 0)
    for term, size in items:
        total[term] += size
    return total


def _by_layer(entries: Iterable[Kept]) -> dict[int, list[Item]]:
    by_layer: dict[int, list[Item]] = {}
    for index, item in entries:
        by_layer.setdefault(index, []).append(item)
    return by_layer


def add_up(*parts: Mapping[str, float]) -> Bytes:
    """The sum of several accounts, term by term."""
    return {term: sum(part.get(term, 0) for part in parts) for term in TERMS}
