"""The command line: `python -m lora_distill COMMAND`. What is wrong with the input is said in one line."""

import gc
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_distill.errors import InputError, RunError, one_line, printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from lora_distill.settings import Settings

# Modules are imported by the command that needs them, so that --help does not wait for torch.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="run and train anew: deletes the trainings of the run and reuses no finished notebook; keeps cache/ "
        "(encoded images, what was sampled, exported graphs), which is checked by its keys",
    ),
]
SERIES, RESULTS, MODELS = "The series of notebooks", "Results of a run", "Without notebooks"
Profile = Annotated[str, typer.Option(help="a name in params/, or the path of a YAML file")]
# What the extra [series] installs, as far as a command imports it.
NOTEBOOK_PACKAGES = set(
    [
        "bs4",
        "ipykernel",
        "jinja2",
        "jupyter_client",
        "latex2mathml",
        "matplotlib",
        "nbclient",
        "nbconvert",
        "nbformat",
        "papermill",
    ]
)


@app.callback()
def _of_all_commands(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error, not one line")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the versions of package and libraries")] = False,
) -> None:
    """LoRA distillation of guided diffusion models, and LCM-LoRA: run the notebooks, read their results, or train and
    draw without them. A first look: reproduce --profile smoke, which takes minutes and is no result.
    """  # both are read in `main`, so that they may also stand after the command


@app.command(rich_help_panel=SERIES)
def reproduce(
    profile: Profile = "cpu",
    force: Force = False,
    notebook: Annotated[list[str] | None, typer.Option(help="only this notebook; may be repeated")] = None,
) -> None:
    """Run the notebooks in order, print the results and write the report.

    All goes to runs/<profile>/. A finished notebook is reused until its code, the settings or what it reads changes.
    """
    from lora_distill import processes
    from lora_distill.publish import series

    checked = _runnable(profile)
    if checked.pipeline != "bundled" and processes.is_main():  # the bundled pipeline fits everywhere
        _check_room(checked)
    series.reproduce(profile, force=force, names=notebook or ())


def _runnable(profile: str) -> "Settings":
    """The settings of a profile whose files and device are here. Raises InputError for the first that is not."""
    from lora_distill.devices import check_device
    from lora_distill.settings import check_paths, load_settings

    check_paths(checked := load_settings(profile))
    check_device(checked.device)
    return checked


def _check_room(checked: "Settings") -> None:
    """Say what a profile takes, in two lines. Raises RuntimeError for one that this device cannot hold."""
    from lora_distill import processes
    from lora_distill.devices import choose_device
    from lora_distill.memory import plan as plans

    # the process groups of several processes are the notebooks': none is made here
    found = plans.plan(checked, choose_device(checked.device) if processes.count() == 1 else plans.any_device(checked))
    if found.refusal:
        command = f"python -m lora_distill plan --profile {checked.profile}"
        raise RunError(f"profile {checked.profile} does not fit: {found.refusal}; {command} says more")
    print("\n".join(found.last_lines), flush=True)


@app.command(rich_help_panel=SERIES)
def rehearse(
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
    force: Force = False,
    notebook: Annotated[list[str] | None, typer.Option(help="only this notebook; may be repeated")] = None,
) -> None:
    """Run the series as sd15-flickr8k does, on a tiny Stable Diffusion 1.5 and photographs that code makes up.

    It takes minutes and says whether the path works on this machine; its numbers are no result. Each dtype has a run
    of its own: runs/rehearsal/, runs/rehearsal-float32/.
    """
    from lora_distill import rehearsal
    from lora_distill.publish import series
    from lora_distill.settings import repository_root

    rehearsal.settings(dtype)  # says what is wrong before anything is written
    rehearsal.write_inputs(repository_root() / "runs" / "rehearsal" / "inputs")
    series.reproduce(rehearsal.settings(dtype), force=force, names=notebook or ())


@app.command(rich_help_panel=SERIES)
def prepare(profile: Profile = "smoke") -> None:
    """Write the notebooks with a profile's settings put in, not run, into build/notebooks."""
    from lora_distill.publish import series

    print(series.prepare(profile))


