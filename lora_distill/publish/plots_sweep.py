"""The figure of the sweep: what each value of each setting gives on the val split, and which one is taken."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_distill.publish.style import REFERENCE, Rows, column

COLUMNS = 3
MEASURES = {  # column: label and style
    "errors": ("errors, %", {"color": "C0", "marker": "o"}),
    "fit_error": ("fit error, %", {"color": "C4", "marker": "v", "linestyle": "--"}),
}


def errors_by_value(rows: Rows) -> Figure:
    """Errors and fit error against the values of a setting, a panel a method and setting.

    Bars are one standard error of the difference from the best value. A ring marks the value that was chosen, a grey
    line the profile's. Values stand at equal distances, in their order.
    """
    panels = list(dict.fromkeys((row["method"], row["setting"]) for row in rows))
    lines = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(6.5, 0.4 + 1.6 * lines), squeeze=False)
    for ax, (method, setting) in zip(axes.flat, panels, strict=False):
        _panel(ax, [row for row in rows if (row["method"], row["setting"]) == (method, setting)])
        ax.set(title=method, xlabel=setting, ylim=(0, None))
    for ax in axes[:, 0]:
        ax.set_ylabel("per cent")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _panel(ax: Axes, rows: Rows) -> None:
    places = np.arange(len(rows))
    for name, (label, style) in MEASURES.items():
        values, error = (100 * column(rows, key).astype(float) for key in (name, f"{name}_se"))
        ax.errorbar(places, values, error, label=label, **style)
        for place, row in enumerate(rows):
            if row["chosen"]:
                ring = {"markersize": 10, "markerfacecolor": "none", "color": "black", "linestyle": ""}
                ax.plot(place, values[place], marker="o", label="chosen" if name == "fit_error" else "_", **ring)
    for place, row in enumerate(rows):
        if row["default"]:
            ax.axvline(place, zorder=0, **REFERENCE)
    ax.set_xticks(places, [_short(row["value"]) for row in rows])
    ax.set_xlim(-0.4, len(rows) - 0.6)


def _short(value: float) -> str:
    """A value as a narrow panel has room for it: 2.5e-4."""
    return f"{value:g}" if value == 0 or value >= 0.01 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
