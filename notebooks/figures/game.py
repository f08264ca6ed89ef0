"""Beat Taylor: a game, with every filter of a network as a card to switch off."""

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache

from cnn_pruning import CNN, fashion_mnist
from cnn_pruning.experiments.data import CLASSES
from cnn_pruning.plots import LAYERS, METHODS, REMOVED
from long_runs import every_network, trained
from long_runs.levels import ROUNDING, Level, Place, Rivals, levels

import ipywidgets
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

NAMES = ("first layer", "second layer")
NOTHING = "A layer without filters lets nothing through: no network is left."
# Loss and clicks, for the session, by level and its best loss, which tells networks apart.
PERSONAL_BEST: dict[tuple[str, float], tuple[float, int]] = {}
LINE = f"transparent 48%, {REMOVED} 48% 52%, transparent 52%"
CROSS = f"linear-gradient(45deg, {LINE}), linear-gradient(-45deg, {LINE})"
NUMBERS = itertools.count()  # of the boards, whose styles must not mix on one page
STYLE = """
.game { --ink: currentColor; --you: YOU; --taylor: TAYLOR;
  color: var(--jp-content-font-color0, inherit); font-size: 15px; line-height: 1.45; }
.game p, .game-ends { margin: 4px 0; line-height: 1.45; }
.game button { width: auto; }
.game .game-card { width: 96px; height: 160px; margin: 2px; padding: 0 0 3px; position: relative;
  display: flex; align-items: flex-end; justify-content: center; line-height: 1.2;
  color: inherit; border: 3px solid transparent; box-sizing: border-box;
  image-rendering: pixelated; background-color: var(--jp-layout-color2, #eee);
  background-image: var(--map), var(--kernel); background-repeat: no-repeat;
  background-position: 50% 2px, 50% 90px; background-size: 84px 84px, var(--large); }
.game .game-card.game-off::before { content: ""; position: absolute; inset: 0 0 20px;
  background: var(--jp-layout-color0, white); opacity: 0.75; }
.game .game-card.game-off::after { content: ""; position: absolute; inset: 2px 2px auto;
  height: 84px; background: CROSS; }
.game .game-card.game-taylor { border: 3px dashed var(--taylor); }
.game .game-card.game-best { outline: 3px double var(--ink); }
.game .game-card:focus-visible { box-shadow: 0 0 0 2px var(--jp-layout-color0, white),
  0 0 0 5px var(--ink); }
.game-won { display: inline-block; border: 2px solid var(--taylor); padding: 2px 8px; }
.game-ladder, .game-ends { max-width: 790px; position: relative; }
.game-ladder { height: 18px; margin-bottom: 20px; border: 1px solid var(--ink); }
.game-ladder > * { position: absolute; top: 0; height: 100%; }
.game-you { left: 0; background: var(--you); border-right: 3px solid var(--ink); }
.game-tenth { border-left: 1px solid var(--ink); }
.game-theirs { border-left: 4px solid var(--taylor); }
.game-theirs > span { position: absolute; top: 18px; transform: translateX(-50%); }
.game-ends { display: flex; justify-content: space-between; }
@media (max-width: 700px) {
  .game { font-size: 13px; }
  .game .game-card { width: 68px; height: 117px; margin: 1px;
    background-position: 50% 1px, 50% 60px; background-size: 56px 56px, var(--small); }
  .game .game-card.game-off::after { inset: 1px 2px auto; height: 56px; }
}
"""


def play(seed: int = 0) -> ipywidgets.Widget:
    """Return the game: a board to play on, its levels, and how one stands.

    ``seed`` is that of one of the networks of ``every_network.SEEDS``.
    """
    (network,) = trained.networks([seed])
    train, val, _ = fashion_mnist()
    some = (part[: every_network.IMAGES].clone() for part in train.tensors)  # the rest is freed
    images = {name: val.tensors[0][val.tensors[1] == k][0] for k, name in enumerate(CLASSES)}
    return Board(Losses(network, *some), *levels(seed), images).widget


