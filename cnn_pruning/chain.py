"""A network read as a chain of layers: which convolutions can lose filters, and what follows each.

This is all that pruning has to know about a network. A convolution's filters are tied to what comes
up to the next convolution or linear layer, its *consumer*: batch norms hold values for each of its
channels, and the consumer has weights for each of them. What counts is what is computed, not how it
is written: ``F.relu`` and ``x.relu()`` are read as ``nn.ReLU`` is.
"""

from dataclasses import dataclass, replace

from torch import fx, nn

from cnn_pruning import operations
from cnn_pruning.operations import Kind
from cnn_pruning.tracing import check_network, hooked, layers_that_share, trace


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
    """Read ``model`` as a chain; a ``Chain`` is returned as it is.

    A convolution without a convolution or linear layer behind it puts out the network's own output
    and is left out.

    Raises ``TypeError``, naming the layer, where ``model`` isn't a chain of layers that are known.
    """
    if isinstance(model, Chain):
        return model
    check_network(model)
    if type(model) is nn.Conv2d:
        return Chain(model, {}, fx.Graph(), None)
    reading = _Reading(model, trace(model, training=False), training=False)
    try:
        in_training = _Reading(model, trace(model, training=True), training=True)
    except TypeError as error:
        raise TypeError(f"In training, {error}") from error
    if (in_training.way, in_training.links) != (reading.way, reading.links):
        raise TypeError(
            f"{type(model).__name__} computes something else in training than in evaluation: only "
            "dropout and batch norm may differ (write nn.Dropout, or training=self.training)."
        )
    links = {name: link for name, link in reading.links.items() if link.consumer}
    return Chain(model, links, reading.graph, reading.softmax)


