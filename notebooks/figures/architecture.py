"""The drawing of notebook 2: the network, each layer as large as its parameters are many."""

from cnn_pruning import CNN
from cnn_pruning.plots import INK, LAYERS, STAYS, bare_image, headline, subplots

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

SIDE = 3.0  # of the largest layer, in inches


def to_scale(model: CNN, image: Tensor) -> Figure:
    """The layers of a conv-conv-linear chain as squares whose areas are their parameters.

    ``image`` (H, W) stands at the left. Dashes split the linear layer into the blocks that read one
    map each.
    """
    layers = [m for m in model.network if isinstance(m, nn.Conv2d | nn.Linear)]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    sides = [SIDE * (size / max(sizes)) ** 0.5 for size in sizes]
    figure, ((axis,),) = subplots(1, 1, 7.4, 4.2)
    axis.axis("off")
    bare_image(axis, image, cmap="gray", extent=(0, 0.7, -0.35, 0.35))
    axis.set(xlim=(-0.1, 7.3), ylim=(-2.2, 2.0), aspect="equal")
    names = ("first layer,\na convolution", "second layer,\na convolution", "linear layer")
    colors, middles = (LAYERS[0], LAYERS[1], STAYS), (1.35, 2.75, 5.4)
    for name, color, size, side, x in zip(names, colors, sizes, sides, middles, strict=True):
        axis.add_patch(Rectangle((x - side / 2, -side / 2), side, side, color=color, lw=0))
        words = f"{name}\n{size:,}"
        axis.text(x, -max(side / 2, 0.35) - 0.12, words, ha="center", va="top", linespacing=1.4)
    _arrow(axis, 0.75, middles[0] - 0.12)
    for i, (start, end) in enumerate(((1.45, 2.55), (2.95, middles[2] - sides[2] / 2 - 0.05))):
        _arrow(axis, start, end)
        words = f"{layers[i].out_channels} maps"
        axis.text((start + end) / 2, 0.1, words, ha="center", va="bottom", size=9)
    _arrow(axis, middles[2] + sides[2] / 2, 7.2)
    left, blocks = middles[2] - sides[2] / 2, layers[1].out_channels
    for k in range(1, blocks):
        x = left + sides[2] * k / blocks
        axis.plot((x, x), (-sides[2] / 2, sides[2] / 2), color=INK, lw=0.6, ls="--")
    each = layers[2].weight.numel() // blocks
    words = f"a strip: the {each:,} weights that read\none map of the second layer"
    axis.text(middles[2], sides[2] / 2 + 0.08, words, ha="center", va="bottom", size=9)
    share = sizes[2] / sum(sizes)
    headline(figure, f"Area is parameters: {share:.0%} of them are in the linear layer")
    return figure


def _arrow(axis: Axes, start: float, end: float) -> None:
    look = {"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (end, 0), (start, 0), arrowprops=look)
