"""A network read as a chain of layers: which convolutions can lose filters, and what follows each.

This is all that pruning has to know about a network. A convolution's filters are tied to what comes
up to the next convolution or linear layer, its *consumer*: batch norms hold values for each of its
channels, and the consumer has weights for each of them. What is computed decides, not how it is
written: ``F.relu`` and ``x.relu()`` are read as ``nn.ReLU`` is.
"""

import dis
import inspect
import warnings
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from cnn_pruning import operations
from cnn_pruning.operations import Kind
from cnn_pruning.passes import training_flags


@dataclass(frozen=True)
class Link:
    """One convolution whose filters can go, and what depends on them, by name."""

    conv: str
    norms: tuple[str, ...]
    """The batch norms before the consumer, in order."""
    steps: int
    """How many operations after the convolution its feature map is there: behind the last batch
    norm or activation before the consumer."""
    consumer: str


@dataclass(frozen=True)
class Chain:
    """A network, its prunable convolutions by name in the order they are applied, and its graph.

    Links and graph speak of layers by name, so they hold for a pruned copy as well (``of``).
    """

    model: nn.Module
    links: dict[str, Link]
    graph: fx.Graph
    softmax: str | None
    """The softmax that puts out the network's outputs, if one does."""

    def of(self, model: nn.Module) -> "Chain":
        """The same chain for ``model``, a copy with fewer filters."""
        return replace(self, model=model)

    def filters(self) -> dict[str, int]:
        """How many filters each layer has."""
        return {name: self.model.get_submodule(name).out_channels for name in self.links}


def read_chain(model: nn.Module | Chain) -> Chain:
    """Return the chain that ``model`` is; what is one already is returned as it is.

    A convolution without a convolution or linear layer behind it puts out the network's own output
    and is left out.

    Raises ``TypeError``, naming the layer, where ``model`` isn't a chain of layers that are known.
    """
    if isinstance(model, Chain):
        return model
    _refuse_wrappers(model)
    if type(model) is nn.Conv2d:
        return Chain(model, {}, fx.Graph(), None)
    reading = _Reading(model, _trace(model, training=False))
    try:
        in_training = _Reading(model, _trace(model, training=True))
    except TypeError as error:
        raise TypeError(f"In training, {error}") from error
    if in_training.way != reading.way:
        raise TypeError(
            f"{type(model).__name__} computes something else in training than in evaluation: only "
            "dropout and batch norm may differ (write nn.Dropout, or training=self.training)."
        )
    links = {name: link for name, link in reading.links.items() if link.consumer}
    return Chain(model, links, reading.graph, reading.softmax)


def _refuse_wrappers(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be an nn.Module, but it is a {type(model).__name__}.")
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"The model is wrapped in {kind}: hand in the network inside, model.module."
        )
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "The model is what torch.compile returned: hand in the network inside, model._orig_mod."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"The model is a {kind}, traced or scripted: hand in the network it was traced from."
        )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
            raise TypeError(
                f"{name or 'The model'} is a {type(layer).__name__} without weights yet: run one "
                "batch through the network first."
            )


class _Tracer(fx.Tracer):
    """fx's tracer, for which an ``assert`` holds: what it checks isn't changed by pruning."""

    def to_bool(self, obj: fx.Proxy) -> bool:
        frame = inspect.currentframe().f_back.f_back  # behind Proxy.__bool__
        code = list(dis.get_instructions(frame.f_code))
        asked = next(i for i, step in enumerate(code) if step.offset == frame.f_lasti)
        jump = next(i for i, step in enumerate(code) if i >= asked and "JUMP" in step.opname)
        ahead = code[jump + 1]
        aside = next((step for step in code if step.offset == code[jump].argval), ahead)
        if _fails(ahead) or _fails(aside):
            return ("IF_TRUE" in code[jump].opname) == _fails(ahead)
        return super().to_bool(obj)


def _fails(step: dis.Instruction) -> bool:
    return "ASSERTION_ERROR" in step.opname or "AssertionError" in step.argrepr


def _trace(model: nn.Module, training: bool) -> fx.Graph:
    kept = [(module, dict(vars(module))) for module in model.modules()]
    parameters = list(inspect.signature(type(model).forward).parameters.values())[2:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        with training_flags(model), warnings.catch_warnings():
            model.train(training)
            warnings.simplefilter("ignore")  # of arguments that take their defaults
            return _Tracer(autowrap_modules=()).trace(model, defaults or None)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} can't be read as a chain of layers ({error}): its forward may "
            "not depend on what it computes (write torch.flatten(x, 1) for shapes computed by "
            "hand), or use Torch-Pruning."
        ) from error
    finally:  # a forward that keeps what it computes would now keep the tracer's stand-ins
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)


