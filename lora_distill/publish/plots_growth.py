"""The figure of `bench --growth`: images a second and peak memory against what they grow with."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_distill.publish.style import Rows, column, grouped, log_axis

MEASURES = {"images_per_s": "images/s", "peak_mb": "peak memory, GB"}
PANELS = {
    "batch": "batch",
    "rank": "rank",
    "resolution": "side, px",
    "captions": "captions in the set",
    "processes": "processes",
}
STYLES = {  # the adapters of both trainings
    "guided distillation": {"color": "C0", "marker": "o"},
    "LCM-LoRA": {"color": "C2", "marker": "^"},
}


def growth(rows: Rows) -> Figure:
    """A column of panels for what is changed, a line for what is measured; images/s on a log axis.

    Values stand at equal distances. What was not measured is left out.
    """
    panels = grouped(rows, "panel")
    widths = [2 + len(grouped(own, "value")) for own in panels.values()]
    options = {"sharex": "col", "sharey": "row", "squeeze": False, "width_ratios": widths}
    figure, axes = plt.subplots(2, len(panels), figsize=(7.0, 3.3), **options)
    for (panel, own), (speed, memory) in zip(panels.items(), axes.T, strict=True):
        values = list(grouped(own, "value"))
        for ax, measure in ((speed, "images_per_s"), (memory, "peak_mb")):
            _curves(ax, own, values, measure)
        memory.set_xticks(range(len(values)), [_short(value) for value in values])
        memory.set(xlabel=PANELS[panel], xlim=(-0.5, len(values) - 0.5))
    for ax, label in zip(axes[:, 0], MEASURES.values(), strict=True):
        ax.set(ylabel=label)
    log_axis(axes[0, 0])
    axes[1, 0].set_ylim(0, None)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.align_ylabels(axes[:, 0])
    return figure


def _curves(ax: Axes, rows: Rows, values: list[int], measure: str) -> None:
    for method, style in STYLES.items():
        own = [row for row in rows if row["method"] == method and row[measure] is not None]
        factor = 1e-3 if measure == "peak_mb" else 1
        ax.plot([values.index(row["value"]) for row in own], factor * column(own, measure), label=method, **style)


def _short(value: int) -> str:
    """A value as a narrow panel has room for it: 10k."""
    return f"{value // 1000}k" if value >= 1000 else str(value)
