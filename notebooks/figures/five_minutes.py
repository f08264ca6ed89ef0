"""The figures of notebook 0: filters leave a network one after the other, and it is repaired."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from cnn_pruning.plots import INK, LAYERS, METHODS, bare_image, headline, label_ends, subplots
from figures.game import CROSS, NAMES, announced, data_url, in_color

import ipywidgets
from matplotlib.figure import Figure
from torch import Tensor

COUNTS = ("parameters", "multiply-adds", "milliseconds")
STYLE = """<style>
.slide-cards { display: flex; flex-wrap: wrap; gap: 4px; max-width: 480px; margin-bottom: 8px; }
.slide-cards > * { width: 56px; height: 56px; position: relative; display: grid;
  place-content: center; background: var(--jp-layout-color2, #eee); font-size: 12px;
  line-height: 1.2; text-align: center; }
.slide-cards img { width: 56px; height: 56px; image-rendering: pixelated; margin: 0; }
.slide-gone img { opacity: 0.25; }
.slide-gone::after { content: ""; position: absolute; inset: 0; background: CROSS; }
.slide-bars { display: grid; grid-template-columns: auto minmax(40px, 240px) auto; gap: 6px 10px;
  align-items: center; max-width: 460px; }
.slide-bars div { height: 20px; background: var(--jp-layout-color2, #eee); }
.slide-bars i { display: block; height: 100%; }
.slide-cards, .slide-bars, .slide-words { color: var(--jp-content-font-color0, inherit);
  font-size: 15px; line-height: 1.4; }
</style>""".replace("CROSS", CROSS)


def pruning_slider(
    maps: Mapping[str, Tensor],
    removed: Sequence[Mapping[str, Sequence[int]]],
    measured: Sequence[Mapping[str, float]],
    repair: Callable[[int], Iterator[float]],
) -> ipywidgets.Widget:
    """A slider that removes filters: cards are crossed out, and what is left of the network moves.

    The browser has all its positions, so that it answers while the kernel is busy.
    ``maps`` (K, H, W) from 0 to 1 by layer. By number of removed filters, ``removed`` names them,
    and ``measured`` has the ``accuracy`` and the ``COUNTS``. ``repair`` trains what is left and
    yields the accuracy on the way; a button calls it.
    """
    pictures = {layer: [*map(_picture, values)] for layer, values in maps.items()}
    slider = ipywidgets.IntSlider(0, 0, len(removed) - 1, description="remove")
    slider.layout.width = "min(100%, 700px)"
    button = ipywidgets.Button(description="Train what is left for one epoch", icon="play")
    button.layout = {"width": "auto", "align_self": "flex-start"}
    trained, bars = ipywidgets.HTML(announced("")), ipywidgets.HTML()
    trained.add_class("announced")

    def words(n: int) -> ipywidgets.Widget:
        layers = zip(removed[n].values(), NAMES, strict=False)
        gone = [f"{', '.join(map(str, ks))} of the {place}" for ks, place in layers if ks]
        which = f": {' and '.join(gone)}" if gone else ""
        said = f"{n} filter{'s' * (n != 1)} removed{which}. "
        return ipywidgets.HTML(_words(f"{said}Accuracy {measured[n]['accuracy']:.1%}."))

    def board(n: int) -> ipywidgets.Widget:
        cards = ipywidgets.HTML(STYLE + _cards(pictures, removed[n]))
        bars = ipywidgets.HTML(_bars(measured[n], measured[0]))
        return ipywidgets.Box([cards, bars], layout={"flex_flow": "row wrap"})

    def train(_) -> None:
        button.disabled = slider.disabled = True
        n = slider.value
        before, whole = measured[n]["accuracy"], measured[0]["accuracy"]
        trained.value, bars.value = _words(f"{n} removed: training …"), ""
        try:
            for accuracy in repair(n):
                now = f"{n} removed: {before:.1%} → {accuracy:.1%}"
                trained.value = _words(f"{now}, training …")
                bars.value = _bars({**measured[n], "accuracy": accuracy}, measured[0])
            trained.value = _words(f"{now} after one epoch (whole: {whole:.1%})")
        finally:
            button.disabled = slider.disabled = False

    said, boards = (
        ipywidgets.Stack([*map(make, range(len(removed)))], selected_index=0)
        for make in (words, board)
    )
    said.add_class("announced")
    for stack in (said, boards):
        ipywidgets.jslink((slider, "value"), (stack, "selected_index"))
    button.on_click(train)
    return ipywidgets.VBox([slider, said, boards, button, trained, bars])


def _words(said: str) -> str:
    return announced(f"<div class='slide-words'>{said}</div>")


def _picture(seen: Tensor) -> str:
    """What is on the card of a filter with this map."""
    if not seen.any():
        return "<span>sees nothing here</span>"
    return f"<img alt='' src='{data_url(in_color(seen, 'magma'))[4:-1]}'>"


def _cards(pictures: Mapping[str, Sequence[str]], removed: Mapping[str, Sequence[int]]) -> str:
    parts = []
    for name, (layer, found) in zip(NAMES, pictures.items(), strict=True):
        gone = ["slide-gone" * (k in removed[layer]) for k in range(len(found))]
        cards = (f"<div class='{c}'>{each}</div>" for c, each in zip(gone, found, strict=True))
        parts.append(f"{name}<div class='slide-cards'>{''.join(cards)}</div>")
    return "".join(parts)


def _bars(row: Mapping[str, float], whole: Mapping[str, float]) -> str:
    parts = [("accuracy", row["accuracy"], f"{row['accuracy']:.1%}", METHODS["taylor"])]
    for name in COUNTS:
        number = f"{row[name]:.2f}" if name == "milliseconds" else f"{row[name]:,}"
        parts.append((name, row[name] / whole[name], number, "currentColor"))
    cells = "".join(
        f"<span>{name}</span><div><i style='width: {min(share, 1):.1%}; background: {color}'></i>"
        f"</div><b>{number}</b>"
        for name, share, number, color in parts
    )
    return f"<div class='slide-bars'>{cells}</div>"


def way_down(
    maps: Mapping[str, Tensor],
    removed: Sequence[Mapping[str, Sequence[int]]],
    measured: Sequence[Mapping[str, float]],
    title: str,
) -> Figure:
    """The filters in the order in which they go; below them, what is left of the network.

    ``maps``, ``removed`` and ``measured`` are as in ``pruning_slider``. All is drawn in percent:
    the accuracy itself, and the ``COUNTS`` of the whole network's.
    """
    figure, ((above,), (below,)) = subplots(2, 1, 8, 5.2, sharex=True, height_ratios=(1, 6))
    for n, (before, after) in enumerate(itertools.pairwise(removed), start=1):
        for color, layer in zip(LAYERS, maps, strict=False):
            for k in {*after.get(layer, ())} - {*before.get(layer, ())}:
                place = (n - 0.46, n + 0.46, 0.08, 1)
                bare_image(above, maps[layer][k], cmap="magma", vmin=0, vmax=1, extent=place)
                above.text(n, -0.1, k, color=color, ha="center", va="top")
    above.set(ylim=(-0.5, 1.1), aspect="auto")
    order = "each filter's map, in the order in which they go (blue: first layer, orange: second)"
    above.set_title(order, size=10, pad=2)
    above.tick_params(bottom=False)
    looks = {"accuracy": {"color": METHODS["taylor"], "lw": 3, "marker": "o", "ms": 5}}
    looks |= dict(zip(COUNTS, ({"ls": ls, "color": INK} for ls in ("-", "--", ":")), strict=True))
    highest = 100.0
    for name, look in looks.items():
        whole = 1 if name == "accuracy" else measured[0][name]
        left = [100 * row[name] / whole for row in measured]
        highest = max(highest, *left)
        below.plot(left, label=name, **look)
    below.set(xlabel="filters removed, without training", xlim=(-0.5, len(removed) + 3))
    below.set(ylabel="accuracy, and what is left (%)", ylim=(-4, highest + 3))
    below.set_xticks(range(0, len(removed), 2))
    headline(figure, title)
    label_ends(below, 10)
    return figure


def recovery(whole: float, steps: Sequence[float], pieces: int, title: str) -> Figure:
    """The accuracy (%) of a pruned network, before an epoch and after each of its ``pieces``.

    ``steps`` has those that are known; ``whole`` is the accuracy of the network before pruning.
    """
    figure, ((axis,),) = subplots(1, 1, 7, 3)
    axis.axhline(100 * whole, color=INK, ls="--", lw=1)
    axis.text(1, 100 * whole, "before pruning", color=INK, va="bottom")
    axis.plot(range(len(steps)), [100 * s for s in steps], "o-", color=METHODS["taylor"])
    axis.set(xlim=(-0.3, pieces + 0.3), ylim=(100 * min(steps) - 2, 100 * whole + 3))
    ticks = range(pieces + 1)
    axis.set_xticks(ticks, [f"{n / pieces:.0%}" for n in ticks])
    axis.set(xlabel="of one epoch", ylabel="validation accuracy (%)")
    headline(figure, title)
    return figure
