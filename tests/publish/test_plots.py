"""What each figure shows: axes with labels, a legend where there are several curves, every row and every image."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lora_distill.memory import schemes
from lora_distill.publish import plots, plots_memory
from lora_distill.publish.figures import STYLE, grid_rows
from lora_distill.publish.plots import FIGURES
from lora_distill.publish.plots_few_steps import quality_against_passes
from lora_distill.publish.style import image_grid

SHARE = {"low": 0.4, "high": 0.6, "n": 100}
TERMS = {f"{term}_gb": 1.0 for term in plots_memory.COLOURS}
DISTANCE = {f"fd_efficientnet_lite0{end}": value for end, value in (("", 90.0), ("_low", 88.0), ("_high", 92.0))}
FIT = {"fit_error": 0.2, "fit_error_low": 0.1, "fit_error_high": 0.3}
QUALITY = {"all_correct": 0.5, **FIT, **DISTANCE, **SHARE}
ERRORS = {"errors": 0.5, "seeds": 2, **SHARE}
ROWS = {
    "00_loss": [{"stage": s, "step": i, "loss": 1 / i} for s in ("vae_crops", "unet") for i in (1, 2)],
    "00_guidance": [
        {"guidance_scale": w, "objects": n, "all_correct": 0.5, "predicted": p, **SHARE}
        for w, n, p in ((1.0, "1", 0.9), (2.0, "1", None), (1.0, "held out", None), (None, "VAE", None))
    ],
    "00_reader": [
        {"eye": e, "tolerance": t, "labelled": 0.7, "reader": t, "alike": 0.8, "n": 5, "chosen": 0.4}
        for e in ("first", "second") for t in (0.3, 0.4)
    ],
    "01_schemes": [{"label": s, "batch": b, "checkpointing": b > 1, **TERMS} for b in (1, 16) for s in "ab"],
    "01_sharing": [
        {"precision": p, "checkpointing": c, "batch": b, "separate_gb": 2.0, "shared_gb": 1.5}
        for p in ("float32", "16-bit") for c in (False, True) for b in (1, 2)
    ],
    "01_inference": [{"label": s, "images": n, **TERMS} for n in (1, 16) for s in "ab"],
    "01_three_ways": [
        {"unet": u, "simulation_gb": 1.0, "measured_gb": m, "account_to_simulation": 1.01, "account_to_measured": m}
        for u, m in (("SD 1.5", None), ("bundled", 1.2))
    ],
    "01_measured_memory": [
        {"label": s, "resolution": 512, "batch": 1, "precision": "float32", "machine": "m", "device": "cpu",
         "account_gb": 1.0, "simulation_gb": 1.0, "measured_gb": m, "process_gb": m and 1.4}
        for s, m in (("a", 1.1), ("b", None))
    ],
    "01_measured_seconds": [
        {"method": s, "resolution": 512, "batch": 1, "dtype": "float32", "machine": "m", "how": h,
         "text_encoder_seconds": 0.5, "unet_seconds": 2.0, "vae_seconds": 0.5,
         "seconds_an_image": 3.0, "saving_percent": 40.0}
        for h in ("run whole", "computed from passes") for s in "ab"
    ],
    "02_guidance_curve": [
        {"guidance_scale": w, "objects": o, "teacher_guidance_scale": 3.0, **QUALITY, "predicted": p}
        for w, p in ((1.0, 0.4), (3.0, None)) for o in ("all", *"1234")
    ],
    "growth": [
        {"panel": p, "value": v, "method": m, "images_per_s": 3.0, "peak_mb": 500.0}
        for p in ("batch", "rank", "resolution", "captions", "processes") for v in (1, 2000)
        for m in ("guided distillation", "LCM-LoRA")
    ],
    "dial": [
        {"method": m, "w": w, "rank": rank, "fd_efficientnet_lite0": 90.0,
         **{f"{name}{end}": value for end in ("", "_low", "_high")
            for name, value in (("errors", 0.2), ("psnr_db", 25.0 if rank else None))}}
        for m, rank in (("guidance, two passes", None), ("paper's student, scaled", 4), ("dial", 4),
                        ("dial on trajectories", 4), ("dial on trajectories, rank 1", 1))
        for w in (1.5, 3.0)
    ],
    "trajectories": [
        {"method": m, "updates": 300, "training_seconds": s, "psnr_db": 25.0, "psnr_db_low": 24.0, "psnr_db_high": 26.0,
         "fd_to_teacher": 5.0}
        for m, s in (("paper's student", 90.0), ("on trajectories", 50.0), ("for as long", 90.0))
    ],
    "sweep": [
        {"method": m, "setting": "learning_rate", "value": v, "default": v == 1e-3, "chosen": v == 2e-3, "n": 96,
         "errors": 0.2, "errors_se": 0.01, "fit_error": 0.1, "fit_error_se": 0.01}
        for m in "abcd" for v in (1e-3, 2e-3)
    ],
    "02_difference": [
        {"timestep": t, "quantity": q, "relative_difference": 0.1} for t in (1, 2) for q in ("v", "x0", "ε")
    ],
    "02_errors": [
        {"method": m, "objects": o, "compositions": c, **ERRORS, "psnr_to_teacher_db": None if m == "a" else 20.0}
        for m in "ab" for o in ("all", *"1234") for c in ("all", "seen", "held out")
    ],
    "02_errors_against_passes": [
        {"method": m, "objects": o, "unet_passes": n, **ERRORS, "trained": m == "b"}
        for m, n in (("a", 8), ("b", 4), ("b", 8)) for o in ("all", *"1234")
    ],
    "02_loss": [{"method": m, "step": i, "loss": 0.1} for m in "ab" for i in (1, 2)],
    "02_quality_against_steps": [
        {"method": m, "step": i, **QUALITY} for m, i in (("a", 0), ("a", 1), ("teacher", None))
    ],
    "04_rho": [
        {"runtime": r, "threads": t, "batch": b, "unet_seconds": 0.1 * b}
        for r in ("PyTorch", "OpenVINO") for t in (1, 2) for b in (1, 2, 4)
    ],
    "04_seconds_per_image": [
        {"runtime": "PyTorch", "threads": t, "method": m, "seconds_an_image": 0.3,
         "lowest": 0.2, "highest": 0.4, "saving_percent": 20.0,
         "text_encoder_seconds": 0.1, "unet_seconds": 0.1, "vae_seconds": 0.1, "batch": b, "repeats": 5}
        for b in (1, 8) for t in (1, 2) for m in "ab"
    ],
    "03_quality_against_passes": [
        {"method": m, "unet_passes": n, "objects": o, "content": 0.5, "fit_error": 0.2, "fd_efficientnet_lite0": 80.0,
         "fd_efficientnet_lite0_floor": 30.0, "trained": m == "b", **SHARE}
        for m, n in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("teacher", 50)) for o in ("all", "1", "4")
    ],
    "04_distance": [
        {"source": s, "method": m, "distance": d, "sd": sd, "floor": f, "metric": "FD",
         "n": sd and 60, "seeds": sd and 3}
        for s, m, d, sd, f in (("slides", "a", None, None, None), ("slides", "b", 20.0, None, None),
                               ("here", "a", 90.0, 2.0, 30.0), ("here", "b", 80.0, 1.0, 30.0))
    ],
    "04_speed": [{"source": s, "method": m, "seconds": t} for s in ("slides", "here") for m, t in (("a", 2), ("b", 1))],
    "04_pareto": [
        {"method": m, "unet_passes": n, "content": 0.5, "trained": m == "b", **SHARE}
        for m, n in (("a", 1), ("b", 2), ("b", 4))
    ],
    "04_saving": [
        {"resolution": r, "batch": b, "method": m, "saving_percent": 30.0, "bound_percent": 35.0,
         "saving_percent_low": 25.0, "saving_percent_high": 33.0}
        for r in (64, 96) for b in (1, 4) for m in "ab"
    ],
}  # fmt: skip
WITHOUT_LEGEND = {"00_loss", "04_speed"}  # a single curve a panel, or bars with their names


@pytest.fixture(autouse=True)
def style():
    with plt.style.context(STYLE, after_reset=True):
        yield
    plt.close("all")


def test_every_figure_is_tested_here():
    assert ROWS.keys() == {name for name, plot in FIGURES.items() if plot.draw is not image_grid}


@pytest.mark.parametrize("name", ROWS)
def test_axes_are_labelled(name):
    figure = FIGURES[name].draw(ROWS[name])
    figure.draw_without_rendering()
    bottom = [ax for ax in figure.axes if ax.get_subplotspec().is_last_row()]
    assert all(ax.get_xlabel() for ax in bottom)
    bars = {label.get_text() for ax in figure.axes for label in ax.get_yticklabels()}
    assert any(ax.get_ylabel() for ax in figure.axes) or {"a", "b"} <= bars
    assert any([*figure.legends, *(ax.get_legend() for ax in figure.axes)]) == (name not in WITHOUT_LEGEND)
    assert all(ax.has_data() for ax in figure.axes)


def test_names_and_captions():
    assert list(FIGURES) == sorted(FIGURES, key=lambda name: name[:2])
    assert all(plot.caption[0].isupper() and not plot.caption.endswith(".") for plot in FIGURES.values())
    assert all(isinstance(plot.claims, tuple) for plot in FIGURES.values())


def test_the_front_is_the_best_that_so_many_evaluations_buy():
    rows = [{"method": m, "unet_passes": n, "content": c, "trained": False, **SHARE}
            for m, n, c in (("a", 1, 0.25), ("b", 2, 0.5), ("a", 4, 0.375), ("b", 8, 0.875))]  # fmt: skip
    ax = FIGURES["04_pareto"].draw(rows).axes[0]
    (front,) = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert front.get_xydata().tolist() == [[1, 75], [2, 50], [4, 50], [8, 12.5]]


class TestErrors:
    def test_they_are_in_per_cent_on_a_log_axis_and_none_at_all_stands_at_half_a_picture(self):
        rows = [
            {"method": "a", "objects": o, "unet_passes": n, "errors": e, "low": e / 2, "high": 2 * e, "n": 50,
             "seeds": 2, "trained": True}
            for n, e in ((4, 0.25), (8, 0.0)) for o in "14"
        ]  # fmt: skip
        for ax, title in zip(plots.errors_against_passes(rows).axes, ("1 object", "4 objects"), strict=True):
            assert (ax.get_yscale(), ax.get_title()) == ("log", title)
            assert ax.lines[0].get_xydata().tolist() == [[4, 25], [8, 0.5]]

    def test_a_curve_of_guidance_has_a_short_line_at_what_the_captions_leave_right(self):
        ax = plots.quality_against_guidance(ROWS["02_guidance_curve"]).axes[0]
        lines = [line.get_xydata().tolist() for line in ax.lines]
        assert lines.count([[0.25, 40], [1.75, 40]]) == 4

    def test_a_distance_stands_beside_lines_of_known_ones(self):
        known = {"fd_efficientnet_lite0_floor": 3.0, "fd_efficientnet_lite0_vae": 10.0}
        rows = [row | known for row in ROWS["02_guidance_curve"]]
        levels = [line.get_ydata()[0] for line in plots.quality_against_guidance(rows).axes[2].lines]
        assert {3.0, 10.0} <= set(levels)

    def test_steps_of_a_share_are_errors_beside_the_teachers(self):
        figure = plots.quality_against_steps([row | {"all_correct": 0.75} for row in ROWS["02_quality_against_steps"]])
        assert [ax.get_ylabel() for ax in figure.axes] == ["errors, %", "fit error", "FD-EfficientNet-Lite0"]
        assert list(figure.axes[0].lines[0].get_ydata()) == [25, 25]


def test_a_loss_without_steps_is_a_line():
    rows = [*ROWS["02_loss"], {"method": "untrained", "step": None, "loss": 0.5}]
    (line,) = [line for line in plots.distillation_loss(rows).axes[0].lines if line.get_label() == "untrained"]
    assert list(line.get_ydata()) == [0.5, 0.5]


def test_the_terms_of_memory_have_colours():
    assert tuple(plots_memory.COLOURS) == schemes.TERMS


def test_nothing_lies_outside_the_axes_of_the_account():
    rows = [row | {"account_to_simulation": 1.3} for row in ROWS["01_three_ways"]]
    low, high = FIGURES["01_three_ways"].draw(rows).axes[0].get_ylim()
    assert low < -30 and high > 30


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


class TestImageGrid:
    def test_every_image_is_shown_under_its_caption_and_beside_its_label(self):
        images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
        figure = image_grid(grid_rows(["drawn", "VAE"], ["one", "two", "three"]), images)
        assert [int(image.get_array()[0, 0, 0]) for image in figure.axes[0].images] == [0, 1, 2, 3, 4, 5]
        assert texts(figure) == ["one", "two", "three", "drawn", "VAE"]

    def test_captions_of_other_images_are_written(self):
        rows = [{"row": None, "column": 0, "caption": "one"}, {"row": "b", "column": 0, "caption": "two"}]
        assert texts(image_grid(rows, np.zeros((2, 4, 4, 3), np.uint8))) == ["one", "two", "b"]

    def test_long_captions_and_formulas_are_no_trouble(self):
        caption = "a man in a shirt that says $ 5 and $ 6 walks " + "past a dog " * 20
        figure = image_grid([{"row": None, "column": 0, "caption": caption}], np.zeros((1, 4, 4, 3), np.uint8))
        figure.draw_without_rendering()
        (text,) = texts(figure)
        assert text.count("\n") == 9 and text.endswith("…")

    def test_a_line_that_is_not_full(self):
        with pytest.raises(ValueError, match="3 images do not fill 2 lines"):
            image_grid(grid_rows(["a", "b"], ["x", "y"])[:3], np.zeros((3, 4, 4, 3), np.uint8))


# ---------------------------------------------------------------------------------------------- photographs

COSINE = {"low": 0.28, "high": 0.32, "n": 60}
FD = {"fd_efficientnet_lite0": 50.0, "fd_efficientnet_lite0_low": 48.0, "fd_efficientnet_lite0_high": 52.0}


def shown(figure) -> str:
    """All that is written on the axes of a figure."""
    return " ".join(text for ax in figure.axes for text in (ax.get_title(), ax.get_ylabel(), ax.get_xlabel()))


def test_errors_are_what_is_not_right_and_none_at_all_is_half_an_error():
    share = {"low": 0.9, "high": 1.0, "n": 50, "fit_error": 0.2, "fd_efficientnet_lite0": 80.0, "trained": False}
    rows = [{"method": "a", "unet_passes": n, "objects": o, "content": c, **share}
            for n, c in ((1, 0.6), (4, 1.0)) for o in ("all", "1", "2")]  # fmt: skip
    figure = quality_against_passes(rows)
    panels = {ax.get_title() or ax.get_ylabel(): ax for ax in figure.get_axes()}
    assert list(panels) == ["errors, %", "fit error of the objects", "FD-EfficientNet-Lite0", "1 object", "2 objects"]
    for name in ("errors, %", "1 object", "2 objects"):
        assert panels[name].lines[0].get_ydata().tolist() == pytest.approx([40, 1])
        assert panels[name].get_yscale() == "log"


@pytest.mark.parametrize("measure", [{"clip_cosine": 0.3, **COSINE}, {"n": 60}], ids=["CLIP", "no CLIP"])
def test_curves_of_photographs_are_of_the_cosine_or_of_the_distance_alone(measure):
    curve = [
        {"guidance_scale": w, "objects": "all", **measure, **FD, "teacher_guidance_scale": 7.5} for w in (1.0, 7.5)
    ]
    steps = [{"method": "LoRA", "step": step, **measure, **FD} for step in (0, 10)]
    steps = [row | dict.fromkeys(("low", "high") if "low" in row else ()) for row in steps]
    teacher = {"method": "teacher, two passes", "step": None, **measure, **FD}
    for figure in (plots.quality_against_guidance(curve), plots.quality_against_steps([*steps, teacher])):
        assert len(figure.axes) == (2 if "clip_cosine" in measure else 1)
        assert ("CLIP cosine" in shown(figure)) == ("clip_cosine" in measure) and "correct" not in shown(figure)
        plt.close(figure)


@pytest.mark.parametrize("measure", [{"clip_cosine": 0.3, **COSINE}, {"fd_efficientnet_lite0": 50.0, **COSINE}])
def test_the_front_of_photographs_is_in_the_unit_of_what_was_measured(measure):
    column = next(iter(measure))
    rows = [
        {"method": "DDIM, one pass", "unet_passes": n, **measure, column: measure[column] * factor, "trained": False}
        for n, factor in ((2, 1.1), (4, 0.9))
    ]
    figures = (
        quality_against_passes(
            [{"fit_error": None, "fd_efficientnet_lite0": 50.0, **row, "objects": "all"} for row in rows]
        ),
        plots.pareto_front(rows),
    )
    for figure in figures:
        assert figure.axes[0].get_ylabel() == {"clip_cosine": "CLIP cosine"}.get(column, "FD-EfficientNet-Lite0")
        plt.close(figure)
    front = plots.pareto_front(rows).axes[0].lines[-1].get_ydata()
    best = max if column == "clip_cosine" else min
    assert list(front) == [measure[column] * 1.1, best(measure[column] * 1.1, measure[column] * 0.9)]
