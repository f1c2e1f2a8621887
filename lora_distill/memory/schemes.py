"""What takes memory: the schemes that are compared, the settings that change it, and the terms it is counted in.

Three ways to know a scheme's peak stand side by side and speak of the same terms: the account on paper
(`memory_account`), the simulation of the real step on fake tensors and the measurement (both `memory_measurement`).
Everything is the UNet's part: latents and prompt embeddings are taken as given, as they are when cached.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from lora_distill.adapters import TARGETS
from lora_distill.errors import InputError

TOKENS = 77  # of a prompt, in every Stable Diffusion

# weights: W0 and every further UNet. lora: A and B. gradients: of what is trained. optimizer: its states, and float32
# masters of 16-bit weights. casts: 16-bit copies of weights that autocast makes. activations: all else, from tensors
# kept for backward to those in flight.
TERMS = ("weights", "lora", "gradients", "optimizer", "casts", "activations")
Bytes = dict[str, int]  # a term each


@dataclass(frozen=True)
class Precision:
    """Which numbers are stored and computed in how many bits."""

    frozen: torch.dtype  # weights that are not trained
    trained: torch.dtype  # weights or A and B that are; 16-bit ones have float32 masters in the optimizer
    autocast: bool = False  # forward passes in bfloat16, weights cast on the way

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.frozen


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "mixed": Precision(torch.float32, torch.float32, autocast=True),
    "mixed, 16-bit base": Precision(torch.bfloat16, torch.float32, autocast=True),
    "16-bit": Precision(torch.bfloat16, torch.bfloat16),
}


@dataclass(frozen=True)
class Training:
    """A way to train: what is trained, against which teacher, by which forward passes."""

    label: str
    trains: Literal["unet", "lora"]
    teacher: Literal["none", "separate", "shared"] = "none"
    objective: Literal["denoising", "guidance", "consistency"] = "denoising"
    rank: int = 4
    targets: str = "attention"
    precision: str = "mixed"  # unless the setup says another


@dataclass(frozen=True)
class Inference:
    """A way to sample: what one step of it runs."""

    label: str
    passes: int = 1  # UNet evaluations one after the other
    copies: int = 1  # of the batch in one evaluation
    rank: int = 0  # of LoRA layers that are not merged
    targets: str = "attention"
    precision: str = "16-bit"


Scheme = Training | Inference
TRAINING = {
    "full_finetune": Training("full fine-tune", "unet"),
    "lora_finetune": Training("LoRA fine-tune", "lora"),
    "conventional_distillation": Training("conventional distillation", "unet", "separate", "guidance"),
    "lora_distillation_separate": Training("LoRA distillation, own teacher", "lora", "separate", "guidance"),
    "lora_distillation_shared": Training("LoRA distillation, one W0", "lora", "shared", "guidance"),
    # diffusers' train_lcm_distill_lora_sd_wds.py: two float32 UNets, and the student's graph waits for the teacher
    "lcm_lora_script": Training("LCM-LoRA, public script", "lora", "separate", "consistency", 64, "all"),
    "lcm_lora_shared": Training("LCM-LoRA, one 16-bit W0", "lora", "shared", "consistency", 64, "all", "16-bit"),
}
INFERENCE = {
    "guided_batched": Inference("guided, both passes in one batch", copies=2),
    "guided_sequential": Inference("guided, one pass after the other", passes=2),
    "one_pass_unmerged": Inference("one pass, rank 4 unmerged", rank=4),
    "one_pass_merged": Inference("one pass, merged"),
    "few_step": Inference("few steps, LCM-LoRA rank 64 unmerged", rank=64, targets="all"),
}


@dataclass(frozen=True)
class Setup:
    """The settings under which a scheme runs; `precision` None is the scheme's own."""

    batch: int = 1
    resolution: int = 512  # pixels; a latent has an eighth of it
    checkpointing: bool = False
    precision: str | None = None
    optimizer: Literal["adamw", "adamw-fused", "adamw-8bit"] = "adamw"  # in its foreach form, in one kernel, in 8 bits
    quantised_base: Literal["none", "int8", "nf4"] = "none"  # frozen linear layers only, as bitsandbytes does


def find_scheme(name: str) -> Scheme:
    """A scheme by its name. Raises ValueError that lists the names."""
    schemes = TRAINING | INFERENCE
    if name not in schemes:
        raise InputError(f"unknown scheme {name!r}; there are {', '.join(schemes)}")
    return schemes[name]


def precision_of(scheme: Scheme, setup: Setup) -> Precision:
    """The precision in force; sampling has no use for autocast: its weights are stored as they are computed with."""
    precision = PRECISIONS[setup.precision or scheme.precision]
    if isinstance(scheme, Inference) and precision.autocast:
        return PRECISIONS["16-bit"]
    return precision


def latent_size(setup: Setup) -> int:
    """Side of the latents, resolution / 8."""
    return setup.resolution // 8


def check(scheme: Scheme, setup: Setup, config: dict) -> None:
    """Refuse what no run can use, in one line. `config` is the UNet's. Raises ValueError."""
    least = 8 * 2 ** (len(config["down_block_types"]) - 1)
    if setup.resolution < least or setup.resolution % least:
        raise InputError(f"resolution: must be a multiple of {least} for this UNet, got {setup.resolution}")
    if setup.batch < 1:
        raise InputError(f"batch: must be at least 1, got {setup.batch}")
    if scheme.rank < (isinstance(scheme, Training) and scheme.trains == "lora"):
        raise InputError(f"rank: must be at least 1, got {scheme.rank}")
    _one_of("targets", scheme.targets, TARGETS)
    _one_of("precision", setup.precision or scheme.precision, PRECISIONS)
    _one_of("optimizer", setup.optimizer, ("adamw", "adamw-fused", "adamw-8bit"))
    _one_of("quantised_base", setup.quantised_base, ("none", "int8", "nf4"))


def _one_of(key: str, value: str, known) -> None:
    if value not in known:
        raise InputError(f"{key}: must be one of {', '.join(known)}, got {value!r}")
