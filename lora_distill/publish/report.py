"""A run as HTML that is read without a network: an index with contents and results, and a page a notebook."""

import json
from pathlib import Path
from typing import NamedTuple

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lora_distill.publish.outputs import clean_outputs
from lora_distill.settings import PACKAGE
from lora_distill.storage import atomic_write

TEMPLATES = PACKAGE / "assets" / "report"


class Heading(NamedTuple):
    """A heading of a page, as HTML."""

    level: int
    text: str
    anchor: str


class Page(NamedTuple):
    """A notebook of the report."""

    file: str
    title: str
    sections: list[Heading]
    html: str


def write(folder: Path, results: str) -> Path:
    """Write <folder>/report/ from the notebooks that ran to their end in a run's folder; return its index.html.

    Raises FileNotFoundError when there is none.
    """
    # what has no stamp was left by a run that failed
    names = sorted(stamp.name.removesuffix(".stamp.json") for stamp in folder.glob("*.stamp.json"))
    if not names:
        raise FileNotFoundError(f"no finished notebook in {folder}; python -m lora_distill reproduce makes them")
    pages = [page(folder / f"{name}.ipynb") for name in names]
    for each in pages:
        atomic_write(folder / "report" / each.file, each.html)
    templates = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined)
    index = templates.get_template("index.html.j2").render(
        title=f"lora_distill, profile {folder.name}", made=made(folder), pages=pages, results=results
    )
    atomic_write(folder / "report" / "index.html", index)
    return folder / "report" / "index.html"


def made(folder: Path) -> str:
    """What made the run, from its manifest; empty without one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return ""
    return " · ".join(str(manifest[key]) for key in ("written", "device", "commit") if manifest.get(key))


def page(path: Path) -> Page:
    """A notebook as one HTML file with its images inside."""
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs, cell.execution_count)
    exporter = Exporter(extra_template_paths=[str(TEMPLATES)], template_file="page.html.j2")
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    title = next((heading.text for heading in exporter.headings if heading.level == 1), path.stem)
    return Page(f"{path.stem}.html", title, [heading for heading in exporter.headings if heading.level == 2], html)


class Exporter(HTMLExporter):
    """nbconvert's HTML with formulas that need no script; it keeps the headings that it met."""

    def __init__(self, **options):
        super().__init__(**options)
        self.headings: list[Heading] = []

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(self.headings)).render(source)


class Renderer(IPythonRenderer):
    """Markdown to HTML, with MathML, which browsers draw themselves, for formulas."""

    def __init__(self, headings: list[Heading]):
        super().__init__(escape=False)
        self.headings = headings

    def heading(self, text: str, level: int, **attributes) -> str:
        self.headings.append(Heading(level, text, f"heading-{len(self.headings)}"))
        return f'<h{level} id="{self.headings[-1].anchor}">{text}</h{level}>\n'

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")
