"""Figures on disk: the same bytes from the same numbers, provenance inside, a mark on what is no result."""

import io
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from lora_distill import settings
from lora_distill.publish import figures
from lora_distill.publish.plots import FIGURES
from lora_distill.settings import Settings
from lora_distill.storage import read_table

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "figures" / "full"
ROWS = [{"timestep": t, "quantity": "v", "relative_difference": value} for t, value in ((19, 0.25), (89, 0.5))]
GRID = figures.grid_rows(["w = 1", "w = 3"], ["a lion, 5 $", "a bus\nand a tree", "an owl"])
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
KINDS = ("svg", "png")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with the profiles cpu and smoke and no figures."""
    (tmp_path / "params").mkdir()
    for profile in ("cpu", "smoke"):
        (tmp_path / "params" / f"{profile}.yaml").write_text(f"profile: {profile}\n", encoding="utf-8")
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "lora_distill")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The command line in a fresh process, on the figures below `cwd`."""
    code = (
        "import sys; from pathlib import Path; from lora_distill import __main__, settings\n"
        "import lora_distill.publish.figures\n"
        "settings.PACKAGE = Path.cwd() / 'lora_distill'\n"
        "try: __main__.main()\n"
        "finally: print('diffusers' in sys.modules)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)


def test_a_figure_is_written_in_two_formats_with_its_numbers(checkout):
    figures.save("02_difference", Settings(), ROWS)
    assert written(checkout / "runs" / "cpu" / "figures").keys() == {
        "provenance.json", *(f"02_difference.{kind}" for kind in ("csv", *KINDS))
    }  # fmt: skip
    assert read_table(checkout / "runs" / "cpu" / "figures" / "02_difference.csv") == ROWS


def test_the_same_numbers_give_the_same_bytes_in_a_fresh_process_without_a_model(checkout):
    figures.save("02_difference", Settings(), ROWS)
    figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
    folder = checkout / "runs" / "cpu" / "figures"
    first = written(folder)
    for name in ("02_difference", "02_guidance_grid"):
        for kind in KINDS:
            (folder / f"{name}.{kind}").unlink()
    done = command("figures", "--profile", "cpu", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "reading runs/cpu/figures",
        "runs/cpu/figures/02_guidance_grid.svg",
        "runs/cpu/figures/02_difference.svg",
        "False",
    ]
    assert written(folder) == first


def test_neither_matplotlibrc_nor_notebook_changes_a_figure(checkout):
    figures.save("02_difference", Settings(), ROWS)
    first = written(checkout / "runs" / "cpu" / "figures")
    with plt.rc_context({"font.size": 20, "svg.hashsalt": None, "figure.dpi": 50}):
        figures.redraw(checkout / "runs" / "cpu" / "figures")
    assert written(checkout / "runs" / "cpu" / "figures") == first


def test_the_figure_is_shown_once(checkout):
    figure = figures.save("02_difference", Settings(), ROWS)
    assert figure.axes and not plt.get_fignums()


def test_provenance_is_that_of_the_results(checkout, monkeypatch):
    monkeypatch.setattr(figures, "git_commit", lambda: "then")
    figures.save("02_same_noise", Settings(), GRID, IMAGES)
    monkeypatch.setattr(figures, "git_commit", lambda: "now")
    figures.save("02_difference", Settings(), ROWS)
    figures.redraw(checkout / "runs" / "cpu" / "figures")
    image = Image.open(checkout / "runs" / "cpu" / "figures" / "02_same_noise.png")
    comment = json.loads(image.text["Comment"])
    assert comment.keys() == {"profile", "eval_prompts", "params", "commit", "device", "claims"}
    assert (comment["commit"], comment["profile"]) == ("then", "cpu")
    assert comment["claims"] == list(FIGURES["02_same_noise"].claims)
    assert image.text["Title"] == FIGURES["02_same_noise"].caption


def test_figures_of_a_few_prompts_are_marked_as_no_result_whatever_the_profile_is_called(checkout):
    few = figures.save("02_difference", Settings(profile="mine", eval_prompts=4), ROWS)
    marks = [text.get_text() for text in few.texts if "Figure" not in text.get_text()]
    assert marks == ["4 prompts: not a result"]
    assert len(figures.save("02_difference", Settings(profile="smoke"), ROWS).texts) == 1, "the caption alone"


def test_a_figure_says_below_what_it_is_and_rests_on(checkout, monkeypatch):
    monkeypatch.setattr(figures, "device_name", lambda device: "a machine")
    rows = [{"method": "a", "step": step, "loss": 0.5, "n": n, "seeds": 3} for step, n in ((0, 8), (1, 1600))]
    (text,) = figures.save("02_loss", Settings(), rows).texts
    number = 1 + [name for name in FIGURES if name.startswith("02")].index("02_loss")
    assert " ".join(text.get_text().split()) == (
        f"Figure 02.{number}. {FIGURES['02_loss'].caption}. N = 8 to 1,600, seeds: 3, profile cpu, a machine."
    )


def test_a_caption_stands_below_a_legend_that_is_outside_of_the_axes():
    figure, ax = plt.subplots(layout="constrained")
    ax.plot([0, 1], label="a curve")
    figure.legend(loc="outside lower center")
    figures._print_below(figure, "Figure 1. " + "A caption of some words. " * 12)
    for size in ("tight", None):
        figure.savefig(io.BytesIO(), bbox_inches=size)
        (legend,), (text,) = figure.legends, figure.texts
        assert text.get_window_extent().y1 < legend.get_window_extent().y0 < ax.get_window_extent().y0
    plt.close(figure)


def test_redrawn_figures_keep_their_mark(checkout):
    figures.save("02_difference", Settings(eval_prompts=4), ROWS)
    folder = checkout / "runs" / "cpu" / "figures"
    before = written(folder)
    figures.redraw(folder)
    assert written(folder) == before


def test_of_several_processes_the_main_one_draws(checkout, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert figures.save("02_difference", Settings(), ROWS) is None
    assert not (checkout / "runs").exists()


def test_images_are_kept_as_they_are(checkout):
    figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
    sheet = checkout / "runs" / "cpu" / "figures" / "02_guidance_grid_images.png"
    assert Image.open(sheet).size == (3 * 8, 2 * 8)
    assert np.array_equal(figures.read_images(sheet, GRID), IMAGES)


@pytest.mark.parametrize("name", ["02_difference.csv", "02_guidance_grid_images.png"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged or was changed by hand"),
        (lambda path: path.write_bytes(b""), "is damaged or was changed by hand"),
    ],
    ids=["missing", "cut", "empty"],
)
def test_damaged_files_are_named_before_anything_is_drawn(checkout, monkeypatch, name, damage, message):
    monkeypatch.setattr(figures, "render", lambda *_, **__: (None, {}))
    figures.save("02_difference", Settings(), ROWS)
    figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
    damage(checkout / "runs" / "cpu" / "figures" / name)
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name} {message}"):
        figures.redraw(checkout / "runs" / "cpu" / "figures")


def test_bad_input_is_one_line(checkout):
    for profile, message in (
        ("cpu", "no results in runs/cpu/figures nor in figures/cpu; "),
        ("nope", "no profile 'nope'"),
    ):
        done = command("figures", "--profile", profile, cwd=checkout)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
    (checkout / "runs" / "cpu" / "figures").mkdir(parents=True)
    (checkout / "runs" / "cpu" / "figures" / "provenance.json").write_text('{"02_diff', encoding="utf-8")
    with pytest.raises(ValueError, match=r"provenance\.json is damaged"):
        figures.redraw(checkout / "runs" / "cpu" / "figures")


class TestProvenance:
    """provenance.json is made again from the pictures, which hold it too."""

    @pytest.fixture
    def folder(self, checkout) -> Path:
        figures.save("02_difference", Settings(eval_prompts=4), ROWS)
        figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
        return checkout / "runs" / "cpu" / "figures"

    @pytest.mark.parametrize(
        "content",
        [
            None, b"", b"[]", b"{}", b"3", b"null", b"{", b"\xff\xfe{\x00}\x00", b"\x00" * 50, b'{"02_difference": []}',
            b'{"02_difference": {}}', b'{"02_difference": {"sha256": []}}', b'{"02_difference": {"sha256": {"a": 1}}}',
            b'{"02_difference": {"sha256": {"../../x.csv": "0"}}}',
            b'{"02_difference": {"sha256": {}, "eval_prompts": "four"}}',
        ],
    )  # fmt: skip
    def test_whatever_it_holds_the_figures_are_drawn_the_same(self, folder, content):
        before, path = written(folder), folder / "provenance.json"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"provenance.json.*made again from the pictures"):
            assert len(figures.redraw(folder)) == 2
        assert written(folder) == before
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.warns(UserWarning, match="made again"):
            figures.save("02_difference", Settings(eval_prompts=4), ROWS)
        assert written(folder) == before

    def test_nothing_says_it(self, folder):
        (folder / "provenance.json").write_text("[]", encoding="utf-8")
        (folder / "02_difference.png").write_bytes(b"cut")
        with pytest.raises(ValueError, match=r"02_difference.png: expected a figure that says what made it; run its"):
            figures.redraw(folder)
        with pytest.warns(UserWarning, match="begun anew"):
            figures.save("02_difference", Settings(), ROWS)

    def test_no_figure_is_an_error(self, folder):
        for path in folder.iterdir():
            path.unlink()
        (folder / "provenance.json").write_text("{}", encoding="utf-8")
        with pytest.raises(FileNotFoundError, match=r"no figures in .*figures; python -m lora_distill reproduce makes"):
            figures.redraw(folder)


