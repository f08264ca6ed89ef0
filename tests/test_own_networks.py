"""A user's own network, from training to the disk: what PyTorch trains is trained and pruned."""

import copy
import warnings

import numpy as np
import pytest
import torch
from networks import assert_same, state_of
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cnn_pruning import (
    CNN,
    TaylorPruner,
    evaluate,
    filter_scores,
    fit,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.iterative import prune_iteratively
from cnn_pruning.measure import count_macs, count_parameters, latency


def images_of(size=12, shape=(1, 8, 8), classes=3):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.rand(size, *shape, generator=generator), torch.arange(size) % classes
    )


DATA = images_of()


def network(*last, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3), *last),
    )


def normed():
    """Behind a pooling to one value, batch norm needs two images in training."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    )


# Training


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)).view(x.size(0), -1))


@pytest.mark.parametrize("make", [Views, lambda: network(channels=3), lambda: CNN((2, 3))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_keeps_the_memory_layout_and_views_go_on_working(make, layout):
    model = make()
    data = images_of(shape=(1, 28, 28) if isinstance(model, CNN) else (3, 8, 8))
    if not isinstance(model, Views):
        model.to(memory_format=layout)
    strides = [p.stride() for p in model.parameters()]
    fit(model, data, data, epochs=1)
    assert [p.stride() for p in model.parameters()] == strides
    if isinstance(model, Views):
        model(data.tensors[0])


def test_measuring_takes_networks_with_views_too():
    assert latency(Views(), batch_size=2, repeats=2, image_shape=(3, 8, 8))
    assert count_macs(Views(), (3, 8, 8)) == 36 * 4 * 27 + 4 * 36 * 3


def test_half_precision_and_other_ranks_are_trained_as_they_are():
    half = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    half = half.append(nn.Linear(144, 3)).to(torch.bfloat16)
    data = TensorDataset(DATA.tensors[0].to(torch.bfloat16), DATA.tensors[1])
    fit(half, data, data, epochs=1)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    solid = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3))
    data = images_of(shape=(1, 6, 6, 6))
    fit(solid, data, data, epochs=1)


@pytest.mark.parametrize("frozen", [["0"], ["0", "2"], ["0", "2", "6"]])
def test_frozen_layers_are_scored_by_every_path(frozen):
    model = network()
    expected = filter_scores(model, DATA)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    for criterion in ("taylor", "obd", "taylor_abs_last"):
        filter_scores(model, DATA, criterion)
    torch.testing.assert_close(filter_scores(model, DATA), expected)
    if len(frozen) < 3:
        before = copy.deepcopy(model.state_dict())
        step = next(prune_iteratively(model, DATA, DATA, filters=8, updates=1, batch_size=12))
        free = {f"{i}.{n}" for i in "026" if i not in frozen for n in ("weight", "bias")}
        assert free
        # One update on all images sees the network as it is: the scores are those of a pass.
        assert step.removed == select_filters(normalize(expected), 1)
        assert_same(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("train", [fit, lambda m, *d, **_: next(iterate(m, *d))])
def test_what_cannot_be_trained_is_refused_before_the_first_update(train):
    still = network().requires_grad_(False)
    cases = [(still, DATA, "no parameter to train"), (normed(), images_of(13), "single image")]
    for model, data, message in cases:
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            train(model, data, data, epochs=1, batch_size=6)
        assert_same(state_of(model), before)
    fit(network(nn.BatchNorm1d(3)), images_of(12), DATA, epochs=1, batch_size=6)


def iterate(model, train, val):
    return prune_iteratively(model, train, val, filters=3, updates=4, batch_size=6)


def test_the_shape_of_the_images_comes_from_the_data():
    data = images_of(shape=(3, 12, 10))
    for step in prune_iteratively(network(channels=3), data, data, filters=8, updates=0):
        assert step.macs == count_macs(step.model, (3, 12, 10))
    with pytest.raises(ValueError, match=r"image_shape must be \(channels, height, width\)"):
        count_macs(network())
    with pytest.raises(ValueError, match=r"can't take a batch of float32 \(1, 1, 8, 8\)"):
        count_macs(network(channels=3), (1, 8, 8))


# What comes out of a network


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.network, self.what = network(), what

    def forward(self, x):
        return self.what(self.network(x))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda y: (y, y), "returned a tuple"),
        (lambda y: {"logits": y}, "returned a dict"),
        (lambda y: y[:, :, None, None], r"returned float32 \(12, 3, 1, 1\)"),
        (lambda y: y[:, 0], r"returned float32 \(12,\)"),
        (lambda y: y.softmax(1), "probabilities"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(what, message):
    model = Returns(what)
    before = state_of(model)
    for use in (lambda: evaluate(model, DATA), lambda: fit(model, DATA, DATA, epochs=1)):
        with pytest.raises(ValueError, match=message):
            use()
    assert_same(state_of(model), before)


@pytest.mark.parametrize("wrong", [-1, 3, -100, 10**9])
def test_labels_are_from_0_to_one_less_than_the_outputs(wrong):
    labels = torch.tensor([0, 2, 1, wrong])
    data = TensorDataset(DATA.tensors[0][:4], labels)
    model = network()
    before = state_of(model)
    for use in (
        lambda: evaluate(model, data),
        lambda: filter_scores(model, data),
        lambda: fit(model, data, DATA, epochs=1),
    ):
        with pytest.raises(ValueError, match="labels must be from 0 to 2"):
            use()
    assert_same(state_of(model), before)
    evaluate(model, TensorDataset(DATA.tensors[0][:3], labels[:3]))


def test_probabilities_are_told_from_logits_and_log_probabilities():
    expected, _ = evaluate(network(), DATA)
    assert evaluate(network(nn.LogSoftmax(1)), DATA)[0] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="leave out the softmax"):
        evaluate(network(nn.Softmax(1)), DATA)
    evaluate(network(nn.Softplus()), DATA)  # positive, but rows don't sum to 1


class Overwrites(nn.Module):
    """Sigmoid needs what it put out, and the ReLU behind it has overwritten that."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3)
        self.head = nn.Linear(80, 3)

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        return self.head(torch.flatten(F.relu(x.sigmoid(), inplace=True), 1))


