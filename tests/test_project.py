"""The project's files agree with each other."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import saved_notebooks
import torchinfo
from saved_notebooks import cells, text

from cnn_pruning import CNN
from cnn_pruning.experiments.paths import ROOT

README = (ROOT / "README.md").read_text()
NOTEBOOKS = [*saved_notebooks.NOTEBOOKS.values()]
FIGURES = sorted((ROOT / "notebooks" / "figures").glob("*.py"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_conda_takes_every_dependency_from_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.strip() for line in (ROOT / "environment.yml").read_text().splitlines()]
    listed = lines[lines.index("dependencies:") + 1 :]
    python, *others = listed
    assert others == ["- pip", "- pip:", "- -e .[onnx]"]
    version = tuple(map(int, python.removeprefix("- python=").split(".")))
    lowest = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    assert version >= lowest
    for dependency in project["dependencies"]:
        assert re.fullmatch(r"[a-z-]+>=[\d.]+,<\d+", dependency), f"{dependency} has no bounds"


def test_every_notebook_is_listed_in_the_readme():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in README


@EACH
def test_a_notebook_says_how_long_it_takes_to_read_and_that_is_not_too_long(path):
    words, lines = saved_notebooks.words(path), saved_notebooks.lines_of_code(path)
    minutes = words / 200 + lines / 12  # a minute
    (stated,) = re.findall(r"(\d+) minutes to read", saved_notebooks.prose(path))
    (in_readme,) = re.findall(rf"\(notebooks/{path.name}\) .* \| (\d+) \|$", README, re.MULTILINE)
    assert abs(int(stated) - minutes) < 3
    assert abs(int(in_readme) - minutes) < 5  # in steps of five minutes
    assert words <= 1_500


@EACH
def test_the_cells_of_a_notebook_are_short(path):
    for cell in cells(path, "code"):
        lines = [line for line in text(cell).splitlines() if line.strip()]
        code = [line for line in lines if not re.match(r"import |from |    \w+,$|\)$", line)]
        assert len(code) <= 20, text(cell)


@EACH
def test_no_figure_asks_for_a_white_page(path):
    asked = [
        o for o in saved_notebooks.outputs(path) if "needs_background" in o.get("metadata", {})
    ]
    assert not asked


@EACH
def test_notebook_was_run_whole_and_in_order(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    for cell in notebook["cells"]:
        assert not any("skip" in tag for tag in cell["metadata"].get("tags", []))


@EACH
def test_notebook_shows_results_and_nothing_else(path):
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    shown = json.dumps(outputs)
    assert "image/png" in shown
    assert "jupyter.widget" not in shown
    assert "widgets" not in json.loads(path.read_text())["metadata"]
    assert "Warning" not in shown
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|Users|work|var|mnt|opt)/", shown)
    assert not re.search(r"(?<!\w)[A-Za-z]:\\\\", shown), "a path on Windows"
    assert str(ROOT) not in shown
    assert "<progress" not in shown, "a progress bar that never ended"
    assert path.stat().st_size < 1_000_000


@EACH
def test_every_figure_that_a_cell_draws_is_shown(path):
    for cell in cells(path, "code"):
        if "plt.subplots(" in text(cell) and cell["metadata"].get("keep_output") is not False:
            assert "image/png" in json.dumps(cell["outputs"]), text(cell)


@EACH
def test_notebook_asserts_what_it_claims_and_says_what_it_is(path):
    code = ast.parse("\n".join(map(text, cells(path, "code"))))
    asserts = [node for node in ast.walk(code) if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5
    assert [ast.unparse(node) for node in asserts if node.msg is None] == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_links_between_files_resolve(path):
    source = (
        path.read_text() if path.suffix == ".md" else "".join(map(text, cells(path, "markdown")))
    )
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", source)
    files = [link for link in links if "://" not in link]
    assert files
    for link in files:
        assert (path.parent / link).exists(), f"{link} does not exist"


def test_the_table_of_the_readme_has_the_parameters_of_both_networks():
    large, small = (
        [layer.num_params for layer in torchinfo.summary(CNN(channels), verbose=0).summary_list[2:]]
        for channels in ((8, 16), (7, 10))
    )
    names = ["Conv2d, 3 × 3", "ReLU", "Conv2d, 3 × 3", "ReLU", "Flatten", "Linear"]
    lines = [
        f"| {name} | {before:,} | {after:,} |" if before else f"| {name} | | |"
        for name, before, after in zip(names, large, small, strict=True)
    ]
    lines.append(f"| **all** | **{sum(large):,}** | **{sum(small):,}** |")
    assert "\n".join(lines) in README


def test_the_results_in_the_readme_are_those_of_the_notebooks():
    tables = [table for path in NOTEBOOKS for table in saved_notebooks.shown(path)]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.split("\n")
        if line.startswith("|")
    ]
    quoted = [table for table in tables if table[0] in lines]
    assert len(quoted) >= 3
    for headings, *rows in quoted:
        at = lines.index(headings) + 2  # behind the dashes
        assert lines[at : at + len(rows)] == rows, headings


def test_what_the_readme_quotes_is_what_a_notebook_printed():
    printed = [" ".join(saved_notebooks.printed(path).split()) for path in NOTEBOOKS]
    quotes = re.findall(r"^> (.+)$", README, re.MULTILINE)
    assert quotes
    for quote in quotes:
        assert any(quote in text for text in printed), quote


PACKAGE = sorted((ROOT / "cnn_pruning").rglob("*.py"))


def test_the_readme_names_every_file_of_the_package_and_how_long_it_is_at_most():
    rows = re.findall(
        r"^\| [^|]+ \| [^|]+ \| (`[\w/]+\.py`[^|]*) \| under ([\d,]+) \|$", README, re.MULTILINE
    )
    named = []
    for files, most in rows:
        paths = [ROOT / "cnn_pruning" / file for file in re.findall(r"`([\w/]+\.py)`", files)]
        assert lines_of(paths) < int(most.replace(",", "")), files
        named += paths
    assert sorted(named) == [path for path in PACKAGE if path.stem != "__init__"]
    assert lines_of(PACKAGE) <= 5_200  # so that it doesn't grow; the aim is 4,300
    (most,) = re.findall(r"\| `notebooks/figures` \| under ([\d,]+) \|$", README, re.MULTILINE)
    assert lines_of(FIGURES) < int(most.replace(",", ""))


def test_a_figure_that_one_notebook_alone_draws_stands_beside_the_notebooks():
    folders = (ROOT / "notebooks" / "long_runs", ROOT / "tests" / "benchmarks")
    programs = [path for folder in folders for path in folder.glob("*.py")]
    outside = [path.read_text() for path in (*NOTEBOOKS, *FIGURES, *programs)]
    package = "".join(path.read_text() for path in PACKAGE)
    for node in ast.parse((ROOT / "cnn_pruning" / "plots.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            call = re.compile(rf"\b{node.name}\(")
            within = len(call.findall(package)) - 1  # the definition
            assert within or sum(bool(call.search(text)) for text in outside) > 1, node.name
    for path in FIGURES:
        users = [n for n in NOTEBOOKS if f"from figures.{path.stem} import" in n.read_text()]
        assert len(users) == 1, path.name


def lines_of(paths):
    return sum(len(path.read_text().splitlines()) for path in paths)


# From the ground up: each module imports only from those before it, and each room from the rooms
# before it.
FLOORS = [
    *("network.checks", "network.passes", "network.description", "network.removal"),
    *("network.sequential", "network.graph", "network.maps", "network.reading"),
    *("experiments.paths", "experiments.ranks", "experiments.progress", "experiments.model"),
    *("experiments.data", "experiments.training"),
    *("scores", "feature_maps", "oracle", "criteria", "measure", "pruner", "iterative", "plots"),
    *("alive", "tracking", "baseline", "__main__"),
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        module = getattr(node, "module", None) or ""
        if isinstance(node, ast.ImportFrom) and module.partition(".")[0] == "cnn_pruning":
            room = module.removeprefix("cnn_pruning").removeprefix(".")
            if room in ("", "experiments", "network"):
                yield from (f"{room}.{alias.name}".lstrip(".") for alias in node.names)
            else:
                yield room


def test_imports_go_one_way_and_each_module_says_what_it_is():
    # What the package itself exports stands in these modules.
    exported = {"CNN": "experiments.model", "fashion_mnist": "experiments.data"}
    exported |= dict.fromkeys(("evaluate", "fit"), "experiments.training")
    exported |= dict.fromkeys(("filter_scores", "mask_filters", "remove_filters"), "pruner")
    exported |= dict.fromkeys(("normalize", "select_filters"), "scores")
    for path in PACKAGE:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path.name
        name = ".".join(path.relative_to(ROOT / "cnn_pruning").with_suffix("").parts)
        if path.stem == "__init__":
            continue
        for other in imported(path):
            module = exported.get(other, other)
            assert FLOORS.index(module) < FLOORS.index(name), f"{name} imports {module}"
        assert name == "tracking" or not re.search(r"^ *import mlflow|^ *from mlflow", text, re.M)
        if name not in ("plots", "tracking"):
            assert not re.search(r"^ *(import|from) matplotlib", text, re.M)


def test_the_package_shortens_openmp_s_spinning_unless_the_user_has_set_it():
    code = "import cnn_pruning, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    others = {name: value for name, value in os.environ.items() if name not in names}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=others | given, stdout=subprocess.PIPE)
        for given in ({}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"})
    ]
    assert [each.communicate()[0].split() for each in started] == [[b"1000"], [b"7"], [b"None"]]


def test_the_root_is_the_checkout_wherever_a_program_starts(tmp_path):
    code = "from cnn_pruning.experiments.paths import ROOT; print(ROOT)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert Path(found.stdout.decode().strip()) == Path(__file__).resolve().parents[1]


@EACH
def test_a_notebook_imports_the_package_before_torch(path):
    source = "\n".join(text(cell) for cell in cells(path, "code"))
    names = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert names.index("cnn_pruning") < names.index("torch")
