"""Outputs of notebooks as a reader wants them."""

from collections.abc import Iterable

from nbformat import NotebookNode


def clean_outputs(outputs: Iterable[NotebookNode], count: int) -> list[NotebookNode]:
    """Outputs as a reader wants them: text in one piece, progress at its last state, no widgets, no stderr."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or any("widget" in kind for kind in output.get("data", {})):
            continue
        if "execution_count" in output:
            output.execution_count = count
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":  # a carriage return starts its line anew
            output.text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n"))
    return kept