@pytest.mark.parametrize("kind", [Overwrites, lambda: network(nn.Hardsigmoid())])
def test_what_pytorch_cannot_differentiate_is_said_and_nothing_is_changed(kind):
    model = kind()
    before = state_of(model)
    uses = [lambda: filter_scores(model, DATA, "obd")]
    if kind is Overwrites:
        uses += [
            lambda: filter_scores(model, DATA),
            lambda: fit(model, DATA, DATA, epochs=1),
            lambda: next(prune_iteratively(model, DATA, DATA, filters=3, updates=1)),
            lambda: next(prune_iteratively(model, DATA, DATA, filters=3, updates=0)),
        ]
    for use in uses:
        with pytest.raises(TypeError, match=r"PyTorch can't differentiate the network .*inplace"):
            use()
    assert_same(state_of(model), before)
    filter_scores(model, DATA, "activation_mean")


# A cost of one's own


def test_a_cost_for_each_example_takes_the_place_of_cross_entropy():
    model = network()

    def same(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none")

    for criterion in ("taylor", "taylor_abs_last", "obd", "oracle"):
        torch.testing.assert_close(
            filter_scores(model, DATA, criterion, cost=same), filter_scores(model, DATA, criterion)
        )
    pruner = TaylorPruner(model, cost=same)
    torch.testing.assert_close(pruner.score(DATA), filter_scores(model, DATA))


def by_examples(model, data, cost):
    """Eq. 8 for the feature maps of ``model[:2]``, one example at a time."""
    total = 0
    for image, label in data:
        z = model[:2](image[None]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(cost(model[2:](z), label[None]).sum(), z)
        total = total + (z.detach() * slope).mean((2, 3)).abs()[0]
    return total / len(data)


@pytest.mark.parametrize("task", ["multi-label", "regression", "segmentation"])
def test_other_tasks_are_scored_by_their_own_cost(task):
    torch.manual_seed(0)
    images = DATA.tensors[0]
    if task == "segmentation":
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
        labels = torch.randint(3, (12, 6, 6))

        def cost(outputs, labels):
            return F.cross_entropy(outputs, labels, reduction="none").mean((1, 2))
    elif task == "regression":
        model, labels = network(), torch.rand(12, 3)

        def cost(outputs, labels):
            return (outputs - labels).square().sum(1)
    else:
        model, labels = network(), torch.randint(2, (12, 3)).float()

        def cost(outputs, labels):
            return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none").mean(1)

    data = TensorDataset(images, labels)
    scores = filter_scores(model, data, cost=cost, batch_size=5)
    torch.testing.assert_close(scores["0"], by_examples(model, data, cost), rtol=1e-4, atol=1e-8)


def test_a_cost_without_a_gradient_is_refused():
    for cost in (lambda o, y: o.detach().sum(1), lambda o, y: y.float()):
        with pytest.raises(ValueError, match="cost has no gradient"):
            filter_scores(network(), DATA, cost=cost)


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        ("mse", TypeError, r"cost must be a function of \(outputs, labels\), but it is 'mse'"),
        (lambda outputs: outputs, TypeError, r"cost must be a function of \(outputs, labels\)"),
        (lambda o, y: o @ y, ValueError, r"The cost failed on a mini-batch: .*mat"),
        (lambda o, y: o.foo, ValueError, r"The cost failed on a mini-batch: .*'foo'"),
        (lambda o, y: {}["missing"], KeyError, "missing"),  # one's own errors come through
    ],
)
def test_a_cost_that_fails_is_named(cost, error, message):
    for use in (
        lambda: filter_scores(network(), DATA, cost=cost),
        lambda: filter_scores(network(), DATA, "oracle", cost=cost),
    ):
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (lambda z: z.mean(2), TypeError, r"criterion must be a function of \(feature map, grad"),
        (torch.sum, ValueError, "The criterion failed on a mini-batch: sum"),
        (lambda z, g: z @ g, ValueError, "The criterion failed on a mini-batch: "),
    ],
)
def test_a_criterion_that_fails_is_named(criterion, error, message):
    with pytest.raises(error, match=message):
        filter_scores(network(), DATA, criterion)