@app.command(rich_help_panel=SERIES)
def publish(
    profile: Profile = "cpu",
    study: Annotated[
        Literal["sweep", "dial", "bench"] | None,
        typer.Option(help="take what this command wrote alone, into a folder of figures/ with its name"),
    ] = None,
) -> None:
    """Take the results of a finished run into the repository.

    Profile cpu fills the outputs of notebooks/, another one figures/<profile>/; README states those of figures/full/.
    """
    from lora_distill.publish import committed

    for path in committed.publish_study(profile, study) if study else committed.publish(profile):
        print(os.path.relpath(path))


@app.command(rich_help_panel=RESULTS)
def claims(profile: Profile = "cpu") -> None:
    """Print what a profile's results say about every claim of the two works."""
    from lora_distill.publish import claims as ledger

    ledger.check(folder := _results(profile))
    print(ledger.as_text(ledger.ledger(folder)))


@app.command(rich_help_panel=RESULTS)
def figures(
    profile: Profile = "cpu",
    pdf: Annotated[bool, typer.Option("--pdf", help="write PDF files too")] = False,
) -> None:
    """Draw the figures of a profile again from their saved numbers and images; no model is loaded."""
    import matplotlib

    matplotlib.use("Agg")  # a desktop's backend would open a window for each

    from lora_distill.publish import figures as saved

    with _held(folder := _results(profile)):
        for path in saved.redraw(folder, pdf=pdf):
            print(os.path.relpath(path))


def _held(figures: Path) -> "AbstractContextManager[None]":
    """A run that a command writes figures into, held meanwhile; a folder of the repository is not."""
    from lora_distill.writing import locked

    return locked(figures.parent) if figures.name == "figures" else nullcontext()


@app.command(rich_help_panel=RESULTS)
def report(profile: Profile = "cpu") -> None:
    """Write the notebooks that ran, with their contents and results, as HTML that needs no network."""
    from lora_distill.publish import report as pages
    from lora_distill.settings import load_settings, run_dir
    from lora_distill.writing import locked

    folder = run_dir(checked := load_settings(profile))
    with locked(folder) if folder.is_dir() else nullcontext():
        written = pages.write(folder)
        print(os.path.relpath(written) + _other_settings(folder, checked))


def _results(profile: str) -> Path:
    """The folder with the figures and tables of a profile, which is named on the way."""
    from lora_distill.settings import load_settings, results_dir

    folder = results_dir(checked := load_settings(profile))
    print(f"reading {os.path.relpath(folder)}{_other_settings(folder.parent, checked)}")
    return folder


def _other_settings(folder: Path, checked: "Settings") -> str:
    """Where a run was made with other settings than its profile has now, what follows its name; else empty."""
    from lora_distill.publish import stamps

    other = stamps.other_settings(folder, checked.model_dump())
    return f", {other}" * bool(other)


@app.command(rich_help_panel=SERIES)
def settings(profile: Profile = "cpu") -> None:
    """Check a profile and print every key with its value and meaning."""
    from lora_distill.settings import load_settings

    checked = load_settings(profile)
    for key, field in type(checked).model_fields.items():
        print(f"{f'{key}: {getattr(checked, key)}':<50} # {field.description}")