class _Reading:
    """One walk over a graph: ``links`` as found, and ``way``, all that was read, to compare.

    ``at`` is where the way from the last convolution has got to; ``passed`` is all of the way that
    lies behind, which nothing else may use.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.graph = model, graph
        self.links: dict[str, Link] = {}
        self.way: list[tuple] = []
        self.softmax: str | None = None
        self.shapes = operations.Shapes(graph)
        self.used: set[str | nn.Module] = set()
        self.at: fx.Node | None = None
        self.passed: set[fx.Node] = set()
        self.before: set[fx.Node] = set()  # the first convolution, in the same order of axes
        for node in graph.nodes:
            self._read(node)
        if not self.links:
            raise TypeError(
                f"{type(model).__name__} has no Conv2d whose filters could be pruned: only "
                "networks with Conv2d layers can be pruned here."
            )

    def _read(self, node: fx.Node) -> None:
        layer = self.model.get_submodule(node.target) if node.op == "call_module" else None
        on_the_way = self.at is not None and self.at in node.all_input_nodes
        if node in self.shapes:
            return
        if not self.passed.isdisjoint(node.all_input_nodes):
            raise self._not_a_chain(node, "uses what another layer uses, too")
        if node.op == "output":
            self._read_output(node)
        elif type(layer) is nn.Conv2d:
            self._read_conv(node, layer, on_the_way)
        elif operations.is_convolution(node, layer):
            raise self._not_a_chain(node, f"is a {operations.name_of(node, layer)}")
        elif on_the_way:
            self._read_follower(node, layer)
        elif not self.links:
            self.before = set() if operations.moves_axes(node) else self.before | {node}

    def _read_conv(self, node: fx.Node, conv: nn.Conv2d, on_the_way: bool) -> None:
        self._check_weights(node, conv)
        if conv.groups != 1:
            raise self._not_a_chain(node, f"is a grouped convolution (groups={conv.groups})")
        if on_the_way:
            self._consume(node, conv.in_channels)
        elif self.at is not None:
            raise self._not_a_chain(node, "does not take what the layer before it puts out")
        self.links[node.target] = Link(node.target, (), 0, "")
        self.way.append(("conv", node.target))
        self.at, self.steps, self.flat = node, 0, False

    def _read_follower(self, node: fx.Node, layer: nn.Module | None) -> None:
        same_batch = self.before | self.passed | {self.at}
        kind = operations.kind_of(node, layer, self.at, self.shapes, same_batch)
        if isinstance(kind, str):  # why it can't be read
            raise self._not_a_chain(node, kind)
        if kind is Kind.LINEAR:
            self._check_weights(node, layer)
            if not self.flat:
                raise self._not_a_chain(
                    node, "is a Linear without a Flatten before it (write nn.Flatten())"
                )
            self._consume(node, layer.in_features)
            self.way.append(("linear", node.target))
            return
        if kind is Kind.NORM:
            self._check_weights(node, layer)
            if not layer.track_running_stats:
                raise self._not_a_chain(node, "is a batch norm without running statistics")
            self._check_size(node, layer.num_features)
            self._change(norms=(*self._link.norms, node.target))
        self.passed.add(self.at)
        self.at = node
        self.way.append((node.op, node.target))
        self.steps += kind is not Kind.NOTHING
        self.flat = self.flat or kind is Kind.FLATTEN
        if kind in (Kind.NORM, Kind.ACTIVATION):
            self._change(steps=self.steps)

    def _read_output(self, node: fx.Node) -> None:
        for result in node.all_input_nodes:
            layer = self.model.get_submodule(result.target) if result.op == "call_module" else None
            if operations.is_softmax(result, layer):
                self.softmax = result.target if layer else result.name

    @property
    def _link(self) -> Link:
        return list(self.links.values())[-1]

    def _change(self, **values) -> None:
        self.links[self._link.conv] = replace(self._link, **values)

    def _consume(self, node: fx.Node, size: int) -> None:
        self._check_size(node, size)
        self._change(consumer=node.target)
        self.passed.add(self.at)
        self.at = None

    def _check_size(self, node: fx.Node, size: int) -> None:
        filters = self.model.get_submodule(self._link.conv).out_channels
        if size != filters and not (self.flat and size % filters == 0):
            raise self._not_a_chain(
                node, f"takes {size} values for the {filters} filters of {self._link.conv}"
            )

    def _check_weights(self, node: fx.Node, layer: nn.Module) -> None:
        if layer in self.used:
            raise self._not_a_chain(node, "is used twice")
        if "weight" not in layer._parameters:
            raise self._not_a_chain(node, "has a weight that is computed from others")
        self.used.add(layer)

    def _not_a_chain(self, node: fx.Node, why: str) -> TypeError:
        name = node.target
        if node.op != "call_module":
            inside = list(node.meta.get("nn_module_stack") or {"": ""})[-1]
            name = f"{node.name}, in {inside}," if inside else node.name
        return TypeError(
            f"{name} {why}: only chains of Conv2d, BatchNorm2d, activations, pooling, dropout, "
            "Flatten and Linear can be pruned here. For other networks use Torch-Pruning."
        )
