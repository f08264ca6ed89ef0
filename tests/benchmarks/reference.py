"""The same experiment as the usual PyTorch tutorials write it: nothing is made fast.

    python tests/benchmarks/reference.py SEED EPOCHS [CLOCK]

Images come one by one through ToTensor, in batches of 32, and after each epoch the network is
tested. For the scores, hooks catch the feature maps and their gradients. Seven filters are removed
by hand, and the network is fine-tuned. CLOCK is ``perf_counter``, or ``process_time``. The last
line is JSON: the seconds of each stage, and the accuracy at the end.
"""

import json
import sys
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

from cnn_pruning.experiments.paths import ROOT

BATCH_SIZE = 32
REMOVED = 7


def one_by_one(train: bool) -> FashionMNIST:
    return FashionMNIST(ROOT / "data", train, transform=ToTensor(), download=True)


def network(first: int, second: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 28 * 28, 10),
    )


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset) -> None:
    model.train()
    for images, labels in DataLoader(data, BATCH_SIZE, shuffle=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    model.eval()
    correct = 0
    for images, labels in DataLoader(data, BATCH_SIZE):
        correct += (model(images).argmax(1) == labels).sum().item()
    return correct / len(data)


def scores(model: nn.Sequential, data: Dataset) -> list[torch.Tensor]:
    """|mean of feature map times gradient|, for each image and filter of both layers, added up."""
    totals = [torch.zeros(conv.out_channels) for conv in (model[0], model[2])]
    for images, labels in DataLoader(data, BATCH_SIZE):
        maps, x = [], images
        for position, layer in enumerate(model):
            x = layer(x)
            if position in (1, 3):
                x.retain_grad()
                maps.append(x)
        model.zero_grad()
        nn.functional.cross_entropy(x, labels, reduction="sum").backward()
        for total, z in zip(totals, maps, strict=True):
            total += (z.detach() * z.grad).mean((2, 3)).abs().sum(0)
    return totals


def without_lowest(model: nn.Sequential, totals: list[torch.Tensor]) -> nn.Sequential:
    normalized = [total / total.norm() for total in totals]
    limit = torch.cat(normalized).sort().values[REMOVED]
    first, second = [(values >= limit).nonzero().flatten() for values in normalized]
    small = network(len(first), len(second))
    positions = model[5].weight.unflatten(1, (-1, 28 * 28))
    with torch.no_grad():
        small[0].weight.copy_(model[0].weight[first])
        small[0].bias.copy_(model[0].bias[first])
        small[2].weight.copy_(model[2].weight[second][:, first])
        small[2].bias.copy_(model[2].bias[second])
        small[5].weight.copy_(positions[:, second].flatten(1))
        small[5].bias.copy_(model[5].bias)
    return small


def main(seed: str, epochs: str, name: str = "perf_counter") -> None:
    clock = getattr(time, name)
    torch.manual_seed(int(seed))
    seconds = {"training": 0.0, "testing": 0.0, "scoring": 0.0}

    def timed(stage: str, function, *arguments):
        start = clock()
        result = function(*arguments)
        seconds[stage] += clock() - start
        return result

    train, test = one_by_one(train=True), one_by_one(train=False)

    def fit(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(int(epochs)):
            timed("training", train_epoch, model, optimizer, train)
            reached = timed("testing", accuracy, model, test)
        return reached

    model = network(8, 16)
    fit(model)
    small = without_lowest(model, timed("scoring", scores, model, train))
    print(json.dumps({"accuracy": fit(small), "stages": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
