"""The long version of notebook 9, second part: a network with skip connections.

    uv run python notebooks/long_runs/residual.py

takes an hour and a half of one core; a GPU is used if there is one. It scores the groups of a small
residual network in several ways, removes them at once down to several shares of the multiply-adds,
takes the statistics of the batch norms anew from images without labels, and trains each network for
one more epoch. It writes residual.csv, one row a network, and residual.pt, the first seed's trained
network. Each row is kept as soon as it is done: started again, the program goes on where it
stopped.

What is tested, stated before the run: Taylor minus each method of ``TESTED``, in test accuracy
after the epoch, at each share: nine paired differences over the seeds, corrected together
(Bonferroni). Everything else in the table is described and not tested.
"""

import copy
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from cnn_pruning import (
    TaylorPruner,
    evaluate,
    fashion_mnist,
    filter_scores,
    fit,
    normalize,
    remove_filters,
)
from cnn_pruning.experiments.data import batches
from cnn_pruning.experiments.training import refresh_batch_norms
from cnn_pruning.measure import count_macs
from cnn_pruning.scores import Scores

import torch
import torch_pruning
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

try:
    from long_runs import whole_tables
    from long_runs.machine import on_device, trained_once
    from long_runs.networks import ResNet
except ImportError:  # run as a program
    import whole_tables
    from machine import on_device, trained_once
    from networks import ResNet

SEEDS = tuple(range(5))  # of the documented run
IMAGE_SHAPE = (1, 28, 28)
BASELINE = {"epochs": 5, "batch_size": 128, "lr": 3e-3}
FINE_TUNE = {"epochs": 1, "batch_size": 128, "lr": 1e-3}
SCORED = 10_000  # images, the same for all criteria
REFRESHED = 5_000  # training images for the batch norms' statistics
SHARES = (0.75, 0.5, 0.25)  # of the network's MACs
SAME_WIDTHS = "random, same layers"  # as many filters of each group as Taylor
TESTED = (SAME_WIDTHS, "weight", "sum of absolute scores")
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
        "refreshed": REFRESHED,
        "shares": [*SHARES],
    }


def untrained(seed: int) -> ResNet:
    # Not channels last: there, PyTorch 2.15's backward pass of the strided 1 x 1 convolution writes
    # past its memory on a CPU with AVX2, once 7 maps reach it.
    torch.manual_seed(seed)
    return ResNet()


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
            each = torch.stack([(maps[name] * slopes[name]).sum((2, 3)) for name in names]).cpu()
            after[group] = after[group] + each.sum(0).abs().sum(0).detach() / len(data)
            before[group] = before[group] + each.abs().sum((0, 1)).detach() / len(data)
    return after, before


def by_library(model: ResNet, data, importance) -> Scores:
    """The scores of Torch-Pruning, from the gradients of the loss on all of ``data``."""
    model = copy.deepcopy(model).eval()
    for images, labels in batches(data, 128):
        (cross_entropy(model(images), labels, reduction="sum") / len(data)).backward()
    graph = torch_pruning.DependencyGraph().build_dependency(model, data[:1][0])
    scores = {}
    for name in MAPS:
        conv = model.get_submodule(name)
        cut = torch_pruning.prune_conv_out_channels
        group = graph.get_pruning_group(conv, cut, idxs=[*range(conv.out_channels)])
        scores[name] = importance(group).detach().cpu()
    return scores


def random_scores(like: Scores, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(len(scores), generator=generator) for name, scores in like.items()}


def all_scores(model: ResNet, data, seed: int) -> dict[str, Scores]:
    """By method, what is compared over all groups."""
    taylor = filter_scores(model, data)
    found = {
        "taylor": taylor,
        "sum of absolute scores": by_map(model, data)[1],
        "Torch-Pruning's Taylor": by_library(
            model, data, torch_pruning.importance.GroupTaylorImportance()
        ),
        "weight": filter_scores(model, data, "weight"),
        "Torch-Pruning's magnitude": by_library(
            model, data, torch_pruning.importance.GroupMagnitudeImportance()
        ),
    }
    normalized = {method: normalize(scores) for method, scores in found.items()}
    return normalized | {"random": random_scores(taylor, seed)}


def pruned(model: ResNet, data, seed: int) -> Iterator[tuple[str, float, ResNet]]:
    """(method, share of the MACs, network) of every removal."""
    pruner = TaylorPruner(model, normalize=False)
    pruner.score(data)
    by_chance = random_scores(pruner.scores, seed)
    for method, scores in all_scores(model, data, seed).items():
        pruner.scores = scores
        for share in SHARES:
            removed = pruner.select(macs=share)
            yield method, share, remove_filters(model, removed, data)
            if method == "taylor":
                like = {k: by_chance[k].argsort()[: len(ks)].tolist() for k, ks in removed.items()}
                yield SAME_WIDTHS, share, remove_filters(model, like, data)


def rows_of_seed(seed: int, folder: Path, train, val, test) -> tuple[list[dict], Path]:
    """Its rows, and where its trained network is kept."""
    rows = whole_tables.Rows(folder / "residual.part" / f"{seed}.jsonl", settings([seed]))
    kept = folder / "residual.part" / f"{seed}.pt"
    if rows.has(method="random", share=SHARES[-1]):  # the last one
        return rows.rows, kept
    model = trained_once(
        kept, untrained(seed), lambda network: fit(network, train, val, seed=seed, **BASELINE)
    )
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:SCORED]
    data = TensorDataset(*train[some])

    def row(method: str, share: float, network: ResNet) -> dict:
        widths = [network.get_submodule(name).out_channels for name in MAPS]
        return {
            "seed": seed,
            "method": method,
            "share": share,
            "widths": "-".join(map(str, widths)),
            "filters": sum(widths),
            "macs": count_macs(network, IMAGE_SHAPE),
            "val_before": evaluate(network, val)[1],
        }

    if not rows.has(method="baseline"):
        rows.add(row("baseline", 1.0, model) | {"test_accuracy": evaluate(model, test)[1]})
    for method, share, small in pruned(model, data, seed):
        if rows.has(method=method, share=share):
            continue
        found = row(method, share, small)
        refresh_batch_norms(small, train, images=REFRESHED)
        found["val_refreshed"] = evaluate(small, val)[1]
        fit(small, train, val, seed=seed, **FINE_TUNE)
        found["val_accuracy"] = evaluate(small, val)[1]
        rows.add(found | {"test_accuracy": evaluate(small, test)[1]})
    return rows.rows, kept


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    splits = on_device(fashion_mnist())
    found = [rows_of_seed(seed, folder, *splits) for seed in seeds]
    rows = [row for some, _ in found for row in some]
    whole_tables.write({folder / TABLE.name: rows}, settings(seeds))
    shutil.copyfile(found[0][1], folder / TRAINED.name)


if __name__ == "__main__":
    main()
