"""The figure of notebook 10: accuracy after each stage of a repair."""

from collections.abc import Mapping, Sequence

from cnn_pruning.plots import INK, METHODS, headline, subplots

from matplotlib.figure import Figure
from torch import Tensor


def accuracy_by_stage(
    panels: Mapping[str, tuple[Sequence[str], Mapping[str, Tensor]]],
    whole: float,
    gaps: Mapping[str, tuple[Sequence[str], Sequence[tuple[float, float]]]],
    title: str,
) -> Figure:
    """Test accuracy stage after stage, a thin line a network and a thick one for their mean.

    ``panels`` maps a title to the names of its stages and the accuracies (networks, stages) of each
    method, named as in ``METHODS``; ``whole`` is drawn as a dotted line. The last panel has
    ``gaps``: a label to stages and, for each, (mean, half of an interval), in points.
    """
    widths = [len(stages) for stages, _ in panels.values()]
    figure, (axes,) = subplots(
        1, len(panels) + 1, 12, 3.9, gridspec_kw={"width_ratios": [*widths, max(widths)]}
    )
    for axis, (name, (stages, methods)) in zip(axes, panels.items(), strict=False):
        for method, accuracy in methods.items():
            color, x = METHODS[method], range(len(stages))
            axis.plot(x, 100 * accuracy.T, color=color, lw=0.8, alpha=0.5)
            label = method.replace("taylor", "Taylor")
            axis.plot(x, 100 * accuracy.mean(0), "o-", color=color, lw=3, label=label)
        axis.axhline(100 * whole, color=INK, lw=1, ls=":")
        axis.text(len(stages) - 1, 100 * whole, "the whole network", ha="right", va="bottom")
        axis.set(title=name, ylabel="test accuracy (%)", xlim=(-0.2, len(stages) - 0.8))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.04 * (high - low))
        axis.set_xticks(range(len(stages)), stages)
    axes[0].legend(loc="lower right")
    last = axes[-1]
    for i, (label, (stages, values)) in enumerate(gaps.items()):
        mean, half = zip(*values, strict=True)
        x = [at + 0.16 * (i - (len(gaps) - 1) / 2) for at in range(len(stages))]
        look = {"fmt": "os^v"[i], "color": METHODS["taylor"], "mfc": ("none", None)[i % 2]}
        last.errorbar(x, mean, half, capsize=3, label=label, **look)
    last.axhline(0, color=INK, lw=1, ls=":")
    longest = max((stages for stages, _ in gaps.values()), key=len)
    last.set_xticks(range(len(longest)), longest)
    last.set(title="Taylor minus random", ylabel="difference (points)")
    last.legend()
    headline(figure, title)
    return figure
