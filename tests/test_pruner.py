import copy
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    PROPERTY,
    SEEDS,
    assert_same,
    random_data,
    random_filters,
    random_network,
    state_of,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cnn_pruning import (
    CNN,
    TaylorPruner,
    filter_scores,
    mask_filters,
    normalize,
    remove_filters,
    select_filters,
)


def images_for(network, seed=0):
    return random_data(network, size=3, seed=seed).tensors[0]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def digits(size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(size, 1, 28, 28, generator=generator)
    return TensorDataset(images, torch.arange(size) % 10)


def named(values):
    """Scores of layers called 0, 2, 4, as those of an nn.Sequential are."""
    return {str(2 * i): torch.tensor(row) for i, row in enumerate(values)}


# Removing and masking


@PROPERTY
@given(SEEDS)
def test_removed_and_masked_networks_have_the_same_logits(seed):
    network = random_network(seed)
    model, images = network.model.eval(), images_for(network, seed)
    filters = random_filters(network, seed)
    with mask_filters(model, filters, images):
        masked = model(images)
    # float64: rounding only, from sums of fewer terms
    torch.testing.assert_close(remove_filters(model, filters, images)(images), masked)


@PROPERTY
@given(SEEDS)
def test_removed_and_masked_cnns_have_the_same_logits(seed):
    rng = random.Random(seed)
    channels = tuple(rng.randint(1, 8) for _ in range(rng.randint(1, 4)))
    filters = {
        f"network.{2 * i}": rng.sample(range(width), rng.randint(0, width - 1))
        for i, width in enumerate(channels)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CNN(channels).double()
    images = digits().tensors[0].double()
    with mask_filters(model, filters):
        masked = model(images)
    small = remove_filters(model, filters)
    torch.testing.assert_close(small(images), masked)
    assert small.channels == tuple(
        width - len(gone) for width, gone in zip(channels, filters.values(), strict=True)
    )
    # Widths and a state_dict are all that is needed to build the network again.
    again = CNN(small.channels).double()
    again.load_state_dict(small.state_dict())
    assert_same(again(images), small(images))


@PROPERTY
@given(SEEDS)
def test_removing_leaves_the_network_untouched_and_shares_nothing_with_it(seed):
    network = random_network(seed)
    model = network.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    small = remove_filters(model, random_filters(network, seed), images_for(network))
    assert_same(state_of(model), before)
    assert all(p.grad is None for p in small.parameters())
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert_same(state_of(model), before)


@PROPERTY
@given(SEEDS)
def test_removing_keeps_flags_dtype_and_the_order_of_what_stays(seed):
    network = random_network(seed)
    rng = random.Random(seed)
    for module in network.model.modules():
        module.training = rng.random() < 0.5
    for parameter in network.model.parameters():
        parameter.requires_grad = rng.random() < 0.5
    filters = random_filters(network, seed)
    small = remove_filters(network.model, filters, images_for(network))
    assert [m.training for m in small.modules()] == [m.training for m in network.model.modules()]
    old = dict(network.model.named_parameters())
    assert list(old) == [name for name, _ in small.named_parameters()]
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == old[name].requires_grad
        assert parameter.dtype == torch.float64
        assert parameter.is_leaf
    for name, removed in filters.items():
        conv, pruned = network.model.get_submodule(name), small.get_submodule(name)
        kept = [k for k in range(conv.out_channels) if k not in removed]
        assert pruned.out_channels == len(pruned.weight) == len(kept)
        if conv.bias is not None:
            assert_same(pruned.bias, conv.bias[kept])


def test_a_filter_takes_its_weights_its_batch_norm_and_its_consumers_weights():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * 4, 2),
    )
    for tensor in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
        nn.init.uniform_(tensor)
    model[1].num_batches_tracked.fill_(7)
    small = remove_filters(model, {"0": [2, 0], "3": (1,)})
    rest, others = [1, 3], [0, 2]
    columns = [0, 1, 2, 3, 8, 9, 10, 11]  # of the Linear: 2 x 2 positions for each filter
    expected = {
        "0.weight": model[0].weight[rest],
        "1.weight": model[1].weight[rest],
        "1.bias": model[1].bias[rest],
        "1.running_mean": model[1].running_mean[rest],
        "1.running_var": model[1].running_var[rest],
        "1.num_batches_tracked": torch.tensor(7),
        "3.weight": model[3].weight[others][:, rest],
        "3.bias": model[3].bias[others],
        "6.weight": model[6].weight[:, columns],
        "6.bias": model[6].bias,
    }
    assert_same(dict(small.state_dict()), {name: v.detach() for name, v in expected.items()})
    assert [name for name, _ in small.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (2, 2, 2)
    assert (small[3].out_channels, small[6].in_features) == (2, 8)


@pytest.mark.parametrize(
    ("channels", "count"), [((8, 16), 126_698), ((7, 10), 79_120), ((2, 4, 8), 63_122)]
)
def test_parameter_counts(channels, count):
    assert parameters(CNN(channels)) == count


def test_removing_1_and_6_filters_gives_the_reference_network():
    small = remove_filters(CNN(), {"network.0": [3], "network.2": range(6)})
    assert small.channels == (7, 10)
    assert parameters(small) == 79_120


@PROPERTY
@given(SEEDS)
def test_a_removed_network_can_be_trained_and_pruned_again(seed):
    network = random_network(seed)
    data = random_data(network, size=4)
    images, labels = data.tensors
    small = remove_filters(network.model, random_filters(network, seed), images).eval()
    before = [p.clone() for p in small.parameters()]
    cross_entropy(small(images), labels).backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    # Not all of them: what lies before a dead ReLU has no gradient.
    assert any(not torch.equal(p, q) for p, q in zip(small.parameters(), before, strict=True))
    widths = {name: len(v) for name, v in filter_scores(small, data).items()}
    again = {name: [0] for name, width in widths.items() if width > 1}
    with mask_filters(small, again, images):
        masked = small(images)
    torch.testing.assert_close(remove_filters(small, again, images)(images), masked)


def test_nothing_to_remove_gives_an_equal_network():
    model, images = CNN((2, 3)), digits().tensors[0]
    for filters in ({}, {"network.0": []}):
        assert_same(remove_filters(model, filters)(images), model(images))
        with mask_filters(model, filters):
            masked = model(images)
        assert_same(masked, model(images))


@PROPERTY
@given(SEEDS)
def test_masked_feature_maps_are_zero_and_the_others_are_not_touched(seed):
    network = random_network(seed)
    model, x = network.model.eval(), images_for(network, seed)
    filters = random_filters(network, seed)
    first, *_ = filters  # one layer at a time, so that later layers see what masking it does
    end = network.feature_maps()[first] + 1
    later = (i for i, layer in enumerate(network.layers) if i >= end)
    taker = next(i for i in later if isinstance(network.layers[i], nn.Conv2d | nn.Linear))
    expected = x
    for layer in network.layers[:end]:
        expected = layer(expected)
    maps = expected.reshape(len(x), model.get_submodule(first).out_channels, -1).clone()
    maps[:, filters[first]] = 0
    expected = maps.reshape(expected.shape)
    for layer in network.layers[end:taker]:
        expected = layer(expected)
    taken = []
    with mask_filters(model, {first: filters[first]}, x), torch.no_grad():
        look = network.layers[taker].register_forward_pre_hook(lambda _, z: taken.append(z[0]))
        model(x)
    look.remove()
    assert_same(taken[0], expected.reshape(taken[0].shape))


def test_the_mask_is_behind_the_activation():
    # sigmoid(0) is 0.5: zeroing what goes into it would not zero the feature map
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sigmoid(), nn.Conv2d(3, 3, 1), nn.Flatten())
    model.append(nn.Linear(12, 2))
    nn.init.dirac_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    with mask_filters(model, {"0": [1]}):
        feature_map = model[:3](torch.rand(2, 1, 2, 2))
    assert (feature_map[:, 1] == 0).all()
    assert (feature_map[:, [0, 2]] > 0).all()