@pytest.mark.parametrize("after", range(5))
def test_a_full_disk_leaves_the_old_figure_whole(checkout, monkeypatch, after):
    """Table, pictures and provenance get their names together."""
    figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
    folder, write = checkout / "runs" / "cpu" / "figures", Path.write_bytes
    before, count = written(folder), iter(range(10))

    def full(path, content):
        if next(count) == after:
            write(path, content[:9])
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"figures/.* could not be written: No space left on device"):
            figures.save(
                "02_guidance_grid", Settings(seed=1), figures.grid_rows(["a", "b"], ["c", "d", "e"]), 255 - IMAGES
            )
    assert written(folder) == before
    figures.redraw(folder)


def test_the_table_and_the_sheet_are_held_to_each_other(checkout):
    """Rows changed together with their digest, as no notebook leaves them: still one line."""
    figures.save("02_guidance_grid", Settings(), GRID, IMAGES)
    folder = checkout / "runs" / "cpu" / "figures"
    known = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    for content in (
        "row,column,caption\n",
        "row,column,caption\n" + "a,1,b\n" * 7,
        "row\na\n",
        "x",
        "",
        "\x00",
        "a,a\n1,2\n",
    ):
        (folder / "02_guidance_grid.csv").write_text(content, encoding="utf-8")
        known["02_guidance_grid"]["sha256"]["02_guidance_grid.csv"] = figures.sha256(folder / "02_guidance_grid.csv")
        (folder / "provenance.json").write_text(json.dumps(known), encoding="utf-8")
        with pytest.raises(ValueError, match=r"02_guidance_grid\.csv") as error:
            figures.redraw(folder)
        assert "\n" not in str(error.value)


