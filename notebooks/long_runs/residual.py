"""The long version of notebook 9, second part: a network with skip connections.

    uv run python notebooks/long_runs/residual.py

takes about twenty minutes on two cores. It scores the groups of a small residual network by five
criteria, removes them at once down to several shares of the multiply-adds, and trains each network
for one more epoch. It writes residual.csv, one row a network, and residual.pt, the first seed's
trained network.
"""

import copy
import itertools

from cnn_pruning import TaylorPruner, evaluate, fashion_mnist, filter_scores, fit, normalize
from cnn_pruning.experiments.data import batches
from cnn_pruning.measure import count_macs
from cnn_pruning.scores import Scores

import torch
import torch_pruning
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

try:
    from long_runs import whole_tables
    from long_runs.networks import ResNet
except ImportError:  # run as a program
    import whole_tables
    from networks import ResNet

SEEDS = (0, 1, 2, 3, 4)  # of the documented run
IMAGE_SHAPE = (1, 28, 28)
BASELINE = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
FINE_TUNE = {"epochs": 1, "batch_size": 128, "lr": 1e-3}
SCORED = 10_000  # images, the same for all criteria
SHARES = (0.75, 0.5, 0.25)  # of the network's MACs
TABLE = whole_tables.FOLDER / "residual.csv"
TRAINED = whole_tables.FOLDER / "residual.pt"

# The batch norms whose outputs are added, or stand alone, by the name of the group.
MAPS = {
    "conv": ["norm", "blocks.0.norm2"],
    "blocks.0.conv1": ["blocks.0.norm1"],
    "blocks.1.conv1": ["blocks.1.norm1"],
    "blocks.1.conv2": ["blocks.1.norm2", "blocks.1.shortcut.1", "blocks.2.norm2"],
    "blocks.2.conv1": ["blocks.2.norm1"],
}


def settings(seeds: list[int]) -> dict:
    return {
        "seeds": [*seeds],
        "baseline": BASELINE,
        "fine_tune": FINE_TUNE,
        "scored": SCORED,
        "shares": [*SHARES],
    }


def untrained(seed: int) -> ResNet:
    torch.manual_seed(seed)
    return ResNet().to(memory_format=torch.channels_last)  # trains a third faster


def by_map(model: ResNet, data) -> tuple[Scores, Scores]:
    """Two scores of each group: |the sum over its maps of sum z dC/dz|, and the sum of | |."""
    model = copy.deepcopy(model).eval()  # the hooks and the mode are the copy's
    maps: dict[str, torch.Tensor] = {}
    for name in itertools.chain(*MAPS.values()):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: maps.update({name: output})
        )
    after = {group: 0.0 for group in MAPS}
    before = dict(after)
    for images, labels in batches(data, 128):
        loss = cross_entropy(model(images), labels, reduction="sum")
        slopes = dict(zip(maps, torch.autograd.grad(loss, list(maps.values())), strict=True))
        for group, names in MAPS.items():
            each = torch.stack([(maps[name] * slopes[name]).sum((2, 3)) for name in names])
            after[group] = after[group] + each.sum(0).abs().sum(0).detach() / len(data)
            before[group] = before[group] + each.abs().sum((0, 1)).detach() / len(data)
    return after, before


def by_library(model: ResNet, data, importance) -> Scores:
    """The scores of Torch-Pruning, from the gradients of the loss on all of ``data``."""
    model = copy.deepcopy(model).eval()
    for images, labels in batches(data, 128):
        (cross_entropy(model(images), labels, reduction="sum") / len(data)).backward()
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.rand(1, *IMAGE_SHAPE))
    scores = {}
    for name in MAPS:
        conv = model.get_submodule(name)
        cut = torch_pruning.prune_conv_out_channels
        group = graph.get_pruning_group(conv, cut, idxs=[*range(conv.out_channels)])
        scores[name] = importance(group).detach()
    return scores


def all_scores(model: ResNet, data, seed: int) -> dict[str, Scores]:
    generator = torch.Generator().manual_seed(seed)
    taylor = filter_scores(model, data)
    return {
        "taylor": taylor,
        "sum of absolute scores": by_map(model, data)[1],
        "Torch-Pruning's Taylor": by_library(
            model, data, torch_pruning.importance.GroupTaylorImportance()
        ),
        "weight": by_library(model, data, torch_pruning.importance.GroupMagnitudeImportance()),
        "random": {name: torch.rand(len(s), generator=generator) for name, s in taylor.items()},
    }


def rows_of_seed(seed: int, train, val, test) -> tuple[list[dict], ResNet]:
    model = untrained(seed)
    fit(model, train, val, seed=seed, **BASELINE)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:SCORED]
    data = TensorDataset(*train[some])
    whole = count_macs(model, IMAGE_SHAPE)
    rows = [
        {
            "seed": seed,
            "method": "baseline",
            "share": 1.0,
            "macs": whole,
            "filters": sum(map(len, filter_scores(model, data).values())),
            "val_before": evaluate(model, val)[1],
        }
    ]
    pruner = TaylorPruner(model, normalize=False)
    pruner.score(data)
    for method, scores in all_scores(model, data, seed).items():
        pruner.scores = scores if method == "random" else normalize(scores)
        for share in SHARES:
            small = pruner.prune(macs=share)
            row = {
                "seed": seed,
                "method": method,
                "share": share,
                "macs": count_macs(small, IMAGE_SHAPE),
                "filters": sum(small.get_submodule(name).out_channels for name in MAPS),
                "val_before": evaluate(small, val)[1],
            }
            fit(small, train, val, seed=seed, **FINE_TUNE)
            row["val_accuracy"] = evaluate(small, val)[1]
            row["test_accuracy"] = evaluate(small, test)[1]
            rows.append(row)
    return rows, model


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = fashion_mnist()
    rows = []
    for seed in seeds:
        more, trained = rows_of_seed(seed, *splits)
        rows += more
        if seed == seeds[0]:
            first = trained
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))
    torch.save(first.state_dict(), folder / TRAINED.name)


if __name__ == "__main__":
    main()