def test_a_whole_layer_can_be_masked_but_not_removed():
    model, images = CNN((2, 3)), digits().tensors[0]
    with mask_filters(model, {"network.2": range(3)}):
        logits = model(images)
    assert_same(logits, model.network[-1].bias.expand(4, 10))
    with pytest.raises(ValueError, match=r"network\.2 .*all of its 3 filters"):
        remove_filters(model, {"network.2": range(3)})


@PROPERTY
@given(SEEDS)
def test_masks_compose_and_are_gone_after_their_block(seed):
    network = random_network(seed)
    model, images = network.model.eval(), images_for(network)
    before, plain = state_of(model), model(images)
    one, other = random_filters(network, seed), random_filters(network, seed + 1)
    both = {name: sorted({*one[name], *other[name]}) for name in one}
    with mask_filters(model, both, images):
        expected = model(images)
    with mask_filters(model, one, images) as yielded:
        assert yielded is model
        outer = model(images)
        with mask_filters(model, other, images):
            assert_same(model(images), expected)
        assert_same(model(images), outer)
    assert_same(model(images), plain)
    assert_same(state_of(model), before)


def test_masks_are_gone_after_an_exception():
    network = random_network(3)
    before = state_of(network.model)
    with (
        pytest.raises(ArithmeticError),
        mask_filters(network.model, random_filters(network, 3), images_for(network)),
    ):
        raise ArithmeticError
    assert_same(state_of(network.model), before)


