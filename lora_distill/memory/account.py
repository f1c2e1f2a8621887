"""Peak memory of a scheme's step by hand: what always lives, and the worst moment of its passes.

A forward pass of one image on the meta device, which knows shapes and computes nothing, tells what backward needs.
x is a layer's input, y its output:

| layer | keeps for backward |
|---|---|
| convolution | x |
| linear | x, if it is trained |
| group or layer norm, SiLU | x, in float32 under autocast |
| attention, fused | q, k, v, y |
| GEGLU | both halves of what its projection gives, and gelu of one |

Autocast adds 16-bit copies of the weights. Activations are proportional to the batch, all else does not change with
it. What this leaves out (the loss, prompts, statistics of softmax) is left to the simulation: 5 % at most.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_distill.adapters import add_adapter, parameter_counts
from lora_distill.memory import schemes
from lora_distill.memory.schemes import TERMS, Bytes, Inference, Precision, Scheme, Setup, Training
from lora_distill.shapes import meta_unet

LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.SiLU, Attention, GEGLU, BaseTunerLayer)
QUANTISED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # bytes an element; nf4 has a float32 scale for every 64


@dataclass
class Block:
    """A residual or transformer block, or the layers between two; sizes in elements of one image."""

    input: int = 0  # all that gradient checkpointing keeps of it; 0 between blocks
    normed: dict[int, int] = field(default_factory=dict)  # kept by norms and SiLU: sizes by storage, none counts twice
    kept: dict[int, int] = field(default_factory=dict)  # kept by all others
    copied: int = 0  # of these, what autocast copies once more for a further layer
    casts: list[int] = field(default_factory=lambda: [0, 0])  # matrices that backward multiplies with: frozen, trained
    trained: int = 0  # parameters
    moving: int = 0  # the largest gradients in flight, of what a layer keeps and of its output

    def bytes_kept(self, precision: Precision, batch: int) -> Bytes:
        """What a block keeps from its forward pass to its backward."""
        width = precision.compute.itemsize
        if not precision.autocast:
            return {"activations": batch * width * sum((self.normed | self.kept).values())}
        activations = 4 * sum(self.normed.values()) + width * (sum(self.kept.values()) + self.copied)
        casts = self.casts[True] + (self.casts[False] if precision.frozen != precision.compute else 0)
        return {"activations": batch * activations, "casts": width * casts}


class UNet:
    """A UNet on paper, with LoRA of a rank (0 is none): its blocks, as one forward pass meets them."""

    def __init__(self, config: dict[str, Any], latent_size: int, rank: int, targets: str, trains: str):
        unet = meta_unet(config).train()
        self.linear = sum(module.weight.numel() for module in unet.modules() if isinstance(module, nn.Linear))
        if rank:
            add_adapter(unet, "account", rank=rank, alpha=rank, targets=targets)
        if trains != "lora":
            unet.requires_grad_(trains == "unet")
        self.parameters, self.lora = parameter_counts(unet)
        self.trained = [p.numel() for p in unet.parameters() if p.requires_grad]
        self.blocks = [Block()]
        self.in_flight = 0  # the most elements alive in a forward pass without gradients
        self._given: list[dict[int, int]] = []  # to the modules around, by storage
        self._tensors: list[Tensor] = []  # none may be freed, or another could get its storage's address
        self._never_checkpointed = unet.mid_block.resnets[0]  # diffusers leaves this one out
        for module in unet.modules():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave, with_kwargs=True)
        latents = torch.empty(1, config["in_channels"], latent_size, latent_size, device="meta")
        embeds = torch.empty(1, schemes.TOKENS, config["cross_attention_dim"], device="meta")
        unet(latents, torch.empty(1, device="meta"), embeds)
        self._tensors.clear()

    def _sizes(self, *values: Any) -> dict[int, int]:
        flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        tensors = [part for part in flat if isinstance(part, Tensor)]
        self._tensors += tensors
        return {tensor.untyped_storage()._cdata: tensor.numel() for tensor in tensors}

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._given.append(self._sizes(*args, *kwargs.values()))
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            self.blocks.append(Block(0 if module is self._never_checkpointed else args[0].numel()))

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        alive = sum({key: size for given in self._given for key, size in given.items()}.values())
        self._given.pop()
        if isinstance(module, ResnetBlock2D | BasicTransformerBlock):
            self.blocks.append(Block())
        if not isinstance(module, LAYERS):
            return
        block, x, y = self.blocks[-1], args[0], sum(self._sizes(output).values())
        if isinstance(module, BaseTunerLayer):
            alive += 2 * y  # W0's output, and that of A and B beside their sum
            block.trained += sum(p.numel() for p in module.lora_B.parameters() if p.requires_grad)  # not called itself
        elif isinstance(module, GEGLU):
            alive += 3 * y + 2 * block.input  # its halves and gelu of one; the block's stream and its last branch
        self.in_flight = max(self.in_flight, alive + y)
        block.trained += sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        if output.requires_grad:
            block.moving = max(block.moving, y + self._keep(block, module, x, y, kwargs.get("encoder_hidden_states")))

    def _keep(self, block: Block, module: nn.Module, x: Tensor, y: int, context: Tensor | None) -> int:
        """Write down what a layer keeps, by the table above; return its size."""
        kept = self._sizes(x)
        match module:
            case nn.GroupNorm() | nn.LayerNorm() | nn.SiLU():
                block.normed |= kept
                return x.numel()
            case nn.Conv2d() | nn.Linear():
                trained, convolution = module.weight.requires_grad, isinstance(module, nn.Conv2d)
                if convolution or x.requires_grad:
                    block.casts[trained] += module.weight.numel()
                kept = kept if convolution or trained else {}
                block.copied += sum(size for key, size in kept.items() if key in block.kept)
            case Attention():
                keys = module.inner_dim * (x if context is None else context).shape[1]
                shared = y * any(p.requires_grad for p in module.to_out.parameters())  # the next layer keeps y too
                kept = {id(module): 2 * y + 2 * keys - shared}
                block.copied += shared * isinstance(module.to_out[0], BaseTunerLayer)
            case GEGLU():
                kept = {id(module): 3 * y}
            case BaseTunerLayer():
                (b,) = (b.weight for b in module.lora_B.values())
                block.casts[b.requires_grad] += b.numel()
                kept = {id(module): y // b.shape[0] * b.shape[1]}  # A x
            case _:
                return 0
        block.kept |= kept
        return sum(kept.values())


@lru_cache(maxsize=64)
def _unet(config: str, *more: Any) -> UNet:
    return UNet(json.loads(config), *more)


# ---------------------------------------------------------------------------------------------- what a step takes


def account(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any]) -> Bytes:
    """Bytes by term at the peak of one step. Raises ValueError for what no run can use."""
    schemes.check(scheme, setup, unet_config)
    unet = partial(_unet, json.dumps(dict(unet_config), sort_keys=True), schemes.latent_size(setup))
    moments = _sampling(scheme, setup, unet) if isinstance(scheme, Inference) else _training(scheme, setup, unet)
    return {term: round(size) for term, size in max(moments, key=lambda moment: sum(moment.values())).items()}


def largest_batch(scheme: Scheme, setup: Setup, unet_config: Mapping[str, Any], budget: float, most: int = 512) -> int:
    """The largest batch whose peak stays within `budget` bytes, at most `most`; 0 when one image is too many."""

    def peak(batch: int) -> int:
        return sum(account(scheme, replace(setup, batch=batch), unet_config).values())

    return bisect_right(range(1, most + 1), budget, key=peak)


def _sampling(scheme: Inference, setup: Setup, unet: Callable[..., UNet]) -> Iterator[Bytes]:
    unet, width = unet(scheme.rank, scheme.targets, "none"), schemes.precision_of(scheme, setup).frozen.itemsize
    activations = setup.batch * scheme.copies * width * unet.in_flight
    yield _add_up({"weights": _frozen(unet, width, setup), "lora": width * unet.lora, "activations": activations})


def _training(scheme: Training, setup: Setup, unet: Callable[..., UNet]) -> Iterator[Bytes]:
    """The moments in the order in which a scheme runs: teacher, target, the student's backward, the update."""
    precision, full = schemes.precision_of(scheme, setup), scheme.trains == "unet"
    teacher, student = unet(0, "attention", "none"), unet(0 if full else scheme.rank, scheme.targets, scheme.trains)
    static, width = _static(scheme, setup, teacher, student), precision.compute.itemsize
    held = list(accumulate((_held(block, setup, precision) for block in student.blocks), _add_up))
    script = scheme.objective == "consistency" and scheme.teacher == "separate"
    waiting = held[-1] if script else {}  # the script's student goes first, and its graph waits
    if scheme.teacher != "none":
        copies = 1 if script else 2  # halves of guidance in one pass
        yield _add_up(static, waiting, {"activations": setup.batch * copies * width * teacher.in_flight})
    if scheme.objective == "consistency":
        casts = width * student.lora if precision.autocast else 0
        yield _add_up(static, waiting, {"activations": setup.batch * width * student.in_flight, "casts": casts})
    done = 0  # parameters that have their gradients
    for block, live in reversed(list(zip(student.blocks, held, strict=True))):
        again = block.bytes_kept(precision, setup.batch) if setup.checkpointing and block.input else {}
        moving = {"activations": setup.batch * width * block.moving, "gradients": precision.trained.itemsize * done}
        yield _add_up(static, live, again, moving)
        done += block.trained
    # AdamW: all gradients in float32, and in its foreach form the square roots of all second moments
    yield _add_up(static, {"gradients": 4 * done, "activations": 4 * done * (setup.optimizer == "adamw")})


