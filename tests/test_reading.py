"""How a network is read depends on what it computes, not on how it is written."""

import copy
import math
import random
import re
import threading
import warnings
from itertools import pairwise

import pytest
import torch
import torchvision
from networks import Written, assert_same, asserting, state_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cnn_pruning import (
    TaylorPruner,
    evaluate,
    filter_scores,
    fit,
    mask_filters,
    remove_filters,
)
from cnn_pruning.criteria import CRITERIA
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.network import reading
from cnn_pruning.network.sequential import ACTIVATIONS, POOLING
from cnn_pruning.oracle import oracle


def data(size=4, shape=(1, 8, 8), classes=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, *shape, generator=generator)
    return TensorDataset(images, torch.arange(size) % classes)


class Net(nn.Module):
    """Two convolutions and a linear layer; ``how`` is what happens in between."""

    def __init__(self, how, size=4 * 8 * 8):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 3, padding=1)
        self.head = nn.Linear(size, 3)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def check_exact(model, images):
    """Each layer's first filter scored, masked and removed; masked = removed; trained again."""
    labels = torch.arange(len(images)) % 3
    some = TensorDataset(images, labels)
    scores = filter_scores(model, some)
    base, _ = evaluate(model, some)
    for layer, changes in oracle(model, some).items():
        with mask_filters(model, {layer: [0]}, some):  # float32, and other sums
            assert changes[0] == pytest.approx(evaluate(model, some)[0] - base, abs=1e-5)
    gone = {layer: [0] for layer in scores}
    model.eval()
    with torch.no_grad(), mask_filters(model, gone, images):
        masked = model(images)
    small = remove_filters(model, gone, some)
    torch.testing.assert_close(small(images), masked)
    F.cross_entropy(small.train()(images), labels).backward()
    return list(scores)


def flatten(x):
    return torch.flatten(x, 1)


def maps(m, x):
    return m.second(F.relu(m.first(x)))


def points(m, x):
    return F.adaptive_avg_pool2d(maps(m, x), 1)


WAYS = {
    "functions": (lambda m, x: m.head(flatten(F.relu(m.second(F.relu(m.first(x)))))), 256),
    "view": (lambda m, x: m.head((z := m.second(m.first(x).relu())).view(z.size(0), -1)), 256),
    "view of the input's size": (
        lambda m, x: m.head(m.second(m.first(x).relu()).view(x.size(0), -1)),
        256,
    ),
    "view of what unpacking gave": (
        lambda m, x: (lambda z, n, c, h, w: m.head(z.view(n, c * h * w)))(
            *(lambda z: (z, *unpack(z)))(m.second(m.first(x)))
        ),
        256,
    ),
    "reshape": (lambda m, x: m.head((z := m.second(m.first(x))).reshape((z.shape[0], -1))), 256),
    "pooling by functions": (
        lambda m, x: m.head(
            flatten(F.adaptive_avg_pool2d(F.relu(m.second(F.max_pool2d(F.relu(m.first(x)), 2))), 1))
        ),
        4,
    ),
    "pooling over the whole map": (
        lambda m, x: m.head(flatten(F.avg_pool2d(z := m.second(m.first(x)), z.size()[2:]))),
        4,
    ),
    "mean over both axes": (lambda m, x: m.head(F.silu(m.second(m.first(x))).mean((2, 3))), 4),
    "mean that keeps the axes": (
        lambda m, x: m.head(flatten(torch.mean(m.second(m.first(x)), (-2, -1), keepdim=True))),
        4,
    ),
    "operators": (lambda m, x: m.head(flatten(m.second(0.5 * m.first(x) ** 2 + 1) / 2)), 256),
    "log softmax": (lambda m, x: F.log_softmax(m.head(flatten(m.second(m.first(x)))), dim=1), 256),
    "dropout": (
        lambda m, x: m.head(
            flatten(
                F.dropout(F.relu(m.second(F.dropout2d(m.first(x), 0.5, m.training))), 0.5, False)
            )
        ),
        256,
    ),
    "normalized input": (lambda m, x: m.head(flatten(m.second(m.first((x - 0.3) / 0.4)))), 256),
    "moved input": (
        lambda m, x: m.head((z := m.second(m.first(x.view(-1, 1, 8, 8)))).view(z.size(0), -1)),
        256,
    ),
    "padding": (lambda m, x: m.head(flatten(m.second(F.pad(m.first(x), (1, 1, 1, 1))))), 400),
    "view of len": (lambda m, x: m.head((z := maps(m, x)).view(len(z), -1)), 256),
    "squeezed": (lambda m, x: m.head(points(m, x).squeeze(-1).squeeze(-1)), 4),
    "squeezed by a function": (
        lambda m, x: m.head(torch.squeeze(maps(m, x).mean((2, 3), True).relu(), dim=(2, 3))),
        4,
    ),
    "the one position": (lambda m, x: m.head(points(m, x)[:, :, 0, 0]), 4),
    "one position of many": (lambda m, x: m.head(maps(m, x)[..., 2, -1].sigmoid()), 4),
    "mean over one axis after the other": (lambda m, x: m.head(maps(m, x).mean(3).mean(2)), 4),
    "mean of a row": (lambda m, x: m.head(maps(m, x).flatten(2).tanh().mean(-1)), 4),
    "rows of means": (lambda m, x: m.head(maps(m, x).mean(dim=2).flatten(1)), 32),
    "flattened from behind": (lambda m, x: m.head(maps(m, x).flatten(-3)), 256),
    "numbers as tensors": (
        lambda m, x: m.head(flatten(maps(m, x - torch.tensor(0.5)))) * torch.tensor(2.0),
        256,
    ),
    "dropout in training only": (
        lambda m, x: (lambda z: m.head(flatten(F.dropout(z) if m.training else z)))(maps(m, x)),
        256,
    ),
    "dropout in training only, by keyword": (
        lambda m, x: m.head(flatten(F.dropout(input=maps(m, x), p=0.5, training=m.training))),
        256,
    ),
    "in place after pooling": (
        lambda m, x: m.head(flatten(F.avg_pool2d(m.second(F.relu(m.first(x))), 2).mul_(2).tanh_())),
        64,
    ),
    "in place before and after pooling": (
        lambda m, x: m.head(flatten(F.max_pool2d(maps(m, x).relu_(), 2).add_(1))),
        64,
    ),
    "a tail that is no chain": (
        lambda m, x: (y := m.head(flatten(m.second(m.first(x))))) + y.tanh(),
        256,
    ),
}


