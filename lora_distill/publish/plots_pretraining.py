"""The curves of notebook 00: how the bundled pipeline trained, and what guidance does to it."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lora_distill.publish.style import REFERENCE, WIDTH, Rows, column, grouped, share_with_interval

STAGES = {"vae_crops": "VAE, crops", "vae_images": "VAE, images", "text_encoder": "text encoder", "unet": "UNet"}


def stage_losses(rows: Rows) -> Figure:
    """The loss of each training stage, a panel a stage."""
    stages = grouped(rows, "stage")
    figure, axes = plt.subplots(1, len(stages), figsize=(6.5, 1.9))
    for ax, (stage, points) in zip(axes, stages.items(), strict=True):
        losses = column(points, "loss")
        ax.plot(column(points, "step"), losses, marker="", linewidth=1)
        ax.set(title=STAGES.get(stage, stage), xlabel="step", yscale="log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if losses.max() > 100 * losses.min() else (1, 2, 3, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    axes[0].set_ylabel("loss")
    return figure


def alignment_against_guidance(rows: Rows) -> Figure:
    """What the reader finds correct, attribute by attribute; without a guidance scale stand the reconstructions."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.4))
    sampled = [row for row in rows if row["guidance_scale"] is not None]
    for attribute, points in grouped(sampled, "attribute").items():
        share_with_interval(ax, points, "guidance_scale", "correct", label=attribute)
    for row in rows:
        if row["guidance_scale"] is None:
            ax.axhline(100 * row["correct"], label=row["attribute"], **REFERENCE)
    ax.set(xlabel="guidance scale w", ylabel=f"correct, % of {rows[0]['n']:,} pictures", ylim=(None, 102))
    ax.legend(loc="lower right")
    return figure
