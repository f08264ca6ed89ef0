"""The feature maps of a network, and the gradients of the loss with respect to them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cnn_pruning.chain import Link, links
from cnn_pruning.data import batches
from cnn_pruning.training import summed_loss, training_flags

Maps = dict[str, tuple[Tensor, Tensor | None]]


def feature_maps(
    model: nn.Module, data: Dataset, batch_size: int, gradient: bool = True
) -> Iterator[tuple[Tensor, Maps]]:
    """Yield, for every mini-batch, its labels (N,) and {layer: (z, dC/dz)} by name of convolution.

    z and dC/dz are (N, K, M), for K filters at M positions, in the model's dtype and on its device.
    C is each example's own cross-entropy. Without ``gradient``, dC/dz is None and only a forward
    pass is made.

    The network runs in evaluation mode, and is as it was whenever a mini-batch is handed out.
    Raises ``TypeError`` if it isn't a chain, and ``ValueError`` for an empty dataset.
    """
    chain = links(model)
    loader = batches(data, batch_size)
    if not chain:
        return
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}

    def keep(layer: str, z: Tensor) -> None:
        if gradient and not z.requires_grad:  # all that lies before it is frozen
            z.requires_grad_()
        found[layer] = z

    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradient),
            training_flags(model),
            on_feature_maps(chain, keep),
        ):
            model.eval()
            loss = summed_loss(model(images), labels)  # so each example has its own gradient
            gradients = (
                torch.autograd.grad(loss, list(found.values())) if gradient else [None] * len(found)
            )
        maps = {}
        for (layer, z), slope in zip(found.items(), gradients, strict=True):
            shape = (len(images), chain[layer].conv.out_channels, -1)
            maps[layer] = (
                z.detach().reshape(shape),
                None if slope is None else slope.reshape(shape),
            )
        found.clear()
        yield labels, maps


@contextmanager
def on_feature_maps(
    chain: Mapping[str, Link], act: Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call ``act(layer, feature map)`` in every forward pass; what it returns takes its place.

    An activation module may stand behind several convolutions. So each convolution starts a count
    of the layers that follow it, and the last of these puts out its feature map.
    """
    names = {link.conv: layer for layer, link in chain.items()}
    current, left = None, 0

    def hook(module: nn.Module, _: tuple, output: Tensor) -> Tensor | None:
        nonlocal current, left
        if module in names:
            current = names[module]
            left = len(chain[current].followers)
        elif current is not None:
            left -= 1
        if current is not None and left == 0:
            layer, current = current, None
            return act(layer, output)
        return None

    modules = {m for link in chain.values() for m in (link.conv, *link.followers)}
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
