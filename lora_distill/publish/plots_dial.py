"""Figures of the command `dial`: what a LoRA draws whose weight is the guidance scale, and students on trajectories."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_distill.publish.style import Rows, column, grouped

GUIDANCE = "guidance, two passes"
LINES = {  # methods of the first three panels
    GUIDANCE: {"color": "C4", "marker": "v"},
    "paper's student, scaled": {"color": "black", "marker": "*", "markersize": 8},
    "dial": {"color": "C2", "marker": "^"},
    "dial on trajectories": {"color": "C2", "marker": "^", "markerfacecolor": "white", "linestyle": "--"},
}
RANKS = {"color": "C0", "marker": "o"}


def quality_by_scale(rows: Rows) -> Figure:
    """Errors, distance and PSNR to guidance against w, and PSNR of dials of several ranks; bands: 95 % intervals."""
    figure, axes = plt.subplots(2, 2, figsize=(6.5, 5.2))
    methods = grouped(rows, "method")
    for name, style in LINES.items():
        own = methods[name]
        _line(axes[0, 0], own, "errors", 100, name, style)
        axes[0, 1].plot(column(own, "w"), column(own, "fd_efficientnet_lite0"), **style)
        if name != GUIDANCE:
            _line(axes[1, 0], own, "psnr_db", 1, name, style)
    ranked = sorted((own for own in methods.values() if own[0]["rank"] and "trajectories" in own[0]["method"]),
                    key=lambda own: own[0]["rank"])  # fmt: skip
    for own, linestyle in zip(ranked, (":", "--", "-"), strict=False):
        _line(axes[1, 1], own, "psnr_db", 1, _rank(own), RANKS | {"linestyle": linestyle})
    ticks = sorted(set(column(rows, "w")))
    for ax in axes.flat:
        ax.set(xscale="log", xlabel="guidance scale w")
        ax.set_xticks(ticks, [f"{w:g}" for w in ticks])
        ax.minorticks_off()
    axes[0, 0].set(ylabel="pictures with an error, %", ylim=(0, None))
    axes[0, 1].set(ylabel="FD-EfficientNet-Lite0", yscale="log")
    axes[1, 0].set_ylabel("PSNR to guidance, dB")
    axes[1, 1].set(ylabel="PSNR to guidance, dB", title="dials on trajectories, rank")
    axes[1, 1].legend()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _rank(rows: Rows) -> str:
    trainings = rows[0].get("trainings") or 1
    return f"{rows[0]['rank']}, {trainings} training{'s' * (trainings > 1)}"


def _line(ax: Axes, rows: Rows, name: str, unit: float, label: str, style: dict) -> None:
    w, value, low, high = (column(rows, key).astype(float) for key in ("w", name, f"{name}_low", f"{name}_high"))
    ax.plot(w, unit * value, label=label, **style)
    ax.fill_between(w, unit * low, unit * high, color=style["color"], alpha=0.12, linewidth=0)


def fidelity_by_seconds(rows: Rows) -> Figure:
    """PSNR and Frechet distance to the teacher against the seconds of a training; bars: 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.6))
    styles = ({"color": "black", "marker": "*", "markersize": 9}, {"color": "C2", "marker": "o"},
              {"color": "C2", "marker": "o", "markerfacecolor": "white"})  # fmt: skip
    for row, style in zip(rows, styles, strict=True):
        spread = [[row["psnr_db"] - row["psnr_db_low"]], [row["psnr_db_high"] - row["psnr_db"]]]
        label = f"{row['method']}, {row['updates']} updates"
        axes[0].errorbar(row["training_seconds"], row["psnr_db"], spread, linestyle="", label=label, **style)
        axes[1].plot(row["training_seconds"], row["fd_to_teacher"], linestyle="", **style)
    seconds, distance = (1.15 * max(column(rows, name)) for name in ("training_seconds", "fd_to_teacher"))
    axes[0].set(xlabel="seconds of training", ylabel="PSNR to the teacher, dB", xlim=(0, seconds))
    axes[1].set(xlabel="seconds of training", ylabel="FD to the teacher", xlim=(0, seconds), ylim=(0, distance))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure
