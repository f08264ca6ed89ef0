"""Every pruned version of a network: all 16,777,216 subsets of its 24 filters, for notebook 8.

    uv run python notebooks/long_runs/every_network.py

takes some seven minutes a network on two cores; a CUDA GPU is used if there is one. It writes

- every_network_pairs.csv: for every pair of widths the best loss, the worst, quantiles between
  them, and the best subset,
- every_network_sizes.csv: the loss at given ranks among all networks with equally many filters,
- every_network_choices.csv: what each method keeps at each size, and what that costs,
- every_network_filters.csv: what each method says about each filter.

The networks are those that trained.py has stored. The rows of each network that is done are kept
in the folder every_network.part, so the program can be stopped, and goes on where it was.

A subset is the number whose 24 bits are the gates: first the 8 filters of the first layer, then the
16 of the second, the highest bit first.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from cnn_pruning import (
    CNN,
    fashion_mnist,
    filter_scores,
    normalize,
    remove_filters,
    select_filters,
)

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy
from torch.utils.data import TensorDataset

try:
    from long_runs import trained, whole_tables
except ImportError:  # run as a program
    import trained
    import whole_tables

SEEDS = trained.SEEDS  # of the documented run
CHANNELS = trained.CHANNELS
FIRST, SECOND = CHANNELS
K = sum(CHANNELS)
LAYERS = ("network.0", "network.2")
IMAGES = 5_000  # training images, of the loss; the accuracy is that of all validation images
PIECE = {"cpu": 20, "cuda": 200}  # images at a time: small pieces stay in a processor's cache
DRAWS = 4  # second layers for each first layer and width, of the mean accuracy of random choices
PAIRS = whole_tables.FOLDER / "every_network_pairs.csv"
SIZES = whole_tables.FOLDER / "every_network_sizes.csv"
CHOICES = whole_tables.FOLDER / "every_network_choices.csv"
FILTERS = whole_tables.FOLDER / "every_network_filters.csv"
PERCENT = (0, 0.01, 0.1, 1, 2, 5, *range(10, 100, 10), 95, 98, 99, 99.9, 99.99, 100)


def settings(seeds: Sequence[int]) -> dict:
    return {
        "seeds": [*seeds],
        "channels": [*CHANNELS],
        "training": trained.TRAINING,
        "images": IMAGES,
    }


# Subsets


def gates(width: int) -> Tensor:
    """Every subset of ``width`` filters, (2^width, width); the row is the subset's number."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=width)))


def subset_of(kept: dict[str, Sequence[int]]) -> int:
    """The number of the subset that keeps these filters, by layer."""
    first, second = (kept.get(layer, ()) for layer in LAYERS)
    places = [*first, *(FIRST + k for k in second)]
    return sum(1 << (K - 1 - place) for place in places)


def kept_of(subset: int) -> dict[str, list[int]]:
    """The filters that a subset keeps, by layer."""
    places = [place for place in range(K) if subset >> (K - 1 - place) & 1]
    return {
        LAYERS[0]: [place for place in places if place < FIRST],
        LAYERS[1]: [place - FIRST for place in places if place >= FIRST],
    }


def removed_of(subset: int) -> dict[str, list[int]]:
    """The filters that a subset leaves out, by layer."""
    return kept_of(~subset)


def macs_of(first: int, second: int) -> int:
    """The multiply-adds of a network with these widths, as ``count_macs`` counts them."""
    return 784 * (9 * first + 9 * first * second + 10 * second)


def parameters_of(first: int, second: int) -> int:
    return 10 * first + (9 * first + 1) * second + 7840 * second + 10


def mean_macs(size: int) -> float:
    """The multiply-adds of all networks of a size, in the mean."""
    shapes = [(i, size - i) for i in range(max(1, size - SECOND), min(FIRST, size - 1) + 1)]
    counts = [math.comb(FIRST, i) * math.comb(SECOND, j) for i, j in shapes]
    costs = [macs_of(*shape) for shape in shapes]
    return sum(n * cost for n, cost in zip(counts, costs, strict=True)) / sum(counts)


# Losses