def test_rows_that_a_figure_cannot_draw(checkout):
    with pytest.raises(ValueError, match=r"02_difference.csv has no column 'relative_difference'"):
        figures.save("02_difference", Settings(), [{"timestep": 1, "quantity": "v"}])
    with pytest.raises(ValueError, match="no figure '02_nothing'"):
        figures.save("02_nothing", Settings(), ROWS)


def test_pdf_is_written_where_it_is_asked_for(checkout):
    figures.save("02_difference", Settings(), ROWS)
    folder = checkout / "runs" / "cpu" / "figures"
    figures.redraw(folder, pdf=True)
    first = (folder / "02_difference.pdf").read_bytes()
    figures.redraw(folder, pdf=True)
    assert first.startswith(b"%PDF") and (folder / "02_difference.pdf").read_bytes() == first


def test_committed_figures_are_those_of_the_list():
    """All figures of every notebook that was run, and nothing that no longer is one."""
    drawn = {path.stem for path in COMMITTED.glob("*.svg")}
    assert drawn == figures.read_provenance(COMMITTED).keys()
    of_notebooks = {
        name for name in FIGURES if not name.startswith(("01_measured", "growth", "sweep"))
    }  # those of commands
    assert drawn == {name for name in of_notebooks if name[:2] in {each[:2] for each in drawn}}


def test_committed_figures_can_be_drawn_again(tmp_path):
    for path in COMMITTED.iterdir():
        if path.suffix in {".csv", ".json"} or path.stem.endswith("_images"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert {path.name for path in figures.redraw(tmp_path)} == {path.name for path in COMMITTED.glob("*.svg")}


def test_a_sheet_of_photographs_holds_thumbnails_and_one_of_small_pictures_the_pictures():
    rng = np.random.default_rng(0)
    for side, kept in ((512, 128), (64, 64)):
        images = rng.integers(0, 256, (6, side, side, 3), dtype=np.uint8)
        sheet = Image.open(io.BytesIO(figures.image_sheet(images, lines=2)))
        assert sheet.size == (3 * kept, 2 * kept)
        if side == kept:
            assert (np.asarray(sheet)[:64, :64] == images[0]).all()
