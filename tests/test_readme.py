"""The README is short, shows what is there, and says what the notebooks say."""

import re
import subprocess
import sys

import pytest
import saved_notebooks
from long_runs import pictures

from cnn_pruning import CNN
from cnn_pruning.experiments.paths import ROOT
from cnn_pruning.measure import count_parameters

README = (ROOT / "README.md").read_text()
NOTEBOOKS = saved_notebooks.NOTEBOOKS.values()
CODE = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
DARK = "_dark"


def section(heading):
    (found,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    return found


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.split()) <= 1_300


def test_the_first_screen_has_the_picture_and_the_command():
    top = README.partition("\n## ")[0]
    assert "overview.png" in top
    (start,) = [code for language, code in CODE if "git clone" in code and code in top]
    assert start.splitlines()[-1].endswith("notebooks/00_five_minutes.ipynb")
    # PowerShell 5.1 has no &&, and each command stands alone
    assert not [code for language, code in CODE if "&&" in code]


def test_continuous_integration_types_the_commands_of_the_readme():
    commands = "\n".join(code for language, code in CODE if language == "sh").splitlines()
    for command in ("pip install uv", "uv run pytest"):
        assert command in commands
        assert f"'^{command}$'" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_table_has_every_notebook_with_its_minutes(path):
    rows = re.findall(rf"\(notebooks/{path.name}\) \| .* \| (\S+) \| (\d+) \|$", README, re.M)
    ((run, read),) = rows
    (to_read,) = re.findall(r"(\d+) minutes to read", saved_notebooks.prose(path))
    assert int(read) == 5 * round(int(to_read) / 5), "rounded to five"
    (stated,) = re.findall(r"\*\*Takes\*\* (.*?) on a 2-core CPU", saved_notebooks.prose(path))
    stated = re.sub(r"\d+ minutes to read", "", stated)
    found = [value for words, value in MINUTES.items() if words in stated]
    assert found, stated
    assert abs(found[0] - float(run.replace("½", ".5"))) <= 0.5


MINUTES = {  # in words; the first that is found counts
    "minute and a half": 1.5,
    "half a minute": 0.5,
    "30 seconds": 0.5,
    **{f"{word} minute": i for i, word in enumerate(("one", "two", "three", "four"), start=1)},
    "a minute": 1,
}


def test_the_numbers_of_the_results_are_those_of_the_notebooks_beside_them():
    results = [line for line in section("What comes out").splitlines() if line.startswith("- ")]
    assert len(results) >= 3
    for line in results:
        names = re.findall(r"\(notebooks/(\d+)_\w+\.ipynb\)", line)
        assert names, line
        said = " ".join(map(everything, names))
        plain = re.sub(r"\[notebook[^\]]*\]\([^)]*\)|Eq\. 8|<!--.*?-->", "", line)
        for number in re.findall(r"\d[\d,.]*\d|\d", plain):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", said), f"{number}: {line}"


def everything(name):
    """What a notebook says, prints and shows in tables."""
    pages = ["".join(o.get("data", {}).get("text/html", "")) for o in saved_notebooks.outputs(name)]
    tables = re.sub(r"<[^>]+>", " ", "".join(pages))
    return saved_notebooks.prose(name) + saved_notebooks.printed(name) + tables


def test_the_parameters_are_those_of_both_networks():
    large, small = (count_parameters(CNN(channels)) for channels in ((8, 16), (7, 10)))
    assert f"{large:,} → {small:,} parameters" in README


def test_the_number_of_networks_is_that_of_all_subsets():
    assert f"{2 ** sum((8, 16)):,}" in README


def test_every_picture_is_shown_with_a_text_and_has_a_twin_for_dark_pages():
    shown = {}
    for block in re.findall(r"<picture>.*?</picture>", README, re.DOTALL):
        (dark,) = re.findall(
            r'<source media="\(prefers-color-scheme: dark\)" srcset="notebooks/pictures/(.+?)">',
            block,
        )
        (light,) = re.findall(r'<img [^>]*src="notebooks/pictures/(.+?)"', block)
        assert dark == light.replace(".png", f"{DARK}.png")
        shown |= {light: block, dark: block}
    moving = re.findall(r'<img src="notebooks/pictures/(\w+\.gif)"', README)
    assert {*shown, *moving} == {path.name for path in pictures.PICTURES.iterdir()}
    for tag in re.findall(r"<img [^>]*>", README):
        assert re.search(r'alt="[^"]{40,}"', tag), tag
    for name in moving:
        assert (pictures.PICTURES / name).stat().st_size < 1_000_000


def test_the_pictures_are_those_of_the_notebooks():
    drawn = pictures.tagged()
    stored = {path.stem: path.read_bytes() for path in pictures.PICTURES.glob("*.png")}
    light = {name for name in stored if not name.endswith(DARK)}
    assert light == {*drawn, "overview"}
    for name, picture in drawn.items():
        assert stored[name] == picture, f"{name}: run notebooks/long_runs/pictures.py"
        assert stored[name + DARK] == pictures.darkened(picture), name


def test_a_notebook_finds_its_imports_wherever_its_kernel_starts(tmp_path):
    # To import them takes seconds, and other tests do.
    names = ("figures.gate", "long_runs.pictures")
    code = f"import importlib.util as i; print(*(i.find_spec(n).origin for n in {names}))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    for name in names:
        assert str(ROOT / "notebooks" / name.replace(".", "/")) in found.stdout
