"""The command line: `python -m lora_distill COMMAND`. What is wrong with the input is said in one line."""

import sys
import traceback
from typing import Annotated

import typer

# Modules are imported by the command that needs them, so that --help does not wait for torch.
app = typer.Typer(
    help="LoRA distillation of guided diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Profile = Annotated[str, typer.Option(help="a name in params/, or the path of a YAML file")]


@app.command()
def reproduce(
    profile: Profile = "cpu",
    force: Annotated[bool, typer.Option("--force", help="run again what is up to date")] = False,
    notebook: Annotated[list[str] | None, typer.Option(help="only this notebook; may be repeated")] = None,
) -> None:
    """Run the notebooks in order and print the results."""
    from lora_distill import series

    series.reproduce(profile, force=force, names=notebook or ())


@app.command()
def prepare(profile: Profile = "smoke") -> None:
    """Write the notebooks with a profile's settings put in, not run, into build/notebooks."""
    from lora_distill import series

    print(series.prepare(profile))


@app.command()
def notebooks(profile: Profile = "cpu") -> None:
    """Run all notebooks and put their outputs into the committed ones."""
    from lora_distill import series

    series.commit_outputs(profile)


@app.command()
def settings(profile: Profile = "cpu") -> None:
    """Check a profile and print every key with its value and meaning."""
    from lora_distill.settings import load_settings

    checked = load_settings(profile)
    for key, field in type(checked).model_fields.items():
        print(f"{f'{key}: {getattr(checked, key)}':<50} # {field.description}")


def raised_here(error: Exception) -> bool:
    """Whether an error was raised by this package, as a message to its user, and not somewhere below it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__package__") == "lora_distill"


def main() -> None:
    """Run a command; exit with 2 for input that cannot be used, with 1 for a run that failed."""
    try:
        app()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if not raised_here(error):
            raise
        print(error, file=sys.stderr)
        sys.exit(1 if isinstance(error, RuntimeError) else 2)


if __name__ == "__main__":
    main()
