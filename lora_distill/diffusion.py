"""The formulas of diffusion: pure functions of tensors, each citing its equation.

Notation: x_t = alpha_t x0 + sigma_t eps with alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t)
(Ho et al. 2020, eq. 4). `prediction_type` says what a network's output means, as in `diffusers`:
"epsilon" or "v_prediction" with v = alpha_t eps - sigma_t x0 (Salimans & Ho 2022, app. D).
"""

import torch
from torch import Tensor


def alpha_sigma(alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, each (batch, 1, 1, 1), for integer timesteps (batch,)."""
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps].float()[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t, the noised latent (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def to_x0(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The clean latent that a network output stands for."""
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    return alpha * x_t - sigma * output


def to_eps(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The noise that a network output stands for."""
    if prediction_type == "epsilon":
        return output
    return alpha * output + sigma * x_t


def target_output(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """What the network should have said: eps, or v = alpha eps - sigma x0."""
    if prediction_type == "epsilon":
        return eps
    return alpha * eps - sigma * x0


def guide(uncond: Tensor, cond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans 2022, eq. 6, with w shifted by one).

    w = 1 is no guidance. For a fixed x_t, eps, x0 and v are affine in each other and the two weights sum to one,
    so guiding outputs is the same as guiding eps.
    """
    return uncond + guidance_scale * (cond - uncond)


def ddim_step(x0: Tensor, eps: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic DDIM step to the next noise level (Song et al. 2021, eq. 12 with sigma = 0)."""
    return alpha_next * x0 + sigma_next * eps


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """MSE in float32, whatever the dtype of the forward pass."""
    return torch.nn.functional.mse_loss(prediction.float(), target.float())
