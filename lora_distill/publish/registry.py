"""The figures of the series: what draws each one from its rows, what it shows, and the claims it bears on."""

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from lora_distill.publish import plots_evaluation, plots_guidance, plots_lcm, plots_memory, plots_pretraining
from lora_distill.publish.style import image_grid


class Plot(NamedTuple):
    """How a figure is drawn: from the rows of its CSV, a grid of images from its images too."""

    draw: Callable[..., Figure]
    caption: str
    claims: tuple[str, ...] = ()


KEPT = ("quality-kept", "alignment-kept", "distance-against-standard-distillation")
MEMORY = ("memory-half-training", "memory-half-before-distillation", "conventional-raises-memory")
INFERENCE = ("memory-half-inference",)
SPEED = ("inference-time-40-percent",)
FLICKR = ("finetune-fid-below-base", "lcm-lora-fid-above-base", "larger-data-better")
FEW_STEPS = ("lcm-lora-alignment", "lcm-lora-against-untrained")
OVER_BATCHES = ("time-over-batch-and-resolution", "lcm-lora-time-over-batch-and-resolution")

FIGURES = {
    "00_world": Plot(image_grid, "Scenes of the bundled world, two styles"),
    "00_loss": Plot(plots_pretraining.stage_losses, "Losses of the bundle's four training stages"),
    "00_vae": Plot(image_grid, "Drawn scenes and their VAE reconstructions"),
    "00_guidance": Plot(plots_pretraining.alignment_against_guidance, "Alignment of the bundle against guidance"),
    "00_samples": Plot(image_grid, "Four prompts, one sample each, not selected"),
    "01_schemes": Plot(plots_memory.training_peaks, "Peak memory of every training scheme, by term", MEMORY),
    "01_sharing": Plot(
        plots_memory.saved_by_sharing, "What sharing W0 saves, against the batch", ("memory-half-sharing",)
    ),
    "01_inference": Plot(plots_memory.inference_peaks, "Peak memory of a sampling step", INFERENCE),
    "01_three_ways": Plot(
        plots_memory.account_against_measurement,
        "The account against simulation and measurement",
        ("memory-account-is-true", "conventional-raises-memory"),
    ),
    "02_guidance_curve": Plot(plots_guidance.quality_against_guidance, "Quality against guidance"),
    "02_guidance_grid": Plot(image_grid, "The same noise at several guidance scales"),
    "02_difference": Plot(plots_guidance.guidance_against_timestep, "What guidance adds, against the timestep"),
    "02_loss": Plot(plots_guidance.distillation_loss, "Distillation loss, LoRA against a full copy"),
    "02_quality_against_steps": Plot(plots_guidance.quality_against_steps, "Quality against training steps", KEPT),
    "02_same_noise": Plot(image_grid, "Teacher and students on the same noise", KEPT),
    "02_rho": Plot(plots_guidance.batch_cost, "What a batch costs against one twice as large", SPEED),
    "02_seconds_per_image": Plot(
        plots_guidance.seconds_an_image, "Seconds an image", (*SPEED, "time-against-standard-distillation")
    ),
    "03_images": Plot(image_grid, "Six training images, one caption each"),
    "03_loss": Plot(plots_lcm.consistency_loss, "Consistency loss against training steps"),
    "03_same_noise": Plot(image_grid, "Teacher, fine-tune, LCM and LCM-LoRA on the same noise", FLICKR),
    "03_quality_against_passes": Plot(plots_lcm.content_against_passes, "Content against UNet evaluations", FEW_STEPS),
    "03_composition": Plot(image_grid, "LCM-LoRA and the fine-tune added up, four steps"),
    "04_distance": Plot(plots_evaluation.distance_bars, "The slides' Figure 1: Frechet distance by method", FLICKR),
    "04_speed": Plot(
        plots_evaluation.speed_bars, "The slides' Figure 2: seconds an image", ("lcm-lora-2-4-times-faster",)
    ),
    "04_pareto": Plot(plots_evaluation.pareto_front, "Content against UNet evaluations, every method", FEW_STEPS),
    "04_saving": Plot(plots_evaluation.saving_against_batch, "Saved seconds against the batch", OVER_BATCHES),
}