@torch.no_grad()
def contributions(network: CNN, images: Tensor, piece: int = 20) -> Iterator[tuple[slice, Tensor]]:
    """Yield, for a few images at a time, what each filter of the second layer adds to the logits.

    With each slice of the images comes (256, 16, N, 10): the first index is the subset of the first
    layer. A pre-activation of the second layer is a sum over filters of the first, so those of two
    halves of that layer, with 16 subsets each, add up to all 256.
    """
    conv1, _, conv2, *_, linear = network.network
    weights = linear.weight.unflatten(1, (SECOND, -1)).permute(1, 2, 0).contiguous()
    half = gates(FIRST // 2).to(images.device)
    for start in range(0, len(images), piece):
        where = slice(start, start + piece)
        z = conv1(images[where]).relu_()
        parts = [
            conv2d(z[:, j : j + 1], conv2.weight[:, j : j + 1], padding=1)
            .flatten(2)
            .transpose(0, 1)
            for j in range(FIRST)
        ]
        parts = torch.stack(parts)  # (8, 16, N, 784)
        left = torch.einsum("ij,j...->i...", half, parts[: FIRST // 2])
        left += conv2.bias.view(-1, 1, 1)
        right = torch.einsum("ij,j...->i...", half, parts[FIRST // 2 :])
        yield (
            where,
            torch.stack([torch.bmm((a + b).relu_(), weights) for a in left for b in right]),
        )


@torch.no_grad()
def all_losses(network: CNN, images: Tensor, labels: Tensor) -> Tensor:
    """The mean loss (nats) of every subset, float32 (256, 65536) on the CPU: first layer by second.

    The loss of an image is log sum exp(logit - logit of the label), and the logits are a sum over
    filters. So for all pairs of two halves of the second layer, with 256 subsets each, the sums are
    one matrix product.
    """
    bits, bias = gates(SECOND // 2).to(images.device), network.network[-1].bias
    total = torch.zeros(2**FIRST, 2**SECOND, dtype=torch.float64, device=images.device)
    for where, c in contributions(network, images, PIECE[images.device.type]):
        label = labels[where]
        c -= c.gather(3, label.view(1, 1, -1, 1).expand(*c.shape[:2], -1, 1))
        offset = bias - bias[label][:, None]
        for row, each in zip(total, c, strict=True):
            a = (torch.einsum("ik,knc->nic", bits, each[: SECOND // 2]) + offset[:, None]).exp_()
            b = torch.einsum("jk,knc->ncj", bits, each[SECOND // 2 :]).exp_()
            for some, part in zip(a.split(64, dim=1), row.chunk(4), strict=True):  # in the cache
                sums = torch.bmm(some, b).flatten(1)  # each at least 1, which is the label's
                if len(sums) % 2 == 0:  # half as many logarithms
                    sums = sums[::2] * sums[1::2]
                part += sums.log_().sum(0)
    if not total.isfinite().all():
        raise ValueError("Some losses overflow: this network's logits are too large for float32.")
    return (total / len(images)).float().cpu()


@torch.no_grad()
def accuracies(network: CNN, images: Tensor, labels: Tensor, subsets: Sequence[int]) -> Tensor:
    """The accuracy of each of ``subsets``, float64 on the CPU."""
    bits, bias = gates(SECOND).to(images.device), network.network[-1].bias
    subsets = torch.tensor(subsets, device=images.device)
    first, second = subsets >> SECOND, subsets % 2**SECOND
    places = {i: (first == i).nonzero().flatten() for i in first.unique().tolist()}
    correct = torch.zeros(len(subsets), dtype=torch.float64, device=images.device)
    for where, c in contributions(network, images, PIECE[images.device.type]):
        for i, place in places.items():
            logits = torch.einsum("sk,knc->snc", bits[second[place]], c[i]) + bias
            correct[place] += (logits.argmax(2) == labels[where]).sum(1)
    return correct.cpu() / len(images)


# Sizes


def widths() -> tuple[Tensor, Tensor]:
    """How many filters of each layer every subset keeps, (256, 1) and (1, 65536)."""
    return gates(FIRST).sum(1).int()[:, None], gates(SECOND).sum(1).int()[None]


def sizes() -> Tensor:
    """How many filters every subset keeps, (16777216,); 0 if a layer keeps none.

    Such a subset isn't a network that could be built.
    """
    first, second = widths()
    return torch.where((first > 0) & (second > 0), first + second, 0).flatten().byte()


def number_of(size: int) -> int:
    """How many networks have ``size`` filters, at least one in each layer."""
    return math.comb(K, size) - math.comb(FIRST, size) - math.comb(SECOND, size)


def stored_ranks(number: int) -> list[int]:
    """The ranks whose loss is stored: the best 32, every fourth step of five percent, the last."""
    ranks = [*range(1, min(32, number) + 1)]
    while ranks[-1] < number:
        ranks.append(min(number, math.ceil(1.05 * ranks[-1])))
    return [*ranks[:32], *ranks[35:-1:4], *ranks[32:][-1:]]


# What the methods choose


def in_order(scores: dict[str, Tensor]) -> dict[int, int]:
    """The subset of every size that keeps the highest scores, with one filter a layer at least."""
    return {K - n: ~subset_of(select_filters(scores, n)) & (2**K - 1) for n in range(K - 1)}


def scored_anew(network: CNN, data: TensorDataset, normalized: bool) -> dict[int, int]:
    """Taylor, one filter at a time, and scored again after each."""
    kept = kept_of(2**K - 1)
    found = {K: 2**K - 1}
    for size in range(K - 1, 1, -1):
        scores = filter_scores(network, data)
        chosen = select_filters(normalize(scores) if normalized else scores, 1)
        network = remove_filters(network, chosen)
        for layer, gone in chosen.items():
            kept[layer] = [k for i, k in enumerate(kept[layer]) if i not in gone]
        found[size] = subset_of(kept)
    return found


def greedy(losses: Tensor, sizes: Tensor) -> dict[int, int]:
    """Remove the filter without which the loss is lowest, and so on."""
    found = {K: 2**K - 1}
    for size in range(K - 1, 1, -1):
        one_less = [found[size + 1] & ~(1 << bit) for bit in range(K)]
        possible = [subset for subset in one_less if sizes[subset] == size]
        found[size] = min(possible, key=lambda subset: losses[subset].item())
    return found


def lowest(values: Tensor, sizes: Tensor) -> dict[int, int]:
    """The subset of every size with the lowest value."""
    found = {}
    for size in range(2, K + 1):
        peers = (sizes == size).nonzero().flatten()
        found[size] = peers[values[peers].argmin()].item()
    return found


def shapley(losses: Tensor) -> Tensor:
    """The Shapley values of the filters, float64 (24,), where a set of filters is worth -loss.

    A filter's value is what it adds to the filters before it, in the mean over all 24! orders.
    """
    count = torch.arange(K + 1, dtype=torch.float64)
    orders = torch.lgamma(count + 1)
    joins = (orders + orders.flip(0) - orders[K]).exp()  # s! (24 - s)! / 24!
    with_it = joins / count.clamp(min=1)  # (s - 1)! (24 - s)! / 24!, in a set of s
    without = joins / (K - count).clamp(min=1)  # s! (23 - s)! / 24!, in a set of s without it
    first, second = widths()
    size = (first + second).flatten()
    value = -losses.double()
    everywhere, within = without[size] * value, (with_it + without)[size] * value
    total = everywhere.sum()
    return torch.stack([within.view(2**k, 2, -1)[:, 1].sum() - total for k in range(K)])


def quadratic(network: CNN, data: TensorDataset) -> tuple[float, Tensor, Tensor]:
    """The mean loss with all gates open, its gradient (24,) and Hessian (24, 24) in the gates.

    A gate of the first layer also acts through the ReLUs of the second. Their kinks have no part
    in a derivative.
    """
    conv1, _, conv2, *_, linear = network.network
    images, labels = data.tensors
    whole = torch.ones(K, device=images.device)
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in ((), (K,), (K, K))]
    for some, label in zip(images.split(100), labels.split(100), strict=True):

        def loss(g: Tensor, some: Tensor = some, label: Tensor = label) -> Tensor:
            z = conv1(some).relu() * g[:FIRST].view(-1, 1, 1)
            z = conv2(z).relu() * g[FIRST:].view(-1, 1, 1)
            return cross_entropy(linear(z.flatten(1)), label, reduction="sum")

        g = whole.clone().requires_grad_()
        value = loss(g)
        (slope,) = torch.autograd.grad(value, g, create_graph=True)
        curved = [torch.autograd.grad(each, g, retain_graph=True)[0] for each in slope]
        for total, part in zip(sums, (value, slope, torch.stack(curved)), strict=True):
            total += part.detach().cpu()
    value, slope, curvature = (total / len(images) for total in sums)
    return value.item(), slope, curvature


def approximated(value: float, slope: Tensor, curvature: Tensor) -> Tensor:
    """The second-order Taylor expansion of the loss at every subset, float32 (16777216,)."""
    half = K // 2
    step = gates(half).double() - 1
    own = [
        step @ slope[part] + ((step @ curvature[part, part]) * step).sum(1) / 2
        for part in (slice(half), slice(half, K))
    ]
    cross = step @ curvature[:half, half:] @ step.T
    return (value + own[0][:, None] + own[1] + cross).float().flatten()


# Tables


def text_of(subset: int) -> str:
    """The gates of a subset, layer by layer: "11111111-1111111111111111" is the whole network."""
    bits = f"{subset:0{K}b}"
    return f"{bits[:FIRST]}-{bits[FIRST:]}"


def shape_of(text: str) -> tuple[int, int]:
    """How many filters of each layer the subset keeps that ``text_of`` wrote."""
    first, second = text.split("-")
    return first.count("1"), second.count("1")


def number(text: str) -> int:
    """The subset that ``text_of`` wrote."""
    return int(text.replace("-", ""), 2)


def rank_of(loss: Tensor, peers: Tensor) -> int:
    """One more than the number of ``peers`` that are better, beyond the rounding of float32."""
    return int((peers < loss - 1e-6).sum()) + 1


def rows_of_seed(
    seed: int, folder: Path, train: TensorDataset, val: TensorDataset, network: CNN
) -> dict:
    """The rows of every table, by the table's file name; on a GPU, if there is one."""
    kept = whole_tables.Rows(folder / "every_network.part" / f"{seed}.jsonl", settings([seed]))
    if not kept.rows:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = network.to(device)
        data = TensorDataset(*(each.to(device) for each in train[:IMAGES]))
        val = TensorDataset(*(each.to(device) for each in val.tensors))
        kept.add(rows_of_table(seed, data, val, network, all_losses(network, *data.tensors)))
    return kept.rows[0]


def rows_of_table(
    seed: int, data: TensorDataset, val: TensorDataset, network: CNN, table: Tensor
) -> dict:
    losses, size = table.flatten(), sizes()
    raw, weights = filter_scores(network, data), filter_scores(network, None, "weight")
    oracle = filter_scores(network, data, "oracle_abs")
    value, slope, curvature = quadratic(network, data)
    worth = shapley(losses)
    found = {
        "optimum": lowest(losses, size),
        "taylor, raw": in_order(raw),
        "taylor, normalized": in_order(normalize(raw)),
        "taylor, raw, re-scored": scored_anew(network, data, False),
        "taylor, normalized, re-scored": scored_anew(network, data, True),
        "oracle": in_order(oracle),
        "greedy oracle": greedy(losses, size),
        "weights, raw": in_order(weights),
        "weights, normalized": in_order(normalize(weights)),
        "shapley": in_order(dict(zip(LAYERS, worth.split(CHANNELS), strict=True))),
        "quadratic": lowest(approximated(value, slope, curvature), size),
    }
    pairs = rows_of_pairs(seed, table)
    by_chance = drawn()
    asked = [subset for by_size in found.values() for subset in by_size.values()]
    asked += [row["best"] for row in pairs]
    subsets = [*dict.fromkeys(asked)]
    accuracy = accuracies(network, *val.tensors, subsets + by_chance)
    known = dict(zip(subsets, accuracy.tolist(), strict=False))
    for row in pairs:
        row |= {"best": text_of(row["best"]), "val_accuracy": known[row["best"]]}
    choices, ranks = [], []
    for s in range(2, K + 1):
        peers = losses[size == s].sort().values
        best = losses[found["optimum"][s]]
        for method, by_size in found.items():
            subset = by_size[s]
            row = {"seed": seed, "method": method, "size": s, "subset": text_of(subset)}
            row |= {"loss": losses[subset].item(), "rank": rank_of(losses[subset], peers)}
            excess = (losses[subset] - best).item()
            choices.append(row | {"excess": excess, "val_accuracy": known[subset]})
        mean = peers.double().mean()
        row = {"seed": seed, "method": "random, mean", "size": s, "subset": "", "loss": mean.item()}
        row |= {"rank": rank_of(mean, peers), "excess": (mean - best).item()}
        choices.append(row | {"val_accuracy": mean_by_chance(accuracy[len(subsets) :], s)})
        for rank in stored_ranks(len(peers)):
            loss = round(peers[rank - 1].item(), 6)
            ranks.append({"seed": seed, "size": s, "of": len(peers), "rank": rank, "loss": loss})
    filters = []
    for layer in LAYERS:
        for k in range(len(raw[layer])):
            place = k if layer == LAYERS[0] else FIRST + k
            row = {"seed": seed, "layer": layer, "filter": k, "shapley": worth[place].item()}
            row |= {"taylor": raw[layer][k].item(), "oracle_abs": oracle[layer][k].item()}
            row |= {"weight": weights[layer][k].item(), "slope": slope[place].item()}
            filters.append(row | {"curvature": curvature[place, place].item()})
    return {
        PAIRS.name: pairs,
        SIZES.name: ranks,
        CHOICES.name: rounded(choices),
        FILTERS.name: filters,
    }


def rounded(rows: list[dict]) -> list[dict]:
    return [{k: round(v, 6) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


def quantiles(ordered: Tensor) -> Tensor:
    """The values at ``PERCENT`` of the way through ``ordered``, which begins with the lowest."""
    shares = torch.tensor(PERCENT, dtype=torch.float64) / 100
    return ordered[(shares * (len(ordered) - 1)).round().long()]


def rows_of_pairs(seed: int, table: Tensor) -> list[dict]:
    first, second = (each.flatten() for each in widths())
    rows = []
    for i in range(FIRST + 1):
        for j in range(SECOND + 1):
            these, those = ((w == n).nonzero().flatten() for w, n in ((first, i), (second, j)))
            losses = table[these][:, those].flatten()
            values, order = losses.sort()
            row, column = divmod(order[0].item(), len(those))
            best = (these[row] << SECOND | those[column]).item()
            at = quantiles(values).tolist()
            at = {f"{p}%": round(loss, 5) for p, loss in zip(PERCENT, at, strict=True)}
            new = {"seed": seed, "first": i, "second": j, "networks": len(values), "best": best}
            rows.append(new | at)
    return rows


def drawn() -> list[int]:
    """``DRAWS`` second layers of every width, for every first layer; in this order."""
    generator = torch.Generator().manual_seed(0)
    subsets = []
    for i in range(1, 2**FIRST):
        for j in range(1, SECOND + 1):
            for _ in range(DRAWS):
                kept = torch.randperm(SECOND, generator=generator)[:j].tolist()
                subsets.append(i << SECOND | subset_of({LAYERS[1]: kept}))
    return subsets


def mean_by_chance(accuracy: Tensor, size: int) -> float:
    """The mean accuracy of random networks of a size, from that of the networks in ``drawn()``."""
    by_shape = accuracy.view(2**FIRST - 1, SECOND, DRAWS).mean(2)
    first = widths()[0].flatten()[1:]
    second = torch.arange(1, SECOND + 1)
    number = torch.tensor([math.comb(SECOND, j) for j in second.tolist()], dtype=torch.float64)
    weight = number * (first[:, None] + second == size)
    return ((weight * by_shape).sum() / weight.sum()).item()


def main(given: list[str] | None = None) -> None:
    seeds, folder = whole_tables.arguments(__doc__, SEEDS, given)
    networks = trained.networks(seeds)
    train, val, _ = fashion_mnist()
    torch.backends.cudnn.allow_tf32 = False  # a GPU's losses are then a CPU's, but for rounding
    tables = {name: [] for name in (PAIRS.name, SIZES.name, CHOICES.name, FILTERS.name)}
    for seed, network in zip(seeds, networks, strict=True):
        for name, rows in rows_of_seed(seed, folder, train, val, network).items():
            tables[name] += rows
    whole_tables.write({folder / name: rows for name, rows in tables.items()}, settings(seeds))


if __name__ == "__main__":
    main()