@app.command(rich_help_panel=MODELS)
def distill(
    profile: Profile = "cpu",
    dial: Annotated[
        bool, typer.Option("--dial", help="train for all guidance scales from 1 to 7.5: the LoRA's weight is the scale")
    ] = False,
    trajectories: Annotated[
        bool,
        typer.Option(
            "--trajectories",
            help="train at points of the teacher's sampling, kept on disk, not at noised images of it: no teacher runs "
            "in a step, which takes about half the time",
        ),
    ] = False,
) -> None:
    """Distil guidance into a LoRA on one W0 and write the LoRA file, which stock diffusers loads.

    On several GPUs: accelerate launch --multi_gpu --num_processes N -m lora_distill distill; each process takes its
    part of every batch, and of the teacher's images.
    """
    from lora_distill import processes
    from lora_distill.data.teacher import teacher_for
    from lora_distill.data.trajectories import trajectories_for
    from lora_distill.pipeline import pipeline_for
    from lora_distill.settings import run_dir
    from lora_distill.train import recipes
    from lora_distill.writing import locked

    distil = recipes.distil_dial if dial else recipes.distil_on_trajectories if trajectories else recipes.distil_lora
    name = ("dial" if dial else "student") + "_on_trajectories" * trajectories
    checked = _runnable(profile)
    with locked(folder := run_dir(checked)):
        pipe = pipeline_for(checked)
        teacher = (trajectories_for if trajectories else teacher_for)(pipe, checked, folder / "cache")
        distil(pipe, teacher, checked, folder, name)
    if processes.is_main():
        print(recipes.lora_file(folder, name))


@app.command(rich_help_panel=MODELS)
def train(
    folder: Annotated[Path, typer.Argument(help="pictures with captions, in any layout of docs/pictures.md")],
    out: Annotated[Path, typer.Option(help="the LoRA file to write; what it needs to go on lies beside it")] = Path(
        "lora.safetensors"
    ),
    method: Annotated[str, typer.Option(help="finetune, or lcm-lora: pictures in few steps")] = "finetune",
    pipeline: Annotated[str, typer.Option(help="bundled, a folder or a hub id")] = "bundled",
    steps: Annotated[int, typer.Option(min=1, max=10**9, help="optimiser updates")] = 400,
    rank: Annotated[int, typer.Option(min=1, max=1280, help="rank of the LoRA")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, max=10**4, help="pictures an update")] = 4,
    learning_rate: Annotated[float | None, typer.Option(help="by default what suits method and pipeline")] = None,
    resolution: Annotated[int | None, typer.Option(help="side in pixels; by default the pipeline's own")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of training and first weights")] = 0,
    skip_unusable: Annotated[bool, typer.Option("--skip-unusable", help="leave out pictures that cannot be read")] = (
        False
    ),
) -> None:
    """Train a LoRA on a folder of captioned pictures. No profile, splits or CLIP; a cut training goes on."""
    from lora_distill import processes
    from lora_distill.train import folder as own

    folder, out = folder.expanduser(), out.expanduser()  # of --out=~/x a shell leaves the ~
    own.checked_output(out)
    options = {"pipeline": pipeline, "steps": steps, "rank": rank, "batch_size": batch_size, "seed": seed}
    options |= {"learning_rate": learning_rate, "resolution": resolution}
    count = own.train_folder(folder, out, own.folder_settings(method, **options), method, skip_unusable=skip_unusable)
    if processes.is_main():
        print(f"{out}: trained on {count} pictures")
        print(f"draw with it: {own.drawing_command(out, method, pipeline)}")
        print(f'in diffusers: pipe.load_lora_weights("{out}")')


@app.command(rich_help_panel=MODELS)
def sample(
    prompts: Annotated[list[str], typer.Argument(help="one picture each")],
    out: Annotated[Path, typer.Option(help="the PNG, JPEG or WebP to write, side by side")] = Path("sample.png"),
    pipeline: Annotated[str, typer.Option(help="bundled, a folder or a hub id")] = "bundled",
    lora: Annotated[Path | None, typer.Option(help="a LoRA file, or a folder with one")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=1, help="w; 1 is one pass a step; by default 1 with a LoRA, else 3 for the bundle, 7.5"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="steps of the sampler, by default 25")] = None,
    scheduler: Annotated[str | None, typer.Option(help="own, ddim, dpm++ or lcm: the last for an LCM-LoRA")] = None,
    resolution: Annotated[
        int | None, typer.Option(min=8, max=8192, help="side in pixels; by default the UNet's own")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of the starting noise")] = 0,
) -> None:
    """Draw prompts with a pipeline, with or without a LoRA, whose own header says how it is sampled.

    The bundled pipeline draws one to four objects, each at the upper or lower, left or right: lion, frog, panda, pig,
    owl, octopus, butterfly, penguin, whale, apple, watermelon, pineapple, burger, doughnut, car, bus, house, ball,
    umbrella, tree, cactus, mushroom, crown and gift, on pink, yellow, green, blue, purple or grey.
    "a lion at the upper left, a bus at the lower right, on a blue background"
    """
    gc.disable()  # modules make next to no garbage, and a fifth of the time of importing would go into looking for it
    from lora_distill.drawing import Wishes, draw

    gc.freeze()
    gc.enable()

    out = out.expanduser()
    draw(prompts, out, pipeline, lora, Wishes(steps, guidance_scale, scheduler, resolution, seed))
    print(out)


