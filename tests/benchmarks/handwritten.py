"""Networks as people write them by hand, one of each kind, small. ``HANDWRITTEN`` names them all.

A network takes images of the shape beside its name, without the batch; a list of shapes is several
inputs.
"""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

CLASSES = 10


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def head(inputs: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def plain() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32), head(32))


class MNISTExample(nn.Module):
    """The network of pytorch/examples, mnist."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = torch.flatten(self.dropout1(x), 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class CIFARTutorial(nn.Module):
    """The network of PyTorch's tutorial "Training a Classifier"."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = torch.flatten(self.pool(F.relu(self.conv2(x))), 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class FunctionalView(nn.Module):
    """A chain of functions, flattened by ``view(-1, 32 * 8 * 8)``, as many tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 8 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.1), 2)
        return self.fc(x.view(-1, 32 * 8 * 8))


class FunctionalSize(FunctionalView):
    """The same, flattened by ``view(x.size(0), -1)``."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.leaky_relu(self.conv2(x), 0.1), 2)
        return self.fc(x.view(x.size(0), -1))


class Block(nn.Module):
    """A residual block, with an ``attention`` of its channels or without."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, attention: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, stride=stride)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.attention = attention or nn.Identity()
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            layer = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(layer, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(self.bn2(self.conv2(self.conv1(x))))
        out += self.shortcut(x)
        return F.relu(out)


def residual() -> nn.Module:
    return nn.Sequential(conv(3, 16), Block(16, 16), Block(16, 32, 2), Block(32, 32), head(32))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 8), nn.Linear(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.size()
        y = F.adaptive_avg_pool2d(x, 1).view(n, c)
        y = torch.sigmoid(self.excite(F.relu(self.squeeze(y)))).view(n, c, 1, 1)
        return x * y.expand_as(x)


def squeeze_excitation() -> nn.Module:
    first, second = Block(16, 16, 1, SqueezeExcite(16)), Block(16, 32, 2, SqueezeExcite(32))
    return nn.Sequential(conv(3, 16), first, second, head(32))


class ECA(nn.Module):
    """Efficient channel attention: a convolution over neighboring channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean((2, 3)).unsqueeze(1)
        return x * torch.sigmoid(self.conv(y)).squeeze(1)[:, :, None, None]


def eca() -> nn.Module:
    first, second = Block(16, 16, 1, ECA()), Block(16, 32, 2)
    return nn.Sequential(conv(3, 16), first, second, head(32))


class UNet(nn.Module):
    """Concatenation, and upsampling by interpolation or transposed convolutions."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv(3, 8), conv(8, 16), conv(16, 32)
        up = nn.ConvTranspose2d if transposed else None
        self.lift2 = up(32, 16, 2, 2) if up else nn.Sequential(nn.Upsample(None, 2), conv(32, 16))
        self.lift1 = up(16, 8, 2, 2) if up else nn.Sequential(nn.Upsample(None, 2), conv(16, 8))
        self.up2, self.up1 = conv(32, 16), conv(16, 8)
        self.last = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.lift2(self.middle(F.max_pool2d(two, 2)))
        x = self.up2(torch.cat([two, x], dim=1))
        x = self.up1(torch.cat([one, self.lift1(x)], dim=1))
        return self.last(x)


def unet() -> nn.Module:
    return UNet(False)


def unet_transposed() -> nn.Module:
    return UNet(True)


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.layers = nn.Sequential(
            conv(inputs, wide, 1),
            conv(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.add = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.add else self.layers(x)


def depthwise() -> nn.Module:
    blocks = [Inverted(8, 16, 2), Inverted(16, 16, 1), Inverted(16, 24, 2)]
    return nn.Sequential(conv(3, 8), *blocks, conv(24, 48, 1), head(48))


class Dense(nn.Module):
    """Each layer takes the maps of all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        widths = range(16, 16 + 4 * 8, 8)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1) for width in widths)
        self.head = head(48)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            maps.append(layer(F.relu(norm(torch.cat(maps, 1)))))
        return self.head(torch.cat(maps, 1))


def keywords() -> nn.Module:
    """M5, of PyTorch's tutorial on keyword spotting, as a Sequential."""

    def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv1d(inputs, outputs, size, stride)
        return [conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]

    layers = [*layer(1, 16, 80, 16), *layer(16, 16, 3), *layer(16, 32, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))


class ECG(nn.Module):
    """A residual network of 12 leads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(12, 16, 15, padding=7)
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv1d(16, 16, 9, padding=4) for _ in range(4))
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for i in (0, 2):
            y = self.convs[i](F.relu(self.norms[i](x)))
            y = self.convs[i + 1](F.dropout(F.relu(self.norms[i + 1](y)), 0.2, self.training))
            x = F.max_pool1d(x + y, 2)
        return self.last(x.mean(-1))


class Volumes(nn.Module):
    """A 3-D network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.conv2, self.bn2 = nn.Conv3d(8, 16, 3, padding=1), nn.BatchNorm3d(16)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        return self.last(F.adaptive_avg_pool3d(x, 1).flatten(1))