def unpack(z):
    n, c, h, w = z.shape
    return n, c, h, w


@pytest.mark.parametrize("way", WAYS)
def test_what_a_network_computes_is_read_however_it_is_written(way):
    how, size = WAYS[way]
    assert check_exact(Net(how, size), data().tensors[0]) == ["first", "second"]


class ReadsTwoArguments(Net):
    def forward(self, x, features=False, *, labels=None):
        z = self.second(self.first(x))
        if features:
            return z
        y = self.head(flatten(z))
        return y if labels is None else F.cross_entropy(y, labels)


def test_optional_arguments_take_their_defaults():
    assert check_exact(ReadsTwoArguments(None), data().tensors[0]) == ["first", "second"]


class ReadsAnything(Net):
    def forward(self, x, *more, scale=1.0, **options):
        if more or options.get("features"):
            raise ValueError("only images")
        return self.head(flatten(self.second(self.first(scale * x, **options))))


def test_nothing_is_given_by_star_arguments():
    assert check_exact(ReadsAnything(None), data().tensors[0]) == ["first", "second"]


def test_an_assert_is_not_in_the_way():
    assert check_exact(Net(asserting), data().tensors[0]) == ["first", "second"]


def narrow(name):
    """A network of torchvision with an eighth of its filters and few hidden units, because the
    reading takes widths as they come."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=3)
    for i, layer in enumerate(model.features):
        if isinstance(layer, nn.Conv2d):
            inputs, outputs = max(3, layer.in_channels // 8), layer.out_channels // 8
            how = layer.kernel_size, layer.stride, layer.padding
            model.features[i] = nn.Conv2d(inputs, outputs, *how)
        elif isinstance(layer, nn.BatchNorm2d):
            model.features[i] = nn.BatchNorm2d(layer.num_features // 8)
    sizes = [outputs * math.prod(model.avgpool.output_size), 8, 8, 3]
    linear = [i for i, layer in enumerate(model.classifier) if isinstance(layer, nn.Linear)]
    for i, (before, after) in zip(linear, pairwise(sizes), strict=True):
        model.classifier[i] = nn.Linear(before, after)
    return model


@pytest.mark.parametrize(("name", "size"), [("alexnet", 64), ("vgg11", 32), ("vgg11_bn", 32)])
def test_every_convolution_of_the_papers_networks_is_a_group(name, size):
    torch.manual_seed(0)
    model = narrow(name).eval()
    images = torch.rand(2, 3, size, size)
    groups = reading.read(model, images).groups
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [n for n in groups if n in convolutions] == convolutions
    gone = {layer: [0, 3] for layer in convolutions}
    with torch.no_grad(), mask_filters(model, gone, images):
        masked = model(images)
    with torch.no_grad():
        torch.testing.assert_close(remove_filters(model, gone, images)(images), masked)


def probe(kind):
    special = {
        nn.AdaptiveAvgPool2d: (2,),
        nn.AdaptiveMaxPool2d: (2,),
        nn.AvgPool2d: (2,),
        nn.MaxPool2d: (2,),
        nn.Threshold: (0.1, 0.0),
        nn.ZeroPad2d: (1,),
        nn.BatchNorm2d: (4,),
        nn.Upsample: (None, 2),
        nn.UpsamplingBilinear2d: (None, 2),
        nn.UpsamplingNearest2d: (None, 2),
        nn.CircularPad2d: (1,),
        nn.ReflectionPad2d: (1,),
        nn.ReplicationPad2d: (1,),
    }
    return kind(*special.get(kind, ()))


@pytest.mark.parametrize(
    "kind",
    [k for k in (*ACTIVATIONS, *POOLING, nn.BatchNorm2d) if k.__name__[-2:] not in ("1d", "3d")],
    ids=lambda kind: kind.__name__,
)
def test_every_layer_that_is_known_can_stand_between_convolution_and_consumer(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), probe(kind), nn.Conv2d(4, 3, 1), nn.Tanh(), nn.Flatten()
    )
    with torch.no_grad():
        size = model(torch.rand(1, 1, 8, 8)).shape[1]
    check_exact(model.append(nn.Linear(size, 3)), data().tensors[0])
    reading.read_sequential(model)  # without an image
    if kind in POOLING:
        assert not probe(kind).eval()(torch.zeros(1, 4, 6, 6)).any()


def test_batch_norm_behind_a_flatten_loses_the_block_of_each_filter():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4 * 36)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), norm, nn.ReLU()), nn.Linear(144, 3)
    )
    check_exact(model, data().tensors[0])
    assert remove_filters(model, {"0": [1]})[3].num_features == 3 * 36


def test_a_convolution_behind_a_linear_layer_starts_anew():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 50), nn.ReLU()),
        *(nn.Unflatten(1, (2, 5, 5)), nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(12, 3)),
    )
    assert check_exact(model, data().tensors[0]) == ["0", "6"]


def test_a_copy_keeps_the_layout_of_its_weights():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3)
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        small = remove_filters(model.to(memory_format=layout), {"0": [1], "2": [0]})
        assert all(small[i].weight.is_contiguous(memory_format=layout) for i in (0, 2))


# What can't be read is refused, by the sentence that says what to write instead


class Auxiliary(Net):
    def forward(self, x):
        z = self.second(self.first(x))
        y = self.head(flatten(z))
        return y + z.mean() if self.training else y


class DropsBeforeAnActivation(Net):
    """In training, the feature map is one operation further on."""

    def forward(self, x):
        z = self.second(F.relu(self.first(x)))
        if self.training:
            z = F.dropout(z)
        return self.head(flatten(F.relu(z)))


# What happens to the filters of "first" and "second": which of them are scored, and what is said.
HALF = {
    "a constant": (
        lambda m, x: m.head(m.second(m.first(x)).view(-1, 256)),
        *(256, ["first"], r"second \(view .* \(write torch\.flatten\(x, 1\)"),
    ),
    "columns of the input": (
        lambda m, x: m.head(m.second(m.first(x)).view(x.size(0), 4 * x.size(2) * x.size(3))),
        *(256, ["first"], r"second \(view .* counts on their number"),
    ),
    "channels last": (
        lambda m, x: m.head(maps(m, x).permute(0, 2, 3, 1).flatten(1)),
        *(256, ["first"], r"second \(permute behind them"),
    ),
    "a detach": (
        lambda m, x: m.head(flatten(m.second(m.first(x).detach()))),
        *(256, ["second"], r"first \(no gradient comes back .* detach\(\)"),
    ),
    "data": (
        lambda m, x: m.head(flatten(m.second(m.first(x).data))),
        *(256, ["second"], r"first \(no gradient"),
    ),
    "divided by the channels": (
        lambda m, x: m.head(flatten(m.second((z := m.first(x)) / z.size(1)))),
        *(256, ["second"], r"first \(something behind them .* or their number"),
    ),
    "the number of filters": (
        lambda m, x: m.head(flatten(z := m.second(m.first(x)))) / z.size(1) ** 0.5,
        *(256, ["first"], r"second \(something .* or their number"),
    ),
    "softmax inside": (
        lambda m, x: m.head(flatten(m.second(m.first(x).softmax(1)))),
        *(256, ["second"], r"first \(softmax behind them uses several of them"),
    ),
    "channels in another order": (
        lambda m, x: m.head(flatten(m.second(m.first(x).flip(1)))),
        *(256, ["second"], r"first \(flip"),
    ),
    "a weight": (
        lambda m, x: m.head(flatten(m.second(m.first(x)))) * m.first.weight.norm(),
        *(256, ["second"], r"first \("),
    ),
    "a layer again": (
        lambda m, x: m.head(flatten(m.second(m.first(x)))) + m.head(x.new_ones(1, 256)),
        *(256, ["first"], r"second \("),
    ),
    "features as well": (
        lambda m, x: (lambda z: m.head(flatten(z)) + z.mean((1, 2, 3))[:, None])(maps(m, x)),
        *(256, ["first"], r"second \(their maps are in the network's outputs, too"),
    ),
    "in training only": (
        lambda m, x: (lambda z: m.head(flatten(z)) + (z.mean() if m.training else 0))(maps(m, x)),
        *(256, ["first"], r"second \(in training, something"),
    ),
    "frames": (
        lambda m, x: m.head(m.second(m.first(x.view(-1, 1, 8, 8))).view(x.size(0), -1)),
        *(256, ["first", "second"], ""),
    ),
    "computed shapes": (
        lambda m, x: m.head(maps(m, x).view(int(x.size(0)), -1)),
        *(256, ["first", "second"], ""),
    ),
    "a skip": (
        lambda m, x: m.head(flatten(m.second((z := m.first(x)) + z.relu()))),
        *(256, ["first", "second"], ""),
    ),
    "padding with ones": (
        lambda m, x: m.head(flatten(m.second(F.pad(m.first(x), (1, 1), value=1.0)))),
        *(320, ["first", "second"], ""),
    ),
    "a padded row": (
        lambda m, x: m.head(F.pad(flatten(m.second(m.first(x))), (0, 0))),
        *(256, ["first", "second"], ""),
    ),
    "padding of the channels": (
        lambda m, x: m.head(flatten(m.second(F.pad(m.first(x), (0, 0, 0, 0, -1, 1))))),
        *(256, ["second"], r"first \(something behind them"),
    ),
    "padding of the last channels": (
        lambda m, x: m.head(flatten(F.pad(maps(m, x), (0, 0, 0, 0, 0, 4)))),
        *(512, ["first"], r"second \(view behind them"),
    ),
    "one forbidden use among allowed ones": (
        lambda m, x: m.head(flatten(m.second(z := m.first(x)) + m.second(z.relu() - z.flip(1)))),
        *(256, ["second"], r"first \(flip"),
    ),
    "mean over one axis": (
        lambda m, x: m.head(maps(m, x).mean(3).flatten(1)),
        *(32, ["first", "second"], ""),
    ),
}


@pytest.mark.parametrize("way", HALF)
def test_filters_go_exactly_or_are_left_out_with_what_stands_in_the_way(way):
    how, size, expected, said = HALF[way]
    model, some = Net(how, size), data()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert check_exact(model, some.tensors[0]) == expected
    assert bool(found) == bool(said) and all(re.search(said, str(w.message)) for w in found)
    for name in {"first", "second"} - {*expected}:
        with pytest.raises(TypeError, match=f"^{name} can't lose "):
            remove_filters(model, {name: [0]}, some)


def everything(model, some):
    return (
        lambda: filter_scores(model, some),
        lambda: remove_filters(model, {"first": [0]}, some),
        lambda: mask_filters(model, {"first": [0]}, some).__enter__(),
    )


REFUSED = {
    "an if": (
        lambda m, x: m.head(flatten(m.second(m.first(x) if x.sum() > 0 else m.first(-x)))),
        "depends on values that it computes",
    ),
    "an item": (
        lambda m, x: m.head(flatten(m.second(m.first(x)))) * x.mean().item(),
        "depends on values that it computes",
    ),
    "dropout in evaluation": (
        lambda m, x: m.head(flatten(F.dropout(m.second(m.first(x)), 0.5))),
        r"training=self\.training",
    ),
    "dropout in evaluation, in the tail": (
        lambda m, x: F.dropout(m.head(flatten(m.second(m.first(x)))), 0.5),
        r"training=self\.training",
    ),
    "dropout by keyword": (
        lambda m, x: m.head(flatten(F.dropout(input=m.second(m.first(x)), p=0.5, training=True))),
        r"training=self\.training",
    ),
    "another kind of dropout": (
        lambda m, x: m.head(flatten(F.feature_alpha_dropout(m.second(m.first(x)), 0.5, True))),
        r"training=self\.training",
    ),
    "dropout by PyTorch's own function": (
        lambda m, x: m.head(flatten(torch.dropout(m.second(m.first(x)), 0.5, True))),
        r"training=self\.training",
    ),
    "dropout by PyTorch's own function, by keyword": (
        lambda m, x: m.head(flatten(torch.feature_dropout(maps(m, x), p=0.5, train=True))),
        r"training=self\.training",
    ),
    "random numbers in evaluation": (
        lambda m, x: m.head(flatten(m.second(m.first(x) + torch.randn_like(x).mean()))),
        r"draws random numbers in evaluation, too \(randn_like\)",
    ),
    "random numbers drawn in place": (
        lambda m, x: m.head(flatten(m.second(m.first(x) * x.new_empty(1).uniform_()))),
        r"draws random numbers in evaluation, too \(uniform_\)",
    ),
    "values chosen by a condition": (
        lambda m, x: m.head(flatten(m.second(m.first(x)))) * x[x > 0].mean(),
        "depends on values that it computes",
    ),
    "another activation in training": (
        lambda m, x: m.head(
            flatten(m.second((torch.tanh if m.training else torch.relu)(m.first(x))))
        ),
        "In training, second takes what tanh puts out, but in evaluation what relu does",
    ),
    "maps by keyword": (
        lambda m, x: m.head(flatten(m.second(input=m.first(x)))),
        "by keyword",
    ),
    "all by functions": (
        lambda m, x: m.head(flatten(F.conv2d(m.first(x), m.second.weight, padding=1))),
        "first",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_a_trial_cannot_see_is_refused(way):
    how, message = REFUSED[way]
    model = Net(how)
    before = state_of(model)
    for use in everything(model, data())[
        : 2 if way in ("all by functions", "maps by keyword") else 3
    ]:
        with pytest.raises(TypeError, match=message):
            use()
    assert_same(state_of(model), before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "no filters that could go"),
        (nn.Linear(8, 3), "no filters that could go"),
        (
            nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3)),
            "without weights yet",
        ),
        (nn.DataParallel(Net(WAYS["functions"][0])), r"model\.module"),
        (torch.optim.swa_utils.AveragedModel(Net(None)), r"AveragedModel: hand in .*model\.module"),
        (torch.compile(Net(WAYS["functions"][0]), backend="eager"), r"model\._orig_mod"),
        ("resnet18", "nn.Module"),
        ({"first": 1}, "nn.Module"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_filters_to_prune_is_refused(model, message):
    for use in (lambda: filter_scores(model, data()), lambda: TaylorPruner(model).score(data())):
        with pytest.raises(TypeError, match=message):
            use()


@pytest.mark.parametrize("n", [1, 3])
def test_convolutions_of_other_dimensions_are_convolutions(n):
    conv, norm, pool = (
        getattr(nn, f"{kind}{n}d") for kind in ("Conv", "BatchNorm", "AdaptiveAvgPool")
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        *(conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 5, 3), nn.ReLU(), pool(1)),
        *(nn.Flatten(), nn.Linear(5, 3)),
    )
    images = torch.rand(4, 2, *[8] * n)
    assert check_exact(model, images) == ["0", "3"]
    remove_filters(model, {"0": [1]})  # without an image


def test_without_images_only_sequences_are_read():
    for model, what in (
        (Net(WAYS["functions"][0]), r"^Net isn't a Sequential .* \(the model is a Net\)"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), Net(None)), r"\(1 is a Net\)"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), r"\(1 is a GroupNorm\(2, 4, "),
    ):
        for use in (remove_filters, lambda *given: mask_filters(*given).__enter__()):
            with pytest.raises(TypeError, match=f"{what}.*hand in data too"):
                use(model, {"0": [0]})


class Inside(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(x)


class Afterwards(Inside):
    def forward(self, x):
        return self.body(x).relu()


def test_a_forward_that_is_one_call_of_a_sequence_is_one():
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 3)]
    nested = nn.Sequential(Inside(*layers[:2]), Inside(Inside(*layers[2:])))
    assert remove_filters(nested, {"0.body.0": [1]}).get_submodule("0.body.0").out_channels == 3
    with pytest.raises(TypeError, match="0 is a Afterwards"):
        remove_filters(nn.Sequential(Afterwards(*layers[:2]), *layers[2:]), {"2": [1]})
    assert check_exact(nested, data().tensors[0]) == ["0.body.0", "1.body.0.body.0"]


def test_a_traced_network_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Net(WAYS["functions"][0]).eval(), data().tensors[0])
    with pytest.raises(TypeError, match="traced from"):
        filter_scores(traced, data())


@pytest.mark.parametrize("last", [lambda m, y: m.last(y), lambda m, y: F.softmax(y, 1)])
def test_a_softmax_at_the_end_is_refused_unless_the_cost_is_ones_own(last):
    model = Net(lambda m, x: last(m, m.head(flatten(m.second(m.first(x))))))
    model.last = nn.Softmax(1)
    with pytest.raises(ValueError, match=r"probabilities .* leave out the softmax"):
        filter_scores(model, data())

    def cost(outputs, labels):
        return -outputs.log().gather(1, labels[:, None])[:, 0]

    logits = Net(WAYS["functions"][0])
    logits.how = lambda m, x: m.head(flatten(m.second(m.first(x))))
    logits.load_state_dict(model.state_dict())
    # The same loss by another way: only rounding differs.
    torch.testing.assert_close(
        filter_scores(model, data(), cost=cost), filter_scores(logits, data()), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_softmax_that_is_known_is_refused_where_a_loss_is_taken_of_it(criterion):
    """Activations don't depend on the loss, but the network can't be the one that is meant."""
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)]
    model = nn.Sequential(*layers, nn.Softmax(1))
    if criterion in ("weight", "random"):
        assert len(filter_scores(model, data(), criterion)["0"]) == 3
        return
    with pytest.raises(TypeError, match="4 is a softmax that puts out probabilities"):
        filter_scores(model, data(), criterion)
    assert filter_scores(nn.Sequential(*layers, nn.LogSoftmax(1)), data(), criterion)


def test_a_network_compiled_in_place_is_scored_as_before():
    model = Net(WAYS["functions"][0])
    expected = filter_scores(model, data())
    model.compile(backend="eager")
    model(data().tensors[0])
    assert_same(filter_scores(model, data()), expected)
    some = data()
    with torch.no_grad(), mask_filters(model, {"first": [0]}, some):
        masked = model(some.tensors[0])
    small = remove_filters(model, {"first": [0]}, some)
    torch.testing.assert_close(small(some.tensors[0]), masked)


def test_a_hook_that_hides_a_feature_map_is_an_error():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), nn.Linear(144, 3)
    )
    model[1].register_forward_hook(lambda module, inputs, output: torch.ones(output.shape))
    with pytest.raises(TypeError, match=r"^1 has hooks"):
        filter_scores(model, data())


def test_written_and_plain_networks_have_the_same_scores():
    torch.manual_seed(0)
    plain = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)),
        *(nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(5, 3)),
    )
    expected = filter_scores(plain, data())
    for seed in range(8):
        written = Written(copy.deepcopy(list(plain)), random.Random(seed))
        scores = filter_scores(written, data())
        torch.testing.assert_close(list(scores.values()), list(expected.values()))


def test_a_network_is_read_once_in_each_public_call(monkeypatch):
    read = []
    read_graph = reading.read_graph

    def counted(*given):
        read.append(given)
        return read_graph(*given)

    monkeypatch.setattr(reading, "read_graph", counted)
    model, some = Net(WAYS["functions"][0]), data()
    calls = {
        "score": lambda: filter_scores(model, some, "oracle_abs"),
        "mask": lambda: mask_filters(model, {"first": [1]}, some).__enter__(),
        "remove": lambda: remove_filters(model, {"first": [1], "second": [0, 3]}, some),
        "schedule": lambda: list(prune_iteratively(model, some, some, filters=3, updates=1)),
    }
    for name, call in calls.items():
        read.clear()
        call()
        assert len(read) == 1, name


class Remembers(Net):
    """Keeps a moving mean, what it computed, and adds noise in training."""

    def __init__(self):
        super().__init__(None)
        self.register_buffer("mean", torch.zeros(()))
        self.kept, self.last = [], None

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.rand(1) * random.random()
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        y = self.head(flatten(self.second(self.first(x))))
        self.last = y
        self.kept.append(1)
        return y


def test_reading_a_network_leaves_its_state_and_all_random_numbers_alone():
    model = Remembers()
    model(data().tensors[0])  # keeps a tensor with its history
    before = state_of(model)
    mean, kept = model.mean, list(model.kept)
    gone = {"first": [0], "second": [1]}
    small = remove_filters(model, gone, data())
    filter_scores(model.eval(), data())
    with mask_filters(model, gone, data()):
        pass
    model.train()
    assert model.mean is mean and len(model.kept) == len(kept) + 1  # of the one pass that scored
    assert_same(state_of(model), before)
    assert small(data().tensors[0]).shape == (4, 3)


class NoGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            z = F.relu(self.first(x))
        return self.head(flatten(self.second(z)))


@pytest.mark.parametrize(
    "mix", [lambda z: z - z.mean(0), lambda z: z.roll(1, 0), lambda z: z / z.std(0)]
)
def test_images_that_change_each_others_outputs_are_refused(mix):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.second(mix(self.first(x))).mean((2, 3)))

    data = TensorDataset(torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    with pytest.raises(TypeError, match="depends on the others in its mini-batch"):
        filter_scores(Mixed(), data)


def test_filters_without_a_gradient_are_left_out():
    model, some = NoGradient(None), data()
    with pytest.warns(UserWarning, match=r"first \(no gradient comes back .*torch\.no_grad"):
        assert list(filter_scores(model, some)) == ["second"]
    check_exact(model, some.tensors[0])


def test_a_forward_set_on_the_object_is_refused():
    model = Net(WAYS["functions"][0])
    model.forward = lambda x: x.sum()
    with pytest.raises(TypeError, match="forward of its own"):
        filter_scores(model, data())


# Wrong answers that nobody would see


class Looks(Net):
    def __init__(self):
        super().__init__(None)
        self.norm, self.act = nn.BatchNorm2d(5), nn.Sigmoid()

    def forward(self, x):
        return self.head(flatten(self.second(self.act(self.norm(self.first(x))))))


@pytest.mark.parametrize("layer", ["norm", "act"])
@pytest.mark.parametrize(
    "hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_between_a_convolution_and_its_consumer_are_refused(layer, hook):
    model = Looks()
    getattr(model.get_submodule(layer), hook)(lambda module, *values: None)
    for use in everything(model, data()):
        with pytest.raises(TypeError, match=f"{layer} has hooks"):
            use()


@pytest.mark.parametrize("layer", ["first", "second", "head", "block"])
@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_on_convolutions_consumers_and_containers_are_refused(layer, hook):
    model = Net(lambda m, x: m.head(flatten(m.block(m.first(x)))))
    model.block = nn.Sequential(model.second, nn.ReLU())
    seen = []
    named = {"second": model.second, "block": model.block}
    getattr(named.get(layer, getattr(model, layer, None)), hook)(lambda *values: seen.append(1))
    for use in everything(model, data()):
        with pytest.raises(TypeError, match="has hooks"):
            use()
    assert not seen


def test_a_copy_that_is_made_inside_a_mask_is_not_masked():
    images = data().tensors[0]
    for how in (WAYS["functions"][0], lambda m, x: m.head(flatten(m.second(m.first(x))))):
        model = Net(how).eval()
        gone = {"first": [0], "second": [1, 2]}
        with torch.no_grad(), mask_filters(model, gone, images):
            masked = model(images)
            small = remove_filters(model, gone, images)
            torch.testing.assert_close(small(images), masked)
            plain = copy.deepcopy(model)(images)
        with torch.no_grad():
            torch.testing.assert_close(small(images), masked)
            assert_same(plain, model(images))


def test_several_maps_for_an_example_are_refused_where_they_are_scored():
    crops = Net(lambda m, x: m.head(flatten(m.second(m.first(torch.cat((x, x)))))).chunk(2)[0])
    with pytest.raises(TypeError, match=r"(first|second) puts out 4 feature maps for 2 examples"):
        filter_scores(crops, data())


def test_batch_statistics_anywhere_are_refused():
    model = Net(lambda m, x: m.norm(m.head(flatten(m.second(m.first(x))))))
    model.norm = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(TypeError, match="norm is a batch norm without running statistics"):
        filter_scores(model, data())


def test_layers_that_share_a_weight_are_refused():
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )
    model[4].weight = model[2].weight
    with pytest.raises(
        TypeError, match=r"no filters .*\(0, 2 \([24] shares a weight with another layer"
    ):
        filter_scores(model, data())
    with pytest.raises(TypeError, match=r"^0 can't lose filters: [24] shares a weight"):
        remove_filters(model, {"0": [0]}, data())
    model[4].weight = nn.Parameter(model[2].weight.detach().clone())
    check_exact(model, data().tensors[0])


def test_wrappers_inside_a_network_are_refused_by_name():
    inner = nn.DataParallel(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()))
    model = nn.Sequential(inner, nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 3))
    with pytest.raises(TypeError, match=r"^0 is a DataParallel: put in its place .* 0\.module"):
        filter_scores(model, data())


def checks(m, x):
    if x.shape[1] != 1:
        raise ValueError(f"gray images, not {x.shape[1]} channels")
    return m.head(flatten(m.second(m.first(x))))


def test_a_check_may_raise():
    check_exact(Net(checks), data().tensors[0])


@pytest.mark.parametrize(
    "end",
    [
        lambda z: F.log_softmax(F.adaptive_avg_pool2d(z, 1).squeeze(-1).squeeze(-1), 1),
        lambda z: F.adaptive_avg_pool2d(z, 1)[:, :, 0, 0],
        lambda z: F.adaptive_avg_pool2d(z, 1).view(-1, 3),
        lambda z: F.log_softmax(z.mean((2, 3)), dim=1),
    ],
)
def test_a_network_may_end_in_a_convolution(end):
    model = Net(lambda m, x: end(m.last(F.relu(m.first(x)))))
    model.last = nn.Conv2d(5, 3, 1)
    del model.second, model.head
    assert check_exact(model, data().tensors[0]) == ["first"]


def test_what_cannot_be_copied_is_an_error_that_says_so():
    model = Net(WAYS["functions"][0])
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"can't be copied .*_thread\.lock"):
        filter_scores(model, data())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_scoring_and_training_work_where_gradients_are_off(off):
    some = data(8)
    model = Net(WAYS["functions"][0])
    expected = filter_scores(model, some)
    with off():
        torch.testing.assert_close(filter_scores(model, some), expected)
        filter_scores(model, some, "obd")
        fit(model, some, some, epochs=1)
        (step,) = prune_iteratively(model, some, some, filters=8, updates=2)
    assert step.filters == 8


def test_frozen_layers_may_be_followed_by_ones_that_work_in_place():
    model = Net(lambda m, x: m.head(flatten(m.second(m.drop(F.relu(m.first(x)))))))
    model.drop = nn.Dropout(0.5, inplace=True)
    model.first.requires_grad_(False)
    some = data(8)
    assert list(filter_scores(model, some)) == ["first", "second"]
    (step,) = prune_iteratively(model, some, some, filters=8, updates=2)
    assert step.filters == 8


@pytest.mark.parametrize(("groups", "scored"), [((2, 2), 2), ((2, 4), 2), ((4, 1), 4)])
def test_two_convolutions_on_one_map_lose_what_their_groups_can(groups, scored):
    def both(m, x):
        z = F.relu(m.first(x))
        return m.head(flatten(torch.tanh(m.one(z) + m.two(z))))

    model = Net(both)
    model.first = nn.Conv2d(1, 4, 3, padding=1)
    model.one = nn.Conv2d(4, 4, 3, padding=1, groups=groups[0])
    model.two = nn.Conv2d(4, 4, 1, groups=groups[1])
    check_exact(model, data().tensors[0])
    assert len(filter_scores(model, data())["first"]) == scored


def test_tokens_behind_a_linear_layer_are_units_of_it():
    model = Net(lambda m, x: m.head(F.gelu(m.tokens(maps(m, x).flatten(2).mT)).mean(1)), 6)
    model.tokens = nn.Linear(4, 6)
    some = data()
    assert check_exact(model, some.tensors[0]) == ["first", "second"]
    scores = filter_scores(model, some, linear=True)
    assert list(scores) == ["first", "second", "tokens"]
    small = remove_filters(model, {"tokens": [1, 4]}, some)
    assert (small.tokens.out_features, small.head.in_features) == (4, 4)
    with mask_filters(model, {"tokens": [1, 4]}, some):
        torch.testing.assert_close(small(some.tensors[0]), model(some.tensors[0]))


def test_a_network_that_puts_out_integers_has_nothing_to_score():
    model = Net(lambda m, x: m.head(flatten(m.second(m.first(x)))).argmax(1))
    with pytest.raises(TypeError, match=r"no filters that could go \(first, second \(no gradient"):
        filter_scores(model, data(), cost=lambda outputs, labels: outputs.float())


def test_frames_that_a_module_folds_into_the_batch_are_refused():
    layers = [nn.Flatten(0, 1), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3)]
    model = nn.Sequential(*layers, nn.Unflatten(0, (-1, 2)), nn.Flatten(1), nn.Linear(6, 3))
    with pytest.raises(TypeError, match=r"1 puts out \d+ feature maps for \d+ examples"):
        filter_scores(model, data(shape=(2, 1, 8, 8)))


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_all_modules_are_refused_and_stay(kind):
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    try:
        model = Net(WAYS["functions"][0])
        before = state_of(model)
        for use in everything(model, data()):
            with pytest.raises(TypeError, match="hooks on all modules"):
                use()
        assert_same(state_of(model), before)
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [nn.MaxPool1d(3, 1, 1), nn.Conv1d(6, 6, 3, padding=1)])
def test_a_row_that_is_pooled_or_convolved_is_read_from_images(layer):
    # PyTorch takes six rows for six channels of one image: what comes out mixes the filters.
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), layer, nn.Linear(144, 3))
    assert model(torch.rand(6, 1, 8, 8)).shape == (6, 3)
    with pytest.raises(TypeError, match=rf"{type(layer).__name__} that takes rows"):
        remove_filters(model, {"0": [1]})


def test_keep_may_name_what_stays_anyway_but_nothing_without_filters():
    model, some = Net(lambda m, x: m.second(F.relu(m.first(x))).mean((2, 3))), data()
    expected = filter_scores(model, some)
    assert list(expected) == ["first"]  # the maps of "second" are the outputs
    torch.testing.assert_close(filter_scores(model, some, keep=["second"]), expected)
    model.norm = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match=r"keep names norm, which has no filters"):
        filter_scores(model, some, keep=["norm"])


@pytest.mark.parametrize(
    "kind", [list, tuple, lambda layers: {"a": layers[0]}, lambda layers: [[1, layers]]]
)
def test_layers_that_pytorch_does_not_know_are_refused(kind):
    model = Net(WAYS["functions"][0])
    model.held = kind([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"model\.held is a (list|tuple|dict) of layers, which"):
        filter_scores(model, data())
    model.held = kind([model.first])  # one that is known
    assert list(filter_scores(model, data())) == ["first", "second"]


def test_a_network_that_takes_no_images_in_training_is_read_in_evaluation():
    def how(m, x):
        if m.training:
            raise ValueError("targets are needed")
        return m.head(flatten(maps(m, x)))

    model, some = Net(how).eval(), data()
    assert list(filter_scores(model, some)) == ["first", "second"]
    small = remove_filters(model, {"first": [1], "second": [0, 3]}, some)
    with mask_filters(model, {"first": [1], "second": [0, 3]}, some):
        torch.testing.assert_close(small(some.tensors[0]), model(some.tensors[0]))
    with pytest.raises(ValueError, match="can't take a batch of float32"):
        filter_scores(model, data(shape=(1, 5, 5)))
