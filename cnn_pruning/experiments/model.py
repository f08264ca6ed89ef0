"""The network that the tutorial prunes."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cnn_pruning.network.checks import integer, shown


class CNN(nn.Module):
    """Convolutions of 3x3 with ReLU, then one linear layer, all in ``self.network``.

    ``channels`` are the numbers of filters, one convolution each (stride 1, padding 1).
    ``CNN((8, 16))`` has 126,698 parameters.

    Takes images (N, 1, 28, 28) and returns logits (N, 10), both in the dtype of its parameters.

    Raises ``ValueError`` if ``channels`` isn't a sequence of positive integers.
    """

    IMAGE_SHAPE = (1, 28, 28)
    __jit_unused_properties__ = ("channels",)  # so that torch.jit.script takes the network

    def __init__(self, channels: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        if not isinstance(channels, Sequence) or isinstance(channels, str) or not channels:
            raise ValueError(
                f"channels must be one or more positive integers, but it is {shown(channels)}."
            )
        channels = tuple(integer("channels", width, 1) for width in channels)
        layers = []
        for before, after in pairwise((1, *channels)):
            layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU()]
        self.network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 28 * 28, 10))

    @property
    def channels(self) -> tuple[int, ...]:
        """The number of filters of each convolution, as it is now."""
        return tuple(m.out_channels for m in self.network if isinstance(m, nn.Conv2d))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)
