"""A network read as a chain of layers: which convolutions can lose filters, and what follows each.

This is all that pruning has to know about a network. A convolution's filters are tied to the
layers up to the next convolution or linear layer, its *consumer*: batch norms hold values for each
of its channels, and the consumer has weights for each of them.
"""

from dataclasses import dataclass, field

from torch import fx, nn

from cnn_pruning.training import training_flags

ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)
# These keep a map of zeros a map of zeros.
PASSIVE = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
    nn.MaxPool2d,
)


@dataclass
class Link:
    """One convolution whose filters can go, with the layers that depend on them."""

    conv: nn.Conv2d
    followers: list[nn.Module] = field(default_factory=list)
    """The batch norms and activations before the consumer, in order; the last one puts out the
    feature map. Without any, the convolution does."""
    consumer: nn.Conv2d | nn.Linear | None = None


def links(model: nn.Module) -> dict[str, Link]:
    """Return the prunable convolutions of ``model`` by name, in the order they are applied.

    A convolution without a convolution or linear layer behind it puts out the network's own output
    and is left out.

    Raises ``TypeError``, naming the layer, where ``model`` isn't a chain of layers that are known.
    """
    found: dict[str, Link] = {}
    current = None
    flat = False
    seen = set()
    for name, layer in layers(model):
        kind = type(layer)
        if kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d):
            if layer in seen:
                raise _unsupported(name, "is used twice")
            if "weight" not in layer._parameters:
                raise _unsupported(name, "has a weight that is computed from others")
            seen.add(layer)
        if kind is nn.Conv2d:
            if layer.groups != 1:
                raise _unsupported(name, f"is a grouped convolution (groups={layer.groups})")
            if current:
                current.consumer = layer
            current = found[name] = Link(layer)
            flat = False
        elif kind is nn.Linear:
            if current and not flat:
                raise _unsupported(name, "is a Linear without a Flatten before it")
            if current:
                current.consumer = layer
            current = None
        elif current and (kind is nn.BatchNorm2d or kind in ACTIVATIONS):
            if kind is nn.PReLU and layer.num_parameters != 1:
                raise _unsupported(name, "is a PReLU with a slope for each channel")
            if kind is nn.BatchNorm2d and not layer.track_running_stats:
                raise _unsupported(name, "is a batch norm without running statistics")
            current.followers.append(layer)
        elif current and kind is nn.Flatten:
            if (layer.start_dim, layer.end_dim) != (1, -1):
                raise _unsupported(name, f"is a {layer}, which keeps more than the examples apart")
            flat = True
        elif current and kind not in PASSIVE:
            raise _unsupported(name, f"is a {kind.__name__}, which no rule is known for")
    return {name: link for name, link in found.items() if link.consumer is not None}


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers, with their names, in the order in which each takes what the one before
    puts out.

    Raises ``TypeError`` where ``model`` isn't such a chain.
    """
    if type(model) in (nn.Conv2d, nn.Linear):
        return [("", model)]
    kept = [(module, dict(vars(module))) for module in model.modules()]
    try:
        with training_flags(model):
            model.eval()
            graph = fx.Tracer(autowrap_modules=()).trace(model)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} can't be read as a chain of layers ({error}): put its layers "
            "into an nn.Sequential, or use Torch-Pruning."
        ) from error
    finally:  # a forward that keeps what it computes would now keep the tracer's stand-ins
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)
    found = []
    before = None
    for node in graph.nodes:
        if node.op == "placeholder" and before is None:
            pass
        elif node.op == "call_module" and node.args == (before,) and not node.kwargs:
            found.append((node.target, model.get_submodule(node.target)))
        elif node.op == "output" and node.args == (before,):
            break
        else:
            inside = list(node.meta.get("nn_module_stack") or {"": ""})[-1]
            where = f"{node.name}, in {inside}" if inside else node.name
            raise _unsupported(where, "is not a layer that follows the one before it")
        before = node
    return found


def _unsupported(name: str, why: str) -> TypeError:
    return TypeError(
        f"{name} {why}: only chains of Conv2d, BatchNorm2d, activations, pooling, dropout, Flatten "
        "and Linear can be pruned here. For other networks use Torch-Pruning."
    )
