"""The formulas of diffusion as pure functions of tensors, with their equations.

Notation: x_t = alpha_t x0 + sigma_t eps with alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t)
(Ho et al. 2020, eq. 4). `prediction_type` says what a network's output means, as in `diffusers`:
"epsilon" or "v_prediction" with v = alpha_t eps - sigma_t x0 (Salimans & Ho 2022, app. D).
"""

import math

import torch
from torch import Tensor

from lora_distill.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction")


def alpha_sigma(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, each (batch, 1, 1, 1), for integer timesteps (batch,)."""
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps].float()[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t, the noised latent (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def to_x0(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The clean latent x0 that a network output implies."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    _check_v(prediction_type)
    return alpha * x_t - sigma * output


def to_eps(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The noise eps that a network output implies."""
    if prediction_type == "epsilon":
        return output
    _check_v(prediction_type)
    return alpha * output + sigma * x_t


def target_output(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The training target of the network: eps, or v = alpha eps - sigma x0."""
    if prediction_type == "epsilon":
        return eps
    _check_v(prediction_type)
    return alpha * eps - sigma * x0


def _check_v(prediction_type: str) -> None:
    if prediction_type != "v_prediction":
        raise InputError(f"prediction_type: expected {' or '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans 2022, eq. 6, with w shifted by one).

    w = 1 is no guidance. For a fixed x_t, eps, x0 and v are affine in each other and the two weights sum to one,
    so guiding outputs is the same as guiding eps.
    """
    return uncond + guidance_scale * (cond - uncond)


def ddim_step(x0: Tensor, eps: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic DDIM step to the next noise level (Song et al. 2021, eq. 12 with sigma = 0)."""
    return alpha_next * x0 + sigma_next * eps


def boundary_scalings(
    timesteps: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of a consistency function, each (batch, 1, 1, 1): f(x, 0) = x (Luo et al. 2023, app. D).

    The defaults are those of `LCMScheduler`.
    """
    scaled = timesteps.double()[:, None, None, None] * timestep_scaling
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    return c_skip.float(), c_out.float()


def guidance_embedding(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (batch, dim) of w (batch,), the extra input of a full LCM (Luo et al. 2023, §4.3).

    What is embedded is w - 1, as in `diffusers`: 0 is no guidance.
    """
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(dim // 2, device=guidance_scale.device) / (dim // 2 - 1))
    angles = 1000 * (guidance_scale.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c over all elements, in float32 (Song & Dhariwal 2023, eq. 8): quadratic for d < c."""
    difference = prediction.float() - target.float()
    return ((difference.square() + c * c).sqrt() - c).mean()


def gaussian_kl(latents: Tensor, reference: Tensor) -> Tensor:
    """KL(reference || latents) of Gaussians fitted to each channel over batch and space, averaged over channels."""
    mean, reference_mean = latents.float().mean((0, 2, 3)), reference.float().mean((0, 2, 3))
    var, reference_var = latents.float().var((0, 2, 3)), reference.float().var((0, 2, 3))
    ratio = (reference_var + (mean - reference_mean).square()) / var
    return 0.5 * ((var / reference_var).log() + ratio - 1).mean()


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """MSE in float32, whatever the dtype of the forward pass."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())
