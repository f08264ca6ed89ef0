"""What works on networks that people have: read, scored, pruned, trained, rebuilt, exported.

    python tests/benchmarks/networks.py              all networks, 20 minutes on one core
    python tests/benchmarks/networks.py alexnet      one of them

They are torchvision's, timm's (`uv pip install timm`), and those of handwritten.py. The weights,
the statistics of batch norm and the images are random: whether each step is right doesn't depend
on them. A quarter of the filters leave. A difference is the largest one between two outputs of the
network, as a share of the largest output.
"""

import argparse
import importlib.util
import io
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measuring
import torch
import torchvision
from handwritten import CLASSES, HANDWRITTEN
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_leaves

import cnn_pruning
from cnn_pruning import (
    evaluate,
    filter_scores,
    fit,
    mask_filters,
    normalize,
    remove_filters,
    select_filters,
)
from cnn_pruning.feature_maps import scorable
from cnn_pruning.measure import count_parameters
from cnn_pruning.network.description import CONV, IN_OUTPUTS, Network
from cnn_pruning.network.passes import copy_of

IMAGES = 4
LR = 1e-4

TORCHVISION = """alexnet vgg11_bn:32 resnet18 resnet50 resnext50_32x4d densenet121 squeezenet1_1
    googlenet inception_v3:96 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5
    mnasnet0_5 efficientnet_b0 regnet_x_400mf regnet_y_400mf convnext_tiny swin_t
    lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large
    fcn_resnet50""".split()
VIDEO = ["r3d_18", "r2plus1d_18"]
TIMM = """resnet10t resnet26d resnetblur18 resnetaa34d resnetv2_18 seresnet18 skresnet18
    ecaresnext26t_32x4d gernet_s res2net50_14w_8s resnest14d dla34 dpn48b hrnet_w18_small
    cs3darknet_s cspresnet50 ese_vovnet19b_slim_dw repvgg_a0 mobileone_s0 ghostnet_050
    ghostnetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small mobilenetv1_100 lcnet_035 tinynet_e
    efficientnet_lite0 semnasnet_050 fbnetc_100 mixnet_s hardcorenas_a regnety_002 regnetz_005
    rexnet_100 selecsls42b inception_next_atto nf_resnet26 nf_regnet_b0 convnext_atto
    convnextv2_atto edgenext_xx_small mobilevit_xxs mobilevitv2_050 efficientvit_b0 fastvit_t8
    repvit_m0_9 starnet_s050 poolformer_s12 pvt_v2_b0 levit_128s:224 vit_tiny_patch16_224
    visformer_tiny:224 swiftformer_xs hgnetv2_b0 tresnet_m mambaout_femto fasternet_t0
    halonet26t:256""".split()


@dataclass
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | list[tuple[int, ...]]
    """Of one image; a list, if the network takes several inputs."""


def torchvisions(named: str) -> dict[str, Case]:
    name, _, size = named.partition(":")
    options = {"weights": None, "num_classes": CLASSES}
    if name == "googlenet":
        options |= {"init_weights": False}  # which takes a minute
    if name == "inception_v3":  # its second head needs larger images
        options |= {"init_weights": False, "aux_logits": False}
    if name.startswith(("deeplab", "fcn", "lraspp")):
        options |= {"weights_backbone": None}
    side = int(size or 64)
    shape = (3, 4, 32, 32) if name in VIDEO else (3, side, side)
    return {name: Case(lambda: torchvision.models.get_model(name, **options), shape)}


def timms(named: str) -> dict[str, Case]:
    name, _, size = named.partition(":")
    side = int(size or 64)

    def make() -> nn.Module:
        import timm

        options = {"img_size": side} if name.startswith("vit") else {}
        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)

    return {f"timm {name}": Case(make, (3, side, side))}


CASES = {name: Case(*entry) for name, entry in HANDWRITTEN.items()}
for named in TORCHVISION + VIDEO:
    CASES |= torchvisions(named)
for named in TIMM:
    CASES |= timms(named)


@dataclass
class Result:
    """A network, and what was done to it so far."""

    case: Case
    model: nn.Module
    images: list[Tensor]
    network: Network
    chosen: dict[str, list[int]] | None = None
    small: nn.Module | None = None

    @property
    def data(self) -> list:
        """((image, ...), label) of each example."""
        return [(one if one[1:] else one[0], i) for i, one in enumerate(zip(*self.images))]  # noqa: B905

    def cost(self) -> Callable | None:
        """None for a network that returns logits, in training too."""
        copied = copy_of(self.model).train()
        with torch.no_grad():
            found = copied(*self.images), copied.eval()(*self.images)
        plain = all(isinstance(y, Tensor) and y.shape == (IMAGES, CLASSES) for y in found)
        return None if plain else any_cost