@app.command(rich_help_panel=MODELS)
def export(
    lora: Annotated[Path, typer.Argument(help="a LoRA file, or a folder with one")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
) -> None:
    """Write a LoRA in the form of kohya-ss, which ComfyUI, AUTOMATIC1111 and diffusers read."""
    from lora_distill.lora_files import lora_path, read_lora, write_kohya

    out = out.expanduser()
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: expected a name that ends in .safetensors")
    if out.resolve() == lora_path(lora).resolve():
        raise InputError(f"{out}: the file that is read; give another name")
    write_kohya(out, read_lora(lora))
    print(out)


@app.command(rich_help_panel=MODELS)
def memory(profile: Profile = "sd15-shape") -> None:
    """Write the peak memory of every scheme, on paper and simulated; `measure` measures it."""
    from lora_distill.memory import report
    from lora_distill.settings import load_settings, run_dir
    from lora_distill.writing import locked

    checked = load_settings(profile)
    with locked(run_dir(checked)):
        print("\n".join(report.write(checked)))


@app.command(rich_help_panel=MODELS)
def measure(
    profile: Profile = "sd15-shape",
    minutes: Annotated[float | None, typer.Option(min=0, help="start no further part after so many")] = None,
) -> None:
    """Measure memory and seconds of a profile's architecture on this machine, the most important parts first.

    Cut short, it goes on where it stopped. With sd15-shape it takes about forty minutes on two cores with 24 GB.
    """
    from lora_distill.devices import choose_device
    from lora_distill.memory import benchmark
    from lora_distill.settings import run_dir
    from lora_distill.writing import locked

    checked = _runnable(profile)
    with locked(run_dir(checked)):
        tables = benchmark.run(checked, choose_device(checked.device), minutes)
        _draw_measured(checked, tables)
    for path in tables:
        print(os.path.relpath(path))


def _draw_measured(checked: "Settings", tables: list[Path]) -> None:
    """Draw the tables of `measure`; a machine that only measures need not have matplotlib."""
    from lora_distill.storage import read_table

    try:
        import matplotlib
    except ModuleNotFoundError:
        command = f"python -m lora_distill figures --profile {checked.profile}"
        print(f"not drawn, matplotlib is not installed: {command} draws them elsewhere")
        return
    matplotlib.use("Agg")
    from lora_distill.publish import figures as saved

    for path in tables:
        rows = read_table(path)
        if any(row.get("measured_gb") or row.get("seconds_an_image") for row in rows):
            saved.save(path.stem, checked, rows)


@app.command(rich_help_panel=MODELS)
def bench(
    profile: Profile = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; by default PyTorch's")] = None,
    batch: Annotated[int, typer.Option(min=1, max=10**4, help="images a step")] = 16,
    rounds: Annotated[int, typer.Option(min=3, max=10**4, help="in each of which every method has its turn")] = 30,
    minutes: Annotated[float, typer.Option(min=0, help="begin no further round, or case, after so many")] = 3.5,
    growth: Annotated[
        bool, typer.Option("--growth", help="our steps against batch, rank, resolution, captions and processes")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="measure nothing: print the last table as Markdown")] = False,
    out: Annotated[Path | None, typer.Option(help="folder to write to; by default runs/PROFILE/figures/bench")] = None,
) -> None:
    """Compare our training steps with those of public scripts on this machine, in turns: speed and peak memory.

    In float32 and on random data. With the defaults it takes at most five minutes on two cores.
    """
    import matplotlib

    matplotlib.use("Agg")  # a desktop's backend would open a window for each

    import torch

    from lora_distill.devices import choose_device
    from lora_distill.memory import bench as benches
    from lora_distill.memory import growth as grown
    from lora_distill.publish import figures as saved
    from lora_distill.settings import figures_dir, repository_root, run_dir
    from lora_distill.writing import locked

    checked = _runnable(profile)
    folder = out.expanduser() if out else figures_dir(checked) / benches.TABLE
    if show:
        committed = repository_root() / "figures" / benches.TABLE
        print(benches.as_markdown(benches.read([folder] if out else [folder, committed])))
        return
    torch.set_num_threads(benches.choose_threads(threads))
    with locked(run_dir(checked)):
        chosen = benches.settings_for(checked, choose_device(checked.device), batch)
        if growth:
            saved.save(grown.TABLE, chosen, grown.run(chosen, minutes), folder=folder)
            print(os.path.relpath(folder / f"{grown.TABLE}.csv"))
        else:
            rows = benches.run(chosen, rounds, minutes)
            print(benches.as_markdown(rows))
            print(os.path.relpath(saved.save_rows(benches.TABLE, chosen, rows, folder)))


