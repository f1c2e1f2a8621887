"""Peak memory of a scheme's step: simulated on fake tensors, tracked on real ones, or measured on a GPU.

The simulation runs the real diffusers + PEFT step where tensors have shapes and no values, so that SD 1.5 at 512 px
is analysed on a laptop. It assumes a GPU's ways: fused attention (flash, or memory-efficient for float32), CUDA's
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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lora_distill.memory.schemes import TERMS, Bytes, Scheme, Setup
from lora_distill.memory.steps import Step, prepare
from lora_distill.train.optimizer import MasterAdamW


class LiveBytes(TorchDispatchMode):
    """Live bytes by term, and their split at the peak; every storage counts once, from its first use until freed.

    torch's own MemTracker splits by parameter, gradient and activation; this one also tells A and B from W0 and
    weights from their casts, and works below gradient checkpointing and PEFT.
    """

    def __init__(self):
        super().__init__()
        self.live: Bytes = dict.fromkeys(TERMS, 0)
        self.peak: Bytes = dict(self.live)
        self._storages: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        term = "activations"
        if func is torch.ops.aten._to_copy.default and self._term(args[0]) in ("weights", "lora"):
            term = "casts"
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value, term)
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

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.live)

    def _term(self, tensor: Tensor) -> str | None:
        return self._storages.get(tensor.untyped_storage()._cdata, (None, None))[1]

    def _add(self, tensor: Tensor, term: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._remove(key)), term, size
        self.live[term] += size
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)

    def _remove(self, key: int) -> None:
        _, term, size = self._storages.pop(key)
        self.live[term] -= size


class FakeValues(TorchDispatchMode):
    """Read a fake tensor's value as 1: it has none, and the optimizer asks for its step count."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0
        return func(*args, **(kwargs or {}))


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


def simulate(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any]) -> Bytes:
    """Bytes by term at the peak of one step on fake tensors; no memory is taken. Raises ValueError as `prepare`."""
    with cuda_autocast(), FakeTensorMode(), FakeValues():
        return _tracked(lambda: prepare(scheme, setup, unet_config, "cpu"))


def track(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any]) -> Bytes:
    """Bytes by term at the peak of one real step on the CPU, from the tensors that were alive. Raises ValueError."""
    with cuda_autocast():
        return _tracked(lambda: prepare(scheme, setup, unet_config, "cpu"))


def _tracked(make: Callable[[], Step]) -> Bytes:
    with LiveBytes() as tracker:
        step = make()
        tracker.assign(step.weights, "weights")
        tracker.assign(step.lora, "lora")
        if step.optimizer:
            tracker.assign(step.optimizer.tensors(), "optimizer")
            step.optimizer.register_step_pre_hook(lambda optimizer, *_: _assign_gradients(optimizer, tracker))
        _follow_gradients(step.trained, tracker)
        tracker.reset_peak()
        step()
    return tracker.peak


def _assign_gradients(optimizer: MasterAdamW, tracker: LiveBytes) -> None:
    """In float32, as the optimizer takes them, they are gradients too."""
    optimizer.take_gradients()
    tracker.assign((master.grad for master in optimizer.masters), "gradients")


def _follow_gradients(trained: list[nn.Parameter], tracker: LiveBytes) -> None:
    """A gradient is an activation like others until it is accumulated into its parameter."""
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.assign([p.grad], "gradients"))


@dataclass(frozen=True)
class CudaPeak:
    """Peak bytes on a GPU: in tensors, and as the caching allocator held them."""

    allocated: int
    reserved: int


def measure_cuda(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], device: str = "cuda") -> CudaPeak:
    """Peak of one real step on a GPU after a first one that warms up; what other tensors hold there is left out.

    Raises ValueError as `prepare`, `torch.OutOfMemoryError` when the step does not fit.
    """
    gc.collect()  # what an earlier case left behind in reference cycles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    step = prepare(scheme, setup, unet_config, device)
    step()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = CudaPeak(torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device))
    del step
    torch.cuda.empty_cache()
    return peak
