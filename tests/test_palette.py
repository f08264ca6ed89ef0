"""The colors of one figure stay apart for color-blind readers, and words can be read."""

import base64
import html
import io
import itertools
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import saved_notebooks
from long_runs import lengths, schedules
from matplotlib.colors import to_rgb
from PIL import Image

from cnn_pruning import plots

LEAST = 20  # CIE 1976 ΔE; about 2 can just be seen side by side
# What linear RGB becomes if one kind of cone is missing: Machado, Oliveira and Fernandes, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.
EYES = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array(  # from linear sRGB, white D65
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
COLORS = plots.METHODS | {
    "ink": plots.INK,
    "removed": plots.REMOVED,
    "stays": plots.STAYS,
    **{f"layer {i + 1}": color for i, color in enumerate(plots.LAYERS)},
}
METHODS = {"taylor", "oracle", "greedy", "weight", "random", "baseline", "scratch", "ink"}
FIGURES = {  # the colors that meet in one
    "methods": METHODS,
    "layers": {"ink", "removed", "stays", *(f"layer {i + 1}" for i in range(4))},
    "Taylor among layers": {"taylor", "random", "ink", "removed", "layer 1", "layer 2"},
}


def linear(color):
    values = np.array(to_rgb(color))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of a color in linear sRGB."""
    ratio = TO_XYZ @ rgb.clip(0, 1) / TO_XYZ.sum(1)
    root = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = root
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    """The ratio of WCAG 2, from 1 to 21."""
    low, high = sorted((TO_XYZ @ linear(color))[1] for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def distance(one, other, eyes):
    seen = [lab(np.array(EYES[eyes]) @ linear(color)) for color in (one, other)]
    return np.linalg.norm(seen[0] - seen[1])


def test_the_simulation_finds_colors_that_a_deuteranope_confuses():
    green, pink = "#009068", "#A84C7E"
    assert distance(green, pink, "usual") == pytest.approx(90, abs=1)
    assert distance(green, pink, "deuteranopia") == pytest.approx(15, abs=1)
    assert distance("#000000", "#FFFFFF", "tritanopia") == pytest.approx(100, abs=0.1)
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("figure", FIGURES)
def test_any_two_colors_of_a_figure_are_apart(figure, eyes):
    for one, other in itertools.combinations(sorted(FIGURES[figure]), 2):
        apart = distance(COLORS[one], COLORS[other], eyes)
        assert apart >= LEAST, f"{one} and {other}: {apart:.0f}"


def test_methods_differ_without_their_colors_too():
    looks = {name: plots.look(name) for name in plots.METHODS}
    same = [{"taylor", "fine-tuned"}, {"oracle", "oracle_abs"}]  # one thing with two names
    for one, other in itertools.combinations(looks, 2):
        if {one, other} not in same:
            alike = [looks[one][part] == looks[other][part] for part in ("marker", "ls")]
            assert not all(alike), f"{one} and {other}"
            assert not alike[0], f"{one} and {other} have one marker"


def test_a_variant_looks_as_its_method_and_an_unknown_name_has_the_ink():
    assert plots.look("scratch, same compute") == plots.look("scratch")
    assert plots.look("random, same layers") != plots.look("random")
    assert plots.look("nothing")["color"] == plots.INK


def test_words_and_lines_can_be_read_on_the_page():
    assert contrast(plots.INK, plots.PAGE) >= 7
    for name, color in plots.METHODS.items():
        assert contrast(color, plots.PAGE) >= 2.8, name
    axes = _axes_with(["taylor", "random", "scratch"])
    plots.label_ends(axes)
    for words in axes.texts:
        assert contrast(words.get_color(), plots.PAGE) >= 4.5, words.get_text()


def _axes_with(names):
    _, ((axes,),) = plots.subplots(1, 1, 6, 3)
    for name in names:
        axes.plot([1, 2, 3], [1, 1, 1.001], label=name, **plots.look(name))
    axes.plot([1, 2], [5, 0])  # without a name
    return axes


def test_names_stand_at_the_right_ends_of_their_lines_and_clear_of_each_other():
    axes = _axes_with(["taylor", "oracle", "apoz"])
    axes.plot([0, 1], [3, 3], label="shorter")
    axes.invert_xaxis()  # the right end is the first point now
    plots.label_ends(axes)
    axes.figure.draw_without_rendering()
    words = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert set(words) == {"Taylor", "oracle", "zeros (APoZ)", "shorter"}
    for one, other in itertools.combinations(words.values(), 2):
        assert not one.overlaps(other)
    for name, x in {"Taylor": 1, "shorter": 0}.items():
        end = axes.transData.transform((x, 1))[0]
        assert 0 < words[name].x0 - end < 30, name


def test_a_described_figure_is_one_small_picture_with_its_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    figure, axis = plt.subplots()
    axis.plot([0, 1], [0, 1], color=plots.METHODS["taylor"], lw=4)
    plots.described(figure, 'Loss "falls" & stays < 1')
    assert not plt.fignum_exists(figure.number)
    (page,) = shown
    alt, width, source = re.fullmatch(
        r'<img alt="([^"]*)" width="(\d+)" src="data:image/png;base64,([^"]+)">', page["text/html"]
    ).groups()
    assert html.unescape(alt) == page["text/plain"] == 'Loss "falls" & stays < 1'
    picture = Image.open(io.BytesIO(base64.b64decode(source)))
    assert picture.width // 2 == int(width)
    colors = {color for _, color in picture.convert("RGB").getcolors(300)}
    for color in (plots.PAGE, plots.INK, plots.METHODS["taylor"]):
        assert tuple(round(255 * part) for part in to_rgb(color)) in colors


@pytest.mark.parametrize("path", saved_notebooks.NOTEBOOKS.values(), ids=lambda path: path.stem)
def test_the_words_of_a_figure_can_be_read_on_a_phone(path):
    pages = ["".join(o.get("data", {}).get("text/html", "")) for o in saved_notebooks.outputs(path)]
    widths = re.findall(r'<img alt="[^"]*" width="(\d+)"', "".join(pages))
    assert widths
    size = plt.rcParamsDefault["font.size"] * plots.STYLE["figure.dpi"] / 72
    for width in map(int, widths):
        assert size * 390 / width >= 5.5, f"{width} pixels wide"


def test_every_method_of_a_table_has_a_look_of_its_own():
    for method in (*schedules.CRITERIA, schedules.SAME_LAYERS, *lengths.METHODS):
        assert plots.look(method)["color"] != plots.INK, method