class SuperResolution(nn.Module):
    """ESPCN with a global residual: the image, enlarged, is added."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = factor
        self.conv1 = nn.Conv2d(3, 24, 5, padding=2)
        self.conv2 = nn.Conv2d(24, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 8 * factor**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(factor)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        y = self.last(F.relu(self.shuffle(self.conv3(y))))
        return y + F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=False)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * 7 * 7, 32)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(32, 8 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (8, 7, 7))),
            *(nn.ConvTranspose2d(8, 16, 2, 2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 2, 2)),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class TiedAutoencoder(nn.Module):
    """The decoder takes the encoder's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = F.relu(F.conv_transpose2d(x, self.conv2.weight, padding=1))
        return F.conv_transpose2d(x, self.conv1.weight, padding=1)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16), conv(16, 32, stride=2))
        self.kind, self.box = nn.Linear(32, CLASSES), nn.Linear(32, 4)
        self.map = nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        row = x.mean((2, 3))
        return {"kind": self.kind(row), "box": self.box(row), "map": self.map(x)}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 16), conv(16, 32, stride=2), nn.AdaptiveAvgPool2d(1))
        self.vector = nn.Linear(5, 8)
        self.last = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        both = [self.trunk(image).flatten(1), F.relu(self.vector(vector))]
        return self.last(torch.cat(both, dim=1))


class CRNN(nn.Module):
    """Columns of the last map, read by a recurrent layer, as for lines of text."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(1, 8), nn.MaxPool2d(2), conv(8, 16), nn.MaxPool2d(2), conv(16, 16))
        )
        self.recurrent = kind(16 * 4, 12, batch_first=True, bidirectional=True)
        self.last = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).permute(0, 3, 1, 2).flatten(2)  # N, W, C * H
        x, _ = self.recurrent(x)
        return self.last(x[:, -1])


def crnn_gru() -> nn.Module:
    return CRNN(nn.GRU)


def crnn_lstm() -> nn.Module:
    return CRNN(nn.LSTM)


def with_norm(norm: nn.Module, other: nn.Module) -> nn.Module:
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, 1)
    both = [first, norm, nn.ReLU(), second, other, nn.ReLU()]
    return nn.Sequential(*both, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), head(32))


def group_norm() -> nn.Module:
    return with_norm(nn.GroupNorm(4, 16), nn.GroupNorm(8, 32))


def instance_norm() -> nn.Module:
    return with_norm(nn.InstanceNorm2d(16, affine=True), nn.InstanceNorm2d(32))


def frozen_batch_norm() -> nn.Module:
    norm = torchvision.ops.FrozenBatchNorm2d
    return with_norm(norm(16), norm(32))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NeXtBlock(nn.Module):
    """ConvNeXt's block: layer norm, linear layers over channels, a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


def layer_norm() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16))
    down = nn.Sequential(LayerNorm2d(16), nn.Conv2d(16, 32, 2, 2))
    return nn.Sequential(stem, NeXtBlock(16), down, NeXtBlock(32), head(32))


class MaxFeatureMap(nn.Module):
    """LightCNN's activation: the larger of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(*torch.split(x, x.shape[1] // 2, 1))


class FixedMaxFeatureMap(nn.Module):
    """The same, with the width in numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(*torch.split(x, self.width, 1))


def max_feature_map() -> nn.Module:
    one, two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1)
    return nn.Sequential(one, MaxFeatureMap(), two, MaxFeatureMap(), conv(32, 16), head(16))


def max_feature_map_fixed() -> nn.Module:
    one, two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1)
    layers = one, FixedMaxFeatureMap(16), two, FixedMaxFeatureMap(32)
    return nn.Sequential(*layers, conv(32, 16), head(16))