@app.command(rich_help_panel=SERIES)
def sweep(
    profile: Profile = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="only this method or setting; may be repeated")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="begin no further value after so many")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; by default the profile's")] = "",
) -> None:
    """Choose defaults on the val split: train every method with several values of its settings, one at a time.

    Each value is kept at once, so a cut sweep goes on; params/ takes the chosen values by hand. With profile cpu it
    takes about 40 minutes on two cores.
    """
    import matplotlib

    matplotlib.use("Agg")  # a desktop's backend would open a window for each

    from lora_distill import sweep as sweeps
    from lora_distill.devices import check_device
    from lora_distill.publish import figures as saved
    from lora_distill.settings import checked_device, figures_dir, run_dir
    from lora_distill.writing import locked

    checked = _runnable(profile)
    if device:
        check_device(checked_device(device))
        checked = checked.model_copy(update={"device": device})
    with locked(run_dir(checked)):
        rows = sweeps.run(checked, run_dir(checked), only or (), minutes)
        print(sweeps.overview(rows))
        if rows:
            saved.save("sweep", checked, rows)
            print(os.path.relpath(figures_dir(checked) / "sweep.csv"))


@app.command(rich_help_panel=SERIES)
def dial(
    profile: Profile = "cpu",
    steps: Annotated[int | None, typer.Option(min=1, max=10**9, help="updates of a training, else the profile's")] = (
        None
    ),
) -> None:
    """Compare guidance, the paper's student, guidance dials and trajectories at many guidance scales, on val.

    Three trainings each. A cut run goes on; with --steps 300 it takes under an hour of one core.
    """
    import matplotlib

    matplotlib.use("Agg")

    from lora_distill import dial as study
    from lora_distill.publish import figures as saved
    from lora_distill.settings import figures_dir, run_dir
    from lora_distill.writing import locked

    checked = _runnable(profile)
    checked = checked.model_copy(update={"train_steps": steps or checked.train_steps})
    with locked(folder := run_dir(checked)):
        dial_rows, trajectory_rows = study.run(checked, folder)
        print(study.in_words(dial_rows, trajectory_rows))
        saved.save("dial", checked, dial_rows)
        saved.save("trajectories", checked, trajectory_rows)
        print(os.path.relpath(figures_dir(checked) / "dial.csv"))


@app.command(rich_help_panel=SERIES)
def plan(
    profile: Profile = "cpu",
    card: Annotated[float | None, typer.Option(min=1, max=10**5, help="GiB of a GPU that is not here")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.01, max=10**6, help="and its rate in that dtype")] = None,
) -> None:
    """Print what a profile takes: downloads, disk, memory and operations by notebook, and time on this device."""
    from lora_distill.devices import choose_device
    from lora_distill.memory import plan as plans
    from lora_distill.settings import check_paths, load_settings

    check_paths(checked := load_settings(profile))
    device = choose_device(checked.device) if card is None else plans.any_device(checked)
    print(plans.plan(checked, device, card=card, tflops=tflops))