def any_cost(outputs: object, labels: Tensor) -> Tensor:
    """The cross-entropy of all logits in ``outputs``, and the mean square of anything else."""
    return sum(
        cross_entropy(y, labels, reduction="none")
        if y.shape[1:] == (CLASSES,)
        else y.flatten(1).square().mean(1)
        for y in floats(outputs)
    )


def floats(outputs: object) -> list[Tensor]:
    leaves = tree_leaves(outputs)
    return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def difference(left: object, right: object, most: float) -> str:
    """The largest difference, as a share of the largest value; above ``most``, it is WRONG."""
    found = [
        ((x - y).abs().max() / y.abs().max().clamp(min=1e-300)).item()
        if x.shape == y.shape
        else float("inf")
        for x, y in zip(floats(left), floats(right), strict=True)
    ]
    return f"{max(found):.0e}" + " WRONG" * (not all(value <= most for value in found))


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Give batch norm statistics, and other values what is all alike at the start."""
    for layer in model.modules():
        if getattr(layer, "running_var", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
            for value in (layer.weight, layer.bias):
                if value is not None:
                    value.add_(0.3 * torch.randn_like(value))
    for value in model.parameters():
        if value.is_floating_point() and value.amin() == value.amax():
            first = 1.0 if value.amax() == 1 else 0.0  # else a tiny scale, or a zero
            value.normal_(first, 0.3)


def read(case: Case) -> tuple[Result | None, dict[str, str]]:
    torch.manual_seed(0)
    model = case.make()
    randomize(model)
    shapes = case.shape if isinstance(case.shape, list) else [case.shape]
    images = [torch.randn(IMAGES, *shape) for shape in shapes]
    row = {"parameters": f"{count_parameters(model):,}"}
    network, scored, refusal = None, "", ""
    start = time.perf_counter()
    try:
        network = scorable(model.eval(), images)
    except Exception as error:
        refusal = f"refused: {said(error)}"
        try:
            network = scorable(model, images, linear=True)
            scored = "with linear=True: "
        except Exception:
            pass
    row["seconds to read"] = f"{time.perf_counter() - start:.1f}"
    if network is None:
        return None, row | {"scored": scored, "left out": refusal}
    count = sum(network.filters().values())
    row["scored"] = f"{scored}{len(network.groups)} groups, {count:,} filters"
    reasons = {
        name: why
        for name, why in network.left_out.items()
        if why != IN_OUTPUTS and isinstance(network.layer(name), CONV)
    }
    row["left out"] = ""
    if refusal:
        row["left out"] = refusal
    elif reasons:
        print(f"left out: {reasons}", file=sys.stderr)
        text = "; ".join(dict.fromkeys(reasons.values()))
        row["left out"] = f"{len(reasons)} convolutions: {text}"
    return Result(case, model, images, network), row


def removed(result: Result) -> str:
    scores = filter_scores(result.network, result.data, batch_size=IMAGES, cost=result.cost())
    count = sum(map(len, scores.values())) // 4
    result.chosen = select_filters(normalize(scores), count, max_share=0.75)
    result.small = remove_filters(result.network, result.chosen).eval()
    left = count_parameters(result.small) / count_parameters(result.model)
    return f"{count:,}, {left:.0%} of parameters left"


@torch.no_grad()
def masked_against_removed(result: Result) -> str:
    model = copy_of(result.model).double().eval()
    images = [x.double() for x in result.images]
    with mask_filters(result.network.of(model), result.chosen):
        masked = model(*images)
    return difference(copy_of(result.small).double()(*images), masked, 1e-9)


@torch.no_grad()
def zeroed_against_removed(result: Result) -> str:
    """Zeros in place of the weights that the next layers have for what is gone: no hook is used."""
    model = copy_of(result.model).double().eval()
    for name, gone in result.chosen.items():
        for part in result.network.groups[name].side("in"):
            channels = part.channels[torch.isin(part.owners, torch.tensor(gone))]
            zero_columns(model.get_submodule(part.name), channels)
    images = [x.double() for x in result.images]
    return difference(copy_of(result.small).double()(*images), model(*images), 1e-9)


def zero_columns(layer: nn.Module, channels: Tensor) -> None:
    if getattr(layer, "transposed", False):
        layer.weight[channels] = 0
    elif isinstance(layer, CONV):
        each, rows = layer.weight.shape[1], layer.out_channels // layer.groups
        for channel in channels.tolist():
            group = channel // each
            layer.weight[group * rows : (group + 1) * rows, channel % each] = 0
    else:
        layer.weight[:, channels] = 0


def trained(result: Result) -> str:
    data, cost = result.data, result.cost()
    before, _ = evaluate(result.small, data, cost=cost)
    history = fit(result.small, data, data, epochs=1, batch_size=IMAGES // 2, lr=LR, cost=cost)
    return f"loss {before:.4g} to {history[-1]['val_loss']:.4g}"


@torch.no_grad()
def rebuilt(result: Result) -> str:
    file = io.BytesIO()
    torch.save({"removed": result.chosen, "state_dict": result.small.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = remove_filters(result.case.make().eval(), saved["removed"], result.images)
    again.load_state_dict(saved["state_dict"])
    return difference(again(*result.images), result.small(*result.images), 1e-5)


@torch.no_grad()
def exported(result: Result) -> str:
    images = tuple(result.images)
    try:
        program = torch.export.export(result.small.eval(), images)
    except Exception:
        try:
            torch.export.export(result.model.eval(), images)
        except Exception:
            return "nor can the whole one"
        raise
    return difference(program.module()(*images), result.small(*images), 1e-3)


STEPS = {
    "removed": removed,
    "masked - removed, float64": masked_against_removed,
    "weights set to zero - removed, float64": zeroed_against_removed,
    "2 updates by fit": trained,
    "rebuilt from images": rebuilt,
    "torch.export": exported,
}


def said(error: Exception) -> str:
    """The sentence of the package, or else RAW: and the exception."""
    print("".join(traceback.format_exception(error)[-12:]), file=sys.stderr)
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    package = Path(cnn_pruning.__file__).parent
    own = isinstance(error, TypeError | ValueError | FloatingPointError)
    if own and package in Path(raised).parents:
        return str(error)
    return f"RAW: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def row_of(name: str) -> dict[str, str]:
    """Take a network through all steps; where one fails, the row says why."""
    print(f"{name}:", file=sys.stderr)
    start = time.perf_counter()
    result, row = read(CASES[name])
    for step, work in STEPS.items() if result else ():
        if result.small is None and step != "removed":
            break
        try:
            row[step] = work(result)
        except Exception as error:
            row[step] = f"FAILED: {said(error)}"
    row = {"network": name, **row}
    row = {key: textwrap.shorten(cell, 130, placeholder=" ...") for key, cell in row.items()}
    print(f"{' | '.join(row.values())}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return {key: cell.replace("|", "\\|") for key, cell in row.items()}


def counts(rows: list[dict[str, str]]) -> str:
    refused = [row["left out"].startswith("refused") for row in rows]
    wrong = [any("WRONG" in cell for cell in row.values()) for row in rows]
    hidden = sum(row["scored"].startswith("with linear") for row in rows)
    raw = [any("RAW: " in cell for cell in row.values()) for row in rows]
    failed = ["FAILED" in row.get("2 updates by fit", "") for row in rows]
    some = ["convolutions: " in row["left out"] for row in rows]
    cut = [row.get("removed", "") for row in rows]
    exact = [bool(cell) and "FAILED" not in cell and not wrong[i] for i, cell in enumerate(cut)]
    return (
        f"Of {len(rows)} networks, {sum(exact)} were cut exactly. In {sum(some)} networks "
        f"some convolutions can't lose filters. {sum(refused)} were refused whole, but {hidden} "
        f"of these lose hidden units of linear layers. {sum(wrong)} are wrong, {sum(raw)} raised "
        f"raw exceptions, {sum(failed)} can't be trained."
    )


def main(arguments: list[str] | None = None) -> list[dict[str, str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NAME", help="by default, all")
    names = parser.parse_args(arguments).networks or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"There is no {', '.join(unknown)}: the networks are {', '.join(CASES)}.")
    if importlib.util.find_spec("timm") is None and any(n.startswith("timm ") for n in names):
        parser.error("The networks of timm need it: uv pip install timm.")
    warnings.simplefilter("ignore")  # the table says what is left out
    rows = [row_of(name) for name in names]
    print(measuring.markdown(rows))
    print(f"\n{counts(rows)}\n\n{measuring.machine()}")
    return rows


if __name__ == "__main__":
    main()
