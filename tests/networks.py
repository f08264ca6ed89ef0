"""Random chain networks and random data, for the tests of what must hold for every network."""

import random
import warnings
from dataclasses import dataclass

import numpy
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

torch.set_num_threads(1)  # for networks as small as these, threads cost more than they save
CLASSES = 3
SEEDS = st.integers(0, 99_999)
# The same examples in every run; a smaller seed is not a simpler network, so nothing is shrunk.
PROPERTY = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
)


def assert_same(left, right) -> None:
    """Equal to the last bit, in (nested) tensors and in anything else."""
    if isinstance(left, dict):
        assert list(left) == list(right)
        left, right = list(left.values()), list(right.values())
    if isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    else:
        assert left == right


def state_of(model: nn.Module, *tensors: Tensor) -> dict:
    """All that a function which leaves its caller's things as they were could leave behind: in
    ``model``, on ``tensors``, and in the process.
    """
    modules = list(model.modules())
    named = dict([*model.named_parameters(), *model.named_buffers()])  # also what isn't saved
    values = [*named.values(), *tensors]
    return {
        "values": {name: value.detach().clone() for name, value in named.items()},
        "tensors": [value.clone() for value in tensors],
        "grads": [None if value.grad is None else value.grad.clone() for value in values],
        "requires_grad": [value.requires_grad for value in values],
        "layout": [value.stride() for value in values],
        "on tensors": [(sorted(vars(value)), value._backward_hooks) for value in values],
        "training": [m.training for m in modules],
        "hooks": [[len(getattr(m, name)) for name in HOOKS] for m in modules],
        "hooks of all": [len(getattr(nn.modules.module, f"_global{name}")) for name in HOOKS],
        "attributes": [sorted(vars(m)) for m in modules],
        "classes": [type(m) for m in modules],
        "random": random_numbers(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            len(torch.overrides._get_current_function_mode_stack()),
        ),
        "warnings": ("ignore", None, Warning, None, 0) in warnings.filters,
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def random_numbers() -> list:
    """Where PyTorch's, Python's and numpy's random numbers stand."""
    _, numbers, *rest = numpy.random.get_state()
    return [torch.get_rng_state(), random.getstate(), numbers.tolist(), rest]


@dataclass
class Network:
    """``layers`` are those of ``model`` in the order they are applied; images are ``shape``."""

    model: nn.Module
    layers: list[nn.Module]
    shape: tuple[int, int, int]

    def feature_maps(self) -> dict[str, int]:
        """For each convolution before a consumer, by name: the position in ``layers`` of the layer
        that puts out its feature map, found without the package."""
        names = {module: name for name, module in self.model.named_modules()}
        found, name, position = {}, None, None
        for i, layer in enumerate(self.layers):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                if name is not None:
                    found[name] = position
                name = names[layer] if isinstance(layer, nn.Conv2d) else None
                position = i
            elif not isinstance(layer, KEEP_ZEROS):
                position = i
        return found


class Parts(nn.Module):
    """A chain in two parts, defined in the opposite order of their use."""

    def __init__(self, features: nn.Module, head: nn.Module):
        super().__init__()
        self.head = head
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


# Other ways to write a layer: functions of (layer, x).
FORMS = {
    nn.ReLU: [
        lambda layer, x: F.relu(x, layer.inplace),
        lambda layer, x: torch.relu(x),
        lambda layer, x: x.relu(),
        lambda layer, x: x.clamp(min=0),
    ],
    nn.LeakyReLU: [lambda layer, x: F.leaky_relu(x, 0.1, layer.inplace)],
    nn.ELU: [lambda layer, x: F.elu(x, inplace=layer.inplace)],
    nn.GELU: [lambda layer, x: F.gelu(x)],
    nn.SiLU: [lambda layer, x: F.silu(x)],
    nn.Sigmoid: [lambda layer, x: torch.sigmoid(x), lambda layer, x: x.sigmoid()],
    nn.Tanh: [lambda layer, x: torch.tanh(x), lambda layer, x: x.tanh()],
    nn.Softplus: [lambda layer, x: F.softplus(x)],
    nn.MaxPool2d: [lambda layer, x: F.max_pool2d(x, 2)],
    nn.AvgPool2d: [lambda layer, x: F.avg_pool2d(x, kernel_size=2)],
    nn.AdaptiveAvgPool2d: [lambda layer, x: F.adaptive_avg_pool2d(x, layer.output_size)],
    nn.Dropout: [lambda layer, x: F.dropout(x, 0.5, training=layer.training)],
    nn.Identity: [lambda layer, x: x],
    nn.Flatten: [
        lambda layer, x: torch.flatten(x, 1),
        lambda layer, x: x.flatten(start_dim=1),
        lambda layer, x: x.view(x.size(0), -1),
        lambda layer, x: x.reshape(x.shape[0], -1),
        lambda layer, x: torch.reshape(x, (x.size()[0], -1)),
        lambda layer, x: x.contiguous().view(x.size(0), x.size(1) * x.shape[2] * x.shape[3]),
    ],
}


class Written(nn.Module):
    """A chain whose ``forward`` writes layers as functions, methods and operators."""

    def __init__(self, layers: list[nn.Module], rng: random.Random):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.forms = [rng.choice(FORMS.get(type(layer), [None])) for layer in layers]

    def forward(self, x: Tensor, features: bool = False) -> Tensor:
        assert x.dim() == 4 and x.shape[1] > 0, "images (N, C, H, W)"
        x = x.contiguous()  # what comes before the first convolution is free
        for layer, form in zip(self.layers, self.forms, strict=True):
            x = form(layer, x) if form else layer(x)
        return x if features else x * 1.0


def asserting(m: nn.Module, x: Tensor) -> Tensor:
    """A forward with asserts of several shapes; here, because pytest rewrites those of tests."""
    assert x.dim() == 4 and not x.shape[1] != 1, "gray images"
    assert not (x.shape[2] != x.shape[3])
    return m.head(torch.flatten(m.second(m.first(x)), 1))


KEEP_ZEROS = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
)