class Halves(nn.Module):
    """YOLOv8's C2f: halves, one of which goes on, and all of them side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = conv(inputs, outputs, 1), conv(3 * outputs // 2, outputs, 1)
        self.inner = nn.Sequential(conv(outputs // 2, 8), conv(8, outputs // 2))

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.first(x).chunk(2, 1))
        maps.append(maps[-1] + self.inner(maps[-1]))
        return self.last(torch.cat(maps, 1))


def halves() -> nn.Module:
    return nn.Sequential(conv(3, 16), Halves(16, 24), nn.MaxPool2d(2), Halves(24, 32), head(32))


class Ghost(nn.Module):
    """Half of the maps are made of the others by a depthwise convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.primary = conv(inputs, outputs // 2, 1)
        self.cheap = conv(outputs // 2, outputs // 2, groups=outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], dim=1)


def ghost() -> nn.Module:
    return nn.Sequential(conv(3, 16), Ghost(16, 32), nn.MaxPool2d(2), Ghost(32, 64), head(64))


class OwnParameters(nn.Module):
    """A scale for each channel (1, C, 1, 1), and a parameter for each position (1, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.position = nn.Parameter(torch.zeros(1, 32, 32, 32))
        self.head = head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x) * self.scale)
        return self.head(F.relu(self.second(x) + self.position))


class Shuffle(nn.Module):
    """ShuffleNet: grouped convolutions, whose channels are mixed by a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 16), conv(16, 32, groups=4), conv(32, 32)
        self.head = head(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        n, c, h, w = x.size()
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(self.third(x))


def weight_normed() -> nn.Module:
    def layer(inputs: int, outputs: int) -> nn.Module:
        return weight_norm(nn.Conv2d(inputs, outputs, 3, padding=1))

    return nn.Sequential(layer(3, 16), nn.ReLU(), layer(16, 32), nn.ReLU(), conv(32, 32), head(32))


class Pyramid(nn.Module):
    """Spatial pyramid pooling: rows of several grids, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 16))
        self.last = nn.Linear(16 * (1 + 4 + 16), CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        rows = [F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2, 4)]
        return self.last(torch.cat(rows, 1))


class Anchors(nn.Module):
    """A detector: from two maps, rows of (anchor, box and classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 16, stride=2), conv(16, 32, stride=2)
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * (4 + CLASSES), 1) for width in (16, 32))

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        rows = []
        for layer, maps in zip(self.heads, (one, self.two(one)), strict=True):
            y = layer(maps)
            n, _, h, w = y.shape
            y = y.view(n, 3, 4 + CLASSES, h, w).permute(0, 1, 3, 4, 2)
            rows.append(y.reshape(n, -1, 4 + CLASSES))
        return torch.cat(rows, 1)


class Auxiliary(nn.Module):
    """A second head that is used in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(3, 16), conv(16, 32, stride=2)
        self.head, self.auxiliary = head(32), nn.Sequential(conv(16, 8), head(8))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.one(x)
        y = self.head(self.two(x))
        return (y, self.auxiliary(x)) if self.training else y


class Bilinear(nn.Module):
    """Bilinear pooling: the products of all pairs of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv(3, 16), nn.MaxPool2d(2), conv(16, 12))
        self.last = nn.Linear(12 * 12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(2)
        x = (x @ x.transpose(1, 2) / x.shape[-1]).flatten(1)
        return self.last(F.normalize(x.sign() * (x.abs() + 1e-6).sqrt()))


class SmallViT(nn.Module):
    """Patches by a convolution stem, a class token, positions, and PyTorch's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 12, stride=2), conv(12, 24, stride=2))
        self.patches = nn.Conv2d(24, 32, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32) / 10)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.stem(x)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.last(self.encoder(x)[:, 0])


IMAGE = (3, 32, 32)
HANDWRITTEN = {
    "plain Sequential": (plain, IMAGE),
    "MNIST example": (MNISTExample, (1, 28, 28)),
    "CIFAR-10 tutorial": (CIFARTutorial, IMAGE),
    "functions, view(-1, 2048)": (FunctionalView, IMAGE),
    "functions, view(n, -1)": (FunctionalSize, IMAGE),
    "residual": (residual, IMAGE),
    "U-Net": (unet, IMAGE),
    "U-Net, transposed": (unet_transposed, IMAGE),
    "depthwise separable": (depthwise, IMAGE),
    "squeeze and excitation": (squeeze_excitation, IMAGE),
    "ECA": (eca, IMAGE),
    "dense": (Dense, IMAGE),
    "keywords, 1-D": (keywords, (1, 4000)),
    "ECG, 1-D": (ECG, (12, 200)),
    "volumes, 3-D": (Volumes, (1, 8, 16, 16)),
    "super-resolution": (SuperResolution, (3, 24, 24)),
    "autoencoder": (Autoencoder, (1, 28, 28)),
    "tied autoencoder": (TiedAutoencoder, (1, 28, 28)),
    "two heads": (TwoHeads, IMAGE),
    "two inputs": (TwoInputs, [IMAGE, (5,)]),
    "CRNN, GRU": (crnn_gru, (1, 16, 64)),
    "CRNN, LSTM": (crnn_lstm, (1, 16, 64)),
    "group norm": (group_norm, IMAGE),
    "layer norm": (layer_norm, IMAGE),
    "instance norm": (instance_norm, IMAGE),
    "frozen batch norm": (frozen_batch_norm, IMAGE),
    "max feature map": (max_feature_map, IMAGE),
    "max feature map, fixed": (max_feature_map_fixed, IMAGE),
    "halves, YOLO": (halves, IMAGE),
    "ghost": (ghost, IMAGE),
    "own parameters": (OwnParameters, IMAGE),
    "channel shuffle": (Shuffle, IMAGE),
    "weight norm": (weight_normed, IMAGE),
    "pyramid pooling": (Pyramid, IMAGE),
    "anchors": (Anchors, IMAGE),
    "auxiliary head": (Auxiliary, IMAGE),
    "bilinear pooling": (Bilinear, IMAGE),
    "small ViT": (SmallViT, IMAGE),
}