@app.command(rich_help_panel=MODELS)
def pretrain(
    preset: Annotated[str, typer.Option(help="short or full")] = "full",
    out: Annotated[Path, typer.Option(help="folder of the pipeline")] = Path("runs/pretraining/pipeline"),
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of weights and data")] = 0,
    caption_error: Annotated[
        float | None, typer.Option(min=0, max=1, help="share of objects that captions name at random; the preset's")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train the bundled pipeline from nothing; interrupted, it goes on where it stopped."""
    from lora_distill.devices import choose_device
    from lora_distill.pretrain import text_to_image
    from lora_distill.writing import locked

    if preset not in text_to_image.PRESETS:
        raise InputError(f"no preset {preset!r}; there are {', '.join(text_to_image.PRESETS)}")
    out = Path(os.path.abspath(out.expanduser()))  # "." has no name
    with locked(work := out.with_name(f"{out.name}-work")):
        chosen = text_to_image.PRESETS[preset]
        if caption_error is not None:
            chosen = replace(chosen, caption_error=caption_error)
        text_to_image.pretrain(chosen, out, work, seed, choose_device(device))
    print(out)


@app.command(rich_help_panel=MODELS)
def model_card(
    folder: Annotated[Path | None, typer.Option(help="a pipeline made by pretrain; the bundle by default")] = None,
    count: Annotated[int, typer.Option(min=1, help="test prompts")] = 1000,
) -> None:
    """Score a pretrained pipeline on test prompts and write scores.json and its model card."""
    from lora_distill.pipeline import BUNDLED
    from lora_distill.pretrain import model_card as card

    folder = (folder or BUNDLED).expanduser()
    card.write(folder, count)
    print(folder / "README.md")


def main() -> None:
    """Run a command; exit with 2 for input that cannot be used, with 1 for a run that failed."""
    own, rest = _split(sys.argv[1:])
    debug = "--debug" in own
    sys.argv[1:] = [argument for argument in own if argument != "--debug"] + rest
    for stream in (sys.stdout, sys.stderr):  # a pipe may have an encoding without some letters, an ASCII one for one
        if stream is not None:  # closed by who started us
            stream.reconfigure(errors="replace")
    try:
        if "--version" in own:
            print(_versions(), flush=True)
        else:
            app()
    except Exception as error:
        if debug:
            raise
        with suppress(OSError):  # the exit code says it too
            print(*_said(error).splitlines(), file=sys.stderr)  # one line, whatever a file's name holds
        sys.exit(2 if isinstance(error, InputError) else 1)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before a bare --, which may hold options, and the others."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end:]


def _versions() -> str:
    """The versions that decide results, as one names them in a report of an error."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("lora_distill", "torch", "diffusers", "transformers", "peft"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])


def _said(error: Exception) -> str:
    """An error in one line: our own message, or where and how something else failed."""
    if isinstance(error, InputError | RunError):
        return printable(getattr(error, "strerror", None) or str(error))
    if isinstance(error, ModuleNotFoundError) and (package := str(error.name).partition(".")[0]) in NOTEBOOK_PACKAGES:
        return f"{package} is not installed: pip install 'lora_distill[series]'"
    if isinstance(error, ModuleNotFoundError) and not error.name:  # ours, as raised where an extra is missing
        return str(error)
    if isinstance(error, OSError) and error.strerror:  # of the machine: a full disk, a folder without permission
        return f"{error.filename or 'the output'}: {error.strerror}"
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if "lora_distill" in frame.filename][-1]
    return (
        f"{type(error).__name__}: {one_line(error)} (in {Path(place.filename).name}, line {place.lineno}; "
        "not foreseen: --debug shows the whole traceback)"
    )


if __name__ == "__main__":
    main()