def random_network(seed: int) -> Network:
    """A chain of 1 to 4 convolutions and 1 or 2 linear layers, float64, in training mode."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (rng.randint(1, 3), rng.randint(6, 9), rng.randint(6, 9))
        layers = _layers(rng, shape)
        return Network(_wrapped(rng, layers).double(), layers, shape)


def random_data(network: Network, size: int = 5, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *network.shape, dtype=torch.float64, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (size,), generator=generator))


def random_filters(network: Network, seed: int) -> dict[str, list[int]]:
    """Filters of every prunable layer, in random order, at least one of each layer left out."""
    rng = random.Random(seed)
    chosen = {}
    for name in network.feature_maps():
        filters = network.model.get_submodule(name).out_channels
        chosen[name] = rng.sample(range(filters), rng.randint(0, filters - 1))
    return chosen


def _layers(rng: random.Random, shape: tuple[int, int, int]) -> list[nn.Module]:
    shared = _activation(rng) if rng.random() < 0.25 else None

    def activation() -> nn.Module:
        return shared or _activation(rng)

    layers = []
    if rng.random() < 0.2:  # not a convolution's follower, even where it is the shared instance
        layers.append(shared if shared and not _in_place(shared) else nn.Tanh())
    probe = torch.zeros(1, *shape)  # says what size a layer has to take
    for _ in range(rng.randint(1, 4)):
        block = [_conv(rng, probe)]
        width = block[0].out_channels
        followers = []
        if rng.random() < 0.4:
            followers.append(_batch_norm(rng, width))
        if rng.random() < 0.8:
            followers.append(activation())
        if rng.random() < 0.4 and min(block[0](probe).shape[2:]) > 1:
            followers.append(_pool(rng))
        if rng.random() < 0.3:
            followers.append(rng.choice([nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Identity()]))
        if rng.random() < 0.3:
            rng.shuffle(followers)
        block += followers
        with torch.no_grad():
            for layer in block:
                probe = layer.eval()(probe)
                layer.train()
        layers += block

    layers.append(nn.Flatten())
    if rng.random() < 0.3:
        after = activation()
        # In place on a view of an activation's output, autograd itself would refuse it.
        layers.append(nn.Softplus() if _in_place(after) else after)
    features = probe.numel()
    if rng.random() < 0.4:
        layers += [nn.Linear(features, 6, bias=rng.random() < 0.7), activation()]
        features = 6
    layers.append(nn.Linear(features, CLASSES))
    return layers


def _conv(rng: random.Random, probe: Tensor) -> nn.Conv2d:
    kernel = rng.choice([1, 3])
    room = min(probe.shape[2:])
    return nn.Conv2d(
        probe.shape[1],
        rng.randint(2, 6),
        kernel,
        stride=rng.choice([1, 2]) if room > 3 else 1,
        padding=rng.choice([0, 1]) if room >= kernel else 1,
        padding_mode=rng.choice(["zeros", "zeros", "replicate"]),
        bias=rng.random() < 0.7,
    )


def _batch_norm(rng: random.Random, width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width, affine=rng.random() < 0.7)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def _activation(rng: random.Random) -> nn.Module:
    in_place = rng.random() < 0.5
    return rng.choice(
        [
            nn.ReLU(in_place),
            nn.ReLU(in_place),
            nn.LeakyReLU(0.1, in_place),
            nn.ELU(inplace=in_place),
            nn.GELU(),
            nn.SiLU(),
            nn.Sigmoid(),
            nn.Tanh(),
            nn.Softplus(),
            nn.PReLU(),
        ]
    )


def _pool(rng: random.Random) -> nn.Module:
    return rng.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(rng.randint(1, 3))])


def _in_place(layer: nn.Module) -> bool:
    return getattr(layer, "inplace", False)


def _wrapped(rng: random.Random, layers: list[nn.Module]) -> nn.Module:
    cut = rng.randint(1, len(layers) - 1)
    first, second = nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])
    return rng.choice(
        [
            nn.Sequential(*layers),
            nn.Sequential(first, second),
            Parts(first, second),
            Written(layers, rng),
        ]
    )
