"""What the notebooks say and show, as their files have it."""

import html
import json
import re
from pathlib import Path

from cnn_pruning.experiments.paths import ROOT

NOTEBOOKS = {path.stem[:2]: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}


def cells(notebook: Path | str, kind: str | None = None) -> list[dict]:
    """The cells of a notebook (a path or its number), of one kind or of all."""
    path = NOTEBOOKS.get(notebook, notebook)
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["source"] and kind in (None, cell["cell_type"])]


def text(cell: dict) -> str:
    return "".join(cell["source"])


def folded(cell: dict) -> bool:
    """Whether JupyterLab hides the cell's source until the reader opens it."""
    return cell["metadata"].get("jupyter", {}).get("source_hidden", False)


def prose(notebook: Path | str) -> str:
    return "\n".join(map(text, cells(notebook, "markdown")))


def words(notebook: Path | str) -> int:
    """The words of the prose; a formula counts as one, and code and addresses don't count."""
    plain = re.sub(r"```.*?```|<[^>]+>|\]\([^)]*\)", " ", prose(notebook), flags=re.DOTALL)
    plain = re.sub(r"\$\$.*?\$\$|\$[^$]+\$", "formula", plain, flags=re.DOTALL)
    return sum(bool(re.search(r"\w", word)) for word in re.split(r"[\s|]+", plain))


def lines_of_code(notebook: Path | str) -> int:
    """The lines that aren't empty, of the code within the prose and of all cells but the folded."""
    code = [text(cell) for cell in cells(notebook, "code") if not folded(cell)]
    code += re.findall(r"```\w*\n(.*?)```", prose(notebook), re.DOTALL)
    return sum(bool(line.strip()) for source in code for line in source.split("\n"))


def outputs(notebook: Path | str) -> list[dict]:
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def printed(notebook: Path | str) -> str:
    return "".join(
        line
        for output in outputs(notebook)
        if output.get("name") == "stdout"
        for line in output["text"]
    )


def number(notebook: Path | str, pattern: str) -> float:
    """The number in the parentheses of ``pattern``, in what the notebook printed."""
    found = re.search(pattern, printed(notebook))
    assert found, pattern
    return float(found[1])


def shown(notebook: Path | str) -> list[list[list[str]]]:
    """The tables that a notebook shows, each as rows of words; the first row has the headings."""
    pages = ["".join(o.get("data", {}).get("text/html", "")) for o in outputs(notebook)]
    return [_rows(page) for page in pages if "<table" in page]


def _rows(page: str) -> list[list[str]]:
    head, body = (
        [_words(row) for row in re.findall(r"<tr.*?</tr>", part, re.DOTALL)]
        for part in page.split("</thead>")
    )
    headings = head.pop()
    if not any(headings[1:]):  # only the name of the index; the columns' are above it
        headings = [name or above for name, above in zip(headings, head.pop(), strict=True)]
    return [headings, *body]


def _words(row: str) -> list[str]:
    found = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
    return [html.unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in found]


def tables(notebook: Path | str) -> list[dict[str, dict[str, float | str]]]:
    """The tables that a notebook shows, each as {column: {row: number, or words}}."""
    return [
        {
            column: {row[0]: _number(row[i]) for row in body}
            for i, column in enumerate(headings[1:], start=1)
        }
        for headings, *body in shown(notebook)
        if all(len(row) == len(headings) for row in body)  # one level of rows
    ]


def _number(words: str) -> float | str:
    try:
        return float(words.replace(",", "").removesuffix("%"))
    except ValueError:
        return words
