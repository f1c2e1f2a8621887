"""The report: every notebook and its headings, readable without a network."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from lora_distill.errors import InputError
from lora_distill.publish import claims, report, stamps
from lora_distill.publish.plots import FIGURES

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
RESULTS = {"Memory": {"saved & <shared>": "36 %"}}


def finish(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
    stamps.write(folder, name, {"key": "", "commit": None, "outputs": {}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of a run of the committed notebooks."""
    run = tmp_path_factory.mktemp("run") / "cpu"
    for path in NOTEBOOKS:
        finish(run, path.stem, path.read_text(encoding="utf-8"))
    (run / "figures").mkdir()
    (run / "figures" / "01_results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    (run / "manifest.json").write_text(
        json.dumps({"device": "a processor", "commit": "abc", "written": "today"}), encoding="utf-8"
    )
    return report.write(run).parent


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_the_index_has_every_notebook_and_section_and_the_results(folder):
    index = soup(folder / "index.html")
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        markdown = "".join("\n" + "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        assert index.select(f'h3 a[href="{path.stem}.html"]')
        assert len(index.select(f'li a[href^="{path.stem}.html#"]')) == len(re.findall(r"^## ", markdown, re.M))
    assert index.pre.text == "Memory\n  saved & <shared>  36 %"
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
        assert not re.search(r"url\(['\"]?http|@import", path.read_text(encoding="utf-8"))


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
    (tmp_path / "02_failed.ipynb").write_text("{}", encoding="utf-8")  # it has no stamp
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


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> a|b [x](javascript:alert(1))\n```\n</pre><b>&amp;"


def test_whatever_the_files_of_a_run_hold_is_shown_as_text(tmp_path):
    cells = [
        new_markdown_cell(f"# {HOSTILE.splitlines()[0]}\n\n{HOSTILE}"),
        new_code_cell(
            "show()",
            outputs=[
                new_output("display_data", {"text/markdown": HOSTILE}),
                new_output("stream", text=HOSTILE),
                new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata={"alt": f'"{HOSTILE}'}),
            ],
        ),
    ]
    finish(tmp_path, "01_plain", writes(new_notebook(cells=cells)))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "01_results.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}), encoding="utf-8")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"device": HOSTILE, "commit": [HOSTILE], "written": HOSTILE}), encoding="utf-8"
    )
    report.write(tmp_path)
    for path in (tmp_path / "report").iterdir():
        page = soup(path)
        assert not page.select("script, [onerror], img[src=x], b"), path.name
        assert not [link for link in page.select("a") if link.get("href", "").startswith("javascript")]
        assert "<script>alert(1)</script>" in page.text


def test_a_claim_with_html_in_its_numbers_is_shown_as_text(tmp_path, monkeypatch):
    finish(tmp_path, "01_plain", writes(new_notebook(cells=[new_markdown_cell("# A")])))
    ledger = claims.ledger(tmp_path)
    monkeypatch.setattr(claims, "ledger", lambda _: [replace(verdict, here=HOSTILE) for verdict in ledger])
    report.write(tmp_path)
    page = soup(tmp_path / "report" / "index.html")
    assert not page.select("script, [onerror], img[src=x]") and len(page.select("td:last-child")) == len(ledger)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe{\x00}\x00", b'{"a": []}', b'{"a": {"b": {"c": 1}}}', b'{"a": 1}'],
)
def test_results_that_are_none_are_one_line(tmp_path, content):
    (tmp_path / "02_results.json").write_bytes(content)
    with pytest.raises(InputError, match=r"02_results.json: expected results, .*; run its notebook again") as error:
        report.results_table(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe{\x00}\x00", b"[" * 100_000])
def test_a_damaged_manifest_says_nothing(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert report.made(tmp_path) == ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x00" * 9])
def test_an_executed_notebook_that_is_damaged_is_one_line(tmp_path, content):
    finish(tmp_path, "01_plain", "{}")
    (tmp_path / "01_plain.ipynb").write_bytes(content)
    with pytest.raises(InputError, match=r"01_plain.ipynb: expected a notebook") as error:
        report.write(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_whose_tables_were_edited_gets_no_report(tmp_path):
    finish(tmp_path, "01_plain", writes(new_notebook(cells=[new_markdown_cell("# A")])))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "01_x.csv").write_text("a\n1\n", encoding="utf-8")
    outputs = {name: stamps.sha256(tmp_path / name) for name in ("01_plain.ipynb", "figures/01_x.csv")}
    stamps.write(tmp_path, "01_plain", {"key": "", "commit": None, "outputs": outputs})
    report.write(tmp_path)
    (tmp_path / "figures" / "01_x.csv").write_text("a\n2\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"01_plain of .*: figures/01_x.csv was changed since it ran; python -m"):
        report.write(tmp_path)


def test_the_index_says_how_many_claims_hold_and_shows_the_main_figures(tmp_path):
    finish(tmp_path, "01_plain", writes(new_notebook(cells=[new_markdown_cell("# A")])))
    (tmp_path / "figures").mkdir()
    for name in report.ON_INDEX:
        (tmp_path / "figures" / f"{name}.png").write_bytes(b"picture")
    report.write(tmp_path)
    page = soup(tmp_path / "report" / "index.html")
    assert claims.summary(claims.ledger(tmp_path / "figures")) in [each.text for each in page.select("p")]
    assert [image["alt"] for image in page.select("main img")] == [FIGURES[name].caption for name in report.ON_INDEX]


def test_a_notebook_whose_stamp_cannot_be_read_has_not_run(tmp_path):
    for name in ("01_plain", "02_plain"):
        finish(tmp_path, name, writes(new_notebook(cells=[new_markdown_cell("# A")])))
    (tmp_path / "02_plain.stamp.json").write_bytes(b"\xff\xfe")
    report.write(tmp_path)
    assert not (tmp_path / "report" / "02_plain.html").exists()


def test_a_notebook_of_an_older_form_is_read(tmp_path):
    """As editors write it that know no ids of cells."""
    plain = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": "1"}
    content = {"cells": [plain], "metadata": {}, "nbformat": 4, "nbformat_minor": 2}
    (tmp_path / "a.ipynb").write_text(json.dumps(content), encoding="utf-8")
    assert report.read_notebook(tmp_path / "a.ipynb").cells[0].id


def test_nothing_has_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished notebook in"):
        report.write(tmp_path)
