"""A pipeline as one would run it: the adapter folded into W0, and on a CPU the networks on ONNX Runtime.

A forward of the bundled UNet has a fixed cost: in PyTorch that of five images on one thread, on ONNX Runtime that of
one or two (04_rho.csv); we take it for the cost of dispatching a UNet's operations one by one. The graph is kept
without weights: W0 and every student that is merged into it share one, and bring their own.
"""

import logging
import warnings
from collections.abc import Callable, Container
from functools import lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from tqdm.auto import tqdm

from lora_distill.adapters import UNetInRole, merged_copy, rounding_error
from lora_distill.devices import compiled, is_compiled
from lora_distill.errors import InputError
from lora_distill.pipeline import with_unet
from lora_distill.storage import cache_key, cached

if TYPE_CHECKING:  # the packages of the extra [cpu], imported where they are needed
    from onnx import ModelProto
    from onnxruntime import InferenceSession

GRAPH = 1  # version of the exported graphs, in the keys of their caches: raise it when they change
ROUNDING = 0.1  # an adapter is folded into W0 if rounding changes its update by less, relative to the update's norm
# The axes whose size a graph leaves open.
IMAGES = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
PROMPTS = {0: IMAGES[0], 1: torch.export.Dim("tokens")}


def deployed(
    pipe: StableDiffusionPipeline,
    adapter: str | None = None,
    graphs: Path | None = None,
    *,
    for_timing: bool = False,
    compile: bool = True,
) -> StableDiffusionPipeline:
    """The pipeline with an adapter folded into W0, and q, k, v of attention in one product (k, v in cross-).

    With a folder for its `graphs`, UNet and VAE decoder run on ONNX Runtime on a CPU in float32; elsewhere they stay
    in PyTorch. The images are the same up to rounding. Weights that neither the adapter nor the product changes are
    shared with W0. An adapter whose update 16 bits cannot hold is not folded: it runs beside W0, with a warning; it is
    folded all the same `for_timing`, for seconds do not depend on values. Compiled if the pipeline's UNet is, unless
    `compile` is False.

    Raises ValueError for a UNet that takes w as an input: a full LCM is its own deployed form; ModuleNotFoundError, in
    one line, where ONNX Runtime is to be used and not installed.
    """
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise InputError("a UNet that takes the guidance scale as an input is not deployed: it runs as it is")
    if adapter and not for_timing and (error := rounding_error(pipe.unet, adapter)) > ROUNDING:
        dtype = str(pipe.unet.dtype).removeprefix("torch.")
        lost = f"weights in {dtype} would change its update by {100 * error:.0f} %"
        warnings.warn(f"adapter {adapter!r} is not folded into W0 but runs beside it: {lost}", stacklevel=2)
        return with_unet(pipe, UNetInRole(pipe.unet, adapter))
    unet = merged_copy(pipe.unet, adapter)
    unet.fuse_qkv_projections()
    ready = with_unet(pipe, unet.eval().requires_grad_(False))
    if graphs and unet.device.type == "cpu" and unet.dtype == torch.float32:
        _check_runtime()
        ready.unet = OnnxUNet(unet, graphs)
        ready.vae = OnnxDecoder(pipe.vae, graphs)
    elif compile and is_compiled(pipe.unet):
        compiled(unet)
    return ready


def deployments(graphs: Path | None, kept: int = 2, **options: bool) -> Callable[..., StableDiffusionPipeline]:
    """A function of (pipe, adapter) that gives them `deployed`, with its `options`, and remembers the last `kept`.

    A full LCM is its own deployed form and comes back as it is. An adapter that is trained on afterwards must have
    another name.
    """

    remembered = lru_cache(maxsize=kept)(partial(deployed, graphs=graphs, **options))

    def deploy(pipe: StableDiffusionPipeline, adapter: str | None = None) -> StableDiffusionPipeline:
        return pipe if pipe.unet.config.time_cond_proj_dim is not None else remembered(pipe, adapter)

    return deploy


def _check_runtime() -> None:
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):  # torch.onnx exports through the last
            import_module(package)
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the CPU runtime is not installed: pip install 'lora_distill[cpu]'") from None