def _held(block: Block, setup: Setup, precision: Precision) -> Bytes:
    """What waits for a block's backward: with gradient checkpointing its input alone, if it has a graph."""
    if not (setup.checkpointing and block.input):
        return block.bytes_kept(precision, setup.batch)
    return {"activations": setup.batch * precision.compute.itemsize * block.input * (block.moving > 0)}


def _static(scheme: Training, setup: Setup, teacher: UNet, student: UNet) -> Bytes:
    """What always lives: W0 of every UNet, A and B, Adam's two moments and float32 masters of 16-bit weights."""
    precision = schemes.precision_of(scheme, setup)
    frozen, width = _frozen(teacher, precision.frozen.itemsize, setup), precision.trained.itemsize
    own = width * student.parameters if scheme.trains == "unet" else frozen
    states = sum(_moments(count, setup) + (4 * count if width < 4 else 0) for count in student.trained)
    teachers = frozen if scheme.teacher == "separate" else 0
    return {"weights": own + teachers, "lora": width * student.lora, "optimizer": states}


def _frozen(unet: UNet, width: int, setup: Setup) -> float:
    """Bytes of a frozen W0; quantising takes its linear layers alone."""
    return width * (unet.parameters - unet.linear) + QUANTISED.get(setup.quantised_base, width) * unet.linear


def _moments(count: int, setup: Setup) -> float:
    """Adam's two moments; of the 8-bit one a byte each and a float32 scale for every 256, from 4096 elements on."""
    return count * (2 + 8 / 256) if setup.optimizer == "adamw-8bit" and count >= 4096 else 8 * count


def _add_up(*parts: Bytes) -> Bytes:
    """The sum of several accounts, term by term."""
    return {term: sum(part.get(term, 0) for part in parts) for term in TERMS}
