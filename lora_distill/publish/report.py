"""A run as HTML that is read without a network: an index with contents, results and verdicts, and a page a notebook."""

import base64
import html
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from pydantic import TypeAdapter
from traitlets import Bool

from lora_distill.errors import InputError, MissingError, reading
from lora_distill.publish import claims, stamps
from lora_distill.publish.plots import FIGURES
from lora_distill.settings import PACKAGE
from lora_distill.writing import atomic_write

RESULTS = TypeAdapter(dict[str, dict[str, str | int | float | None]])
ON_INDEX = ("02_same_noise", "04_speed")
TEMPLATES = PACKAGE / "assets" / "report"


def write(folder: Path) -> Path:
    """Write <folder>/report/ from the notebooks that ran to their end in a run's folder; return its index.html.

    Raises FileNotFoundError when there is none.
    """
    command = f"python -m lora_distill reproduce --profile {folder.name}"
    if not (names := stamps.names(folder)):  # what has no stamp was left by a run that failed
        raise MissingError(f"no finished notebook in {folder}; {command} makes them")
    for name in names:
        if why := stamps.why_changed(folder, stamps.read(folder, name)):
            raise InputError(f"{name} of {folder}: {why}; {command}")
    pages = {f"{name}.html": page(read_notebook(folder / f"{name}.ipynb"), name) for name in names}
    for file, content in pages.items():
        atomic_write(folder / "report" / file, content)
    title = f"lora_distill, profile {folder.name}"
    index = folder / "report" / "index.html"
    atomic_write(index, page(new_notebook(cells=[new_markdown_cell(summary(folder, pages, title))]), title, ours=True))
    return index


def summary(folder: Path, pages: dict[str, str], title: str) -> str:
    """The index in Markdown and HTML: what made the run, its main figures, contents, results and verdicts.

    What comes from files of the run is escaped.
    """
    verdicts = claims.ledger(folder / "figures")
    results = "\n".join(f"    {line}" for line in results_table(folder / "figures").splitlines())
    shown = "\n".join(picture(folder / "figures" / f"{name}.png") for name in ON_INDEX)
    parts = (
        f"# {html.escape(title)}", html.escape(made(folder)), html.escape(claims.summary(verdicts)), shown,
        "## Contents", contents(pages), "## Results", results,
        "## Claims", html.escape(claims.as_table(verdicts), quote=False),
    )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def picture(path: Path) -> str:
    """A figure of a run as HTML with the picture inside and its caption; empty where there is none."""
    if not path.is_file():
        return ""
    content, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(FIGURES[path.stem].caption)
    image = f'<img src="data:image/png;base64,{content}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def read_notebook(path: Path) -> NotebookNode:
    """A notebook. Raises `InputError`, in one line with the path, for a file that is none."""
    with reading(path, "a notebook"):
        with warnings.catch_warnings():  # of editors that write older forms of the format
            warnings.simplefilter("ignore")
            notebook = nbformat.v4.upgrade(nbformat.read(path, 4))
        nbformat.validate(notebook)
        return notebook


def page(notebook: NotebookNode, name: str, *, ours: bool = False) -> str:
    """A notebook as one HTML file with its images inside, titled by its first heading, or else by a name.

    HTML in its text is shown as text, unless the text is `ours`.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs, cell.execution_count)
            describe_figure(cell)
        else:  # links lead from runs/<profile>/report what they lead from notebooks
            cell.source = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.html", cell.source.replace("](../", "](../../../"))
    exporter = Exporter(
        escape=not ours, anchor_link_text="", extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2"
    )
    headings = re.findall(r"^# (.+)$", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"), re.M)
    notebook.metadata["title"] = html.escape(headings[0] if headings and not ours else name)
    content, _ = exporter.from_notebook_node(notebook)
    return content


def contents(pages: dict[str, str]) -> str:
    """Titles and sections of pages, as HTML lists of links to them."""
    lines = []
    for file, content in pages.items():
        soup = BeautifulSoup(content, "html.parser")
        lines += [f'<h3><a href="{file}">{html.escape(soup.title.text)}</a></h3>', "<ul>"]
        lines += [f'<li><a href="{file}#{h["id"]}">{html.escape(h.text)}</a></li>' for h in soup.select("h2[id]")]
        lines.append("</ul>")
    return "\n".join(lines)


def made(folder: Path) -> str:
    """What made the run, from its manifest; empty without one, as the next run writes it anew."""
    manifest = stamps.manifest(folder)
    return " · ".join(str(manifest[key]) for key in ("written", "device", "commit") if manifest.get(key))


def results_table(folder: Path) -> str:
    """What the notebooks found, from the files <notebook>_results.json, {title: {label: value}}, beside the figures.

    Raises `InputError`, in one line with the path, for a file that holds something else.
    """
    lines = []
    for path in sorted(folder.glob("[!.]*_results.json")):
        with reading(path, "results, {title: {label: value}}; run its notebook again"):
            found = RESULTS.validate_json(path.read_bytes())
        for title, rows in found.items():
            width = max((len(label) for label in rows), default=0)
            lines += ["", title, *(f"  {label:<{width}}  {value}" for label, value in rows.items())]
    return "\n".join(lines[1:])


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


def describe_figure(cell: NotebookNode) -> None:
    """Give the pictures of a cell that saves or shows a figure the figure's caption, for those who do not see them."""
    name = re.search(r"figures\.save\(\s*\"(\w+)\"|results_folder / \"(\w+)\.png\"", cell.source)
    name = name and (name[1] or name[2])
    for output in cell.outputs if name in FIGURES else []:
        output.setdefault("metadata", NotebookNode())["alt"] = FIGURES[name].caption


class Exporter(HTMLExporter):
    """nbconvert's HTML with formulas that need no script."""

    escape = Bool(True, help="whether HTML in Markdown is shown as text")

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        options = {"escape": self.escape, "allow_harmful_protocols": False, "anchor_link_text": self.anchor_link_text}
        return MarkdownWithMath(renderer=Renderer(**options)).render(source)


class Renderer(IPythonRenderer):
    """nbconvert's Markdown with MathML, which browsers draw themselves, for formulas."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")