def test_layers_without_weights_yet_are_refused_and_stay_so():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    for use in (
        lambda: evaluate(model, DATA),
        lambda: fit(model, DATA, DATA),
        lambda: count_parameters(model),
        lambda: count_macs(model, (1, 8, 8)),
        lambda: latency(model, batch_size=1, image_shape=(1, 8, 8)),
    ):
        with pytest.raises(TypeError, match="without weights yet: run one batch through it first"):
            use()
    assert model[0].has_uninitialized_params()


@pytest.mark.parametrize("wrong", [None, "resnet18", [1], {"a": 1}])
def test_what_is_no_network_is_refused_by_every_function(wrong):
    for use in (
        lambda: evaluate(wrong, DATA),
        lambda: fit(wrong, DATA, DATA),
        lambda: count_macs(wrong, (1, 8, 8)),
        lambda: latency(wrong, batch_size=1, image_shape=(1, 8, 8)),
    ):
        with pytest.raises(TypeError, match=r"must be an nn\.Module"):
            use()


@pytest.mark.parametrize(
    "cost", [F.cross_entropy, lambda o, y: o, lambda o, y: 1.0, lambda o, y: o.sum(1)[:1]]
)
def test_a_cost_that_is_not_one_number_for_each_example_is_refused(cost):
    with pytest.raises(ValueError, match=r"cost must return a tensor \(12,\)"):
        filter_scores(network(), DATA, cost=cost)


# Data


class Items(Dataset):
    def __init__(self, item, size=12):
        self.item, self.size = item, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.item(*DATA[i])


