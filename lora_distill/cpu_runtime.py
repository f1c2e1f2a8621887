"""UNet and VAE decoder on OpenVINO, which computes a forward on a CPU in about half of PyTorch's time.

A network becomes a graph once, kept without weights: W0 and every student that is merged into it share one and bring
their own. OpenVINO plans a graph for fixed sizes, half a second for each; a large batch is planned in equal parts that
run side by side, for small networks leave cores idle inside one operation.
"""

import copy
import hashlib
import sys
import tempfile
import warnings
from collections.abc import Collection
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_distill.errors import InputError, RunError
from lora_distill.storage import cache_key, cached

if TYPE_CHECKING:
    from openvino import Core, InferRequest, Model

GRAPH = 3  # version of the graphs, in the keys of their caches: raise it when they change
PART = 16  # rows of a batch that are worth a part of their own
PARTS = ("layers", "constants")  # of a graph, OpenVINO's .xml and .bin
PLANS, PLANNED = 8, 2**31  # plans of a network that are kept, one a size of inputs and number of threads, and bytes
# Some processors would compute in 16 bits if they were let. Threads of two processes are not tied to one core, and
# all that are asked for are used, two of a core too.
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False, "ENABLE_HYPER_THREADING": True}
SAME = 1e-3  # how far a graph's output may be from PyTorch's, of its largest value


Graph = tuple[bytes, bytes]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of the inputs, by name


