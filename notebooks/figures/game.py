"""Beat Taylor: a game for notebook 8, with every filter of a network as a card to switch off."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from cnn_pruning.experiments.data import CLASSES
from cnn_pruning.experiments.model import CNN
from cnn_pruning.plots import REMOVED

import ipywidgets
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import cross_entropy

Kept = dict[str, list[int]]
"""The filters that stay, by name of convolution."""

ROUNDING = 5e-6  # nats; closer losses count as equal
WORDS = "color: var(--jp-content-font-color0, inherit); font-size: 15px; line-height: 1.5"
CARD = "92px"
ROW = "776px"  # eight cards


@dataclass(frozen=True)
class Ranks:
    """The losses at some ranks, best first, among all networks with equally many filters."""

    of: int
    ranks: Sequence[int]
    losses: Sequence[float]

    def rank(self, loss: float) -> tuple[int, bool]:
        """Return the rank of a network with this loss, and whether it is exact or interpolated."""
        losses, ranks = np.asarray(self.losses), np.asarray(self.ranks)
        better = int((losses < loss - ROUNDING).sum())
        if better == len(ranks):
            return self.of, True
        if ranks[better] == better + 1:  # every rank up to here is stored
            return better + 1, True
        around = slice(better - 1, better + 1)  # and no further, since many losses can be equal
        between = np.interp(loss, losses[around], np.log(ranks[around]))
        return int(np.clip(np.exp(between).round(), ranks[better - 1] + 1, self.of)), False


class Table:
    """What a two-layer network without some filters does, fast enough to answer a click.

    ``parts`` (subsets of the first layer, filters of the second, images, classes) is what each
    filter of the second layer adds to the logits of each image.
    """

    def __init__(self, parts: Tensor, bias: Tensor, labels: Tensor) -> None:
        self.parts, self.bias, self.labels = parts, bias.detach(), labels

    def outcome(self, first: Sequence[int], second: Sequence[int]) -> tuple[float, float]:
        """Return the mean loss (nats) and the accuracy with these filters of the two layers."""
        highest = len(self.parts).bit_length() - 2  # the bit of filter 0
        parts = self.parts[sum(1 << (highest - k) for k in first)]
        logits = self.bias + parts[list(second)].float().sum(0)
        right = (logits.argmax(1) == self.labels).double().mean().item()
        return cross_entropy(logits, self.labels).item(), right


def play(
    network: CNN,
    table: Table,
    ranks: Mapping[int, Ranks],
    choices: Mapping[str, Mapping[int, Kept]],
    images: Mapping[str, Tensor],
    macs: Callable[[int, int], int],
) -> ipywidgets.Widget:
    """Return the board: cards to switch filters off, and what the network does without them.

    ``ranks`` and the values of ``choices`` are by number of filters; each choice gets a button.
    ``images`` (1, 28, 28) by name are those that the cards can show; ``macs`` counts the
    multiply-adds of a network with these widths.
    """
    return Board(network, table, ranks, choices, images, macs).widget


class Board:
    """The widgets of the game; see ``play``."""

    def __init__(self, network, table, ranks, choices, images, macs) -> None:
        self.network, self.table, self.ranks = network, table, ranks
        self.images, self.macs = images, macs
        self.layers = [f"network.{i}" for i in (0, 2)]
        self.convs = [network.get_submodule(layer) for layer in self.layers]
        self.all_macs = macs(*(conv.out_channels for conv in self.convs))
        self.limits = [conv.weight.abs().max().item() for conv in self.convs]
        self.busy = False
        self.shown: dict[tuple[int, int], object] = {}
        self.cards = [
            [self._card(i, k) for k in range(conv.out_channels)]
            for i, conv in enumerate(self.convs)
        ]
        self.words = ipywidgets.HTML()
        self.chooser = ipywidgets.Dropdown(options=[*images], description="Image")
        self.chooser.observe(lambda _: self._update(), names="value")
        everything = {"All on": lambda _: {n: range(c.out_channels) for n, c in self._named()}}
        answers = {name: by_size.get for name, by_size in choices.items()}
        self.buttons = {
            name: self._button(name, pick) for name, pick in (everything | answers).items()
        }
        rows = [
            ipywidgets.Box(
                [ipywidgets.VBox(card) for card in row],
                layout={"flex_flow": "row wrap", "max_width": ROW},
            )
            for row in self.cards
        ]
        titles = [
            ipywidgets.HTML(f"<b style='{WORDS}'>Convolution {i + 1}: {len(row)} filters</b>")
            for i, row in enumerate(self.cards)
        ]
        alive = ipywidgets.HTML("<style>.game-is-off {display: none}</style>")
        self.widget = ipywidgets.VBox(
            [
                alive,
                self.words,
                ipywidgets.Box(
                    [*self.buttons.values(), self.chooser], layout={"flex_flow": "row wrap"}
                ),
                *(part for pair in zip(titles, rows, strict=True) for part in pair),
            ]
        )
        self._update()

    def _named(self):
        return zip(self.layers, self.convs, strict=True)

    def _card(self, i: int, k: int) -> list[ipywidgets.Widget]:
        picture = ipywidgets.Image(layout={"width": CARD, "margin": "2px"})
        button = ipywidgets.ToggleButton(value=True, layout={"width": CARD, "margin": "2px"})
        button.observe(lambda _: self._update(), names="value")
        return [picture, button]

    def _button(self, name: str, pick: Callable[[int], Kept | None]) -> ipywidgets.Button:
        button = ipywidgets.Button(description=name, layout={"width": "auto"})
        button.tooltip = f"{name}, with as many filters as are on now"
        button.on_click(lambda _: self._set(pick(sum(map(len, self.kept())))))
        return button

    def kept(self) -> list[list[int]]:
        return [[k for k, (_, b) in enumerate(row) if b.value] for row in self.cards]

    def _set(self, kept: Kept | None) -> None:
        if kept is None:
            return
        self.busy = True
        for layer, row in zip(self.layers, self.cards, strict=True):
            for k, (_, button) in enumerate(row):
                button.value = k in kept[layer]
        self.busy = False
        self._update()

    def _update(self) -> None:
        if self.busy:  # more buttons change, and one answer is enough
            return
        kept = self.kept()
        self.words.value = f"<div role='status' style='{WORDS}'>{self._said(*kept)}</div>"
        for i, maps in enumerate(self._maps(kept)):
            for k, (picture, button) in enumerate(self.cards[i]):
                on = k in kept[i]
                looks = (on, maps[k].numpy().tobytes())
                if self.shown.get((i, k)) == looks:  # only what changed travels to the browser
                    continue
                self.shown[i, k] = looks
                kernel, limit = self.convs[i].weight.detach(), self.limits[i]
                brightest = max(maps.max().item(), 1e-6)
                picture.value = filter_card(kernel[k], maps[k] / brightest, limit, on)
                button.description = f"{k} on" if on else f"{k} off"
                button.icon = "check" if on else "times"
                button.button_style = "info" if on else ""
                button.tooltip = f"Filter {k} of convolution {i + 1} is {'on' if on else 'off'}"

    @torch.no_grad()
    def _maps(self, kept: list[list[int]]) -> list[Tensor]:
        """What every filter sees; those of the second layer through what is on in the first."""
        layers = self.network.network
        first = layers[:2](self.images[self.chooser.value][None])
        passed = torch.zeros_like(first)
        passed[:, kept[0]] = first[:, kept[0]]
        return [first[0], layers[2:4](passed)[0]]

    def _said(self, first: list[int], second: list[int]) -> str:
        loss, accuracy = self.table.outcome(first, second)
        size = len(first) + len(second)
        macs = self.macs(len(first), len(second))
        lines = [
            f"<b>{size} filters</b>, {macs:,} multiply-adds ({macs / self.all_macs:.0%}): "
            f"loss <b>{loss:.4f}</b> nats, accuracy <b>{accuracy:.1%}</b>, "
            f"on {len(self.table.labels):,} training images"
        ]
        if not first or not second:
            lines.append("A layer without filters lets nothing through: no network is left.")
        else:
            known = self.ranks[size]
            rank, exact = known.rank(loss)
            about = "" if exact else "about "
            best = min(known.losses)
            lines.append(
                f"<b>rank {about}{rank:,}</b> of all {known.of:,} with {size} filters; "
                f"{max(0, loss - best):.4f} nats above the best"
            )
        return "<br>".join(lines)


def filter_card(kernel: Tensor, feature_map: Tensor, limit: float, on: bool = True) -> bytes:
    """A small PNG for a card: a feature map beside its kernel; crossed out where it is off.

    ``kernel`` (C, 3, 3), colored from -limit to limit; ``feature_map`` (H, W) from 0 to 1, whose
    brightness is the square root of its values.
    """
    scale = 56 // feature_map.shape[0]
    left = Image.fromarray(_shades("magma")[_in_256(feature_map.sqrt())]).resize(
        [scale * n for n in feature_map.T.shape], 0
    )
    columns = 1 if len(kernel) == 1 else 2
    side = 24 if columns == 1 else 12
    card = Image.new("RGBA", (left.width + 36, left.height))
    card.paste(left)
    for i, part in enumerate(kernel):
        colors = _shades("RdBu_r")[_in_256(0.5 + 0.5 * part / limit)]
        at = (left.width + 4 + (i % columns) * (side + 2), (i // columns) * (side + 2))
        card.paste(Image.fromarray(colors).resize((side, side), 0), at)
    if not on:
        card.putalpha(card.getchannel("A").point(lambda a: a // 4))
        end = (left.width - 1, left.height - 1)
        for line in ((0, 0, *end), (0, end[1], end[0], 0)):
            ImageDraw.Draw(card).line(line, fill=REMOVED, width=4)
    file = io.BytesIO()
    card.save(file, "PNG")
    return file.getvalue()


@cache
def _shades(name: str) -> np.ndarray:
    return colormaps[name](np.arange(256), bytes=True)


def _in_256(values: Tensor) -> np.ndarray:
    return (255 * values.clamp(0, 1)).byte().numpy()


def ten_images(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The first image of each class, by its name."""
    return {name: images[labels == k][0] for k, name in enumerate(CLASSES)}
