"""What commands and trainings import, each looked at in a process of its own: start-up is made of imports alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate"}
TABLES = {"datasets", "pandas", "pyarrow"}
FIGURES_AND_SCORES = {"matplotlib", "scipy", "sklearn", "torchmetrics", "openvino"}
HEAVY = MODELS | TABLES | FIGURES_AND_SCORES | {"PIL"}
PRINT = "import sys; print('imported', *{name.partition('.')[0] for name in sys.modules})"
COMMAND = f"""
import atexit, sys
from lora_distill.__main__ import main
atexit.register(lambda: exec({PRINT!r}))
main()
"""


def imported(code: str, *arguments: str, folder: Path = ROOT) -> set[str]:
    """The packages that a process has imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def after(modules: str) -> set[str]:
    return imported(f"import {modules}\n{PRINT}")


def test_the_package_alone_imports_no_library():
    assert (HEAVY | {"typer", "pydantic", "yaml"}).isdisjoint(after("lora_distill"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["sample", "--help"], ["train", "--help"], ["distill", "--help"]]
)
def test_help_and_versions_import_nothing_heavy(arguments):
    assert HEAVY.isdisjoint(imported(COMMAND, *arguments))


def test_settings_are_printed_without_models_and_tables():
    assert HEAVY.isdisjoint(imported(COMMAND, "settings", "--profile", "smoke"))


def test_what_a_notebook_imports_for_a_training_holds_no_tables_and_no_figures():
    modules = "lora_distill.train.recipes, lora_distill.data.teacher, lora_distill.pipeline, lora_distill.sampling"
    assert (TABLES | FIGURES_AND_SCORES).isdisjoint(after(modules))


def test_a_training_on_the_teachers_latents_holds_no_tables_and_no_figures(tmp_path):
    """From the first image of the teacher to the LoRA file."""
    training = """
from pathlib import Path
from lora_distill.data.teacher import teacher_for
from lora_distill.pipeline import pipeline_for
from lora_distill.settings import load_settings
from lora_distill.train.recipes import distil_lora, lora_file
settings = load_settings("smoke").model_copy(update={"teacher_images": 2, "train_steps": 1, "sampling_steps": 1})
pipe, folder = pipeline_for(settings), Path(sys.argv[1])
distil_lora(pipe, teacher_for(pipe, settings, folder / "cache"), settings, folder)
assert lora_file(folder, "student").is_file()
"""
    found = imported(f"import sys\n{training}\n{PRINT}", str(tmp_path))
    assert "torch" in found and (TABLES | FIGURES_AND_SCORES).isdisjoint(found)


def test_a_training_on_captioned_pictures_draws_no_figures():
    assert FIGURES_AND_SCORES.isdisjoint(after("lora_distill.train.folder"))


def test_one_picture_is_drawn_without_tables_figures_and_the_cpu_runtime(tmp_path):
    """OpenVINO would convert the graph first, which takes longer than PyTorch takes for the picture."""
    found = imported(COMMAND, "sample", "a lion at the upper left", "--steps", "2", folder=tmp_path)
    assert (tmp_path / "sample.png").is_file()
    assert "torch" in found and (TABLES | FIGURES_AND_SCORES).isdisjoint(found)
