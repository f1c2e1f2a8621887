"""Peak memory and operations of a scheme's step: simulated on fake tensors, or measured on real ones.

The simulation runs the training loop's step where tensors have shapes and no values, so that SD 1.5 at 512 px is
analysed on a laptop. It assumes a GPU's ways: fused attention (flash, or memory-efficient for float32), CUDA's
autocast, AdamW in its foreach form. It cannot see what kernels allocate inside (convolution and matrix product
workspaces) or what the caching allocator rounds up; `measure_cuda` can.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lora_distill.memory.schemes import TERMS, Bytes, Scheme, Setup
from lora_distill.memory.steps import Step, prepare

aten = torch.ops.aten


# Fused attention counts as plain attention: two matrix products and, backward, four. One that its kernel computes
# again in backward is left out.
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: 2 * sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
}


@dataclass(frozen=True)
class Peak:
    """One step: bytes by term at its peak, and floating point operations of matrix products and convolutions.

    A multiplication and an addition are two operations.
    """

    terms: Bytes
    flops: int

    @property
    def total(self) -> int:
        return sum(self.terms.values())


class Tracker(TorchDispatchMode):
    """Live bytes by term, their split at the peak, and operations; a storage counts once, from first use until freed.

    torch's own MemTracker splits by parameter, gradient and activation; this one also tells A and B from W0 and
    weights from their casts, and works below gradient checkpointing and PEFT.
    """

    def __init__(self):
        super().__init__()
        self.live: Bytes = dict.fromkeys(TERMS, 0)
        self.reset()
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # it has no value, and the optimizer asks for its step count
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # asked twice for every operation
            return result
        term = "activations"
        if func is aten._to_copy.default and self._term(args[0]) in ("weights", "lora"):
            term = "casts"
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value, term)
        if count := FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def assign(self, tensors: Iterable[Tensor], term: str) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            self._add(tensor, term)
            key = tensor.untyped_storage()._cdata
            reference, before, size = self._storages[key]
            self.live[before] -= size
            self.live[term] += size
            self._storages[key] = reference, term, size

    def reset(self) -> None:
        """Forget the peak and the operations so far."""
        self.peak, self.flops = dict(self.live), 0

    def _term(self, tensor: Tensor) -> str | None:
        return self._storages.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def _add(self, tensor: Tensor, term: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key)), term, size
        self.live[term] += size
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _remove(self, key: int) -> None:
        _, term, size = self._storages.pop(key)
        self.live[term] -= size


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let the CPU's autocast do what CUDA's does: normalise in float32, and so keep float32 tensors for backward."""

    def in_float32(call: Callable) -> Callable:
        def cast(*args, **kwargs):
            if torch.is_autocast_enabled("cpu"):
                args = [value.float() if isinstance(value, Tensor) else value for value in args]
            return call(*args, **kwargs)

        return cast

    # A TorchFunctionMode would be off where gradient checkpointing computes again.
    with ExitStack() as stack:
        for name in ("group_norm", "layer_norm"):
            stack.enter_context(patch.object(F, name, in_float32(getattr(F, name))))
        yield


def simulate(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], *batches: int) -> list[Peak]:
    """One step on fake tensors, which take no memory: its peak for every batch, by default for the setup's own.

    Raises ValueError as `prepare`.
    """
    with FakeTensorMode():
        return track(scheme, setup, unet_config, *batches)


def track(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], *batches: int) -> list[Peak]:
    """The same for real steps on the CPU, from the tensors that were alive."""
    peaks = []
    with cuda_autocast(), Tracker() as tracker:
        step = prepare(scheme, setup, unet_config, "cpu")
        assign(step, tracker)
        for batch in batches or (setup.batch,):
            tracker.reset()
            step(batch)
            peaks.append(Peak(tracker.peak, tracker.flops))
    return peaks


def assign(step: Step, tracker: Tracker) -> None:
    """Say what weights, A and B and AdamW's states are; and gradients, which are activations until accumulated."""
    named = [pair for unet in step.unets for pair in unet.named_parameters()]
    tracker.assign((p for name, p in named if "lora_" not in name), "weights")
    tracker.assign((p for name, p in named if "lora_" in name), "lora")
    if not step.training:
        return
    adamw = step.training.adamw
    tracker.assign(adamw.tensors(), "optimizer")
    for parameter in adamw.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], "gradients"))

    def in_float32(*_) -> None:  # as the optimizer takes them, they are gradients too
        adamw.take_gradients()
        tracker.assign((master.grad for master in adamw.masters), "gradients")

    adamw.register_step_pre_hook(in_float32)


def measure_cuda(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], device: str) -> tuple[int, int]:
    """Peak bytes of one real step on a GPU: in tensors, less what others hold there, and in the caching allocator.

    A first step warms up.

    Raises ValueError as `prepare`, `torch.OutOfMemoryError` when the step does not fit.
    """
    gc.collect()  # what an earlier case left behind in reference cycles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    step = prepare(scheme, setup, unet_config, device)
    step(setup.batch)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step(setup.batch)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    del step
    torch.cuda.empty_cache()
    return peak