class _Reading:
    """One walk over a graph: ``links`` as found, and ``way``, all but dropouts, to compare.

    ``at`` is where the way from the last convolution has got to, with how many ``axes``, and
    whether its maps are ``points``; ``passed`` is all of the way that lies behind, which nothing
    else may use. ``same_batch`` are the tensors before the first convolution whose first axis is
    that of its input.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, training: bool) -> None:
        self.model, self.graph, self.training = model, graph, training
        self.links: dict[str, Link] = {}
        self.way: list[tuple] = []
        self.softmax: str | None = None
        self.shapes = operations.Shapes(graph)
        self.at: fx.Node | None = None
        self.passed: set[fx.Node] = set()
        self.same_batch: set[fx.Node] = set()
        self.doubt: TypeError | None = None
        for node in graph.nodes:
            self._read(node)
        if not self.links:
            raise TypeError(
                f"{type(model).__name__} has no Conv2d whose filters could be pruned: only "
                "networks with Conv2d layers can be pruned here."
            )
        self._check_used_once()

    def _read(self, node: fx.Node) -> None:
        layer = self._layer(node)
        on_the_way = self.at is not None and self.at in node.all_input_nodes
        if node in self.shapes:
            return
        if not self.passed.isdisjoint(node.all_input_nodes):
            raise self._not_a_chain(node, "uses what another layer uses, too")
        if self.shapes.sizes_used_by(node) & (self.passed | {self.at}):
            if not (on_the_way and operations.adapts(node)):
                raise self._not_a_chain(node, "computes with the shape of the feature maps")
        if not self.training and operations.drops_in_evaluation(node):
            raise self._not_a_chain(
                node, "drops in evaluation, too (write nn.Dropout, or training=self.training)"
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise self._not_a_chain(node, "is a batch norm without running statistics")
        if node.op == "output":
            self._read_output(node)
        elif type(layer) is nn.Conv2d:
            self._read_conv(node, layer, on_the_way)
        elif operations.is_convolution(node, layer):
            raise self._not_a_chain(node, f"is a {operations.name_of(node, layer)}")
        elif on_the_way:
            self._read_follower(node, layer)
        elif not self.links and operations.keeps_batch(node, layer, self.same_batch, self.shapes):
            self.same_batch.add(node)

    def _read_conv(self, node: fx.Node, conv: nn.Conv2d, on_the_way: bool) -> None:
        self._check_weights(node, conv)
        self._check_hooks(node, conv)
        if conv.groups != 1:
            raise self._not_a_chain(node, f"is a grouped convolution (groups={conv.groups})")
        if on_the_way and self.axes < 4:
            raise self._not_a_chain(node, "takes other than feature maps of two axes")
        if on_the_way:
            self._consume(node, conv.in_channels)
        elif self.at is not None:
            raise self._not_a_chain(node, "does not take what the layer before it puts out")
        elif self.same_batch.isdisjoint(node.all_input_nodes):
            self.same_batch = set()
        self.links[node.target] = Link(node.target, (), 0, "")
        self.way.append(("conv", node.target))
        self.at, self.steps, self.axes, self.points = node, 0, 4, False

    def _read_follower(self, node: fx.Node, layer: nn.Module | None) -> None:
        same_batch = self.same_batch | self.passed | {self.at}
        kind = operations.kind_of(
            node, layer, self.at, self.shapes, same_batch, self.axes, self.points
        )
        keeps_size = operations.keeps_size(node, layer)
        if self.axes < 4 and kind is Kind.PASSIVE and not keeps_size:
            kind = "changes the size of a row"
        if isinstance(kind, str):
            self._doubt(node, layer, kind)
        elif self.doubt and kind in (Kind.LINEAR, Kind.NORM):
            raise self.doubt
        elif kind is Kind.LINEAR:
            self._check_weights(node, layer)
            self._check_hooks(node, layer)
            if self.axes > 2:
                raise self._not_a_chain(
                    node, "is a Linear without a Flatten before it (write nn.Flatten())"
                )
            self._consume(node, layer.in_features)
            self.way.append(("linear", node.target))
            return
        elif kind is Kind.NORM:
            self._check_weights(node, layer)
            self._check_size(node, layer.num_features)
            self._change(norms=(*self._link.norms, node.target))
        self._check_hooks(node, layer)
        self.passed.add(self.at)
        self.at = node
        if not operations.is_dropout(node, layer):
            self.way.append((node.op, node.target))
        self.steps += kind is not Kind.NOTHING
        if kind is Kind.PASSIVE and not keeps_size:
            self.points = operations.makes_points(node, layer)
        if kind in (Kind.FLATTEN, Kind.FEWER_AXES):
            self.axes = 2 if kind is Kind.FLATTEN else 3
        if kind in (Kind.NORM, Kind.ACTIVATION):
            self._change(steps=self.steps)

    def _doubt(self, node: fx.Node, layer: nn.Module | None, why: str) -> None:
        """What no rule is known for is an error, unless it only shapes the network's outputs."""
        error = self._not_a_chain(node, why)
        if not operations.can_end(node, layer):
            raise error
        self.doubt = self.doubt or error

    def _read_output(self, node: fx.Node) -> None:
        for result in node.all_input_nodes:
            layer = self._layer(result)
            if operations.is_softmax(result, layer):
                self.softmax = result.target if layer else result.name

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    @property
    def _link(self) -> Link:
        return list(self.links.values())[-1]

    def _change(self, **values) -> None:
        self.links[self._link.conv] = replace(self._link, **values)

    def _consume(self, node: fx.Node, size: int) -> None:
        if self.doubt:
            raise self.doubt
        self._check_size(node, size)
        self._change(consumer=node.target)
        self.passed.add(self.at)
        self.at = None

    def _check_size(self, node: fx.Node, size: int) -> None:
        filters = self.model.get_submodule(self._link.conv).out_channels
        if size != filters and not (self.axes == 2 and size % filters == 0):
            raise self._not_a_chain(
                node, f"takes {size} values for the {filters} filters of {self._link.conv}"
            )

    def _check_hooks(self, node: fx.Node, layer: nn.Module | None) -> None:
        if layer is not None and hooked(layer):
            raise self._not_a_chain(node, "has hooks (remove them while you prune)")

    def _check_weights(self, node: fx.Node, layer: nn.Module) -> None:
        if not {"weight", "bias"} <= layer._parameters.keys():
            raise self._not_a_chain(node, "has a weight that is computed from others")

    def _check_used_once(self) -> None:
        """What loses values must not be used anywhere else, on the way or off it."""
        cut = {name for link in self.links.values() for name in (link.conv, *link.norms)}
        cut |= {link.consumer for link in self.links.values() if link.consumer}
        shared = layers_that_share(self.model)
        used: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "call_module" and node.target in cut:
                if node.target in used:
                    raise self._not_a_chain(node, "is used twice")
                if self._layer(node) in shared:
                    raise self._not_a_chain(node, "shares a weight with another layer")
                used.add(node.target)
            elif node.op == "get_attr" and node.target.rpartition(".")[0] in cut:
                if all(user.args[1:] in (("device",), ("dtype",)) for user in node.users):
                    continue
                raise self._not_a_chain(node, "is used outside its layer, too")

    def _not_a_chain(self, node: fx.Node, why: str) -> TypeError:
        name = node.target
        if node.op != "call_module":
            inside = list(node.meta.get("nn_module_stack") or {"": ""})[-1]
            name = f"{node.name}, in {inside}," if inside else node.name
        if "(write" in why:  # then no other tool is needed
            return TypeError(f"{name} {why}.")
        return TypeError(
            f"{name} {why}: only chains of Conv2d, BatchNorm2d, activations, pooling, dropout, "
            "Flatten and Linear can be pruned here. For other networks use Torch-Pruning, by way "
            "of cnn_pruning.groups."
        )