class OnnxModule(nn.Module):
    """What stands in for a module: its graph on ONNX Runtime, with the weights that the module has."""

    runtime = "ONNX Runtime"
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, module: nn.Module, config: FrozenDict, graph: bytes):
        super().__init__()
        self.module = module
        self.config = config
        self.graph = graph
        self.session, self.threads = None, 0

    def run(self, **inputs: Tensor) -> Tensor:
        """The graph's one output, computed with as many threads as PyTorch has at that moment."""
        if self.threads != torch.get_num_threads():
            self.threads = torch.get_num_threads()
            self.session = _session(self.graph, self.module.state_dict(), self.threads)
        return torch.from_numpy(self.session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


class OnnxUNet(OnnxModule):
    """A UNet on ONNX Runtime, called as the `UNet2DConditionModel` that it stands for."""

    def __init__(self, unet: nn.Module, graphs: Path):
        config = unet.config
        example = {
            "sample": torch.zeros(2, config.in_channels, config.sample_size, config.sample_size),
            "timestep": torch.tensor(0),
            "encoder_hidden_states": torch.zeros(2, 7, config.cross_attention_dim),
        }
        open_axes = {"sample": IMAGES, "timestep": {}, "encoder_hidden_states": PROMPTS}
        super().__init__(unet, config, _graph("unet", unet, config, example, open_axes, graphs))

    def forward(self, sample, timestep, encoder_hidden_states, timestep_cond=None) -> UNet2DConditionOutput:
        if timestep_cond is not None:
            raise InputError("timestep_cond: this UNet takes no embedded guidance scale")
        output = self.run(sample=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states)
        return UNet2DConditionOutput(sample=output)


class OnnxDecoder(OnnxModule):
    """The decoder of a VAE on ONNX Runtime, called as `AutoencoderKL.decode`."""

    def __init__(self, vae: nn.Module, graphs: Path):
        decoder = nn.Sequential(vae.post_quant_conv or nn.Identity(), vae.decoder)
        example = {"input": torch.zeros(2, vae.config.latent_channels, 8, 8)}
        super().__init__(
            decoder, vae.config, _graph("decoder", decoder, vae.config, example, {"input": IMAGES}, graphs)
        )

    def decode(self, latents: Tensor) -> DecoderOutput:
        return DecoderOutput(sample=self.run(input=latents))


def _graph(
    kind: str, module: nn.Module, config: FrozenDict, example: dict[str, Tensor], open_axes: dict, folder: Path
) -> bytes:
    """The module's graph without its weights, exported on first use; it depends on the layers, not on their values."""
    weights = module.state_dict()
    key = cache_key(
        version=GRAPH,
        layers=repr(module),
        shapes={name: list(value.shape) for name, value in weights.items()},
        config=repr(sorted((name, value) for name, value in config.items() if not name.startswith("_"))),
        exporters={name: version(name) for name in ("torch", "onnx", "onnxscript")},
    )

    def export() -> dict[str, Tensor]:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of every optional package that is missing
        options = {"dynamic_shapes": open_axes, "dynamo": True, "optimize": False, "verbose": False}
        with warnings.catch_warnings(), torch.no_grad(), tqdm(total=1, desc=f"exporting the {kind}'s graph") as bar:
            warnings.simplefilter("ignore")  # the exporter's, of itself
            program = torch.onnx.export(module, kwargs=example, **options)
            bar.update()
        return {"onnx": torch.frombuffer(bytearray(_emptied(program.model_proto, weights)), dtype=torch.uint8)}

    return cached(folder, f"{kind}-graph", key, export)["onnx"].numpy().tobytes()


def _emptied(model: "ModelProto", weights: Container[str]) -> bytes:
    """The graph with an empty place for every weight, and without the exporter's notes on where each node is from."""
    from onnx import TensorProto

    for constant in model.graph.initializer:
        if constant.name in weights:
            constant.ClearField("raw_data")
            constant.data_location = TensorProto.EXTERNAL
            constant.external_data.add(key="location", value="given with the session")
    for node in model.graph.node:
        node.ClearField("metadata_props")
    return model.SerializeToString()


def _session(graph: bytes, weights: dict[str, Tensor], threads: int) -> "InferenceSession":
    import onnxruntime
    from onnx import ModelProto

    names = [constant.name for constant in ModelProto.FromString(graph).graph.initializer if constant.name in weights]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it keeps a core from the next network
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name].numpy()) for name in names]
    options.add_external_initializers(names, values)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
