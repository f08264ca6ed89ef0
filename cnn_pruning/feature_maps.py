"""The feature maps of a network, and the gradients of the loss with respect to them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from cnn_pruning.chain import Chain, read_chain
from cnn_pruning.data import batches
from cnn_pruning.passes import (
    Cost,
    NoGradientError,
    device_of,
    differentiable,
    evaluation,
    outputs_of,
    pieces,
    summed_loss,
)

Maps = dict[str, tuple[Tensor, Tensor | None]]
"""(z, dC/dz) by name of convolution, both (N, K, M), for K filters at M positions."""

# On a CPU, so many images go through at once that their feature maps have some 10 MiB: more leave
# the cache, and below 32 images what each operation costs by itself counts (measured).
BYTES, FEWEST = 10 * 2**20, 32


def feature_maps(
    model: nn.Module | Chain,
    data: Dataset,
    batch_size: int,
    gradient: bool = True,
    cost: Cost | None = None,
) -> Iterator[tuple[Tensor, Maps]]:
    """Yield, for mini-batches or pieces of them, labels (N,) and (z, dC/dz) by convolution.

    z and dC/dz are (N, K, M), for K filters at M positions, in the model's dtype and on its device.
    C is each example's own cross-entropy, or its ``cost``. Without ``gradient``, dC/dz is None and
    only a forward pass is made.

    The network runs in evaluation mode, and is as it was whenever something is handed out.
    Raises ``TypeError`` if it isn't a chain, and ``ValueError`` for an empty dataset.
    """
    chain = read_chain(model)
    loader = batches(data, batch_size)
    if not chain.links:
        return
    filters = chain.filters()
    found: dict[str, Tensor] = {}
    at_once = FEWEST

    def keep(layer: str, z: Tensor) -> Tensor | None:
        if gradient:
            z, after = with_gradient(layer, z)
            found[layer] = z
            return after
        found[layer] = z
        return None

    def most() -> int:
        return at_once

    for images, labels in pieces(loader, device_of(chain.model), most):
        with torch.inference_mode(False), torch.set_grad_enabled(gradient):
            with evaluation(chain.model), on_feature_maps(chain, keep):
                outputs = outputs_of(chain.model, images)
            check_found(chain, found, len(images))
            gradients = [None] * len(found)
            if gradient:  # of the sum, so that each example has its own
                loss = summed_loss(outputs, labels, cost)
                with differentiable(loss):
                    gradients = torch.autograd.grad(loss, list(found.values()))
        at_once = max(FEWEST, len(images) * BYTES // sum(z.nbytes for z in found.values()))
        yield (
            labels,
            {
                layer: by_position(z, slope, filters[layer])
                for (layer, z), slope in zip(found.items(), gradients, strict=True)
            },
        )
        found.clear()


def with_gradient(layer: str, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a feature map that has a gradient, and what has to take its place in the network.

    Where all that lies before it is frozen, it has none of its own. Raises ``NoGradientError`` if
    the network's own ``forward`` switches gradients off there.
    """
    if not torch.is_grad_enabled():
        raise NoGradientError(
            f"{layer} runs under torch.no_grad() in the network's forward, so its filters have no "
            "gradient: freeze it by requires_grad_(False) instead."
        )
    if z.requires_grad:
        return z, None
    leaf = z.detach().requires_grad_()
    return leaf, leaf.clone()  # a layer behind it may work in place, which a leaf can't take


def by_position(z: Tensor, slope: Tensor | None, filters: int) -> tuple[Tensor, Tensor | None]:
    """A feature map and its gradient as (N, K, M), without their history."""
    shape = (len(z), filters, -1)
    return z.detach().reshape(shape), None if slope is None else slope.reshape(shape)


def check_found(chain: Chain, found: dict[str, Tensor], examples: int) -> None:
    """Raise ``TypeError`` unless each layer put out one feature map for each example."""
    lost = ", ".join(chain.links.keys() - found.keys())
    if lost:
        raise TypeError(
            f"The feature maps of {lost} were not seen in a forward pass: remove hooks that "
            "replace what a layer puts out."
        )
    for layer, z in found.items():
        if len(z) != examples:
            raise TypeError(
                f"{layer} puts out {len(z)} feature maps for {examples} examples: hand in data of "
                "one image for each example."
            )


@contextmanager
def on_feature_maps(chain: Chain, act: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``act(layer, feature map)`` in every forward pass; what it returns takes its place.

    A network that was compiled runs uncompiled meanwhile: compiled, it has no place to look.
    """
    follower = _Follower(act)
    with ExitStack() as stack:
        if any(module._compiled_call_impl for module in chain.model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer, link in chain.links.items():
            conv = chain.model.get_submodule(layer)
            handle = conv.register_forward_hook(follower.starts(conv, layer, link.steps))
            stack.callback(handle.remove)
        yield stack.enter_context(follower)


class _Follower(TorchFunctionMode):
    """Follows the output of a convolution from operation to operation up to its feature map.

    In a chain, each operation takes what the one before put out, so a count is enough.
    """

    def __init__(self, act: Callable[[str, Tensor], Tensor | None]) -> None:
        super().__init__()
        self.act = act
        self.layer: str | None = None
        self.at: Tensor | None = None
        self.left = 0

    def starts(self, conv: nn.Module, layer: str, steps: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
            if module is not conv:  # a copy that was made meanwhile
                return None
            self.layer, self.at, self.left = layer, output, steps
            return self._arrived(output)

        hook.of_pruning = True
        return hook

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if self.at is None or not isinstance(output, Tensor):
            return output
        if not any(value is self.at for value in (*args, *kwargs.values())):
            return output
        self.at, self.left = output, self.left - 1
        return self._arrived(output)

    def _arrived(self, output: Tensor) -> Tensor:
        if self.left:
            return output
        layer, self.at = self.layer, None
        replaced = self.act(layer, output)
        return output if replaced is None else replaced