class OpenvinoModule(nn.Module):
    """What stands in for a module: its graph on OpenVINO, with the weights that the module has.

    They are read when a size of inputs is planned, so the module must not change.
    """

    runtime = "OpenVINO"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module, config: FrozenDict, graph: Graph):
        super().__init__()
        self.module = module
        self.config = config
        weights = sum(tensor.nbytes for tensor in module.state_dict().values())  # a plan holds them about twice
        kept = min(PLANS, max(2, PLANNED // (2 * weights)))
        self.planned = lru_cache(kept)(partial(_plan, graph, module))

    def run(self, **inputs: Tensor) -> Tensor:
        """The graph's one output, computed with as many threads as PyTorch has at that moment."""
        count, threads = max(len(value) for value in inputs.values() if value.dim()), torch.get_num_threads()
        most = min(threads, max(1, count // PART))
        parts = next(n for n in range(most, 0, -1) if count % n == threads % n == 0)
        rows = {name: value.chunk(parts) if value.dim() else [value] * parts for name, value in inputs.items()}
        requests = self.planned(tuple((name, tuple(each[0].shape)) for name, each in rows.items()), parts, threads)
        for part, request in enumerate(requests):
            request.start_async({name: each[part].numpy() for name, each in rows.items()}, share_inputs=True)
        for request in requests:
            request.wait()
        return torch.from_numpy(np.concatenate([request.get_output_tensor().data for request in requests]))


def _plan(graph: Graph, module: nn.Module, shapes: Shapes, parts: int, threads: int) -> list["InferRequest"]:
    """The graph compiled for inputs of these shapes, and `parts` requests that run it side by side on the threads."""
    model = _with_weights(graph, module.state_dict(), dict(shapes))
    model.reshape({name: list(shape) for name, shape in shapes})
    plan = _core().compile_model(model, "CPU", OPTIONS | {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": parts})
    return [plan.create_infer_request() for _ in range(parts)]


class OpenvinoUNet(OpenvinoModule):
    """A UNet on OpenVINO, called as the `UNet2DConditionModel` that it stands for."""

    def __init__(self, unet: nn.Module, graphs: Path):
        config = unet.config
        side = config.sample_size | 1  # odd: the graph then upsamples to whatever size comes
        example = {
            "sample": torch.zeros(2, config.in_channels, side, side),
            "timestep": torch.tensor(0.0),
            "encoder_hidden_states": torch.zeros(2, 7, config.cross_attention_dim),
        }
        super().__init__(unet, config, _graph("unet", unet, config, example, graphs))

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None) -> UNet2DConditionOutput:
        if timestep_cond is not None:
            raise InputError("timestep_cond: this UNet takes no embedded guidance scale")
        if timestep.dim():
            raise InputError("timestep: this UNet takes one for the whole batch")
        inputs = {"sample": sample, "timestep": timestep.float(), "encoder_hidden_states": encoder_hidden_states}
        return UNet2DConditionOutput(sample=self.run(**inputs))


class OpenvinoDecoder(OpenvinoModule):
    """The decoder of a VAE on OpenVINO, called as `AutoencoderKL.decode`."""

    def __init__(self, vae: nn.Module, graphs: Path):
        decoder = nn.Sequential(vae.post_quant_conv or nn.Identity(), vae.decoder)
        example = {"input": torch.zeros(2, vae.config.latent_channels, 8, 8)}
        super().__init__(decoder, vae.config, _graph("decoder", decoder, vae.config, example, graphs))

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.run(input=latents))


def _openvino() -> ModuleType:
    """OpenVINO, of the extra [cpu], imported when it is needed. Raises ModuleNotFoundError in one line."""
    # it tells its maker over the network that it is used, and does not where this package is missing
    sys.modules.setdefault("openvino_telemetry", None)
    try:
        return import_module("openvino")
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise
        raise ModuleNotFoundError("the CPU runtime is not installed: pip install 'lora_distill[cpu]'") from None


@lru_cache
def _core() -> "Core":
    return _openvino().Core()


# ---------------------------------------------------------------------------------------------- the graph


def _graph(kind: str, module: nn.Module, config: FrozenDict, example: dict[str, Tensor], folder: Path) -> Graph:
    """The module's graph without its weights, made on first use; it depends on the layers, not on their values."""
    _openvino()
    key = cache_key(
        version=GRAPH,
        layers=repr(module),
        shapes={name: list(value.shape) for name, value in module.state_dict().items()},
        config=repr(sorted((name, value) for name, value in config.items() if not name.startswith("_"))),
        converters={name: version(name) for name in ("torch", "diffusers", "openvino")},
    )

    def convert() -> dict[str, Tensor]:
        with tqdm(total=1, desc=f"converting the {kind}'s graph") as bar:
            graph = _converted(module, example)
            bar.update()
        _check_same(graph, module, example)
        tensors = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in graph)
        return dict(zip(PARTS, tensors, strict=True))

    found = cached(folder, f"{kind}-graph", key, convert)
    return tuple(found[name].numpy().tobytes() for name in PARTS)


def _converted(module: nn.Module, example: dict[str, Tensor], seed: int = 0) -> Graph:
    """The graph with an input in the place of every weight, named as it.

    A copy of the module with random weights is converted: each is found again by its values, for the converter renames
    and reshapes some.
    """
    openvino, drawn = _openvino(), copy.deepcopy(module).eval()
    generator, names = torch.Generator().manual_seed(seed), {}
    for name, tensor in drawn.state_dict().items():
        if tensor.dtype == torch.float32:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            names[_digest(tensor.numpy())] = name
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, of branches that depend on a shape
        model = openvino.convert_model(_Output(drawn, list(example)), example_input=tuple(example.values()))
    for name, port in zip(example, model.inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    weights = []
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and (name := names.get(_digest(node.data))):
            weights.append(openvino.opset13.parameter(node.shape, openvino.Type.f32, name=name))
            node.output(0).replace(weights[-1].output(0))
    model.add_parameters(weights)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"graph.{ending}") for ending in ("xml", "bin")]
        openvino.serialize(model, *files)
        return tuple(file.read_bytes() for file in files)


def _check_same(graph: Graph, module: nn.Module, example: dict[str, Tensor]) -> None:
    """Raise RunError where the graph with the module's weights gives another output than the module."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(value.shape, generator=generator) for name, value in example.items()}
    with torch.no_grad():
        wanted = _Output(module, list(inputs))(*inputs.values()).numpy()
    plan = _core().compile_model(_with_weights(graph, module.state_dict(), inputs), "CPU", OPTIONS)
    error = np.abs(plan({name: value.numpy() for name, value in inputs.items()})[0] - wanted).max()
    if not error <= SAME * np.abs(wanted).max():
        differs = f"OpenVINO's output differs from PyTorch's by {error:.1e}"
        raise RunError(f"{differs}; take the pipeline as it is, in PyTorch")


class _Output(nn.Module):
    """A module whose forward takes the example's inputs in order and returns a tensor, as the tracer asks."""

    def __init__(self, module: nn.Module, names: list[str]):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.module(**dict(zip(self.names, inputs, strict=True)))
        return output if isinstance(output, Tensor) else output.sample


def _digest(values: np.ndarray) -> str:
    """Of the values in their order, whatever the shape."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _with_weights(graph: Graph, weights: dict[str, Tensor], inputs: Collection[str]) -> "Model":
    """The graph with these weights in their places. Raises RunError where some are missing."""
    model = _core().read_model(*graph)
    for parameter in model.get_parameters():
        if (weight := weights.get(parameter.get_friendly_name())) is not None:
            values = weight.detach().reshape(tuple(parameter.shape)).numpy()
            parameter.output(0).replace(_openvino().opset13.constant(values).output(0))
            model.remove_parameter(parameter)
    if unset := {parameter.get_friendly_name() for parameter in model.get_parameters()} - set(inputs):
        raise RunError(f"OpenVINO's graph lacks {min(unset)}; take the pipeline as it is, in PyTorch")
    return model
