"""The report: every notebook and its headings, readable without a network."""

import json
import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from lora_distill.publish import claims, report
from lora_distill.publish.plots import FIGURES

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
RESULTS = {"Memory": {"saved & <shared>": "36 %"}}


def finish(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.ipynb").write_text(text)
    (folder / f"{name}.stamp.json").write_text("{}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of a run of the committed notebooks."""
    run = tmp_path_factory.mktemp("run") / "cpu"
    for path in NOTEBOOKS:
        finish(run, path.stem, path.read_text())
    (run / "figures").mkdir()
    (run / "figures" / "01_results.json").write_text(json.dumps(RESULTS))
    (run / "manifest.json").write_text(json.dumps({"device": "a processor", "commit": "abc", "written": "today"}))
    return report.write(run).parent


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def test_the_index_has_every_notebook_and_section_and_the_results(folder):
    index = soup(folder / "index.html")
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        markdown = "".join("\n" + "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert index.select(f'h3 a[href="{path.stem}.html"]')
        assert len(index.select(f'li a[href^="{path.stem}.html#"]')) == len(re.findall(r"^## ", markdown, re.M))
    assert index.pre.text == "Memory\n  saved & <shared>  36 %\n"
    assert len(index.select("table td:last-child")) == len(claims.load())
    assert "a processor" in index.text and "abc" in index.text


def test_links_lead_somewhere(folder):
    pages = {path.name: soup(path) for path in folder.glob("0*.html")}
    for link in soup(folder / "index.html").select("li a, h3 a"):
        file, _, anchor = link["href"].partition("#")
        assert not anchor or pages[file].find(id=anchor).text == link.text


def test_pages_need_no_network_and_no_script(folder):
    for path in folder.glob("*.html"):
        page = soup(path)
        assert not page.select("script, link, iframe")
        assert all(image["src"].startswith("data:") for image in page.select("img"))
        assert not re.search(r"url\(['\"]?http|@import", path.read_text())


def test_pages_are_named_by_their_titles(folder):
    assert soup(folder / "index.html").title.text == "lora_distill, profile cpu"
    for path in NOTEBOOKS:
        page = soup(folder / f"{path.stem}.html")
        assert page.title.text == page.h1.text


def test_links_of_a_notebook_lead_out_of_the_report(tmp_path):
    links = "[figures](../figures/full/01_half.csv) and [the next](02_guided_distillation.ipynb)"
    finish(tmp_path, "01_plain", writes(new_notebook(cells=[new_markdown_cell(links)])))
    report.write(tmp_path)
    page = soup(tmp_path / "report" / "01_plain.html")
    hrefs = [link["href"] for link in page.select("main p a")]
    assert hrefs == ["../../../figures/full/01_half.csv", "02_guided_distillation.html"]


def test_a_figure_is_described_by_its_caption(tmp_path):
    output = new_output("execute_result", {"image/png": "iVBORw0KGgo="}, execution_count=1)
    cell = new_code_cell('figures.save("02_loss", settings, rows)', outputs=[output])
    finish(tmp_path, "02_plain", writes(new_notebook(cells=[cell])))
    report.write(tmp_path)
    assert soup(tmp_path / "report" / "02_plain.html").img["alt"] == FIGURES["02_loss"].caption


def test_formulas_are_drawn(folder):
    page = soup(folder / "02_guided_distillation.html")
    assert page.select("math msub") and "$" not in page.select_one("table").text


def test_text_and_figures_are_in(folder, tmp_path):
    outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo="}), new_output("stream", text="36 % saved")]
    cells = [new_markdown_cell("no heading\n\n$$\nx^2\n$$"), new_code_cell("x = 1", outputs=outputs)]
    finish(tmp_path, "01_plain", writes(new_notebook(cells=cells)))
    (tmp_path / "02_failed.ipynb").write_text("{}")  # it has no stamp
    report.write(tmp_path)
    page = soup(tmp_path / "report" / "01_plain.html")
    assert "36 % saved" in page.text and page.img["src"] == "data:image/png;base64,iVBORw0KGgo="
    assert page.math["display"] == "block"
    assert soup(tmp_path / "report" / "index.html").h3.text == "01_plain"


def test_of_progress_the_last_state_is_shown(tmp_path):
    bar = [new_output("stream", text=f"\rtraining {percent} %") for percent in (0, 50, 100)]
    other = new_output("stream", name="stderr", text="sampling 50 %")
    cells = [new_code_cell("train()", outputs=[bar[0], other, *bar[1:]])]
    finish(tmp_path, "01_plain", writes(new_notebook(cells=cells)))
    report.write(tmp_path)
    shown = soup(tmp_path / "report" / "01_plain.html").text
    assert "training 100 %" in shown and "training 50 %" not in shown and "sampling" not in shown


def test_nothing_has_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished notebook in"):
        report.write(tmp_path)
