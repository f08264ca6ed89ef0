"""The networks of notebook 9, written as people write their own, and what goes wrong then."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Three convolutions with batch norm and pooling, for images (1, 28, 28) of ten classes."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.linear = nn.Linear(third * 3 * 3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        return self.linear(torch.flatten(x, 1))


class Block(nn.Module):
    """Two convolutions, whose result is added to what came in."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network, for images (1, 28, 28) of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32, stride=2), Block(32, 32))
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mistaken(nn.Module):
    """Two convolutions, and a ``tail`` that does what it shouldn't."""

    def __init__(self, tail: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.linear, self.tail = nn.Linear(4 * 28 * 28, 10), tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.conv1(x))


MISTAKES = {
    "fixed width": lambda net, x: net.linear(net.conv2(x).view(-1, 3136)),
    "detached": lambda net, x: net.linear(net.conv2(x.detach()).flatten(1)),
    "softmax over channels": lambda net, x: net.linear(net.conv2(x.softmax(1)).flatten(1)),
    "an if": lambda net, x: net.linear(net.conv2(x if x.mean() > 0 else -x).flatten(1)),
    "softmax at the end": lambda net, x: net.linear(net.conv2(x).flatten(1)).softmax(1),
}
