"""Facts that are written down twice in this repository agree."""

import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from lora_distill.publish.series import code_cells, with_results

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment_leaves_the_list_of_packages_to_pyproject():
    python, *others = ENVIRONMENT["dependencies"]
    assert others == ["pip", {"pip": ["-e .[test,dev]"]}]
    assert {"test", "dev"} <= PROJECT["optional-dependencies"].keys()
    assert PROJECT["requires-python"] == f">={python.removeprefix('python=')}"


def test_makefile_asks_for_the_same_python():
    major, minor = PROJECT["requires-python"].removeprefix(">=").split(".")
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text()


def test_makefile_installs_a_torch_that_the_package_accepts():
    number = r"(\d+)\.(\d+)"
    lowest = next(re.search(number, line) for line in PROJECT["dependencies"] if line.startswith("torch>="))
    chosen = re.search(rf"TORCH\s+\?= {number}", (ROOT / "Makefile").read_text())
    assert tuple(map(int, chosen.groups())) >= tuple(map(int, lowest.groups()))


@pytest.mark.parametrize("name", ["README.md", "Makefile"])
def test_profiles_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    named = re.findall(r"(?:params/|--profile |PROFILE=)([a-z0-9][\w-]*)", text)
    assert not [profile for profile in named if not (ROOT / "params" / f"{profile}.yaml").is_file()]


def test_citation_has_this_version_and_both_works():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert [work["title"] for work in citation["references"]] == [
        "LoRA-Enhanced Distillation on Guided Diffusion Models",
        "Enhancing Image Generation with LCM LoRA Distillation",
    ]


def test_readme_states_the_results_and_verdicts_of_the_committed_figures():
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "figures"], cwd=ROOT).returncode
    if changed:
        pytest.skip("figures were drawn anew; `python -m lora_distill readme` brings the README along")
    readme = (ROOT / "README.md").read_text()
    assert readme == with_results(readme, ROOT / "figures" / "full"), "python -m lora_distill readme"


@pytest.mark.parametrize("name", ["README.md", "docs/map.md", "docs/checklist.md"])
def test_files_that_are_linked_exist(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert local and not [link for link in local if not (page.parent / link).exists()]


def test_the_map_names_the_cells_that_make_or_show_what_it_links():
    sources = {
        path.name[:2]: [cell.source for cell in code_cells(nbformat.read(path, 4))]
        for path in (ROOT / "notebooks").glob("*.ipynb")
    }
    lines = (ROOT / "docs" / "map.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if re.search(r"\| .*\bsections? \d", line)]
    assert len(rows) > 20
    for what, where, files in rows:
        cells = [
            sources[part.strip(" [")[:2]][int(cell) - 1]
            for part in where.split(";")
            for cell in re.findall(r"\[(\d+)\]", part.partition(",")[2])
        ]
        assert cells and all(name in "".join(cells) for name in re.findall(r"\[`(\d\d_\w+)\.", files)), what


def test_licences_are_shipped():
    for name in ("LICENSE", "lora_distill/assets/LICENSE-noto.txt", "lora_distill/assets/LICENSE-fluent.txt"):
        assert (ROOT / name).stat().st_size > 300