NOT_PAIRS = {
    "a tuple of two tensors": DATA[:6],
    "images alone": DATA.tensors[0],
    "no labels": TensorDataset(DATA.tensors[0]),
    "three parts": Items(lambda x, y: (x, y, "path")),
    "a dict": Items(lambda x, y: {"image": x, "label": y}),
    "PIL images": Items(lambda x, y: (Image.new("L", (8, 8)), int(y))),
    "words for labels": Items(lambda x, y: (x, "shoe")),
    "a loader": DataLoader(DATA),
    "no length": Items(lambda x, y: (x, y), size=None),
    "a length below 0": Items(lambda x, y: (x, y), size=-1),
    "no tensors": TensorDataset(),
    "a number": torch.tensor(1.0),
    "a generator": iter(DATA),
}
NOT_TAKEN = {
    "bytes": TensorDataset((DATA.tensors[0] * 255).to(torch.uint8), DATA.tensors[1]),
    "float64": TensorDataset(DATA.tensors[0].double(), DATA.tensors[1]),
    "no channels": TensorDataset(DATA.tensors[0][:, 0, :, :].repeat(1, 2, 1), DATA.tensors[1]),
    "too small": TensorDataset(DATA.tensors[0][:, :, :2], DATA.tensors[1]),
}


@pytest.mark.parametrize("kind", [*NOT_PAIRS, *NOT_TAKEN])
def test_data_that_cannot_be_used_are_refused_with_what_they_must_be(kind):
    data = {**NOT_PAIRS, **NOT_TAKEN}[kind]
    error = TypeError if kind in NOT_PAIRS else ValueError
    message = r"\(image, label\)" if kind in NOT_PAIRS else r"can't take a batch"
    model = network()
    before = state_of(model)
    for use in (
        lambda: filter_scores(model, data),
        lambda: evaluate(model, data),
        lambda: fit(model, data, DATA, epochs=1),
        lambda: fit(model, DATA, data, epochs=1),
    ):
        with pytest.raises(error, match=message):
            use()
    assert_same(state_of(model), before)


def test_integers_and_numbers_of_numpy_are_taken_and_booleans_are_not():
    model = network()
    scores = filter_scores(model, DATA, batch_size=np.int64(5))
    assert select_filters(scores, np.int64(2)) == select_filters(scores, 2)
    assert (
        len(fit(model, DATA, DATA, epochs=np.int64(1), lr=np.float32(1e-3), seed=np.int8(1))) == 1
    )
    assert remove_filters(model, {"0": np.array([1])})[0].out_channels == 3
    (step,) = prune_iteratively(model, DATA, DATA, filters=np.int64(8), updates=np.int32(1))
    assert step.filters == 8
    for wrong in (True, np.True_, 1.0, torch.tensor(True)):
        with pytest.raises(ValueError, match="epochs"):
            fit(model, DATA, DATA, epochs=wrong)
        with pytest.raises(ValueError, match="list of integers"):
            remove_filters(model, {"0": [wrong]})


# Saving and leaving PyTorch


@pytest.fixture(scope="module")
def pruned():
    model = network().eval()
    removed = select_filters(normalize(filter_scores(model, DATA)), 4)
    return removed, remove_filters(model, removed).eval()


def test_a_pruned_network_comes_back_from_what_was_removed_and_a_state_dict(pruned, tmp_path):
    removed, small = pruned
    torch.save({"removed": removed, "state_dict": small.state_dict()}, tmp_path / "small.pt")

    saved = torch.load(tmp_path / "small.pt", weights_only=True)
    again = remove_filters(network(), saved["removed"]).eval()
    again.load_state_dict(saved["state_dict"])
    assert_same(again(DATA.tensors[0]), small(DATA.tensors[0]))


def test_a_pruned_network_is_exported_by_pytorch_with_any_batch_size(pruned):
    _, small = pruned
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(small, (DATA.tensors[0],), dynamic_shapes=({0: batch},))
    for count in (1, 5, 12):
        images = DATA.tensors[0][:count]
        torch.testing.assert_close(exported.module()(images), small(images))


def test_a_pruned_network_runs_in_onnxruntime_with_any_batch_size(pruned, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    _, small = pruned
    path = tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            small,
            (DATA.tensors[0],),
            path,
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5, 12):
        images = DATA.tensors[0][:count]
        (logits,) = session.run(None, {"images": images.numpy()})
        # Another library sums in another order: float32 rounding.
        torch.testing.assert_close(torch.from_numpy(logits), small(images), rtol=1e-4, atol=1e-5)


def test_a_pruned_network_is_compiled(pruned):
    _, small = pruned
    compiled = torch.compile(copy.deepcopy(small), backend="aot_eager")
    torch.testing.assert_close(compiled(DATA.tensors[0]), small(DATA.tensors[0]))
