"""Facts that are written down twice in this repository agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

from lora_distill.memory import benchmark
from lora_distill.publish.committed import with_results
from lora_distill.publish.series import READS, code_cells

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment_leaves_the_list_of_packages_to_pyproject():
    python, *others = ENVIRONMENT["dependencies"]
    assert others == ["pip", {"pip": ["-e .[series,cpu,test,dev]"]}]
    assert {"series", "cpu", "test", "dev"} <= PROJECT["optional-dependencies"].keys()
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
    readme = (ROOT / "README.md").read_text()
    assert readme == with_results(readme, ROOT / "figures" / "full"), "python -m lora_distill publish --profile full"


def test_training_and_sampling_need_neither_notebooks_nor_the_cpu_runtime():
    """The packages of the extras are imported by publish/ and, when it is asked for a graph, by cpu_runtime."""
    extras = {"papermill", "nbformat", "nbconvert", "matplotlib", "latex2mathml", "openvino"}
    found = {
        (path.relative_to(ROOT / "lora_distill").as_posix(), package)
        for path in (ROOT / "lora_distill").rglob("*.py")
        for package in re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.M)
        if package in extras
    }
    assert {path.partition("/")[0] for path, _ in found} == {"publish"}
    core = {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]}
    assert not core & (extras | {"jupyterlab", "ipykernel", "jinja2"})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy, for building leaves files behind."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "lora_distill", copy / "lora_distill", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(copy)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True)
    return zipfile.ZipFile(next(copy.glob("*.whl")))


def test_the_wheel_holds_the_whole_package(wheel):
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_distill").rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {
        name for name in wheel.namelist() if name.startswith("lora_distill/")
    }


def test_from_a_wheel_what_needs_a_checkout_says_so(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "mine.yaml").write_text("profile: mine\nseed: 1\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "lora_distill", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("settings")
    assert done.returncode == 2 and done.stderr.endswith(
        ": profiles lie in a checkout of the repository; the path of a YAML file works too\n"
    )
    assert "seed: 1 " in run("settings", "--profile", "mine.yaml").stdout
    done = run("reproduce", "--profile", "mine.yaml")
    assert done.returncode == 2 and done.stderr.endswith("this command needs a checkout of the repository\n")


def test_the_series_knows_which_notebooks_read_which():
    """Numbers of other notebooks' files in a notebook's code; what it reads through the module is for READS to say."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        code = "".join(cell.source for cell in code_cells(nbformat.read(path, 4)))
        named = set(re.findall(r"[\"'/](\d\d)_", code)) - {path.name[:2]}
        assert named <= set(READS.get(path.name[:2], ())), path.name


@pytest.mark.parametrize(
    "name", sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
)
def test_files_that_are_linked_exist(name):
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


def sections(path: Path) -> dict[str, str]:
    """The code under each numbered section of a notebook."""
    found, number = {}, ""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## (\d*)", cell.source, re.MULTILINE):
                number = heading
        else:
            found[number] = found.get(number, "") + cell.source
    tables = {f"benchmark.{name}": getattr(benchmark, name) for name in ("MEMORY", "SECONDS")}
    for name, table in tables.items():  # tables that have a name in the code
        found = {number: source.replace(name, table) for number, source in found.items()}
    return found


def test_the_map_names_sections_that_make_or_show_what_it_links():
    code = {path.name[:2]: sections(path) for path in (ROOT / "notebooks").glob("*.ipynb")}
    rows = re.findall(r"^\| .* \| (.* sections? .*) \| (.*) \|$", (ROOT / "docs" / "map.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for where, files in rows:
        named = "".join(
            code[notebook][number]
            for part in where.split(";")
            for notebook in re.findall(r"\b0\d\b", part)[:1]
            for number in re.findall(r"\d+", part.partition("section")[2])
        )
        assert named and all(name in named for name in re.findall(r"\[`(\d\d_\w+)\.", files)), where


def test_licences_are_shipped():
    for name in ("LICENSE", "lora_distill/assets/LICENSE-noto.txt", "lora_distill/assets/LICENSE-fluent.txt"):
        assert (ROOT / name).stat().st_size > 300


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an archive has no attributes")
def test_git_changes_no_line_end_whatever_is_set():
    """With core.autocrlf, as git for Windows has it, no table would have the digest that stands in SHA256SUMS."""
    done = subprocess.run(
        ["git", "check-attr", "text", "README.md", "figures/full/02_quality.csv"],
        cwd=ROOT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert [line.split(": ")[-1] for line in done.stdout.splitlines()] == ["unset", "unset"]
