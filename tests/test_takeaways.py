"""What the takeaways of a notebook say in numbers, the notebook has shown."""

import html
import re
from collections.abc import Iterator

import pytest
import saved_notebooks
from saved_notebooks import cells, text

EACH = pytest.mark.parametrize("path", saved_notebooks.NOTEBOOKS.values(), ids=lambda p: p.stem)
HEADING = "## Takeaways"
NUMBER = re.compile(
    r"""(?<![\w.])(?<![A-Za-z]-)   # not within a name: network.0, VGG-16, float32
    (?P<sign>[-+\u2212]\s?)?
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)(?P<power>e[-+]\d+)?
    (?P<percent>\s?%)?""",
    re.VERBOSE,
)
# Code, formulas, addresses, years, and the numbers of equations, notebooks, tables and so on.
FREE = re.compile(
    r"""`[^`]*` | \$[^$]*\$ | \]\([^)]*\) | <[^>]*> | \b(?:19|20)\d\d\b
    | \b(?:Eqs?\.|[Nn]otebooks?|[Tt]ables?|[Ff]igures?|[Ee]xercises?|[Ss]eeds?)\s
      \[?\d+(?:(?:,\s|\s(?:and|to|or)\s)\[?\d+)*""",
    re.VERBOSE,
)


def numbers(words: str) -> Iterator[tuple[str, str, bool]]:
    """Each number as its sign ("-", "+" or none), its digits, and whether it is a percentage."""
    for found in NUMBER.finditer(words):
        sign = (found["sign"] or "").strip().replace("\u2212", "-")
        digits = found["digits"].replace(",", "") + (found["power"] or "")
        yield sign, "0" + digits if digits[0] == "." else digits, bool(found["percent"])


def takeaways(path) -> list[dict]:
    """The cells from the heading to the next one; the first begins with the heading."""
    all_cells = cells(path)
    (start,) = [i for i, cell in enumerate(all_cells) if HEADING in text(cell).splitlines()]
    first = all_cells[start] | {"source": text(all_cells[start]).partition(HEADING)[2]}
    found = []
    for cell in [first, *all_cells[start + 1 :]]:
        own, heading, _ = text(cell).partition("\n## ")
        if not text(cell).startswith("## "):
            found.append(cell | {"source": own})
        if heading or text(cell).startswith("## "):
            break
    return [cell for cell in found if text(cell).strip()]


def shown(path) -> list[str]:
    """The words of each output: printed, or a page without its tags (so without alt texts)."""
    found = []
    for output in saved_notebooks.outputs(path):
        data = output.get("data", {})
        page = "".join(data.get("text/html", data.get("text/markdown", "")))
        page = re.sub(r"<style.*?</style>", " ", page, flags=re.DOTALL)
        plain = "" if page or "image/png" in data else "".join(data.get("text/plain", ""))
        printed = "".join(output.get("text", ""))
        found.append(printed + plain + html.unescape(re.sub(r"<[^>]+>", " ", page)))
    return found


def missing(words: str, outputs: list[str]) -> list[str]:
    """The numbers in ``words`` that no output has, with the same digits.

    A sign that is written must be the same (a number without one is positive), and a percentage
    must stand in an output that has a percent sign.
    """
    there = {
        (way, digits, percent)
        for output in outputs
        for sign, digits, _ in numbers(output)
        for way in {"": ("", "+"), "+": ("", "+"), "-": ("", "-")}[sign]
        for percent in {False, "%" in output}
    }
    return [
        f"{sign}{digits}{' %' * percent}"
        for sign, digits, percent in numbers(FREE.sub(" ", words))
        if (sign, digits, percent) not in there
    ]


@EACH
def test_the_takeaways_are_text(path):
    found = takeaways(path)
    assert found
    assert {cell["cell_type"] for cell in found} == {"markdown"}


@EACH
def test_every_number_in_the_takeaways_stands_in_an_output(path):
    words = "\n".join(text(cell) for cell in takeaways(path) if cell["cell_type"] == "markdown")
    assert missing(words, shown(path)) == []


OUTPUTS = ["rho 0.952, 12 filters, change -0.88, 62%", "126,698 parameters", "7 of 24"]


@pytest.mark.parametrize(
    "words",
    [
        "ρ is .952 for 12 filters, a lead of .88",
        "By 62 % fewer, 126,698 of them, \u22120.88",
        "Eq. 8 in notebooks 5, 6 and 7, of 2017, at $g=3$, with `network.3` and VGG-16",
        "[notebook 5](05_fine_tuning.ipynb) has the 24, two of them twice",
    ],
)
def test_a_number_that_was_shown_may_be_said(words):
    assert missing(words, OUTPUTS) == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("ρ is 0.95", "0.95"),  # another rounding
        ("ρ is .95", "0.95"),
        ("+0.88", "+0.88"),  # another sign
        ("7 %", "7 %"),  # a count isn't a share
        ("126,699", "126699"),
        ("126", "126"),
        ("13th", "13"),
        ("10 of 24", "10"),
    ],
)
def test_a_number_that_was_not_shown_is_noticed(words, found):
    assert missing(words, OUTPUTS) == [found]
