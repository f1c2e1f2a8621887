"""The curves of notebook 03: consistency training, and content against evaluations of the UNet."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from lora_distill.publish.style import REFERENCE, STYLES, WIDTH, Rows, grouped, loss_by_method, share_with_interval


def consistency_loss(rows: Rows) -> Figure:
    """The consistency loss of the trainings, a curve a method."""
    return loss_by_method(rows, "pseudo-Huber loss")


def content_against_passes(rows: Rows) -> Figure:
    """Content correct against UNet evaluations: trained models solid, samplers of the base dotted.

    A method of a single point is the guided teacher, a dashed line.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 2.8))
    for method, points in grouped(rows, "method").items():
        if len(points) == 1:
            label = f"{method}, {points[0]['unet_passes']} evaluations"
            ax.axhline(100 * points[0]["content"], label=label, **REFERENCE)
        else:
            style = {"linestyle": "-" if points[0]["trained"] else ":", **STYLES.get(method, {})}
            share_with_interval(ax, points, "unet_passes", "content", label=method, **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="UNet evaluations an image", ylabel="content correct, %", ylim=(0, 102))
    ax.legend(fontsize=7)
    return figure
