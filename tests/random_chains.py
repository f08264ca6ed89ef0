"""Random chains of every kind of layer, in float64: what must hold for each of them.

    python tests/random_chains.py --networks 400

prints the largest differences found. ``test_random_chains.py`` runs a few.
"""

import argparse
import copy
import random
from collections import Counter

import torch
from networks import assert_same, random_filters, random_network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cnn_pruning import evaluate, filter_scores, mask_filters, remove_filters
from cnn_pruning.network.reading import read
from cnn_pruning.network.sequential import ACTIVATIONS, POOLING
from cnn_pruning.oracle import oracle

SHAPE = (2, 9, 8)
KINDS = [k for k in (*ACTIVATIONS, *POOLING) if k.__name__[-2:] not in ("1d", "3d")]
KINDS.append(nn.BatchNorm2d)


def layer(kind: type[nn.Module], channels: int, rng: random.Random) -> nn.Module:
    """A layer of this kind for ``channels``, in place half of the times it can be."""
    arguments = {
        **dict.fromkeys(
            (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), (rng.choice([1, 2, (2, 3)]),)
        ),
        **dict.fromkeys((nn.AvgPool2d, nn.MaxPool2d), (2, 1)),
        nn.Threshold: (0.1, 0.2),
        nn.BatchNorm2d: (channels,),
        **dict.fromkeys((nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d), (None, 2)),
        **dict.fromkeys((nn.CircularPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), (1,)),
        nn.ZeroPad2d: (1,),
    }
    made = kind(*arguments.get(kind, ()))
    if hasattr(made, "inplace"):
        made.inplace = rng.random() < 0.5
    if kind is nn.BatchNorm2d:
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2)
    return made


def chain_of_every_kind(seed: int) -> nn.Module:
    """One to three convolutions, each with up to three layers of any kind behind it."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers, probe = [], torch.rand(1, *SHAPE)
    for _ in range(rng.randint(1, 3)):
        width = rng.randint(2, 5)
        layers.append(nn.Conv2d(probe.shape[1], width, 3, padding=1))
        probe = layers[-1](probe)
        for _ in range(rng.randint(0, 3)):
            added = layer(rng.choice(rng.choice([KINDS, ACTIVATIONS])), width, rng)
            try:
                after = added.eval()(probe.detach().clone())
            except (RuntimeError, ValueError):  # too small for padding or pooling
                continue
            if 0 < after.numel() < 5000:
                layers.append(added)
                probe = after
    layers.append(nn.Flatten())
    if rng.random() < 0.3:
        layers.append(nn.BatchNorm1d(probe.numel()))
    return nn.Sequential(*layers, nn.Linear(probe.numel(), 3)).double().eval()


def relative(left: Tensor, right: Tensor) -> float:
    return ((left - right).abs().max() / right.abs().max().clamp(min=1e-6)).item()


def pytorch_differentiates(model: nn.Module, images: Tensor, labels: Tensor) -> bool:
    try:
        cross_entropy(model(images), labels).backward()
    except RuntimeError:
        return False
    finally:
        model.zero_grad()
    return True


def check(seed: int) -> dict[str, float]:
    """The largest difference by what is compared, or {} where PyTorch has no derivative."""
    rng = random.Random(seed)
    if seed % 2:
        model, shape = chain_of_every_kind(seed), SHAPE
        widths = read(model).filters()
        gone = {n: rng.sample(range(k), rng.randint(0, k - 1)) for n, k in widths.items()}
    else:  # written in other ways
        network = random_network(seed)
        model, shape, gone = network.model.eval(), network.shape, random_filters(network, seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, *shape, dtype=torch.float64, generator=generator)
    data = TensorDataset(images, torch.arange(5) % 3)

    with torch.no_grad():
        with mask_filters(model, gone, images):
            masked = model(images)
        small = remove_filters(model, gone, images)
        found = {"removed and masked": relative(small(images), masked)}

    first = {name: indices[: len(indices) // 2] for name, indices in gone.items()}
    rest = {
        name: [k - sum(f < k for f in first[name]) for k in indices if k not in first[name]]
        for name, indices in gone.items()
    }
    twice = remove_filters(remove_filters(model, first, images), rest, images)
    assert_same(dict(twice.state_dict()), dict(small.state_dict()))

    base, _ = evaluate(model, data)
    exact = oracle(model, data, batch_size=2)
    for name, changes in exact.items():
        k = rng.randrange(len(changes))
        with mask_filters(model, {name: [k]}, images):
            change = torch.tensor(evaluate(model, data)[0] - base, dtype=torch.float64)
        difference = (changes[k] - change).abs().item() / max(1, abs(base))
        found["oracle and mask"] = max(found.get("oracle and mask", 0), difference)

    try:
        scores = [filter_scores(model, data, batch_size=size) for size in (1, 3, 5)]
    except TypeError as error:
        assert "PyTorch can't differentiate the network" in str(error)
        assert not pytorch_differentiates(model, images, data.tensors[1])
        return {}
    for name, values in scores[0].items():
        difference = max(relative(other[name], values) for other in scores[1:])
        found["scores by batch size"] = max(found.get("scores by batch size", 0), difference)
    apart = copy.deepcopy(model)
    for module in apart.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    for name, values in filter_scores(apart, data, batch_size=1).items():
        difference = relative(scores[0][name], values)
        found["scores in place and not"] = max(found.get("scores in place and not", 0), difference)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Random chains: what must hold for each.")
    parser.add_argument("--networks", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    options = parser.parse_args()
    largest: dict[str, float] = {}
    ended = Counter()
    for seed in range(options.seed, options.seed + options.networks):
        found = check(seed)
        ended["checked" if found else "without a derivative"] += 1
        for name, difference in found.items():
            if difference > largest.get(name, -1):
                largest[name] = difference
            if difference > 1e-12:
                print(f"seed {seed}: {name} differ by {difference:.1e}")
    print(*(f"{count} networks {how}" for how, count in ended.items()), sep="\n")
    print(*(f"{name}: at most {value:.1e}" for name, value in largest.items()), sep="\n")
