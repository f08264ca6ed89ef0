"""What works on networks that people have: scored, pruned, trained, exported, saved.

    python tests/benchmarks/networks.py              all networks, 10 minutes on one core
    python tests/benchmarks/networks.py AlexNet      one of them

The weights and images are random: whether each step is right doesn't depend on them. A quarter of
the filters leave. A difference is the largest one between two outputs of the network, as a share
of the largest output.
"""

import argparse
import copy
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measuring
import torch
import torchvision
from cnn_pruning.groups import group_scores, mask_groups, remove_groups
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cnn_pruning import (
    evaluate,
    filter_scores,
    fit,
    mask_filters,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.measure import count_parameters

CLASSES = 10


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


@dataclass
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    before: str
    """At what commit 65228c0 refused the network ("... is not a layer that follows ...")."""
    chain: bool = True
    lr: float = 1e-3


def torchvisions(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)


CASES = {
    "MNIST example": Case(MNISTExample, (1, 28, 28), "relu"),
    "CIFAR-10 tutorial": Case(CIFARTutorial, (3, 32, 32), "relu"),
    "AlexNet": Case(torchvisions("alexnet"), (3, 64, 64), "flatten"),
    "VGG-11": Case(torchvisions("vgg11"), (3, 32, 32), "flatten", lr=1e-4),
    "VGG-16": Case(torchvisions("vgg16"), (3, 32, 32), "flatten", lr=1e-4),
    "resnet18": Case(torchvisions("resnet18"), (3, 64, 64), "add", chain=False),
    "mobilenet_v3_small": Case(torchvisions("mobilenet_v3_small"), (3, 64, 64), "mul", chain=False),
}


@dataclass
class Result:
    """A network, and what was done to it so far."""

    case: Case
    data: TensorDataset
    model: nn.Module
    chosen: dict[str, list[int]] | None = None
    small: nn.Module | None = None

    def remove(self, model: nn.Module) -> nn.Module:
        data = () if self.case.chain else (as_dtype_of(model, self.data),)
        return (remove_filters if self.case.chain else remove_groups)(model, self.chosen, *data)


def as_dtype_of(model: nn.Module, data: TensorDataset) -> TensorDataset:
    images, labels = data.tensors
    return TensorDataset(images.to(next(model.parameters()).dtype), labels)


def difference(left: Tensor, right: Tensor) -> str:
    return f"{((left - right).abs().max() / right.abs().max()).item():.0e}"


def scored(result: Result) -> str:
    score = filter_scores if result.case.chain else group_scores
    scores = score(result.model, result.data, batch_size=4)
    count = sum(map(len, scores.values()))
    result.chosen = select_filters(normalize(scores), count // 4)
    return f"{count:,} {'filters' if result.case.chain else 'coupled filters'}"


def removed(result: Result) -> str:
    result.small = result.remove(result.model)
    left = count_parameters(result.small) / count_parameters(result.model)
    return f"{sum(map(len, result.chosen.values())):,}, {left:.0%} of parameters left"


@torch.no_grad()
def masked_against_removed(result: Result) -> str:
    model = copy.deepcopy(result.model).double().eval()
    images = result.data.tensors[0].double()
    small = result.remove(model)
    if result.case.chain:
        with mask_filters(model, result.chosen):
            masked = model(images)
    else:
        with mask_groups(model, result.chosen, as_dtype_of(model, result.data)):
            masked = model(images)
    return difference(small(images), masked)


def retrained(result: Result) -> str:
    before, _ = evaluate(result.small, result.data)
    history = fit(result.small, result.data, result.data, epochs=1, batch_size=4, lr=result.case.lr)
    result.small.eval()
    return f"loss {before:.3f} to {history[-1]['val_loss']:.3f}"


@torch.no_grad()
def exported(result: Result) -> str:
    images = result.data.tensors[0]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(result.small, (images[:2],), dynamic_shapes=({0: batch},))
    return difference(program.module()(images), result.small(images))


@torch.no_grad()
def in_onnxruntime(result: Result) -> str:
    import onnxruntime

    images = result.data.tensors[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        torch.onnx.export(
            result.small,
            (images[:2],),
            path,
            input_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (outputs,) = session.run(None, {"images": images.numpy()})
    return difference(torch.from_numpy(outputs), result.small(images))


@torch.no_grad()
def saved_and_loaded(result: Result) -> str:
    file = io.BytesIO()
    torch.save({"removed": result.chosen, "state_dict": result.small.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    result.chosen = saved["removed"]
    again = result.remove(result.case.make().eval())
    again.load_state_dict(saved["state_dict"])
    images = result.data.tensors[0]
    return difference(again(images), result.small(images))


STEPS = {
    "scored": scored,
    "removed": removed,
    "masked - removed, float64": masked_against_removed,
    "2 updates by fit": retrained,
    "torch.export": exported,
    "onnxruntime": in_onnxruntime,
    "saved and loaded": saved_and_loaded,
}


def row_of(name: str) -> dict[str, str]:
    """Take a network through all steps; where one fails, the row says why, and ends."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, *case.shape, generator=generator)
    data = TensorDataset(images, torch.arange(8) % CLASSES)
    torch.manual_seed(0)
    model = case.make()
    with torch.no_grad():
        model.train()(images)  # so that batch norm has statistics
    row = {
        "network": name,
        "parameters": f"{count_parameters(model):,}",
        "before": f"refused: {case.before}",
    }
    result = Result(case, data, model.eval())
    for step, work in STEPS.items():
        print(f"{name}: {step}", file=sys.stderr)
        try:
            row[step] = work(result)
        except Exception as error:
            row[step] = f"FAILED: {str(error).splitlines()[0]}"
            break
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", choices=[[], *CASES], help="by default, all")
    names = parser.parse_args(arguments).networks or CASES
    warnings.simplefilter("ignore")  # of the exporters
    rows = [row_of(name) for name in names]
    print(measuring.markdown(rows))
    print(f"\n{measuring.machine()}")
    return rows


if __name__ == "__main__":
    main()