def test_a_masked_filter_scores_zero():
    model = CNN((3, 4))
    with mask_filters(model, {"network.0": [2], "network.2": [0, 3]}):
        scores = filter_scores(model, digits())
    assert scores["network.0"].eq(0).tolist() == [False, False, True]
    assert scores["network.2"].eq(0).tolist() == [True, False, False, True]


def test_one_activation_for_all_layers_is_supported():
    torch.manual_seed(0)
    act = nn.Sigmoid()
    shared = nn.Sequential(
        nn.Conv2d(1, 3, 3), act, nn.Conv2d(3, 4, 3), act, nn.Flatten(), nn.Linear(16, 5), act
    ).append(nn.Linear(5, 3))
    separate = copy.deepcopy(shared)
    for i in (3, 6):
        separate[i] = nn.Sigmoid()
    filters = {"0": [1], "2": [0, 3]}
    data = TensorDataset(torch.rand(3, 1, 6, 6), torch.arange(3))
    images = data.tensors[0]
    assert_same(filter_scores(shared, data), filter_scores(separate, data))
    with mask_filters(shared, filters), mask_filters(separate, filters):
        assert_same(shared(images), separate(images))
    assert_same(remove_filters(shared, filters)(images), remove_filters(separate, filters)(images))


# What can't be named


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"network.1": [0]}, r"'network\.1' is not a layer .*'network\.0', 'network\.2'"),
        ({"nonsense": []}, r"'nonsense' is not a layer .*'network\.0', 'network\.2'"),
        ({"network.0": [3]}, r"network\.0 has filters 0 to 2, but \[3\]"),
        ({"network.0": [0, -1]}, r"network\.0 has filters 0 to 2, but \[-1\]"),
        ({"network.0": [1, 1]}, r"network\.0 .*twice"),
        ({"network.0": [1.0]}, r"network\.0 must be a list of integers, but they are \[1\.0\]"),
        ({"network.0": "12"}, r"network\.0 must be a list of integers"),
        ({"network.0": 1}, r"network\.0 must be a list of integers"),
        ({"network.0": [0], "network.2": [None]}, r"network\.2 must be a list of integers"),
    ],
)
def test_filters_that_do_not_exist_are_an_error_that_names_the_layer(filters, message):
    model = CNN((3, 4))
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        remove_filters(model, filters)
    with pytest.raises(ValueError, match=message), mask_filters(model, filters):
        pytest.fail("the block must not run")
    assert_same(state_of(model), before)