class Losses:
    """What a two-layer network without some filters does, fast enough to answer a click.

    What each filter of the second layer adds to the logits is computed for a subset of the first
    layer once it is asked for. ``images`` (N, 1, 28, 28), ``labels`` (N,).
    """

    def __init__(self, network: CNN, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.added = lru_cache(64)(self._added)

    @torch.no_grad()
    def _added(self, first: tuple[int, ...]) -> Tensor:  # (N, filters of the second layer, classes)
        conv1, _, conv2, *_, linear = self.network.network
        read = linear.weight.unflatten(1, (conv2.out_channels, -1))
        found = []
        for some in self.images.split(100):  # so few that they stay in the processor's cache
            z = conv1(some).relu_()[:, first]
            z = conv2d(z, conv2.weight[:, first], conv2.bias, padding=1).relu_()
            found.append(torch.einsum("nkm,ckm->nkc", z.flatten(2), read))
        return torch.cat(found)

    @torch.no_grad()
    def outcome(self, on: Iterable[Place]) -> tuple[float, float]:
        """Return the mean loss (nats) and the accuracy with these filters, one a layer at least."""
        first, second = (tuple(sorted(k for i, k in on if i == layer)) for layer in (0, 1))
        logits = self.network.network[-1].bias + self.added(first)[:, second].sum(1)
        right = (logits.argmax(1) == self.labels).double().mean().item()
        return cross_entropy(logits, self.labels).item(), right


class Board:
    """The widgets of the game, and how it stands; see ``play``.

    ``rivals`` by number of filters; ``images`` (1, 28, 28) by name are what the cards can show.
    """

    def __init__(
        self,
        losses: Losses,
        rivals: Mapping[int, Rivals],
        levels: Sequence[Level],
        images: Mapping[str, Tensor],
    ) -> None:
        self.losses, self.rivals, self.images = losses, rivals, [*images.items()]
        self.convs = [m for m in losses.network.modules() if isinstance(m, torch.nn.Conv2d)]
        self.looks = {"layout": ipywidgets.Layout(), "style": ipywidgets.ButtonStyle()}  # of all
        self.cards = {
            (i, k): self._card(i, k)
            for i, conv in enumerate(self.convs)
            for k in range(conv.out_channels)
        }
        # No drop-down lists: JupyterLab takes the arrow keys away from them.
        self.level = ipywidgets.ToggleButtons(options=[(level.name, level) for level in levels])
        self.another = ipywidgets.Button(icon="image")
        self.another.tooltip = "See on the cards what the filters find in the next class"
        self.undo = ipywidgets.Button(description="Undo", icon="undo")
        self.undo.tooltip = "Take back the last click; this is a click, too"
        self.again = ipywidgets.Button(description="Start again", icon="refresh")
        self.again.tooltip = "Switch all filters of this level on, and count from 0"
        self.taylor = ipywidgets.ToggleButton(description="Outline Taylor's choice")
        self.best = ipywidgets.ToggleButton(description="Outline the best")
        self.taylor.tooltip = "Mark the filters that Taylor keeps with a T and a dashed line"
        self.best.tooltip = "From then on, beating Taylor doesn't count until you start again"
        controls = wrapped((self.undo, self.again, self.taylor, self.best, self.another))
        self.number = f"game-{next(NUMBERS)}"
        self.maps, self.goal, self.words, self.bar = (ipywidgets.HTML() for _ in range(4))
        self.words.add_class("announced")
        said = ipywidgets.VBox([self.goal, self.words, self.bar])
        said.layout.min_height = "190px"  # so that the cards stay where they are
        rows = [self._style(), self.maps, self.level, controls, said]
        for layer, name in enumerate(NAMES):
            rows.append(ipywidgets.HTML(f"<b>{name.capitalize()}</b>"))
            rows.append(wrapped(card for (i, _), card in self.cards.items() if i == layer))
        self.widget = ipywidgets.VBox(rows).add_class("game").add_class(self.number)
        self.left = {}  # how the levels that aren't shown stand
        self.start()
        self.undo.on_click(lambda _: self.take_back())
        self.again.on_click(lambda _: self.start())
        self.another.on_click(lambda _: self.look_at_another())
        self.level.observe(lambda change: self._change(change.old, change.new), names="value")
        for outline in (self.taylor, self.best):
            outline.observe(lambda _: self._show(), names="value")

    def start(self) -> None:
        """Switch all filters of this level on, and count from 0."""
        self._stand({*self.cards}, [], 0, False)

    def _change(self, old: Level, new: Level) -> None:
        """Show a level as it was left."""
        self.left[old.name] = (self.on, self.before, self.clicks, self.peeked)
        self._stand(*self.left.get(new.name, ({*self.cards}, [], 0, False)))

    def _stand(self, on: set[Place], before: list[set[Place]], clicks: int, peeked: bool) -> None:
        self.on, self.before, self.clicks, self.peeked = on, before, clicks, peeked
        self.best.value = False
        self._show()

    def click(self, place: Place) -> None:
        """Switch a filter off, or on again."""
        self.before.append(self.on)
        self._move(self.on ^ {place})

    def take_back(self) -> None:
        """Undo the last click; it counts as one more."""
        self._move(self.before.pop())

    def look_at_another(self) -> None:
        """Show on the cards what the filters see in the next image."""
        self.images.append(self.images.pop(0))
        self._show()

    def _move(self, on: set[Place]) -> None:
        self.on = on
        self.clicks += 1
        self._show()

    def _show(self) -> None:
        level = self.level.value
        self.peeked |= self.best.value
        over = level.clicks is not None and self.clicks >= level.clicks
        self.undo.disabled = over or not self.before
        for place, card in self.cards.items():
            card.disabled = over
            self._look(card, place, level.rivals)
        self.maps.value = f"<style>{self._maps()}</style>"
        self.goal.value = f"<p><b>Goal: {goal(level)}</b></p>"
        lines, self.bar.value = self._said(level)
        clicks = f"{self.clicks} of {level.clicks}" if level.clicks else self.clicks
        lines[-1] += f" Clicks: {clicks}.{personal_best(level)}"
        if over:
            lines.append("<b>No click is left.</b> Start again?")
        self.words.value = announced("".join(f"<p>{line}</p>" for line in lines))

    def _said(self, level: Level) -> tuple[list[str], str]:
        """Return how the player stands, in lines and as a bar."""
        widths = [sum(i == layer for i, _ in self.on) for layer in (0, 1)]
        if 0 in widths:
            return [NOTHING], ""
        missing = level.missing(*widths)
        rivals = self.rivals.get(sum(widths), level.rivals) if missing else level.rivals
        loss, accuracy = self.losses.outcome(self.on)
        rank, exact = rivals.ranks.rank(loss)
        yours = f"Yours: loss <b>{loss:.4f} nats</b>, accuracy {accuracy:.1%} (training images)."
        if several := rivals.ranks.of > 1:
            yours += (
                f" {rivals.who.capitalize()}, that is "
                f"{against(loss, rivals.taylor_loss, 'Taylor')} and "
                f"{against(loss, rivals.best_loss, 'the best')}; {'' if exact else 'about '}"
                f"{rank - 1:,} of all {rivals.ranks.of:,} are better."
            )
        result = f"<b>{missing}</b>" if missing else self._won(level, loss, rank)
        return [yours, result], ladder(rivals, rank) if several else ""

    def _won(self, level: Level, loss: float, rank: int) -> str:
        by = level.rivals.taylor_loss - loss
        if by <= ROUNDING:
            return "Taylor still wins." if by < -ROUNDING else "A draw with Taylor."
        if self.peeked:
            return "That beats Taylor, but not with the best outlined: start again."
        here = level.name, level.rivals.best_loss
        known = PERSONAL_BEST.get(here, (math.inf, 0))
        if loss < known[0] - ROUNDING:
            PERSONAL_BEST[here] = (loss, self.clicks)
        best = " And nothing is better: this is the best of all." if rank == 1 else ""
        return f"<b class='game-won'>You beat Taylor, by {by:.3f} nats!{best}</b>"

    # How it looks

    def _card(self, layer: int, k: int) -> ipywidgets.Button:
        card = ipywidgets.Button(**self.looks).add_class("game-card")
        card.add_class(f"game-card-{layer}-{k}")
        card.on_click(lambda _: self.click((layer, k)))
        return card

    def _look(self, card: ipywidgets.Button, place: Place, rivals: Rivals) -> None:
        layer, k = place
        state = "on" if place in self.on else "off"
        taylor = self.taylor.value and place in rivals.taylor
        best = self.best.value and place in rivals.best
        card.description = f"{k} {state}{' T' * taylor}{' B' * best}"
        words = f"{', Taylor keeps it' * taylor}{', the best keeps it' * best}"
        card.tooltip = f"Filter {k} of the {NAMES[layer]} is {state}{words}"
        styles = {"game-off": state == "off", "game-taylor": taylor, "game-best": best}
        for style, wanted in styles.items():
            (card.add_class if wanted else card.remove_class)(style)

    def _rule(self, place: Place, declarations: str) -> str:
        return f".{self.number} .game-card-{place[0]}-{place[1]} {{{declarations}}}"

    def _style(self) -> ipywidgets.HTML:
        style = STYLE
        for name, value in {"YOU": LAYERS[0], "TAYLOR": METHODS["taylor"], "CROSS": CROSS}.items():
            style = style.replace(f"{name};", f"{value};")
        limits = [conv.weight.abs().max().item() for conv in self.convs]
        for layer, k in self.cards:
            kernel = self.convs[layer].weight[k].detach()
            size = (1, 1) if len(kernel) == 1 else (4, 2)
            large, small = ("45px", "32px") if len(kernel) == 1 else ("90px 42px", "60px 28px")
            picture = f"--kernel: {data_url(sheet(kernel / limits[layer], size))}"
            style += self._rule((layer, k), f"{picture}; --large: {large}; --small: {small}")
        return ipywidgets.HTML(f"<style>{style}</style>")

    @torch.no_grad()
    def _maps(self) -> str:
        """What every filter sees; those of the second layer through what is on in the first."""
        layers = self.losses.network.network
        self.another.description = f"Another image than {self.images[0][0]}"
        first = layers[:2](self.images[0][1][None])
        passed = first.clone()
        passed[:, [k for k in range(first.shape[1]) if (0, k) not in self.on]] = 0
        maps = (first[0], layers[2:4](passed)[0])
        bright = [(seen / seen.max().clamp(min=1e-6)).sqrt() for seen in maps]
        return "".join(
            self._rule((i, k), f"--map: {data_url(in_color(bright[i][k], 'magma'))}")
            for i, k in self.cards
        )


def announced(words: str) -> str:
    """HTML that a screen reader reads when it changes, for a widget of the class "announced".

    Of a widget only its outer element stays while the value changes, and a reader listens to an
    element that stays. ipywidgets can't give it a role, so this asks the browser to.
    """
    listen = "this.closest('.announced:not([role])')?.setAttribute('role', 'status')"
    return f'{words}<style onload="{listen}"></style>'


def goal(level: Level) -> str:
    """What to reach, in words."""
    what = (
        f"keep {level.size} of the 24 filters" if level.size else "keep half of the multiply-adds"
    )
    within = f" within {level.clicks} clicks" if level.clicks else ""
    taylor, best = level.rivals.taylor_loss, level.rivals.best_loss
    return f"{what}{within}, and beat Taylor's {taylor:.3f} nats. The best there is has {best:.3f}."


def against(mine: float, theirs: float, who: str) -> str:
    if abs(mine - theirs) <= ROUNDING:
        return f"as good as {who}"
    return f"{abs(mine - theirs):.3f} {'worse' if mine > theirs else 'better'} than {who}"


def personal_best(level: Level) -> str:
    known = PERSONAL_BEST.get((level.name, level.rivals.best_loss))
    if known is None:
        return ""
    loss, clicks = known
    return f" Your best at this level: {loss:.4f} nats, with {clicks} clicks."


def ladder(rivals: Rivals, rank: int) -> str:
    """A bar from the worst of all to the best; from line to line, ten times fewer are better."""
    of = rivals.ranks.of

    def place(rank: float) -> str:
        return f"{100 * (1 - math.log(rank) / math.log(of)):.1f}%"

    tenths = [10**power for power in range(1, math.ceil(math.log10(of)))]
    lines = "".join(f"<i class='game-tenth' style='left: {place(n)}'></i>" for n in tenths)
    theirs = rivals.ranks.rank(rivals.taylor_loss)[0]
    words = f"You are at {place(rank)}, Taylor at {place(theirs)} of the way from worst to best"
    return (
        f"<div class='game-ends'><span>the worst of {of:,}</span>"
        f"<span>line to line: ten times fewer are better</span><span>the best</span></div>"
        f"<div class='game-ladder' role='img' aria-label='{words}'>"
        f"<div class='game-you' style='width: {place(rank)}'></div>{lines}"
        f"<div class='game-theirs' style='left: {place(theirs)}'><span>Taylor</span></div></div>"
    )


def wrapped(widgets: Iterable[ipywidgets.Widget]) -> ipywidgets.Box:
    return ipywidgets.Box([*widgets], layout={"flex_flow": "row wrap", "max_width": "810px"})


def sheet(kernel: Tensor, grid: tuple[int, int]) -> Image.Image:
    """The slices of a ``kernel`` (C, 3, 3) from -1 to 1 in a grid, one weight apart."""
    columns, rows = grid
    pixels = Image.new("RGBA", (4 * columns - 1, 4 * rows - 1))
    for i, part in enumerate(kernel):
        at = (4 * (i % columns), 4 * (i // columns))
        pixels.paste(in_color(0.5 + 0.5 * part, "RdBu_r"), at)
    return pixels


def in_color(values: Tensor, name: str) -> Image.Image:
    """A picture of ``values`` (H, W) from 0 to 1, a pixel each."""
    return Image.fromarray(_shades(name)[(255 * values.clamp(0, 1)).byte().numpy()])


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"url(data:image/png;base64,{base64.b64encode(file.getvalue()).decode()})"


@cache
def _shades(name: str) -> np.ndarray:
    return colormaps[name](np.arange(256), bytes=True)