def test_filters_can_be_any_integers():
    model = CNN((4,))
    expected = remove_filters(model, {"network.0": [0, 2]}).state_dict()
    for indices in ({2, 0}, (2, 0), torch.tensor([2, 0]), range(0, 3, 2), iter([2, 0])):
        assert_same(remove_filters(model, {"network.0": indices}).state_dict(), expected)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


class Forked(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def around(*layers):
    """``layers`` take and give 4 channels of 6 x 6; the first is the network's layer 2."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *layers, nn.Flatten(), nn.Linear(144, 3)
    )


def used_twice(layer):
    return around(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("model", "scored", "said"),
    [
        (around(nn.Conv2d(4, 4, 3, padding=1, groups=2)), {"0": 2, "2": 2}, ""),
        (around(nn.Sequential(Residual())), {"0": 4}, ""),
        (around(nn.LayerNorm(6)), {}, "0: 2 is a LayerNorm"),
        (around(nn.GroupNorm(2, 4)), {"0": 2}, ""),
        (around(nn.ConvTranspose2d(4, 4, 3, padding=1)), {"0": 4, "2": 4}, ""),
        (around(nn.Softmax(1)), {}, "0: softmax behind them uses several of them at once"),
        (around(nn.PReLU(4)), {"0": 4}, ""),
        (used_twice(nn.Conv2d(4, 4, 3, padding=1)), {"0": 4}, ""),
        (used_twice(nn.BatchNorm2d(4)), {"0": 4}, ""),
        (around(nn.Flatten(1, 2), nn.Unflatten(1, (4, 6))), {}, "0: .*view"),
        (around(nn.Flatten(2), nn.Unflatten(2, (6, 6))), {}, "0: .*view"),
        (around(Forked()), {}, "depends on values that it computes"),
    ],
)
def test_other_networks_are_read_from_images_and_cut_exactly_or_not(model, scored, said):
    data = TensorDataset(torch.rand(2, 1, 6, 6), torch.arange(2))
    model.eval()(data.tensors[0])  # PyTorch has no objection
    before = state_of(model)
    if said:
        for use in (
            lambda: filter_scores(model, data),
            lambda: remove_filters(model, {"0": [0]}, data),
            lambda: TaylorPruner(model).score(data),
        ):
            with pytest.raises(TypeError, match=said.replace("0: ", "")):
                use()
    else:
        scores = filter_scores(model, data)
        assert {name: len(values) for name, values in scores.items()} == scored
        gone = {name: [0] for name in scores}
        with mask_filters(model, gone, data):
            masked = model(data.tensors[0])
        torch.testing.assert_close(remove_filters(model, gone, data)(data.tensors[0]), masked)
    assert_same(state_of(model), before)


def test_a_linear_layer_across_an_image_mixes_its_columns_and_not_its_channels():
    model = around(nn.Linear(6, 6)).eval()
    data = TensorDataset(torch.rand(2, 1, 6, 6), torch.arange(2))
    with pytest.raises(TypeError, match="no filters that could go"):
        filter_scores(model, data)


def test_a_layer_whose_size_does_not_go_with_the_filters_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(145, 3))
    with pytest.raises(TypeError, match=r"2 takes 145 values of 4 filters"):
        remove_filters(model, {"0": [1]})
    with pytest.raises(ValueError, match="The network can't take a batch"):
        filter_scores(model, TensorDataset(torch.rand(2, 1, 6, 6), torch.arange(2)))


def test_the_new_network_has_none_of_the_gradients_of_the_old():
    model = around()
    model(torch.rand(2, 1, 6, 6)).sum().backward()
    small = remove_filters(model, {"0": [1]})
    assert all(parameter.grad is None for parameter in small.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


# Selecting


def lowest_by_brute_force(scores, n, min_filters, normalized, keep=()):
    """Take the lowest filter that may go, n times."""
    left = {}
    for position, (layer, values) in enumerate(scores.items()):
        values = values.double()
        scale = values.norm().item() if normalized and values.any() else 1.0
        # float32, as the scores are: what ties there must tie here
        shown = (values / scale).float().tolist()
        left[layer] = [(value, position, k) for k, value in enumerate(shown)]
    chosen = {layer: [] for layer in scores}
    for _ in range(n):
        open_layers = [k for k in left if len(left[k]) > min_filters and k not in keep]
        layer = min(open_layers, key=lambda name: min(left[name]))
        lowest = min(left[layer])
        left[layer].remove(lowest)
        chosen[layer].append(lowest[2])
    return {layer: sorted(indices) for layer, indices in chosen.items()}


# Powers of two, few of them: many ties, which float32 holds exactly
SCORES = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=6),
    min_size=1,
    max_size=3,
)


@PROPERTY
@given(SCORES, st.integers(1, 3), st.data())
def test_exactly_the_n_lowest_are_selected_and_min_filters_stay(values, min_filters, data):
    scores = named(values)
    before = copy.deepcopy(scores)
    keep = data.draw(st.lists(st.sampled_from(list(scores)), unique=True))
    spare = sum(max(0, len(v) - min_filters) for k, v in scores.items() if k not in keep)
    n = data.draw(st.integers(0, spare))
    selected = select_filters(scores, n, min_filters, keep)
    assert list(selected) == list(scores)
    assert sum(map(len, selected.values())) == n
    for layer, indices in selected.items():
        assert len(scores[layer]) - len(indices) >= min(min_filters, len(scores[layer]))
        assert not (layer in keep and indices)
    assert selected == lowest_by_brute_force(scores, n, min_filters, False, keep)
    assert_same(scores, before)


@PROPERTY
@given(SEEDS)
def test_normalized_scores_put_layers_of_any_size_on_one_scale(seed):
    rng = random.Random(seed)
    # Layers of very different sizes, so that the raw order is another one; no near ties
    values = [[scale * (rng.random() + 0.01) for _ in range(5)] for scale in (1.0, 1e-4)]
    scores = named(values)
    for n in range(9):
        expected = lowest_by_brute_force(scores, n, 1, normalized=True)
        assert select_filters(normalize(scores), n) == expected
    raw = select_filters(scores, 4)
    assert (raw["0"], len(raw["2"])) == ([], 4)


def test_ties_go_by_layer_then_by_index():
    scores = named([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5]])
    assert [select_filters(scores, n) for n in range(5)] == [
        {"0": [], "2": []},
        {"0": [1], "2": []},
        {"0": [1, 2], "2": []},
        {"0": [1, 2], "2": [0]},
        {"0": [1, 2], "2": [0, 2]},
    ]


def test_ties_go_by_the_order_of_the_layers_not_of_their_names():
    # As text, "10" comes before "2".
    assert select_filters(named([[1.0, 1.0]] * 6), 2) == {
        "0": [0],
        "2": [0],
        "4": [],
        "6": [],
        "8": [],
        "10": [],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_an_error_that_names_the_layer(value):
    for n in (0, 1):
        with pytest.raises(ValueError, match=r"^2 has scores that are not finite"):
            select_filters(named([[1.0, 2.0], [1.0, value]]), n)


@pytest.mark.parametrize("n", [4, 100, -1, 1.0, "1", None, True])
def test_a_number_that_can_not_be_removed_is_an_error_that_says_what_can(n):
    scores = named([[1.0, 2.0, 3.0], [1.0], [1.0, 2.0, 3.0, 4.0]])
    select_filters(scores, 3, min_filters=2)
    with pytest.raises(ValueError, match=r"min_filters=2.* 0 to 3 \(1 of 0, 0 of 2, 2 of 4\)"):
        select_filters(scores, n, min_filters=2)
    with pytest.raises(ValueError, match=repr(n)):
        select_filters(scores, n, min_filters=2)


def test_layers_to_keep_are_named_as_they_are():
    scores = named([[1.0, 2.0], [3.0, 4.0]])
    assert select_filters(scores, 1, keep="0") == {"0": [], "2": [0]}
    with pytest.raises(ValueError, match="keep names conv1, but the layers are 0, 2"):
        select_filters(scores, 1, keep=["conv1"])
    with pytest.raises(ValueError, match=r"0 to 1 \(0 of 0, 1 of 2\)"):
        select_filters(scores, 2, keep=["0"])
    for keep in (None, 1, [1], [["0"]], itertools.repeat("0")):  # the last one never ends
        with pytest.raises(TypeError, match="keep must be a list of names of layers"):
            select_filters(scores, 1, keep=keep)
        with pytest.raises(TypeError, match="keep must be a list of names of layers"):
            TaylorPruner(CNN((2,)), keep=keep)


@pytest.mark.parametrize(
    "scores",
    [
        *(None, [1.0], {"0": [1.0]}, {"0": torch.ones(2, 2)}, {"0": torch.tensor([True])}),
        *(
            {0: torch.ones(2)},
            {"0": torch.ones(2, device="meta")},
            {"0": torch.eye(2)[0].to_sparse()},
        ),
    ],
)
def test_what_are_not_scores_are_an_error_that_says_what_scores_are(scores):
    for use in (normalize, lambda s: select_filters(s, 1)):
        with pytest.raises(TypeError, match=r"[Ss]cores .*tensor"):
            use(scores)


@pytest.mark.parametrize("min_filters", [0, -1, 1.5, True])
def test_min_filters_is_at_least_1(min_filters):
    with pytest.raises(ValueError, match="min_filters"):
        TaylorPruner(CNN((2,)), min_filters=min_filters)
    with pytest.raises(ValueError, match="min_filters"):
        select_filters(named([[1.0, 2.0]]), 1, min_filters)


def test_an_unknown_criterion_is_an_error_from_the_start():
    with pytest.raises(ValueError, match="'taylor'"):
        TaylorPruner(CNN((2,)), criterion="tailor")


def test_the_pruner_selects_as_the_functions_do():
    model, data = CNN((5, 6)), digits(8)
    scores = filter_scores(model, data)
    for normalized in (True, False):
        pruner = TaylorPruner(model, normalize=normalized, min_filters=2, keep=["network.0"])
        pruner.score(data)
        compared = normalize(scores) if normalized else scores
        expected = select_filters(compared, 3, min_filters=2, keep=["network.0"])
        assert pruner.select(3) == expected
        assert pruner.prune(3).channels == (5, 3)


def test_selecting_before_scoring_is_an_error():
    pruner = TaylorPruner(CNN((2, 3)))
    assert pruner.scores is None
    for use in (pruner.select, pruner.prune):
        with pytest.raises(RuntimeError, match="score"):
            use(1)


def test_the_pruner_keeps_the_scores_that_it_returns():
    torch.manual_seed(0)
    model, data = CNN((3, 4)), digits()
    pruner = TaylorPruner(model, criterion=lambda z, g: z.mean(2))
    scores = pruner.score(data)
    assert_same(scores, filter_scores(model, data, lambda z, g: z.mean(2)))
    assert_same(pruner.scores, scores)


def test_the_pruner_keeps_its_scores_when_scoring_anew_fails():
    torch.manual_seed(0)
    pruner = TaylorPruner(CNN((3, 4)))
    scores = copy.deepcopy(pruner.score(digits()))
    with pytest.raises(ValueError, match="can't take"):
        pruner.score(TensorDataset(torch.rand(2, 3, 9, 9), torch.tensor([0, 1])))
    assert_same(pruner.scores, scores)


@PROPERTY
@given(SEEDS)
def test_pruning_removes_what_was_selected_and_leaves_the_network_untouched(seed):
    network = random_network(seed)
    before = state_of(network.model)
    pruner = TaylorPruner(network.model)
    scores = copy.deepcopy(pruner.score(random_data(network)))
    n = sum(len(values) - 1 for values in scores.values()) // 2
    small = pruner.prune(n)
    assert_same(
        small.state_dict(),
        remove_filters(network.model, pruner.select(n), images_for(network)).state_dict(),
    )
    widths = [small.get_submodule(name).out_channels for name in scores]
    assert sum(map(len, scores.values())) - sum(widths) == n
    assert_same(pruner.scores, scores)
    assert pruner.model is network.model
    assert_same(state_of(network.model), before)
